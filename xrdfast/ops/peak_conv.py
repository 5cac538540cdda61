"""Residual convolutions over lists of rows, computed only where a peak is felt.

A row is one position of one pattern with its channels. A stage (residual block and pool) works on a list of rows,
kept in one of two orders:

* packed: far from every peak, all patterns of a batch see the same thing, so those positions are computed once, in an
  extra blank pattern. The list holds, pattern by pattern, the segments of touched positions, each between two halo
  rows, and at last the whole blank pattern between two halos. A halo holds what lies beyond the segment: the blank
  pattern's value, or zero beyond the grid. So a 3-wide convolution is three products with the list shifted by one
  row, and no kernel but the norm's has to know where a segment ends.
* dense: all positions of all patterns, position by position, and the list is shifted by the number of patterns. No
  halo, and nothing multiplied with padding zeros.

On a CPU, thin convolutions and all norms are own kernels, wide convolutions library products, on long lists between
Winograd's transforms. On a GPU the convolutions are library products.

`plan_rows` chooses for each stage by counting rows. Both are exact, in training too: a blank row weighs in the batch
statistics as many times as there are patterns that lack it, and what flows back to it is the sum over them.

Not for layers and parameters (`xrdfast.models.encoder`), attention, or inputs without a convolution stack.

Source: design of the published local branch, arXiv:2511.06976; the blank response is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xrdfast import _native
from xrdfast.ops import LIBRARY, device_stream

NEGATIVE_SLOPE = 0.01  # of LeakyReLU
KERNEL_WIDTH = 3

# Stages that may be packed: with 80 sticks the touched share after them is 0.06, 0.14, 0.28, 0.50, 0.78.
MAX_PACKED_STAGES = 5
# A stage is packed where it has fewer rows than this share of the dense ones.
PACKED_SHARE = 0.85
# Segments with no more untouched positions between them are joined: two halos cost as much.
MAX_GAP = 2
_REACH = 2  # positions that two 3-wide convolutions see to each side
# Wider convolutions are matrix products large enough for the library.
MAX_NATIVE_WIDTH = 128
# Fewer rows are not worth Winograd's transforms.
_WINOGRAD_ROWS = 512
# Rows of a piece's products: enough for the library, and planes that stay in cache (at 256 channels 4 MB in float32).
_PIECE_ROWS = 512
_NORM_PARTS = 128  # kNormParts of csrc/peak_conv.h
_NATIVE_DTYPES = {torch.float32: "float32", torch.float64: "float64"}

LIBRARY.define("peak_conv(Tensor x, Tensor weight, int shift) -> Tensor")
LIBRARY.define("peak_conv_weight(Tensor x, Tensor grad_out, int shift) -> Tensor")
LIBRARY.define(
    "peak_norm(Tensor h, Tensor? residual, Tensor gamma, Tensor beta, Tensor? mean, Tensor? var, float eps, "
    "Tensor? count, float total, Tensor? take, int n_touched, bool maximum) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "peak_norm_backward(Tensor grad_out, Tensor h, Tensor? residual, Tensor gamma, Tensor beta, Tensor mean, "
    "Tensor var, float eps, Tensor? count, float total, Tensor? take, int n_touched, bool maximum, bool batch) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


LIBRARY.define(
    "peak_stage(Tensor x, Tensor first, Tensor second, Tensor? widen, Tensor scale1, Tensor offset1, Tensor scale2, "
    "Tensor offset2, Tensor? halo, Tensor pairs, int shift, int n_touched, bool maximum) -> Tensor"
)


class Stage(NamedTuple):
    """The rows of one residual block, and how the pool after it makes the rows of the next."""

    shift: int  # rows from a position to the next one
    n_touched: int  # rows before the blank pattern; dense: all
    total: float  # samples a channel's statistics are over: patterns times positions
    count: Tensor | None  # (n_rows,) samples a row stands for, 0 for halos; None: one each
    # (1, n_rows) int32, the row whose value a row has: its own; for halos a blank one, or -1 for zero. None: its own.
    halo: Tensor | None
    pairs: Tensor  # (2, n_rows of the next stage) int32, the rows that the pool joins; -1: zero


class Plan(NamedTuple):
    """Rows of all stages, and where those of the first find their input."""

    point: Tensor  # (n_rows,) int64 into the flat (n_patterns, length) input; any where `position` is -1
    position: Tensor  # (n_rows,) int64 on the grid; -1: beyond it, a row of zeros
    stages: list[Stage]


def plan_rows(
    intensity: Tensor,  # (n_patterns, length)
    paddings: Sequence[int],
    *,
    packed_stages: int = MAX_PACKED_STAGES,
) -> Plan:
    """Chooses the rows of every stage: blocks of reach 2, each followed by a pool of 2.

    A position is touched where a non-zero intensity (NaN is one) lies in its receptive field. A stage is packed while
    that takes fewer rows than dense order; once dense, all later ones are. Everything is dense on a GPU, where
    counting would wait for the device, and where a gradient of the intensities is asked for, at every point.

    Args:
        intensity: any float dtype.
        paddings: for each stage, the padding of its pool at either end, 0 or 1.
        packed_stages: most stages that may be packed.

    Returns:
        The plan; index tensors on the device of the intensities.

    Raises:
        ValueError: for intensities that are not two-dimensional, another padding, or a length too short for the pools.
    """
    if intensity.ndim != 2:
        raise ValueError(f"plan_rows: intensity must be (n_patterns, length), got {tuple(intensity.shape)}")
    if any(padding not in (0, 1) for padding in paddings):
        raise ValueError(f"plan_rows: paddings must be 0 or 1, got {list(paddings)}")
    lengths = [intensity.shape[1]]
    for padding in paddings:
        lengths.append((lengths[-1] + 2 * padding) // 2)
    if lengths[-1] < 1:
        raise ValueError(f"plan_rows: length must last for {len(paddings)} pools of 2, got {lengths[0]}")
    if intensity.device.type != "cpu" or intensity.requires_grad:
        packed_stages = 0
    packed_stages = min(packed_stages, len(paddings))
    module = _native.cpu() if packed_stages and intensity.dtype in _NATIVE_DTYPES else None
    if packed_stages and module is None:
        return plan_rows_reference(intensity.detach() != 0, paddings, packed_stages)
    packed: list[Stage] = []
    point = position = None
    if packed_stages:
        packed, point, position = _packed_stages(module, intensity.detach(), paddings, lengths, packed_stages)
    n_patterns, device = len(intensity), intensity.device
    if point is None or position is None:
        point = torch.arange(intensity.numel(), device=device).view(intensity.shape).T.flatten()
        position = torch.arange(lengths[0], device=device).repeat_interleave(n_patterns)
    n_packed = len(packed)
    shapes = zip(lengths[n_packed:], lengths[n_packed + 1 :], paddings[n_packed:], strict=False)
    return Plan(point, position, packed + [_dense_stage(n_patterns, *shape, device) for shape in shapes])


def _dense_stage(n_patterns: int, length: int, next_length: int, padding: int, device: torch.device) -> Stage:
    from_position = torch.arange(-padding, 2 * next_length - padding, dtype=torch.int32, device=device)
    rows = from_position[:, None] * n_patterns + torch.arange(n_patterns, dtype=torch.int32, device=device)
    if padding:
        beyond = (from_position < 0) | (from_position >= length)
        rows.masked_fill_(beyond[:, None], -1)
    pairs = rows.view(next_length, 2, n_patterns).transpose(0, 1).reshape(2, next_length * n_patterns)
    n_rows = n_patterns * length
    return Stage(n_patterns, n_rows, float(n_rows), None, None, pairs)


def _packed_stages(
    module: ModuleType, intensity: Tensor, paddings: Sequence[int], lengths: Sequence[int], packed_stages: int
) -> tuple[list[Stage], Tensor | None, Tensor | None]:
    """The packed stages that come first, with `point` and `position` of the input, by the native code."""
    intensity = intensity.contiguous()
    n_patterns, length = intensity.shape
    room = n_patterns * length
    # Far more than is used; what is not written to is never mapped.
    n_rows = torch.zeros(packed_stages, dtype=torch.int64)
    point, position = torch.empty((2, room), dtype=torch.int64)
    count = torch.empty((packed_stages, room))
    halo = torch.empty((packed_stages, room), dtype=torch.int32)
    pairs = torch.empty((packed_stages, 2 * room), dtype=torch.int32)
    padding = torch.tensor(list(paddings))
    getattr(module, f"peak_plan_{_NATIVE_DTYPES[intensity.dtype]}")(
        intensity.data_ptr(),
        padding.data_ptr(),
        n_patterns,
        length,
        len(paddings),
        packed_stages,
        _REACH,
        MAX_GAP,
        PACKED_SHARE,
        *(x.data_ptr() for x in (n_rows, point, position, count, halo, pairs)),
    )
    rows = [n for n in n_rows.tolist() if n]
    if not rows:
        return [], None, None
    n_taken = [*rows[1:], n_patterns * lengths[len(rows)]]
    stages = [
        Stage(
            shift=1,
            n_touched=n - lengths[i] - 2,
            total=float(n_patterns * lengths[i]),
            count=count[i, :n],
            halo=halo[i, :n][None],
            pairs=pairs[i, : 2 * taken].view(2, taken),
        )
        for i, (n, taken) in enumerate(zip(rows, n_taken, strict=True))
    ]
    return stages, point[: rows[0]], position[: rows[0]]


class _Layout(NamedTuple):
    """Which row is where in one stage."""

    pattern: Tensor  # (n_rows,); the blank pattern is the last
    position: Tensor  # (n_rows,); -1 and the length are halos beyond the grid
    row_at: Tensor  # (n_patterns, or one more, length): the row with this value, a blank one where none is its own
    computed: Tensor | None  # (n_patterns, length) bool, rows of their own; None: all


def plan_rows_reference(touched: Tensor, paddings: Sequence[int], packed_stages: int) -> Plan:
    """Plain PyTorch, with masks over all positions of all patterns (n_patterns, length)."""
    n_patterns, length = touched.shape
    layouts, stages = [], []
    for i, padding in enumerate(paddings):
        felt = _spread(touched, _REACH) if i < packed_stages else None
        layout = None if felt is None else _packed_layout(felt)
        if layout is None:
            packed_stages = 0
            layout = _dense_layout(n_patterns, length, touched.device)
        layouts.append(layout)
        stages.append(_stage(layout, n_patterns, length))
        next_length = (length + 2 * padding) // 2
        if felt is not None:
            joined = F.pad(felt, (padding, padding + 1))[:, : 2 * next_length]
            touched = joined.unflatten(1, (next_length, 2)).any(2)
        length = next_length
    layouts.append(_dense_layout(n_patterns, length, touched.device))
    for i, padding in enumerate(paddings):
        stages[i] = stages[i]._replace(pairs=_pairs(layouts[i], layouts[i + 1], padding))
    return Plan(*_input_rows(layouts[0]), stages)


def _dense_layout(n_patterns: int, length: int, device: torch.device) -> _Layout:
    row = torch.arange(length * n_patterns, device=device)
    position = torch.div(row, max(n_patterns, 1), rounding_mode="floor")
    return _Layout(row - position * n_patterns, position, row.view(length, n_patterns).T, None)


def _packed_layout(felt: Tensor) -> _Layout | None:
    """Rows of the touched segments and of the blank pattern; None where that is no gain."""
    n_patterns, length = felt.shape
    computed = felt.clone()
    for gap in range(1, MAX_GAP + 1):
        ends = felt[:, : length - gap - 1] & felt[:, gap + 1 :]
        for inside in range(1, gap + 1):
            computed[:, inside : inside + length - gap - 1] |= ends
    own = torch.cat([computed, computed.new_ones(1, length)])
    present = _spread(F.pad(own, (1, 1)), 1)  # with the halos; its columns are the positions -1 to `length`
    if int(present.sum()) >= PACKED_SHARE * n_patterns * length:
        return None
    pattern, column = present.nonzero().unbind(1)
    row = (present.flatten().cumsum(0) - 1).view_as(present)[:, 1:-1]
    return _Layout(pattern, column - 1, torch.where(own, row, row[-1]), computed)


def _stage(layout: _Layout, n_patterns: int, length: int) -> Stage:
    total, n_rows = float(n_patterns * length), len(layout.pattern)
    pairs = torch.empty(0, dtype=torch.int32, device=layout.pattern.device)
    if layout.computed is None:
        return Stage(n_patterns, n_rows, total, None, None, pairs)
    beyond = (layout.position < 0) | (layout.position >= length)
    holder = layout.row_at[layout.pattern, layout.position.clamp(0, length - 1)].masked_fill(beyond, -1)
    lacking = n_patterns - layout.computed.sum(0)
    samples = torch.cat([torch.ones_like(layout.computed, dtype=torch.int64), lacking[None]])
    count = samples[layout.pattern, layout.position.clamp(0, length - 1)].to(torch.float32)
    count = count.where(holder == torch.arange(n_rows, device=holder.device), 0.0)
    return Stage(1, n_rows - length - 2, total, count, holder.to(torch.int32)[None], pairs)


def _pairs(before: _Layout, after: _Layout, padding: int) -> Tensor:
    """(2, rows after) int32: the rows of `before` that a pool of 2 joins; -1: a padding zero."""
    length, next_length = before.row_at.shape[1], after.row_at.shape[1]
    inside = (after.position >= 0) & (after.position < next_length)
    first = 2 * after.position - padding
    rows = [
        before.row_at[after.pattern, p.clamp(0, length - 1)].where(inside & (p >= 0) & (p < length), -1)
        for p in (first, first + 1)
    ]
    return torch.stack(rows).to(torch.int32)


def _input_rows(layout: _Layout) -> tuple[Tensor, Tensor]:
    """`point` and `position` of a plan."""
    length = layout.row_at.shape[1]
    inside = (layout.position >= 0) & (layout.position < length)
    position = layout.position.where(inside, -1)
    point = layout.pattern * length + layout.position
    if layout.computed is not None:
        # Some position that no pattern of its own computes is blank: it stands for the blank pattern.
        blank = torch.nonzero(~layout.computed.flatten())[0]
        own = inside & (layout.pattern < len(layout.computed))
        point = point.where(own, blank)
        # A halo's point is blank as well, and the input of a halo is read as it stands.
    return point.where(inside, 0), position


def _spread(mask: Tensor, reach: int) -> Tensor:
    """True where any of the positions up to `reach` away is."""
    spread = mask.clone()
    for distance in range(1, min(reach, mask.shape[1] - 1) + 1):
        spread[:, distance:] |= mask[:, :-distance]
        spread[:, :-distance] |= mask[:, distance:]
    return spread


def peak_conv(
    x: Tensor,  # (n_rows, in_channels)
    weight: Tensor,  # (3, in_channels, out_channels)
    shift: int,
) -> Tensor:
    """3-wide convolution over a list of rows: out[r] = x[r - shift] W[0] + x[r] W[1] + x[r + shift] W[2].

    Rows before the first and after the last are zero. What it gives for the halos of a packed list is of no use.

    Args:
        x: float32 or float64; under autocast it and the weight are cast as torch's own matrix products do.
        weight: the taps, any strides; the same dtype.
        shift: rows from a position to the next; negative: the list backwards.

    Returns:
        (n_rows, out_channels).

    Raises:
        ValueError: for shapes, dtypes or devices that do not agree.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.ndim != 2:
        raise ValueError(f"peak_conv: x must be (n_rows, in_channels), got {tuple(x.shape)}")
    _check("peak_conv", "weight", weight, (KERNEL_WIDTH, x.shape[1], weight.shape[-1]), x)
    return torch.ops.xrdfast.peak_conv(x, weight, shift)


