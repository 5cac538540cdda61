"""Distillation with shape-wise regularisation: the ranked outputs of one batch against those of the batch before.

For the loss of one or more classification heads and its gradient. Not for keeping the memory between batches, weighing
the loss or averaging it: that is the caller's.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from xrdfast import _native
from xrdfast.ops import LIBRARY, check_tensor, device_stream

MAX_HEADS = 8  # these two as in csrc/dsr_loss.h
MAX_HEAD_CLASSES = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

LIBRARY.define(
    "dsr_loss(Tensor logits, Tensor? previous_ranked, float temperature, int[] class_offset) "
    "-> (Tensor loss, Tensor ranked, Tensor slope)"
)
LIBRARY.define(
    "dsr_loss_backward(Tensor grad_loss, Tensor slope, int[] class_offset, ScalarType dtype) -> Tensor"
)


def dsr_loss(
    logits: Tensor,  # (n_patterns, n_classes)
    previous_ranked: Tensor | None,  # (n_patterns, n_classes)
    *,
    temperature: float = 4.0,
    class_offset: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """KL divergence between the ranked, softened outputs of two batches, row by row and head by head.

        s = z[order];   p = softmax(s / T);   q = softmax(s_prev / T);   loss = T^2 sum_j q_j (log q_j - log p_j)
        dloss / dz[order[j]] = T (p_j - q_j)

    The ranking is stable: equal logits (0 and -0 are) keep their order.

    Args:
        logits: float32, bfloat16 or float64; the classes of all heads side by side.
        previous_ranked: `ranked` of the batch before, of the same shape and dtype; a constant. Its rows are taken as
            they are, ascending or not. None, for a first batch: the batch is compared with itself, so the loss is 0
            and so is its gradient.
        temperature: T, > 0.
        class_offset: first class of each head, then n_classes; None is one head. Up to 8 heads of 1 to 1,024 classes.

    Returns:
        loss: (n_patterns, n_heads), float32, float64 for float64 logits.
        ranked: (n_patterns, n_classes) of the dtype of the logits, ascending in each head: the next batch's
            `previous_ranked`. No gradient.

    Raises:
        TypeError: a dtype outside these; float16 is refused, as its range is too small for T^2 times a divergence.
        ValueError: a shape, device, temperature or class_offset outside these rules.

    Note:
        Deterministic, in float32 inside also for bfloat16. NaN ranks last, and makes the loss and the gradient of its
        row and head NaN, as does +infinity or a head of -infinity alone. A single -infinity is a class of probability
        0: the loss is infinite where the other batch has something at this rank, and the rank adds nothing where it
        is -infinity in both. A head of one class has loss 0. Second derivatives are refused.

    Source:
        LightSKD, arXiv:2305.09183, distillation with shape-wise regularisation (DSR).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]])
        >>> loss, ranked = dsr_loss(logits, torch.tensor([[-1.0, 0.5, 2.0]]))
        >>> loss.item(), ranked.tolist()
        (0.0, [[-1.0, 0.5, 2.0]])
    """
    if class_offset is None:
        class_offset = (0, logits.shape[-1] if logits.ndim else 0)
    loss, ranked, _ = torch.ops.xrdfast.dsr_loss(logits, previous_ranked, temperature, class_offset)
    return loss, ranked


def dsr_loss_reference(
    logits: Tensor, previous_ranked: Tensor | None, temperature: float, class_offset: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch, differentiable; the yardstick of the kernels."""
    real = torch.promote_types(logits.dtype, torch.float32)
    losses, ranks, slopes = [], [], []
    for begin, end in itertools.pairwise(class_offset):
        ranked, order = torch.sort(logits[:, begin:end], dim=1, stable=True)
        previous = ranked.detach() if previous_ranked is None else previous_ranked[:, begin:end]
        log_p = torch.log_softmax(ranked.to(real) / temperature, dim=1)
        log_q = torch.log_softmax(previous.to(real) / temperature, dim=1)
        q = log_q.exp()
        terms = torch.where(q == 0, 0.0, q * (log_q - log_p))
        losses.append(temperature**2 * terms.sum(dim=1))
        ranks.append(ranked.detach())
        slope = temperature * (log_p.detach().exp() - q)
        slopes.append(torch.empty_like(slope).scatter_(1, order, slope))
    return torch.stack(losses, dim=1), torch.cat(ranks, dim=1), torch.cat(slopes, dim=1)


