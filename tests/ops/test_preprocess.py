"""Measured scans on the model's grid: noise, background, clip, resampling; references against independent code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from xrdfast.ops.preprocess import local_noise_reference


def noise_by_hand(x: np.ndarray) -> np.ndarray:
    """The definition, point by point."""
    n = len(x)
    n_blocks = max(n // 64, 1)
    middle, level = [], []
    for block in range(n_blocks):
        end = n if block == n_blocks - 1 else 64 * (block + 1)
        rough = sorted(abs(x[i - 1] - 2 * x[i] + x[i + 1]) for i in range(64 * block, end) if 0 < i < n - 1)
        level.append(rough[len(rough) // 2] / (0.6744897501960817 * math.sqrt(6.0)) if rough else 0.0)
        middle.append(64 * block + 31.5)
    return np.interp(np.arange(n), middle, level)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 191, 192, 500, 1279])
def test_noise_is_what_its_definition_says(n: int) -> None:
    x = np.random.default_rng(n).normal(size=n) * np.linspace(1.0, 5.0, n)
    got = local_noise_reference(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, noise_by_hand(x), rtol=1e-12, atol=0)


def test_noise_of_counts_is_their_square_root() -> None:
    """Also under peaks as wide as a laboratory's, and with a sloping background."""
    at = np.arange(20_000)
    mean = 400.0 + 0.01 * at + 3000.0 * np.exp(-(((at % 2000) - 1000.0) ** 2) / (2 * 8.0**2))
    counts = np.random.default_rng(1).poisson(mean).astype(np.float64)
    noise = local_noise_reference(torch.from_numpy(counts)).numpy()
    away = np.abs((at % 2000) - 1000) > 200
    assert np.median(noise[away] / np.sqrt(mean[away])) == pytest.approx(1.0, abs=0.02)
    assert noise[~away].max() < 0.2 * counts.max()
