"""Attention over active patches and the patch encoder, on every backend, against float64 references and autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops.gpu_runs import on_a_gpu
from xrdfast import _native
from xrdfast.models.encoder import BLANK_PATCH, GlobalBranch
from xrdfast.ops import peak_attention as op
from xrdfast.ops.peak_attention import encode_patches, peak_attention

ROOT = Path(__file__).resolve().parent.parent.parent
EPSILON = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}


@pytest.fixture(params=["cpu", "0", "1", "7"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable, Callable]:
    """Forward and backward of the CPU, and of the device code in three thread orders."""
    if request.param == "cpu":
        assert _native.cpu() is not None
        return op._peak_attention_cpu, op._peak_attention_backward_cpu
    module = request.getfixturevalue("emulated")
    monkeypatch.setenv("CUEMU_ORDER", request.param)
    return (
        functools.partial(op._peak_attention_on_device, module),
        functools.partial(op._peak_attention_backward_on_device, module),
    )


def batch(
    n_patterns: int, n_patches: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value, active; the shares of active patches go from none over some to all."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(n_patterns, n_patches, width, generator=rng, dtype=torch.float64) for _ in range(3)
    )
    share = torch.linspace(0, 1.01, max(n_patterns, 2))[:n_patterns, None]
    active = torch.rand(n_patterns, n_patches, generator=rng) < share
    return (2 * q).to(dtype), (2 * k).to(dtype), v.to(dtype), active


def within(got: Tensor, want64: Tensor, want: Tensor, name: str = "") -> None:
    """The parity rule: at most twice the reference's own error in this precision."""
    own = (want.double() - want64).abs().max().item() if want.numel() else 0.0
    error = (got.double() - want64).abs().max().item() if want.numel() else 0.0
    scale = max(1.0, want64.abs().max().item()) if want.numel() else 1.0
    assert error <= 2 * own + EPSILON[want.dtype] * scale, (name, error, own)


def check_parity(backend, given: tuple[Tensor, ...], grad: Tensor) -> None:
    forward, backward = backend
    wide = tuple(x.double() if x.is_floating_point() else x for x in given)
    want64, want = op.peak_attention_reference(*wide), op.peak_attention_reference(*given)
    got = forward(*given)
    for a, b, c, name in zip(got, want64, want, ("output", "logsumexp"), strict=True):
        assert a.dtype == c.dtype
        within(a, b, c, name)
    want64 = op.peak_attention_backward_reference(grad.double(), *wide, *want64)
    want = op.peak_attention_backward_reference(grad, *given, *want)
    got = backward(grad, *given, *got)
    for a, b, c, name in zip(got, want64, want, ("query", "key", "value"), strict=True):
        assert a.dtype == c.dtype
        within(a, b, c, f"gradient to {name}")
    blank = ~given[3].any(dim=1)
    assert not got[0][blank].any()
    assert not got[1][blank].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("n_patterns", "n_patches", "width"),
    [(0, 5, 8), (1, 1, 8), (3, 31, 32), (3, 33, 40), (2, 127, 64), (5, 150, 24)],
)
def test_equals_the_reference(backend, n_patterns: int, n_patches: int, width: int, dtype) -> None:
    given = batch(n_patterns, n_patches, width, dtype)
    grad = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    check_parity(backend, given, grad)


@pytest.mark.parametrize("n_patterns", [1, 4])
def test_a_whole_grid(n_patterns: int) -> None:
    given = batch(n_patterns, 850, 32)
    grad = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))
    check_parity((op._peak_attention_cpu, op._peak_attention_backward_cpu), given, grad)


