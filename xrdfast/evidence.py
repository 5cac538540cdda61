"""What an answer rests on: each peak in turn is covered, and the answer asked for again.

Occlusion, so it holds for any model. Not for how sure an answer is (`xrdfast.posterior`, `xrdfast.suspicion`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xrdfast.bragg import Grid
from xrdfast.prediction import Pattern, Prediction, SymmetryPredictor

N_PEAKS = 32  # the strongest, of an answer
_REACH = 0.5  # degrees on either side of a peak, where no neighbour is nearer
_BATCH = 64


@dataclass(frozen=True)
class Evidence:
    """A peak, and what its absence does.

    Attributes:
        two_theta: degrees, on the model's axis.
        intensity: of the peak, the strongest = 100.
        drop: ln p(answer) with the peak less ln p(answer) without it; negative where the peak speaks against it.
    """

    two_theta: float
    intensity: float
    drop: float


def find_evidence(
    predictor: SymmetryPredictor, prediction: Prediction, n_peaks: int = N_PEAKS
) -> tuple[Evidence, ...]:
    """What the strongest peaks do for the best space group, the most telling first.

    Of a whole scan the points around a peak are made blank, half way to its neighbours and at most 0.5 degrees; of
    lines the line itself. One peak alone: what several say together is not seen where each repeats the other.

    Args:
        predictor: that gave the prediction.
        prediction: of a scan, lines or a structure.
        n_peaks: how many peaks to cover, > 0.

    Raises:
        ValueError: for no peak to cover.

    Source:
        Zeiler & Fergus, ECCV 2014 (arXiv:1311.2901), section 4.2: occlusion.
    """
    if n_peaks < 1:
        raise ValueError(f"find_evidence: n_peaks must be > 0, got {n_peaks}")
    pattern = prediction.pattern
    order = np.argsort(-pattern.intensity, kind="stable")[:n_peaks]
    covered = (
        _without_lines(predictor, pattern, order)
        if pattern.on_grid is None
        else _without_points(pattern, order, predictor.grid)
    )
    index = prediction.candidates[0].space_group_number - 1
    share = torch.cat([predictor.posterior(batch).space_group[:, index] for batch in covered.split(_BATCH)])
    log_share = share.double().clamp_min(1e-30).log()
    found = [
        Evidence(float(pattern.two_theta[i]), float(pattern.intensity[i]), drop)
        for i, drop in zip(order.tolist(), (log_share[0] - log_share[1:]).tolist(), strict=True)
    ]
    return tuple(sorted(found, key=lambda one: -one.drop))


def _without_lines(predictor: SymmetryPredictor, pattern: Pattern, order: np.ndarray) -> Tensor:
    """(1 + n, n_points) the lines, and the lines without each; one line alone is never left out."""
    patterns = [pattern]
    for i in order.tolist():
        keep = np.arange(len(pattern.two_theta)) != i
        if not (keep.any() and pattern.intensity[keep].max() > 0.0):
            keep[i] = True
        patterns.append(Pattern(pattern.two_theta[keep], pattern.intensity[keep]))
    return predictor.prepare_lines(patterns)


def _without_points(pattern: Pattern, order: np.ndarray, grid: Grid) -> Tensor:
    """(1 + n, n_points) the scan as the model saw it, and blank around each peak."""
    place = np.sort(pattern.two_theta)
    middle = 0.5 * (place[1:] + place[:-1])
    whole = torch.from_numpy(pattern.on_grid)
    covered = whole.repeat(1 + len(order), 1)
    axis = grid.two_theta()
    for row, i in enumerate(order.tolist(), 1):
        at = pattern.two_theta[i]
        rank = int(np.searchsorted(place, at))
        low = max(at - _REACH, middle[rank - 1] if rank else -np.inf)
        high = min(at + _REACH, middle[rank] if rank < len(middle) else np.inf)
        covered[row, (axis >= low) & (axis <= high)] = 0.0
        strongest = covered[row].max()
        if strongest > 0.0:
            covered[row] *= 100.0 / strongest
    return covered
