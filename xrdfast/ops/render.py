"""Reflection families or peak lists to the grid of intensities that a model reads.

Not for measured scans with background and noise.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xrdfast import _native
from xrdfast.ops import LIBRARY, device_stream
from xrdfast.ops.reflections import MERGE_STEP, MIN_SCALED_INTENSITY, lorentz_polarisation

if TYPE_CHECKING:
    from xrdfast.bragg import Grid

LIBRARY.define(
    "render_sticks(Tensor offset, Tensor hkl, Tensor multiplicity, Tensor f_squared, Tensor reciprocal_metric, "
    "Tensor b_overall, float wavelength, float two_theta_min, float two_theta_step, int n_points) -> Tensor"
)


def render_sticks(
    offset: Tensor,  # (n_patterns + 1,)
    hkl: Tensor,  # (n_families, 3)
    multiplicity: Tensor,  # (n_families,)
    f_squared: Tensor,  # (n_families,)
    reciprocal_metric: Tensor,  # (n_patterns, 6)
    b_overall: Tensor,  # (n_patterns,)
    *,
    wavelength: float,
    grid: Grid,
) -> Tensor:
    """Stick patterns of a batch of structures, each with its own (possibly strained) cell.

        1 / d^2 = h^T G* h;   I = multiplicity |F|^2 LP(theta) exp(-2 B s^2),   s = 1 / 2d.

    Families whose round(2theta / 1e-5 degrees) is equal are one line; lines of at most 1e-3 (of 100) are dropped; a
    point of the grid keeps the strongest line that falls on it, point = int((2theta - min) / step).

    Args:
        offset: int64, first family of each pattern.
        hkl: int16.
        multiplicity: int16, Friedel mates counted.
        f_squared: float32, electrons^2.
        reciprocal_metric: float64, a*.a*, b*.b*, c*.c*, b*.c*, a*.c*, a*.b* in 1/Angstrom^2.
        b_overall: float64, Angstrom^2, >= 0.
        wavelength: Angstrom.
        grid: the 2theta axis, half-open.

    Returns:
        (n_patterns, n_points) float32, maximum 100; a pattern with no line inside the grid is all zero.

    Raises:
        ValueError: for a shape, dtype or wavelength outside these rules.

    Note:
        Deterministic; no gradients.

    Source:
        Yu et al., arXiv:2511.06976, for the grid and the maximum in a bin.
    """
    return torch.ops.xrdfast.render_sticks(
        offset,
        hkl,
        multiplicity,
        f_squared,
        reciprocal_metric,
        b_overall,
        wavelength,
        grid.two_theta_min,
        grid.two_theta_step,
        grid.n_points,
    )


def sticks_to_grid(
    offset: Tensor,  # (n_patterns + 1,)
    two_theta: Tensor,  # (n_peaks,)
    intensity: Tensor,  # (n_peaks,)
    grid: Grid,
) -> Tensor:
    """Peak lists on the grid: the strongest peak of a point is kept, the maximum becomes 100.

    Args:
        offset: int64, first peak of each pattern.
        two_theta: degrees, float64; peaks outside the grid are left out.
        intensity: float64, >= 0.
        grid: the 2theta axis.

    Returns:
        (n_patterns, n_points) float32; a pattern with no peak inside the grid is all zero.
    """
    n_patterns = len(offset) - 1
    pattern = torch.repeat_interleave(torch.arange(n_patterns, device=offset.device), offset.diff())
    point = ((two_theta - grid.two_theta_min) * (1.0 / grid.two_theta_step)).floor().long()
    inside = (point >= 0) & (point < grid.n_points)
    flat = two_theta.new_zeros(n_patterns * grid.n_points)
    flat.scatter_reduce_(
        0, (pattern * grid.n_points + point)[inside], intensity[inside].to(flat.dtype), "amax"
    )
    return _scaled(flat.view(n_patterns, grid.n_points))


def _scaled(patterns: Tensor) -> Tensor:
    strongest = patterns.amax(dim=1, keepdim=True)
    return torch.where(strongest > 0, patterns * (100.0 / strongest), 0.0).float()


def render_sticks_reference(
    offset: Tensor,
    hkl: Tensor,
    multiplicity: Tensor,
    f_squared: Tensor,
    reciprocal_metric: Tensor,
    b_overall: Tensor,
    wavelength: float,
    two_theta_min: float,
    two_theta_step: float,
    n_points: int,
) -> Tensor:
    """Plain PyTorch; the yardstick of the kernels."""
    n_patterns = len(offset) - 1
    pattern = torch.repeat_interleave(torch.arange(n_patterns, device=offset.device), offset.diff())
    metric = reciprocal_metric[pattern]
    h, k, ell = hkl.double().unbind(1)
    products = torch.stack([h * h, k * k, ell * ell, 2 * k * ell, 2 * h * ell, 2 * h * k], dim=1)
    g2 = (products * metric).sum(1)
    sin2 = 0.25 * wavelength**2 * g2
    two_theta = 2.0 * torch.rad2deg(torch.asin(torch.sqrt(sin2.clamp(0.0, 1.0))))
    inside = (sin2 > 0) & (sin2 < 1) & (two_theta >= two_theta_min)
    inside &= two_theta < two_theta_min + two_theta_step * n_points
    pattern, two_theta, sin2, g2 = pattern[inside], two_theta[inside], sin2[inside], g2[inside]
    strength = multiplicity[inside].double() * f_squared[inside].double() * lorentz_polarisation(sin2)
    strength = strength * torch.exp(-0.5 * b_overall[pattern] * g2)
    key = pattern * math.ceil(180.0 / MERGE_STEP) + (two_theta / MERGE_STEP + 0.5).long()
    unique, line = torch.unique(key, return_inverse=True)
    line_strength = strength.new_zeros(len(unique)).index_add_(0, line, strength)
    line_angle = torch.full_like(line_strength, 180.0).scatter_reduce_(0, line, two_theta, "amin")
    line_pattern = torch.div(unique, math.ceil(180.0 / MERGE_STEP), rounding_mode="floor")
    strongest = strength.new_zeros(n_patterns).scatter_reduce_(0, line_pattern, line_strength, "amax")[
        line_pattern
    ]
    scaled = line_strength / strongest * 100.0
    # a pattern that is empty or not finite stays blank
    keep = torch.isfinite(strongest) & (strongest > 0) & (scaled > MIN_SCALED_INTENSITY)
    point = ((line_angle - two_theta_min) * (1.0 / two_theta_step)).long().clamp(max=n_points - 1)
    patterns = strength.new_zeros(n_patterns * n_points)
    patterns.scatter_reduce_(0, (line_pattern * n_points + point)[keep], scaled[keep], "amax")
    return patterns.view(n_patterns, n_points).float()


def _render_sticks_cpu(*arguments):
    _check_sticks(arguments)
    module = _native.cpu()
    if module is None:
        return render_sticks_reference(*arguments)
    _held, intensity, pointers, sizes = _render_arguments(*arguments)
    module.render_sticks(*pointers, *sizes, torch.get_num_threads())
    return intensity


def _render_sticks_cuda(*arguments):
    _check_sticks(arguments)
    module = _native.cuda()
    if module is None:
        return render_sticks_reference(*arguments)
    return _render_sticks_on_device(module, *arguments)


def _render_sticks_on_device(module: ModuleType, *arguments):
    """The kernel of `_cuda`, or of `_emu` in the tests."""
    held, intensity, pointers, sizes = _render_arguments(*arguments)
    two_theta, strength = intensity.new_empty((2, len(held[1])), dtype=torch.float64)
    order = intensity.new_empty(len(held[1]), dtype=torch.int32)
    with device_stream(intensity) as stream:
        module.render_sticks(
            *pointers, *sizes, two_theta.data_ptr(), strength.data_ptr(), order.data_ptr(), stream
        )
    return intensity


def _render_arguments(
    offset: Tensor,
    hkl: Tensor,
    multiplicity: Tensor,
    f_squared: Tensor,
    reciprocal_metric: Tensor,
    b_overall: Tensor,
    wavelength: float,
    two_theta_min: float,
    two_theta_step: float,
    n_points: int,
) -> tuple[list[Tensor], Tensor, list[int], tuple]:
    """Tensors to hold until the call returns, the result to fill, and a native call's addresses and sizes."""
    hkl = hkl if hkl.stride(1) == 1 else hkl.contiguous()
    held = [offset.contiguous(), hkl, multiplicity]  # hkl and multiplicity may be columns of one table
    held += [x.contiguous() for x in (f_squared, reciprocal_metric, b_overall)]
    n_patterns = len(offset) - 1
    intensity = f_squared.new_empty((n_patterns, n_points))
    pointers = [x.data_ptr() for x in (*held, intensity)]
    sizes = (
        hkl.stride(0),
        multiplicity.stride(0),
        n_patterns,
        n_points,
        wavelength,
        two_theta_min,
        two_theta_step,
    )
    return held, intensity, pointers, sizes


