"""The GPU's check, as far as a machine without one can tell: what it says, writes and skips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check

ROOT = Path(__file__).resolve().parent.parent
PASSED = {"exit_code": 0, "outcomes": {"a::b": "passed"}, "told": []}

JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="tests.ops" name="one" time="0.1" />
<testcase classname="tests.ops" name="two"><failure message="assert 1 == 2">long</failure></testcase>
<testcase classname="tests.ops" name="three"><skipped type="pytest.skip" message="gemmi is not installed">x</skipped>
</testcase><testcase classname="tests.ops" name="four"><error message="no fixture">y</error></testcase>
</testsuite></testsuites>"""


def test_without_a_gpu_it_says_so_and_ends(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == ("", "gpu_check: torch sees no CUDA device; nothing was run\n")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A device that is not there, and what each step on it is to return."""
    told: dict[str, object] = {"tests": PASSED, "sanitizer": PASSED, "benchmarks": (0, [{"what": "x"}])}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (80 GB)")
    monkeypatch.setattr(gpu_check, "device", lambda: {"name": "NVIDIA H200 (80 GB)"})
    monkeypatch.setattr(gpu_check._native, "build", lambda: [Path("_cuda.so")])
    monkeypatch.setattr(gpu_check, "run_tests", lambda *given: told["tests"])
    monkeypatch.setattr(gpu_check, "run_sanitizer", lambda *given: told["sanitizer"])
    monkeypatch.setattr(gpu_check, "run_benchmarks", lambda *given: told["benchmarks"])
    return told


def test_one_json_named_by_the_device(steps, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    steps["sanitizer"] = {"skipped": "compute-sanitizer is not on PATH"}
    assert gpu_check.main(["--out", str(tmp_path / "made")]) == 0
    (path,) = (tmp_path / "made").iterdir()
    assert path.name == "nvidia-h200-80-gb.json"
    report = json.loads(path.read_text())
    assert report["failures"] == []
    assert report["built"] == ["_cuda.so"]
    assert report["tests"] == PASSED
    assert set(report["sanitizer"]) == {"memcheck", "racecheck"}
    assert report["benchmarks"] == [{"what": "x"}]
    assert "all passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"tests": {"exit_code": 1, "outcomes": gpu_check.outcomes_of(JUNIT)}}, "tests: tests.ops::two"),
        ({"tests": {"exit_code": 4, "outcomes": {}}}, "tests: ended with 4"),
        ({"sanitizer": {"exit_code": 86, "outcomes": {"a::b": "passed"}}}, "racecheck: ended with 86"),
        ({"benchmarks": (1, [])}, "benchmarks: pytest ended with 1"),
    ],
)
def test_any_failure_is_named_and_fails_the_whole(steps, tmp_path: Path, changes: dict, failure: str) -> None:
    steps |= changes
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert failure in json.loads((tmp_path / "nvidia-h200-80-gb.json").read_text())["failures"]


def test_a_sanitizer_that_runs_out_of_time_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: "/bin/" + name)
    monkeypatch.setattr(
        gpu_check, "run_tests", lambda *given: {"exit_code": 124, "told": ["took longer than 9 s"]}
    )
    assert gpu_check.run_sanitizer("memcheck", 9.0) == {"skipped": "took longer than 9 s"}


def test_a_failed_build_ends_it(steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise gpu_check._native.BuildError("no nvcc on PATH")

    monkeypatch.setattr(gpu_check._native, "build", fail)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "nvidia-h200-80-gb.json").read_text())
    assert report["failures"] == ["build: no nvcc on PATH"]
    assert "tests" not in report


def test_outcomes_are_read_from_junit() -> None:
    assert gpu_check.outcomes_of(JUNIT) == {
        "tests.ops::one": "passed",
        "tests.ops::two": "failed: assert 1 == 2",
        "tests.ops::three": "skipped: gemmi is not installed",
        "tests.ops::four": "error: no fixture",
    }


# What a GPU machine has is torch, numpy, safetensors, ninja, pytest and pytest-benchmark; of the rest, what we use.
MISSING = (
    "pymatgen spglib gemmi geddes click rich matplotlib pyarrow jinja2 scipy hypothesis ase h5py ray onnx onnxscript "
    "onnxruntime torchjd pybaselines playwright tensorboard"
)
HIDING = """
import sys


class Hidden:
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package in {MISSING!r}.split():
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


sys.meta_path.insert(0, Hidden())
"""


def collected_without_packages(folder: Path, *arguments: str) -> list[str]:
    """Names of the tests that pytest finds where only the packages of a GPU machine can be imported."""
    (folder / "sitecustomize.py").write_text(HIDING.replace("{MISSING!r}", repr(MISSING)))
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *gpu_check.SELECTED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line]


def test_every_family_is_tested_on_a_machine_with_few_packages(tmp_path: Path) -> None:
    found = {name.partition("::")[0] for name in collected_without_packages(tmp_path, str(ROOT / "tests"))}
    families = "device_code dsr_loss peak_attention peak_conv peak_norm peak_plan preprocess render_patterns"
    wanted = {f"tests/ops/test_{family}.py" for family in families.split()} | {
        "tests/training/test_on_a_gpu.py"
    }
    assert found == wanted


def test_benchmarks_of_a_gpu_are_found_on_a_machine_with_few_packages(tmp_path: Path) -> None:
    options = [
        "-p",
        "pytest_benchmark.plugin",
        "--override-ini=addopts=",
        "--override-ini=python_files=bench_*.py",
    ]
    found = collected_without_packages(tmp_path, *options, str(ROOT / "benchmarks"))
    assert {name.partition("::")[0] for name in found} == {
        "benchmarks/bench_dsr_loss.py",
        "benchmarks/bench_on_a_gpu.py",
    }


def test_what_needs_a_missing_package_is_skipped(tmp_path: Path) -> None:
    """At the head of a file, in a fixture, in a test; but a missing module of ours is an error."""
    (tmp_path / "test_head.py").write_text("import not_there_1.deeper\ndef test_it(): pass\n")
    (tmp_path / "test_inside.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def needy():\n    import not_there_2\n"
        "def test_fixture(needy): pass\n"
        "def test_body():\n    import not_there_3\n"
        "def test_fine(): pass\n"
        "def test_fault():\n    import xrdfast.not_there\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "benchmarks.skip_missing", str(tmp_path)]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    for package in ("not_there_1", "not_there_2", "not_there_3"):
        assert f"{package} is not installed" in done.stdout
    assert "1 failed, 1 passed, 3 skipped" in done.stdout
    assert "No module named 'xrdfast.not_there'" in done.stdout
