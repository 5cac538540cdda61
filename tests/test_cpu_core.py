"""The CPU kernels without Python or torch, under sanitizers: random sizes, hostile values, exact buffers.

What the numbers must be is tested in tests/ops. The CUDA kernels have tests/emulation.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from xrdfast import _native

DRIVERS = Path(__file__).resolve().parent / "native"
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled driver; without OpenMP, whose threads sanitizers misread."""
    folder = tmp_path_factory.mktemp("core")
    compiler = os.environ.get("CXX") or "c++"
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    flags = ["-std=c++17", "-O1", "-g", SANITIZERS, "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"]
    done = compile_(compiler, *flags, probe, "-o", folder / "probe")
    if done.returncode != 0:
        pytest.skip(f"this compiler has no sanitizers: {done.stderr.strip().splitlines()[-1]}")
    core = (p for p in sorted(_native.CSRC.glob("*.cpp")) if not p.name.startswith("bind_"))
    sources = [*sorted(DRIVERS.glob("*.cpp")), *core]
    # Without OpenMP and AVX there are pragmas and parameters without use, and vectors passed in memory.
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-psabi"]
    done = compile_(compiler, *flags, *warnings, f"-I{_native.CSRC}", *sources, "-o", folder / "drive_cpu")
    assert done.returncode == 0, done.stderr
    return folder / "drive_cpu"


def compile_(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, errors="replace", check=False)


@pytest.mark.parametrize("first", [0, 1000])
def test_hostile_values_break_no_rule(driver: Path, first: int) -> None:
    done = compile_(driver, first, 100)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith(" passed, 0 failed\n")
