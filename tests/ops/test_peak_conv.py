"""Convolutions over rows: equal to dense layers, in values, statistics and all gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.ops.gpu_runs import on_a_gpu
from tests.ops.row_lists import (
    EPS,
    all_of_norm,
    by_layers,
    by_rows,
    norm_call,
    norm_case,
    parameters,
    rng,
    sticks,
)
from xrdfast import _native
from xrdfast.ops import peak_conv as conv_ops
from xrdfast.ops import peak_norm as norm_ops
from xrdfast.ops.peak_conv import peak_conv, peak_stage
from xrdfast.ops.peak_norm import peak_norm
from xrdfast.ops.peak_plan import plan_rows


@pytest.fixture(params=["native", "reference"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Through the CPU kernels, or through the references alone."""
    if request.param == "reference":
        monkeypatch.setattr(_native, "cpu", lambda: None)
    else:
        assert _native.cpu() is not None
    return request.param


class Kernels(NamedTuple):
    """The operators of one backend, from and to the CPU."""

    conv: Callable[..., Tensor]
    conv_weight: Callable[..., Tensor]
    stage: Callable[..., Tensor]


@pytest.fixture
def kernels(backend: str, request: pytest.FixtureRequest) -> Kernels:
    if backend == "cpu":
        return Kernels(conv_ops._conv_cpu, conv_ops._conv_weight_cpu, conv_ops._stage_cpu)
    on_device = conv_ops._conv_on_device, conv_ops._conv_weight_on_device, conv_ops._stage_on_device
    if backend == "emu":
        module = request.getfixturevalue("emulated")
        return Kernels(*(functools.partial(function, module) for function in on_device))

    def there(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*given: object) -> Tensor:
            moved = [x.cuda() if isinstance(x, Tensor) else x for x in given]
            return on_a_gpu(lambda: [function(_native.cuda(), *moved)])[0]

        return call

    return Kernels(*map(there, on_device))


