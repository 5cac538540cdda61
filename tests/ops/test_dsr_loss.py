"""The ranked-output loss: every backend against float64, its gradient, its edges and its invariances."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.ops.gpu_runs import on_a_gpu
from xrdfast import _native
from xrdfast.ops import dsr_loss as dsr
from xrdfast.ops.dsr_loss import MAX_HEAD_CLASSES, dsr_loss, dsr_loss_reference

HEADS = (0, 230, 237, 243, 275)  # space groups, crystal systems, centrings, point groups
INFINITY = float("inf")


@pytest.fixture(params=["cpu", "emu"])
def native(request: pytest.FixtureRequest) -> tuple[ModuleType, int]:
    """A native module, and its threads or stream."""
    if request.param == "emu":
        return request.getfixturevalue("emulated"), 0
    module = _native.cpu()
    assert module is not None, "the native module must build where tests run"
    return module, 2


def batch(
    n_patterns: int, n_classes: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits with ties, two zeros of either sign among them, and another batch's."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_patterns, n_classes, generator=generator) * 4.0
    logits[:, 1::3] = logits[:, 1::3].round()
    return logits.to(dtype), (torch.randn(n_patterns, n_classes, generator=generator) * 2.0).to(dtype)


def ranked(logits: Tensor, class_offset: tuple[int, ...]) -> Tensor:
    return dsr_loss_reference(logits, None, 1.0, class_offset)[1]


def assert_as_exact_as_the_reference(got: Tensor, want32: Tensor, want64: Tensor, epsilon: float) -> None:
    """At most twice the reference's own error in the same precision; the same NaN and infinities."""
    special = ~want64.isfinite()
    assert torch.equal(special, ~got.isfinite())
    assert torch.equal(want64[special].nan_to_num(), got[special].double().nan_to_num())
    error, allowed = ((x.double() - want64)[~special].abs() for x in (got, want32))
    if error.numel():
        assert error.max() <= 2.0 * allowed.max() + epsilon


