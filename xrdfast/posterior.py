"""One answer from up to four heads: a joint posterior over the 230 space groups, its calibration, sets of answers.

Crystal system, centring, point group and extinction group are functions of the space group, so predictions of
all levels are sums over one distribution and never contradict each other. Not for metrics
(`xrdfast.evaluation`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xrdfast.symmetry import N_CLASSES, N_SPACE_GROUPS, TASKS, class_index

# Bounds of every fitted number, so that a handful of separable patterns cannot drive one to infinity.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
MAX_EXPONENT = 20.0
_LARGEST_WEIGHT = 1e6
COVERAGE = 0.95  # of the sets of space groups
POOL_LEVELS = ("space_group", "crystal_system")  # of an answer that is pooled, each with its exponent
_SPREAD = 0.01  # of an answer that is pooled with others, evenly over the groups
_FIT_ROWS = 256  # patterns that the fit takes at once: 4 x 256 x 230 doubles are 1.9 MB, within a cache


@dataclass(frozen=True)
class Calibration:
    """What is fitted on validation patterns.

    Attributes:
        temperatures: for each task, T of softmax(logits / T), 0.05..20.
        exponents: for each task, its power in the product of experts, 0..20. They need not sum to one: their
            overall scale is the sharpness of the joint posterior.
        threshold: 0..1, from which probability a space group belongs to the set that holds the true one in 95 % of
            patterns (`conformal_threshold`); None in calibrations older than that.
        several_phases: weights of `xrdfast.suspicion.phase_features` in the suspicion of several phases, for models of
            whole scans; None where none were fitted.

    Raises:
        ValueError: for unknown or differing tasks, or numbers outside these ranges.

    Example:
        >>> Calibration({"space_group": 1.5}, {"space_group": 1.2}).to_dict()
        {'temperatures': {'space_group': 1.5}, 'exponents': {'space_group': 1.2}}
    """

    temperatures: Mapping[str, float]
    exponents: Mapping[str, float]
    threshold: float | None = None
    several_phases: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        tasks = set(self.temperatures)
        if tasks != set(self.exponents) or not tasks or tasks - set(TASKS):
            raise ValueError(
                f"Calibration: temperatures, exponents must name the same tasks of {', '.join(TASKS)}, "
                f"got {list(self.temperatures)}, {list(self.exponents)}"
            )
        _check_numbers("temperatures", self.temperatures, MIN_TEMPERATURE, MAX_TEMPERATURE)
        _check_numbers("exponents", self.exponents, 0.0, MAX_EXPONENT)
        if self.threshold is not None:
            _check_numbers("conformal", {"threshold": self.threshold}, 0.0, 1.0)
        if self.several_phases is not None:
            weights = dict(enumerate(self.several_phases))
            _check_numbers("several_phases", weights, -_LARGEST_WEIGHT, _LARGEST_WEIGHT)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict that `from_dict` takes and JSON carries."""
        content = {"temperatures": dict(self.temperatures), "exponents": dict(self.exponents)}
        if self.threshold is not None:
            content["conformal"] = {"coverage": COVERAGE, "threshold": self.threshold}
        if self.several_phases is not None:
            content["several_phases"] = list(self.several_phases)
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Calibration:
        """Reads what `to_dict` gave.

        Raises:
            ValueError: for another layout, unknown tasks or numbers out of range.
        """
        fields = ("temperatures", "exponents")
        more = {"conformal", "several_phases"}
        if not isinstance(content, Mapping) or set(content) - more != set(fields):
            got = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(
                f"Calibration: content must hold exactly {', '.join(fields)}, and perhaps {', '.join(sorted(more))}, "
                f"got {got}"
            )
        for name in fields:
            if not isinstance(content[name], Mapping):
                raise ValueError(f"Calibration: {name} must map tasks to numbers, got {content[name]!r}")
        several = content.get("several_phases")
        if several is not None and not isinstance(several, list):
            raise ValueError(f"Calibration: several_phases must be a list of numbers, got {several!r}")
        several = None if several is None else tuple(several)
        if "conformal" not in content:  # of a run before there were sets
            return cls(content["temperatures"], content["exponents"], None, several)
        conformal = content["conformal"]
        wanted = {"coverage", "threshold"}
        if (
            not isinstance(conformal, Mapping)
            or set(conformal) != wanted
            or conformal["coverage"] != COVERAGE
        ):
            raise ValueError(
                f"Calibration: conformal must hold coverage {COVERAGE} and a threshold, got {conformal!r}"
            )
        _check_numbers("conformal", {"threshold": conformal["threshold"]}, 0.0, 1.0)
        return cls(content["temperatures"], content["exponents"], conformal["threshold"], several)


