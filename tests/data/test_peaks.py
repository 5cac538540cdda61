"""Scans told from lists of lines, and searched for peaks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xrdfast.data.peaks import find_peaks, is_scan

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_is_scan():
    even = 5.0 + 0.0167 * np.arange(1001)
    assert is_scan(even) and is_scan(np.round(even, 2))
    assert not is_scan(even[:1000])
    assert not is_scan(np.sort(np.random.default_rng(0).uniform(5, 90, 5000)))
    assert not is_scan(np.r_[even, even[-1] + 0.1 * np.arange(1, 500)])


def simulated(seed: int, step: float, counts: float, broad: float = 0.08) -> tuple[np.ndarray, ...]:
    """A scan of 15 peaks on a falling background, with Poisson noise; their places and heights."""
    rng = np.random.default_rng(seed)
    two_theta = np.arange(5.0, 90.0, step)
    place = np.linspace(10.0, 85.0, 15) + rng.uniform(-1.5, 1.5, 15)
    height = np.exp(rng.uniform(np.log(3.0), np.log(100.0), 15))
    x = (two_theta[:, None] - place) / (0.5 * broad)
    profile = 0.5 * np.exp(-np.log(2.0) * x**2) + 0.5 / (1.0 + x**2)
    clean = profile @ height + 20.0 * np.exp(-two_theta / 20.0) + 4.0
    noisy = rng.poisson(clean * counts) if np.isfinite(counts) else clean
    return two_theta, noisy.astype(float), place, 100.0 * height / height.max()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("step", "counts"), [(0.01, 50.0), (0.02, 200.0), (0.005, np.inf), (0.02, 5.0)])
def test_known_peaks_are_found_between_points(seed, step, counts):
    two_theta, intensity, place, height = simulated(seed, step, counts)
    found, relative = find_peaks(two_theta, intensity)
    nearest = np.abs(found[:, None] - place).argmin(0)
    error = np.abs(found[nearest] - place)
    # of a peak h counts high on a background b; what stands 10 sigma out is to be found
    sure = height > (10.0 if counts == 5.0 else 4.0)
    assert (error[sure] < 0.02).all()
    assert np.median(error[sure]) < step / 2
    assert np.abs(relative[nearest] - height)[sure].max() < (12.0 if counts == 5.0 else 8.0)
    spurious = [p for p in found if np.abs(p - place).min() > 0.06]
    assert len(spurious) <= 2
    assert (np.diff(found) > 0).all() and relative.max() == 100.0


def test_noise_alone_has_no_peaks():
    rng = np.random.default_rng(3)
    two_theta = np.arange(5.0, 90.0, 0.01)
    n_found = [
        len(find_peaks(two_theta, rng.poisson(200.0, len(two_theta)).astype(float))[0]) for _ in range(5)
    ]
    assert sum(n_found) <= 5


def test_threshold_decides():
    two_theta, intensity, *_ = simulated(1, 0.02, 5.0)
    counts = [len(find_peaks(two_theta, intensity, threshold=k)[0]) for k in (2.0, 5.0, 20.0)]
    assert counts[0] > counts[1] > counts[2] > 0


def test_scale_and_offset_do_not_matter():
    two_theta, intensity, *_ = simulated(2, 0.02, 200.0)
    place, height = find_peaks(two_theta, intensity)
    other, same = find_peaks(two_theta, 2.0 * intensity)
    np.testing.assert_allclose(other[:5], place[:5], atol=0.01)
    np.testing.assert_allclose(same[height > 10], height[height > 10], rtol=0.1)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 1.0], [3.0] * 50, [0.0] * 50])
def test_short_and_flat_scans_have_none(values):
    place, height = find_peaks(10.0 + 0.01 * np.arange(len(values)), np.array(values))
    assert place.shape == height.shape == (0,)


@pytest.mark.parametrize(
    ("two_theta", "intensity", "threshold", "message"),
    [
        (np.arange(5.0), np.ones(4), 5.0, "intensity must be of the shape"),
        (np.ones((5, 5)), np.ones((5, 5)), 5.0, "intensity must be of the shape"),
        (np.zeros(5), np.arange(5.0), 5.0, "two_theta must be finite and rising"),
        (np.arange(5.0), np.array([0, 1, np.nan, 1, 0]), 5.0, "intensity must be finite"),
        (np.arange(5.0), np.arange(5.0), 0.0, "threshold must be > 0, got 0"),
    ],
)
def test_find_peaks_refuses(two_theta, intensity, threshold, message):
    with pytest.raises(ValueError, match=f"find_peaks: {message}"):
        find_peaks(two_theta, intensity, threshold=threshold)


@QUICK
@given(st.lists(st.floats(-1e6, 1e12), min_size=0, max_size=80))
def test_peaks_of_anything_finite_are_finite(values):
    place, height = find_peaks(10.0 + 0.02 * np.arange(len(values)), np.array(values, dtype=float))
    assert np.isfinite(place).all() and np.isfinite(height).all() and len(place) == len(height)


def test_strongest_lines_of_measured_patterns(shared_data):
    small = np.load(shared_data / "exp_small.npz")
    spans = zip(small["offset"][:-1], small["offset"][1:], strict=True)
    patterns = [(small["two_theta"][a:b], small["intensity"][a:b]) for a, b in spans]
    rruff = np.load(shared_data / "exp_rruff.npz")["intensity"][::15]
    patterns += [(5.0 + 0.01 * np.arange(8500), row) for row in rruff]
    for two_theta, intensity in patterns:
        two_theta, intensity = two_theta.astype(float), intensity.astype(float)
        found, height = find_peaks(two_theta, intensity)
        assert len(found) >= 3
        # the highest point is on one of the strong lines (the top two of one pattern differ by 0.3 %)
        strongest = two_theta[intensity.argmax()]
        assert np.abs(found[height > 50.0] - strongest).min() < 0.1