def peak_stage(
    x: Tensor,  # (n_rows, in_channels)
    first: Tensor,  # (3, in_channels, channels)
    second: Tensor,  # (3, channels, channels)
    widen: Tensor | None,  # (in_channels, channels)
    norms: Sequence[tuple[Tensor, Tensor]],  # two, of (channels,) each
    stage: Stage,
    *,
    pool: str,
) -> Tensor:
    """A whole residual block in evaluation mode and its pool, without the rows in between ever leaving the cache.

        y = LeakyReLU(scale2 conv(LeakyReLU(scale1 conv(x, first) + offset1), second) + offset2 + x widen)

    What `peak_conv` and `peak_norm` give one after the other, which it falls back to on wide blocks and GPUs.

    Args:
        x: float32 or float64.
        first: taps, already folded with the widening.
        second: taps.
        widen: None where x has the channels already.
        norms: scale and offset of either batch norm, from its running statistics.
        stage: of the rows of x.
        pool: "max" or "mean".

    Returns:
        (n_rows of the next stage, channels).

    Raises:
        ValueError: for shapes, dtypes or devices that do not agree.

    Note:
        No gradients: for evaluation only.
    """
    if pool not in ("max", "mean"):
        raise ValueError(f"peak_stage: pool must be max or mean, got {pool!r}")
    n_in, width = x.shape[-1], second.shape[-1]
    n_rows = stage.n_touched if stage.count is None else len(stage.count)
    (scale1, offset1), (scale2, offset2) = norms
    rules = {"x": (x, (n_rows, n_in)), "first": (first, (KERNEL_WIDTH, n_in, width))}
    rules |= {"second": (second, (KERNEL_WIDTH, width, width)), "widen": (widen, (n_in, width))}
    channels = {"scale1": scale1, "offset1": offset1, "scale2": scale2, "offset2": offset2}
    rules |= {name: (tensor, (width,)) for name, tensor in channels.items()}
    for name, (tensor, shape) in rules.items():
        if tensor is not None:
            _check("peak_stage", name, tensor, shape, x)
    if widen is None and n_in != width:
        raise ValueError(f"peak_stage: widen must be ({n_in}, {width}), got None")
    settings = (stage.halo, stage.pairs, stage.shift, stage.n_touched, pool == "max")
    return torch.ops.xrdfast.peak_stage(x, first, second, widen, scale1, offset1, scale2, offset2, *settings)


