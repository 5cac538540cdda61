"""Screening of measured scans, small preset with random weights, two cores: from a packed file and from .xy files."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from xrdfast.data.scans import scan_of_points
from xrdfast.models import build_model
from xrdfast.screening.packed import pack
from xrdfast.screening.pipeline import Screener

N_POINTS = 8500
N_PATTERNS = 64  # different ones; the rest repeat them


def patterns() -> tuple[np.ndarray, np.ndarray]:
    """The angles, and counts of scans of 5 to 90 degrees with some 40 peaks, noise and a background."""
    rng = np.random.default_rng(0)
    two_theta = 5.0 + 0.01 * np.arange(N_POINTS)
    counts = np.empty((N_PATTERNS, N_POINTS))
    for row in counts:
        places, heights = rng.uniform(10.0, 88.0, 40), rng.exponential(1500.0, 40)
        clean = 50.0 + 200.0 * np.exp(-two_theta / 20.0)
        clean += (heights * np.exp(-(((two_theta[:, None] - places) / 0.06) ** 2))).sum(1)
        row[:] = rng.poisson(clean)
    return two_theta, counts


def write_input(folder: Path, kind: str, n_scans: int) -> Path:
    """A packed file or a folder of .xy files."""
    two_theta, counts = patterns()
    if kind == "packed":
        path = folder / "many.scans.safetensors"
        pack(path, (scan_of_points(two_theta, counts[i % N_PATTERNS], path=str(i)) for i in range(n_scans)))
        return path
    path = folder / "xy"
    path.mkdir()
    texts = ["".join(f"{x:.2f} {y:.0f}\n" for x, y in zip(two_theta, row, strict=True)) for row in counts]
    for i in range(n_scans):
        (path / f"{i:06d}.xy").write_text(texts[i % N_PATTERNS])
    return path


@pytest.mark.parametrize(("kind", "n_scans", "bar"), [("packed", 4000, 1000), (".xy", 2000, 400)])
def test_screening(benchmark, row, threads, tmp_path, kind: str, n_scans: int, bar: int) -> None:
    """Wall clock of the whole run: start of the readers, answers, parts, join."""
    threads(2)
    source = write_input(tmp_path, kind, n_scans)
    screener = Screener(build_model("small").eval(), n_readers=2)
    start = time.perf_counter()
    assert screener.screen([source], tmp_path / "answers.parquet") == (n_scans, 0)
    speed = n_scans / (time.perf_counter() - start)
    unit = 1 if sys.platform == "darwin" else 1024
    memory = sum(resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF,)) / 1e9
    benchmark.pedantic(lambda: list(screener.answer([])), rounds=1)
    row(
        f"screening {n_scans:,} scans, {kind}, small preset, 2 cores, {torch.get_num_threads()} threads",
        f"{speed:,.0f} scans/s, {memory:.2f} GB in the main process",
        f"≥ {bar:,} scans/s",
        speed >= bar,
    )