def test_strides_change_nothing(backend) -> None:
    forward, backward = backend
    query, key, value, active = batch(3, 40, 16)
    together = torch.stack([query, key, value], dim=2)  # as one map of three makes them
    spread = (*together.unbind(dim=2), active.t().contiguous().t())
    want, got = forward(query, key, value, active), forward(*spread)
    grad = query.flip(0)
    expanded = grad[:1, :1].expand_as(grad)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    got = backward(expanded, *spread, *want)
    want = backward(expanded.contiguous(), query, key, value, active, *want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_large_scores_stay_finite(backend) -> None:
    query, key, value, active = batch(2, 70, 16)
    given = (query * 100, key * 10, value, active)
    check_parity(backend, given, value)
    assert backend[0](*given)[0].isfinite().all()


def test_nan_stays_in_its_pattern(backend) -> None:
    """An active NaN key reaches every query of its pattern; a blank NaN patch is never asked."""
    query, key, value, active = batch(3, 33, 8)
    active[:] = torch.arange(33) % 2 == 0
    key[1, 2], key[2, 3] = torch.nan, torch.nan
    got, _ = backend[0](query, key, value, active)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()
    query[0, 5] = torch.nan
    got, _ = backend[0](query, key, value, active)
    assert got[0, 5].isnan().all()
    assert got[0, 6:].isfinite().all()


def test_a_pattern_without_active_patch_attends_uniformly(backend) -> None:
    query, key, value, _ = batch(2, 40, 16, torch.float64)
    active = torch.zeros(2, 40, dtype=torch.bool)
    got, logsumexp = backend[0](query, key, value, active)
    torch.testing.assert_close(got, value.mean(dim=1, keepdim=True).expand_as(value))
    grads = backend[1](torch.ones_like(got), query, key, value, active, got, logsumexp)
    assert not grads[0].any()
    assert not grads[1].any()
    torch.testing.assert_close(grads[2], torch.ones_like(value))


def test_deterministic(backend) -> None:
    given = batch(4, 130, 32)
    first = backend[0](*given)
    grads = backend[1](given[2], *given, *first)
    for got, want in zip(backend[0](*given), first, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(backend[1](given[2], *given, *first), grads, strict=True):
        assert torch.equal(got, want)


def test_backward_reference_is_autograd() -> None:
    given = batch(3, 20, 8, torch.float64)
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    output, logsumexp = op.peak_attention_reference(*leaves, given[3])
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = torch.autograd.grad(output, leaves, grad)
    got = op.peak_attention_backward_reference(grad, *given, output.detach(), logsumexp.detach())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_reference_is_masked_attention() -> None:
    query, key, value, active = batch(3, 30, 8, torch.float64)
    active[0, 4] = True
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=active[:, None, :])
    torch.testing.assert_close(op.peak_attention_reference(query, key, value, active)[0], want)


@pytest.mark.parametrize("mode", ["native", "reference"])
def test_gradcheck(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XRDFAST_BACKEND", mode)
    query, key, value, active = batch(3, 9, 8, torch.float64)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradcheck(lambda *x: peak_attention(*x, active), leaves)


def test_second_derivatives_are_refused() -> None:
    query, key, value, active = batch(2, 9, 8)
    output = peak_attention(query.requires_grad_(), key, value, active)
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="peak_attention: second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("mode", ["native", "reference"])
def test_opcheck(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XRDFAST_BACKEND", mode)
    for n_patterns, dtype in ((0, torch.float32), (2, torch.float64), (2, torch.bfloat16)):
        query, key, value, active = batch(n_patterns, 9, 8, dtype)
        output = torch.ops.xrdfast.peak_attention(query, key, value, active)
        torch.library.opcheck(
            torch.ops.xrdfast.peak_attention_backward, (query, query, key, value, active, *output)
        )
        leaves = [x.requires_grad_() for x in (query, key, value)]
        torch.library.opcheck(torch.ops.xrdfast.peak_attention, (*leaves, active))
    torch.library.opcheck(torch.ops.xrdfast.encode_patches, tuple(encoder_inputs().values()))


def test_compiles_into_one_graph() -> None:
    query, key, value, active = batch(2, 20, 8)
    leaf = query.clone().requires_grad_()

    def loss(q: Tensor) -> Tensor:
        return peak_attention(q.sin(), key, value, active).square().sum()

    want = torch.autograd.grad(loss(leaf), leaf)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], want)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"query": torch.zeros(2, 5, 12)}, ValueError, r"width a multiple of 8 up to 64, got \(2, 5, 12\)"),
        ({"query": torch.zeros(2, 5, 72)}, ValueError, r"width a multiple of 8 up to 64, got \(2, 5, 72\)"),
        ({"query": torch.zeros(2, 4097, 8)}, ValueError, "n_patches must be 1 to 4096, got 4097"),
        ({"query": torch.zeros(2, 0, 8)}, ValueError, "n_patches must be 1 to 4096, got 0"),
        ({"query": torch.zeros(2, 5, 8).half()}, TypeError, "query must be float32, float64 or bfloat16"),
        (
            {"key": torch.zeros(2, 4, 8)},
            ValueError,
            r"key must be \(2, 5, 8\) on cpu as query, got \(2, 4, 8\)",
        ),
        ({"value": torch.zeros(2, 5, 8).double()}, TypeError, "value must be torch.float32 as query"),
        ({"active": torch.zeros(2, 5)}, TypeError, "active must be bool, got torch.float32"),
        ({"active": torch.zeros(2, 6, dtype=torch.bool)}, ValueError, r"active must be \(2, 5\) on cpu"),
    ],
)
def test_refuses(change: dict, error: type[Exception], told: str) -> None:
    query, key, value, active = batch(2, 5, 8)
    given = {"query": query, "key": key, "value": value, "active": active} | change
    with pytest.raises(error, match=told):
        peak_attention(**given)