def peak_stage_reference(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    widen: Tensor | None,
    scale1: Tensor,
    offset1: Tensor,
    scale2: Tensor,
    offset2: Tensor,
    halo: Tensor | None,
    pairs: Tensor,
    shift: int,
    n_touched: int,
    maximum: bool,
) -> Tensor:
    """One operator after the other, with norms of mean 0 and variance 1."""
    mean, var = torch.zeros_like(scale1), torch.ones_like(scale1)
    ops = torch.ops.xrdfast

    def norm(
        h: Tensor, residual: Tensor | None, scale: Tensor, offset: Tensor, take: Tensor | None
    ) -> Tensor:
        return ops.peak_norm(
            h, residual, scale, offset, mean, var, 0.0, None, float(len(h)), take, len(h), maximum
        )[0]

    inner = norm(ops.peak_conv(x, first, shift), None, scale1, offset1, halo)
    wide = x if widen is None else x @ widen
    return norm(ops.peak_conv(inner, second, shift), wide, scale2, offset2, pairs)


def _check(op: str, name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} must be {tuple(shape)} {like.dtype} on {like.device}, "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )


def peak_conv_reference(x: Tensor, weight: Tensor, shift: int) -> Tensor:
    """Plain PyTorch: three products, the outer two added to slices in place."""
    before, after = (0, 2) if shift >= 0 else (2, 0)
    out = x @ weight[1]
    kept = max(len(x) - abs(shift), 0)
    out[len(x) - kept :].addmm_(x[:kept], weight[before])
    out[:kept].addmm_(x[len(x) - kept :], weight[after])
    return out