@dataclass(frozen=True)
class JointPosterior:
    """Probabilities of the 230 space groups, and of every level of symmetry by summing over its members.

    Attributes:
        space_group: (n_patterns, 230), rows sum to 1; float64 where the logits were, else float32.
    """

    space_group: Tensor

    def marginal(self, level: str) -> Tensor:
        """Probabilities of the classes of a level of `xrdfast.symmetry.class_index`, (n_patterns, n_classes).

        Raises:
            ValueError: for an unknown level.
        """
        classes = _classes(level, self.space_group.device)
        empty = self.space_group.new_zeros(len(self.space_group), int(class_index(level).max()) + 1)
        return empty.index_add(1, classes, self.space_group)

    def conformal_sets(self, threshold: float | Tensor) -> Tensor:
        """Space groups of at least a threshold's probability, and always the most probable one.

        Args:
            threshold: of a calibration; or (n_patterns, 1), one each.

        Returns:
            (n_patterns, 230) bool, by space group index.
        """
        best = self.space_group.argmax(dim=1, keepdim=True)
        return (self.space_group >= threshold).scatter(1, best, True)


def joint_posterior(
    logits: Mapping[str, Tensor | None], calibration: Calibration | None = None
) -> JointPosterior:
    """Product of experts: log p(g) = sum_t exponent_t log softmax(logits_t / T_t)[class_t(g)] + constant.

    Args:
        logits: for each task, (n_patterns, n_classes); a task that is None or left out is no expert
            (`SymmetryLogits._asdict()` fits).
        calibration: None is T = 1 and exponent 1 for every task: the plain product.

    Returns:
        The posterior on the logits' device. A pattern with NaN logits has a NaN row.

    Raises:
        ValueError: for unknown tasks, no task at all, other shapes, or a calibration that lacks a task.

    Source:
        Hinton, Neural Computation 14 (2002) 1771, eq. 1, with a power for each expert.

    Example:
        >>> joint_posterior({"crystal_system": torch.zeros(1, 7)}).marginal("crystal_system").argmax(1)
        tensor([3])
    """
    experts = checked_logits("joint_posterior", logits)
    missing = [task for task in experts if calibration is not None and task not in calibration.temperatures]
    if missing:
        raise ValueError(
            f"joint_posterior: calibration must cover every task of the logits, got no {missing[0]}"
        )
    first = next(iter(experts.values()))
    total = first.new_zeros(len(first), N_SPACE_GROUPS)
    for task, rows in experts.items():
        temperature, exponent = (
            (1.0, 1.0)
            if calibration is None
            else (calibration.temperatures[task], calibration.exponents[task])
        )
        total = total + exponent * _expert(task, rows, temperature)
    return JointPosterior(total.softmax(dim=1))


def fit_calibration(logits: Mapping[str, Tensor | None], space_group_number: Tensor) -> Calibration:
    """Temperatures and exponents that minimise the negative log-likelihood (NLL) of held-out patterns.

    First each task alone in 1/T, then all exponents together in the joint posterior. Both are log-linear
    models, so both problems are convex; a prior worth one pattern pulls every number towards 1
    (1/(2n) (x - 1)^2), which keeps tiny sets sane and vanishes in large ones.

    Args:
        logits: as in `joint_posterior`, finite, of patterns the model was not trained on.
        space_group_number: (n_patterns,) integers, 1..230.

    Returns:
        The calibration. Deterministic.

    Raises:
        ValueError: as `joint_posterior`; for logits that are not finite, no pattern, numbers outside 1..230.

    Source:
        Guo et al., ICML 2017 (arXiv:1706.04599), section 4.2, for the temperatures.
    """
    experts = checked_logits("fit_calibration", logits, finite=True)
    number = checked_numbers("fit_calibration", space_group_number, len(next(iter(experts.values()))))
    index = number - 1
    experts = {task: rows.cpu().double() for task, rows in experts.items()}
    temperatures = {}
    for task, rows in experts.items():
        target = _classes(task, rows.device)[index]
        inverse = _fit_log_linear(rows[None], target, 1.0 / MAX_TEMPERATURE, 1.0 / MIN_TEMPERATURE)
        temperatures[task] = min(max(1.0 / float(inverse[0]), MIN_TEMPERATURE), MAX_TEMPERATURE)
    scores = torch.stack([_expert(task, rows, temperatures[task]) for task, rows in experts.items()])
    exponents = _fit_log_linear(scores, index, 0.0, MAX_EXPONENT)
    fitted = dict(zip(experts, exponents.tolist(), strict=True))
    posterior = joint_posterior(experts, Calibration(temperatures, fitted))
    return Calibration(temperatures, fitted, conformal_threshold(posterior.space_group, number))


