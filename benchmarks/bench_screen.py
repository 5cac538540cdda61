"""Screening of measured scans, packed and as .xy: `small` with the weights `lab-small`, `paper` with random ones."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from xrdfast import _native
from xrdfast.bragg import KA1_WAVELENGTH
from xrdfast.data.generate import AugmentConfig
from xrdfast.data.scans import scan_of_points
from xrdfast.models import build_model
from xrdfast.prediction import SymmetryPredictor
from xrdfast.processes import n_cores
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


@pytest.mark.parametrize(
    ("preset", "kind", "n_scans", "bar"),
    [("small", "packed", 6000, 1000), ("small", ".xy", 2000, 400), ("paper", "packed", 400, 70)],
)
def test_screening(benchmark, row, threads, tmp_path, preset: str, kind: str, n_scans: int, bar: int) -> None:
    """Wall clock of the whole run of a model of whole scans: start of the readers, answers, parts, join."""
    threads(2)
    _native.build()  # the readers' module too, which nothing before loads
    source = write_input(tmp_path, kind, n_scans)
    if preset == "small":
        predictor = SymmetryPredictor.load("lab-small")
    else:
        predictor = SymmetryPredictor(build_model(preset).eval(), augment=AugmentConfig(profile="lab"))
    assert predictor.reads_scans
    screener = Screener(predictor, n_readers=2)
    two_theta, counts = patterns()
    scans = [scan_of_points(two_theta, row, path="warm") for row in counts]
    assert len(list(screener.run(scans))) == N_PATTERNS
    given = predictor.prepare_scans([two_theta] * N_PATTERNS, list(counts), [KA1_WAVELENGTH] * N_PATTERNS)
    active = float(active_share(given))
    peak = 0

    def weigh(*_: int) -> None:
        nonlocal peak
        peak = max(peak, memory())

    start = time.perf_counter()
    assert screener.screen([source], tmp_path / "answers.parquet", progress=weigh) == (n_scans, 0)
    speed = n_scans / (time.perf_counter() - start)
    benchmark.pedantic(lambda: list(screener.answer([])), rounds=1)
    row(
        f"screening {n_scans:,} scans, {kind}, {preset} preset, 2 cores, {100 * active:.0f} % of patches active",
        f"{speed:,.0f} scans/s, {peak / 1e9:.2f} GB in all processes",
        f"≥ {bar:,} scans/s",
        speed >= bar,
    )


@pytest.mark.gpu
def test_screening_on_a_gpu(benchmark, row, tmp_path) -> None:
    """Readers on all cores but two, preparation and model on the device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    n_scans, n_readers = 20_000, max(1, n_cores() - 2)
    source = write_input(tmp_path, "packed", n_scans)
    screener = Screener(SymmetryPredictor.load("lab-small", "cuda"), n_readers=n_readers)
    two_theta, counts = patterns()
    assert (
        len(list(screener.run(scan_of_points(two_theta, one, path="warm") for one in counts))) == N_PATTERNS
    )
    start = time.perf_counter()
    assert screener.screen([source], tmp_path / "answers.parquet") == (n_scans, 0)
    speed = n_scans / (time.perf_counter() - start)
    benchmark.pedantic(lambda: list(screener.answer([])), rounds=1)
    what = f"screening {n_scans:,} scans, packed, small preset, {n_readers} readers, GPU"
    row(what, f"{speed:,.0f} scans/s", "≥ 50,000 scans/s", speed >= 50_000)


def memory() -> int:
    """Bytes that this process and its readers hold."""
    readers = (child.pid for child in multiprocessing.active_children())
    total = 0
    for process in (os.getpid(), *readers):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        total += next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return total


def active_share(patterns: torch.Tensor) -> torch.Tensor:
    """Share of patches of ten points that are not blank."""
    return (patterns.unflatten(1, (-1, 10)).amax(dim=2) > 0.0).float().mean()
