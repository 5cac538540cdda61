"""Lists of rows: which positions of a batch a stack of convolutions has to compute.

A row is one position of one pattern with its channels. A stage (residual block and pool) works on a list of rows,
kept in one of two orders:

* packed: far from every peak, all patterns of a batch see the same thing, so those positions are computed once, in an
  extra blank pattern. The list holds, pattern by pattern, the segments of touched positions, each between two halo
  rows, and at last the whole blank pattern between two halos. A halo holds what lies beyond the segment: the blank
  pattern's value, or zero beyond the grid. So a 3-wide convolution is three products with the list shifted by one
  row, and no kernel but the norm's has to know where a segment ends.
* dense: all positions of all patterns, position by position, and the list is shifted by the number of patterns. No
  halo, and nothing multiplied with padding zeros.

`plan_rows` chooses for each stage by counting rows. Both are exact, in training too: a blank row weighs in the batch
statistics as many times as there are patterns that lack it, and what flows back to it is the sum over them.

A CUDA graph needs shapes that no batch changes. For that a packed list can be made with room for a number of rows known
beforehand, without anybody waiting for the count: the rows that are left over are zero and stand for nothing. Where a
batch has more rows than there is room for, a flag on the device says so, and the caller takes another graph: dense.

Not for the computation itself (`xrdfast.ops.peak_conv`, `xrdfast.ops.peak_norm`) or inputs without a convolution
stack.

Source: design of the published local branch, arXiv:2511.06976; the blank response is our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xrdfast import _native
from xrdfast.ops import device_stream

# Stages that may be packed: with 80 sticks the touched share after them is 0.06, 0.14, 0.28, 0.50, 0.78.
MAX_PACKED_STAGES = 5
# A stage is packed where it has fewer rows than this share of the dense ones.
PACKED_SHARE = 0.85
# Segments with no more untouched positions between them are joined: two halos cost as much.
MAX_GAP = 2
_MAX_ROOM = 8  # kMaxPackedStages of csrc/peak_plan.h
_REACH = 2  # positions that two 3-wide convolutions see to each side
_NATIVE_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


class Stage(NamedTuple):
    """The rows of one residual block, and how the pool after it makes the rows of the next."""

    shift: int  # rows from a position to the next one
    n_touched: int  # rows before the blank pattern, 0 where nobody counted them; dense: all
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
    # () bool on the device of the intensities, where `room` was given: the batch has more rows, and the lists are
    # empty (every row is left over), so that what is computed from them is of no use.
    overflow: Tensor | None = None


def plan_rows(
    intensity: Tensor,  # (n_patterns, length)
    paddings: Sequence[int],
    *,
    packed_stages: int = MAX_PACKED_STAGES,
    room: Sequence[int] | None = None,
) -> Plan:
    """Chooses the rows of every stage: blocks of reach 2, each followed by a pool of 2.

    A position is touched where a non-zero intensity (NaN is one) lies in its receptive field. A stage is packed while
    that takes fewer rows than dense order; once dense, all later ones are. Everything is dense where a gradient of the
    intensities is asked for, at every point, and while a CUDA graph is captured without `room`.

    Args:
        intensity: any float dtype; on a GPU float32 or float64, others are dense.
        paddings: for each stage, the padding of its pool at either end, 0 or 1.
        packed_stages: most stages that may be packed; more than 8 never are.
        room: rows of the first stages, which are packed whatever comes; None: as many as are counted.

    Returns:
        The plan; index tensors on the device of the intensities.

    Raises:
        ValueError: for intensities that are not two-dimensional, another padding, a length too short for the pools,
            or room for no row, or for too many stages.

    Note:
        On a GPU the host waits once for the count, unless `room` is given. Lists are the same in every run.
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
    if room is not None:
        packed_stages = len(room)
        if packed_stages > min(len(paddings), _MAX_ROOM) or min(room, default=0) < 1:
            raise ValueError(
                f"plan_rows: room must be rows of 1 to {min(len(paddings), _MAX_ROOM)} stages, got {list(room)}"
            )
    on_device = intensity.device.type == "cuda"
    captures = on_device and room is None and torch.cuda.is_current_stream_capturing()
    if captures or intensity.requires_grad or intensity.numel() == 0:
        packed_stages = 0
    packed_stages = min(packed_stages, len(paddings), _MAX_ROOM)
    intensity = intensity.detach()
    plan = None
    if packed_stages:
        module = (_native.cuda if on_device else _native.cpu)() if intensity.dtype in _NATIVE_DTYPES else None
        if room is not None and not (on_device and module):
            return plan_rows_reference(intensity != 0, paddings, packed_stages, room)
        if on_device:
            if module is not None:
                plan = _packed_on_device(module, intensity, paddings, lengths, packed_stages, room)
        elif module is None:
            return plan_rows_reference(intensity != 0, paddings, packed_stages)
        else:
            plan = _packed_on_cpu(module, intensity, paddings, lengths, packed_stages)
    if plan is None:
        overflow = None if room is None else torch.zeros((), dtype=torch.bool, device=intensity.device)
        plan = Plan(*_dense_input(intensity), [], overflow)
    n_packed = len(plan.stages)
    shapes = zip(lengths[n_packed:], lengths[n_packed + 1 :], paddings[n_packed:], strict=False)
    dense = [_dense_stage(len(intensity), *shape, intensity.device) for shape in shapes]
    return plan._replace(stages=plan.stages + dense)