def peak_conv_weight_reference(x: Tensor, grad_out: Tensor, shift: int) -> Tensor:
    """Gradient of the taps, (3, in_channels, out_channels): sums over rows of x[r + (k - 1) shift] grad_out[r]."""
    kept = max(len(x) - shift, 0)
    # As (out, in) products: the memory order of the parameters that these are gradients of.
    taps = [
        grad_out[len(x) - kept :].T @ x[:kept],
        grad_out.T @ x,
        grad_out[:kept].T @ x[len(x) - kept :],
    ]
    return torch.stack(taps).mT


class Normed(NamedTuple):
    """What `peak_norm` gives."""

    out: Tensor  # (n_rows_out, channels)
    mean: Tensor  # (channels,) used in the normalisation
    var: Tensor  # (channels,) biased


def peak_norm(
    h: Tensor,  # (n_rows, channels)
    gamma: Tensor,  # (channels,)
    beta: Tensor,  # (channels,)
    stage: Stage,
    *,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    residual: Tensor | None = None,  # (n_rows, channels)
    pool: str | None = None,
) -> Normed:
    """Batch norm, residual, LeakyReLU and then the pool, or the filling of halos, in one pass.

        y = LeakyReLU(gamma (h - mean) / sqrt(var + eps) + beta + residual),   slope 0.01

    Without a pool, out[r] = y[halo[r]]; with one, out[r] = the maximum or mean of y[pairs[0, r]] and y[pairs[1, r]];
    index -1 stands for a row of zeros. Batch statistics weigh each row by the number of samples it stands for.

    Args:
        h: float32 or float64; half precisions are taken up to the dtype of gamma.
        gamma: scale.
        beta: offset.
        stage: of the rows of h.
        statistics: mean and biased variance of each channel; None: those of the batch.
        eps: added to the variance.
        residual: added before the activation.
        pool: "max", "mean" or None.

    Returns:
        Values and the statistics used; no gradient flows through the latter.

    Raises:
        ValueError: for shapes, dtypes or devices that do not agree.

    Note:
        Deterministic for a given number of threads. Equal maxima pass their gradient to the first.
    """
    if pool not in (None, "max", "mean"):
        raise ValueError(f"peak_norm: pool must be max, mean or None, got {pool!r}")
    if statistics is None and stage.total < 2:
        raise ValueError(f"peak_norm: batch statistics must be over 2 samples or more, got {stage.total:.0f}")
    mean, var = statistics or (None, None)
    take = stage.halo if pool is None else stage.pairs
    h = h.to(gamma.dtype)
    residual = None if residual is None else residual.to(gamma.dtype)
    n_rows = stage.n_touched if stage.count is None else len(stage.count)
    rules = {"h": (h, (n_rows, h.shape[-1])), "residual": (residual, (n_rows, h.shape[-1]))}
    channels = {"gamma": gamma, "beta": beta, "mean": mean, "variance": var}
    rules |= {name: (tensor, h.shape[-1:]) for name, tensor in channels.items()}
    for name, (tensor, shape) in rules.items():
        if tensor is not None:
            _check("peak_norm", name, tensor, shape, h)
    return Normed(
        *torch.ops.xrdfast.peak_norm(
            h,
            residual,
            gamma,
            beta,
            mean,
            var,
            eps,
            stage.count,
            stage.total,
            take,
            stage.n_touched,
            pool == "max",
        )
    )


