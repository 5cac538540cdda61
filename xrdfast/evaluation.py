"""How good the answers are: accuracy, F1, recall, calibration error and confusion of all levels of symmetry.

For held-out patterns with known space groups. Not for what training watches at every validation
(`xrdfast.training.trainer`) and not for plots (`xrdfast.report`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xrdfast.posterior import (
    COVERAGE,
    Calibration,
    JointPosterior,
    checked_logits,
    checked_numbers,
    fit_calibration,
    joint_posterior,
)
from xrdfast.symmetry import CRYSTAL_SYSTEMS, N_SPACE_GROUPS, TASKS, class_index, class_names

N_BINS = 15  # of the calibration error; Guo et al., ICML 2017 (arXiv:1706.04599), section 5
_TOP = (1, 2, 5)
_SUPERCLASSES = TASKS[1:]
_LEVELS = (*TASKS, "extinction_group")


def evaluate_predictions(
    logits: Mapping[str, Tensor | None],
    space_group_number: Tensor,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """All metrics of some held-out patterns, as plain dicts and numbers for JSON.

    For the single heads, and again under "joint" for the joint posterior:

    * "tasks": for each level its "top1", "top2", "top5" (shares of patterns whose class is among the k most
      probable; ties go to the lower class index), "macro_f1" (mean of 2 TP / (2 TP + FP + FN) over the
      classes that occur in the truth or among the answers), "recall" (by class name, of those in the truth),
      "ece_before" and "ece_after", the expected calibration errors before and after calibration
      (`expected_calibration_error`), and "reliability", the bins after it (`reliability_bins`). Levels are the
      tasks that have a head and "extinction_group"; the joint posterior has all.
    * "crystal_systems": for each true crystal system its "n_patterns" and the space groups' "top1".
    * "conformal" (the joint posterior alone): of the calibration's sets of space groups, the "coverage" that they
      promise, the share "covered" that holds the truth, "mean_size" and "median_size"; None where nothing was fitted.
    * "spc", sub-property confusion: among the patterns with a wrong space group, the share whose
      "crystal_system", "lattice_centering", "point_group" is still that of the truth; None where no answer is
      wrong.

    The extinction group of an answer is the one of largest summed probability. Without a space group head the
    heads have no "crystal_systems", no "spc" and no extinction group.

    Args:
        logits: for each task, (n_patterns, n_classes), finite; a task may be None or left out.
        space_group_number: (n_patterns,) integers, 1..230.
        calibration: fitted on other patterns. Where None, the patterns are cut into two random halves (always
            the same ones) and each half is calibrated by what was fitted on the other, so that nothing is
            measured on patterns that it was fitted on. A single pattern stays uncalibrated.

    Returns:
        {"n_patterns", "tasks", "crystal_systems", "spc", "joint": {"tasks", "crystal_systems", "spc", "conformal"}}.

    Raises:
        ValueError: as `xrdfast.posterior.fit_calibration`, or a calibration that lacks a task of the logits.

    Example:
        >>> metrics = evaluate_predictions({"space_group": torch.eye(230)}, torch.arange(1, 231))
        >>> metrics["tasks"]["space_group"]["top1"], metrics["spc"]["point_group"]
        (1.0, None)
    """
    heads = checked_logits("evaluate_predictions", logits, finite=True)
    heads = {task: rows.cpu().double() for task, rows in heads.items()}
    number = checked_numbers("evaluate_predictions", space_group_number, len(next(iter(heads.values()))))
    raw = {task: rows.softmax(dim=1) for task, rows in heads.items()}
    scaled = {task: torch.empty_like(rows) for task, rows in heads.items()}
    product = torch.empty(len(number), N_SPACE_GROUPS, dtype=torch.float64)
    sets = torch.zeros(len(number), N_SPACE_GROUPS, dtype=torch.bool)
    for rows, fitted in _calibrated_parts(heads, number, calibration):
        part = {task: values[rows] for task, values in heads.items()}
        posterior = joint_posterior(part, fitted)
        product[rows] = posterior.space_group
        if fitted is not None and fitted.threshold is not None:
            sets[rows] = posterior.conformal_sets(fitted.threshold)
        for task, values in part.items():
            temperature = 1.0 if fitted is None else fitted.temperatures[task]
            scaled[task][rows] = (values / temperature).softmax(dim=1)
    if "space_group" in heads:
        for probability in (raw, scaled):
            alone = JointPosterior(probability["space_group"])
            probability["extinction_group"] = alone.marginal("extinction_group")
    single = _summary(scaled | heads, raw, scaled, number)

    plain, joint = joint_posterior(heads), JointPosterior(product)
    before = {level: plain.marginal(level) for level in _LEVELS}
    after = {level: joint.marginal(level) for level in _LEVELS}
    together = _summary(after, before, after, number) | {"conformal": _conformal_metrics(sets, number)}
    return {"n_patterns": len(number)} | single | {"joint": together}


def expected_calibration_error(probability: Tensor, target: Tensor) -> float:
    """How far confidence is from accuracy: sum over bins of |share right - mean confidence| * share of all.

    Confidence is the largest probability of a pattern, in 15 bins of equal width over 0..1; a value on an
    inner edge belongs to the bin above.

    Args:
        probability: (n_patterns, n_classes), rows sum to 1.
        target: (n_patterns,) true class indices.

    Raises:
        ValueError: for other shapes or no pattern.

    Source:
        Guo et al., ICML 2017 (arXiv:1706.04599), eq. 3.

    Example:
        >>> round(expected_calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])), 6)
        0.4
    """
    _, confidence, right = _binned("expected_calibration_error", probability, target)
    return float((right - confidence).abs().sum() / len(target))


def reliability_bins(probability: Tensor, target: Tensor) -> list[dict[str, float]]:
    """The reliability diagram: confidence against accuracy in the bins of `expected_calibration_error`.

    Args:
        probability: (n_patterns, n_classes), rows sum to 1.
        target: (n_patterns,) true class indices.

    Returns:
        For each bin that holds patterns its "lower" and "upper" edge, "n_patterns", their mean "confidence" and the
        share "right".

    Raises:
        ValueError: for other shapes or no pattern.

    Example:
        >>> reliability_bins(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))[0]["right"]
        0.5
    """
    count, confidence, right = _binned("reliability_bins", probability, target)
    return [
        {
            "lower": i / N_BINS,
            "upper": (i + 1) / N_BINS,
            "n_patterns": int(count[i]),
            "confidence": float(confidence[i] / count[i]),
            "right": float(right[i] / count[i]),
        }
        for i in count.nonzero().flatten().tolist()
    ]


def _binned(op: str, probability: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patterns in each bin, and their summed confidence and right answers; (N_BINS,) each."""
    if probability.ndim != 2 or 0 in probability.shape or target.shape != probability.shape[:1]:
        raise ValueError(
            f"{op}: probability, target must be (n_patterns, n_classes), (n_patterns,) "
            f"and not empty, got {tuple(probability.shape)}, {tuple(target.shape)}"
        )
    confidence, answer = probability.double().max(dim=1)
    bins = (confidence * N_BINS).long().clamp(0, N_BINS - 1)
    sums = (torch.ones_like(confidence), confidence, (answer == target).double())
    count, confidence, right = (torch.bincount(bins, weights=x, minlength=N_BINS) for x in sums)
    return count, confidence, right


