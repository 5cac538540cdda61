"""Speed of the ranked-output loss, forward and backward, against PyTorch spelled out and compiled. Floors: NOTES.md."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.paired import captured, gpu_seconds, paired
from xrdfast.ops.dsr_loss import dsr_loss, dsr_loss_backward_reference, dsr_loss_reference

N_PATTERNS = 512
HEADS = (0, 230, 237, 243, 275)


def published_loss(logits: Tensor, previous_ranked: Tensor, temperature: float) -> Tensor:
    """The published loss as it is written: rank, soften, compare."""
    ranked, _ = torch.sort(logits, dim=1)
    return (
        F.kl_div(
            F.log_softmax(ranked / temperature, dim=1),
            F.softmax(previous_ranked / temperature, dim=1),
            reduction="batchmean",
        )
        * temperature**2
    )


def step(loss_of, logits: Tensor, previous: Tensor) -> Tensor:
    """Forward and backward; the gradient of the logits."""
    leaf = logits.detach().requires_grad_()
    loss_of(leaf, previous).backward()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return leaf.grad


def our_loss(logits: Tensor, previous: Tensor) -> Tensor:
    return dsr_loss(logits, previous)[0].mean()


def eager_loss(logits: Tensor, previous: Tensor) -> Tensor:
    return published_loss(logits, previous, 4.0)


def eager_heads_loss(logits: Tensor, previous: Tensor) -> Tensor:
    """The four heads, one after the other."""
    heads = itertools.pairwise(HEADS)
    return sum(published_loss(logits[:, a:b], previous[:, a:b], 4.0) for a, b in heads) / 4


def our_heads_loss(logits: Tensor, previous: Tensor) -> Tensor:
    return dsr_loss(logits, previous, class_offset=HEADS)[0].mean()


def random_batch(device: str, dtype: torch.dtype, heads: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, previous = (3.0 * torch.randn(N_PATTERNS, heads[-1], generator=generator) for _ in range(2))
    previous = torch.cat([previous[:, a:b].sort(dim=1)[0] for a, b in itertools.pairwise(heads)], dim=1)
    return logits.to(device, dtype), previous.to(device, dtype)


@pytest.mark.parametrize("rival", ["eager", "torch.compile"])
def test_one_head(benchmark, row, threads, device: str, rival: str) -> None:
    threads(2)
    logits, previous = random_batch(device, torch.float32, (0, 230))
    rival_loss = eager_loss
    if rival == "torch.compile":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rival_loss = torch.compile(eager_loss)
            step(rival_loss, logits, previous)
    torch.testing.assert_close(
        step(our_loss, logits, previous), step(rival_loss, logits, previous), rtol=1e-3, atol=1e-6
    )
    pair = paired(
        lambda: step(our_loss, logits, previous), lambda: step(rival_loss, logits, previous), rounds=51
    )
    benchmark.pedantic(lambda: step(our_loss, logits, previous), rounds=20)
    # On a GPU this is the host's time for launches; `test_in_a_graph` has the device's.
    bar = {"eager": 4, "torch.compile": 2}[rival] if device == "cpu" else None
    row(
        f"dsr_loss forward + backward against {rival}, {N_PATTERNS} × 230, float32, {device}"
        f"{', 2 cores' if device == 'cpu' else ''}",
        f"{pair.ratio:.1f} × {rival} ({pair.ours * 1e6:.0f} against {pair.rival * 1e6:.0f} µs)",
        f"≥ {bar} ×" if bar else "reported",
        bar is None or pair.ratio >= bar,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(0, 230), HEADS], ids=["one", "four"])
def test_in_a_graph(benchmark, row, heads: tuple[int, ...]) -> None:
    """Both sides as they run in a training step that is a CUDA graph."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    logits, previous = random_batch("cuda", torch.float32, heads)
    leaf, n_steps = logits.requires_grad_(), 50
    losses = (our_heads_loss, eager_heads_loss) if heads == HEADS else (our_loss, eager_loss)
    ours, rival = (
        captured(lambda loss_of=loss_of: torch.autograd.grad(loss_of(leaf, previous), leaf), n_steps)
        for loss_of in losses
    )
    took, theirs = (1e6 * gpu_seconds(replay) / n_steps for replay in (ours, rival))
    benchmark.pedantic(ours, rounds=20)
    sizes = "230" if heads != HEADS else "(230, 7, 6, 32)"
    row(
        f"dsr_loss forward + backward in a CUDA graph, {N_PATTERNS} × {sizes}, float32, cuda",
        f"{theirs / took:.1f} × eager in a CUDA graph ({took:.1f} against {theirs:.1f} µs)",
        "≥ 5 ×" if heads != HEADS else "reported",
        heads == HEADS or theirs >= 5 * took,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_heads(benchmark, row, threads, device: str, dtype: torch.dtype) -> None:
    """All heads of the model in one launch, against four eager losses."""
    threads(2)
    logits, previous = random_batch(device, dtype, HEADS)
    pair = paired(
        lambda: step(our_heads_loss, logits, previous),
        lambda: step(eager_heads_loss, logits, previous),
        rounds=51,
    )
    benchmark.pedantic(lambda: step(our_heads_loss, logits, previous), rounds=20)
    name = str(dtype).removeprefix("torch.")
    row(
        f"dsr_loss forward + backward, {N_PATTERNS} × (230, 7, 6, 32), {name}, {device}",
        f"{pair.ratio:.1f} × eager ({pair.ours * 1e6:.0f} against {pair.rival * 1e6:.0f} µs)",
        "reported",
        True,
    )


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_directions(benchmark, row, threads, device: str, direction: str) -> None:
    """Native beside reference, the bare operators, one direction at a time."""
    threads(2)
    logits, previous = random_batch(device, torch.float32, HEADS)
    loss, _, slope = torch.ops.xrdfast.dsr_loss(logits, previous, 4.0, HEADS)
    native, reference, given = {
        "forward": (torch.ops.xrdfast.dsr_loss, dsr_loss_reference, (logits, previous, 4.0, HEADS)),
        "backward": (
            torch.ops.xrdfast.dsr_loss_backward,
            dsr_loss_backward_reference,
            (torch.ones_like(loss), slope, HEADS, torch.float32),
        ),
    }[direction]

    def call(function) -> None:
        function(*given)
        if device == "cuda":
            torch.cuda.synchronize()

    pair = paired(lambda: call(native), lambda: call(reference), rounds=51)
    benchmark.pedantic(lambda: call(native), rounds=20)
    moved = logits.numel() * 4 * {"forward": 4, "backward": 2}[direction]  # bytes
    row(
        f"dsr_loss {direction} operator, {N_PATTERNS} × (230, 7, 6, 32), float32, {device}",
        f"{pair.ratio:.1f} × reference ({pair.ours * 1e6:.0f} against {pair.rival * 1e6:.0f} µs, "
        f"{moved / pair.ours / 1e9:.1f} GB/s)",
        "reported",
        True,
    )