def _check_sticks(arguments: tuple) -> None:
    *families, wavelength, _, two_theta_step, n_points = arguments
    check_families("render_sticks", *families, wavelength, two_theta_step, n_points)


def check_families(
    op: str,
    offset: Tensor,
    hkl: Tensor,
    multiplicity: Tensor,
    f_squared: Tensor,
    reciprocal_metric: Tensor,
    b_overall: Tensor,
    wavelength: float,
    two_theta_step: float,
    n_points: int,
) -> None:
    """Raises ValueError where the families of an operator, the wavelength or the grid break its rules."""
    n_patterns, n_families = len(offset) - 1, len(hkl)
    rules = {
        "offset": (offset, (max(n_patterns, 0) + 1,), torch.int64),
        "hkl": (hkl, (n_families, 3), torch.int16),
        "multiplicity": (multiplicity, (n_families,), torch.int16),
        "f_squared": (f_squared, (n_families,), torch.float32),
        "reciprocal_metric": (reciprocal_metric, (n_patterns, 6), torch.float64),
        "b_overall": (b_overall, (n_patterns,), torch.float64),
    }
    check_tensors(op, rules, hkl.device)
    check_offsets(op, "offset", offset, n_families)
    if not (math.isfinite(wavelength) and wavelength > 0):
        raise ValueError(f"{op}: wavelength must be finite and > 0 Angstrom, got {wavelength}")
    if not two_theta_step > 0 or n_points < 1:
        raise ValueError(f"{op}: grid must have a step > 0 and a point, got {two_theta_step}, {n_points}")