def majority_baseline(train_numbers: Tensor, test_numbers: Tensor) -> dict[str, float]:
    """Accuracy of always answering the most frequent training class, for each task and the extinction group.

    Args:
        train_numbers: (n_patterns,) space group numbers, 1..230; of equally frequent classes the first wins.
        test_numbers: (n_patterns,) likewise.

    Raises:
        ValueError: for other shapes, no pattern or numbers outside 1..230.

    Example:
        >>> shares = majority_baseline(torch.tensor([225, 225, 62]), torch.tensor([225, 227, 14, 62]))
        >>> shares["crystal_system"]
        0.5
    """
    train = checked_numbers("majority_baseline", train_numbers) - 1
    test = checked_numbers("majority_baseline", test_numbers) - 1
    shares = {}
    for level in _LEVELS:
        classes = torch.tensor(class_index(level))
        majority = torch.bincount(classes[train]).argmax()
        shares[level] = float((classes[test] == majority).double().mean())
    return shares


def format_table(metrics: Mapping[str, Any]) -> str:
    """Text tables, in percent, of what `evaluate_predictions` returned.

    Raises:
        ValueError: for anything else.
    """
    try:
        lines = [f"{metrics['n_patterns']} patterns, percent"]
        for title, answers in (("single heads", metrics), ("joint posterior", metrics["joint"])):
            lines += ["", _row(title, "top-1", "top-2", "top-5", "macro F1", "ECE", "calibrated")]
            for level, found in answers["tasks"].items():
                shares = [
                    found[key] for key in ("top1", "top2", "top5", "macro_f1", "ece_before", "ece_after")
                ]
                lines.append(_row(f"  {_spoken(level)}", *map(_percent, shares)))
        if (sets := metrics["joint"].get("conformal")) is not None:
            wanted, held = _percent(sets["coverage"]), _percent(sets["covered"])
            size = f"median size {sets['median_size']:g}, mean {sets['mean_size']:.1f}"
            lines.append(f"  {held} of the sets for {wanted} hold the true space group; {size}")
        heads, joint = metrics["crystal_systems"], metrics["joint"]["crystal_systems"]
        lines += ["", _row("space group, by system", "patterns", "heads", "joint")]
        for name, found in joint.items():
            share = heads[name]["top1"] if heads else None
            lines.append(
                _row(f"  {name}", str(found["n_patterns"]), _percent(share), _percent(found["top1"]))
            )
        heads, joint = metrics["spc"], metrics["joint"]["spc"]
        lines += ["", _row("right where the space group is wrong", "heads", "joint", name_width=38)]
        for level, share in joint.items():
            own = heads[level] if heads else None
            lines.append(_row(f"  {_spoken(level)}", _percent(own), _percent(share), name_width=38))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"format_table: metrics must be what evaluate_predictions returns, "
            f"got {type(error).__name__}: {error}"
        ) from error
    return "\n".join(lines)


