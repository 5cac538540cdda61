"""Row plans, convolutions and norms over rows: equal to dense layers, in values, statistics and all gradients."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xrdfast import _native
from xrdfast.ops import peak_conv as conv_ops
from xrdfast.ops import peak_norm as norm_ops
from xrdfast.ops.peak_conv import peak_conv
from xrdfast.ops.peak_norm import peak_norm
from xrdfast.ops.peak_plan import Stage, plan_rows, plan_rows_reference

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTHS = (2, 8, 8, 20)
POOLS = ("max", "max", "mean")
PADDINGS = (0, 0, 1)
EPS = 1e-5


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sticks(n_patterns: int, length: int, n_peaks: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sparse patterns: the first blank, then lines at both ends, a run of lines, random ones; one dense, if many."""
    generator = rng(n_patterns + length)
    intensity = torch.zeros(n_patterns, length, dtype=dtype)
    for i in range(1, n_patterns):
        peaks = torch.randint(0, length, (n_peaks,), generator=generator)
        intensity[i, peaks] = 10 * torch.rand(n_peaks, generator=generator, dtype=dtype) + 0.1
    if n_patterns > 1:
        intensity[1, [0, -1]] = 3.0
    if n_patterns > 2:
        intensity[2, length // 3 : length // 3 + 6] = 1.0
    if n_patterns > 5:
        intensity[5] = torch.rand(length, generator=generator, dtype=dtype) + 0.1
    return intensity


def parameters(dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = rng(1)

    def draw(*shape: int, offset: float = 0.0) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) / max(shape[0], 4) ** 0.5 + offset
        return x.to(dtype).requires_grad_()

    blocks = []
    for n_in, n_out in itertools.pairwise(WIDTHS):
        block = {"first": draw(3, n_in, n_out), "second": draw(3, n_out, n_out), "widen": draw(n_in, n_out)}
        for i in (1, 2):
            block |= {f"gamma{i}": draw(n_out, offset=1.0), f"beta{i}": draw(n_out)}
            block |= {f"mean{i}": draw(n_out).detach(), f"var{i}": draw(n_out).detach().square() + 0.5}
        blocks.append(block)
    return blocks


def position_channel(length: int, dtype: torch.dtype) -> Tensor:
    return torch.sin(torch.linspace(0.1, 2.0, length, dtype=torch.float64)).to(dtype)


def by_layers(intensity: Tensor, blocks: list[dict[str, Tensor]], batch: bool) -> tuple[Tensor, list[Tensor]]:
    """Torch's own layers in (pattern, channel, position) order; also the running statistics after one step."""
    x = torch.stack(
        [intensity - 0.25, position_channel(intensity.shape[1], intensity.dtype).expand_as(intensity)], 1
    )
    statistics = []

    def norm(h: Tensor, block: dict[str, Tensor], i: int) -> Tensor:
        mean, var = block[f"mean{i}"].clone(), block[f"var{i}"].clone()
        h = F.batch_norm(
            h, mean, var, block[f"gamma{i}"], block[f"beta{i}"], training=batch, momentum=1.0, eps=EPS
        )
        statistics.extend([mean, var])
        return h

    for block, pool, padding in zip(blocks, POOLS, PADDINGS, strict=True):
        wide = F.conv1d(x, block["widen"].T[..., None])
        h = F.conv1d(x, block["first"].permute(2, 1, 0), padding=1)
        h = F.leaky_relu(norm(h, block, 1))
        h = norm(F.conv1d(h, block["second"].permute(2, 1, 0), padding=1), block, 2)
        x = F.leaky_relu(h + wide)
        x = F.max_pool1d(x, 2) if pool == "max" else F.avg_pool1d(x, 2, padding=padding)
    return x, statistics


def by_rows(
    intensity: Tensor, blocks: list[dict[str, Tensor]], batch: bool, packed_stages: int
) -> tuple[Tensor, list[Tensor], list[Stage]]:
    """The same stack through the operators."""
    plan = plan_rows(intensity, PADDINGS, packed_stages=packed_stages)
    sine = position_channel(intensity.shape[1], intensity.dtype)
    x = torch.stack([(intensity - 0.25).flatten()[plan.point], sine[plan.position]], dim=1)
    x = x * (plan.position >= 0)[:, None]
    statistics = []
    for block, stage, pool in zip(blocks, plan.stages, POOLS, strict=True):
        h, wide = peak_conv(x, block["first"], stage.shift), x @ block["widen"]
        for i, (residual, after) in enumerate([(None, None), (wide, pool)], 1):
            known = None if batch else (block[f"mean{i}"], block[f"var{i}"])
            normed = peak_norm(
                h,
                block[f"gamma{i}"],
                block[f"beta{i}"],
                stage,
                statistics=known,
                eps=EPS,
                residual=residual,
                pool=after,
            )
            unbiased = stage.total / (stage.total - 1) if batch else 1.0
            statistics += [normed.mean, normed.var * unbiased]
            h = normed.out if after else peak_conv(normed.out, block["second"], stage.shift)
        x = normed.out
    n_patterns = len(intensity)
    return x.view(-1, n_patterns, x.shape[1]).permute(1, 2, 0), statistics, plan.stages


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Through the CPU kernels, or through the references alone."""
    if request.param == "reference":
        monkeypatch.setattr(_native, "cpu", lambda: None)
    else:
        assert _native.cpu() is not None
    return request.param


@pytest.mark.parametrize("batch", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("packed_stages", [0, 1, 2, 3])
@pytest.mark.parametrize(("n_patterns", "length"), [(1, 200), (3, 131), (7, 200), (64, 33)])
def test_a_stack_equals_dense_layers(
    backend, n_patterns: int, length: int, packed_stages: int, batch: bool
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


@pytest.mark.parametrize(
    ("n_patterns", "length"), [(0, 64), (1, 64), (2, 8), (3, 131), (7, 200), (64, 33), (40, 500)]
)
@pytest.mark.parametrize("packed_stages", [0, 2, 3])
def test_native_plans_equal_the_reference(n_patterns: int, length: int, packed_stages: int) -> None:
    intensity = sticks(n_patterns, length)
    if n_patterns > 3:
        intensity[3, length // 2] = torch.nan
    want = plan_rows_reference(intensity != 0, PADDINGS, packed_stages)
    got = plan_rows(intensity, PADDINGS, packed_stages=packed_stages)
    assert torch.equal(got.position, want.position)
    values = [torch.nan_to_num(intensity.flatten()[p.point], -1.0)[p.position >= 0] for p in (got, want)]
    assert torch.equal(*values)
    for mine, theirs in zip(got.stages, want.stages, strict=True):
        assert (mine.shift, mine.n_touched, mine.total) == (theirs.shift, theirs.n_touched, theirs.total)
        for name in ("count", "halo", "pairs"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


def test_a_row_stands_for_the_samples_that_lack_it() -> None:
    intensity = sticks(7, 200)
    for stage in plan_rows(intensity, PADDINGS, packed_stages=3).stages:
        assert float(stage.count.sum()) == stage.total
        assert int((stage.halo[0] < 0).sum()) >= 2


def test_a_gradient_of_the_intensities_is_had_at_every_point() -> None:
    intensity, blocks = sticks(4, 131), parameters()
    grads = []
    for run in (lambda x: by_layers(x, blocks, True)[0], lambda x: by_rows(x, blocks, True, 3)[0]):
        x = intensity.clone().requires_grad_()
        (grad,) = torch.autograd.grad(run(x).square().sum(), x)
        grads.append(grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def norm_case(
    seed: int, n_channels: int, pool: str | None, packed: bool, dtype: torch.dtype = torch.float64
) -> tuple[Stage, list[Tensor]]:
    """A stage and random h, gamma, beta, residual; a quarter of the numbers are shared, so that maxima tie."""
    intensity = sticks(7, 200)
    stage = plan_rows(intensity, (0, 1), packed_stages=1 if packed else 0).stages[
        0 if packed or pool == "max" else 1
    ]
    n_rows = stage.n_touched if stage.count is None else len(stage.count)
    generator = rng(seed)
    shapes = [(n_rows, n_channels), (n_channels,), (n_channels,), (n_rows, n_channels)]
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    tensors[0][::4] = tensors[0][0].clone()
    tensors[3][::4] = tensors[3][0].clone()
    return stage, tensors


def norm_call(stage: Stage, tensors: list[Tensor], pool: str | None, batch: bool, residual: bool) -> tuple:
    """Arguments of the operator itself."""
    h, gamma, beta, rest = tensors
    statistics = (None, None) if batch else (0.1 * beta, gamma.abs() + 0.5)
    take = stage.halo if pool is None else stage.pairs
    settings = (EPS, stage.count, stage.total, take, stage.n_touched, pool == "max")
    return (h, rest if residual else None, gamma, beta, *statistics, *settings)


CASES = [
    (pool, packed, batch, residual)
    for pool in (None, "max", "mean")
    for packed in (False, True)
    for batch in (False, True)
    for residual in (False, True)
]


def all_of_norm(forward, backward, arguments: tuple, grad_seed: int = 9) -> list[Tensor]:
    """Values, statistics and gradients by a pair of implementations."""
    out, mean, var = forward(*arguments)
    cotangent = torch.randn(out.shape, generator=rng(grad_seed), dtype=torch.float64).to(out.dtype)
    h, residual, gamma, beta, given, _, *settings = arguments
    grads = backward(cotangent, h, residual, gamma, beta, mean, var, *settings, given is None)
    return [out, mean, var, *grads]


@pytest.mark.parametrize(("pool", "packed", "batch", "residual"), CASES)
@pytest.mark.parametrize("n_channels", [1, 16, 35])
def test_norm_equals_the_reference(n_channels: int, pool, packed: bool, batch: bool, residual: bool) -> None:
    stage, tensors = norm_case(5, n_channels, pool, packed)
    arguments = norm_call(stage, tensors, pool, batch, residual)
    want = all_of_norm(norm_ops.peak_norm_reference, norm_ops.peak_norm_backward_reference, arguments)
    got = all_of_norm(norm_ops._norm_cpu, norm_ops._norm_backward_cpu, arguments)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("pool", [None, "max", "mean"])
def test_blank_rows_where_every_pattern_has_its_own_pass_gradients(pool) -> None:
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
    got = all_of_norm(norm_ops._norm_cpu, norm_ops._norm_backward_cpu, arguments)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    assert float(got[3][covered].abs().max()) > 0


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
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolution_equals_the_reference(dtype, n_rows: int, n_in: int, n_out: int, shift: int) -> None:
    """Also from strided inputs; the parity rule in float32. The widest go by Winograd's tiles, or the library."""
    generator = rng(n_rows)
    x, w, g = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((n_rows, 2 * n_in), (n_out, n_in, 3), (n_rows, n_out))
    )
    x, w = x[:, ::2], w.permute(2, 1, 0)
    single = [t.to(dtype) for t in (x, w, g)]
    want = [conv_ops.peak_conv_reference(x, w, shift), conv_ops.peak_conv_weight_reference(x, g, abs(shift))]
    plain = [
        conv_ops.peak_conv_reference(single[0], single[1], shift),
        conv_ops.peak_conv_weight_reference(single[0], single[2], abs(shift)),
    ]
    got = [
        conv_ops._conv_cpu(single[0], single[1], shift),
        conv_ops._conv_weight_cpu(single[0], single[2], abs(shift)),
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
    dtype, pool, n_in: int, width: int, n_patterns, length, packed
) -> None:
    """In evaluation mode; lists of more rows than one piece, packed and dense, thin and wide."""
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
        (dtype, torch.ops.xrdfast.peak_stage),
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
    assert torch.autograd.gradcheck(lambda x, w: peak_conv(x, w, 2), (x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype) -> None:
    x = torch.randn(30, 4, dtype=dtype).requires_grad_()
    w = torch.randn(3, 4, 5, dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.xrdfast.peak_conv, (x, w, 1))
    torch.library.opcheck(
        torch.ops.xrdfast.peak_conv_weight, (x.detach(), torch.randn(30, 5, dtype=dtype), 1)
    )
    for pool, packed in ((None, True), ("max", True), ("mean", False)):
        stage, tensors = norm_case(7, 3, pool, packed, dtype)
        arguments = norm_call(stage, [t.requires_grad_() for t in tensors], pool, True, True)
        torch.library.opcheck(torch.ops.xrdfast.peak_norm, arguments)
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


def test_autocast_casts_the_convolution_as_products() -> None:
    x, w = torch.randn(20, 8), torch.randn(3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = peak_conv(x, w, 1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), peak_conv(x, w, 1), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_rows(torch.zeros(8), (0,)), "plan_rows: intensity must be"),
        (lambda: plan_rows(torch.zeros(1, 8), (2,)), "plan_rows: paddings must be 0 or 1"),
        (lambda: plan_rows(torch.zeros(1, 3), (0, 0)), "plan_rows: length must last for 2 pools"),
        (lambda: peak_conv(torch.zeros(4), torch.zeros(3, 1, 1), 1), "peak_conv: x must be"),
        (lambda: peak_conv(torch.zeros(4, 2), torch.zeros(3, 1, 1), 1), "peak_conv: weight must be"),
        (lambda: peak_conv(torch.zeros(4, 1), torch.zeros(3, 1, 1).double(), 1), "peak_conv: weight must be"),
        (lambda: bad_norm(h=torch.zeros(3, 2)), "peak_norm: h must be"),
        (lambda: bad_norm(gamma=torch.zeros(3)), "peak_norm: gamma must be"),
        (lambda: bad_norm(beta=torch.zeros(2).double()), "peak_norm: beta must be"),
        (lambda: bad_norm(residual=torch.zeros(4, 3)), "peak_norm: residual must be"),
        (lambda: bad_norm(statistics=(torch.zeros(2), torch.zeros(3))), "peak_norm: variance must be"),
        (lambda: bad_norm(pool="sum"), "peak_norm: pool must be"),
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


def bad_norm(**changed) -> None:
    stage = plan_rows(torch.zeros(2, 2), (0,)).stages[0]
    given = {
        "h": torch.zeros(4, 2),
        "gamma": torch.ones(2),
        "beta": torch.zeros(2),
        "statistics": None,
        "eps": EPS,
    }
    given |= changed
    peak_norm(given.pop("h"), given.pop("gamma"), given.pop("beta"), stage, **given)


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


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert _native.cuda() is not None
    for pool, packed in ((None, True), ("max", True), ("mean", False)):
        stage, tensors = norm_case(7, 35, pool, packed, torch.float32)
        arguments = norm_call(stage, tensors, pool, True, True)
        want = all_of_norm(norm_ops._norm_cpu, norm_ops._norm_backward_cpu, arguments)
        there = tuple(x.cuda() if isinstance(x, Tensor) else x for x in arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out, mean, var = norm_ops._norm_cuda(*there)
            cotangent = torch.randn(out.shape, generator=rng(9), dtype=torch.float64).float().cuda()
            h, residual, gamma, beta, given, _, *settings = there
            grads = norm_ops._norm_backward_cuda(
                cotangent, h, residual, gamma, beta, mean, var, *settings, given is None
            )
        stream.synchronize()
        for mine, theirs in zip((out, mean, var, *grads), want, strict=True):
            assert mine.is_cuda
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-4)


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