def peak_norm_reference(
    h: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    count: Tensor | None,
    total: float,
    take: Tensor | None,
    n_touched: int,
    maximum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch; its autograd is the yardstick of the backward kernel."""
    if mean is None or var is None:
        weight = None if count is None else count.to(h.dtype)[:, None]
        mean = (h if weight is None else h * weight).sum(0) / total
        square = (h - mean).square()
        var = (square if weight is None else square * weight).sum(0) / total
    y = (h - mean) * (gamma * (var + eps).rsqrt()) + beta
    y = F.leaky_relu(y if residual is None else y + residual, NEGATIVE_SLOPE)
    if take is not None:
        rows = torch.cat([y, y.new_zeros(1, y.shape[1])])
        index = torch.where(take < 0, len(y), take).long()
        taken = [rows[i] for i in index]
        if len(taken) == 1:
            y = taken[0]
        elif maximum:  # torch.maximum would halve the gradient of equal values
            first, second = taken
            y = torch.where((second > first) | second.isnan(), second, first)
        else:
            y = 0.5 * (taken[0] + taken[1])
    return y, mean.detach().clone(), var.detach().clone()


def peak_norm_backward_reference(
    grad_out: Tensor,
    h: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    count: Tensor | None,
    total: float,
    take: Tensor | None,
    n_touched: int,
    maximum: bool,
    batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, residual (or of h again), gamma and beta, by the autograd of the reference."""
    base = torch.zeros_like(h) if residual is None else residual
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (h, base, gamma, beta)]
        statistics = (None, None) if batch else (mean, var)
        out = peak_norm_reference(
            inputs[0], inputs[1], *inputs[2:], *statistics, eps, count, total, take, n_touched, maximum
        )[0]
        return torch.autograd.grad(out, inputs, grad_out)


def _conv_fake(x: Tensor, weight: Tensor, shift: int) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]))


def _conv_weight_fake(x: Tensor, grad_out: Tensor, shift: int) -> Tensor:
    return x.new_empty((KERNEL_WIDTH, grad_out.shape[1], x.shape[1])).transpose(1, 2)


def _norm_fake(h, residual, gamma, beta, mean, var, eps, count, total, take, n_touched, maximum):
    n_rows = h.shape[0] if take is None else take.shape[1]
    return h.new_empty((n_rows, h.shape[1])), torch.empty_like(gamma), torch.empty_like(gamma)


