"""Measured scans to the grid of intensities that a model reads, and the noise that significance is judged by.

Not for reflections or peak lists (`xrdfast.ops.render`), nor for finding peaks (`xrdfast.data.scans`).
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from xrdfast import _native
from xrdfast.ops import LIBRARY, device_stream
from xrdfast.ops.reflections import lorentz_polarisation

if TYPE_CHECKING:
    from xrdfast.bragg import Grid

NOISE_BLOCK = 64  # points that share one estimate of the noise
PATCH_POINTS = 10  # of the encoder's patches, and the intensity from which one is active
ACTIVE_INTENSITY = 1e-5
MAX_HALF_WINDOW = 1000  # points, of the background's windows
MAX_SMOOTH_POINTS = 101
MAX_INTENSITY = 1e30
_DEVIATIONS_A_MEDIAN = 1.0 / (0.6744897501960817 * math.sqrt(6.0))
_SHARED_POINTS = 9264  # kSharedScanPoints of csrc/preprocess.h
_ROUNDING = 1e-5  # of a scan's range: less than that above the background is rounding
_SNAP = 1e-3  # of a step: so near a point of the grid, an angle is on it
_SECOND_RATIO = 0.5  # K-alpha 2 to K-alpha 1
_STRIP_FACTORS = 5  # what is left out is of the order 0.5^32

LIBRARY.define(
    "preprocess_scans(Tensor offset, Tensor two_theta, Tensor intensity, Tensor wavelength, Tensor second_wavelength, "
    "int smooth_points, float background_width, float clip_sigma, bool conserve_area, float model_wavelength, "
    "float two_theta_min, float two_theta_step, int n_points) -> (Tensor, Tensor, Tensor, Tensor)"
)


class PreprocessedScans(NamedTuple):
    """Scans on the model's grid, what of it was measured, and where it is not blank."""

    intensity: Tensor  # (n_scans, n_points) float32, 0..100
    measured: Tensor  # (n_scans, 2) int32, first measured point and the one after the last; 0, 0 for none
    active_count: Tensor  # (n_scans,) int32, patches of 10 points with one of 1e-5 or more
    active_patch: Tensor  # (n_scans, n_patches) int16, their indices in rising order, then -1