def conformal_threshold(probability: Tensor, space_group_number: Tensor, coverage: float = COVERAGE) -> float:
    """Probability from which a space group belongs to the set of a pattern, by split conformal prediction.

    The threshold is the k-th smallest probability that a held-out pattern gave its true group, with
    k = floor((n + 1) (1 - coverage)): the set of a new pattern, drawn as the n were, then holds the true group with
    probability coverage or more, whatever the model (0 where n is too small to promise it: all groups). Coverage is
    over all patterns, not in each group. Sets of largest probabilities (LAC) are on average the smallest of that
    coverage: on 2,912 stick patterns of held-out families, halves calibrated on each other, 12 groups with a small
    model, where adaptive sets (APS) need 24 with lots drawn and 56 without.

    Args:
        probability: (n_patterns, 230), of patterns that the model was not trained on.
        space_group_number: (n_patterns,) integers, 1..230.
        coverage: between 0 and 1.

    Raises:
        ValueError: for other shapes, no pattern, or numbers outside these ranges.

    Note:
        `fit_calibration` takes the patterns that it fitted temperatures and exponents on: at most eight numbers
        beside n patterns. `xrdfast.evaluation` measures the coverage on patterns it has not seen.

    Source:
        Sadinle, Lei & Wasserman, J. Am. Stat. Assoc. 114, 223 (2019), section 2; the finite-sample k: Vovk,
        Gammerman & Shafer, Algorithmic Learning in a Random World (2005).

    Example:
        >>> share = torch.full((100, 230), 0.001)
        >>> share[:, 0] = torch.linspace(0.01, 1.0, 100)
        >>> round(conformal_threshold(share, torch.ones(100, dtype=torch.int64)), 2)  # the 5th smallest
        0.05
    """
    number = checked_numbers("conformal_threshold", space_group_number, len(probability))
    if not 0.0 < coverage < 1.0:
        raise ValueError(f"conformal_threshold: coverage must be between 0 and 1, got {coverage}")
    own = probability.cpu().double()[torch.arange(len(number)), number - 1]
    k = math.floor(
        (len(number) + 1) * (1.0 - coverage) + 1e-9
    )  # 100 * (1 - 0.95) is 5 and a rounding error less
    return float(own.sort().values[k - 1].clamp(0.0, 1.0)) if k else 0.0


def pool_posteriors(posteriors: Sequence[Tensor], exponents: Sequence[Sequence[float]]) -> JointPosterior:
    """Log-linear pool of several answers, of each its space groups and its crystal systems.

        log p(g) = sum_k sum_level exponent_k,level log q_k(level of g) + constant,   q_k = 0.99 p_k + 0.01 / 230

    The hundredth that is spread evenly keeps an answer from ruling a group out by itself. The exponent of a crystal
    system is what an answer is trusted in it beyond (or, if negative, short of) what its space groups are.

    Args:
        posteriors: each (n_patterns, 230), rows that sum to 1.
        exponents: of each, its two: of `POOL_LEVELS`, the first >= 0 (`fit_pool`).

    Returns:
        The pooled posterior.

    Raises:
        ValueError: for no answer, other shapes, another number of exponents or a first one that is negative.

    Source:
        Genest & Zidek, Stat. Sci. 1, 114 (1986), section 3.

    Example:
        >>> one, other = torch.full((1, 230), 0.001), torch.full((1, 230), 1 / 230)
        >>> one[0, 61] = 0.771
        >>> round(float(pool_posteriors([one, other], [(1.0, 0.0), (1.0, 0.0)]).space_group[0, 61]), 2)
        0.76
    """
    scores = _pooled_scores("pool_posteriors", posteriors)
    pairs = [tuple(pair) for pair in exponents]
    fits = [len(pair) == len(POOL_LEVELS) and pair[0] >= 0.0 for pair in pairs]
    if len(pairs) != len(posteriors) or not all(fits):
        rule = f"{len(posteriors)} times {len(POOL_LEVELS)} numbers, the first >= 0"
        raise ValueError(f"pool_posteriors: exponents must be {rule}, got {pairs}")
    weights = torch.tensor(pairs, dtype=scores.dtype).flatten()
    return JointPosterior(torch.einsum("k,kng->ng", weights, scores).softmax(dim=1))