def _stage_fake(
    x, first, second, widen, scale1, offset1, scale2, offset2, halo, pairs, shift, n_touched, maximum
):
    return x.new_empty((pairs.shape[1], second.shape[2]))


def _norm_backward_fake(grad_out, h, residual, gamma, beta, *rest):
    return torch.empty_like(h), torch.empty_like(h), torch.empty_like(gamma), torch.empty_like(beta)


def _conv_setup(ctx, inputs, output) -> None:
    x, weight, ctx.shift = inputs
    ctx.save_for_backward(x, weight)


def _conv_backward(ctx, grad_out):
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        # x[r] meets grad_out[r + shift] by the first tap: the shift turns round.
        grad_x = torch.ops.xrdfast.peak_conv(grad_out, weight.transpose(1, 2), -ctx.shift)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.xrdfast.peak_conv_weight(x, grad_out, ctx.shift)
    return grad_x, grad_weight, None


def _norm_setup(ctx, inputs, output) -> None:
    h, residual, gamma, beta, mean, _, eps, count, total, take, n_touched, maximum = inputs
    ctx.save_for_backward(h, residual, gamma, beta, output[1], output[2], count, take)
    ctx.settings = eps, total, n_touched, maximum, mean is None
    ctx.mark_non_differentiable(output[1], output[2])


def _norm_backward(ctx, grad_out, *_):
    h, residual, gamma, beta, mean, var, count, take = ctx.saved_tensors
    eps, total, n_touched, maximum, batch = ctx.settings
    grad_h, grad_residual, grad_gamma, grad_beta = torch.ops.xrdfast.peak_norm_backward(
        grad_out.contiguous(),
        h,
        residual,
        gamma,
        beta,
        mean,
        var,
        eps,
        count,
        total,
        take,
        n_touched,
        maximum,
        batch,
    )
    if residual is None:
        grad_residual = None
    return grad_h, grad_residual, grad_gamma, grad_beta, *[None] * 8


def _native_for(*tensors: Tensor) -> ModuleType | None:
    """The CPU module where it has the dtype of the tensors."""
    return _native.cpu() if tensors[0].dtype in _NATIVE_DTYPES else None


def _conv_cpu(x: Tensor, weight: Tensor, shift: int) -> Tensor:
    module = _native_for(x)
    if module is None:
        return peak_conv_reference(x, weight, shift)
    if max(weight.shape[1:]) > MAX_NATIVE_WIDTH:
        if _has_tiles(x, shift):
            return _winograd_conv(module, x, weight, shift)
        return peak_conv_reference(x, weight, shift)
    x, weight = x.contiguous(), weight.contiguous()
    out = x.new_empty((len(x), weight.shape[2]))
    getattr(module, f"peak_conv_{_NATIVE_DTYPES[x.dtype]}")(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        *x.shape,
        weight.shape[2],
        shift,
        torch.get_num_threads(),
    )
    return out


def _conv_weight_cpu(x: Tensor, grad_out: Tensor, shift: int) -> Tensor:
    module = _native_for(x)
    if module is None:
        return peak_conv_weight_reference(x, grad_out, shift)
    if max(x.shape[1], grad_out.shape[1]) > MAX_NATIVE_WIDTH:
        if _has_tiles(x, shift):
            return _winograd_conv_weight(module, x, grad_out, shift)
        return peak_conv_weight_reference(x, grad_out, shift)
    x, grad_out = x.contiguous(), grad_out.contiguous()
    grad = x.new_empty((KERNEL_WIDTH, x.shape[1], grad_out.shape[1]))
    getattr(module, f"peak_conv_weight_{_NATIVE_DTYPES[x.dtype]}")(
        x.data_ptr(),
        grad_out.data_ptr(),
        grad.data_ptr(),
        *x.shape,
        grad_out.shape[1],
        shift,
        torch.get_num_threads(),
    )
    return grad.mT.contiguous().mT  # in the memory order of the parameters


def _stage_cpu(
    x, first, second, widen, scale1, offset1, scale2, offset2, halo, pairs, shift, n_touched, maximum
):
    width = second.shape[2]
    module = _native_for(x)
    if module is None or width > MAX_NATIVE_WIDTH or shift < 1:
        return peak_stage_reference(
            x, first, second, widen, scale1, offset1, scale2, offset2, halo, pairs, shift, n_touched, maximum
        )
    y, out = x.new_empty((len(x), width)), x.new_empty((pairs.shape[1], width))
    given = (x, first * scale1, second * scale2, widen, offset1, offset2, halo, pairs, y, out)
    held = [None if t is None else t.contiguous() for t in given]
    getattr(module, f"peak_stage_{_NATIVE_DTYPES[x.dtype]}")(
        *(0 if t is None else t.data_ptr() for t in held),
        len(x),
        len(out),
        x.shape[1],
        width,
        n_touched,
        shift,
        maximum,
        torch.get_num_threads(),
    )
    return out


