"""What speaks against an answer: a pattern unlike the training's, or of more than one phase.

Both scores come from what an answer has computed anyway and cost some ten microseconds a pattern. They rank patterns
and are no probabilities; `python -m benchmarks.honesty` measures how well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from xrdfast.posterior import Calibration, JointPosterior

_TINY = 1e-30  # no share that counts, and a logarithm
_PATCH = 10  # points, as the encoder's
# Of simulated laboratory scans 99 % have crests below the first, of amorphous halos 99 % above the second.
_CREST_CRYSTAL, _CREST_HALO = 0.21, 0.24
# Constant, and weights of entropy, ln active share and ln crest: logistic regression on 2,000 simulated laboratory
# scans of one phase against as many mixtures of two, folds 1 and 2 of inorganic_mp and amcsd, with `small` after 10
# epochs and no calibration (`benchmarks.honesty --fit`). On fold 0, seen by neither, the AUROC is 0.82.
SEVERAL_WEIGHTS = (-3.321, 0.574, 1.271, -1.253)


def doubts(
    logits: Mapping[str, Tensor],
    posterior: JointPosterior,
    calibration: Calibration | None,
    intensity: Tensor,  # (n_patterns, n_points)
    is_whole: Tensor,  # (n_patterns,) bool
) -> tuple[list[float | None], list[float | None]]:
    """How unlike the training's patterns are, and the suspicion of several phases, 0..1 each; None where not known.

    Unlike: 1 - (1 - disagreement of the heads) (1 - halo), where a model of one head has no first part and lines, of
    which no halo is known, no second.

    Args:
        logits, posterior, calibration: as of `joint_posterior`.
        intensity: as the model saw them, the highest point 100.
        is_whole: whether a pattern is a whole scan, not lines.
    """
    unlike = disagreement(logits, posterior, calibration)
    known = is_whole if unlike is None else torch.ones_like(is_whole)
    heads = torch.zeros(len(is_whole)) if unlike is None else unlike
    high = crest(intensity)
    total = 1.0 - (1.0 - heads) * (1.0 - _halo(high) * is_whole)
    return _where(known, total), _where(is_whole, _several(_features(posterior, intensity, high)))


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


def halo(intensity: Tensor) -> Tensor:
    """Likeness of whole scans to an amorphous halo, (n_patterns,) in 0..1: a logistic function of ln `crest`.

    Near 0 for the sharp peaks of crystals, near 1 for what is left of a halo or of noise, and 1 for nothing.
    """
    return _halo(crest(intensity))


def _halo(high: Tensor) -> Tensor:
    """Of crests."""
    low, top = math.log(_CREST_CRYSTAL), math.log(_CREST_HALO)
    steep = 2.0 * math.log(19.0) / (top - low)  # 5 % and 95 % at the two
    score = torch.sigmoid(steep * (high.clamp_min(1e-6).log() - 0.5 * (low + top)))
    return torch.where(high > 0.0, score, 1.0)


def several_phases(posterior: JointPosterior, intensity: Tensor) -> Tensor:
    """Suspicion of more than one phase in whole scans, (n_patterns,) in 0..1.

    A mixture leaves a model unsure, fills more of the axis than one phase does, and most of what it adds is weak: a
    logistic function of the posterior's entropy, the active share and the crest. Half of the patterns that its weights
    were fitted on were mixtures, so 0.5 is far from an even chance where few are.

    Args:
        posterior: of the patterns.
        intensity: (n_patterns, n_points) as the model saw them.
    """
    return _several(phase_features(posterior, intensity))


def _several(features: Tensor) -> Tensor:
    return torch.sigmoid(features @ torch.tensor(SEVERAL_WEIGHTS)).float()


def phase_features(posterior: JointPosterior, intensity: Tensor) -> Tensor:
    """(n_patterns, 4): 1, the entropy of the space groups in nats, ln of the active share, ln of the crest."""
    return _features(posterior, intensity, crest(intensity))


def _features(posterior: JointPosterior, intensity: Tensor, high: Tensor) -> Tensor:
    share = posterior.space_group.float()
    entropy = -(share * share.clamp_min(_TINY).log()).sum(dim=1)
    active = active_share(intensity).clamp_min(1e-6)
    return torch.stack([torch.ones_like(entropy), entropy, active.log(), high.clamp_min(1e-6).log()], dim=1)


def crest(intensity: Tensor) -> Tensor:
    """Mean of the points that are not blank over the highest, (n_patterns,) in 0..1; 0 for a blank pattern.

    Peaks are high and narrow and their feet low, so of crystals it is small. What the background's windows leave of an
    amorphous halo is flat, and so is noise alone, whose highest point is not far above the clip.
    """
    total, count = intensity.sum(dim=1), torch.count_nonzero(intensity, dim=1)
    return total / (count * intensity.amax(dim=1)).clamp_min(1e-30)


def active_share(intensity: Tensor) -> Tensor:
    """Share of whole patches of ten points that are not blank, (n_patterns,)."""
    whole = intensity.shape[1] // _PATCH * _PATCH
    return (intensity[:, :whole].unflatten(1, (-1, _PATCH)).amax(dim=2) > 0.0).float().mean(dim=1)
