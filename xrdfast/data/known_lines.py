"""The strongest lines of the structures of a store, and how they move with strains that keep the symmetry.

For comparing structures with measured patterns (`xrdfast.retrieval`), not for rendering (`xrdfast.data.generate`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xrdfast.data.generate import free_metric_changes, strained_reciprocal_metric
from xrdfast.data.store import PatternStore
from xrdfast.ops.reflections import lorentz_polarisation, rows_of

MAX_LINES = 128  # of a structure: more cost time and hardly change a comparison
_MIN_INTENSITY = 1e-3  # of the strongest line
_B_OVERALL = 1.0  # Angstrom^2


class KnownLines(NamedTuple):
    """Lines of n structures, the strongest first in each."""

    count: Tensor  # (n,) int64
    hkl: Tensor  # (n_lines, 3) int16
    amplitude: (
        Tensor  # (n_lines,) float32, square root of intensity; that of a structure's strongest line is 10
    )
    metric: Tensor  # (n, 6) float64, reciprocal, as `strained_reciprocal_metric` has it, 1 / Angstrom^2
    metric_change: Tensor  # (n, 6, 6) float64, as `free_metric_changes` has it


def strongest_lines(
    store: PatternStore, rows: Tensor, wavelength: float, two_theta_min: float, two_theta_max: float
) -> KnownLines:
    """At most 128 lines of each structure, down to a thousandth of its strongest; B is 1 Angstrom^2.

    Args:
        store: where the reflection families come from.
        rows: (n,) int64.
        wavelength: Angstrom.
        two_theta_min, two_theta_max: degrees.
    """
    families = store.gather(rows)
    metric = strained_reciprocal_metric(families.lattice, families.rotation_offset, families.rotations)
    structure = rows_of(families.offset, len(families.hkl))
    q2 = q_squared(families.hkl, metric[structure])
    sin2 = 0.25 * wavelength**2 * q2
    low, high = (math.sin(math.radians(0.5 * angle)) ** 2 for angle in (two_theta_min, two_theta_max))
    inside = (sin2 > low) & (sin2 < high)
    intensity = families.multiplicity * families.f_squared.double() * torch.exp(-0.5 * _B_OVERALL * q2)
    intensity = torch.where(inside, intensity * lorentz_polarisation(sin2.clamp(low, high)), 0.0)
    strongest = intensity.new_zeros(len(rows)).scatter_reduce_(0, structure, intensity, "amax")[structure]
    intensity = 100.0 * intensity / strongest.clamp(min=1e-300)
    # Strongest first within each structure: a stable sort by structure after one by intensity.
    order = torch.argsort(intensity, descending=True, stable=True)
    order = order[torch.argsort(structure[order], stable=True)]
    rank = torch.arange(len(order)) - families.offset[structure]
    order = order[(rank < MAX_LINES) & (intensity[order] > 100.0 * _MIN_INTENSITY)]
    return KnownLines(
        torch.bincount(structure[order], minlength=len(rows)),
        families.hkl[order].contiguous(),
        intensity[order].sqrt().float(),
        metric,
        free_metric_changes(families.lattice, families.rotation_offset, families.rotations),
    )


def q_squared(hkl: Tensor, metric: Tensor) -> Tensor:
    """(n,) 1 / d^2 of lines (n, 3), each with its own reciprocal metric (n, 6)."""
    h, k, ell = hkl.double().unbind(1)
    products = torch.stack([h * h, k * k, ell * ell, 2 * k * ell, 2 * h * ell, 2 * h * k], dim=1)
    return (products * metric).sum(1)
