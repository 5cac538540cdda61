"""Reflection families to patterns as a diffractometer measures them, on the grid that a model reads.

Profiles, doublet, texture, geometry errors, background, counting noise; then what preprocessing does to a scan:
background off, insignificant points to zero, maximum 100. Not for clean stick patterns (`xrdfast.ops.render`) or for
measured scans, and the parameters are drawn elsewhere (`xrdfast.data.profiles`).
"""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from xrdfast import _native
from xrdfast.ops import LIBRARY, device_stream
from xrdfast.ops.random import IMPURITY_STREAM, noise_words, philox, poisson, unit
from xrdfast.ops.render import check_families, check_offsets, check_tensors

if TYPE_CHECKING:
    from xrdfast.bragg import Grid

CUTOFF = 1e-4  # of its height: a profile is evaluated out to here
LINE_BLOCK = 16  # points: a profile's window is widened to whole blocks, one vector of the CPU kernel
SIGNIFICANCE_BLOCK = 64  # points that share one estimate of the noise
MAX_ASYMMETRY = 0.5
MAX_IMPURITIES = 16
MAX_COUNTS = 1e6  # single precision still tells neighbouring counts apart
PATCH_POINTS = 10  # of the encoder's patches, and the intensity from which one is active
ACTIVE_INTENSITY = 1e-5
SCHERRER_K = 0.9
MAX_ROTATIONS = 192  # of a pattern
LINE_WORDS = 11  # of four bytes, a line in csrc/line_profile.h
_SMALLEST, _LARGEST = sys.float_info.min, sys.float_info.max  # "> 0" and "finite" as bounds

LIBRARY.define(
    "render_patterns(Tensor offset, Tensor hkl, Tensor multiplicity, Tensor f_squared, Tensor reciprocal_metric, "
    "Tensor b_overall, Tensor rotation_offset, Tensor rotations, Tensor profile, Tensor pattern_id, int seed, "
    "float clip_sigma, float wavelength, float two_theta_min, float two_theta_step, int n_points) "
    "-> (Tensor, Tensor, Tensor)"
)


class ProfileParameters(NamedTuple):
    """How each of n patterns is measured; every field is (n_patterns,) float64. Order and names as in csrc.

    Attributes:
        caglioti_u, caglioti_v, caglioti_w: degrees^2, FWHM^2 = u tan^2 theta + v tan theta + w, > 0 on the grid.
        crystallite_size: Angstrom, > 0; infinity broadens nothing. FWHM = 0.9 wavelength / (size cos theta).
        microstrain: >= 0; FWHM = 4 microstrain tan theta. The three widths add in squares, to a step at least.
        eta: Lorentzian share of the pseudo-Voigt's area, 0..1.
        asymmetry: a = asymmetry cot 2theta, at most 0.5 either way, splits FWHM into halves of (1 + a) on the
            low-angle side and (1 - a) on the other.
        second_wavelength: Angstrom, > 0, K-alpha2.
        second_ratio: its intensity over K-alpha1's, >= 0; 0 for monochromatic.
        zero_shift: degrees, observed = true + shift.
        sample_displacement: mm; moves a line by -2 s cos theta / R.
        goniometer_radius: mm, > 0, R.
        march_r: March-Dollase parameter, > 0; 1 for no preferred orientation, < 1 for plates.
        march_h, march_k, march_l: normal of the textured planes, Miller indices, not all 0.
        polarisation: P in (1 + P cos^2 2theta) / (sin^2 theta cos theta), 0..1: 1 without monochromator,
            cos^2 of its 2theta with one, 0 at a synchrotron.
        counts: expected at the highest point of the peaks, 0..1e6; 0 leaves noise and clipping out.
        background_0 .. background_3: Chebyshev coefficients over the grid, relative to the highest point.
        hump_height, hump_center, hump_fwhm: an amorphous halo, Gaussian: relative, degrees, degrees > 0. Where the
            sum of background and hump is negative it counts as 0.
        two_theta_first, two_theta_last: degrees, what was measured; the rest of the grid is 0.
        impurity_count: foreign lines, 0..16, fractions cut off.
        impurity_strength: area of the strongest possible foreign line over that of the strongest own one, >= 0.
    """

    caglioti_u: Tensor
    caglioti_v: Tensor
    caglioti_w: Tensor
    crystallite_size: Tensor
    microstrain: Tensor
    eta: Tensor
    asymmetry: Tensor
    second_wavelength: Tensor
    second_ratio: Tensor
    zero_shift: Tensor
    sample_displacement: Tensor
    goniometer_radius: Tensor
    march_r: Tensor
    march_h: Tensor
    march_k: Tensor
    march_l: Tensor
    polarisation: Tensor
    counts: Tensor
    background_0: Tensor
    background_1: Tensor
    background_2: Tensor
    background_3: Tensor
    hump_height: Tensor
    hump_center: Tensor
    hump_fwhm: Tensor
    two_theta_first: Tensor
    two_theta_last: Tensor
    impurity_count: Tensor
    impurity_strength: Tensor

    def table(self) -> Tensor:
        """(n_patterns, n_fields) float64, what the kernels read."""
        return torch.stack([x.double() for x in self], dim=1)


