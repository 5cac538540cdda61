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
from xrdfast.ops.line_profile import (
    ProfileParameters,
    impurities,
    make_lines,
    measured_ranges,
    sum_profiles,
    weigh_families,
)
from xrdfast.ops.preprocess import PATCH_POINTS, active_patches, local_noise_reference
from xrdfast.ops.random import noise_words, poisson
from xrdfast.ops.reflections import MAX_ROTATIONS
from xrdfast.ops.render import check_families, check_offsets, check_tensors

if TYPE_CHECKING:
    from xrdfast.bragg import Grid

MAX_IMPURITIES = 16
MAX_COUNTS = 1e6  # single precision still tells neighbouring counts apart
LINE_WORDS = 11  # of four bytes, a line in csrc/line_profile.h
_COUNTS = -1.0  # clip_sigma of counts as measured
_SMALLEST, _LARGEST = sys.float_info.min, sys.float_info.max  # "> 0" and "finite" as bounds

LIBRARY.define(
    "render_patterns(Tensor offset, Tensor hkl, Tensor multiplicity, Tensor f_squared, Tensor reciprocal_metric, "
    "Tensor b_overall, Tensor rotation_offset, Tensor rotations, Tensor profile, Tensor pattern_id, int seed, "
    "float clip_sigma, float wavelength, float two_theta_min, float two_theta_step, int n_points) "
    "-> (Tensor, Tensor, Tensor)"
)


class RenderedPatterns(NamedTuple):
    """Patterns of a batch, and where they are not blank."""

    intensity: Tensor  # (n_patterns, n_points) float32, 0..100, or counts
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
    clip_sigma: float | None = 3.0,
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
    points, linear between their centres), and the maximum becomes 100. Without a `clip_sigma` the counts stay as a
    detector gives them, background and all, for `preprocess_scans`; a profile without counts gives its peaks as ever.

    Args:
        offset, hkl, multiplicity, f_squared, reciprocal_metric, b_overall: as in `render_sticks`.
        rotation_offset, rotations: int64 and int8, W (x' = W x on fractional columns) of each pattern's group, at most
            192 a pattern; none means the identity alone.
        profile: how each pattern is measured.
        pattern_id: int64; with the seed it decides the random numbers of a pattern.
        seed: any 64-bit integer.
        wavelength: Angstrom, K-alpha1.
        grid: the 2theta axis.
        clip_sigma: k >= 0; None for counts as measured.

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
    if clip_sigma is not None:
        _require(0.0 <= clip_sigma < math.inf, "clip_sigma", "finite and >= 0, or None", clip_sigma)
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
            _COUNTS if clip_sigma is None else clip_sigma,
            wavelength,
            grid.two_theta_min,
            grid.two_theta_step,
            grid.n_points,
        )
    )


# --- reference ------------------------------------------------------------------------------------------------------


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
        g2, weight = weigh_families(
            hkl[rows].cpu(), reciprocal_metric[i].cpu(), rotations[turns[i] : turns[i + 1]].cpu(), p
        )
        weight = weight * multiplicity[rows].cpu().double() * f_squared[rows].cpu().double()
        weight = weight * torch.exp(-0.5 * b_overall[i].cpu() * g2)
        lines = make_lines(g2, weight, p, wavelength, two_theta_min, two_theta_step)
        first, last = map(int, measured_ranges(p, grid))
        own = lines[0].area[(lines[0].center >= first) & (lines[0].center < last)]
        if len(own) == 0:
            continue
        foreign = impurities(own.max(), p, wavelength, grid, ids[i], seed)
        peaks = torch.zeros(n_points, dtype=torch.float64)
        for family in (*lines, *foreign):
            peaks += sum_profiles(family, p.eta, n_points)
        peaks[:first] = peaks[last:] = 0.0
        if not 0.0 < peaks.max() < math.inf:
            continue
        out[i] = _as_preprocessed(peaks, p, clip_sigma, grid, first, last, ids[i], seed)
    intensity = out.float().to(device)
    return intensity, *active_patches(intensity)


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
    """Counts; background off, clip, maximum 100 unless they stay. Without counts: the peaks, maximum 100."""
    minimum, step, n_points = grid
    if p.counts > 0.0:
        x = 2.0 * torch.arange(n_points, dtype=torch.float64) / max(n_points - 1, 1) - 1.0
        level = p.background_0 + x * p.background_1 + (2.0 * x**2 - 1.0) * p.background_2
        level = level + (4.0 * x**3 - 3.0 * x) * p.background_3
        u = (minimum + step * torch.arange(n_points) - p.hump_center) / (0.5 * p.hump_fwhm)
        background = p.counts * (level + p.hump_height * torch.exp2(-u.square())).clamp(min=0.0)
        rate = (p.counts / peaks.max()) * peaks + background
        counts = poisson(rate, noise_words(n_points, pattern_id, seed))
        measured, clipped = (counts - background)[first:last], torch.zeros_like(counts)
        if clip_sigma < 0.0:
            clipped[first:last] = counts[first:last]
            return clipped
        threshold = clip_sigma * local_noise_reference(measured)
        clipped[first:last] = torch.where(measured < threshold, 0.0, measured).clamp(min=0.0)
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
    "second_ratio": (0.0, 100.0),
    "zero_shift": (-10.0, 10.0),
    "goniometer_radius": (_SMALLEST, _LARGEST),
    "march_r": (_SMALLEST, _LARGEST),
    "polarisation": (0.0, 1.0),
    "counts": (0.0, MAX_COUNTS),
    **dict.fromkeys(
        ("background_0", "background_1", "background_2", "background_3", "hump_height"), (-100.0, 100.0)
    ),
    "hump_fwhm": (_SMALLEST, _LARGEST),
    "two_theta_first": (-360.0, 360.0),
    "two_theta_last": (-360.0, 360.0),
    "impurity_count": (0.0, float(MAX_IMPURITIES)),
    "impurity_strength": (0.0, 100.0),
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
    clips = clip_sigma == _COUNTS or 0.0 <= clip_sigma < math.inf
    _require(clips, "clip_sigma", "finite and >= 0, or None", clip_sigma)
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
