"""Task weights against independent solvers, and the balanced step against plain autograd."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F

from xrdfast.models import SymmetryModel
from xrdfast.symmetry import N_CLASSES, TASKS
from xrdfast.training.balance import (
    METHODS,
    Balance,
    balanced_step,
    mgda_weights,
    min_norm_weights,
)


@st.composite
def vectors(draw: st.DrawFn, min_tasks: int = 1) -> Tensor:
    """(T, n) float64 task gradients: random, opposed, parallel, (nearly) equal, zero, of unlike sizes."""
    n_tasks = draw(st.integers(min_tasks, 4))
    n = draw(st.sampled_from([1, 2, 3, 5, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.randn(n_tasks, n, generator=generator, dtype=torch.float64)
    for i in range(1, n_tasks):
        kind = draw(
            st.sampled_from(["own", "own", "own", "opposed", "parallel", "equal", "near", "zero", "mix"])
        )
        if kind == "opposed":
            rows[i] = -rows[0]
        elif kind == "parallel":
            rows[i] = 3 * rows[0]
        elif kind == "equal":
            rows[i] = rows[0]
        elif kind == "near":
            rows[i] = rows[0] + 1e-9 * rows[i]
        elif kind == "zero":
            rows[i] = 0
        elif kind == "mix":
            rows[i] = rows[:i].mean(dim=0)
    sizes = torch.tensor(draw(st.lists(st.integers(-3, 3), min_size=n_tasks, max_size=n_tasks)))
    return rows * 10.0 ** sizes[:, None]


def positive_losses(n_tasks: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (torch.rand(n_tasks, generator=generator, dtype=torch.float64) * 4 - 3)


def check_minimum(weights: Tensor, gram: Tensor) -> None:
    """On the simplex, and KKT: the minimum point's product with every vector is at least its own square."""
    assert (weights >= 0).all() and abs(weights.sum().item() - 1) < 1e-12
    products = gram @ weights
    scale = gram.diagonal().max().item() or 1.0
    assert (products - weights @ products).min().item() >= -1e-12 * scale


@settings(deadline=None, max_examples=300)
@given(rows=vectors())
def test_min_norm_meets_kkt(rows):
    gram = rows @ rows.T
    check_minimum(min_norm_weights(gram), gram)


