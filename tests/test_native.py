"""The loader of native modules: builds once, survives kills and broken machines, and says what it did.

A module without kernels stands in for the real one, and an empty package for torch, so that a build takes a
fraction of a second. That the real sources build is what every test of `xrdfast.ops` shows.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xrdfast import _native

ROOT = Path(__file__).resolve().parent.parent

BINDING = """// A module as small as can be, in place of the kernels.
#include <Python.h>
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(VALUE); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
"""

# A compiler that notes every object it makes, and makes none while the file `hold` is there.
COMPILER = """#!/bin/sh
case " $* " in *" -c "*)
    echo compiled >> FOLDER/compiled
    while [ -e FOLDER/hold ]; do sleep 0.02; done
esac
exec c++ "$@"
"""

PROGRAM = """
import sys, warnings
from pathlib import Path
from xrdfast import _native
_native.CSRC, _native._LOCK_TIMEOUT = Path(sys.argv[1]), float(sys.argv[2])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        found = [_native.cpu() for _ in range(3)][-1]
    except (_native.BuildError, ValueError) as error:
        print(type(error).__name__, str(error).replace(chr(10), " | "))
        sys.exit()
print("value", None if found is None else found.answer())
for entry in caught:
    print(entry.category.__name__, str(entry.message).replace(chr(10), " | "))
"""


class Workshop:
    """A folder with sources, a cache, a compiler, and an empty package in torch's place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources = folder / "csrc"
        self.cache = folder / "cache"
        (folder / "packages" / "torch" / "include" / "pybind11").mkdir(parents=True)
        (folder / "packages" / "torch" / "__init__.py").touch()
        self.sources.mkdir()
        self.write("1")
        compiler = folder / "compiler"
        compiler.write_text(COMPILER.replace("FOLDER", str(folder)))
        compiler.chmod(0o755)

    def write(self, value: str) -> None:
        (self.sources / "bind_cpu.cpp").write_text(BINDING.replace("VALUE", value))

    def compiled(self) -> int:
        """Objects compiled so far."""
        log = self.folder / "compiled"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def start(self, lock_timeout: float = 60.0, **changes: str) -> subprocess.Popen[str]:
        settings = {
            "XRDFAST_CACHE": str(self.cache),
            "XRDFAST_BACKEND": "auto",
            "CXX": str(self.folder / "compiler"),
            "PYTHONPATH": os.pathsep.join([str(self.folder / "packages"), str(ROOT)]),
        }
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.sources), str(lock_timeout)],
            env=os.environ | settings | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            start_new_session=True,
        )

    def run(self, lock_timeout: float = 60.0, **changes: str) -> tuple[str, str]:
        return self.start(lock_timeout, **changes).communicate(timeout=120)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_builds_once_and_then_loads(workshop: Workshop) -> None:
    out, err = workshop.run()
    assert out == "value 1\n"
    assert err.count("building") == 1
    assert workshop.run() == ("value 1\n", "")
    assert workshop.compiled() == 1


def test_other_content_with_an_older_date_is_built_again(workshop: Workshop) -> None:
    workshop.run()
    workshop.write("2")
    os.utime(workshop.sources / "bind_cpu.cpp", (1, 1))
    assert workshop.run()[0] == "value 2\n"


def test_a_changed_header_is_built_again(workshop: Workshop) -> None:
    header, binding = workshop.sources / "value.h", workshop.sources / "bind_cpu.cpp"
    workshop.write("kValue")
    binding.write_text('#include "value.h"\n' + binding.read_text())
    for value in (3, 4):
        header.write_text(f"constexpr int kValue = {value};\n")
        os.utime(header, (1, 1))
        assert workshop.run()[0] == f"value {value}\n"


def test_another_version_of_the_compiler_builds_again(workshop: Workshop) -> None:
    """Whichever line of its answer the number stands on: nvcc's is not on the first."""
    compiler = workshop.folder / "compiler"
    told = compiler.read_text()
    for n, version in enumerate(("1.0", "1.1", "1.1"), 1):
        answer = f'if [ "$1" = --version ]; then echo maker; echo {version}; exit; fi\nexec c++'
        compiler.write_text(told.replace("exec c++", answer))
        assert workshop.run()[0] == "value 1\n"
        assert workshop.compiled() == min(n, 2)


def test_a_launcher_in_front_of_the_compiler(workshop: Workshop) -> None:
    assert workshop.run(CXX=f"env {workshop.folder / 'compiler'}")[0] == "value 1\n"
    assert workshop.compiled() == 1
    out, _ = workshop.run(CXX="env nope", XRDFAST_BACKEND="native")
    assert "no C++ compiler ('nope' is not on PATH)" in out


def test_two_processes_build_once(workshop: Workshop) -> None:
    hold = workshop.folder / "hold"
    hold.touch()
    both = [workshop.start(), workshop.start()]
    wait_for(workshop.compiled)
    time.sleep(0.5)  # the other one reaches the lock
    hold.unlink()
    assert [process.communicate(timeout=120)[0] for process in both] == ["value 1\n"] * 2
    assert workshop.compiled() == 1


