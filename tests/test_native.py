"""The loader of native modules: builds once, survives kills and broken machines, and says what it did."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch  # noqa: F401 (the module under test shares its OpenMP library)

from xrdfast import _native

ROOT = Path(__file__).resolve().parent.parent

BINDING = """
// A module as small as can be, in place of the kernels.
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_cpu, m) { m.def("answer", [] { return VALUE; }); }
"""

PROGRAM = """
import sys, warnings
from pathlib import Path
import torch
from xrdfast import _native
_native.CSRC = Path(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        found = [_native.cpu() for _ in range(3)][-1]
    except _native.BuildError as error:
        print("BuildError", str(error).replace(chr(10), " | "))
        sys.exit()
print("value", None if found is None else found.answer(), "warnings", len(caught))
for entry in caught:
    print(str(entry.message).replace(chr(10), " | "))
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc"
    folder.mkdir()
    write(folder, 1)
    return folder


def write(folder: Path, value: int | str) -> None:
    (folder / "bind_cpu.cpp").write_text(BINDING.replace("VALUE", str(value)))


def environment(tmp_path: Path, **changes: str) -> dict[str, str]:
    return os.environ | {"XRDFAST_CACHE": str(tmp_path / "cache"), "XRDFAST_BACKEND": "auto"} | changes


def start(sources: Path, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(sources)],
        env=environment(sources.parent, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def run(sources: Path, **changes: str) -> tuple[str, str]:
    out, err = start(sources, **changes).communicate(timeout=120)
    return out, err


def test_builds_once_and_then_loads(sources: Path) -> None:
    out, err = run(sources)
    assert out == "value 1 warnings 0\n"
    assert err.count("building") == 1
    out, err = run(sources)
    assert out == "value 1 warnings 0\n"
    assert err == ""


def test_other_content_with_an_older_date_is_built_again(sources: Path) -> None:
    run(sources)
    write(sources, 2)
    os.utime(sources / "bind_cpu.cpp", (1, 1))
    out, _ = run(sources)
    assert out == "value 2 warnings 0\n"


def test_two_processes_build_once(sources: Path) -> None:
    both = [start(sources), start(sources)]
    results = [process.communicate(timeout=120) for process in both]
    assert [out for out, _ in results] == ["value 1 warnings 0\n"] * 2
    assert sum(err.count("building") for _, err in results) == 1


def test_a_killed_build_does_not_hang_the_next(sources: Path) -> None:
    process = start(sources)
    deadline = time.monotonic() + 60
    while not list((sources.parent / "cache").glob("*/build-*/build.ninja")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    out, _ = run(sources)
    assert out == "value 1 warnings 0\n"
    assert not list((sources.parent / "cache").glob("*/build-*"))


def test_without_a_compiler(sources: Path) -> None:
    out, _ = run(sources, CXX="nope")
    assert out.startswith("value None warnings 1\n")
    assert "no C++ compiler ('nope' is not on PATH)" in out
    assert "slow PyTorch references" in out
    out, _ = run(sources, CXX="nope", XRDFAST_BACKEND="native")
    assert out.startswith("BuildError")
    assert "set CXX" in out
    assert run(sources, CXX="nope", XRDFAST_BACKEND="reference")[0] == "value None warnings 0\n"


def test_a_compiler_error_is_quoted(sources: Path) -> None:
    write(sources, "undeclared_name")
    out, _ = run(sources, XRDFAST_BACKEND="native")
    assert "undeclared_name" in out
    assert "the compiler failed" in out


def test_a_cache_that_cannot_be_written(sources: Path) -> None:
    blocked = sources.parent / "file"
    blocked.write_text("")
    out, _ = run(sources, XRDFAST_BACKEND="native", XRDFAST_CACHE=str(blocked / "cache"))
    assert "set XRDFAST_CACHE" in out


def test_a_lock_that_is_held_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_LOCK_TIMEOUT", 0.2)
    with (
        _native._file_lock(tmp_path / "lock"),
        pytest.raises(_native.BuildError, match="held by another build"),
        _native._file_lock(tmp_path / "lock"),
    ):
        pass


def test_an_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XRDFAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="XRDFAST_BACKEND must be auto, native or reference, got 'fast'"):
        _native.backend()


def test_one_openmp_library() -> None:
    """Two would mean two thread pools, and torch.set_num_threads would hold for one of them only."""
    assert _native.cpu() is not None
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps on this system")
    libraries = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert len(libraries) == 1


def test_status_names_what_is_used() -> None:
    status = _native.status()
    assert status["_cpu"].endswith(_native.EXTENSION_SUFFIX)
    assert {"python", "torch", "compiler", "ninja", "cache", "backend"} <= set(status)


def test_wheel_holds_sources_and_nothing_compiled(tmp_path: Path) -> None:
    import zipfile

    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "__pycache__", ".*cache", "results")
    shutil.copytree(ROOT, copy, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(copy)], check=True, capture_output=True, cwd=tmp_path)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {"xrdfast/csrc/simulate.cpp", "xrdfast/csrc/simulate.h", "xrdfast/form_factors.json"} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".o"))]
