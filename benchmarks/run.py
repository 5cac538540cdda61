"""Runs every benchmark and prints README's table: `make bench`, or `python -m benchmarks.run [pytest arguments]`."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent


def processor() -> str:
    """The processor's own name, cores and instruction sets that matter here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    level = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores, {level}"


OUT_OF_TIME = 124


def run_benchmarks(arguments: list[str], limit: float | None = None) -> tuple[int, list[dict[str, object]]]:
    """Pytest's exit code for these files and options, and the rows that the benchmarks left; `limit` in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "benchmark"]
        command += ["--override-ini=addopts=", "--override-ini=python_files=bench_*.py"]
        command += [f"--benchmark-json={report}"]
        try:
            code = subprocess.run(command, cwd=FOLDER.parent, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = OUT_OF_TIME
        if not report.exists() or not report.stat().st_size:
            return code, []
        return code, [
            b["extra_info"] for b in json.loads(report.read_text())["benchmarks"] if b["extra_info"]
        ]


def main() -> int:
    """Exit code of pytest; the table goes to standard output, the rows to results/."""
    code, rows = run_benchmarks(sys.argv[1:] or [str(FOLDER)])
    if not rows:
        return code or 1
    print(f"\nMeasured on {processor()}\n\n| what | measured | bar | |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['what']} | {row['measured']} | {row['bar']} | {'met' if row['met'] else '**missed**'} |"
        )
    results = FOLDER / "results"
    results.mkdir(exist_ok=True)
    (results / "local-rows.json").write_text(json.dumps({"processor": processor(), "rows": rows}, indent=1))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