def fit_pool(posteriors: Sequence[Tensor], space_group_number: Tensor) -> tuple[tuple[float, ...], ...]:
    """Exponents of `pool_posteriors` that minimise the negative log-likelihood of held-out patterns.

    Convex; a prior worth one pattern pulls the exponents of space groups towards 1 and the others towards 0.

    Args:
        posteriors: each (n_patterns, 230), of patterns that nothing in them was fitted on.
        space_group_number: (n_patterns,) integers, 1..230.

    Returns:
        Of each answer its exponents, -20..20, that of space groups 0..20.

    Raises:
        ValueError: for other shapes, no pattern, or numbers outside 1..230.
    """
    scores = _pooled_scores("fit_pool", posteriors)
    number = checked_numbers("fit_pool", space_group_number, scores.shape[1])
    is_group = torch.tensor([level == "space_group" for level in POOL_LEVELS] * len(posteriors))
    lower = torch.where(is_group, 0.0, -MAX_EXPONENT)
    fitted = _fit_log_linear(scores, number - 1, lower, MAX_EXPONENT, expected=is_group.double())
    return tuple(map(tuple, fitted.view(len(posteriors), -1).tolist()))


def _pooled_scores(op: str, posteriors: Sequence[Tensor]) -> Tensor:
    """(n_answers * n_levels, n_patterns, 230) float64 on the CPU: what the exponents multiply."""
    shapes = [tuple(rows.shape) for rows in posteriors]
    if not shapes or len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][1] != N_SPACE_GROUPS:
        raise ValueError(
            f"{op}: posteriors must be at least one, each (n_patterns, {N_SPACE_GROUPS}), got {shapes}"
        )
    floor = _SPREAD / N_SPACE_GROUPS
    spread = [JointPosterior((1.0 - _SPREAD) * rows.cpu().double() + floor) for rows in posteriors]
    levels = [answer.marginal(level)[:, _classes(level, "cpu")] for answer in spread for level in POOL_LEVELS]
    return torch.stack(levels).log()


def checked_logits(
    op: str, logits: Mapping[str, Tensor | None], *, finite: bool = False
) -> dict[str, Tensor]:
    """The tasks that are present, in the order of `TASKS`, as float32 or float64.

    Raises:
        ValueError: for unknown tasks, none at all, other shapes, unequal lengths, or, where `finite` is
            asked, logits that are not.
    """
    unknown = [task for task in logits if task not in TASKS]
    if unknown:
        raise ValueError(f"{op}: logits must be of the tasks {', '.join(TASKS)}, got {unknown[0]!r}")
    present = {task: logits[task] for task in TASKS if logits.get(task) is not None}
    if not present:
        raise ValueError(f"{op}: logits must hold at least one task, got none")
    n_patterns = len(next(iter(present.values())))
    for task, rows in present.items():
        if rows.shape != (n_patterns, N_CLASSES[task]) or not rows.is_floating_point():
            raise ValueError(
                f"{op}: logits[{task!r}] must be floating point ({n_patterns}, {N_CLASSES[task]}), "
                f"got {rows.dtype} {tuple(rows.shape)}"
            )
        if finite and not bool(torch.isfinite(rows).all()):
            bad = int((~torch.isfinite(rows)).any(dim=1).sum())
            raise ValueError(f"{op}: logits[{task!r}] must be finite, got {bad} patterns that are not")
    return {task: rows if rows.dtype == torch.float64 else rows.float() for task, rows in present.items()}


