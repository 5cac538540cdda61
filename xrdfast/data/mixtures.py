"""Simulated scans of one phase and of two, counted and then prepared as measured ones are.

What a suspicion of several phases is fitted and judged on. Not for what models of symmetry train on
(`xrdfast.data.generate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from xrdfast.bragg import Grid
from xrdfast.data.generate import AugmentConfig, draw_strain, strained_reciprocal_metric
from xrdfast.data.profiles import PROFILES, draw_profiles
from xrdfast.data.store import FamilyBatch, PatternStore
from xrdfast.data.whole_scans import preprocess_whole_scans
from xrdfast.ops.line_profile import ProfileParameters, measured_ranges
from xrdfast.ops.render_patterns import render_patterns

SHARES = (0.1, 0.5)  # of the area, from the second phase
_BATCH = 64


class OneAndTwo(NamedTuple):
    """The same phases alone and with a second one, measured alike."""

    one: Tensor  # (n_patterns, n_points) float32, maximum 100
    two: Tensor  # the same
    share: Tensor  # (n_patterns,) of the second phase, 0.1..0.5


def draw_one_and_two(
    store: PatternStore, rows: Tensor, augment: AugmentConfig, grid: Grid, generator: Generator
) -> Iterator[OneAndTwo]:
    """Scans of structures, and of each with another one of them, batch by batch.

    Args:
        store: where the structures are.
        rows: (n,) int64, of it.
        augment: with the profile of measured scans; strain, B and measurement are drawn as for training, one
            measurement for both phases.
        grid: of the model.
        generator: source of all that is drawn.

    Note:
        Structures without a line in the measured range are left out.
    """
    config, wavelength = PROFILES[augment.profile], store.simulation.wavelength
    partners = rows[torch.randperm(len(rows), generator=generator)]
    for first, second in zip(rows.split(_BATCH), partners.split(_BATCH), strict=True):
        profile = draw_profiles(len(first), config, generator)
        phases = [
            peaks_alone(store.gather(some), profile, augment, grid, wavelength, generator).double()
            for some in (first, second)
        ]
        seen = (phases[0].amax(dim=1) > 0.0) & (phases[1].amax(dim=1) > 0.0)
        if not bool(seen.any()):
            continue
        a, b = (phase[seen] / phase[seen].sum(dim=1, keepdim=True) for phase in phases)
        profile = ProfileParameters(*(column[seen] for column in profile))
        share = SHARES[0] + (SHARES[1] - SHARES[0]) * torch.rand(len(a), generator=generator)
        together = (1.0 - share[:, None]) * a + share[:, None] * b
        prepared = []
        for peaks in (a, together):
            angles, counts = count_scans(peaks, profile, grid, generator)
            some, _ = preprocess_whole_scans(
                angles,
                counts,
                [wavelength] * len(counts),
                grid=grid,
                model_wavelength=wavelength,
                smooth_width=augment.smooth_width,
            )
            prepared.append(some)
        yield OneAndTwo(*prepared, share)


def peaks_alone(
    families: FamilyBatch,
    profile: ProfileParameters,
    augment: AugmentConfig,
    grid: Grid,
    wavelength: float,
    generator: Generator,
) -> Tensor:
    """(n_patterns, n_points) what a measurement would count without background and noise, maximum 100."""
    n = len(families)
    strain = draw_strain(n, augment.strain, generator)
    return render_patterns(
        families.offset,
        families.hkl,
        families.multiplicity,
        families.f_squared,
        strained_reciprocal_metric(families.lattice, families.rotation_offset, families.rotations, strain),
        augment.b_max * torch.rand(n, generator=generator, dtype=torch.float64),
        families.rotation_offset,
        families.rotations,
        profile._replace(counts=torch.zeros_like(profile.counts)),
        torch.arange(n),
        seed=int(torch.randint(2**62, (), generator=generator)),
        wavelength=wavelength,
        grid=grid,
    ).intensity


def count_scans(
    peaks: Tensor, profile: ProfileParameters, grid: Grid, generator: Generator
) -> tuple[Sequence[NDArray[np.float64]], Sequence[NDArray[np.float32]]]:
    """Angles and counts of measurements: peaks and background, with noise, in the range that each measures.

    Args:
        peaks: (n_patterns, n_points) any scale, of `peaks_alone`, added up where there are several phases.
        profile: how each is measured.
        grid: of the peaks.
        generator: source of the noise.
    """
    two_theta = torch.from_numpy(grid.two_theta())
    x = torch.linspace(-1.0, 1.0, len(two_theta), dtype=torch.float64)
    p = ProfileParameters(*(column[:, None] for column in profile))
    level = p.background_0 + x * p.background_1 + (2.0 * x**2 - 1.0) * p.background_2
    level = level + (4.0 * x**3 - 3.0 * x) * p.background_3
    hump = p.hump_height * torch.exp2(-(((two_theta - p.hump_center) / (0.5 * p.hump_fwhm)) ** 2))
    rate = p.counts * (peaks / peaks.amax(dim=1, keepdim=True) + (level + hump).clamp(min=0.0))
    counts = torch.poisson(rate.float(), generator=generator)
    first, last = measured_ranges(profile, (grid.two_theta_min, grid.two_theta_step, grid.n_points))
    point = torch.arange(grid.n_points)
    inside = (point >= first[:, None]) & (point < last[:, None])
    angles = [two_theta[keep].numpy() for keep in inside]
    return angles, [row[keep].numpy() for keep, row in zip(inside, counts, strict=True)]
