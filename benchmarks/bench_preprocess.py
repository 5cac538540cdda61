"""Speed of preparing measured scans, one core, against numpy's interpolation and pybaselines' background."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pybaselines.smooth import snip

from benchmarks.paired import paired
from xrdfast.bragg import KA1_WAVELENGTH, Grid
from xrdfast.ops.preprocess import preprocess_scans

N_SCANS = 64
WAVELENGTH = 1.54  # near Cu K-alpha 1 but not it, so that both sides change the axis


def interpolated_and_clipped(two_theta: np.ndarray, counts: np.ndarray, points: np.ndarray) -> np.ndarray:
    """One scan by the usual tools: the model's axis, SNIP on the LLS scale, maximum 100. No noise, no clip."""
    sine = np.sin(np.radians(0.5 * two_theta)) * (KA1_WAVELENGTH / WAVELENGTH)
    y = np.interp(points, 2.0 * np.degrees(np.arcsin(np.minimum(sine, 1.0))), counts)
    level = np.log(np.log(np.sqrt(y + 1.0) + 1.0) + 1.0)
    background, _ = snip(level, max_half_window=100, decreasing=True, filter_order=2)
    net = np.clip(y - ((np.exp(np.exp(background) - 1.0) - 1.0) ** 2 - 1.0), 0.0, None)
    return 100.0 * net / net.max()


def test_scans(benchmark, row, threads, shared_data: Path) -> None:
    """Real scans of minerals; ours also estimates the noise, clips by it and lists the active patches."""
    threads(1)
    counts = np.load(shared_data / "exp_rruff.npz")["intensity"][::7][:N_SCANS].astype(np.float64)
    grid = Grid()
    points = grid.two_theta_min + grid.two_theta_step * np.arange(grid.n_points)
    given = (
        torch.arange(len(counts) + 1) * grid.n_points,
        torch.from_numpy(np.tile(points, len(counts))),
        torch.from_numpy(counts.astype(np.float32).ravel()),
        torch.full((len(counts),), WAVELENGTH, dtype=torch.float64),
    )

    def ours() -> torch.Tensor:
        return preprocess_scans(
            *given, grid=grid, model_wavelength=KA1_WAVELENGTH, resample="height"
        ).intensity

    def theirs() -> list[np.ndarray]:
        return [interpolated_and_clipped(points, row, points) for row in counts]

    # The same pattern but for the clip, and the Lorentz-polarisation factor of another axis.
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(ours().numpy(), theirs(), strict=True)]
    assert np.median(correlation) > 0.95
    pair = paired(ours, theirs)
    benchmark.pedantic(ours, rounds=5)
    row(
        "scan preprocessing, 8,500 points, one core",
        f"{pair.ratio:.1f} × numpy and pybaselines ({1e6 * pair.ours / len(counts):.0f} µs a scan)",
        "≥ 20 ×",
        pair.ratio >= 20,
    )