def checked_numbers(op: str, space_group_number: Tensor, n_patterns: int | None = None) -> Tensor:
    """Space group numbers as (n_patterns,) int64 on the CPU.

    Raises:
        ValueError: for another shape, no pattern, or anything but integers in 1..230.
    """
    number = space_group_number
    if number.ndim != 1 or (n_patterns is not None and len(number) != n_patterns):
        rule = f"({n_patterns},)" if n_patterns is not None else "(n_patterns,)"
        raise ValueError(f"{op}: space_group_number must be {rule}, got {tuple(number.shape)}")
    if number.is_floating_point() or number.is_complex() or number.dtype == torch.bool:
        raise ValueError(f"{op}: space_group_number must be integers, got {number.dtype}")
    if len(number) == 0:
        raise ValueError(f"{op}: space_group_number must hold at least one pattern, got none")
    number = number.cpu().long()
    low, high = int(number.min()), int(number.max())
    if low < 1 or high > N_SPACE_GROUPS:
        raise ValueError(f"{op}: space_group_number must be in 1..230, got {low if low < 1 else high}")
    return number


def _classes(level: str, device: torch.device | str) -> Tensor:
    return torch.tensor(class_index(level), device=device)


def _expert(task: str, logits: Tensor, temperature: float) -> Tensor:
    """Log-probability that one task gives to the class of each space group, (n_patterns, 230)."""
    return (logits / temperature).log_softmax(dim=1)[:, _classes(task, logits.device)]


def _fit_log_linear(
    scores: Tensor, target: Tensor, lower: float | Tensor, upper: float, expected: float | Tensor = 1.0
) -> Tensor:
    """Weights x in [lower, upper] that minimise mean NLL of softmax(sum_k x_k scores_k) + |x - expected|^2 / 2n.

    Projected Newton: coordinates that the gradient presses against a bound rest, the others take a damped
    Newton step (Bertsekas, SIAM J. Control Optim. 20 (1982) 221). The prior keeps the Hessian positive
    definite.

    Args:
        scores: (n_weights, n_patterns, n_classes) float64.
        target: (n_patterns,) true classes.
        lower: smallest weight, one or (n_weights,).
        upper: largest weight.
        expected: of the weights, one or (n_weights,).

    Returns:
        (n_weights,).
    """
    n_weights, n_patterns, n_classes = scores.shape
    true = scores.gather(2, target[None, :, None].expand(n_weights, -1, 1))
    scores = (scores - true).contiguous()  # now the true class scores 0 and the NLL is a logsumexp

    def combined(weights: Tensor) -> Tensor:
        return (weights @ scores.flatten(1)).view(n_patterns, n_classes)

    def objective(weights: Tensor, total: Tensor) -> Tensor:
        return total.logsumexp(1).mean() + (weights - centre).square().sum() / (2 * n_patterns)

    lowest, highest, centre = (
        torch.as_tensor(bound, dtype=torch.float64).expand(n_weights) for bound in (lower, upper, expected)
    )
    weights = centre.clone()
    total = combined(weights)
    for _ in range(100):
        gradient = weights - centre
        hessian = torch.eye(n_weights, dtype=torch.float64)
        for part, logits in zip(scores.split(_FIT_ROWS, dim=1), total.split(_FIT_ROWS), strict=True):
            probability = logits.softmax(dim=1)
            mean = (part * probability).sum(dim=2, keepdim=True)
            spread = ((part - mean) * probability.sqrt()).flatten(1)
            gradient = gradient + mean.sum(dim=(1, 2))
            hessian = hessian + spread @ spread.T
        gradient, hessian = gradient / n_patterns, hessian / n_patterns
        resting = (weights <= lowest) & (gradient > 0) | (weights >= highest) & (gradient < 0)
        free = (~resting).nonzero().flatten()
        if not len(free) or float(gradient[free].abs().max()) < 1e-9:
            break
        direction = torch.zeros_like(weights)
        direction[free] = -torch.linalg.solve(hessian[free][:, free], gradient[free])
        value, step = objective(weights, total), 1.0
        while step > 1e-10:
            moved = (weights + step * direction).clamp(lowest, highest)
            moved_total = combined(moved)
            if objective(moved, moved_total) <= value + 1e-4 * gradient @ (moved - weights):
                break
            step /= 2
        else:
            break  # rounding leaves nothing to gain
        weights, total = moved, moved_total
    return weights


def _check_numbers(name: str, numbers: Mapping[str, Any], lower: float, upper: float) -> None:
    for task, number in numbers.items():
        plain = isinstance(number, int | float) and not isinstance(number, bool)
        if not (plain and math.isfinite(number) and lower <= number <= upper):
            raise ValueError(f"Calibration: {name}[{task!r}] must be in {lower:g}..{upper:g}, got {number!r}")