@settings(deadline=None, max_examples=60)
@given(rows=vectors(min_tasks=2))
def test_min_norm_agrees_with_a_quadratic_program(rows):
    optimize = pytest.importorskip("scipy.optimize")
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    gram = (rows @ rows.T).numpy()
    n_tasks = len(gram)
    peer = optimize.minimize(
        lambda w: w @ gram @ w,
        np.full(n_tasks, 1 / n_tasks),
        jac=lambda w: 2 * gram @ w,
        bounds=[(0, 1)] * n_tasks,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(n_tasks)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    own = min_norm_weights(torch.from_numpy(gram)).numpy()
    assert own @ gram @ own <= peer.x @ gram @ peer.x + 1e-12
    # The minimum point is unique even where its weights are not.
    assert np.linalg.norm(rows.numpy().T @ (own - peer.x)) < 1e-4


def test_mgda_agrees_with_torchjd():
    aggregation = pytest.importorskip("torchjd.aggregation")
    n_steps = 1000
    weighting = aggregation.MGDAWeighting(epsilon=1e-12, max_iters=n_steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        rows = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        losses = 0.5 + torch.rand(4, generator=generator, dtype=torch.float64)
        normaliser = losses * rows.norm(dim=1)
        normalised = rows / normaliser[:, None]
        alpha = mgda_weights(losses, rows @ rows.T) * normaliser
        own = alpha / alpha.sum() @ normalised
        peer = weighting(normalised @ normalised.T) @ normalised
        # Frank-Wolfe nears the minimum like 1 / steps; ‖peer − own‖² ≤ ‖peer‖² − ‖own‖² at a minimum.
        excess = peer.square().sum() - own.square().sum()
        assert -1e-14 <= excess <= 8 * normalised.square().sum(dim=1).max() / n_steps
        assert (peer - own).square().sum() <= excess + 1e-14


@settings(deadline=None, max_examples=200)
@given(rows=vectors(), seed=st.integers(0, 2**31))
def test_mgda_definition(rows, seed):
    """w_t ∝ α_t / c_t with α minimal for the g_t / c_t: c_t w_t, scaled to sum 1, meets KKT."""
    losses = positive_losses(len(rows), seed)
    weights = mgda_weights(losses, rows @ rows.T)
    normaliser = losses * rows.norm(dim=1)
    live = normaliser >= 1e-12
    assert (weights[~live] == 0).all()
    if not live.any():
        assert (weights == 0).all()
        return
    assert abs(weights.sum().item() - 1) < 1e-12
    alpha = (weights * normaliser)[live]
    normalised = rows[live] / normaliser[live, None]
    check_minimum(alpha / alpha.sum(), normalised @ normalised.T)


@settings(deadline=None, max_examples=100)
@given(rows=vectors(), seed=st.integers(0, 2**31))
def test_mgda_lets_no_loss_rise(rows, seed):
    weights = mgda_weights(positive_losses(len(rows), seed), rows @ rows.T)
    direction = weights @ rows
    sizes = rows.norm(dim=1)
    # The weights are exact to rounding for the g_t / c_t, whose sizes (1 / losses) span a factor of 10,000.
    assert (rows @ direction >= -1e-7 * sizes * (weights * sizes).max()).all()


def test_mgda_scales():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    losses = positive_losses(4, seed=1)
    weights = mgda_weights(losses, rows @ rows.T)
    torch.testing.assert_close(mgda_weights(7 * losses, rows @ rows.T), weights)
    torch.testing.assert_close(mgda_weights(losses, 49 * rows @ rows.T), weights)
    # A task's gradient scaled alone: the normaliser takes it out, and the direction stays.
    scaled = rows * torch.tensor([[1.0], [1e3], [1.0], [1e-3]], dtype=torch.float64)
    direction = mgda_weights(losses, scaled @ scaled.T) @ scaled
    torch.testing.assert_close(direction / direction.norm(), weights @ rows / (weights @ rows).norm())
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(mgda_weights(losses[order], rows[order] @ rows[order].T), weights[order])
    # Squared norms far past 1e8, where the published solver crashes.
    torch.testing.assert_close(mgda_weights(losses, 1e20 * rows @ rows.T), weights)


def test_orthogonal_gradients_in_closed_form():
    """α_t ∝ c_t² / ‖g_t‖² = L_t², so w_t ∝ L_t / ‖g_t‖."""
    rows = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    losses = torch.tensor([4.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    want = losses / rows.diagonal()
    torch.testing.assert_close(mgda_weights(losses, rows @ rows.T), want / want.sum())


def test_batches_are_independent_problems():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)
    losses = torch.rand(2, 5, 4, generator=generator, dtype=torch.float64)
    losses[1, 2, 0] = torch.nan
    rows[0, 3, 1] = 0
    gram = rows @ rows.mT
    weights = mgda_weights(losses, gram)
    for i in range(2):
        for j in range(5):
            torch.testing.assert_close(weights[i, j], mgda_weights(losses[i, j], gram[i, j]))
    assert (weights[1, 2] == 0).all() and weights[0, 3, 1] == 0
    assert mgda_weights(losses[:0], gram[:0]).shape == (0, 5, 4)


def test_dead_tasks_leave_the_hull():
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    losses = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(
        mgda_weights(losses, rows @ rows.T), torch.tensor([0.5, 0, 0.5], dtype=torch.float64)
    )
    assert (mgda_weights(torch.zeros(3), rows @ rows.T) == 0).all()
    solved = torch.tensor([1.0, 1.0, 0.0])
    assert mgda_weights(solved, rows @ rows.T).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite(method, bad):
    losses, gram = torch.ones(3), torch.eye(3)
    balance = Balance(method, 3)
    want, finite = balance.weigh(losses, gram)
    assert finite and want.sum() > 0
    state = balance.state_dict()
    for place in ("loss", "gram"):
        broken_losses, broken_gram = losses.clone(), gram.clone()
        (broken_losses if place == "loss" else broken_gram)[1] = bad
        weights, finite = balance.weigh(broken_losses, broken_gram)
        assert not finite and (weights == 0).all()
    assert all(torch.equal(state[k], v) for k, v in balance.state_dict().items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: min_norm_weights(torch.eye(6)), r"min_norm_weights: gram must be \(\.\.\., T, T\)"),
        (lambda: min_norm_weights(torch.ones(3)), "min_norm_weights: gram must be"),
        (lambda: mgda_weights(torch.ones(3), torch.ones(3, 2)), "mgda_weights: gram must be"),
        (lambda: mgda_weights(torch.ones(2), torch.eye(3)), r"losses must be \(3,\) as gram, got \(2,\)"),
        (lambda: Balance("pcgrad", 4), "method must be one of mgda, mgda_ema, sum, got 'pcgrad'"),
        (lambda: Balance("mgda", 6), "n_tasks must be 1 to 5, got 6"),
        (
            lambda: Balance("mgda", 3).load_state_dict(Balance("mgda", 4).state_dict()),
            r"must be \(3,\), got \(4,\)",
        ),
    ],
)
def test_refused_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ema_is_an_unbiased_mean_and_resumes():
    generator = torch.Generator().manual_seed(3)
    batches = [
        (torch.rand(4, generator=generator) + 0.1, torch.randn(4, 8, generator=generator)) for _ in range(6)
    ]
    smooth, plain = Balance("mgda_ema", 4), Balance("mgda", 4)
    seen = []
    for i, (losses, rows) in enumerate(batches):
        gram = rows @ rows.T
        seen.append(plain.weigh(losses, gram)[0])
        weights, _ = smooth.weigh(losses, gram)
        decays = 0.9 ** torch.arange(i, -1, -1, dtype=torch.float64)
        torch.testing.assert_close(weights, (decays[:, None] * torch.stack(seen)).sum(dim=0) / decays.sum())
        if i == 2:
            resumed = Balance("mgda_ema", 4)
            resumed.load_state_dict(smooth.state_dict())
        if i > 2:
            assert torch.equal(resumed.weigh(losses, gram)[0], weights)


class TinyEncoder(nn.Module):
    """Batch norm and a linear map of every hundredth point."""

    n_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(85)
        self.map = nn.Linear(85, self.n_features)
        self.n_calls = 0

    def forward(self, intensity: Tensor) -> Tensor:
        self.n_calls += 1
        return torch.tanh(self.map(self.norm(intensity[:, ::100])))


def tiny_model() -> SymmetryModel:
    torch.manual_seed(0)
    return SymmetryModel(TinyEncoder(), dict.fromkeys(TASKS, ()), preset="trial").double()


def tiny_batch(n_patterns: int, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    intensity = 100 * torch.rand(n_patterns, 8500, generator=generator, dtype=torch.float64)
    labels = {t: torch.randint(0, N_CLASSES[t], (n_patterns,), generator=generator) for t in TASKS}
    return intensity, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("method", METHODS)
def test_step_gives_the_stated_gradients(method, smoothing):
    model, (intensity, labels) = tiny_model(), tiny_batch(5)
    twin = copy.deepcopy(model)
    result = balanced_step(model, intensity, labels, Balance(method, 4), label_smoothing=smoothing)
    assert model.encoder.n_calls == 1 and result.finite

    features = twin.encode(intensity)
    logits = twin.classify(features)
    losses = [F.cross_entropy(getattr(logits, t), labels[t], label_smoothing=smoothing) for t in TASKS]
    rows = torch.stack(
        [torch.autograd.grad(loss, features, retain_graph=True)[0].flatten() for loss in losses]
    )
    weights = (
        torch.ones(4).double()
        if method == "sum"
        else mgda_weights(torch.stack(losses).detach(), rows @ rows.T)
    )
    torch.testing.assert_close(result.losses, torch.stack(losses).detach())
    torch.testing.assert_close(result.weights, weights)
    encoder_loss = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    names = dict(twin.encoder.named_parameters())
    for name, gradient in zip(
        names, torch.autograd.grad(encoder_loss, list(names.values()), retain_graph=True), strict=True
    ):
        torch.testing.assert_close(dict(model.encoder.named_parameters())[name].grad, gradient)
    for task, loss in zip(TASKS, losses, strict=True):
        want = torch.autograd.grad(loss, list(twin.heads[task].parameters()), retain_graph=True)
        for parameter, gradient in zip(model.heads[task].parameters(), want, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("where", ["input", "overflow"])
def test_step_on_broken_batch_changes_nothing(where):
    model, (intensity, labels) = tiny_model(), tiny_batch(4)
    if where == "input":
        intensity[1, 200] = torch.nan
    else:
        with torch.no_grad():
            model.heads["point_group"][0].weight[3].fill_(torch.inf)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = balanced_step(model, intensity, labels, Balance("mgda", 4))
    assert not result.finite and (result.weights == 0).all()
    assert all((p.grad == 0).all() for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before if not n.endswith("num_batches_tracked"))


def test_step_refuses_missing_labels_and_another_balance():
    model, (intensity, labels) = tiny_model(), tiny_batch(2)
    with pytest.raises(ValueError, match="got none for point_group"):
        balanced_step(model, intensity, {t: labels[t] for t in TASKS[:3]}, Balance("sum", 4))
    with pytest.raises(ValueError, match="balance must be for 4 tasks, got 3"):
        balanced_step(model, intensity, labels, Balance("sum", 3))


def _one_process(rank: int, address: str, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = tiny_model().eval()  # batch norm apart, a batch of two halves is the batch
    intensity, labels = tiny_batch(6)
    half = slice(3 * rank, 3 * rank + 3)
    result = balanced_step(
        model, intensity[half], {t: v[half] for t, v in labels.items()}, Balance("mgda", 4)
    )
    gradients = [p.grad for p in model.parameters()]
    for gradient in gradients:
        distributed.all_reduce(gradient)
    if rank == 0:
        results.put([t.tolist() for t in (result.losses, result.weights, *(g / 2 for g in gradients))])
    distributed.destroy_process_group()


def test_two_processes_take_the_weights_of_the_whole_batch(tmp_path):
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    model = tiny_model().eval()
    intensity, labels = tiny_batch(6)
    result = balanced_step(model, intensity, labels, Balance("mgda", 4))
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    multiprocessing.spawn(_one_process, (f"file://{tmp_path}/rendezvous", results), nprocs=2)
    want = [result.losses, result.weights, *(p.grad for p in model.parameters())]
    for got, expected in zip(results.get(), want, strict=True):
        torch.testing.assert_close(torch.tensor(got, dtype=expected.dtype), expected, rtol=1e-10, atol=1e-12)


def test_step_under_autocast_keeps_float32_losses():
    model, (intensity, labels) = tiny_model().float(), tiny_batch(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = balanced_step(model, intensity.float(), labels, Balance("mgda", 4))
    assert result.finite and result.losses.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in model.parameters())
    exact = balanced_step(tiny_model(), intensity, labels, Balance("mgda", 4))
    torch.testing.assert_close(result.weights.double(), exact.weights, rtol=0, atol=0.05)