def check_tensors(op: str, rules: dict[str, tuple[Tensor, tuple, torch.dtype]], device: torch.device) -> None:
    """Raises ValueError where a tensor has another shape, dtype or device than its rule says."""
    for name, (tensor, shape, dtype) in rules.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{op}: {name} must be {shape} {dtype} on {device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def check_offsets(op: str, name: str, offset: Tensor, n_rows: int, most: int | None = None) -> None:
    """Raises ValueError where offsets don't rise from 0 to n_rows, by `most` a step; one synchronisation."""
    falls = (offset[1:] < offset[:-1]).any() | (offset[0] != 0) | (offset[-1] != n_rows)
    if most is not None:
        falls = falls | (offset.diff() > most).any()
    if bool(falls):
        steps = "" if most is None else f", by at most {most} a pattern"
        raise ValueError(f"{op}: {name} must rise from 0 to {n_rows}{steps}, got {offset.tolist()[:5]} ...")


LIBRARY.impl("render_sticks", _render_sticks_cpu, "CPU")
LIBRARY.impl("render_sticks", _render_sticks_cuda, "CUDA")


@torch.library.register_fake("xrdfast::render_sticks")
def _render_sticks_fake(offset, hkl, multiplicity, f_squared, reciprocal_metric, *rest):
    return f_squared.new_empty((reciprocal_metric.shape[0], rest[-1]))