def check(native: tuple, logits: Tensor, previous: Tensor | None, temperature: float, heads: tuple) -> None:
    """Forward and backward against the reference and its autograd."""
    where = (*native, logits, previous, temperature, heads)
    loss, ranks, slope = dsr._forward(*where)
    results, gradients = [], []
    generator = torch.Generator().manual_seed(1)
    grad_loss = torch.randn(loss.shape, generator=generator, dtype=loss.dtype).to(logits.device)
    for dtype in (logits.dtype, torch.float64):
        leaf = logits.to(dtype).requires_grad_()
        results.append(
            dsr_loss_reference(leaf, None if previous is None else previous.to(dtype), temperature, heads)
        )
        gradients += torch.autograd.grad(results[-1][0], leaf, grad_loss.to(results[-1][0].dtype))
    assert torch.equal(ranks.nan_to_num(nan=7e37), results[0][1].nan_to_num(nan=7e37))
    # A loss is T^2 times a difference of logarithms, each rounded; in double the yardstick is rounded too.
    scale = float(results[1][0].detach().nan_to_num(0.0, 0.0).abs().max()) if loss.numel() else 0.0
    rounding = torch.finfo(loss.dtype).eps * (16.0 if loss.dtype == torch.float64 else 1.0)
    losses = (result[0].detach() for result in results)
    assert_as_exact_as_the_reference(loss, *losses, rounding * (temperature**2 + scale))
    gradient = dsr._backward(*native, grad_loss, slope, heads, logits.dtype)
    assert gradient.dtype == logits.dtype
    assert_as_exact_as_the_reference(gradient, *gradients, rounding * temperature * 4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_patterns", [0, 1, 3, 9])
def test_four_heads_equal_the_reference(native, n_patterns: int, dtype: torch.dtype) -> None:
    logits, other = batch(n_patterns, HEADS[-1], dtype)
    check(native, logits, ranked(other, HEADS), 4.0, HEADS)


@pytest.mark.parametrize("n_classes", [1, 2, 6, 7, 31, 32, 33, 127, 230, 256, 257, MAX_HEAD_CLASSES])
def test_sizes(native, n_classes: int) -> None:
    for dtype in (torch.float32, torch.float64):
        logits, other = batch(3, n_classes, dtype, seed=n_classes)
        check(native, logits, ranked(other, (0, n_classes)), 1.7, (0, n_classes))


def test_nearly_equal_logits_are_ranked_to_the_last_bit(native) -> None:
    """The float ranking sorts by the first bits of a logit and then puts its neighbours right."""
    for n_classes in (9, 230, MAX_HEAD_CLASSES):
        generator = torch.Generator().manual_seed(n_classes)
        steps = torch.randint(0, 300, (4, n_classes), generator=generator) * 2.0**-23
        logits = torch.stack(
            [1.0 + steps[0], -1.0 - steps[1], steps[2] - 150 * 2.0**-23, 1.0 + steps[3].sort().values.flip(0)]
        )
        check(native, logits, ranked(logits.flip(0), (0, n_classes)), 4.0, (0, n_classes))


def test_every_thread_order_gives_the_same(emulated, order: str) -> None:
    logits, other = batch(2, HEADS[-1])
    check((emulated, 0), logits, ranked(other, HEADS), 4.0, HEADS)


@pytest.mark.parametrize(
    "row",
    [
        [0.0] * 5,
        [0.0, -0.0, 0.0, -0.0, 1.0],
        [3.0, 3.0, 1.0, 3.0, 1.0],
        [1e30, -1e30, 0.0, 1e-30, -1e-30],
        [1e-42, -1e-42, 0.0, 1e-45, 0.0],
        [1.0, math.nan, 2.0, -math.nan, 0.0],
        [INFINITY, 1.0, 0.0, -INFINITY, math.nan],
        [INFINITY, 1.0, 0.0, 1.0, 2.0],
        [-INFINITY, 1.0, -INFINITY, 1.0, 2.0],
        [-INFINITY] * 5,
    ],
)
@pytest.mark.parametrize("temperature", [4.0, 0.05])
def test_special_values(native, row: list[float], temperature: float) -> None:
    """As the row's own, as another's memory, and against the memory that is the same; at the first place of a batch."""
    plain = [0.3, -0.2, 1.5, 0.0, 0.1]
    for mine, other in ((row, plain), (plain, row), (row, row)):
        logits, previous = torch.tensor([mine, plain]), ranked(torch.tensor([other, plain]), (0, 5))
        check(native, logits, previous, temperature, (0, 5))


def test_what_infinities_mean() -> None:
    masked = torch.tensor([[-INFINITY, 1.0, 2.0]])
    full = torch.tensor([[-1.0, 1.0, 2.0]])
    assert dsr_loss(masked, full)[0].item() == INFINITY
    assert dsr_loss(masked, masked)[0].item() == 0.0
    same = dsr_loss(full, masked)[0].item()
    assert 0.0 < same < INFINITY


@pytest.mark.parametrize("backend", ["native", "reference"])
class TestPublicFunction:
    """Through dispatch and autograd, on both backends."""

    @pytest.fixture(autouse=True)
    def chosen(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if backend == "reference":
            monkeypatch.setenv("XRDFAST_BACKEND", "reference")
            monkeypatch.setattr(_native, "_modules", {})

    def test_gradient_in_double(self) -> None:
        logits, other = batch(3, 12, torch.float64)
        logits = (logits + 0.01 * torch.arange(12)).requires_grad_()  # no ties: there the ranking has a kink
        previous = ranked(other, (0, 7, 8, 12))
        for temperature in (1.0, 4.0):
            assert torch.autograd.gradcheck(
                lambda x, t=temperature: dsr_loss(x, previous, temperature=t, class_offset=(0, 7, 8, 12))[0],
                logits,
            )

    def test_ranks_carry_no_gradient_and_second_derivatives_are_refused(self) -> None:
        logits, other = batch(3, 12)
        loss, ranks = dsr_loss(logits.requires_grad_(), ranked(other, (0, 12)))
        assert (loss.requires_grad, ranks.requires_grad) == (True, False)
        (gradient,) = torch.autograd.grad(loss.square().sum(), logits, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            gradient.sum().backward()

    def test_first_batch_is_compared_with_itself(self) -> None:
        logits = batch(3, HEADS[-1])[0].requires_grad_()
        loss, ranks = dsr_loss(logits, None, class_offset=HEADS)
        assert not loss.detach().abs().max() > 1e-6
        loss.mean().backward()
        assert not logits.grad.abs().max() > 1e-8
        assert torch.equal(ranks, ranked(logits.detach(), HEADS))

    def test_the_order_of_classes_does_not_matter(self) -> None:
        logits, other = batch(4, 32)
        permutation = torch.randperm(32, generator=torch.Generator().manual_seed(2))
        previous = ranked(other, (0, 32))
        want, got = (
            dsr_loss(x.requires_grad_(), previous)[0] for x in (logits, logits[:, permutation].clone())
        )
        torch.testing.assert_close(got, want, rtol=0, atol=0)

    @pytest.mark.parametrize("layout", ["rows", "columns", "transposed", "expanded"])
    def test_layouts(self, layout: str) -> None:
        logits, other = batch(4, 32)
        spread: dict[str, Callable[[Tensor], Tensor]] = {
            "rows": lambda x: torch.cat([x, x], dim=1)[:, 32:],
            "columns": lambda x: torch.stack([x, x], dim=2)[..., 1],
            "transposed": lambda x: x.T.contiguous().T,
            "expanded": lambda x: x[:1].expand(4, 32),
        }
        previous = ranked(other, (0, 32))
        given = [spread[layout](x) for x in (logits, previous)]
        results = (
            torch.ops.xrdfast.dsr_loss(*x, 2.0, [0, 32]) for x in (given, [x.contiguous() for x in given])
        )
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda x: (x * torch.arange(1.0, 5.0)).sum()])
    def test_gradients_of_reductions(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Upstream gradients come expanded, without memory of their own."""
        logits, other = batch(5, HEADS[-1])
        previous = ranked(other, HEADS)
        gradients = []
        for function in (dsr_loss_reference, torch.ops.xrdfast.dsr_loss):
            leaf = logits.clone().requires_grad_()
            reduce(function(leaf, previous, 4.0, HEADS)[0]).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("previous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype, previous: bool) -> None:
    logits, other = batch(5, 19, dtype)
    heads = [0, 12, 13, 19]
    memory = ranked(other, tuple(heads)) if previous else None
    torch.library.opcheck(torch.ops.xrdfast.dsr_loss.default, (logits.requires_grad_(), memory, 4.0, heads))
    loss, _, slope = torch.ops.xrdfast.dsr_loss(logits.detach(), memory, 4.0, heads)
    given = (torch.ones_like(loss), slope, heads, dtype)
    torch.library.opcheck(torch.ops.xrdfast.dsr_loss_backward.default, given)


def test_compiles_whole() -> None:
    logits, other = batch(5, HEADS[-1])
    previous = ranked(other, HEADS)
    step = torch.compile(
        lambda x: dsr_loss(x, previous, class_offset=HEADS)[0].mean(), fullgraph=True, backend="aot_eager"
    )
    gradients = []
    for function in (step, lambda x: dsr_loss(x, previous, class_offset=HEADS)[0].mean()):
        leaf = logits.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_a_loss_that_nobody_uses_gives_no_gradient() -> None:
    class Ignore(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    logits, other = batch(3, 9)
    leaf = logits.requires_grad_()
    Ignore.apply(dsr_loss(leaf, ranked(other, (0, 9)))[0]).sum().backward()
    assert leaf.grad is None


def test_twenty_steps_descend_as_with_the_reference() -> None:
    """A small classifier regularised by its own ranked outputs: the losses agree along the way."""
    courses = []
    for function in (dsr_loss_reference, torch.ops.xrdfast.dsr_loss):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, HEADS[-1]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        memory, course = None, []
        for _ in range(20):
            features, labels = torch.randn(16, 8), torch.randint(230, (16,))
            logits = model(features)
            loss, memory, _ = function(logits, memory, 4.0, HEADS)
            total = torch.nn.functional.cross_entropy(logits[:, :230], labels) + loss.mean()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            course.append(total.item())
        courses.append(torch.tensor(course))
    assert courses[0][1:].std() > 0.01
    torch.testing.assert_close(*courses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(3)}, ValueError, r"logits must be \(n_patterns, n_classes\), got \(3,\)"),
        ({"logits": torch.zeros(())}, ValueError, "logits must be"),
        ({"logits": torch.zeros(2, 3).half()}, TypeError, "logits must be .* got torch.float16"),
        ({"logits": torch.zeros(2, 3).int()}, TypeError, "got torch.int32"),
        ({"previous_ranked": torch.zeros(1, 3)}, ValueError, r"previous_ranked must be \(2, 3\)"),
        (
            {"previous_ranked": torch.zeros(2, 3).bfloat16()},
            TypeError,
            "previous_ranked must be torch.float32",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be"),
        ({"class_offset": (0, 2)}, ValueError, r"class_offset must rise from 0 to 3 .* got \[0, 2\]"),
        ({"class_offset": (0, 2, 2, 3)}, ValueError, "class_offset must rise"),
        ({"class_offset": (1, 3)}, ValueError, "class_offset must rise"),
        ({"class_offset": ()}, ValueError, "class_offset must rise"),
        ({"class_offset": (0,)}, ValueError, "class_offset must rise"),
        ({"logits": torch.zeros(2, 0), "previous_ranked": None}, ValueError, "class_offset must rise"),
        (
            {"logits": torch.zeros(2, 1025), "previous_ranked": None},
            ValueError,
            "heads of 1 to 1,024 classes",
        ),
        (
            {"logits": torch.zeros(2, 9), "previous_ranked": None, "class_offset": range(10)},
            ValueError,
            "1 to 8 heads",
        ),
    ],
)
def test_bad_arguments_are_named(changes: dict, error: type, message: str) -> None:
    given = {"logits": torch.zeros(2, 3), "previous_ranked": torch.zeros(2, 3), "temperature": 1.0} | changes
    with pytest.raises(error, match=f"dsr_loss: .*{message}"):
        dsr_loss(given.pop("logits"), given.pop("previous_ranked"), **given)


def test_the_backward_checks_what_it_gets() -> None:
    given = [torch.zeros(2, 1), torch.zeros(2, 3), [0, 3], torch.bfloat16]
    backward = torch.ops.xrdfast.dsr_loss_backward
    assert backward(*given).dtype == torch.bfloat16
    for at, wrong, error, name in (
        (0, torch.zeros(2, 2), ValueError, "grad_loss"),
        (1, torch.zeros(2, 3, dtype=torch.float64), ValueError, "slope"),
        (2, [0, 4], ValueError, "class_offset"),
        (3, torch.float16, TypeError, "dtype"),
    ):
        with pytest.raises(error, match=f"dsr_loss_backward: {name} must"):
            backward(*[wrong if i == at else x for i, x in enumerate(given)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_a_gpu(gpu, dtype: torch.dtype) -> None:
    module = _native.cuda()
    logits, other = batch(512, HEADS[-1], dtype)
    logits, previous = logits.cuda(), ranked(other, HEADS).cuda()

    def step(leaf: Tensor) -> list[Tensor]:
        results = dsr_loss(leaf, previous, class_offset=HEADS)
        return [*results, *torch.autograd.grad(results[0].mean(), leaf)]

    leaf = logits.clone().requires_grad_()
    on_a_gpu(lambda: step(leaf))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        check((module, stream.cuda_stream), logits, previous, 4.0, HEADS)