def test_backward_refuses() -> None:
    query, key, value, active = batch(2, 5, 8)
    output, logsumexp = op.peak_attention_reference(query, key, value, active)
    with pytest.raises(ValueError, match=r"grad_output must be \(2, 5, 8\) torch.float32"):
        op._peak_attention_backward_cpu(query[:1], query, key, value, active, output, logsumexp)
    with pytest.raises(ValueError, match=r"logsumexp must be \(2, 5\) torch.float32"):
        op._peak_attention_backward_cpu(query, query, key, value, active, output, logsumexp.double())


def encoder_inputs(
    n_patterns: int = 3,
    n_patches: int = 33,
    patch_points: int = 10,
    n_embedded: int = 5,
    width: int = 16,
    hidden: int = 44,
    n_layers: int = 2,
    dtype: torch.dtype = torch.float32,
) -> dict[str, object]:
    """Arguments of `encode_patches`; every third pattern is blank, the others have one patch in three active."""
    rng = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    patches = random(n_patterns, n_patches, patch_points).abs() * 10
    patches[torch.rand(n_patterns, n_patches, generator=rng) > 1 / 3] = 0
    patches[::3] = 0
    layers: list[Tensor] = []
    for _ in range(n_layers):
        for _ in range(4):
            layers += [random(width, width) / width**0.5, random(width)]
        layers += [random(width), random(width), random(hidden, width) / width**0.5, random(hidden)]
        layers += [random(width, hidden) / max(hidden, 1) ** 0.5, random(width), random(width), random(width)]
    return {
        "intensity": patches.flatten(1).to(dtype),
        "patch_weight": random(patch_points, n_embedded).to(dtype) / 10,
        "position": random(n_patches, width).to(dtype),
        "layers": [x.to(dtype) for x in layers],
        "blank": 1e-5,
        "norm_eps": 1e-6,
    }


def wide(inputs: dict[str, object]) -> dict[str, object]:
    """The same in float64."""
    widened = {k: v.double() for k, v in inputs.items() if isinstance(v, Tensor)}
    return inputs | widened | {"layers": [x.double() for x in inputs["layers"]]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"n_patterns": 0},
        {"n_patterns": 1, "n_patches": 1, "patch_points": 1, "n_embedded": 1, "width": 8, "hidden": 1},
        {"n_patterns": 4, "n_patches": 127, "n_embedded": 16, "width": 32, "hidden": 256},
        {"n_patches": 32, "patch_points": 90, "n_embedded": 63, "width": 64, "hidden": 70},
        {"n_patches": 31, "hidden": 0},
        {"n_layers": 0},
    ],
)
def test_encoder_equals_the_reference(sizes: dict[str, int], dtype: torch.dtype) -> None:
    inputs = encoder_inputs(**sizes, dtype=dtype)
    got = op._encode_patches_cpu(*inputs.values())
    want64 = op.encode_patches_reference(*wide(inputs).values())
    within(got, want64, op.encode_patches_reference(*inputs.values()))