def _calibrated_parts(
    heads: dict[str, Tensor], number: Tensor, calibration: Calibration | None
) -> list[tuple[Tensor, Calibration | None]]:
    """Disjoint rows that cover all patterns, each with a calibration that has not seen them."""
    n_patterns = len(number)
    if calibration is not None or n_patterns < 2:
        return [(torch.arange(n_patterns), calibration)]
    order = torch.randperm(n_patterns, generator=torch.Generator().manual_seed(0))
    halves = order[: n_patterns // 2], order[n_patterns // 2 :]
    fitted = [
        fit_calibration({task: values[rows] for task, values in heads.items()}, number[rows])
        for rows in halves
    ]
    return [(halves[0], fitted[1]), (halves[1], fitted[0])]


def _summary(
    scores: Mapping[str, Tensor], before: Mapping[str, Tensor], after: Mapping[str, Tensor], number: Tensor
) -> dict[str, Any]:
    """Metrics of one kind of answer; the mappings hold (n_patterns, n_classes) by level, scores only rank."""
    index = number - 1
    tasks, systems, spc = {}, {}, {}
    for level in [level for level in _LEVELS if level in scores]:
        target = torch.tensor(class_index(level))[index]
        tasks[level] = _level_metrics(level, scores[level], target) | {
            "ece_before": expected_calibration_error(before[level], target),
            "ece_after": expected_calibration_error(after[level], target),
            "reliability": reliability_bins(after[level], target),
        }
    if "space_group" in scores:
        answer = scores["space_group"].argmax(dim=1)
        right = answer == index
        system = torch.tensor(class_index("crystal_system"))[index]
        for i in system.unique().tolist():
            among = right[system == i]
            systems[CRYSTAL_SYSTEMS[i]] = {"n_patterns": len(among), "top1": float(among.double().mean())}
        for level in _SUPERCLASSES:
            classes = torch.tensor(class_index(level))
            kept = (classes[answer] == classes[index])[~right]
            spc[level] = float(kept.double().mean()) if len(kept) else None
    return {"tasks": tasks, "crystal_systems": systems, "spc": spc}


def _conformal_metrics(sets: Tensor, number: Tensor) -> dict[str, float] | None:
    """How sets of space groups, (n_patterns, 230) bool, keep their promise; None where there are none."""
    size = sets.sum(dim=1)
    if not bool(size.all()):  # a set holds the best group at least
        return None
    return {
        "coverage": COVERAGE,
        "covered": float(sets[torch.arange(len(number)), number - 1].double().mean()),
        "mean_size": float(size.double().mean()),
        "median_size": float(size.double().quantile(0.5)),
    }


def _level_metrics(level: str, scores: Tensor, target: Tensor) -> dict[str, Any]:
    """top1, top2, top5, macro_f1 and recall of one level."""
    n_classes = scores.shape[1]
    own = scores.gather(1, target[:, None])
    earlier = torch.arange(n_classes) < target[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(dim=1)
    answer = scores.argmax(dim=1)
    true = torch.bincount(target, minlength=n_classes)
    said = torch.bincount(answer, minlength=n_classes)
    hits = torch.bincount(target[rank == 0], minlength=n_classes)
    present = true.nonzero().flatten()
    counted = (true + said).nonzero().flatten()  # a class that is answered but never occurs counts 0
    f1 = 2.0 * hits[counted].double() / (true + said)[counted]
    recall = (hits[present].double() / true[present]).tolist()
    names = class_names(level)
    return {f"top{k}": float((rank < k).double().mean()) for k in _TOP} | {
        "macro_f1": float(f1.mean()),
        "recall": {names[i]: share for i, share in zip(present.tolist(), recall, strict=True)},
    }


def _row(name: str, *cells: str, name_width: int = 24) -> str:
    return name.ljust(name_width) + "".join(cell.rjust(11) for cell in cells)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100.0 * share:.2f}"


def _spoken(level: str) -> str:
    return level.replace("_", " ")