def _has_tiles(x: Tensor, shift: int) -> bool:
    """Whether a wide convolution is worth Winograd's transforms, which cost 7 passes over the weights."""
    return len(x) >= _WINOGRAD_ROWS and shift != 0 and len(x) % shift == 0 and len(x) >= 4 * abs(shift)


class _Tiles(NamedTuple):
    """Positions of a list in pairs, and the pieces in which their planes fit into the cache."""

    n_positions: int
    n_patterns: int  # rows of a position
    pieces: list[tuple[int, int]]  # of tiles

    @staticmethod
    def of(n_rows: int, shift: int) -> _Tiles:
        n_patterns = abs(shift)
        n_positions = n_rows // n_patterns
        n_tiles = (n_positions + 1) // 2
        step = max(1, _PIECE_ROWS // n_patterns)
        pieces = [(i, min(n_tiles, i + step)) for i in range(0, n_tiles, step)]
        return _Tiles(n_positions, n_patterns, pieces)

    def planes(self, like: Tensor, width: int) -> Tensor:
        """Room for the planes of any piece."""
        longest = self.pieces[0][1] * self.n_patterns
        return like.new_empty(4 * longest * width)

    def call(self, function, rows: Tensor, planes: Tensor, piece: tuple[int, int]) -> Tensor:
        """Maps between rows and planes; returns the planes of the piece, (4, tiles * patterns, channels)."""
        width = rows.shape[1]
        n_rows = (piece[1] - piece[0]) * self.n_patterns
        threads = torch.get_num_threads()
        function(
            rows.data_ptr(), planes.data_ptr(), self.n_positions, self.n_patterns * width, *piece, threads
        )
        return planes[: 4 * n_rows * width].view(4, n_rows, width)


def _winograd_conv(module: ModuleType, x: Tensor, weight: Tensor, shift: int) -> Tensor:
    """The convolution by F(2, 3): 4 products for two positions instead of 6.

    In float32 its rounding error is 1.2 times that of the three products (measured, 256 to 512 channels).

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
    """
    x, kind = x.contiguous(), _NATIVE_DTYPES[x.dtype]
    # The taps are stored (3, out, in), or turned (3, in, out): either way as they lie.
    turned = weight.is_contiguous()
    taps = weight if turned else weight.mT.contiguous()
    n_in, n_out = weight.shape[1:]
    u = x.new_empty((4, *taps.shape[1:]))
    getattr(module, f"winograd_weight_{kind}")(
        taps.data_ptr(), u.data_ptr(), n_in * n_out, shift < 0, torch.get_num_threads()
    )
    u = u if turned else u.mT
    tiles = _Tiles.of(len(x), shift)
    room_in, room_out = tiles.planes(x, n_in), tiles.planes(x, n_out)
    out = x.new_empty((len(x), n_out))
    to_planes, to_rows = (getattr(module, f"winograd_{name}_{kind}") for name in ("input", "output"))
    for piece in tiles.pieces:
        v = tiles.call(to_planes, x, room_in, piece)
        m = room_out[: 4 * v.shape[1] * n_out].view(4, v.shape[1], n_out)
        torch.bmm(v, u, out=m)
        tiles.call(to_rows, out, room_out, piece)
    return out


def _winograd_conv_weight(module: ModuleType, x: Tensor, grad_out: Tensor, shift: int) -> Tensor:
    """Gradient of the taps through the same tiles."""
    x, grad_out, kind = x.contiguous(), grad_out.contiguous(), _NATIVE_DTYPES[x.dtype]
    n_in, n_out = x.shape[1], grad_out.shape[1]
    tiles = _Tiles.of(len(x), shift)
    room_in, room_out = tiles.planes(x, n_in), tiles.planes(x, n_out)
    grad_u = x.new_zeros((4, n_out, n_in))
    to_planes = getattr(module, f"winograd_input_{kind}")
    from_gradient = getattr(module, f"winograd_output_backward_{kind}")
    for piece in tiles.pieces:
        v = tiles.call(to_planes, x, room_in, piece)
        m = tiles.call(from_gradient, grad_out, room_out, piece)
        grad_u.baddbmm_(m.mT, v)
    grad = x.new_empty((KERNEL_WIDTH, n_out, n_in))
    getattr(module, f"winograd_weight_backward_{kind}")(
        grad_u.data_ptr(), grad.data_ptr(), n_in * n_out, torch.get_num_threads()
    )
    return grad.mT


def _norm_arguments(
    h: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    count: Tensor | None,
    total: float,
    take: Tensor | None,
    n_touched: int,
    maximum: bool,
    batch: bool,
) -> tuple[list[Tensor | None], int, list]:
    """Tensors to hold until the call returns, rows of the result, and a native call's arguments."""
    held = [None if x is None else x.contiguous() for x in (h, residual, gamma, beta, count, take, mean, var)]
    n_rows_out = len(h) if take is None else take.shape[1]
    pointers = [0 if x is None else x.data_ptr() for x in held]
    n_take = 1 if take is None else len(take)
    sizes = [len(h), n_rows_out, h.shape[1], n_touched, n_take, maximum, batch, eps, total]
    return held, n_rows_out, pointers + sizes


def _norm_cpu(h, residual, gamma, beta, mean, var, *rest):
    module = _native_for(h)
    if module is None:
        return peak_norm_reference(h, residual, gamma, beta, mean, var, *rest)
    batch = mean is None or var is None
    mean, var = (torch.empty_like(gamma) if x is None else x.clone() for x in (mean, var))
    held, n_rows_out, arguments = _norm_arguments(h, residual, gamma, beta, mean, var, *rest, batch)
    out = h.new_empty((n_rows_out, h.shape[1]))
    getattr(module, f"peak_norm_{_NATIVE_DTYPES[h.dtype]}")(
        *arguments, out.data_ptr(), torch.get_num_threads()
    )
    return out, *held[-2:]


def _norm_backward_cpu(grad_out, h, *rest):
    module = _native_for(h)
    if module is None:
        return peak_norm_backward_reference(grad_out, h, *rest)
    _held, _, arguments = _norm_arguments(h, *rest)
    grad_out = grad_out.contiguous()
    gamma = rest[1]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (h, h, gamma, gamma)]
    getattr(module, f"peak_norm_backward_{_NATIVE_DTYPES[h.dtype]}")(
        *arguments, grad_out.data_ptr(), *(x.data_ptr() for x in grads), torch.get_num_threads()
    )
    return tuple(grads)