def _dense_input(intensity: Tensor) -> tuple[Tensor, Tensor]:
    """`point` and `position` of dense rows."""
    n_patterns, length = intensity.shape
    point = torch.arange(intensity.numel(), device=intensity.device).view(intensity.shape).T.flatten()
    return point, torch.arange(length, device=intensity.device).repeat_interleave(n_patterns)


def _dense_stage(n_patterns: int, length: int, next_length: int, padding: int, device: torch.device) -> Stage:
    from_position = torch.arange(-padding, 2 * next_length - padding, dtype=torch.int32, device=device)
    rows = from_position[:, None] * n_patterns + torch.arange(n_patterns, dtype=torch.int32, device=device)
    if padding:
        beyond = (from_position < 0) | (from_position >= length)
        rows.masked_fill_(beyond[:, None], -1)
    pairs = rows.view(next_length, 2, n_patterns).transpose(0, 1).reshape(2, next_length * n_patterns)
    n_rows = n_patterns * length
    return Stage(n_patterns, n_rows, float(n_rows), None, None, pairs)


def _packed_on_cpu(
    module: ModuleType, intensity: Tensor, paddings: Sequence[int], lengths: Sequence[int], packed_stages: int
) -> Plan | None:
    """A plan of the packed stages that come first, by the native code; None where there are none."""
    intensity = intensity.contiguous()
    n_patterns, length = intensity.shape
    room = n_patterns * length
    # Far more than is used; what is not written to is never mapped.
    n_rows = intensity.new_zeros(packed_stages, dtype=torch.int64)
    point, position = intensity.new_empty((2, room), dtype=torch.int64)
    count = intensity.new_empty((packed_stages, room), dtype=torch.float32)
    halo = intensity.new_empty((packed_stages, room), dtype=torch.int32)
    pairs = intensity.new_empty((packed_stages, 2 * room), dtype=torch.int32)
    padding = torch.tensor(list(paddings), device="cpu")
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
        return None
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
    return Plan(point[: rows[0]], position[: rows[0]], stages)


def _packed_on_device(
    module: ModuleType,
    intensity: Tensor,
    paddings: Sequence[int],
    lengths: Sequence[int],
    packed_stages: int,
    room: Sequence[int] | None,
) -> Plan | None:
    """The same by the kernels of `_cuda`, or of `_emu` in the tests."""
    intensity = intensity.contiguous()
    kind = _NATIVE_DTYPES[intensity.dtype]
    n_patterns, length = intensity.shape
    n_dense = [n_patterns * n for n in lengths]
    felt, computed = intensity.new_empty((2, sum(n_dense[:packed_stages])), dtype=torch.uint8)
    first_row = intensity.new_empty((packed_stages, n_patterns + 1), dtype=torch.int64)
    n_rows, blank = (intensity.new_empty(n, dtype=torch.int64) for n in (packed_stages, n_patterns + 1))
    padding = torch.tensor(list(paddings[:packed_stages]), device="cpu")  # read by the host
    scratch = [x.data_ptr() for x in (felt, computed, first_row, n_rows, blank)]

    def call(step: str, n_stages: int, *pointers: int) -> None:
        with device_stream(intensity) as stream:
            settings = (n_patterns, length, n_stages, _REACH, MAX_GAP, *scratch, *pointers, stream)
            getattr(module, f"peak_{step}_{kind}")(intensity.data_ptr(), padding.data_ptr(), *settings)

    call("count", packed_stages)
    rows = list(room or ())
    if room is None:
        for n, dense in zip(n_rows.tolist(), n_dense, strict=False):  # waits for the device
            if n >= PACKED_SHARE * dense:
                break
            rows.append(n)
        if not rows:
            return None
    n_stages = len(rows)
    taken = [*rows[1:], n_dense[n_stages]]
    # Every row is written where rows were counted, and else what is left over has to be harmless.
    new = intensity.new_empty if room is None else intensity.new_full
    fill = [()] * 3 if room is None else [(-1,), (0,), (0.0,)]
    position = new((rows[0],), *fill[0], dtype=torch.int64)
    point = new((rows[0],), *fill[1], dtype=torch.int64)
    count = new((sum(rows),), *fill[2], dtype=torch.float32)
    halo = new((sum(rows),), *fill[0], dtype=torch.int32)
    pairs = new((2 * sum(taken),), *fill[0], dtype=torch.int32)
    row_at = intensity.new_empty(sum(n_dense[:n_stages]), dtype=torch.int32)
    overflow = intensity.new_empty((), dtype=torch.bool)
    sizes = torch.tensor([*rows, n_dense[n_stages]], device="cpu")  # read by the host
    lists = (sizes, overflow, point, position, count, halo, pairs, row_at)
    call("list", n_stages, *(x.data_ptr() for x in lists))
    parts = zip(count.split(rows), halo.split(rows), pairs.split([2 * n for n in taken]), strict=True)
    stages = [
        Stage(
            shift=1,
            n_touched=0 if room is not None else rows[i] - lengths[i] - 2,
            total=float(n_dense[i]),
            count=own_count,
            halo=own_halo[None],
            pairs=own_pairs.view(2, -1),
        )
        for i, (own_count, own_halo, own_pairs) in enumerate(parts)
    ]
    return Plan(point, position, stages, None if room is None else overflow)


