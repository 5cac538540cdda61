"""Batch norm, residual, LeakyReLU and pool over the rows of a stage (`xrdfast.ops.peak_plan`), in one pass.

Own kernels on a CPU and on a GPU. Not for the convolutions between (`xrdfast.ops.peak_conv`).
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xrdfast import _native
from xrdfast.ops import LIBRARY, check_tensor, device_stream
from xrdfast.ops.peak_plan import Stage, check_stage

NEGATIVE_SLOPE = 0.01  # of LeakyReLU
_NORM_PARTS = 128  # kNormParts of csrc/peak_norm.h
_NATIVE_DTYPES = {torch.float32: "float32", torch.float64: "float64"}

LIBRARY.define(
    "peak_norm(Tensor h, Tensor? residual, Tensor gamma, Tensor beta, Tensor? mean, Tensor? var, float eps, "
    "Tensor? count, float total, Tensor? take, int n_touched, bool maximum) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "peak_norm_backward(Tensor grad_out, Tensor h, Tensor? residual, Tensor gamma, Tensor beta, Tensor mean, "
    "Tensor var, float eps, Tensor? count, float total, Tensor? take, int n_touched, bool maximum, bool batch) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


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
        Deterministic, whatever the number of threads. Equal maxima pass their gradient to the first. Gradients once:
        second derivatives are refused.
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
            check_tensor("peak_norm", name, tensor, shape, h)
    check_stage("peak_norm", stage, h.device)
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
    """Plain PyTorch; the yardstick of the kernels."""
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
    """Gradients of h, residual (or of h again), gamma and beta; csrc/peak_norm.h has the formulas."""
    rstd = (var + eps).rsqrt()
    normed = (h - mean) * rstd
    z = (h - mean) * (gamma * rstd) + beta
    z = z if residual is None else z + residual
    grad = grad_out
    if take is not None:
        rows = F.pad(F.leaky_relu(z, NEGATIVE_SLOPE), (0, 0, 0, 1))  # the last is what -1 stands for
        index = torch.where(take < 0, len(h), take).long()
        shares = [grad_out if len(take) == 1 else 0.5 * grad_out] * len(take)
        if len(take) == 2 and maximum:
            first, second = rows[index[0]], rows[index[1]]
            second_wins = (second > first) | second.isnan()
            shares = [grad_out.masked_fill(second_wins, 0.0), grad_out.masked_fill(~second_wins, 0.0)]
        grad = torch.zeros_like(rows)
        for i, share in zip(index, shares, strict=True):
            grad.index_add_(0, i, share)
        grad = grad[:-1]
    grad_z = torch.where(z > 0, grad, NEGATIVE_SLOPE * grad)
    grad_beta, grad_gamma = grad_z.sum(0), (grad_z * normed).sum(0)
    grad_h = grad_z
    if batch:
        weight = 1.0 if count is None else count.to(h.dtype)[:, None]
        grad_h = grad_z - weight / total * (grad_beta + normed * grad_gamma)
    return gamma * rstd * grad_h, grad_z, grad_gamma, grad_beta


def _norm_fake(h, residual, gamma, beta, mean, var, eps, count, total, take, n_touched, maximum):
    n_rows = h.shape[0] if take is None else take.shape[1]
    return h.new_empty((n_rows, h.shape[1])), torch.empty_like(gamma), torch.empty_like(gamma)


def _norm_backward_fake(grad_out, h, residual, gamma, beta, *rest):
    return h.new_empty(h.shape), h.new_empty(h.shape), torch.empty_like(gamma), torch.empty_like(beta)


def _norm_setup(ctx, inputs, output) -> None:
    h, residual, gamma, beta, mean, _, eps, count, total, take, n_touched, maximum = inputs
    ctx.save_for_backward(h, residual, gamma, beta, output[1], output[2], count, take)
    ctx.settings = eps, total, n_touched, maximum, mean is None
    ctx.mark_non_differentiable(output[1], output[2])


def _norm_backward(ctx, grad_out, *_):
    h, residual, gamma, beta, mean, var, count, take = ctx.saved_tensors
    eps, total, n_touched, maximum, batch = ctx.settings
    grad_h, grad_residual, grad_gamma, grad_beta = torch.ops.xrdfast.peak_norm_backward(
        grad_out,
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


def _no_second_gradient(ctx, *_):
    raise NotImplementedError("peak_norm: second derivatives are not implemented")


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
    module = _native.cpu() if h.dtype in _NATIVE_DTYPES else None
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
    module = _native.cpu() if h.dtype in _NATIVE_DTYPES else None
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


LIBRARY.impl("peak_norm", _norm_cpu, "CPU")
LIBRARY.impl("peak_norm_backward", _norm_backward_cpu, "CPU")
LIBRARY.impl("peak_norm", _norm_cuda, "CUDA")
LIBRARY.impl("peak_norm_backward", _norm_backward_cuda, "CUDA")
torch.library.register_fake("xrdfast::peak_norm", _norm_fake)
torch.library.register_fake("xrdfast::peak_norm_backward", _norm_backward_fake)
torch.library.register_autograd("xrdfast::peak_norm", _norm_backward, setup_context=_norm_setup)
torch.library.register_autograd("xrdfast::peak_norm_backward", _no_second_gradient)
