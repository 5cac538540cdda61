"""Peaks of a measured pattern, and whether points are a scan at all. Reads no file (`xrdfast.data.scans`)."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from xrdfast.bragg import convert_two_theta

_SCAN_POINTS = 1000  # a list of more equally spaced points than this is a scan

_BACKGROUND_WIDTH = 1.0  # degrees, half window of the background: wider than any sharp peak's foot
_SMOOTHING_WIDTH = 0.08  # degrees, about the width of a laboratory peak
_NOISE_WIDTH = 2.0  # degrees over which noise counts as constant
_MIN_HEIGHT = 0.002  # of the strongest peak: below lie the ripples of a scan without noise
_DIFFERENCE = 0.6744897501960817 * math.sqrt(2.0)  # median |x1 - x2| of normal values with deviation 1
# A K-alpha 2 satellite: degrees from its computed place, and its share of the K-alpha 1 height (0.5 in theory).
_SATELLITE_REACH = 0.03
_SATELLITE_SHARE = (0.3, 0.7)
_MAX_WINDOW = 2001  # points of any window, so that the finest scan stays cheap


def is_scan(two_theta: NDArray[np.float64], more_than: int = _SCAN_POINTS) -> bool:
    """Whether rising angles are those of a scan: more than 1,000, equally spaced to half a step.

    Half a step because files round their angles, and a list of lines is off by many of its mean steps.

    Args:
        two_theta: (n_points,) degrees.
        more_than: as many points are still a list of lines.
    """
    n = len(two_theta)
    if n <= more_than:
        return False
    step = float(two_theta[-1] - two_theta[0]) / (n - 1)
    off = np.arange(n, dtype=np.float64)
    off *= -step
    off += two_theta
    off -= two_theta[0]
    return max(float(off.max()), -float(off.min())) <= 0.5 * step


def find_peaks(
    two_theta: NDArray[np.float64], intensity: NDArray[np.float64], *, threshold: float = 5.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Peaks of a scan, above its background and noise.

    Background: clipping of peaks in growing windows, to 1 degree (SNIP), on the scale of log log sqrt.
    Smoothing: local parabolas over the width of the strongest peak, at most 0.08 degrees. Noise: median
    absolute difference of smoothed points one such window apart, over 2 degrees. A peak stands out of the
    background and of its valleys by `threshold` times the noise, and by 0.2 % of the strongest; its place is
    the top of a parabola, so between points. K-alpha 2 lines that stand apart are peaks of their own.

    Args:
        two_theta: (n_points,) degrees, rising, equally spaced.
        intensity: (n_points,), finite.
        threshold: standard deviations, > 0.

    Returns:
        two_theta (n_peaks,) rising, and height (n_peaks,) over the background, the strongest = 100.

    Raises:
        ValueError: for arrays of other shapes or values.

    Source:
        Ryan et al., Nucl. Instrum. Methods B34, 396 (1988): SNIP.
        Savitzky & Golay, Anal. Chem. 36, 1627 (1964): smoothing.

    Example:
        >>> x = np.arange(10.0, 30.0, 0.01)
        >>> place, height = find_peaks(x, 50.0 + 900.0 * np.exp(-(((x - 20.003) / 0.05) ** 2)))
        >>> [round(float(value), 3) for value in place], height
        ([20.003], array([100.]))
    """
    two_theta, intensity = np.asarray(two_theta, np.float64), np.asarray(intensity, np.float64)
    n = len(two_theta)
    if two_theta.ndim != 1 or two_theta.shape != intensity.shape:
        got = f"{two_theta.shape} and {intensity.shape}"
        raise ValueError(f"find_peaks: intensity must be of the shape of two_theta, (n_points,), got {got}")
    if not (np.isfinite(two_theta).all() and (np.diff(two_theta) > 0.0).all()):
        raise ValueError("find_peaks: two_theta must be finite and rising, got other values")
    if not np.isfinite(intensity).all():
        raise ValueError("find_peaks: intensity must be finite, got NaN or infinity")
    if not threshold > 0.0:
        raise ValueError(f"find_peaks: threshold must be > 0, got {threshold}")
    if n < 5 or intensity.max() == intensity.min():
        return np.zeros(0), np.zeros(0)
    smooth, background, noise, half = _levels(two_theta, intensity)
    net = smooth - background
    top, prominence = _maxima(net, threshold * float(noise.min()))
    strong = (prominence > threshold * noise[top]) & (net[top] > threshold * noise[top])
    strong &= prominence > _MIN_HEIGHT * net.max()
    strong &= (top >= half) & (top < n - half)  # nearer to an end, the smoothing invents points
    top = top[strong]
    if len(top) == 0:
        return np.zeros(0), np.zeros(0)
    reach = np.minimum(max(1, half // 2), np.minimum(top, n - 1 - top))
    left, middle, right = net[top - reach], net[top], net[top + reach]
    bend = left - 2.0 * middle + right
    offset = np.where(bend < 0.0, 0.5 * (left - right) / np.where(bend < 0.0, bend, 1.0), 0.0)
    offset = np.clip(offset, -1.0, 1.0)
    height = middle - 0.25 * (left - right) * offset
    # interpolated, so that angles rounded by their file, or a reach cut at an end, cost nothing
    place = np.interp(top + offset * reach, np.arange(n), two_theta)
    order = np.argsort(place, kind="stable")
    return place[order], 100.0 * (height / height.max())[order]


def background_of(two_theta: NDArray[np.float64], intensity: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n_points,) background of a scan, that `find_peaks` stands its peaks on.

    Args:
        two_theta: (n_points,) degrees, rising, equally spaced.
        intensity: (n_points,), finite; fewer than five points, or equal ones, are all background.
    """
    if len(two_theta) < 5 or intensity.max() == intensity.min():
        return intensity.astype(np.float64)
    return _levels(two_theta, intensity)[1]


def _levels(
    two_theta: NDArray[np.float64], intensity: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], int]:
    """Smoothed intensity, its background and noise, (n_points,) each, and the half width of the smoothing."""
    n = len(two_theta)
    step = (two_theta[-1] - two_theta[0]) / (n - 1)
    half = min(round(0.5 * _SMOOTHING_WIDTH / step), _strongest_width(intensity) // 2, _MAX_WINDOW // 2)
    half = min(max(1, half), (n - 1) // 2)
    smooth = _smooth(intensity, half)
    block = max(32, round(_NOISE_WIDTH / step))
    # a window apart, so that noise a detector has smoothed already counts in full
    apart = min(2 * half + 1, n - 1)
    noise = _local_median(np.abs(smooth[apart:] - smooth[:-apart]), block, n) / _DIFFERENCE
    background = _background(smooth, min(max(2, round(_BACKGROUND_WIDTH / step)), _MAX_WINDOW // 2))
    # clipped under the valleys of the noise, the background lies too low by up to three deviations
    background += np.clip(_local_median(smooth - background, block, n), 0.0, 3.0 * noise)
    return smooth, background, noise, half


def _strongest_width(intensity: NDArray[np.float64]) -> int:
    """Points around the highest one that are above half way from the median to it."""
    top = int(np.argmax(intensity))
    below = np.flatnonzero(intensity < 0.5 * (intensity[top] + np.median(intensity)))
    after = int(np.searchsorted(below, top))
    begin = int(below[after - 1]) if after > 0 else -1
    end = int(below[after]) if after < len(below) else len(intensity)
    return end - begin - 1


def _smooth(intensity: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """Values of parabolas fitted over 2 half + 1 points."""
    if half < 2:
        return intensity.copy()  # three points lie on their parabola
    return np.convolve(np.pad(intensity, half, mode="edge"), _parabola(half), mode="valid")


@functools.lru_cache(maxsize=64)
def _parabola(half: int) -> NDArray[np.float64]:
    """Weights whose sum is the middle of the parabola through 2 half + 1 points."""
    at = np.arange(-half, half + 1.0)
    return np.linalg.pinv(np.stack([np.ones_like(at), at, at**2], 1))[0]


def _background(intensity: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    floor = np.maximum(intensity - min(float(intensity.min()), 0.0), 0.0)
    level = np.log1p(np.log1p(np.sqrt(floor + 1.0)))
    padded = np.pad(level, width, mode="reflect") if width < len(level) else np.pad(level, width, mode="edge")
    scratch = np.empty_like(padded)  # new arrays in this loop would cost more than what is computed
    for reach in range(width, 0, -1):
        mean, inner = scratch[: -2 * reach], padded[reach:-reach]
        np.add(padded[: -2 * reach], padded[2 * reach :], out=mean)
        mean *= 0.5
        np.minimum(inner, mean, out=inner)
    background = np.expm1(np.expm1(padded[width:-width])) ** 2 - 1.0
    return background + min(float(intensity.min()), 0.0)


def _local_median(values: NDArray[np.float64], width: int, n_points: int) -> NDArray[np.float64]:
    """(n_points,) medians of blocks of about `width` values, interpolated: peaks hardly touch them."""
    n_blocks = max(1, len(values) // width)
    short, n_long = divmod(len(values), n_blocks)  # as np.array_split: the first blocks have a point more
    cut = n_long * (short + 1)
    long_blocks, short_blocks = values[:cut].reshape(n_long, short + 1), values[cut:].reshape(-1, short)
    size = np.repeat([short + 1, short], [n_long, n_blocks - n_long])
    centre = np.cumsum(size) - 0.5 * size
    medians = [np.median(blocks, axis=1) for blocks in (long_blocks, short_blocks) if len(blocks)]
    return np.interp(np.arange(n_points), centre, np.concatenate(medians))


def _maxima(values: NDArray[np.float64], floor: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Places of local maxima above a floor, and their prominences: height over the higher of the valleys to higher
    ground.

    Beyond the ends lies the lowest value of all. A plateau is one maximum, at its middle. Maxima below the floor are
    no higher ground for those above, so to leave them out changes nothing for these.
    """
    starts = np.flatnonzero(np.r_[True, np.diff(values) != 0.0])
    level = values[starts]
    padded = np.r_[np.inf, level, np.inf]  # a rise that the end cuts off is no maximum
    is_top = (padded[1:-1] > padded[:-2]) & (padded[1:-1] > padded[2:])
    runs = np.flatnonzero(is_top & (level > floor))
    if len(runs) == 0:
        return np.zeros(0, np.int64), np.zeros(0)
    ends = np.r_[starts[1:], len(values)] - 1
    top = (starts[runs] + ends[runs]) // 2
    # valley between neighbouring maxima: the lowest level after one and before the next
    valley = np.minimum.reduceat(level, runs)[:-1] if len(runs) > 1 else np.zeros(0)
    height = level[runs]
    lowest = float(values.min())
    before = _key_valleys(height, valley, lowest)
    after = _key_valleys(height[::-1], valley[::-1], lowest)[::-1]
    prominence = height - np.maximum(before, after)
    return top, prominence


def _key_valleys(
    height: NDArray[np.float64], valley: NDArray[np.float64], lowest: float
) -> NDArray[np.float64]:
    """Of each maximum the lowest valley to its left before higher ground, or the lowest of all."""
    keys = np.full(len(height), lowest)
    higher: list[tuple[float, float]] = []  # heights falling to the right, each with the valley before it
    for i, top in enumerate(height.tolist()):
        low = float(valley[i - 1]) if i else lowest
        while higher and higher[-1][0] <= top:
            low = min(low, higher.pop()[1])
        keys[i] = low if higher else lowest
        higher.append((top, low))
    return keys


def second_satellites(
    two_theta: NDArray[np.float64], height: NDArray[np.float64], first: float, second: float
) -> NDArray[np.bool_]:
    """Which peaks are the K-alpha 2 satellite of another one.

    Args:
        two_theta: (n_peaks,) degrees, rising.
        height: (n_peaks,) any scale.
        first, second: Angstrom, of K-alpha 1 and 2.

    Returns:
        (n_peaks,) bool.
    """
    expected = convert_two_theta(two_theta, first, second)
    satellite = np.zeros(len(two_theta), dtype=bool)
    if len(two_theta) < 2:
        return satellite
    right = np.searchsorted(two_theta, expected).clip(1, len(two_theta) - 1)
    nearest = np.where(expected - two_theta[right - 1] < two_theta[right] - expected, right - 1, right)
    share = height[nearest] / height
    fits = np.abs(two_theta[nearest] - expected) < _SATELLITE_REACH
    fits &= (share > _SATELLITE_SHARE[0]) & (share < _SATELLITE_SHARE[1])
    fits &= nearest != np.arange(len(two_theta))
    satellite[nearest[fits]] = True
    return satellite
