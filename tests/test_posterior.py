"""The joint posterior against sums over space groups written out, and its calibration against brute force."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import nll_loss

from xrdfast.posterior import (
    Calibration,
    JointPosterior,
    conformal_threshold,
    fit_calibration,
    fit_pool,
    joint_posterior,
    pool_posteriors,
)
from xrdfast.symmetry import N_CLASSES, TASKS, class_index, class_names, members

LEVELS = (*TASKS, "laue_class", "bravais_lattice", "extinction_group")
SYSTEM_ONLY = Calibration({"crystal_system": 1.0}, {"crystal_system": 1.0})


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many small tensors: a pool of threads only waits for itself here."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def random_logits(n_patterns: int, seed: int, scale: float = 3.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        task: scale * torch.randn(n_patterns, count, generator=generator, dtype=torch.float64)
        for task, count in N_CLASSES.items()
    }


def skilled_logits(n_patterns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of heads that know something, and the space group numbers."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint(1, 231, (n_patterns,), generator=generator)
    logits = random_logits(n_patterns, seed, 1.0)
    for task, skill in zip(TASKS, (4.0, 1.0, 3.0, 2.0), strict=True):
        logits[task][torch.arange(n_patterns), torch.tensor(class_index(task))[number - 1]] += skill
    return logits, number


def joint_nll(logits: dict[str, Tensor], number: Tensor, calibration: Calibration) -> float:
    return float(nll_loss(joint_posterior(logits, calibration).space_group.log(), number - 1))


def penalised_nll(logits: dict[str, Tensor], number: Tensor, calibration: Calibration) -> float:
    """What the exponents minimise: NLL and the prior worth one pattern."""
    prior = sum((exponent - 1.0) ** 2 for exponent in calibration.exponents.values()) / (2 * len(number))
    return joint_nll(logits, number, calibration) + prior


def test_the_product_is_the_one_written_out() -> None:
    logits = random_logits(3, 0)
    calibration = Calibration(dict(zip(TASKS, (0.5, 1.0, 2.0, 3.0), strict=True)),
                              dict(zip(TASKS, (1.5, 0.0, 0.3, 1.0), strict=True)))  # fmt: skip
    got = joint_posterior(logits, calibration).space_group
    for pattern in range(3):
        weights = []
        for group in range(230):
            weight = 1.0
            for task in TASKS:
                own = (logits[task][pattern] / calibration.temperatures[task]).exp()
                share = float(own[class_index(task)[group]] / own.sum())
                weight *= share ** calibration.exponents[task]
            weights.append(weight)
        expected = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
        torch.testing.assert_close(got[pattern], expected, rtol=1e-10, atol=0.0)


@given(st.sets(st.sampled_from(TASKS), min_size=1), st.integers(0, 999), st.floats(0.01, 300.0))
@settings(max_examples=40, deadline=None)
def test_every_level_sums_over_its_members(tasks: set[str], seed: int, scale: float) -> None:
    logits = {task: rows for task, rows in random_logits(2, seed, scale).items() if task in tasks}
    posterior = joint_posterior(logits)
    for level in LEVELS:
        marginal = posterior.marginal(level)
        assert marginal.shape == (2, len(class_names(level)))
        torch.testing.assert_close(marginal.sum(1), torch.ones(2, dtype=torch.float64))
        index = seed % len(class_names(level))
        own = posterior.space_group[:, [n - 1 for n in members(level, index)]].sum(1)
        torch.testing.assert_close(marginal[:, index], own)


def test_one_space_group_head_alone_is_its_own_softmax() -> None:
    logits = random_logits(5, 1)["space_group"].float()
    absent = dict.fromkeys(TASKS[1:])
    posterior = joint_posterior({"space_group": logits} | absent)
    assert posterior.space_group.dtype == torch.float32
    torch.testing.assert_close(posterior.space_group, logits.softmax(1))


def test_a_sure_superclass_rules_out_the_others() -> None:
    logits = {"space_group": torch.zeros(1, 230), "crystal_system": torch.zeros(1, 7)}
    logits["crystal_system"][0, 6] = 1e4
    posterior = joint_posterior(logits)
    assert posterior.marginal("crystal_system")[0, 6] == pytest.approx(1.0)
    torch.testing.assert_close(posterior.space_group[0, 194:], torch.full((36,), 1.0 / 36.0))


def test_half_precision_is_computed_in_single() -> None:
    logits = {task: rows.half() for task, rows in random_logits(4, 2).items()}
    posterior = joint_posterior(logits)
    assert posterior.space_group.dtype == torch.float32
    exact = joint_posterior({task: rows.double() for task, rows in logits.items()})
    torch.testing.assert_close(posterior.space_group.double(), exact.space_group, rtol=1e-5, atol=1e-7)


def test_nan_stays_in_its_pattern_and_empty_batches_pass() -> None:
    logits = random_logits(2, 3)
    logits["point_group"][1, 4] = math.nan
    rows = joint_posterior(logits).space_group
    assert torch.isfinite(rows[0]).all()
    assert rows[1].isnan().all()
    empty = joint_posterior({task: tensor[:0] for task, tensor in logits.items()})
    assert empty.marginal("extinction_group").shape == (0, 97)


def test_gradients_flow_through_the_posterior() -> None:
    logits = {task: rows.requires_grad_() for task, rows in random_logits(2, 4).items()}
    joint_posterior(logits).marginal("point_group")[:, 3].sum().backward()
    assert all(float(rows.grad.abs().sum()) > 0 for rows in logits.values())


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_temperature_undoes_a_scale(factor: float) -> None:
    """Labels drawn from softmax(z); heads that say factor * z want T = factor."""
    generator = torch.Generator().manual_seed(5)
    logits = 2.0 * torch.randn(5000, 7, generator=generator)
    system = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    number = torch.tensor([members("crystal_system", i)[0] for i in range(7)])[system]
    fitted = fit_calibration({"crystal_system": factor * logits}, number)
    assert fitted.temperatures["crystal_system"] == pytest.approx(factor, rel=0.08)


def test_temperature_is_the_best_of_a_fine_scan() -> None:
    logits, number = skilled_logits(200, 6)
    fitted = fit_calibration(logits, number)
    for task in TASKS:
        target = torch.tensor(class_index(task))[number - 1]
        inverse = torch.logspace(-1.3, 1.3, 401, dtype=torch.float64)
        loss = [nll_loss((x * logits[task]).log_softmax(1), target) + (x - 1.0) ** 2 / 400.0 for x in inverse]
        best = float(inverse[torch.stack(loss).argmin()])
        assert 1.0 / fitted.temperatures[task] == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize(
    ("tasks", "n_patterns"), [(TASKS, 60), (TASKS, 257), (TASKS[:1], 60), (TASKS[1:3], 60)]
)
def test_exponents_are_a_minimum(tasks: tuple[str, ...], n_patterns: int) -> None:
    """The problem is convex, so no small move in any direction may help; 257 is one more than fits at once."""
    logits, number = skilled_logits(n_patterns, 7)
    logits = {task: logits[task] for task in tasks}
    fitted = fit_calibration(logits, number)
    best = penalised_nll(logits, number, fitted)
    generator = torch.Generator().manual_seed(8)
    for _ in range(100):
        moves = 0.05 * torch.randn(len(tasks), generator=generator)
        exponents = {
            t: max(0.0, e + float(m)) for (t, e), m in zip(fitted.exponents.items(), moves, strict=True)
        }
        assert penalised_nll(logits, number, Calibration(fitted.temperatures, exponents)) >= best - 1e-12
    plain = Calibration(fitted.temperatures, dict.fromkeys(tasks, 1.0))
    assert joint_nll(logits, number, fitted) <= joint_nll(logits, number, plain)


def test_a_head_that_misleads_gets_no_say() -> None:
    logits, number = skilled_logits(300, 9)
    right = torch.tensor(class_index("point_group"))[number - 1]
    logits["point_group"][torch.arange(300), right] -= 8.0
    fitted = fit_calibration(logits, number)
    assert fitted.exponents["point_group"] == 0.0
    assert fitted.temperatures["point_group"] == pytest.approx(20.0)


@given(st.integers(1, 4), st.integers(0, 999), st.sampled_from([0.0, 1e-3, 1.0, 100.0, 1e6]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_tiny_and_extreme_sets_give_usable_numbers(n: int, seed: int, scale: float, separable: bool) -> None:
    logits, number = random_logits(n, seed, scale), torch.randint(1, 231, (n,))
    if separable:
        for task in TASKS:
            right = torch.tensor(class_index(task))[number - 1]
            logits[task][torch.arange(n), right] = logits[task].max() + scale
    fitted = fit_calibration(logits, number)  # Calibration checks the ranges itself
    again = fit_calibration(logits, number)
    assert fitted == again
    assert torch.isfinite(joint_posterior(logits, fitted).space_group).all()


def test_fitting_leaves_its_input_alone_and_accepts_inference_tensors() -> None:
    with torch.inference_mode():
        logits, number = skilled_logits(20, 10)
    before = {task: rows.clone() for task, rows in logits.items()}
    fit_calibration(logits | {"space_group": None}, number.to(torch.int16))
    assert all(torch.equal(before[task], rows) for task, rows in logits.items())


def test_layout_in_memory_does_not_matter() -> None:
    logits, number = skilled_logits(30, 12)
    turned = {task: rows.T.contiguous().T for task, rows in logits.items()}
    padded = {task: torch.cat([rows, rows], dim=1)[:, : rows.shape[1]] for task, rows in logits.items()}
    expected = fit_calibration(logits, number)
    for other in (turned, padded):
        fitted = fit_calibration(other, number)
        assert fitted.temperatures == pytest.approx(expected.temperatures)
        assert fitted.exponents == pytest.approx(expected.exponents)
    alike = {"crystal_system": torch.zeros(1, 7).expand(4, 7)}
    assert fit_calibration(alike, number[:4]).temperatures["crystal_system"] == pytest.approx(1.0)


def test_calibration_survives_json() -> None:
    logits, number = skilled_logits(50, 11)
    fitted = fit_calibration(logits, number)
    again = Calibration.from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert again == fitted
    assert list(again.temperatures) == list(TASKS)
    got, expected = joint_posterior(logits, again), joint_posterior(logits, fitted)
    assert torch.equal(got.space_group, expected.space_group)


def test_calibrations_without_sets_are_still_read() -> None:
    old = Calibration.from_dict(GOOD)
    assert old.threshold is None
    assert old.to_dict() == GOOD


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
def test_sets_cover_what_they_promise(coverage: float) -> None:
    """Over many splits the mean coverage is (n + 1 - k) / (n + 1), k = floor((n + 1) (1 - coverage))."""
    logits, number = skilled_logits(4000, 31)
    posterior = joint_posterior(logits)
    own = posterior.space_group[torch.arange(4000), number - 1]
    n, covered = 199, []
    for seed in range(40):
        order = torch.randperm(4000, generator=torch.Generator().manual_seed(seed))
        fitted, unseen = order[:n], order[n:]
        threshold = conformal_threshold(posterior.space_group[fitted], number[fitted], coverage)
        covered.append(float((own[unseen] >= threshold).double().mean()))
    k = math.floor(200 * (1.0 - coverage) + 1e-9)
    assert sum(covered) / 40 == pytest.approx((n + 1 - k) / (n + 1), abs=0.01)


def test_sets_hold_the_likely_groups_and_the_best_one() -> None:
    share = torch.full((2, 230), 0.1 / 226)
    share[0, [3, 7, 9, 11]] = torch.tensor([0.4, 0.3, 0.15, 0.05])
    posterior = JointPosterior(share)
    assert posterior.conformal_sets(0.15)[0].nonzero().flatten().tolist() == [3, 7, 9]
    assert posterior.conformal_sets(0.9)[0].nonzero().flatten().tolist() == [3]
    assert posterior.conformal_sets(0.9).sum(1).tolist() == [1, 1]
    assert posterior.conformal_sets(0.0).sum(1).tolist() == [230, 230]


def test_the_fitted_threshold_is_that_of_the_joint_posterior() -> None:
    logits, number = skilled_logits(500, 12)
    fitted = fit_calibration(logits, number)
    share = joint_posterior(logits, fitted).space_group
    assert fitted.threshold == conformal_threshold(share, number)
    held = share[torch.arange(500), number - 1] >= fitted.threshold
    assert int(held.sum()) == 500 - 25 + 1  # k = floor(501 * 0.05) = 25, the k-th itself is in


def test_few_patterns_promise_nothing() -> None:
    share = torch.full((18, 230), 1.0 / 230)
    assert conformal_threshold(share, torch.ones(18, dtype=torch.int64)) == 0.0
    assert conformal_threshold(share[:1].expand(19, -1), torch.ones(19, dtype=torch.int64)) > 0.0


@pytest.mark.parametrize("coverage", [0.0, 1.0, math.nan])
def test_impossible_coverages_are_refused(coverage: float) -> None:
    with pytest.raises(ValueError, match="conformal_threshold: coverage must be between 0 and 1"):
        conformal_threshold(torch.ones(3, 230), torch.tensor([1, 2, 3]), coverage)


GOOD = {"temperatures": {"space_group": 1.0}, "exponents": {"space_group": 1.0}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {},
            r"content must hold exactly temperatures, exponents, and perhaps conformal, several_phases, got \[\]",
        ),
        ([1], "content must hold exactly temperatures, exponents, .* got list"),
        (GOOD | {"more": 1}, "got .*'more'"),
        (GOOD | {"exponents": 3}, "exponents must map tasks to numbers, got 3"),
        (GOOD | {"exponents": {"point_group": 1.0}}, "must name the same tasks of space_group, "),
        ({"temperatures": {}, "exponents": {}}, "must name the same tasks"),
        ({"temperatures": {"hue": 1.0}, "exponents": {"hue": 1.0}}, r"got \['hue'\]"),
        (
            GOOD | {"temperatures": {"space_group": 0.0}},
            r"temperatures\['space_group'\] must be in 0.05..20, got 0",
        ),
        (GOOD | {"temperatures": {"space_group": math.nan}}, "got nan"),
        (GOOD | {"temperatures": {"space_group": "1"}}, "got '1'"),
        (GOOD | {"temperatures": {"space_group": True}}, "got True"),
        (
            GOOD | {"exponents": {"space_group": -0.1}},
            r"exponents\['space_group'\] must be in 0..20, got -0.1",
        ),
        (GOOD | {"exponents": {"space_group": math.inf}}, "got inf"),
        (GOOD | {"conformal": 0.1}, "conformal must hold coverage 0.95 and a threshold, got 0.1"),
        (GOOD | {"conformal": {"threshold": 0.1}}, "conformal must hold coverage 0.95"),
        (GOOD | {"conformal": {"coverage": 0.9, "threshold": 0.1}}, "conformal must hold coverage 0.95"),
        (
            GOOD | {"conformal": {"coverage": 0.95, "threshold": None}},
            r"conformal\['threshold'\] must be in 0..1, got None",
        ),
        (GOOD | {"conformal": {"coverage": 0.95, "threshold": 1.5}}, "got 1.5"),
    ],
)
def test_bad_calibrations_are_refused(content: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^Calibration: .*{message}"):
        Calibration.from_dict(content)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ({"colour": torch.zeros(1, 3)}, "logits must be of the tasks space_group, .*, got 'colour'"),
        ({}, "logits must hold at least one task, got none"),
        ({"space_group": None}, "at least one task, got none"),
        (
            {"space_group": torch.zeros(2, 7)},
            r"\['space_group'\] must be floating point \(2, 230\), got .*\(2, 7\)",
        ),
        ({"crystal_system": torch.zeros(7)}, r"must be floating point \(7, 7\), got .*\(7,\)"),
        ({"crystal_system": torch.zeros(1, 7, dtype=torch.int64)}, "got torch.int64"),
        (
            {"crystal_system": torch.zeros(2, 7), "point_group": torch.zeros(3, 32)},
            r"\(2, 32\), got .*\(3, 32\)",
        ),
    ],
)
def test_bad_logits_are_refused(logits: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=f"^joint_posterior: .*{message}"):
        joint_posterior(logits)
    with pytest.raises(ValueError, match=f"^fit_calibration: .*{message}"):
        fit_calibration(logits, torch.ones(2, dtype=torch.int64))


def test_a_calibration_of_other_tasks_is_refused() -> None:
    with pytest.raises(
        ValueError, match="calibration must cover every task of the logits, got no point_group"
    ):
        joint_posterior({"point_group": torch.zeros(1, 32)}, SYSTEM_ONLY)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (torch.tensor([1, 2, 3]), r"must be \(2,\), got \(3,\)"),
        (torch.tensor([[1, 2]]), r"must be \(2,\), got \(1, 2\)"),
        (torch.tensor([1.0, 2.0]), "must be integers, got torch.float32"),
        (torch.tensor([True, True]), "must be integers, got torch.bool"),
        (torch.tensor([0, 3]), r"must be in 1\.\.230, got 0"),
        (torch.tensor([3, 231]), r"must be in 1\.\.230, got 231"),
    ],
)
def test_bad_numbers_are_refused(number: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^fit_calibration: space_group_number {message}"):
        fit_calibration({"crystal_system": torch.zeros(2, 7)}, number)


def test_nothing_can_be_fitted_on_nothing_or_nan() -> None:
    with pytest.raises(ValueError, match="must hold at least one pattern, got none"):
        fit_calibration({"crystal_system": torch.zeros(0, 7)}, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"logits\['crystal_system'\] must be finite, got 1 patterns that are not"
    ):
        fit_calibration({"crystal_system": torch.full((1, 7), math.nan)}, torch.tensor([1]))


def test_unknown_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="level must be one of"):
        JointPosterior(torch.zeros(1, 230)).marginal("colour")


def test_pooled_answers_are_products_of_powers() -> None:
    one, other = (torch.rand(3, 230, dtype=torch.float64).softmax(1) for _ in range(2))
    pooled = pool_posteriors([one, other], [(0.5, 0.0), (2.0, -0.3)]).space_group
    spread, other_spread = 0.99 * one + 0.01 / 230, 0.99 * other + 0.01 / 230
    system = JointPosterior(other_spread).marginal("crystal_system")[
        :, torch.tensor(class_index("crystal_system"))
    ]
    by_hand = spread**0.5 * other_spread**2.0 * system**-0.3
    torch.testing.assert_close(pooled, by_hand / by_hand.sum(1, keepdim=True))
    alone = pool_posteriors([one], [(1.0, 0.0)]).space_group
    torch.testing.assert_close(alone, 0.99 * one + 0.01 / 230)


def test_a_fitted_pool_trusts_the_answer_that_is_right() -> None:
    """And is better than either answer, on patterns where each knows half."""
    generator = torch.Generator().manual_seed(0)
    number = torch.randint(1, 231, (400,), generator=generator)
    noise = torch.rand(2, 400, 230, generator=generator, dtype=torch.float64)
    right = torch.nn.functional.one_hot(number - 1, 230).double()
    good = (3.0 * noise[0] + 3.0 * right).softmax(1)
    blind = (noise[1] * 6.0).softmax(1)
    exponents = fit_pool([good, blind], number)
    assert exponents[0][0] > 0.7
    assert exponents[1][0] < 0.1

    def cost(rows: Tensor) -> float:
        return float(nll_loss(rows.log(), number - 1))

    half = torch.arange(400)[:, None] < 200
    first, second = torch.where(half, good, blind), torch.where(half, blind, good)
    both = pool_posteriors([first, second], fit_pool([first, second], number)).space_group
    assert cost(both) < min(cost(first), cost(second))


def test_a_fitted_pool_trusts_a_level_alone() -> None:
    """An answer that is right in the crystal system and guesses within it; one that is wrong in it and right within."""
    number = torch.arange(1, 231).repeat(4)
    systems = torch.tensor(class_index("crystal_system"))
    same = (systems[number - 1][:, None] == systems[None]).double()
    coarse = same * 20.0 + 1.0
    within = torch.where(torch.nn.functional.one_hot(number - 1, 230).bool(), 30.0, 1.0) / (1.0 + 9.0 * same)
    answers = [rows / rows.sum(1, keepdim=True) for rows in (coarse, within)]
    (_, _), (_, system) = exponents = fit_pool(answers, number)
    assert system < -0.1
    pooled = pool_posteriors(answers, exponents)
    assert bool((pooled.space_group.argmax(1) == number - 1).all())


@pytest.mark.parametrize(
    ("answers", "exponents", "message"),
    [
        ([], [], "posteriors must be at least one"),
        ([torch.ones(2, 7)], [(1.0, 0.0)], "posteriors must be at least one"),
        ([torch.ones(2, 230), torch.ones(3, 230)], [(1.0, 0.0)] * 2, "posteriors must be at least one"),
        ([torch.ones(2, 230)], [(1.0, 0.0)] * 2, "exponents must be 1 times 2 numbers"),
        ([torch.ones(2, 230)], [(1.0,)], "exponents must be 1 times 2 numbers"),
        ([torch.ones(2, 230)], [(-1.0, 0.0)], "exponents must be 1 times 2 numbers, the first >= 0"),
    ],
)
def test_pools_of_other_shapes_are_refused(answers: list, exponents: list, message: str) -> None:
    with pytest.raises(ValueError, match=f"^pool_posteriors: {message}"):
        pool_posteriors(answers, exponents)
