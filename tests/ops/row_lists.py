"""Lists of rows for the tests of plans, convolutions and norms: sparse patterns, a small stack, and its layers."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from xrdfast.ops.peak_conv import peak_conv
from xrdfast.ops.peak_norm import peak_norm
from xrdfast.ops.peak_plan import Stage, plan_rows

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
    intensity: Tensor,
    blocks: list[dict[str, Tensor]],
    batch: bool,
    packed_stages: int = 3,
    room: list[int] | None = None,
) -> tuple[Tensor, list[Tensor], list[Stage]]:
    """The same stack through the operators."""
    plan = plan_rows(intensity, PADDINGS, packed_stages=packed_stages, room=room)
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


def all_of_norm(forward, backward, arguments: tuple, grad_seed: int = 9) -> list[Tensor]:
    """Values, statistics and gradients by a pair of implementations."""
    out, mean, var = forward(*arguments)
    cotangent = torch.randn(out.shape, generator=rng(grad_seed), dtype=torch.float64).to(out.dtype)
    h, residual, gamma, beta, given, _, *settings = arguments
    grads = backward(cotangent, h, residual, gamma, beta, mean, var, *settings, given is None)
    return [out, mean, var, *grads]
