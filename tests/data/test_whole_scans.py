"""Whole scans on a model's axis: smoothing by width in degrees, scans of different steps side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xrdfast.bragg import KA1_WAVELENGTH, Grid
from xrdfast.data.whole_scans import preprocess_whole_scans, smoothing_points
from xrdfast.ops.preprocess import preprocess_scans


def scan(step: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    two_theta = np.arange(10.0, 80.0, step)
    counts = 50.0 + 800.0 * np.exp(-0.5 * ((two_theta - 33.0) / 0.05) ** 2)
    return two_theta, np.random.default_rng(seed).poisson(counts).astype(np.float64)


@pytest.mark.parametrize(
    ("step", "width", "points"),
    [(0.01, 0.08, 9), (0.02, 0.08, 5), (0.1, 0.08, 1), (0.001, 0.5, 101), (0.02, 0.0, 1)],
)
def test_smoothing_points_span_a_width(step: float, width: float, points: int) -> None:
    assert smoothing_points(np.arange(10.0, 20.0, step), width) == points


def test_no_step_no_smoothing() -> None:
    assert smoothing_points(np.array([5.0]), 0.08) == smoothing_points(np.array([5.0, 5.0]), 0.08) == 1


def test_scans_of_different_steps_are_smoothed_each_by_its_own() -> None:
    scans = [scan(0.01, 0), scan(0.02, 1), scan(0.01, 2)]
    angles, counts = zip(*scans, strict=True)
    found, measured = preprocess_whole_scans(
        angles, counts, [KA1_WAVELENGTH] * 3, grid=Grid(), model_wavelength=KA1_WAVELENGTH, smooth_width=0.08
    )
    for row, points in enumerate((9, 5, 9)):
        alone = preprocess_scans(
            torch.tensor([0, len(angles[row])]),
            torch.from_numpy(angles[row]),
            torch.from_numpy(counts[row]),
            torch.tensor([KA1_WAVELENGTH], dtype=torch.float64),
            grid=Grid(),
            model_wavelength=KA1_WAVELENGTH,
            smooth_points=points,
        )
        assert torch.equal(found[row], alone.intensity[0])
        assert torch.equal(measured[row], alone.measured[0])


def test_smoothing_lets_weak_peaks_through() -> None:
    two_theta = np.arange(10.0, 80.0, 0.01)
    peaks = np.arange(12.0, 80.0, 2.0)
    clean = 400.0 + 45.0 * np.exp(-0.5 * ((two_theta[:, None] - peaks) / 0.06) ** 2).sum(1)
    counts = np.random.default_rng(0).poisson(clean).astype(np.float64)
    seen = []
    for width in (0.0, 0.14):
        row = preprocess_whole_scans(
            [two_theta],
            [counts],
            [KA1_WAVELENGTH],
            grid=Grid(),
            model_wavelength=KA1_WAVELENGTH,
            smooth_width=width,
        )[0][0]
        at = torch.from_numpy(((peaks - 5.0) / 0.01).round()).long()
        near = torch.stack([row[at + shift] for shift in range(-4, 5)]).amin(0)
        seen.append(int((near > 0.0).sum()))
    assert seen[0] < len(peaks) // 2 < seen[1]