def test_encoder_passes_nan_on() -> None:
    inputs = encoder_inputs(6)
    clean = op._encode_patches_cpu(*inputs.values())
    for pattern, value in ((1, torch.nan), (4, torch.inf)):
        inputs["intensity"][pattern, 14] = value
    want = op.encode_patches_reference(*inputs.values())
    got = op._encode_patches_cpu(*inputs.values())
    assert want[[1, 4]].isnan().all()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"intensity": torch.zeros(3, 331)}, ValueError, r"intensity must be \(3, 330\) on cpu"),
        (
            {"intensity": torch.zeros(3, 330).double()},
            TypeError,
            "intensity must be torch.float32 as position",
        ),
        ({"position": torch.zeros(33, 12)}, ValueError, "position must be .* multiple of 8 up to 64"),
        ({"position": torch.zeros(5000, 16)}, ValueError, "n_patches must be 1 to 4096, got 5000"),
        (
            {"patch_weight": torch.zeros(10, 16)},
            ValueError,
            r"patch_weight must be \(patch_points, fewer than 16\)",
        ),
        ({"layers": [torch.zeros(16)] * 3}, ValueError, "layers must be 16 tensors each, got 3 in all"),
        (
            {"layers": [torch.zeros(16)] * 16},
            ValueError,
            r"layers\[0\] must be \(16, 16\) on cpu, got \(16,\)",
        ),
    ],
)
def test_encoder_refuses(change: dict, error: type[Exception], told: str) -> None:
    inputs = encoder_inputs() | change
    with pytest.raises(error, match=told):
        encode_patches(**inputs)


def sticks(n_patterns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n_patterns, 8500) sparse sticks; the first pattern is blank, the last dense."""
    rng = torch.Generator().manual_seed(5)
    intensity = torch.zeros(n_patterns, 8500, dtype=dtype)
    for i in range(1, n_patterns):
        place = torch.randint(0, 8500, (80 * i,), generator=rng)
        intensity[i, place] = 100 * torch.rand(80 * i, generator=rng, dtype=dtype)
    intensity[-1] = 100 * torch.rand(8500, generator=rng, dtype=dtype)
    return intensity


def test_inference_equals_the_training_path() -> None:
    """The branch as it is trained and as it answers, in double."""
    torch.manual_seed(0)
    branch = GlobalBranch(0.25).double().eval()
    intensity = sticks(3, torch.float64)
    want = branch(intensity)
    assert want.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(branch(intensity), want, rtol=1e-11, atol=1e-11)
        assert BLANK_PATCH == 1e-5
    compiled = torch.compile(branch, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(intensity), want, rtol=1e-11, atol=1e-11)


def test_training_converges_as_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty steps of a global branch with dropout, native and reference: equal losses."""
    intensity = sticks(4)
    target = torch.tensor([0, 3, 5, 7])

    def losses(mode: str) -> list[float]:
        monkeypatch.setenv("XRDFAST_BACKEND", mode)
        torch.manual_seed(2)
        branch = GlobalBranch(0.25)
        optimizer = torch.optim.Adam(branch.parameters(), lr=3e-3)
        found = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(branch(intensity), target)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    native, reference = losses("native"), losses("reference")
    assert native == pytest.approx(reference, rel=2e-4)
    assert native[-1] < 0.7 * native[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_on_a_gpu(gpu, dtype: torch.dtype) -> None:
    given = batch(8, 850, 32, dtype)
    grad = given[2].flip(0).contiguous()

    def there(function: Callable) -> Callable:
        def call(*x: Tensor) -> tuple[Tensor, ...]:
            moved = [y.cuda() for y in x]
            return tuple(on_a_gpu(lambda: function(*moved)))

        return call

    check_parity((there(op._peak_attention_cuda), there(op._peak_attention_backward_cuda)), given, grad)


@pytest.mark.gpu
def test_encoder_on_a_gpu(gpu) -> None:
    inputs = encoder_inputs(4, 127, 10, 16, 32, 256)
    moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    got = encode_patches(**moved | {"layers": [x.cuda() for x in inputs["layers"]]})
    assert got.is_cuda
    want64 = op.encode_patches_reference(*wide(inputs).values())
    within(got.cpu(), want64, op.encode_patches_reference(*inputs.values()))