def check_stage(op: str, stage: Stage, device: torch.device) -> None:
    """Refuses a stage that is not on the device of the rows it is used with."""
    for name in ("count", "halo", "pairs"):
        tensor = getattr(stage, name)
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: stage.{name} must be on {device}, got {tensor.device}")


class _Layout(NamedTuple):
    """Which row is where in one stage."""

    pattern: Tensor  # (n_rows,); the blank pattern is the last
    position: Tensor  # (n_rows,); -1 and the length are halos beyond the grid
    row_at: Tensor  # (n_patterns, or one more, length): the row with this value, a blank one where none is its own
    computed: Tensor | None  # (n_patterns, length) bool, rows of their own; None: all


def plan_rows_reference(
    touched: Tensor, paddings: Sequence[int], packed_stages: int, room: Sequence[int] | None = None
) -> Plan:
    """Plain PyTorch, with masks over all positions of all patterns (n_patterns, length)."""
    n_patterns, length = touched.shape
    share = PACKED_SHARE if room is None else math.inf
    layouts, stages = [], []
    for i, padding in enumerate(paddings):
        felt = _spread(touched, _REACH) if i < packed_stages else None
        layout = None if felt is None else _packed_layout(felt, share)
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
    plan = Plan(*_input_rows(layouts[0]), stages)
    return plan if room is None else _with_room(plan, room)


def _with_room(plan: Plan, room: Sequence[int]) -> Plan:
    """The plan with rows left over in its first stages, or, where there is too little room, with nothing else."""
    overflow = any(len(stage.count) > rows for stage, rows in zip(plan.stages, room, strict=False))

    def padded(x: Tensor, n: int, value: float) -> Tensor:
        kept = x[..., :0] if overflow else x
        return F.pad(kept, (0, n - kept.shape[-1]), value=value)

    stages = list(plan.stages)
    for i, (stage, rows) in enumerate(zip(plan.stages, room, strict=False)):
        taken = room[i + 1] if i + 1 < len(room) else stage.pairs.shape[1]
        count, halo, pairs = ((stage.count, rows, 0.0), (stage.halo, rows, -1), (stage.pairs, taken, -1))
        stages[i] = Stage(1, 0, stage.total, padded(*count), padded(*halo), padded(*pairs))
    point, position = padded(plan.point, room[0], 0), padded(plan.position, room[0], -1)
    return Plan(point, position, stages, torch.tensor(overflow, device=plan.point.device))


def _dense_layout(n_patterns: int, length: int, device: torch.device) -> _Layout:
    row = torch.arange(length * n_patterns, device=device)
    position = torch.div(row, max(n_patterns, 1), rounding_mode="floor")
    return _Layout(row - position * n_patterns, position, row.view(length, n_patterns).T, None)


def _packed_layout(felt: Tensor, share: float) -> _Layout | None:
    """Rows of the touched segments and of the blank pattern; None where that is no gain."""
    n_patterns, length = felt.shape
    computed = felt.clone()
    for gap in range(1, MAX_GAP + 1):
        ends = felt[:, : length - gap - 1] & felt[:, gap + 1 :]
        for inside in range(1, gap + 1):
            computed[:, inside : inside + length - gap - 1] |= ends
    own = torch.cat([computed, computed.new_ones(1, length)])
    present = _spread(F.pad(own, (1, 1)), 1)  # with the halos; its columns are the positions -1 to `length`
    if int(present.sum()) >= share * n_patterns * length:
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
        blank = (~layout.computed.flatten()).to(torch.uint8).argmax()  # or any: nothing is blank then
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
