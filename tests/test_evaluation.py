"""Every metric against a loop that counts, and the tables that people read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xrdfast.evaluation import (
    evaluate_predictions,
    expected_calibration_error,
    format_table,
    majority_baseline,
)
from xrdfast.posterior import Calibration, fit_calibration, joint_posterior
from xrdfast.symmetry import (
    CRYSTAL_SYSTEMS,
    N_CLASSES,
    SYMBOLS,
    TASKS,
    class_index,
    class_names,
)

LEVELS = (*TASKS, "extinction_group")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many small tensors: a pool of threads only waits for itself here."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def example(n_patterns: int, seed: int = 0, ties: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of heads that know something; few distinct values where ties are wanted."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint(1, 231, (n_patterns,), generator=generator)
    logits = {}
    for task, count in N_CLASSES.items():
        rows = 3.0 * torch.randn(n_patterns, count, generator=generator)
        rows[torch.arange(n_patterns), torch.tensor(class_index(task))[number - 1]] += 6.0
        logits[task] = rows.div(4.0).round() if ties else rows
    return logits, number


def truth(level: str, number: Tensor) -> list[int]:
    return [int(class_index(level)[n - 1]) for n in number.tolist()]


def counted(scores: Tensor, target: list[int], names: tuple[str, ...]) -> dict[str, object]:
    """The metrics of one level by plain counting."""
    ranked = [sorted(range(len(row)), key=lambda c: (-row[c], c)) for row in scores.tolist()]
    metrics: dict[str, object] = {
        f"top{k}": sum(t in order[:k] for order, t in zip(ranked, target, strict=True)) / len(target)
        for k in (1, 2, 5)
    }
    pairs = [(order[0], t) for order, t in zip(ranked, target, strict=True)]
    f1, recall = [], {}
    for c in sorted(set(target) | {order[0] for order in ranked}):
        hit = sum(a == c == t for a, t in pairs)
        false = sum(a == c != t for a, t in pairs)
        missed = sum(a != c == t for a, t in pairs)
        f1.append(2 * hit / (2 * hit + false + missed))
        if c in target:
            recall[names[c]] = hit / (hit + missed)
    return metrics | {"macro_f1": sum(f1) / len(f1), "recall": recall}


def counted_ece(probability: Tensor, target: list[int]) -> float:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, t in zip(probability.double().tolist(), target, strict=True):
        confidence = max(row)
        bins.setdefault(min(14, int(confidence * 15)), []).append((confidence, row.index(confidence) == t))
    gaps = [abs(sum(right for _, right in b) - sum(c for c, _ in b)) for b in bins.values()]
    return sum(gaps) / len(target)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n_patterns", [1, 2, 3, 157])
def test_heads_are_counted_right(n_patterns: int, ties: bool) -> None:
    logits, number = example(n_patterns, n_patterns, ties)
    found = evaluate_predictions(logits, number)
    assert found["n_patterns"] == n_patterns
    assert list(found["tasks"]) == list(LEVELS)
    for task in TASKS:
        expected = counted(logits[task], truth(task, number), class_names(task))
        got = found["tasks"][task]
        for key, value in expected.items():
            assert got[key] == pytest.approx(value)
        probability = logits[task].double().softmax(1)
        assert got["ece_before"] == pytest.approx(counted_ece(probability, truth(task, number)))


def test_joint_answers_are_counted_right() -> None:
    logits, number = example(120, 1)
    calibration = fit_calibration(*example(120, 2))
    found = evaluate_predictions(logits, number, calibration)["joint"]
    double = {task: rows.double() for task, rows in logits.items()}
    plain, joint = joint_posterior(double), joint_posterior(double, calibration)
    assert list(found["tasks"]) == list(LEVELS)
    for level in LEVELS:
        target, got = truth(level, number), found["tasks"][level]
        expected = counted(joint.marginal(level), target, class_names(level))
        for key, value in expected.items():
            assert got[key] == pytest.approx(value)
        assert got["ece_before"] == pytest.approx(counted_ece(plain.marginal(level), target))
        assert got["ece_after"] == pytest.approx(counted_ece(joint.marginal(level), target))


def test_extinction_groups_of_the_head_are_sums() -> None:
    logits, number = example(80, 3)
    found = evaluate_predictions({"space_group": logits["space_group"]}, number)
    target = truth("extinction_group", number)
    alone = joint_posterior({"space_group": logits["space_group"].double()}).marginal("extinction_group")
    assert found["tasks"]["extinction_group"]["ece_before"] == pytest.approx(counted_ece(alone, target))
    # a sure answer within the right extinction group counts, 144 for 145
    sure = torch.zeros(1, 230)
    sure[0, 144 - 1] = 20.0
    found = evaluate_predictions({"space_group": sure}, torch.tensor([145]))
    assert found["tasks"]["space_group"]["top1"] == 0.0
    assert found["tasks"]["extinction_group"]["top1"] == 1.0


def test_crystal_systems_and_spc_are_counted_right() -> None:
    logits, number = example(300, 4)
    found = evaluate_predictions(logits, number)
    answer = logits["space_group"].argmax(1) + 1
    right = answer == number
    systems = truth("crystal_system", number)
    assert sum(row["n_patterns"] for row in found["crystal_systems"].values()) == 300
    for i, name in enumerate(CRYSTAL_SYSTEMS):
        among = [bool(r) for r, s in zip(right, systems, strict=True) if s == i]
        assert found["crystal_systems"][name]["n_patterns"] == len(among)
        assert found["crystal_systems"][name]["top1"] == pytest.approx(sum(among) / len(among))
    wrong = [(a, n) for a, n in zip(answer.tolist(), number.tolist(), strict=True) if a != n]
    assert 0 < len(wrong) < 300
    for level in TASKS[1:]:
        table = class_index(level)
        kept = sum(table[a - 1] == table[n - 1] for a, n in wrong)
        assert found["spc"][level] == pytest.approx(kept / len(wrong))


def test_perfect_answers() -> None:
    number = torch.arange(1, 231)
    logits = {
        task: 30.0 * torch.eye(count)[torch.tensor(class_index(task))] for task, count in N_CLASSES.items()
    }
    found = evaluate_predictions(logits, number)
    for answers in (found, found["joint"]):
        for level in LEVELS:
            assert answers["tasks"][level]["top1"] == answers["tasks"][level]["macro_f1"] == 1.0
            assert set(answers["tasks"][level]["recall"].values()) == {1.0}
        assert answers["tasks"]["space_group"]["recall"].keys() == set(SYMBOLS)
        assert answers["spc"] == dict.fromkeys(TASKS[1:])  # no wrong answer to speak of
    assert "-" in format_table(found)


def test_calibration_is_measured_on_patterns_it_has_not_seen() -> None:
    """The error shrinks for over-confident heads, and each half is scaled by what the other taught."""
    logits, number = example(800, 5)
    logits = {task: 4.0 * rows for task, rows in logits.items()}
    found = evaluate_predictions(logits, number)
    for answers in (found, found["joint"]):
        for level in LEVELS:
            assert answers["tasks"][level]["ece_after"] < answers["tasks"][level]["ece_before"]
    assert evaluate_predictions(logits, number) == found
    order = torch.randperm(800, generator=torch.Generator().manual_seed(0))
    halves = order[:400], order[400:]
    after = torch.empty(800, 7, dtype=torch.float64)
    rows = logits["crystal_system"]
    for own, other in (halves, halves[::-1]):
        fitted = fit_calibration({"crystal_system": rows[other]}, number[other])
        after[own] = (rows[own].double() / fitted.temperatures["crystal_system"]).softmax(1)
    got = found["tasks"]["crystal_system"]["ece_after"]
    assert got == pytest.approx(counted_ece(after, truth("crystal_system", number)))


def test_sets_are_measured_on_patterns_they_have_not_seen() -> None:
    logits, number = example(2000, 9)
    sets = evaluate_predictions(logits, number)["joint"]["conformal"]
    assert sets["coverage"] == 0.95
    assert sets["covered"] == pytest.approx(0.95, abs=0.02)
    assert 1 <= sets["median_size"] <= 230
    fitted = fit_calibration(logits, number)
    again = evaluate_predictions(logits, number, fitted)["joint"]["conformal"]
    double = {task: rows.double() for task, rows in logits.items()}
    member = joint_posterior(double, fitted).conformal_sets(fitted.threshold)
    assert again["mean_size"] == pytest.approx(float(member.sum(1).double().mean()))
    assert again["covered"] == pytest.approx(float(member[torch.arange(2000), number - 1].double().mean()))
    old = Calibration(fitted.temperatures, fitted.exponents)
    assert evaluate_predictions(logits, number, old)["joint"]["conformal"] is None


def test_reliability_bins_add_up_to_the_calibration_error() -> None:
    found = evaluate_predictions(*example(300, 10))
    for answers in (found, found["joint"]):
        for level in LEVELS:
            bins = answers["tasks"][level]["reliability"]
            assert sum(one["n_patterns"] for one in bins) == 300
            assert all(one["lower"] <= one["confidence"] <= one["upper"] for one in bins)
            error = sum(one["n_patterns"] / 300 * abs(one["right"] - one["confidence"]) for one in bins)
            assert error == pytest.approx(answers["tasks"][level]["ece_after"])


def test_one_pattern_stays_uncalibrated() -> None:
    found = evaluate_predictions(*example(1, 6))
    for answers in (found, found["joint"]):
        for level in LEVELS:
            assert answers["tasks"][level]["ece_after"] == answers["tasks"][level]["ece_before"]


@pytest.mark.parametrize("tasks", [TASKS, TASKS[:1], TASKS[1:], ("point_group",)])
def test_any_set_of_heads_gives_json_and_a_table(tasks: tuple[str, ...]) -> None:
    logits, number = example(40, 7)
    logits = {task: rows if task in tasks else None for task, rows in logits.items()}
    found = evaluate_predictions(logits, number)
    own = [*tasks, *(["extinction_group"] if "space_group" in tasks else [])]
    assert list(found["tasks"]) == own
    assert bool(found["spc"]) == bool(found["crystal_systems"]) == ("space_group" in tasks)
    assert list(found["joint"]["tasks"]) == list(LEVELS)
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert format_table(again) == format_table(found)


@given(
    st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), min_size=1, max_size=50),
)
@settings(deadline=None)
def test_calibration_error_is_counted_right(pairs: list[tuple[float, bool]]) -> None:
    high = torch.tensor([max(c, 1.0 - c) for c, _ in pairs], dtype=torch.float64)
    probability = torch.stack([high, 1.0 - high], dim=1)
    target = torch.tensor([0 if right else 1 for _, right in pairs])
    got = expected_calibration_error(probability, target)
    assert got == pytest.approx(counted_ece(probability, target.tolist()), abs=1e-12)
    assert 0.0 <= got <= 1.0


@given(
    st.lists(st.integers(1, 230), min_size=1, max_size=30),
    st.lists(st.integers(1, 230), min_size=1, max_size=30),
)
@settings(deadline=None)
def test_majority_baseline_is_counted_right(train: list[int], test: list[int]) -> None:
    found = majority_baseline(torch.tensor(train), torch.tensor(test))
    assert list(found) == list(LEVELS)
    for level, share in found.items():
        classes = [int(class_index(level)[n - 1]) for n in train]
        majority = min(set(classes), key=lambda c: (-classes.count(c), c))
        assert share == pytest.approx(sum(class_index(level)[n - 1] == majority for n in test) / len(test))


def test_the_table_holds_the_numbers_aligned() -> None:
    found = evaluate_predictions(*example(250, 8))
    lines = format_table(found).splitlines()
    assert lines[0] == "250 patterns, percent"
    assert [line for line in lines if line and not line.startswith(" ")][1:] == [
        line for line in lines if line.split("  ")[0] in
        ("single heads", "joint posterior", "space group, by system", "right where the space group is wrong")
    ]  # fmt: skip
    for title, answers in (("single heads", found), ("joint posterior", found["joint"])):
        at = next(i for i, line in enumerate(lines) if line.startswith(title))
        row = next(line for line in lines[at:] if line.startswith("  point group"))
        own = answers["tasks"]["point_group"]
        keys = ("top1", "top2", "top5", "macro_f1", "ece_before", "ece_after")
        assert row.split()[2:] == [f"{100 * own[key]:.2f}" for key in keys]
        assert len(row) == len(lines[at])
    assert not any(line != line.rstrip() or len(line) > 110 for line in lines)


@pytest.mark.parametrize("metrics", [{}, {"n_patterns": 3}, [], {"n_patterns": 1, "tasks": 3, "joint": {}}])
def test_other_metrics_make_no_table(metrics: object) -> None:
    with pytest.raises(
        ValueError, match=r"^format_table: metrics must be what evaluate_predictions returns, got "
    ):
        format_table(metrics)


def test_bad_input_is_refused() -> None:
    logits, number = example(3)
    with pytest.raises(
        ValueError, match=r"^evaluate_predictions: space_group_number must be \(3,\), got \(2,\)"
    ):
        evaluate_predictions(logits, number[:2])
    with pytest.raises(ValueError, match=r"^evaluate_predictions: .* must be in 1\.\.230, got 0"):
        evaluate_predictions(logits, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"^evaluate_predictions: logits must hold at least one task, got none"
    ):
        evaluate_predictions({}, number)
    with pytest.raises(ValueError, match="at least one pattern, got none"):
        evaluate_predictions({task: rows[:0] for task, rows in logits.items()}, number[:0])
    logits["point_group"][1, 0] = math.inf
    with pytest.raises(ValueError, match=r"logits\['point_group'\] must be finite, got 1 patterns"):
        evaluate_predictions(logits, number)
    with pytest.raises(
        ValueError, match="calibration must cover every task of the logits, got no space_group"
    ):
        other = Calibration({"point_group": 1.0}, {"point_group": 1.0})
        evaluate_predictions({"space_group": logits["space_group"]}, number, other)
    with pytest.raises(
        ValueError, match=r"^majority_baseline: space_group_number must be \(n_patterns,\), got \(\)"
    ):
        majority_baseline(torch.tensor(3), number)
    for probability, target in ((torch.zeros(0, 7), torch.zeros(0)), (torch.zeros(2, 7), torch.zeros(3))):
        with pytest.raises(ValueError, match=r"^expected_calibration_error: probability, target must be"):
            expected_calibration_error(probability, target)
