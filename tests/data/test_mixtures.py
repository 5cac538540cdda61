"""Simulated scans of one phase and of two: shares, ranges, seeds, and that both are measured alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.training import tiny
from xrdfast.bragg import Grid
from xrdfast.data.generate import AugmentConfig
from xrdfast.data.mixtures import SHARES, count_scans, draw_one_and_two, peaks_alone
from xrdfast.data.profiles import ProfileConfig, draw_profiles
from xrdfast.data.store import PatternStore

LAB = AugmentConfig(profile="lab")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PatternStore:
    path = tmp_path_factory.mktemp("store") / "cubic.store.safetensors"
    tiny.write_cubic_store(path)
    return PatternStore.open(path)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_seed_one_batch(store: PatternStore) -> None:
    rows = torch.arange(20)
    drawn = [list(draw_one_and_two(store, rows, LAB, Grid(), generator(seed))) for seed in (1, 1, 2)]
    (first,), (again,), (other,) = drawn
    assert torch.equal(first.two, again.two) and not torch.equal(first.two, other.two)
    assert first.one.shape == first.two.shape == (len(first.share), Grid().n_points)
    assert float(first.share.min()) >= SHARES[0] and float(first.share.max()) <= SHARES[1]
    assert not torch.equal(first.one, first.two)
    assert list(draw_one_and_two(store, rows[:0], LAB, Grid(), generator())) == []


def test_counts_follow_the_peaks_and_the_background(store: PatternStore) -> None:
    """Many counts: the noise is a per cent of the highest peak, and the range is the one drawn."""
    config = ProfileConfig(counts=(1e6, 1e6), hump_share=0.0)
    profile = draw_profiles(8, config, generator(3))
    peaks = peaks_alone(store.gather(torch.arange(8)), profile, LAB, Grid(), 1.54056, generator(4))
    angles, counts = count_scans(peaks, profile, Grid(), generator(5))
    axis = Grid().two_theta()
    for row in range(8):
        first, last = float(profile.two_theta_first[row]), float(profile.two_theta_last[row])
        inside = (axis >= first) & (axis < last)
        np.testing.assert_array_equal(angles[row], axis[inside])
        want = peaks[row].double().numpy()[inside] / 100.0
        found = counts[row] / 1e6
        assert (
            float(np.abs(found - found.min() - (want - want.min())).max()) < 0.3
        )  # the background beside it
        assert np.argmax(found) == pytest.approx(np.argmax(want), abs=3)