@pytest.mark.parametrize("batch", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("packed_stages", [0, 1, 2, 3])
@pytest.mark.parametrize(("n_patterns", "length"), [(1, 200), (3, 131), (7, 200), (64, 33)])
def test_a_stack_equals_dense_layers(
    mode, n_patterns: int, length: int, packed_stages: int, batch: bool
) -> None:
    """Values, statistics and the gradient of every parameter; packed stages are packed where there is a gain."""
    intensity, blocks = sticks(n_patterns, length), parameters()
    want, want_statistics = by_layers(intensity, blocks, batch)
    got, statistics, stages = by_rows(intensity, blocks, batch, packed_stages)
    packed = [stage.count is not None for stage in stages]
    if length == 200 and n_patterns > 1:
        assert packed == [i < packed_stages for i in range(3)]
    if n_patterns == 1:
        assert not any(packed)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    for mine, theirs in zip(statistics, want_statistics, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    cotangent = torch.randn(want.shape, generator=rng(3), dtype=want.dtype)
    learned = [p for block in blocks for p in block.values() if p.requires_grad]
    for mine, theirs in zip(
        torch.autograd.grad(got, learned, cotangent),
        torch.autograd.grad(want, learned, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shift", [0, 1, 3, -1, -4, 50, 120])
@pytest.mark.parametrize(
    ("n_rows", "n_in", "n_out"),
    [
        (0, 2, 3),
        (1, 1, 1),
        (31, 2, 32),
        (97, 33, 40),
        (250, 64, 128),
        (100, 8, 150),
        (600, 8, 150),
        (601, 136, 24),
        (1100, 36, 5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolution_equals_the_reference(
    kernels, dtype, n_rows: int, n_in: int, n_out: int, shift: int
) -> None:
    """Also from strided inputs; the parity rule in float32. The widest go by Winograd's tiles, or the library."""
    generator = rng(n_rows)
    x, w, g = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((n_rows, 2 * n_in), (n_out, n_in, 3), (n_rows, n_out))
    )
    x, w = x[:, ::2], w.permute(2, 1, 0)
    single = [t.to(dtype) for t in (x, w, g)]
    want = [conv_ops.peak_conv_reference(x, w, shift), conv_ops.peak_conv_weight_reference(x, g, shift)]
    plain = [
        conv_ops.peak_conv_reference(single[0], single[1], shift),
        conv_ops.peak_conv_weight_reference(single[0], single[2], shift),
    ]
    got = [
        kernels.conv(single[0], single[1], shift),
        kernels.conv_weight(single[0], single[2], shift),
    ]
    epsilon = torch.finfo(dtype).eps
    for mine, usual, exact in zip(got, plain, want, strict=True):
        assert mine.shape == exact.shape
        if exact.numel() == 0:
            continue
        bound = 2 * (usual - exact).abs().max() + 16 * epsilon * exact.abs().max()
        assert (mine - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n_patterns", "length", "packed"), [(1, 200, 0), (7, 200, 1), (3, 131, 0), (20, 700, 1)]
)
@pytest.mark.parametrize(("n_in", "width"), [(2, 8), (40, 40), (32, 64), (8, 150)])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_a_whole_stage_equals_its_parts(
    kernels, backend, dtype, pool, n_in: int, width: int, n_patterns, length, packed
) -> None:
    """In evaluation mode; lists of more rows than one piece, packed and dense, thin and wide."""
    if backend == "emu" and length * width > 20000:
        length //= 7  # it is slow
    intensity = sticks(n_patterns, length)
    stage = plan_rows(intensity, (int(pool == "mean"),), packed_stages=packed).stages[0]
    assert (stage.count is not None) == bool(packed)
    n_rows = stage.n_touched if stage.count is None else len(stage.count)
    generator = rng(width)
    shapes = [(n_rows, n_in), (3, n_in, width), (3, width, width), (n_in, width), *[(width,)] * 4]
    exact = [torch.randn(*s, generator=generator, dtype=torch.float64) / max(1, s[0]) ** 0.25 for s in shapes]
    results = []
    for kind, run in (
        (torch.float64, conv_ops.peak_stage_reference),
        (dtype, conv_ops.peak_stage_reference),
        (dtype, kernels.stage),
    ):
        x, first, second, widen, *channels = (t.to(kind) for t in exact)
        settings = (stage.halo, stage.pairs, stage.shift, stage.n_touched, pool == "max")
        results.append(run(x, first, second, None if n_in == width else widen, *channels, *settings))
    want, usual, got = results
    bound = 2 * (usual - want).abs().max() + 16 * torch.finfo(dtype).eps * want.abs().max()
    assert (got - want).abs().max() <= bound


def test_numbers_do_not_depend_on_threads() -> None:
    stage, tensors = norm_case(6, 40, "max", True, torch.float32)
    arguments = norm_call(stage, tensors, "max", True, True)
    x, w = torch.randn(3000, 24, generator=rng(1)), torch.randn(3, 24, 40, generator=rng(2))
    g = torch.randn(3000, 40, generator=rng(3))
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(
                [
                    *all_of_norm(norm_ops._norm_cpu, norm_ops._norm_backward_cpu, arguments),
                    conv_ops._conv_cpu(x, w, 1),
                    conv_ops._conv_weight_cpu(x, g, 1),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("pool", [None, "max", "mean"])
def test_gradcheck(pool) -> None:
    """The kernels' own backward, in float64, for a batch norm over packed rows."""
    stage = plan_rows(sticks(7, 40, n_peaks=1)[:5], (0, 0), packed_stages=1).stages[0]
    assert stage.count is not None
    n_rows = len(stage.count)
    h, gamma, beta, residual = (
        torch.randn(*s, generator=rng(4), dtype=torch.float64).requires_grad_()
        for s in ((n_rows, 2), (2,), (2,), (n_rows, 2))
    )
    inner = (stage.count > 0)[:, None]  # what a halo holds is of no use, and has no gradient

    def normed(h, gamma, beta, residual):
        h = torch.where(inner, h, h.detach())
        return peak_norm(
            h, gamma, beta, stage, statistics=None, eps=EPS, residual=residual * inner, pool=pool
        ).out

    assert torch.autograd.gradcheck(normed, (h, gamma, beta, residual))
    x = torch.randn(9, 2, generator=rng(5), dtype=torch.float64).requires_grad_()
    w = torch.randn(3, 2, 4, generator=rng(6), dtype=torch.float64).requires_grad_()
    for shift in (2, -2):
        assert torch.autograd.gradcheck(lambda x, w, s=shift: peak_conv(x, w, s), (x, w))
        assert torch.autograd.gradgradcheck(lambda x, w, s=shift: peak_conv(x, w, s), (x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype) -> None:
    x = torch.randn(30, 4, dtype=dtype).requires_grad_()
    w = torch.randn(3, 4, 5, dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.xrdfast.peak_conv, (x, w, 1))
    g = torch.randn(30, 5, dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.xrdfast.peak_conv_weight, (x, g, 1))
    for pool, packed in ((None, True), ("max", True), ("mean", False)):
        stage, tensors = norm_case(7, 3, pool, packed, dtype)
        arguments = norm_call(stage, [t.requires_grad_() for t in tensors], pool, True, True)
        torch.library.opcheck(torch.ops.xrdfast.peak_norm, arguments)
        h, residual, gamma, beta, _, _, *settings = (
            x.detach() if isinstance(x, Tensor) else x for x in arguments
        )
        strided = h.T.contiguous().T
        out, mean, var = torch.ops.xrdfast.peak_norm(strided, residual, gamma, beta, None, None, *settings)
        given = (out, strided, residual, gamma, beta, mean, var, *settings, True)
        torch.library.opcheck(torch.ops.xrdfast.peak_norm_backward, given)
    stage = plan_rows(sticks(7, 200), (0, 1), packed_stages=1).stages[0]
    shapes = [(len(stage.count), 4), (3, 4, 6), (3, 6, 6), (4, 6), *[(6,)] * 4]
    tensors = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    settings = (stage.halo, stage.pairs, stage.shift, stage.n_touched, True)
    torch.library.opcheck(torch.ops.xrdfast.peak_stage, (*tensors, *settings))


@pytest.mark.long
def test_compiles() -> None:
    stage, tensors = norm_case(8, 4, "max", True, torch.float32)
    w = torch.randn(3, 4, 4)

    @torch.compile(fullgraph=True)
    def block(h, gamma, beta, residual):
        return peak_norm(
            peak_conv(h, w, 1), gamma, beta, stage, statistics=None, eps=EPS, residual=residual, pool="max"
        ).out

    h, gamma, beta, residual = tensors
    want = peak_norm(
        peak_conv(h, w, 1), gamma, beta, stage, statistics=None, eps=EPS, residual=residual, pool="max"
    ).out
    torch.testing.assert_close(block(h, gamma, beta, residual), want)


def test_autocast_casts_the_convolution_as_products() -> None:
    x, w = torch.randn(20, 8), torch.randn(3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = peak_conv(x, w, 1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), peak_conv(x, w, 1), rtol=0.05, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            peak_conv(x.double(), w.double(), 1).dtype == (x.double() @ w[1].double()).dtype == torch.float64
        )


def test_autocast_changes_nothing_in_a_whole_stage() -> None:
    """Wide ones go operator by operator, one dtype all through."""
    given = stage_case(8, 150)
    want = peak_stage(*given, pool="max")
    with torch.autocast("cpu", torch.bfloat16):
        got = peak_stage(*given, pool="max")
    assert torch.equal(got, want)


def stage_case(n_in: int, width: int) -> tuple:
    """Arguments of `peak_stage` but the pool."""
    stage = plan_rows(sticks(7, 200), (0,), packed_stages=1).stages[0]
    shapes = [(len(stage.count), n_in), (3, n_in, width), (3, width, width), (n_in, width), *[(width,)] * 4]
    x, first, second, widen, *channels = (torch.randn(*s, generator=rng(i)) for i, s in enumerate(shapes))
    return x, first, second, widen, [channels[:2], channels[2:]], stage


def test_twenty_steps_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convergence: the same losses, float32, through the kernels and through the references.

    Rounding grows from step to step: 1e-7 of the first loss, 1.4e-4 of the last was measured.
    """
    losses = []
    for native in (True, False):
        with monkeypatch.context() as patch:
            if not native:
                patch.setattr(_native, "cpu", lambda: None)
            blocks = parameters(torch.float32)
            optimizer = torch.optim.SGD([p for b in blocks for p in b.values() if p.requires_grad], lr=0.05)
            losses.append([])
            for step in range(20):
                intensity = sticks(12, 200 + step % 2, dtype=torch.float32)
                out, _, stages = by_rows(intensity, blocks, batch=True, packed_stages=3)
                assert stages[0].count is not None
                loss = (out.amax(2) - torch.linspace(0, 1, 12)[:, None]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    assert losses[0][-1] < 0.8 * losses[0][0]


@pytest.mark.parametrize("order", ["0", "1", "7"])
def test_device_code_in_any_order_of_threads(emulated, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, whichever thread runs first; the parts of the weights' gradient included."""
    generator = rng(3)
    x, w, g = (torch.randn(*s, generator=generator) for s in ((1100, 20), (3, 20, 40), (1100, 40)))

    def run() -> list[Tensor]:
        return [
            conv_ops._conv_on_device(emulated, x, w, 3),
            conv_ops._conv_weight_on_device(emulated, x, g, 3),
        ]

    monkeypatch.delenv("CUEMU_ORDER", raising=False)
    want = run()
    monkeypatch.setenv("CUEMU_ORDER", order)
    for mine, theirs in zip(run(), want, strict=True):
        assert torch.equal(mine, theirs)


def test_nan_and_infinity_reach_their_neighbours_only(kernels) -> None:
    x, w = torch.randn(40, 3, generator=rng(1)), torch.randn(3, 3, 5, generator=rng(2))
    clean = kernels.conv(x, w, 1)
    x[7, 1], x[20, 0] = torch.nan, torch.inf
    got = kernels.conv(x, w, 1)
    spoilt = ~got.isfinite().all(1)
    assert spoilt.nonzero().flatten().tolist() == [6, 7, 8, 19, 20, 21]
    assert torch.equal(got[~spoilt], clean[~spoilt])


@pytest.mark.gpu
def test_operators_on_a_gpu(gpu) -> None:
    """Through the dispatcher: the kernels where they are thin, and the library where they are wide."""
    for n_in, n_out in ((20, 40), (128, 256)):
        x, w = torch.randn(700, n_in, generator=rng(1)), torch.randn(3, n_in, n_out, generator=rng(2))
        results = []
        for device in ("cpu", "cuda"):
            leaves = [t.to(device).requires_grad_() for t in (x, w)]
            out = peak_conv(*leaves, 7)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for mine, theirs in zip(*reversed(results), strict=True):
            assert mine.is_cuda
            largest = float(theirs.detach().abs().max())  # sums of up to 768 products, some of which cancel
            torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: peak_conv(torch.zeros(4), torch.zeros(3, 1, 1), 1), "peak_conv: x must be"),
        (lambda: peak_conv(torch.zeros(4, 2), torch.zeros(3, 1, 1), 1), "peak_conv: weight must be"),
        (lambda: peak_conv(torch.zeros(4, 1), torch.zeros(3, 1, 1).double(), 1), "peak_conv: weight must be"),
        (lambda: bad_stage("halo"), "peak_stage: stage.halo must be on cpu, got meta"),
        (lambda: bad_stage("pairs"), "peak_stage: stage.pairs must be on cpu, got meta"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def bad_stage(elsewhere: str) -> None:
    *given, stage = stage_case(2, 8)
    peak_stage(*given, stage._replace(**{elsewhere: getattr(stage, elsewhere).to("meta")}), pool="max")


def test_backward_inside_autocast_keeps_the_precision_of_the_forward() -> None:
    """Wider than the native kernels and too short for tiles: library products, which autocast would round."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 130, generator=generator, requires_grad=True)
    weight = torch.randn(3, 130, 130, generator=generator, requires_grad=True)
    loss = peak_conv(x, weight, 2).square().sum()
    want = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, (x, weight))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)
