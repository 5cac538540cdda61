"""Norm, residual, activation and pool over lists of rows: native and device code against the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.gpu_runs import on_a_gpu
from tests.ops.row_lists import EPS, all_of_norm, norm_call, norm_case, rng
from xrdfast import _native
from xrdfast.ops import peak_norm as norm_ops
from xrdfast.ops.peak_norm import peak_norm
from xrdfast.ops.peak_plan import plan_rows


@pytest.fixture
def kernels(backend: str, request: pytest.FixtureRequest) -> tuple[Callable, Callable]:
    """Forward and backward of one backend, from and to the CPU."""
    if backend == "cpu":
        return norm_ops._norm_cpu, norm_ops._norm_backward_cpu
    on_device = norm_ops._norm_on_device, norm_ops._norm_backward_on_device
    if backend == "emu":
        module = request.getfixturevalue("emulated")
        return tuple(functools.partial(function, module) for function in on_device)

    def there(function: Callable) -> Callable:
        def call(*given: object) -> list[Tensor]:
            moved = [x.cuda() if isinstance(x, Tensor) else x for x in given]
            return on_a_gpu(lambda: function(_native.cuda(), *moved))

        return call

    return tuple(map(there, on_device))


CASES = [
    (pool, packed, batch, residual)
    for pool in (None, "max", "mean")
    for packed in (False, True)
    for batch in (False, True)
    for residual in (False, True)
]


@pytest.mark.parametrize(("pool", "packed", "batch", "residual"), CASES)
@pytest.mark.parametrize("n_channels", [1, 16, 35])
def test_norm_equals_the_reference(n_channels: int, pool, packed: bool, batch: bool, residual: bool) -> None:
    stage, tensors = norm_case(5, n_channels, pool, packed)
    arguments = norm_call(stage, tensors, pool, batch, residual)
    want = all_of_norm(norm_ops.peak_norm_reference, norm_ops.peak_norm_backward_reference, arguments)
    got = all_of_norm(norm_ops._norm_cpu, norm_ops._norm_backward_cpu, arguments)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("pool", "packed", "batch", "residual"), CASES)
def test_backward_reference_is_autograd(pool, packed: bool, batch: bool, residual: bool) -> None:
    stage, tensors = norm_case(5, 16, pool, packed)
    arguments = norm_call(stage, tensors, pool, batch, residual)
    for tensor in tensors:
        tensor.requires_grad_()
    out, mean, var = norm_ops.peak_norm_reference(*arguments)
    h, rest, gamma, beta, _, _, *settings = arguments
    cotangent = torch.randn(out.shape, generator=rng(9), dtype=out.dtype)
    inputs = [h, *([rest] if residual else []), gamma, beta]
    want = torch.autograd.grad(out, inputs, cotangent)
    with torch.no_grad():
        got = norm_ops.peak_norm_backward_reference(
            cotangent, h, rest, gamma, beta, mean, var, *settings, batch
        )
    for mine, theirs in zip(got if residual else (got[0], *got[2:]), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("pool", [None, "max", "mean"])
def test_blank_rows_where_every_pattern_has_its_own_pass_gradients(kernels, pool) -> None:
    """They stand for no sample, but for the inputs of the blank rows beside them."""
    intensity = torch.zeros(2, 300, dtype=torch.float64)
    intensity[:, 150] = 1.0
    stage = plan_rows(intensity, (0, 0), packed_stages=2).stages[0]
    assert stage.count is not None
    covered = stage.n_touched + 1 + 150
    assert stage.count[covered] == 0
    tensors = [torch.randn(s, 5, generator=rng(3), dtype=torch.float64) for s in (len(stage.count), 1, 1)]
    h, gamma, beta = tensors[0], tensors[1][0], tensors[2][0]
    arguments = norm_call(stage, [h, gamma, beta, h.flip(0)], pool, True, True)
    want = all_of_norm(norm_ops.peak_norm_reference, norm_ops.peak_norm_backward_reference, arguments)
    got = all_of_norm(*kernels, arguments)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    assert float(got[3][covered].abs().max()) > 0


@pytest.mark.parametrize("order", ["0", "1", "7"])
@pytest.mark.parametrize(("pool", "packed", "batch", "residual"), CASES)
def test_device_code_equals_the_reference(
    emulated, order: str, pool, packed: bool, batch: bool, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA sources on the emulator, in several thread orders."""
    monkeypatch.setenv("CUEMU_ORDER", order)
    stage, tensors = norm_case(5, 35, pool, packed)
    arguments = norm_call(stage, tensors, pool, batch, residual)
    want = all_of_norm(norm_ops.peak_norm_reference, norm_ops.peak_norm_backward_reference, arguments)
    got = all_of_norm(
        lambda *a: norm_ops._norm_on_device(emulated, *a),
        lambda *a: norm_ops._norm_backward_on_device(emulated, *a),
        arguments,
    )
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_nan_and_infinity_pass_as_in_the_reference() -> None:
    """Batch statistics of a channel with an infinity are not finite; which of them is inf and which NaN is open."""
    stage, tensors = norm_case(9, 3, "max", True)
    tensors[0][5, 0], tensors[0][9, 1], tensors[0][14, 2] = torch.nan, torch.inf, -torch.inf
    for batch in (False, True):
        arguments = norm_call(stage, tensors, "max", batch, True)
        got, want = norm_ops._norm_cpu(*arguments), norm_ops.peak_norm_reference(*arguments)
        torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-11, equal_nan=True)
        for mine, theirs in zip(got[1:], want[1:], strict=True):
            assert torch.equal(mine.isfinite(), theirs.isfinite())