def preprocess_scans(
    offset: Tensor,  # (n_scans + 1,)
    two_theta: Tensor,  # (n_total,)
    intensity: Tensor,  # (n_total,)
    wavelength: Tensor,  # (n_scans,)
    *,
    grid: Grid,
    model_wavelength: float,
    second_wavelength: Tensor | None = None,  # (n_scans,)
    smooth_points: int = 1,
    background_width: float = 1.0,
    clip_sigma: float = 3.0,
    resample: str = "area",
) -> PreprocessedScans:
    """Measured scans, each with its own points and wavelength, on the axis of a model. In this order:

    1. Noise of the scan as it was measured (`local_noise_reference`).
    2. Smoothing: parabolas over `smooth_points`; beyond its ends a scan goes on as it ends.
    3. K-alpha 2 off: I1(theta) = I(theta) - I1(phi) / 2, sin phi = sin theta lambda1 / lambda2 (Rachinger), solved
       as the product (1 - S/2) (1 + S^2/4) (1 + S^4/16) ..., S I(theta) = I(phi).
    4. Background off: on the scale log(log(sqrt(I + 1) + 1) + 1), I(i) becomes min(I(i), (I(i-w) + I(i+w)) / 2) for
       w from `background_width` down to one point (SNIP). The scan is continued by straight lines. A lowest
       intensity under 0 counts as 0. Less than 1e-5 of a scan's range above the background is rounding, and goes.
    5. Significance clip: under `clip_sigma` times the noise, or not positive, is exactly 0. The noise is that of
       step 1 times what steps 2 and 3 do to white noise. Step 4 follows the lower edge of the noise, so its mean,
       0.5 to 3.9 deviations above by the width of the window, is taken off first.
    6. The model's axis: sin theta times model_wavelength / wavelength; what cannot diffract there is dropped.
       Intensities times the ratio of Lorentz-polarisation factors, LP = (1 + cos^2 2theta) / (sin^2 theta cos theta).
    7. Resampling of the straight pieces between points. "area": the mean over a cell of one step around a point of
       the grid, after division by the stretch of the axis, so that a peak keeps its area; the two cells that a scan
       ends in take the mean of their measured part. "height": the value at the point. An angle within 1e-3 of a step
       of a point is on it.
    8. Maximum 100.

    Noise, background and clip come first because noise is white only on the points that were measured: resampling
    correlates neighbours or thins them out. Points that are clipped stay exactly 0 between each other.

    Args:
        offset: int64, first point of each scan.
        two_theta: float64, degrees, > 0 and < 180, rising within a scan, steps of any kind.
        intensity: float32 or float64, any unit. Computed in float32.
        wavelength: float64, Angstrom: of the lines to place, K-alpha 1 of a doublet (`bragg.scan_wavelengths`).
        grid: the 2theta axis of the model.
        model_wavelength: Angstrom, of that axis.
        second_wavelength: float64, Angstrom, above `wavelength`: K-alpha 2 to take off; 0 or None to take none.
        smooth_points: odd, at most 101; 1 for no smoothing.
        background_width: degrees, largest half window, in points rounded by the scan's mean step and at most 1,000
            or what fits into the scan; 0 keeps the background.
        clip_sigma: k >= 0; 0 leaves all that is positive, the noise's mean included.
        resample: "area" or "height".

    Returns:
        Patterns, measured ranges, active patches. A scan of fewer than two points, with none in reach of the model,
        or with an intensity that is not within -1e30..1e30 is blank, and so is its range. A scan of one value
        throughout is measured and blank.

    Raises:
        ValueError: for a shape, dtype, angle, wavelength or option outside these rules.

    Note:
        Deterministic; no gradients. On a GPU the checks synchronise.

    Source:
        Savitzky & Golay, Anal. Chem. 36, 1627 (1964). Rachinger, J. Sci. Instrum. 25, 254 (1948). Ryan et al., Nucl.
        Instrum. Methods B34, 396 (1988), with the scale and the shrinking windows of Morhac et al., Nucl. Instrum.
        Methods A401, 113 (1997).
    """
    if resample not in ("area", "height"):
        raise ValueError(f'preprocess_scans: resample must be "area" or "height", got {resample!r}')
    second = torch.zeros_like(wavelength) if second_wavelength is None else second_wavelength
    return PreprocessedScans(
        *torch.ops.xrdfast.preprocess_scans(
            offset,
            two_theta,
            intensity,
            wavelength,
            second,
            smooth_points,
            background_width,
            clip_sigma,
            resample == "area",
            model_wavelength,
            grid.two_theta_min,
            grid.two_theta_step,
            grid.n_points,
        )
    )