class RenderedPatterns(NamedTuple):
    """Patterns of a batch, and where they are not blank."""

    intensity: Tensor  # (n_patterns, n_points) float32, 0..100
    active_count: Tensor  # (n_patterns,) int32, patches of 10 points with one of 1e-5 or more
    active_patch: Tensor  # (n_patterns, n_patches) int16, their indices in rising order, then -1


def render_patterns(
    offset: Tensor,  # (n_patterns + 1,)
    hkl: Tensor,  # (n_families, 3)
    multiplicity: Tensor,  # (n_families,)
    f_squared: Tensor,  # (n_families,)
    reciprocal_metric: Tensor,  # (n_patterns, 6)
    b_overall: Tensor,  # (n_patterns,)
    rotation_offset: Tensor,  # (n_patterns + 1,)
    rotations: Tensor,  # (n_rotations, 3, 3)
    profile: ProfileParameters,
    pattern_id: Tensor,  # (n_patterns,)
    *,
    seed: int,
    wavelength: float,
    grid: Grid,
    clip_sigma: float = 3.0,
) -> RenderedPatterns:
    """Patterns of a batch of structures as measured and preprocessed, a line for each family and wavelength.

        area = ratio multiplicity |F|^2 exp(-2 B s^2) W (1 + P cos^2 2theta) / (sin^2 theta cos theta)
        W = mean over the family of (r^2 cos^2 alpha + sin^2 alpha / r)^(-3/2)
        profile(u) = area / FWHM (eta 2/pi / (1 + u^2) + (1 - eta) 2 sqrt(ln 2 / pi) 2^(-u^2)),
        u = distance over the half width of its side

    out to where a profile is below 1e-4 of its height, widened to whole blocks of 16 points. The sum y is scaled to
    rate = counts (y / max y + background); a Poisson count is drawn at every measured point, the known smooth
    background is taken off (what SNIP does to a scan, without its errors), points under clip_sigma times the noise
    become exactly 0 (as in preprocessing: the noise is median |second difference| / (0.6745 sqrt 6) of blocks of 64
    points, linear between their centres), and the maximum becomes 100.

    Args:
        offset, hkl, multiplicity, f_squared, reciprocal_metric, b_overall: as in `render_sticks`.
        rotation_offset, rotations: int64 and int8, W (x' = W x on fractional columns) of each pattern's group, at most
            192 a pattern; none means the identity alone.
        profile: how each pattern is measured.
        pattern_id: int64; with the seed it decides the random numbers of a pattern.
        seed: any 64-bit integer.
        wavelength: Angstrom, K-alpha1.
        grid: the 2theta axis.
        clip_sigma: k >= 0.

    Returns:
        `RenderedPatterns`. A pattern with no line inside what was measured, or no point above the noise, is all zero;
        families of an intensity that is not finite and positive have no line.

    Raises:
        ValueError: for a shape, dtype, parameter, wavelength or grid outside these rules; FWHM^2 <= 0 on the grid.

    Note:
        Deterministic, the same on CPU and CUDA up to a count in some 10^4 points; no gradients.

    Source:
        Caglioti, Paoletti & Ricci, Nucl. Instrum. 3, 223 (1958); Dollase, J. Appl. Cryst. 19, 267 (1986); split
        profile: Toraya, J. Appl. Cryst. 23, 485 (1990), with the cot 2theta of axial divergence (Klug & Alexander,
        X-ray Diffraction Procedures, 1974); Stokes & Wilson, Proc. Phys. Soc. 56, 174 (1944) for microstrain.
    """
    return RenderedPatterns(
        *torch.ops.xrdfast.render_patterns(
            offset,
            hkl,
            multiplicity,
            f_squared,
            reciprocal_metric,
            b_overall,
            rotation_offset,
            rotations,
            profile.table(),
            pattern_id,
            seed,
            clip_sigma,
            wavelength,
            grid.two_theta_min,
            grid.two_theta_step,
            grid.n_points,
        )
    )


