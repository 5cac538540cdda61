"""3-wide convolutions over the rows of a stage (`xrdfast.ops.peak_plan`), and whole stages in evaluation mode.

Thin convolutions are own kernels, wide convolutions library products, on a CPU between Winograd's transforms where
lists are long.

Not for layers and parameters (`xrdfast.models.encoder`) or attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from xrdfast import _native
from xrdfast.ops import LIBRARY, check_tensor, device_stream
from xrdfast.ops.peak_plan import Stage, check_stage

KERNEL_WIDTH = 3
# Wider convolutions are matrix products large enough for the library.
MAX_NATIVE_WIDTH = 128
# The same on a GPU: on an H200 the library's three products take 1.2 (forward) and 1.4 times (weights) as long as ours
# at 32 channels, 0.75 and 0.5 times at 64 (benchmarks/bench_on_a_gpu.py).
MAX_DEVICE_WIDTH = 32
# Sums over rows that the weights' gradient on a GPU is made of: as many tiles as keep a device busy, of so many rows.
_WEIGHT_TILES = 1024
_TILE_WIDTH = 32
_MIN_PART_ROWS = 512
# Fewer rows are not worth Winograd's transforms.
_WINOGRAD_ROWS = 512
# Rows of a piece's products: enough for the library, and planes that stay in cache (at 256 channels 4 MB in float32).
_PIECE_ROWS = 512
_NATIVE_DTYPES = {torch.float32: "float32", torch.float64: "float64"}

LIBRARY.define("peak_conv(Tensor x, Tensor weight, int shift) -> Tensor")
LIBRARY.define("peak_conv_weight(Tensor x, Tensor grad_out, int shift) -> Tensor")
LIBRARY.define(
    "peak_stage(Tensor x, Tensor first, Tensor second, Tensor? widen, Tensor scale1, Tensor offset1, Tensor scale2, "
    "Tensor offset2, Tensor? halo, Tensor pairs, int shift, int n_touched, bool maximum) -> Tensor"
)


def peak_conv(
    x: Tensor,  # (n_rows, in_channels)
    weight: Tensor,  # (3, in_channels, out_channels)
    shift: int,
) -> Tensor:
    """3-wide convolution over a list of rows: out[r] = x[r - shift] W[0] + x[r] W[1] + x[r + shift] W[2].

    Rows before the first and after the last are zero. What it gives for the halos of a packed list is of no use.

    Args:
        x: float32 or float64; under autocast it and the weight are cast as torch's own matrix products do, which leave
            float64 alone.
        weight: the taps, any strides; the same dtype.
        shift: rows from a position to the next; negative: the list backwards.

    Returns:
        (n_rows, out_channels).

    Raises:
        ValueError: for shapes, dtypes or devices that do not agree.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.ndim != 2:
        raise ValueError(f"peak_conv: x must be (n_rows, in_channels), got {tuple(x.shape)}")
    check_tensor("peak_conv", "weight", weight, (KERNEL_WIDTH, x.shape[1], weight.shape[-1]), x)
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

    What `peak_conv` and `peak_norm` give one after the other, which it falls back to on wide blocks.

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
        No gradients: for evaluation only. Autocast changes nothing.
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
            check_tensor("peak_stage", name, tensor, shape, x)
    check_stage("peak_stage", stage, x.device)
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

    with torch.autocast(x.device.type, enabled=False):  # which would go on inside: the norm reads one dtype
        inner = norm(ops.peak_conv(x, first, shift), None, scale1, offset1, halo)
        wide = x if widen is None else x @ widen
        return norm(ops.peak_conv(inner, second, shift), wide, scale2, offset2, pairs)


def peak_conv_reference(x: Tensor, weight: Tensor, shift: int) -> Tensor:
    """Plain PyTorch: three products, the outer two added to slices in place."""
    before, after = (0, 2) if shift >= 0 else (2, 0)
    kept = max(len(x) - abs(shift), 0)
    with torch.autocast(x.device.type, enabled=False):  # in force where a backward runs inside it
        out = x @ weight[1]
        out[len(x) - kept :].addmm_(x[:kept], weight[before])
        out[:kept].addmm_(x[len(x) - kept :], weight[after])
    return out


def peak_conv_weight_reference(x: Tensor, grad_out: Tensor, shift: int) -> Tensor:
    """Gradient of the taps, (3, in_channels, out_channels): sums over rows of x[r + (k - 1) shift] grad_out[r]."""
    kept = max(len(x) - abs(shift), 0)
    # As (out, in) products: the memory order of the parameters that these are gradients of.
    with torch.autocast(x.device.type, enabled=False):
        taps = [
            grad_out[len(x) - kept :].T @ x[:kept],
            grad_out.T @ x,
            grad_out[:kept].T @ x[len(x) - kept :],
        ]
    return torch.stack(taps if shift >= 0 else taps[::-1]).mT


def _conv_fake(x: Tensor, weight: Tensor, shift: int) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]))


def _conv_weight_fake(x: Tensor, grad_out: Tensor, shift: int) -> Tensor:
    return x.new_empty((KERNEL_WIDTH, grad_out.shape[1], x.shape[1])).transpose(1, 2)


def _stage_fake(
    x, first, second, widen, scale1, offset1, scale2, offset2, halo, pairs, shift, n_touched, maximum
):
    return x.new_empty((pairs.shape[1], second.shape[2]))


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


