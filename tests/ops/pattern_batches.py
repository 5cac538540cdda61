"""Batches of families and measurements for the tests of `render_patterns`: every option on in some pattern."""

from __future__ import annotations

import math

import torch

from xrdfast.bragg import Grid
from xrdfast.ops.line_profile import ProfileParameters

# Rotations of 4/m and of m-3m in reduced form: turns about c; all signed permutations are made below.
TURN_4 = torch.tensor([[0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.int8)


def tetragonal_rotations() -> torch.Tensor:
    """The four turns about c and their inverses, (8, 3, 3) int8."""
    turns = [torch.eye(3, dtype=torch.int8)]
    for _ in range(3):
        turns.append((turns[-1].int() @ TURN_4.int()).to(torch.int8))
    return torch.stack([*turns, *(-turn for turn in turns)])


def cubic_rotations() -> torch.Tensor:
    """All signed permutation matrices, (48, 3, 3) int8."""
    eye = torch.eye(3, dtype=torch.int8)
    orders = [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2)]
    signs = torch.cartesian_prod(*[torch.tensor([1, -1], dtype=torch.int8)] * 3)
    return torch.cat([sign[:, None] * eye[list(order)] for order in orders for sign in signs]).view(48, 3, 3)


def plain_profiles(n: int, **fields: float) -> ProfileParameters:
    """A perfect instrument with a width, no noise and no background, n times; fields change it."""
    values = {
        "caglioti_u": 0.004,
        "caglioti_v": -0.003,
        "caglioti_w": 0.01,
        "crystallite_size": math.inf,
        "microstrain": 0.0,
        "eta": 0.5,
        "asymmetry": 0.0,
        "second_wavelength": 1.54439,
        "second_ratio": 0.0,
        "zero_shift": 0.0,
        "sample_displacement": 0.0,
        "goniometer_radius": 200.0,
        "march_r": 1.0,
        "march_h": 0.0,
        "march_k": 0.0,
        "march_l": 1.0,
        "polarisation": 1.0,
        "counts": 0.0,
        "background_0": 0.0,
        "background_1": 0.0,
        "background_2": 0.0,
        "background_3": 0.0,
        "hump_height": 0.0,
        "hump_center": 25.0,
        "hump_fwhm": 10.0,
        "two_theta_first": 0.0,
        "two_theta_last": 180.0,
        "impurity_count": 0.0,
        "impurity_strength": 0.0,
    }
    assert set(fields) <= set(values)
    return ProfileParameters(*(torch.full((n,), v, dtype=torch.float64) for v in (values | fields).values()))


def mixed_profiles(n: int, seed: int = 5, **fields: float) -> ProfileParameters:
    """Everything at once, other numbers for every pattern."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=rng, dtype=torch.float64)

    drawn = {
        "crystallite_size": uniform(150.0, 2000.0),
        "microstrain": uniform(0.0, 0.002),
        "eta": uniform(0.0, 1.0),
        "asymmetry": uniform(0.0, 0.1),
        "second_ratio": torch.where(uniform(0.0, 1.0) < 0.7, 0.5, 0.0),
        "zero_shift": uniform(-0.1, 0.1),
        "sample_displacement": uniform(-0.3, 0.3),
        "march_r": torch.where(uniform(0.0, 1.0) < 0.7, uniform(0.5, 1.6), 1.0),
        "march_h": torch.ones(n, dtype=torch.float64),
        "polarisation": uniform(0.0, 1.0),
        "counts": 10.0 ** uniform(1.5, 4.5),
        "background_0": uniform(0.0, 0.2),
        "background_1": uniform(-0.1, 0.1),
        "background_2": uniform(-0.02, 0.02),
        "background_3": uniform(-0.02, 0.02),
        "hump_height": uniform(0.0, 0.2),
        "two_theta_first": uniform(4.0, 12.0),
        "two_theta_last": uniform(70.0, 95.0),
        "impurity_count": uniform(0.0, 6.0),
        "impurity_strength": uniform(0.0, 0.1),
    }
    drawn["eta"][:1] = 0.0
    drawn["eta"][1:2] = 1.0
    return (
        plain_profiles(n)
        ._replace(**drawn)
        ._replace(**{name: torch.full((n,), value, dtype=torch.float64) for name, value in fields.items()})
    )


def pattern_batch(n_patterns: int, seed: int = 3, n_families: int = 160) -> tuple[torch.Tensor, ...]:
    """Families, metric, B and rotations: the first pattern has none, the second is cubic, every third has no group."""
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.randint(n_families // 2, n_families + 1, (n_patterns,), generator=rng)
    sizes[:1] = 0
    offset = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    n = int(offset[-1])
    table = torch.randint(-5, 6, (n, 4), generator=rng).to(torch.int16)
    table[:, 3] = 2 + table[:, 3].abs()
    f_squared = torch.rand(n, generator=rng) ** 6 * 1e4
    edge = torch.rand(n_patterns, 1, generator=rng, dtype=torch.float64) * 4.0 + 4.0
    metric = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64) / edge**2
    rotations, counts = [torch.zeros(0, 3, 3, dtype=torch.int8)], []
    for i in range(n_patterns):
        if i % 3 == 1:
            rotations.append(cubic_rotations())
        elif i % 3 == 2:
            rotations.append(tetragonal_rotations())
            metric[i, 2] *= 1.07
        else:
            metric[i, 4] += 0.003
        counts.append((0, 48, 8)[i % 3])
    rotation_offset = torch.nn.functional.pad(torch.tensor(counts, dtype=torch.int64).cumsum(0), (1, 0))
    b_overall = torch.rand(n_patterns, generator=rng, dtype=torch.float64) * 2.0
    families = (offset, table[:, :3], table[:, 3], f_squared, metric, b_overall)
    return *families, rotation_offset, torch.cat(rotations)


def operator_arguments(
    n_patterns: int,
    profile: ProfileParameters,
    grid: Grid | None = None,
    clip_sigma: float = 3.0,
    **batch: int,
) -> tuple:
    """What `render_patterns` hands to its operator."""
    grid = grid or Grid()
    settings = (7, clip_sigma, 1.54056, grid.two_theta_min, grid.two_theta_step, grid.n_points)
    return *pattern_batch(n_patterns, **batch), profile.table(), torch.arange(n_patterns) * 2**31, *settings
