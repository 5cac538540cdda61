"""Measured scans to the grid of intensities that a model reads, and the noise that significance is judged by.

Not for reflections or peak lists (`xrdfast.ops.render`), nor for finding peaks (`xrdfast.data.scans`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NOISE_BLOCK = 64  # points that share one estimate of the noise
_DEVIATIONS_A_MEDIAN = 1.0 / (0.6744897501960817 * math.sqrt(6.0))


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
    position = (
        torch.arange(n_points, dtype=intensity.dtype, device=intensity.device) + 0.5
    ) / NOISE_BLOCK - 0.5
    position = position.clamp(0.0, n_blocks - 1.0)
    block = position.long()
    return torch.lerp(level[block], level[(block + 1).clamp(max=n_blocks - 1)], position - block)
