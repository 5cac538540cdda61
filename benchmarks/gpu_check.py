"""Everything that needs a CUDA device, in one run: `make gpu-check`, or `python -m benchmarks.gpu_check [--out DIR]`.

Builds the native modules, runs the tests marked `gpu` and the benchmarks marked `gpu`, then the operators' tests under
compute-sanitizer where it is on PATH and for as long as there is time; leaves one JSON, named by the device, in DIR,
after each step. Runs from the source tree with torch, numpy, safetensors, ninja, pytest and pytest-benchmark; a test
or benchmark that needs more is skipped and says so.

Exit code 0: all passed; 1: something failed, and the JSON says what; 2: there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.run import OUT_OF_TIME, processor, run_benchmarks
from xrdfast import _native

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck")
# Seconds of the whole; a machine may be lent for ten minutes. Under the sanitizer a test takes up to a hundred times as
# long, so that comes last.
TIME_LIMIT = 530.0
SELECTED = ["-m", "gpu and not long", "-p", "benchmarks.skip_missing"]
_NO_TESTS = 5  # pytest's exit code where all was deselected or skipped at collection


def main(arguments: list[str] | None = None) -> int:
    """Runs it all; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON"
    )
    out = parser.parse_args(arguments).out
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device; nothing was run", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{slug(torch.cuda.get_device_name())}.json"
    for report in check():
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{path}: {'; '.join(report['failures']) or 'all passed'}")
    return 1 if report["failures"] else 0


def check() -> Iterator[dict[str, object]]:
    """The report after each step; what failed is listed under `failures`."""
    report: dict[str, object] = {"device": device(), "commit": commit(), "failures": []}
    failures = report["failures"]
    start = time.monotonic()

    def left() -> float:
        return max(1.0, start + TIME_LIMIT - time.monotonic())

    try:
        report["built"] = [path.name for path in _native.build()]
    except _native.BuildError as error:
        failures.append(f"build: {error}")
        yield report
        return
    report["build_seconds"] = round(time.monotonic() - start, 1)
    yield report

    report["tests"] = run_tests(left())
    failures += failures_of("tests", report["tests"])
    yield report
    code, rows = run_benchmarks([str(ROOT / "benchmarks"), *SELECTED], left())
    report["benchmarks"] = rows
    if code not in (0, _NO_TESTS):
        failures.append(f"benchmarks: pytest ended with {code}")
    yield report
    report["sanitizer"] = {}
    for tool in TOOLS:
        told = report["sanitizer"][tool] = run_sanitizer(tool, left())
        failures += failures_of(tool, told)
        yield report


def run_tests(limit: float, prefix: Sequence[str] = (), folder: str = "tests") -> dict[str, object]:
    """The tests marked gpu: pytest's exit code, its last lines, and each test's outcome.

    Args:
        limit: seconds.
        prefix: program that runs them.
        folder: of the tests.
    """
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary) / "results.xml"
        command = [*prefix, sys.executable, "-m", "pytest", "-q", *SELECTED, str(ROOT / folder)]
        # Memory straight from the device, so that memcheck sees the end of every tensor and not of torch's pool.
        environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if prefix else {})
        try:
            done = subprocess.run(
                [*command, f"--junitxml={results}"],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit,
                check=False,
            )
            code, told = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            code, told = OUT_OF_TIME, f"took longer than {limit:.0f} s"
        outcomes = outcomes_of(results.read_text()) if results.exists() else {}
    return {"exit_code": code, "outcomes": outcomes, "told": told.strip().splitlines()[-30:]}


def run_sanitizer(tool: str, limit: float) -> dict[str, object]:
    """The operators' tests under compute-sanitizer, which watches this package's kernels and not torch's."""
    if shutil.which("compute-sanitizer") is None:
        return {"skipped": "compute-sanitizer is not on PATH"}
    options = ["--tool", tool, "--kernel-regex", "kns=xrdfast", "--error-exitcode", "86"]
    told = run_tests(limit, ["compute-sanitizer", *options], "tests/ops")
    if told["exit_code"] == OUT_OF_TIME:  # no fault of the kernels; all were run without it
        return {"skipped": told["told"][-1]}
    return told


def outcomes_of(junit: str) -> dict[str, str]:
    """Name of each test -> "passed", "failed: ..." or "skipped: ...", from pytest's XML."""
    outcomes = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        told = [(child.tag, child.get("message", "")) for child in case]
        outcome = next(
            (f"{tag}: {text}" for tag, text in told if tag in ("failure", "error", "skipped")), "passed"
        )
        outcomes[name] = outcome.replace("failure: ", "failed: ", 1)
    return outcomes


def failures_of(step: str, told: dict[str, object]) -> list[str]:
    """What a step says went wrong; nothing where it was skipped or every test passed or was skipped."""
    if "skipped" in told or told["exit_code"] in (0, _NO_TESTS):
        return []
    failed = [name for name, outcome in told["outcomes"].items() if outcome.startswith(("failed", "error"))]
    return [f"{step}: {name}" for name in failed] or [f"{step}: ended with {told['exit_code']}"]


def device() -> dict[str, object]:
    """What the figures belong to."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "processor": processor(),
    }


def commit() -> str:
    """The commit of the source tree, with a + where files differ from it; empty outside git."""
    git = shutil.which("git")
    if git is None:
        return ""
    told = subprocess.run(
        [git, "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.strip()


def slug(name: str) -> str:
    """A file name of a device's name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    raise SystemExit(main())