def dsr_loss_backward_reference(
    grad_loss: Tensor, slope: Tensor, class_offset: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Plain PyTorch: each head's slope times the gradient of its loss."""
    sizes = torch.tensor(class_offset, device=slope.device).diff()
    return (slope * grad_loss.repeat_interleave(sizes, dim=1)).to(dtype)


def _forward_cpu(logits, previous_ranked, temperature, class_offset):
    _check(logits, previous_ranked, temperature, class_offset)
    module = _native.cpu()
    if module is None:
        return dsr_loss_reference(logits, previous_ranked, temperature, class_offset)
    return _forward(module, torch.get_num_threads(), logits, previous_ranked, temperature, class_offset)


def _forward_cuda(logits, previous_ranked, temperature, class_offset):
    _check(logits, previous_ranked, temperature, class_offset)
    module = _native.cuda()
    if module is None:
        return dsr_loss_reference(logits, previous_ranked, temperature, class_offset)
    with device_stream(logits) as stream:
        return _forward(module, stream, logits, previous_ranked, temperature, class_offset)


def _backward_cpu(grad_loss, slope, class_offset, dtype):
    _check_backward(grad_loss, slope, class_offset, dtype)
    module = _native.cpu()
    if module is None:
        return dsr_loss_backward_reference(grad_loss, slope, class_offset, dtype)
    return _backward(module, torch.get_num_threads(), grad_loss, slope, class_offset, dtype)


def _backward_cuda(grad_loss, slope, class_offset, dtype):
    _check_backward(grad_loss, slope, class_offset, dtype)
    module = _native.cuda()
    if module is None:
        return dsr_loss_backward_reference(grad_loss, slope, class_offset, dtype)
    with device_stream(slope) as stream:
        return _backward(module, stream, grad_loss, slope, class_offset, dtype)


def _forward(
    module: ModuleType,  # _cpu, _cuda, or _emu in the tests
    where: int,  # threads of the first, stream of the others
    logits: Tensor,
    previous_ranked: Tensor | None,
    temperature: float,
    class_offset: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    logits = _contiguous_rows(logits)
    previous = None if previous_ranked is None else _contiguous_rows(previous_ranked)
    loss, ranked, slope = _forward_results(logits, class_offset)
    heads = _heads("dsr_loss", tuple(class_offset), logits.shape[1])
    getattr(module, f"dsr_loss_forward_{_name(logits.dtype)}")(
        heads.data_ptr(),
        len(class_offset) - 1,
        logits.shape[0],
        slope.data_ptr(),
        temperature,
        0 if previous is None else previous.data_ptr(),
        0 if previous is None else previous.stride(0),
        logits.data_ptr(),
        logits.stride(0),
        ranked.data_ptr(),
        loss.data_ptr(),
        where,
    )
    return loss, ranked, slope


def _backward(
    module: ModuleType,
    where: int,
    grad_loss: Tensor,
    slope: Tensor,
    class_offset: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    slope = slope.contiguous()
    grad_logits = torch.empty_like(slope, dtype=dtype)
    heads = _heads("dsr_loss_backward", tuple(class_offset), slope.shape[1])
    getattr(module, f"dsr_loss_backward_{_name(dtype)}")(
        heads.data_ptr(),
        len(class_offset) - 1,
        slope.shape[0],
        slope.data_ptr(),
        grad_loss.data_ptr(),
        *grad_loss.stride(),  # of a mean, 0 and 0
        grad_logits.data_ptr(),
        where,
    )
    return grad_logits


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _forward_results(logits: Tensor, class_offset: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    real = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty((logits.shape[0], len(class_offset) - 1), dtype=real),
        logits.new_empty(logits.shape),
        logits.new_empty(logits.shape, dtype=real),
    )


def _check(
    logits: Tensor, previous_ranked: Tensor | None, temperature: float, class_offset: Sequence[int]
) -> None:
    if logits.ndim != 2:
        raise ValueError(f"dsr_loss: logits must be (n_patterns, n_classes), got {tuple(logits.shape)}")
    if logits.dtype not in _DTYPES:
        raise TypeError(f"dsr_loss: logits must be float32, bfloat16 or float64, got {logits.dtype}")
    if previous_ranked is not None:
        if previous_ranked.shape != logits.shape or previous_ranked.device != logits.device:
            raise ValueError(
                f"dsr_loss: previous_ranked must be {tuple(logits.shape)} on {logits.device} as logits, "
                f"got {tuple(previous_ranked.shape)} on {previous_ranked.device}"
            )
        if previous_ranked.dtype != logits.dtype:
            raise TypeError(
                f"dsr_loss: previous_ranked must be {logits.dtype} as logits, got {previous_ranked.dtype}"
            )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"dsr_loss: temperature must be finite and > 0, got {temperature}")
    _heads("dsr_loss", tuple(class_offset), logits.shape[1])


@functools.lru_cache(maxsize=64)
def _heads(op: str, class_offset: tuple[int, ...], n_classes: int) -> Tensor:
    """class_offset checked, as the int32 array that a kernel reads."""
    sizes = [end - begin for begin, end in itertools.pairwise(class_offset)]
    whole = len(class_offset) > 1 and class_offset[0] == 0 and class_offset[-1] == n_classes
    if not whole or len(sizes) > MAX_HEADS or min(sizes) < 1 or max(sizes) > MAX_HEAD_CLASSES:
        raise ValueError(
            f"{op}: class_offset must rise from 0 to {n_classes} over 1 to {MAX_HEADS} heads of 1 to "
            f"{MAX_HEAD_CLASSES:,} classes, got {list(class_offset)}"
        )
    return torch.tensor(class_offset, dtype=torch.int32, device="cpu")


def _check_backward(
    grad_loss: Tensor, slope: Tensor, class_offset: Sequence[int], dtype: torch.dtype
) -> None:
    op = "dsr_loss_backward"
    if dtype not in _DTYPES:
        raise TypeError(f"{op}: dtype must be float32, bfloat16 or float64, got {dtype}")
    if slope.ndim != 2 or slope.dtype != torch.promote_types(dtype, torch.float32):
        raise ValueError(
            f"{op}: slope must be (n_patterns, n_classes) as dsr_loss makes it for {dtype}, "
            f"got {tuple(slope.shape)} {slope.dtype}"
        )
    _heads(op, tuple(class_offset), slope.shape[1])
    check_tensor(op, "grad_loss", grad_loss, (slope.shape[0], len(class_offset) - 1), slope)


LIBRARY.impl("dsr_loss", _forward_cpu, "CPU")
LIBRARY.impl("dsr_loss", _forward_cuda, "CUDA")
LIBRARY.impl("dsr_loss_backward", _backward_cpu, "CPU")
LIBRARY.impl("dsr_loss_backward", _backward_cuda, "CUDA")


@torch.library.register_fake("xrdfast::dsr_loss")
def _dsr_loss_fake(logits, previous_ranked, temperature, class_offset):
    return _forward_results(logits, class_offset)


@torch.library.register_fake("xrdfast::dsr_loss_backward")
def _dsr_loss_backward_fake(grad_loss, slope, class_offset, dtype):
    return torch.empty_like(slope, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    logits, _, _, ctx.class_offset = inputs
    _, ranked, slope = output
    ctx.dtype = logits.dtype
    ctx.mark_non_differentiable(ranked, slope)
    ctx.set_materialize_grads(False)  # zeros for `ranked` and `slope` would take a fifth of the step
    ctx.save_for_backward(slope)


def _gradient(ctx, grad_loss, _grad_ranked, _grad_slope):
    if grad_loss is None:
        return None, None, None, None
    grad_logits = torch.ops.xrdfast.dsr_loss_backward(
        grad_loss, *ctx.saved_tensors, ctx.class_offset, ctx.dtype
    )
    return grad_logits, None, None, None


def _no_second_gradient(ctx, _grad):
    raise NotImplementedError("dsr_loss: second derivatives are not implemented")


torch.library.register_autograd("xrdfast::dsr_loss", _gradient, setup_context=_setup_context)
torch.library.register_autograd("xrdfast::dsr_loss_backward", _no_second_gradient)