def test_second_derivatives_are_refused() -> None:
    stage, (h, gamma, beta, _) = norm_case(5, 3, "max", True)
    out = peak_norm(h.requires_grad_(), gamma, beta, stage, statistics=None, eps=EPS, pool="max").out
    (gradient,) = torch.autograd.grad(out.square().sum(), h, create_graph=True)
    with pytest.raises(NotImplementedError, match="peak_norm: second derivatives"):
        gradient.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize(("pool", "packed"), [(None, True), ("max", True), ("mean", False)])
def test_on_a_gpu(gpu, pool, packed: bool) -> None:
    stage, tensors = norm_case(7, 35, pool, packed, torch.float32)
    arguments = norm_call(stage, tensors, pool, True, True)
    want = all_of_norm(norm_ops._norm_cpu, norm_ops._norm_backward_cpu, arguments)
    there = tuple(x.cuda() if isinstance(x, Tensor) else x for x in arguments)
    cotangent = torch.randn(want[0].shape, generator=rng(9), dtype=torch.float64).float().cuda()

    def call() -> list[Tensor]:
        out, mean, var = norm_ops._norm_cuda(*there)
        h, residual, gamma, beta, given, _, *settings = there
        grads = norm_ops._norm_backward_cuda(
            cotangent, h, residual, gamma, beta, mean, var, *settings, given is None
        )
        return [out, mean, var, *grads]

    for mine, theirs in zip(on_a_gpu(call), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bad_norm(h=torch.zeros(3, 2)), "peak_norm: h must be"),
        (lambda: bad_norm(gamma=torch.zeros(3)), "peak_norm: gamma must be"),
        (lambda: bad_norm(beta=torch.zeros(2).double()), "peak_norm: beta must be"),
        (lambda: bad_norm(residual=torch.zeros(4, 3)), "peak_norm: residual must be"),
        (lambda: bad_norm(statistics=(torch.zeros(2), torch.zeros(3))), "peak_norm: variance must be"),
        (lambda: bad_norm(pool="sum"), "peak_norm: pool must be"),
        (lambda: bad_norm("pairs"), "peak_norm: stage.pairs must be on cpu, got meta"),
        (lambda: bad_norm("count"), "peak_norm: stage.count must be on cpu, got meta"),
        (
            lambda: peak_norm(
                torch.zeros(1, 2),
                torch.ones(2),
                torch.zeros(2),
                plan_rows(torch.zeros(1, 1), (1,)).stages[0],
                statistics=None,
                eps=EPS,
            ),
            "peak_norm: batch statistics must be over 2 samples",
        ),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def bad_norm(elsewhere: str | None = None, **changed) -> None:
    stage = plan_rows(torch.zeros(2, 2), (0,)).stages[0]._replace(count=torch.ones(4))
    if elsewhere:
        stage = stage._replace(**{elsewhere: getattr(stage, elsewhere).to("meta")})
    given = {
        "h": torch.zeros(4, 2),
        "gamma": torch.ones(2),
        "beta": torch.zeros(2),
        "statistics": None,
        "eps": EPS,
    }
    given |= changed
    peak_norm(given.pop("h"), given.pop("gamma"), given.pop("beta"), stage, **given)
