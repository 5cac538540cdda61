"""How good the answers are: accuracy, F1, recall, calibration error and confusion of all levels of symmetry.

For held-out patterns with known space groups. Not for the quantities that training watches at every validation
(`xrdfast.training.trainer`) and not for plots (`xrdfast.report`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from xrdfast.posterior import (
    Calibration,
    JointPosterior,
    checked_logits,
    checked_numbers,
    fit_calibration,
    joint_posterior,
)
from xrdfast.symmetry import CRYSTAL_SYSTEMS, TASKS, class_index, class_names

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
      probable; ties go to the lower class index), "macro_f1" (mean of 2 TP / (2 TP + FP + FN) over the classes
      that occur in the truth), "recall" (by class name, of these classes), "ece_before" and "ece_after", the
      expected calibration errors before and after calibration (`expected_calibration_error`). Levels are the tasks
      that have a head and "extinction_group"; the joint posterior has all.
    * "crystal_systems": for each true crystal system its "n_patterns" and the space groups' "top1".
    * "spc", sub-property confusion: among the patterns with a wrong space group, the share whose "crystal_system",
      "lattice_centering", "point_group" is still that of the truth; None where no answer is wrong.

    The extinction group of an answer is the one of largest summed probability. Without a space group head the
    heads have no "crystal_systems", no "spc" and no extinction group.

    Args:
        logits: for each task, (n_patterns, n_classes), finite; a task may be None or left out.
        space_group_number: (n_patterns,) integers, 1..230.
        calibration: fitted on other patterns. Where None, the patterns are cut into two random halves (always the
            same ones) and each half is calibrated by what was fitted on the other, so that nothing is measured on
            patterns that it was fitted on. A single pattern stays uncalibrated.

    Returns:
        {"n_patterns", "tasks", "crystal_systems", "spc", "joint": {"tasks", "crystal_systems", "spc"}}.

    Raises:
        ValueError: as `xrdfast.posterior.fit_calibration`, or a calibration that lacks a task of the logits.

    Example:
        >>> metrics = evaluate_predictions({"space_group": torch.eye(230)}, torch.arange(1, 231))
        >>> metrics["tasks"]["space_group"]["top1"], metrics["spc"]["point_group"]
        (1.0, None)
    """
    heads = checked_logits("evaluate_predictions", logits, finite=True)
    heads = {task: rows.double().cpu() for task, rows in heads.items()}
    number = checked_numbers("evaluate_predictions", space_group_number, len(next(iter(heads.values()))))
    halves = _calibrated_parts(heads, number, calibration)

    scaled = {
        task: _assembled(halves, rows, lambda part, fitted, task=task: _softmax(part, fitted, task))
        for task, rows in heads.items()
    }
    raw = {task: rows.softmax(dim=1) for task, rows in heads.items()}
    if "space_group" in heads:
        for probabilities in (raw, scaled):
            posterior = JointPosterior(probabilities["space_group"])
            probabilities["extinction_group"] = posterior.marginal("extinction_group")
    single = _summary(scaled | heads, raw, scaled, number)

    product = torch.empty(len(number), 230, dtype=torch.float64)
    for rows, fitted in halves:
        part = {task: values[rows] for task, values in heads.items()}
        product[rows] = joint_posterior(part, fitted).space_group
    plain, joint = joint_posterior(heads), JointPosterior(product)
    before = {level: plain.marginal(level) for level in _LEVELS}
    after = {level: joint.marginal(level) for level in _LEVELS}
    return {"n_patterns": len(number)} | single | {"joint": _summary(after, before, after, number)}
