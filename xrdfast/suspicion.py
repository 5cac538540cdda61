"""What speaks against an answer: a pattern unlike the training's, or of more than one phase.

Both scores come from what an answer has computed anyway and cost some ten microseconds a pattern. They rank patterns
and are no probabilities; `python -m benchmarks.honesty` measures how well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xrdfast.posterior import Calibration, JointPosterior

_TINY = 1e-30  # no share that counts, and a logarithm
_PATCH = 10  # points, as the encoder's
# Of simulated laboratory scans 99 % have crests below the first, of amorphous halos 99 % above the second.
_CREST_CRYSTAL, _CREST_HALO = 0.21, 0.24
N_OWN_FEATURES = 4  # of `phase_features`, before those of the encoder
_RIDGE = 100.0  # patterns' worth of doubt in every weight of a standardised feature; 10 to 1,000 do as well
_NEWTON_STEPS = 8


class PatternShape(NamedTuple):
    """What tells peaks from what is none.

    Attributes:
        crest: (n_patterns,) in 0..1, mean of the points that are not blank over the highest; 0 for a blank pattern.
            Peaks are high and narrow and their feet low, so of crystals it is small. What the background's windows
            leave of an amorphous halo is flat, and so is noise alone, whose highest point is not far above the clip.
        active_share: (n_patterns,) in 0..1, of whole patches of ten points those that are not blank.
    """

    crest: Tensor
    active_share: Tensor


def doubts(
    logits: Mapping[str, Tensor],
    features: Tensor,  # (n_patterns, n_features)
    posterior: JointPosterior,
    calibration: Calibration | None,
    intensity: Tensor,  # (n_patterns, n_points)
    is_whole: Tensor,  # (n_patterns,) bool
) -> tuple[list[float | None], list[float | None]]:
    """How unlike the training's patterns are, and the suspicion of several phases, 0..1 each; None where not known.

    Unlike: 1 - (1 - disagreement of the heads) (1 - halo), where a model of one head has no first part and lines, of
    which no halo is known, no second. Several phases: a logistic function of `phase_features`, of whole scans, for
    models whose calibration holds its weights.

    Args:
        logits, posterior, calibration: as of `joint_posterior`.
        features: of the encoder.
        intensity: as the model saw them, the highest point 100.
        is_whole: whether a pattern is a whole scan, not lines.
    """
    unlike = disagreement(logits, posterior, calibration)
    known = is_whole if unlike is None else torch.ones_like(is_whole)
    heads = torch.zeros(len(is_whole)) if unlike is None else unlike
    shape = pattern_shape(intensity)
    total = 1.0 - (1.0 - heads) * (1.0 - halo(shape.crest) * is_whole)
    several = torch.zeros(len(is_whole))
    if fitted := calibration is not None and calibration.several_phases is not None:
        weights = torch.tensor(calibration.several_phases)
        several = torch.sigmoid(phase_features(features, posterior, shape) @ weights)
    return _where(known, total), _where(is_whole & fitted, several)


def _where(known: Tensor, score: Tensor) -> list[float | None]:
    return [
        value if is_known else None for value, is_known in zip(score.tolist(), known.tolist(), strict=True)
    ]


def disagreement(
    logits: Mapping[str, Tensor], posterior: JointPosterior, calibration: Calibration | None
) -> Tensor | None:
    """How far the model's heads contradict each other, (n_patterns,) in 0..1.

    The heads are trained on one answer, so on familiar patterns they agree. Of every head, the Jensen-Shannon
    divergence in bits between its distribution and that of the joint posterior over the same classes; the mean over
    heads. None for a model of one head.

    Source:
        Lin, IEEE Trans. Inf. Theory 37 (1991) 145.
    """
    if len(logits) < 2:
        return None
    total = torch.zeros(len(posterior.space_group))
    for task, rows in logits.items():
        temperature = calibration.temperatures[task] if calibration else 1.0
        own = (rows / temperature).softmax(dim=1)
        joint = posterior.marginal(task)
        mean = (0.5 * (own + joint)).clamp_min(_TINY)
        for part in (own, joint):  # xlogy would take its logarithms one by one
            total += 0.5 * (part * (part.clamp_min(_TINY) / mean).log()).sum(dim=1)
    return (total / (len(logits) * math.log(2.0))).clamp(0.0, 1.0)


def halo(high: Tensor) -> Tensor:
    """Likeness of whole scans to an amorphous halo, (n_patterns,) in 0..1: a logistic function of ln crest.

    Near 0 for the sharp peaks of crystals, near 1 for what is left of a halo or of noise, and 1 for nothing.
    """
    low, top = math.log(_CREST_CRYSTAL), math.log(_CREST_HALO)
    steep = 2.0 * math.log(19.0) / (top - low)  # 5 % and 95 % at the two
    score = torch.sigmoid(steep * (high.clamp_min(1e-6).log() - 0.5 * (low + top)))
    return torch.where(high > 0.0, score, 1.0)


def phase_features(features: Tensor, posterior: JointPosterior, shape: PatternShape) -> Tensor:
    """What speaks for more than one phase, (n_patterns, N_OWN_FEATURES + n_features).

    A mixture leaves a model unsure, fills more of the axis than one phase does, and most of what it adds is weak: 1,
    the entropy of the space groups in nats, ln of the active share, ln of the crest. Then the encoder's features, which
    see more than that.
    """
    share = posterior.space_group.float()
    entropy = -(share * share.clamp_min(_TINY).log()).sum(dim=1)
    active, high = shape.active_share.clamp_min(1e-6), shape.crest.clamp_min(1e-6)
    own = torch.stack([torch.ones_like(entropy), entropy, active.log(), high.log()], dim=1)
    return torch.cat([own, features], dim=1)


def fit_several_phases(one: Tensor, two: Tensor) -> tuple[float, ...]:
    """Weights of `phase_features` that tell scans of two phases from those of one, by logistic regression.

    Half of the patterns are mixtures, so 0.5 of the score is far from an even chance where few are.

    Args:
        one, two: (n, N_OWN_FEATURES + n_features) of scans of one phase and of two, equally many.

    Note:
        Newton's method with a ridge on the weights of standardised features. Deterministic.
    """
    x = torch.cat([one, two]).double()[:, 1:]
    y = torch.cat([torch.zeros(len(one)), torch.ones(len(two))]).double()
    mean, deviation = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    x = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), (x - mean) / deviation], dim=1)
    ridge = torch.full((x.shape[1],), _RIDGE, dtype=x.dtype)
    ridge[0] = 1e-6
    weights = torch.zeros_like(ridge)
    for _ in range(_NEWTON_STEPS):
        p = torch.sigmoid(x @ weights)
        curvature = (x * (p * (1.0 - p))[:, None]).T @ x + ridge.diag()
        weights = weights - torch.linalg.solve(curvature, x.T @ (p - y) + ridge * weights)
    slopes = weights[1:] / deviation
    fitted = torch.cat([weights[:1] - slopes @ mean, slopes])
    return tuple(float(f"{weight:.6g}") for weight in fitted.tolist())


def check_phase_weights(calibration: Calibration | None, n_features: int) -> None:
    """Sees that a calibration is of a model with that many features.

    Raises:
        ValueError: for another number of weights.
    """
    weights = calibration.several_phases if calibration is not None else None
    if weights is not None and len(weights) != N_OWN_FEATURES + n_features:
        wanted = N_OWN_FEATURES + n_features
        raise ValueError(f"Calibration: several_phases must be {wanted} weights, got {len(weights)}")


def pattern_shape(intensity: Tensor) -> PatternShape:
    """Of patterns (n_patterns, n_points) without negative points."""
    highest = F.max_pool1d(intensity[:, None], _PATCH, _PATCH)[:, 0]  # of whole patches
    count = intensity.sign().sum(dim=1)  # twice as fast as to count, and exact
    top = (count * intensity.amax(dim=1)).clamp_min(1e-30)
    return PatternShape(intensity.sum(dim=1) / top, highest.sign().mean(dim=1))