# --- reference ------------------------------------------------------------------------------------------------------


class _Lines(NamedTuple):
    """Lines of one pattern; angles observed, in degrees."""

    center: Tensor  # points
    fwhm: Tensor  # points
    split: Tensor  # (1 + split) / 2 of it on the low-angle side
    area: Tensor


def render_patterns_reference(
    offset: Tensor,
    hkl: Tensor,
    multiplicity: Tensor,
    f_squared: Tensor,
    reciprocal_metric: Tensor,
    b_overall: Tensor,
    rotation_offset: Tensor,
    rotations: Tensor,
    profile: Tensor,
    pattern_id: Tensor,
    seed: int,
    clip_sigma: float,
    wavelength: float,
    two_theta_min: float,
    two_theta_step: float,
    n_points: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch in float64, pattern by pattern; the yardstick of the kernels."""
    device, n_patterns = hkl.device, len(offset) - 1
    grid = two_theta_min, two_theta_step, n_points
    bounds, turns, ids = offset.tolist(), rotation_offset.tolist(), pattern_id.tolist()
    out = torch.zeros(n_patterns, n_points, dtype=torch.float64)
    for i in range(n_patterns):
        p = ProfileParameters(*profile[i].double().cpu().unbind())
        rows = slice(bounds[i], bounds[i + 1])
        g2, weight = _families(
            hkl[rows].cpu(), reciprocal_metric[i].cpu(), rotations[turns[i] : turns[i + 1]].cpu(), p
        )
        weight = weight * multiplicity[rows].cpu().double() * f_squared[rows].cpu().double()
        weight = weight * torch.exp(-0.5 * b_overall[i].cpu() * g2)
        lines = _lines(g2, weight, p, wavelength, two_theta_min, two_theta_step)
        first, last = _measured(p, *grid)
        own = lines[0].area[(lines[0].center >= first) & (lines[0].center < last)]
        if len(own) == 0:
            continue
        foreign = _impurities(own.max(), p, wavelength, grid, ids[i], seed)
        peaks = torch.zeros(n_points, dtype=torch.float64)
        for family in (*lines, *foreign):
            peaks += _profiles(family, p.eta, n_points)
        peaks[:first] = peaks[last:] = 0.0
        if not 0.0 < peaks.max() < math.inf:
            continue
        out[i] = _as_preprocessed(peaks, p, clip_sigma, grid, first, last, ids[i], seed)
    intensity = out.float().to(device)
    return intensity, *active_patches(intensity)


def active_patches(intensity: Tensor) -> tuple[Tensor, Tensor]:
    """Count and indices of the patches that are not blank, as in `RenderedPatterns`."""
    n_patterns, n_points = intensity.shape
    n_patches = -(-n_points // PATCH_POINTS)
    padded = torch.nn.functional.pad(intensity, (0, n_patches * PATCH_POINTS - n_points))
    active = padded.view(n_patterns, n_patches, PATCH_POINTS).amax(2) >= ACTIVE_INTENSITY
    index = torch.arange(n_patches, device=intensity.device).expand(n_patterns, -1)
    patch = torch.where(active, index, n_patches).sort(dim=1).values
    return active.sum(1, dtype=torch.int32), torch.where(patch < n_patches, patch, -1).to(torch.int16)


def _families(hkl: Tensor, metric: Tensor, rotations: Tensor, p: ProfileParameters) -> tuple[Tensor, Tensor]:
    """1/d^2 and the March-Dollase weight of families.

    The mean over a family's members h W of a function of their angle with the axis is the mean over the axis' images
    of a function of their angle with h, as rotations keep the metric.
    """
    aa, bb, cc, bc, ac, ab = metric.double().unbind()
    dot = torch.stack([aa, ab, ac, ab, bb, bc, ac, bc, cc]).view(3, 3)
    h = hkl.double()
    g2 = ((h @ dot) * h).sum(1)
    if p.march_r == 1.0:
        return g2, torch.ones_like(g2)
    axis = torch.stack([p.march_h, p.march_k, p.march_l])
    images = axis @ rotations.double() if len(rotations) else axis[None]  # (n_rotations, 3)
    length2 = ((images @ dot) * images).sum(1)
    cos2 = (h @ dot @ images.T).square() / (g2[:, None] * length2)
    cos2 = cos2.clamp(max=1.0)
    return g2, (p.march_r**2 * cos2 + (1.0 - cos2) / p.march_r).pow(-1.5).mean(1)


def _lines(
    g2: Tensor, weight: Tensor, p: ProfileParameters, wavelength: float, minimum: float, step: float
) -> tuple[_Lines, _Lines]:
    """Lines of the two wavelengths; what does not diffract or is too faint to be a number is left out."""
    made = []
    for length, ratio in ((wavelength, 1.0), (float(p.second_wavelength), float(p.second_ratio))):
        sin2 = 0.25 * length**2 * g2
        cos_two_theta = 1.0 - 2.0 * sin2
        lp = (1.0 + p.polarisation * cos_two_theta.square()) / (sin2 * torch.sqrt(1.0 - sin2))
        area = ratio * weight * lp
        keep = (sin2 > 0.0) & (sin2 < 1.0) & (area > 0.0) & (area < math.inf)
        made.append(_shaped(sin2[keep], area[keep], p, length, minimum, step))
    return made[0], made[1]


def _shaped(
    sin2: Tensor, area: Tensor, p: ProfileParameters, wavelength: float, minimum: float, step: float
) -> _Lines:
    sine, cosine = torch.sqrt(sin2), torch.sqrt(1.0 - sin2)
    tangent = sine / cosine
    size = math.degrees(SCHERRER_K * wavelength) / (p.crystallite_size * cosine)
    strain = math.degrees(4.0) * p.microstrain * tangent
    caglioti = p.caglioti_u * tangent.square() + p.caglioti_v * tangent + p.caglioti_w
    fwhm = torch.sqrt(caglioti + size.square() + strain.square())
    split = p.asymmetry * (1.0 - 2.0 * sin2) / (2.0 * sine * cosine)
    angle = 2.0 * torch.rad2deg(torch.asin(sine)) + p.zero_shift
    angle = angle - math.degrees(2.0) * p.sample_displacement * cosine / p.goniometer_radius
    split = split.clamp(-MAX_ASYMMETRY, MAX_ASYMMETRY)
    lines = ((angle - minimum) / step, (fwhm / step).clamp(min=1.0), split, area)
    keep = (fwhm > 0.0) & (fwhm < 1e6)  # beyond the grid nothing vouches for Caglioti's formula
    return _Lines(*(x[keep] for x in lines))


def _measured(p: ProfileParameters, minimum: float, step: float, n_points: int) -> tuple[int, int]:
    """First and past-the-last point that were measured; an angle a hair off a point means that point."""
    first, last = (
        math.ceil((float(x) - minimum) / step - 1e-6) for x in (p.two_theta_first, p.two_theta_last)
    )
    return min(max(first, 0), n_points), min(max(last, 0), n_points)


def _impurities(
    strongest: Tensor,
    p: ProfileParameters,
    wavelength: float,
    grid: tuple[float, float, int],
    pattern_id: int,
    seed: int,
) -> tuple[_Lines, _Lines]:
    """Foreign lines at random angles of what was measured, with the K-alpha2 partners of their spacings."""
    minimum, step, _ = grid
    first, last = _measured(p, *grid)
    words = philox(torch.arange(int(p.impurity_count)), IMPURITY_STREAM, pattern_id, seed)
    angle = minimum + step * (first + (last - first) * unit(words[0]))
    area = strongest * p.impurity_strength * unit(words[1])
    sin2 = torch.sin(torch.deg2rad(0.5 * angle)).square()
    sin2_second = sin2 * (p.second_wavelength / wavelength) ** 2
    second = (sin2_second < 1.0) & (p.second_ratio > 0.0)
    return (
        _shaped(sin2, area, p, wavelength, minimum, step),
        _shaped(
            sin2_second[second], p.second_ratio * area[second], p, float(p.second_wavelength), minimum, step
        ),
    )


def _profiles(lines: _Lines, eta: Tensor, n_points: int) -> Tensor:
    """Sum of split pseudo-Voigts on the grid."""
    lorentzian, gaussian = eta * 2.0 / math.pi, (1.0 - eta) * 2.0 * math.sqrt(math.log(2.0) / math.pi)
    reach = cutoff(float(lorentzian / (lorentzian + gaussian)))
    low, high = 0.5 * lines.fwhm * (1.0 + lines.split), 0.5 * lines.fwhm * (1.0 - lines.split)
    begin = torch.ceil(lines.center - reach * low).clamp(0, n_points) // LINE_BLOCK
    end = torch.floor(lines.center + reach * high).clamp(-1, n_points - 1) // LINE_BLOCK
    point = torch.arange(n_points, dtype=torch.float64)
    block = point // LINE_BLOCK
    total = torch.zeros(n_points, dtype=torch.float64)
    pieces = zip(
        *(x.split(64) for x in (lines.center, lines.fwhm, low, high, lines.area, begin, end)), strict=True
    )
    for center, fwhm, left, right, area, first, last in pieces:
        distance = point - center[:, None]
        u2 = (distance / torch.where(distance <= 0.0, left[:, None], right[:, None])).square()
        height = lorentzian / (1.0 + u2) + gaussian * torch.exp2(-u2)
        inside = (block >= first[:, None]) & (block <= last[:, None])
        total += torch.where(inside, (area / fwhm)[:, None] * height, 0.0).sum(0)
    return total


def cutoff(lorentzian: float) -> float:
    """Half widths from the middle at which a pseudo-Voigt falls to `CUTOFF` of its height.

    Args:
        lorentzian: share of its Lorentzian part in the height.
    """
    low, high = 1.0, 1.0 / math.sqrt(CUTOFF)
    for _ in range(60):
        u = 0.5 * (low + high)
        above = lorentzian / (1.0 + u * u) + (1.0 - lorentzian) * math.exp2(-u * u) > CUTOFF
        low, high = (u, high) if above else (low, u)
    return high


def noise_level(signal: Tensor) -> Tensor:
    """Local noise of a pattern, (n_points,), as in csrc/significance.h."""
    n_points = len(signal)
    n_blocks = max(n_points // SIGNIFICANCE_BLOCK, 1)
    rough = signal.diff().diff().abs()  # of points 1 .. n - 2
    levels = []
    for block in range(n_blocks):
        begin = max(block * SIGNIFICANCE_BLOCK - 1, 0)
        end = len(rough) if block == n_blocks - 1 else (block + 1) * SIGNIFICANCE_BLOCK - 1
        piece = rough[begin:end].sort().values
        levels.append(piece[len(piece) // 2] if len(piece) else rough.new_zeros(()))
    level = torch.stack(levels) / (0.6745 * math.sqrt(6.0))
    position = (torch.arange(n_points, dtype=torch.float64) + 0.5) / SIGNIFICANCE_BLOCK - 0.5
    position = position.clamp(0.0, n_blocks - 1.0)
    block = position.long()
    return torch.lerp(level[block], level[(block + 1).clamp(max=n_blocks - 1)], position - block)


def _as_preprocessed(
    peaks: Tensor,
    p: ProfileParameters,
    clip_sigma: float,
    grid: tuple[float, float, int],
    first: int,
    last: int,
    pattern_id: int,
    seed: int,
) -> Tensor:
    """Counts, background off, clip, maximum 100. Without counts: the peaks, maximum 100."""
    minimum, step, n_points = grid
    if p.counts > 0.0:
        x = 2.0 * torch.arange(n_points, dtype=torch.float64) / max(n_points - 1, 1) - 1.0
        level = p.background_0 + x * p.background_1 + (2.0 * x**2 - 1.0) * p.background_2
        level = level + (4.0 * x**3 - 3.0 * x) * p.background_3
        u = (minimum + step * torch.arange(n_points) - p.hump_center) / (0.5 * p.hump_fwhm)
        background = p.counts * (level + p.hump_height * torch.exp2(-u.square())).clamp(min=0.0)
        rate = (p.counts / peaks.max()) * peaks + background
        signal = poisson(rate, noise_words(n_points, pattern_id, seed)) - background
        measured = signal[first:last]
        clipped = torch.zeros(n_points, dtype=torch.float64)
        clipped[first:last] = torch.where(measured < clip_sigma * noise_level(measured), 0.0, measured).clamp(
            min=0.0
        )
        peaks = clipped
    strongest = peaks.max()
    return peaks / strongest * 100.0 if strongest > 0.0 else torch.zeros_like(peaks)


# --- implementations ------------------------------------------------------------------------------------------------


def _patterns_cpu(*arguments):
    _check(*arguments)
    module = _native.cpu()
    if module is None:
        return render_patterns_reference(*arguments)
    _held, outputs, pointers, sizes = _native_arguments(*arguments)
    module.render_patterns(*pointers, *sizes, torch.get_num_threads())
    return outputs


def _patterns_cuda(*arguments):
    _check(*arguments)
    module = _native.cuda()
    if module is None:
        return render_patterns_reference(*arguments)
    return _patterns_on_device(module, *arguments)


def _patterns_on_device(module: ModuleType, *arguments):
    """The kernels of `_cuda`, or of `_emu` in the tests."""
    held, outputs, pointers, sizes = _native_arguments(*arguments)
    intensity, n_families = outputs[0], len(held[1])
    families = intensity.new_empty((2, n_families), dtype=torch.float64)
    n_lines = 2 * n_families + 2 * MAX_IMPURITIES * len(intensity)
    lines = intensity.new_empty((n_lines, LINE_WORDS))
    peaks = torch.empty_like(intensity)
    scratch = (families.data_ptr(), families.data_ptr() + 8 * n_families, lines.data_ptr(), peaks.data_ptr())
    with device_stream(intensity) as stream:
        module.render_patterns(*pointers, *sizes, *scratch, stream)
    return outputs


def _native_arguments(
    offset: Tensor,
    hkl: Tensor,
    multiplicity: Tensor,
    f_squared: Tensor,
    reciprocal_metric: Tensor,
    b_overall: Tensor,
    rotation_offset: Tensor,
    rotations: Tensor,
    profile: Tensor,
    pattern_id: Tensor,
    seed: int,
    clip_sigma: float,
    wavelength: float,
    two_theta_min: float,
    two_theta_step: float,
    n_points: int,
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor], list[int], tuple]:
    """Tensors to hold until the call returns, the results to fill, and a native call's addresses and sizes."""
    hkl = hkl if hkl.stride(1) == 1 else hkl.contiguous()
    held = [offset.contiguous(), hkl, multiplicity]  # hkl and multiplicity may be columns of one table
    held += [
        x.contiguous()
        for x in (f_squared, reciprocal_metric, b_overall, rotation_offset, rotations, profile, pattern_id)
    ]
    outputs = _empty_outputs(f_squared, len(profile), n_points)
    pointers = [x.data_ptr() for x in (*held, *outputs)]
    sizes = (
        hkl.stride(0),
        multiplicity.stride(0),
        len(profile),
        n_points,
        seed,
        clip_sigma,
        wavelength,
        two_theta_min,
        two_theta_step,
    )
    return held, outputs, pointers, sizes


def _empty_outputs(like: Tensor, n_patterns: int, n_points: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty((n_patterns, n_points), dtype=torch.float32),
        like.new_empty((n_patterns,), dtype=torch.int32),
        like.new_empty((n_patterns, -(-n_points // PATCH_POINTS)), dtype=torch.int16),
    )


# Least and most of every parameter; what is not listed may be any finite number.
_BOUNDS = {
    "crystallite_size": (_SMALLEST, math.inf),
    "microstrain": (0.0, _LARGEST),
    "eta": (0.0, 1.0),
    "second_wavelength": (_SMALLEST, _LARGEST),
    "second_ratio": (0.0, _LARGEST),
    "zero_shift": (-10.0, 10.0),
    "goniometer_radius": (_SMALLEST, _LARGEST),
    "march_r": (_SMALLEST, _LARGEST),
    "polarisation": (0.0, 1.0),
    "counts": (0.0, MAX_COUNTS),
    "hump_fwhm": (_SMALLEST, _LARGEST),
    "impurity_count": (0.0, float(MAX_IMPURITIES)),
    "impurity_strength": (0.0, _LARGEST),
}


def _check(
    offset: Tensor,
    hkl: Tensor,
    multiplicity: Tensor,
    f_squared: Tensor,
    reciprocal_metric: Tensor,
    b_overall: Tensor,
    rotation_offset: Tensor,
    rotations: Tensor,
    profile: Tensor,
    pattern_id: Tensor,
    seed: int,
    clip_sigma: float,
    wavelength: float,
    two_theta_min: float,
    two_theta_step: float,
    n_points: int,
) -> None:
    op = "render_patterns"
    families = (offset, hkl, multiplicity, f_squared, reciprocal_metric, b_overall)
    check_families(op, *families, wavelength, two_theta_step, n_points)
    n_patterns = len(offset) - 1
    rules = {
        "rotation_offset": (rotation_offset, (n_patterns + 1,), torch.int64),
        "rotations": (rotations, (len(rotations), 3, 3), torch.int8),
        "profile": (profile, (n_patterns, len(ProfileParameters._fields)), torch.float64),
        "pattern_id": (pattern_id, (n_patterns,), torch.int64),
    }
    check_tensors(op, rules, hkl.device)
    check_offsets(op, "rotation_offset", rotation_offset, len(rotations), most=MAX_ROTATIONS)
    _require(0.0 <= clip_sigma < math.inf, "clip_sigma", "finite and >= 0", clip_sigma)
    _require(n_points <= PATCH_POINTS * 32767, "grid", f"of at most {PATCH_POINTS * 32767} points", n_points)
    span = two_theta_min, two_theta_min + two_theta_step * n_points
    _require(span[0] >= 0.0 and span[1] <= 180.0 + 1e-6, "grid", "within 0..180 degrees", span)
    _check_profile(profile, *span)


def _check_profile(profile: Tensor, two_theta_min: float, two_theta_max: float) -> None:
    """Every parameter within its bounds, and a positive FWHM^2 all over the grid."""
    names = ProfileParameters._fields
    least, most = profile.new_tensor([_BOUNDS.get(name, (-_LARGEST, _LARGEST)) for name in names]).unbind(1)
    good = (profile >= least) & (profile <= most)  # NaN is neither
    p = ProfileParameters(*profile.unbind(1))
    ends = [math.tan(math.radians(0.5 * x)) for x in (two_theta_min, min(two_theta_max, 179.99))]
    lowest = (-0.5 * p.caglioti_v / p.caglioti_u).nan_to_num(ends[0]).clamp(*ends)
    widths = [p.caglioti_u * t**2 + p.caglioti_v * t + p.caglioti_w for t in (*ends, lowest)]
    positive = torch.stack(widths).amin(0) > 0.0
    axis = (p.march_h != 0.0) | (p.march_k != 0.0) | (p.march_l != 0.0)
    if bool((good.all(1) & positive & axis).all()):  # one synchronisation
        return
    for i, name in enumerate(names):
        bounds = _BOUNDS.get(name, (-_LARGEST, _LARGEST))
        rule = _rule(*bounds)
        _require(bool(good[:, i].all()), f"profile.{name}", rule, profile[:, i].tolist()[:5])
    _require(bool(axis.all()), "profile.march_h, march_k, march_l", "not all 0", [0.0, 0.0, 0.0])
    _require(
        False,
        "profile.caglioti_u, v, w",
        "such that FWHM^2 > 0 on the grid",
        float(torch.stack(widths).amin()),
    )


def _rule(least: float, most: float) -> str:
    """Bounds in words."""
    if least == -_LARGEST:
        return "finite"
    lower = "> 0" if least == _SMALLEST else f">= {least:g}"
    if most == math.inf:
        return lower
    return f"finite and {lower}" if most == _LARGEST else f"in {least:g}..{most:g}"


def _require(condition: bool, argument: str, rule: str, got: object) -> None:
    if not condition:
        raise ValueError(f"render_patterns: {argument} must be {rule}, got {got}")


LIBRARY.impl("render_patterns", _patterns_cpu, "CPU")
LIBRARY.impl("render_patterns", _patterns_cuda, "CUDA")


@torch.library.register_fake("xrdfast::render_patterns")
def _patterns_fake(offset, hkl, multiplicity, f_squared, reciprocal_metric, *rest):
    return _empty_outputs(f_squared, reciprocal_metric.shape[0], rest[-1])
