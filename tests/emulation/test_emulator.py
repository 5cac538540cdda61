"""The emulator finds planted bugs; the shipped kernels run under sanitizers, in several thread orders."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from xrdfast import _native

HERE = Path(__file__).resolve().parent
FLAGS = {
    "plain": ["-O1"],
    "portable": ["-O1", "-DCUEMU_UCONTEXT"],  # switches fibers as on processors other than x86-64
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}

N_ATOMS = 100  # so many that their tables fill shared memory more than once

Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """Compiles "drive" or "planted_bugs" with a set of FLAGS, once, and gives a function to run it."""
    compiler = os.environ.get("CXX") or "c++"
    assert shutil.which(compiler), "a C++ compiler is needed to run the tests"
    folder = tmp_path_factory.mktemp("emulated")
    made: dict[tuple[str, str], Path] = {}

    def compiled(name: str, flags: str) -> Run:
        if (name, flags) not in made:
            sources = [HERE / "planted_bugs.cu"]
            if name == "drive":
                sources = [*sorted(HERE.glob("drive*.cpp")), *sorted(_native.CSRC.glob("*.cu"))]
            target = folder / f"{name}-{flags}"
            command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
            command += [*FLAGS[flags], f"-I{HERE}", f"-I{_native.CSRC}", "-x", "c++"]
            command += [*map(str, sources), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if "cannot find" in done.stderr and flags in ("address", "thread"):
                pytest.skip(f"this compiler has no {flags} sanitizer: {done.stderr.strip().splitlines()[-1]}")
            assert done.returncode == 0, done.stderr
            made[name, flags] = target

        def run(*arguments: object, order: int = 0) -> subprocess.CompletedProcess:
            return subprocess.run(
                [str(made[name, flags]), *map(str, arguments)],
                env={**os.environ, "CUEMU_ORDER": str(order), "ASAN_OPTIONS": "detect_leaks=0"},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=900,  # of a process that hangs
                check=False,
            )

        return run

    return compiled


@pytest.mark.parametrize("order", [0, 1, 7])
@pytest.mark.parametrize("flags", list(FLAGS))
def test_no_report_on_a_correct_kernel(program, flags: str, order: int) -> None:
    done = program("planted_bugs", flags)(0, order=order)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


@pytest.mark.parametrize(
    ("bug", "flags", "message"),
    [
        (1, "plain", "deadlock"),
        (2, "plain", "__syncthreads not reached by exited threads"),
        (3, "plain", "deadlock"),
        (4, "plain", "lanes of one mask meet at different operations"),
        (6, "thread", "data race"),
        (7, "thread", "data race"),
        (8, "address", "heap-buffer-overflow"),
        (9, "address", "heap-buffer-overflow"),
        (10, "plain", "shuffle reads an inactive lane"),
        (11, "thread", "data race"),
    ],
)
@pytest.mark.parametrize("order", [0, 7])
def test_planted_bugs_are_found(program, bug: int, flags: str, message: str, order: int) -> None:
    done = program("planted_bugs", flags)(bug, order=order)
    assert done.returncode != 0
    assert message in done.stderr


def test_unwritten_shared_memory_shows_as_nan(program) -> None:
    assert "nan" in program("planted_bugs", "plain")(5).stdout


@pytest.mark.parametrize("order", [0, 1, 7])
def test_kernels_under_address_and_undefined_behaviour_sanitizers(program, order: int) -> None:
    done = program("drive", "address")(4, N_ATOMS, order=order)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_under_the_thread_sanitizer(program) -> None:
    """In one order: it finds races in any, and is slow."""
    done = program("drive", "thread")(2, N_ATOMS)
    assert done.returncode == 0, done.stdout + done.stderr