def test_a_killed_build_does_not_hang_the_next(workshop: Workshop) -> None:
    hold = workshop.folder / "hold"
    hold.touch()
    process = workshop.start()
    wait_for(workshop.compiled)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(workshop.cache.glob("*/build-*"))
    hold.unlink()
    assert workshop.run(lock_timeout=5.0)[0] == "value 1\n"
    assert not list(workshop.cache.glob("*/build-*"))


def test_a_lock_held_by_another_process_times_out(workshop: Workshop) -> None:
    workshop.run()
    (module,) = workshop.cache.glob("*/*.so")
    module.unlink()
    with open(module.parent / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        out, _ = workshop.run(lock_timeout=0.2, XRDFAST_BACKEND="native")
    assert out.startswith("BuildError")
    assert f"{module.parent / 'lock'}: held by another build" in out
    assert workshop.run()[0] == "value 1\n"


def test_without_a_compiler(workshop: Workshop) -> None:
    first, *others = workshop.run(CXX="nope")[0].splitlines()
    assert first == "value None"
    (warning,) = others
    assert warning.startswith("RuntimeWarning")
    assert "no C++ compiler ('nope' is not on PATH)" in warning
    assert "slow PyTorch references" in warning
    out, _ = workshop.run(CXX="nope", XRDFAST_BACKEND="native")
    assert out.startswith("BuildError")
    assert "set CXX" in out
    assert workshop.run(CXX="nope", XRDFAST_BACKEND="reference") == ("value None\n", "")


def test_a_compiler_error_is_quoted(workshop: Workshop) -> None:
    workshop.write("undeclared_name")
    out, _ = workshop.run(XRDFAST_BACKEND="native")
    assert out.startswith("BuildError")
    assert "the compiler failed" in out
    assert "undeclared_name" in out
    workshop.write("5")
    assert workshop.run()[0] == "value 5\n"


def test_a_module_that_cannot_be_loaded(workshop: Workshop) -> None:
    with open(workshop.sources / "bind_cpu.cpp", "a") as source:
        source.write("void nowhere();\nstatic const int kUse = (nowhere(), 0);\n")
    out, _ = workshop.run(XRDFAST_BACKEND="native")
    assert out.startswith("BuildError")
    assert "nowhere" in out


def test_a_cache_that_cannot_be_written(workshop: Workshop) -> None:
    blocked = workshop.folder / "file"
    blocked.touch()
    out, _ = workshop.run(XRDFAST_BACKEND="native", XRDFAST_CACHE=str(blocked / "cache"))
    assert out.startswith("BuildError")
    assert f"{blocked / 'cache'}" in out
    assert "cannot be written (Not a directory); set XRDFAST_CACHE" in out


def test_no_home_for_the_cache(workshop: Workshop) -> None:
    """As for a user of a container that the system has no entry for."""
    first, warning = workshop.run(XRDFAST_CACHE="~nobody-has-this-name/cache")[0].splitlines()
    assert first == "value None"
    assert "set XRDFAST_CACHE to a folder that can be written" in warning


def test_an_unknown_backend(workshop: Workshop) -> None:
    out, _ = workshop.run(XRDFAST_BACKEND="bogus")
    assert out == "ValueError XRDFAST_BACKEND must be auto, native or reference, got 'bogus'\n"


def test_one_openmp_library() -> None:
    """Two would mean two thread pools, and torch.set_num_threads would hold for one of them only."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc/self/maps on this system")
    code = """
from xrdfast import _native
assert _native.cpu() is not None
print(*{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert len(done.stdout.split()) == 1, done.stdout


def test_status_names_what_is_used() -> None:
    status = _native.status()
    assert status["_cpu"].endswith(_native.EXTENSION_SUFFIX)
    assert {"python", "torch", "compiler", "ninja", "cache", "backend"} <= set(status)


def test_the_parser_builds_at_once_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XRDFAST_CACHE", str(tmp_path))
    path = _native.build_module("_text")
    assert capsys.readouterr().err == f"xrdfast: building {path.name}, once ...\n"


def test_cuda_is_compiled_for_the_least_of_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_nvcc", lambda: "nvcc")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: [(9, 0), (8, 6), (10, 0)][i])
    commands = _native._plan("_cuda", None)["sources"].values()
    assert {flag for command in commands for flag in command if "sm_" in flag} == {"-arch=sm_86"}


def test_the_cuda_module_builds_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the launches: every kernel and the binding compiled for a device, linked, and loaded."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    monkeypatch.setenv("XRDFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    path = _native.build_module("_cuda")
    try:
        module = _native._load("_cuda", path)
    except ImportError as error:
        if "libcudart" not in str(error):
            raise
        pytest.skip(f"the CUDA runtime is not where programs find it: {error}")
    assert callable(module.render_sticks)