def _norm_cuda(h, *rest):
    module = _native.cuda() if h.dtype in _NATIVE_DTYPES else None
    return peak_norm_reference(h, *rest) if module is None else _norm_on_device(module, h, *rest)


def _norm_backward_cuda(grad_out, h, *rest):
    module = _native.cuda() if h.dtype in _NATIVE_DTYPES else None
    if module is None:
        return peak_norm_backward_reference(grad_out, h, *rest)
    return _norm_backward_on_device(module, grad_out, h, *rest)


def _norm_on_device(module: ModuleType, h, residual, gamma, beta, mean, var, *rest):
    """The kernels of `_cuda`, or of `_emu` in the tests."""
    batch = mean is None or var is None
    mean, var = (torch.empty_like(gamma) if x is None else x.clone() for x in (mean, var))
    held, n_rows_out, arguments = _norm_arguments(h, residual, gamma, beta, mean, var, *rest, batch)
    out = h.new_empty((n_rows_out, h.shape[1]))
    sums, weights = h.new_empty((_NORM_PARTS, 2, h.shape[1])), h.new_empty(_NORM_PARTS)
    with device_stream(h) as stream:
        getattr(module, f"peak_norm_{_NATIVE_DTYPES[h.dtype]}")(
            *arguments, sums.data_ptr(), weights.data_ptr(), out.data_ptr(), stream
        )
    return out, *held[-2:]


def _norm_backward_on_device(module: ModuleType, grad_out, h, *rest):
    _held, _, arguments = _norm_arguments(h, *rest)
    take, gamma = rest[8], rest[1]
    taker = taken = None
    if take is not None:  # which rows of the result took each row
        place = take.flatten()
        ordered, taker = place.sort(stable=True)
        taker = taker.to(torch.int32)
        taken = torch.searchsorted(
            ordered, torch.arange(len(h) + 1, dtype=take.dtype, device=h.device), out_int32=True
        )
    grad_out = grad_out.contiguous()
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (h, h, gamma, gamma)]
    sums = h.new_empty((_NORM_PARTS, 2, h.shape[1]))
    pointers = [0 if x is None else x.data_ptr() for x in (sums, taker, taken, grad_out, *grads)]
    with device_stream(h) as stream:
        getattr(module, f"peak_norm_backward_{_NATIVE_DTYPES[h.dtype]}")(*arguments, *pointers, stream)
    return tuple(grads)


LIBRARY.impl("peak_conv", _conv_cpu, "CPU")
LIBRARY.impl("peak_conv_weight", _conv_weight_cpu, "CPU")
LIBRARY.impl("peak_stage", _stage_cpu, "CPU")
LIBRARY.impl("peak_stage", peak_stage_reference, "CUDA")
LIBRARY.impl("peak_norm", _norm_cpu, "CPU")
LIBRARY.impl("peak_norm_backward", _norm_backward_cpu, "CPU")
LIBRARY.impl("peak_conv", peak_conv_reference, "CUDA")
LIBRARY.impl("peak_conv_weight", peak_conv_weight_reference, "CUDA")
LIBRARY.impl("peak_norm", _norm_cuda, "CUDA")
LIBRARY.impl("peak_norm_backward", _norm_backward_cuda, "CUDA")
torch.library.register_fake("xrdfast::peak_conv", _conv_fake)
torch.library.register_fake("xrdfast::peak_conv_weight", _conv_weight_fake)
torch.library.register_fake("xrdfast::peak_norm", _norm_fake)
torch.library.register_fake("xrdfast::peak_stage", _stage_fake)
torch.library.register_fake("xrdfast::peak_norm_backward", _norm_backward_fake)
torch.library.register_autograd("xrdfast::peak_conv", _conv_backward, setup_context=_conv_setup)
torch.library.register_autograd("xrdfast::peak_norm", _norm_backward, setup_context=_norm_setup)