def local_noise_reference(intensity: Tensor) -> Tensor:  # (n_points,)
    """Standard deviation of the noise at every point of a pattern, as csrc/significance.h estimates it.

        sigma(block) = median |x[i-1] - 2 x[i] + x[i+1]| / (0.6745 sqrt 6)

    over the points i of a block of 64 that have two neighbours; points left over belong to the last block. Linear
    between the middles of the blocks, constant beyond the first and the last. Of an even number of values the
    median is the larger of the two in the middle.

    Args:
        intensity: float, finite, background and all.

    Returns:
        (n_points,), 0 everywhere for fewer than three points.

    Source:
        White noise of deviation sigma has second differences of deviation sqrt(6) sigma, whose absolute value has
        the median 0.6745 sqrt(6) sigma. The same with first differences: von Neumann, Ann. Math. Stat. 12, 367
        (1941).

    Example:
        >>> local_noise_reference(torch.tensor([0.0, 1.0, 0.0, 1.0])).tolist()
        [1.2105396..., 1.2105396..., 1.2105396..., 1.2105396...]
    """
    n_points = len(intensity)
    if n_points < 3:
        return torch.zeros_like(intensity)
    n_blocks = max(n_points // NOISE_BLOCK, 1)
    rough = torch.nn.functional.pad(intensity.diff(n=2).abs(), (1, 1), value=math.inf)  # the ends have none
    body = (n_blocks - 1) * NOISE_BLOCK
    tail = rough[body:].sort().values
    n_tail = int(torch.isfinite(tail).sum())
    whole = rough[:body].view(n_blocks - 1, NOISE_BLOCK).sort(dim=1).values
    middle = torch.isfinite(whole).sum(dim=1, keepdim=True) // 2
    level = torch.cat([whole.gather(1, middle).flatten(), tail[n_tail // 2, None]]) * _DEVIATIONS_A_MEDIAN
    at = torch.arange(n_points, dtype=intensity.dtype, device=intensity.device)
    position = ((at + 0.5) / NOISE_BLOCK - 0.5).clamp(0.0, n_blocks - 1.0)
    block = position.long()
    return torch.lerp(level[block], level[(block + 1).clamp(max=n_blocks - 1)], position - block)


def preprocess_scans_reference(
    offset: Tensor,
    two_theta: Tensor,
    intensity: Tensor,
    wavelength: Tensor,
    second_wavelength: Tensor,
    smooth_points: int,
    background_width: float,
    clip_sigma: float,
    conserve_area: bool,
    model_wavelength: float,
    two_theta_min: float,
    two_theta_step: float,
    n_points: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch, in the precision of the intensities; the yardstick of the kernels."""
    n_scans = len(offset) - 1
    patterns = intensity.new_zeros(n_scans, n_points)
    measured = torch.zeros(n_scans, 2, dtype=torch.int32, device=intensity.device)
    bounds, first, second = offset.tolist(), wavelength.tolist(), second_wavelength.tolist()
    for scan in range(n_scans):
        angle, y = (x[bounds[scan] : bounds[scan + 1]] for x in (two_theta, intensity))
        if len(y) < 2 or not bool((y.abs() <= MAX_INTENSITY).all()):
            continue
        noise = local_noise_reference(y)
        if smooth_points > 1:
            y, gain = _smoothed(y, smooth_points // 2)
            noise = noise * gain
        if second[scan] > 0.0:
            y = _stripped(angle, y, first[scan] / second[scan])
            noise = noise / math.sqrt(1.0 - _SECOND_RATIO**2)
        if background_width > 0.0:
            half = _half_window(angle, background_width)
            y = _above_background(y, half)
            if clip_sigma > 0.0 and half:
                y = y - _noise_above_background(half) * noise
        y = torch.where((y >= clip_sigma * noise) & (y > 0.0), y, 0.0)
        if first[scan] != model_wavelength:
            angle, y = _converted(angle, y, model_wavelength / first[scan], conserve_area)
        if len(y) < 2:
            continue
        position = (angle - two_theta_min) / two_theta_step
        nearest = (position + 0.5).floor()
        position = torch.where((position - nearest).abs() < _SNAP, nearest, position)
        begin = min(max(math.ceil(float(position[0])), 0), n_points)
        end = min(max(math.floor(float(position[-1])) + 1, 0), n_points)
        if begin >= end:
            continue
        measured[scan] = measured.new_tensor([begin, end])
        points = torch.arange(begin, end, dtype=torch.float64, device=y.device)
        resampled = _mean_of_cells if conserve_area else _at_points
        patterns[scan, begin:end] = resampled(position, y.double(), points).to(y.dtype)
    strongest = patterns.amax(dim=1, keepdim=True)
    patterns = torch.where(strongest > 0, patterns / strongest * 100.0, 0.0).float()
    return patterns, measured, *active_patches(patterns)


def _smoothed(y: Tensor, half: int) -> tuple[Tensor, float]:
    """Values of parabolas over 2 half + 1 points, and what is left of white noise."""
    at = torch.arange(-half, half + 1, dtype=torch.float64, device=y.device)
    weight = torch.linalg.pinv(torch.stack([torch.ones_like(at), at, at**2], 1))[0]
    padded = torch.cat([y[:1].expand(half), y, y[-1:].expand(half)])
    return padded.unfold(0, 2 * half + 1, 1) @ weight.to(y.dtype), float(weight[half].sqrt())


def _stripped(two_theta: Tensor, y: Tensor, ratio: float) -> Tensor:
    """Without K-alpha 2, whose wavelength is 1 / ratio of that of K-alpha 1; linear in the sine between points."""
    sine = torch.sin(torch.deg2rad(0.5 * two_theta))
    shrink, factor = ratio, -_SECOND_RATIO
    for _ in range(_STRIP_FACTORS):
        after = torch.searchsorted(sine, shrink * sine, right=True).clamp(1, len(y) - 1)
        share = (shrink * sine - sine[after - 1]) / (sine[after] - sine[after - 1])
        share = share.clamp(min=0.0).nan_to_num(0.0).to(y.dtype)
        y = y + factor * torch.lerp(y[after - 1], y[after], share)
        shrink, factor = shrink**2, factor**2
    return y


def _half_window(two_theta: Tensor, width: float) -> int:
    """Points of the largest half window of the background."""
    n_steps = len(two_theta) - 1
    points = math.floor(width / (float(two_theta[-1] - two_theta[0]) / n_steps) + 0.5)
    return min(max(points, 1), MAX_HALF_WINDOW, n_steps // 2)


def _above_background(y: Tensor, half: int) -> Tensor:
    lowest = y.min().clamp(max=0.0)
    y = y - lowest
    level = torch.log(torch.log(torch.sqrt(y + 1.0) + 1.0) + 1.0)
    clipped = snip_reference(level, half)
    background = torch.square(torch.exp(torch.exp(clipped) - 1.0) - 1.0) - 1.0
    net = y - background
    return torch.where((clipped < level) & (net > _ROUNDING * y.max()), net, 0.0)


def _noise_above_background(half: int) -> float:
    """Mean of white noise above what the windows leave of it, in deviations; a fit, error 0.04 at most."""
    width = math.log(half)
    return 0.468 + 0.582 * width / (1.0 + 0.0257 * width)


def snip_reference(level: Tensor, half: int) -> Tensor:  # (n_points,)
    """Peaks clipped in windows of `half` points and fewer on either side, down to one."""
    if half == 0:
        return level
    clipped = torch.cat([_continued(level[:half].flip(0)).flip(0), level, _continued(level[-half:])])
    for window in range(half, 0, -1):
        mean = 0.5 * (clipped[: -2 * window] + clipped[2 * window :])
        middle = clipped[window:-window]
        clipped = torch.cat([clipped[:window], torch.minimum(middle, mean), clipped[-window:]])
    return clipped[half:-half]


def _continued(edge: Tensor) -> Tensor:
    """As many points further on the straight line through these."""
    n = len(edge)
    at = torch.arange(n, dtype=torch.float64, device=edge.device) - 0.5 * (n - 1)
    slope = (at * edge).sum() / at.square().sum() if n > 1 else edge.new_zeros((), dtype=torch.float64)
    return (edge.double().mean() + slope * (at + n)).to(edge.dtype)


def _converted(two_theta: Tensor, y: Tensor, ratio: float, conserve_area: bool) -> tuple[Tensor, Tensor]:
    """Angles and intensities at a wavelength `ratio` times as long, as far as they exist there."""
    sine = torch.sin(torch.deg2rad(0.5 * two_theta))
    there = ratio * sine < 1.0
    sine, y = sine[there], y[there]
    theta, new_theta = torch.asin(sine), torch.asin(ratio * sine)
    factor = lorentz_polarisation((ratio * sine).square()) / lorentz_polarisation(sine.square())
    if conserve_area:
        factor = factor / (ratio * torch.cos(theta) / torch.cos(new_theta))
    return torch.rad2deg(2.0 * new_theta), (y * factor).to(y.dtype)


def _mean_of_cells(position: Tensor, y: Tensor, points: Tensor) -> Tensor:
    """Mean of the straight pieces over the cells of one step around points, as far as they reach."""
    length = position.diff()
    area = torch.nn.functional.pad((0.5 * (y[1:] + y[:-1]) * length).cumsum(0), (1, 0))
    low = (points - 0.5).clamp(position[0], position[-1])
    high = (points + 0.5).clamp(position[0], position[-1])

    def area_until(edge: Tensor) -> Tensor:
        piece = torch.searchsorted(position, edge, right=True).clamp(1, len(y) - 1) - 1
        beyond = edge - position[piece]
        slope = (y[piece + 1] - y[piece]) / length[piece]
        inside = torch.where(length[piece] > 0.0, y[piece] + 0.5 * slope * beyond, 0.0)
        return area[piece] + inside * beyond

    return torch.where(high > low, (area_until(high) - area_until(low)) / (high - low), 0.0)


def _at_points(position: Tensor, y: Tensor, points: Tensor) -> Tensor:
    """Value of the straight pieces at points."""
    piece = torch.searchsorted(position, points, right=True).clamp(1, len(y) - 1) - 1
    length = position[piece + 1] - position[piece]
    slope = (y[piece + 1] - y[piece]) / length
    return torch.where(length > 0.0, y[piece] + slope * (points - position[piece]), 0.0)


def active_patches(patterns: Tensor) -> tuple[Tensor, Tensor]:
    """Count and indices of the patches that are not blank, as in `PreprocessedScans`."""
    n_patches = math.ceil(patterns.shape[1] / PATCH_POINTS)
    padded = torch.nn.functional.pad(patterns, (0, n_patches * PATCH_POINTS - patterns.shape[1]))
    active = padded.unflatten(1, (n_patches, PATCH_POINTS)).amax(dim=2) >= ACTIVE_INTENSITY
    index = torch.arange(n_patches, device=patterns.device)
    patch = torch.where(active, index, n_patches).sort(dim=1).values
    count = active.sum(dim=1, dtype=torch.int32)
    return count, torch.where(patch < n_patches, patch, -1).to(torch.int16)


def _preprocess_cpu(*arguments):
    _check_scans(*arguments)
    module = _native.cpu()
    if module is None:
        return preprocess_scans_reference(*arguments)
    _held, results, pointers, sizes = _native_arguments(*arguments)
    module.preprocess_scans(*pointers, *sizes, torch.get_num_threads())
    return results


def _preprocess_cuda(*arguments):
    _check_scans(*arguments)
    module = _native.cuda()
    if module is None:
        return preprocess_scans_reference(*arguments)
    return _preprocess_on_device(module, *arguments)


def _preprocess_on_device(module: ModuleType, *arguments):
    """The kernel of `_cuda`, or of `_emu` in the tests."""
    held, results, pointers, sizes = _native_arguments(*arguments)
    offset, intensity = held[0], held[2]
    n_scans, n_total = len(offset) - 1, len(intensity)
    longest = int(offset.diff().max()) if n_scans else 0
    rows = n_total + 2 * MAX_HALF_WINDOW * n_scans if longest > _SHARED_POINTS else 0
    signal, spare = intensity.new_empty((2, n_total))
    axis = intensity.new_empty(n_total, dtype=torch.float64)
    noise = intensity.new_empty(n_total // NOISE_BLOCK + n_scans)
    level = intensity.new_empty(2 * rows)
    scratch = [x.data_ptr() for x in (signal, spare, axis, noise, level)]
    with device_stream(intensity) as stream:
        module.preprocess_scans(*pointers, *sizes, *scratch, n_total, longest, stream)
    return results


def _native_arguments(
    offset: Tensor,
    two_theta: Tensor,
    intensity: Tensor,
    wavelength: Tensor,
    second_wavelength: Tensor,
    smooth_points: int,
    background_width: float,
    clip_sigma: float,
    conserve_area: bool,
    model_wavelength: float,
    two_theta_min: float,
    two_theta_step: float,
    n_points: int,
) -> tuple[list[Tensor], tuple[Tensor, ...], list[int], tuple]:
    """Tensors to hold until the call returns, the results to fill, and a native call's addresses and sizes."""
    held = [x.contiguous() for x in (offset, two_theta, intensity.float(), wavelength, second_wavelength)]
    results = _empty_results(intensity, len(offset) - 1, n_points)
    pointers = [x.data_ptr() for x in (*held, *results)]
    sizes = (
        len(offset) - 1,
        n_points,
        smooth_points,
        background_width,
        clip_sigma,
        conserve_area,
        model_wavelength,
        two_theta_min,
        two_theta_step,
    )
    return held, results, pointers, sizes


def _empty_results(intensity: Tensor, n_scans: int, n_points: int) -> tuple[Tensor, ...]:
    return (
        intensity.new_empty((n_scans, n_points), dtype=torch.float32),
        intensity.new_empty((n_scans, 2), dtype=torch.int32),
        intensity.new_empty((n_scans,), dtype=torch.int32),
        intensity.new_empty((n_scans, -(-n_points // PATCH_POINTS)), dtype=torch.int16),
    )


def _check_scans(
    offset: Tensor,
    two_theta: Tensor,
    intensity: Tensor,
    wavelength: Tensor,
    second_wavelength: Tensor,
    smooth_points: int,
    background_width: float,
    clip_sigma: float,
    conserve_area: bool,
    model_wavelength: float,
    two_theta_min: float,
    two_theta_step: float,
    n_points: int,
) -> None:
    n_scans, n_total, device = len(offset) - 1, len(two_theta), two_theta.device
    tensors = {
        "offset": (offset, (max(n_scans, 0) + 1,), (torch.int64,)),
        "two_theta": (two_theta, (n_total,), (torch.float64,)),
        "intensity": (intensity, (n_total,), (torch.float32, torch.float64)),
        "wavelength": (wavelength, (n_scans,), (torch.float64,)),
        "second_wavelength": (second_wavelength, (n_scans,), (torch.float64,)),
    }
    for name, (tensor, shape, dtypes) in tensors.items():
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != device:
            raise ValueError(
                f"preprocess_scans: {name} must be {shape} {' or '.join(map(str, dtypes))} on {device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    odd = smooth_points % 2 == 1 and 1 <= smooth_points <= MAX_SMOOTH_POINTS
    _require(odd, "smooth_points", f"odd and in 1..{MAX_SMOOTH_POINTS}", smooth_points)
    _require(
        0.0 <= background_width < math.inf, "background_width", "finite and >= 0 degrees", background_width
    )
    _require(0.0 <= clip_sigma < math.inf, "clip_sigma", "finite and >= 0", clip_sigma)
    _require(
        0.0 < model_wavelength < math.inf, "model_wavelength", "finite and > 0 Angstrom", model_wavelength
    )
    in_range = (
        two_theta_step > 0.0 and 1 <= n_points <= 32767 * PATCH_POINTS
    )  # patches are counted in 16 bits
    _require(in_range, "grid", "of a step > 0 and 1..327670 points", (two_theta_step, n_points))
    bounds = offset.tolist()
    rises = bounds[0] == 0 and bounds[-1] == n_total and all(a <= b for a, b in pairwise(bounds))
    _require(rises, "offset", f"rising from 0 to {n_total}", f"{bounds[:5]} ...")
    _check_angles(offset, two_theta)
    there = (wavelength > 0.0) & (wavelength < math.inf)
    _require_all(there, "wavelength", "finite and > 0 Angstrom", wavelength)
    apart = (second_wavelength == 0.0) | ((second_wavelength > wavelength) & (second_wavelength < math.inf))
    _require_all(apart, "second_wavelength", "0 or finite and above wavelength", second_wavelength)


def _check_angles(offset: Tensor, two_theta: Tensor) -> None:
    n_total = len(two_theta)
    native = _native.cpu() if two_theta.device.type == "cpu" else None
    contiguous = two_theta.is_contiguous() and offset.is_contiguous()
    if native and contiguous and native.angles_rise(offset.data_ptr(), two_theta.data_ptr(), len(offset) - 1):
        return  # else say below what is wrong
    if n_total == 0:
        return
    above = torch.ones(n_total + 1, dtype=torch.bool, device=two_theta.device)
    torch.gt(two_theta[1:], two_theta[:-1], out=above[1:-1])
    above[offset] = True  # the first point of a scan is above nothing
    rising, low, high = torch.stack(
        [above.all().double(), *two_theta.aminmax()]
    ).tolist()  # one synchronisation
    _require(0.0 < low <= high < 180.0, "two_theta", "between 0 and 180 degrees", f"{low} to {high}")
    _require(rising == 1.0, "two_theta", "rising within each scan", "other values")


def _require_all(holds: Tensor, name: str, rule: str, values: Tensor) -> None:
    if not bool(holds.all()):
        _require(False, name, rule, float(values[int(holds.logical_not().nonzero()[0])]))


def _require(fine: bool, name: str, rule: str, got: object) -> None:
    if not fine:
        raise ValueError(f"preprocess_scans: {name} must be {rule}, got {got}")


LIBRARY.impl("preprocess_scans", _preprocess_cpu, "CPU")
LIBRARY.impl("preprocess_scans", _preprocess_cuda, "CUDA")


@torch.library.register_fake("xrdfast::preprocess_scans")
def _preprocess_scans_fake(offset, two_theta, intensity, *rest):
    return _empty_results(intensity, offset.shape[0] - 1, rest[-1])