def _conv_weight_setup(ctx, inputs, output) -> None:
    x, grad_out, ctx.shift = inputs
    ctx.save_for_backward(x, grad_out)


def _conv_weight_backward(ctx, grad):
    x, grad_out = ctx.saved_tensors
    grad_x = torch.ops.xrdfast.peak_conv(grad_out, grad.mT, -ctx.shift)
    return grad_x, torch.ops.xrdfast.peak_conv(x, grad, ctx.shift), None


def _native_for(dtype: torch.dtype) -> ModuleType | None:
    """The CPU module where it takes the dtype."""
    return _native.cpu() if dtype in _NATIVE_DTYPES else None


def _conv_cpu(x: Tensor, weight: Tensor, shift: int) -> Tensor:
    module = _native_for(x.dtype)
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
    module = _native_for(x.dtype)
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
    module = _native_for(x.dtype)
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


def _on_device(dtype: torch.dtype, *widths: int) -> ModuleType | None:
    """The CUDA module where it takes the dtype and is better than the library."""
    return _native.cuda() if dtype in _NATIVE_DTYPES and max(widths) <= MAX_DEVICE_WIDTH else None


def _conv_cuda(x: Tensor, weight: Tensor, shift: int) -> Tensor:
    module = _on_device(x.dtype, *weight.shape[1:])
    return (
        peak_conv_reference(x, weight, shift) if module is None else _conv_on_device(module, x, weight, shift)
    )


def _conv_weight_cuda(x: Tensor, grad_out: Tensor, shift: int) -> Tensor:
    module = _on_device(x.dtype, x.shape[1], grad_out.shape[1])
    if module is None:
        return peak_conv_weight_reference(x, grad_out, shift)
    return _conv_weight_on_device(module, x, grad_out, shift)


def _stage_cuda(x, first, second, *rest):
    module = _on_device(x.dtype, *first.shape[1:])
    if module is None:
        return peak_stage_reference(x, first, second, *rest)
    return _stage_on_device(module, x, first, second, *rest)


def _conv_on_device(module: ModuleType, x: Tensor, weight: Tensor, shift: int) -> Tensor:
    """The kernel of `_cuda`, or of `_emu` in the tests."""
    x, weight = x.contiguous(), weight.contiguous()
    out = x.new_empty((len(x), weight.shape[2]))
    with device_stream(x) as stream:
        getattr(module, f"peak_conv_{_NATIVE_DTYPES[x.dtype]}")(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, weight.shape[2], shift, stream
        )
    return out


def _conv_weight_on_device(module: ModuleType, x: Tensor, grad_out: Tensor, shift: int) -> Tensor:
    x, grad_out = x.contiguous(), grad_out.contiguous()
    shape = (KERNEL_WIDTH, x.shape[1], grad_out.shape[1])
    tiles = -(-shape[1] // _TILE_WIDTH) * -(-shape[2] // _TILE_WIDTH)
    n_parts = max(1, min(_WEIGHT_TILES // max(tiles, 1), len(x) // _MIN_PART_ROWS))
    parts, grad = x.new_empty((n_parts, *shape)), x.new_empty(shape)
    with device_stream(x) as stream:
        getattr(module, f"peak_conv_weight_{_NATIVE_DTYPES[x.dtype]}")(
            x.data_ptr(),
            grad_out.data_ptr(),
            grad.data_ptr(),
            *x.shape,
            shape[2],
            shift,
            parts.data_ptr(),
            n_parts,
            stream,
        )
    return grad.mT.contiguous().mT  # in the memory order of the parameters


def _stage_on_device(
    module: ModuleType,
    x,
    first,
    second,
    widen,
    scale1,
    offset1,
    scale2,
    offset2,
    halo,
    pairs,
    shift,
    n_touched,
    maximum,
):
    width = second.shape[2]
    inner, y = x.new_empty((2, len(x), width))
    out = x.new_empty((pairs.shape[1], width))
    given = (x, first * scale1, second * scale2, widen, offset1, offset2, halo, pairs, y, out)
    held = [None if t is None else t.contiguous() for t in given]
    with device_stream(x) as stream:
        getattr(module, f"peak_stage_{_NATIVE_DTYPES[x.dtype]}")(
            *(0 if t is None else t.data_ptr() for t in held),
            len(x),
            len(out),
            x.shape[1],
            width,
            n_touched,
            shift,
            maximum,
            inner.data_ptr(),
            stream,
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
    return (grad if shift > 0 else grad.flip(0)).mT


LIBRARY.impl("peak_conv", _conv_cpu, "CPU")
LIBRARY.impl("peak_conv_weight", _conv_weight_cpu, "CPU")
LIBRARY.impl("peak_stage", _stage_cpu, "CPU")
LIBRARY.impl("peak_conv", _conv_cuda, "CUDA")
LIBRARY.impl("peak_conv_weight", _conv_weight_cuda, "CUDA")
LIBRARY.impl("peak_stage", _stage_cuda, "CUDA")
torch.library.register_fake("xrdfast::peak_conv", _conv_fake)
torch.library.register_fake("xrdfast::peak_conv_weight", _conv_weight_fake)
torch.library.register_fake("xrdfast::peak_stage", _stage_fake)
torch.library.register_autograd("xrdfast::peak_conv", _conv_backward, setup_context=_conv_setup)
torch.library.register_autograd(
    "xrdfast::peak_conv_weight", _conv_weight_backward, setup_context=_conv_weight_setup
)
