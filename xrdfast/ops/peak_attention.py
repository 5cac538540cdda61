"""Attention whose keys are the active patches of a pattern, and the inference pass of the patch encoder around it.

For single-head attention over the patches of a pattern where blank patches ask but are never asked. Not for the
embedding and the layers as modules (`xrdfast.models.encoder`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from xrdfast import _native
from xrdfast.ops import LIBRARY, device_stream

MAX_PATCHES = 4096  # a list of active patches, 8 kB, has to fit in a GPU's shared memory
MAX_WIDTH = 64
LEAKY_SLOPE = 0.01

LIBRARY.define("peak_attention(Tensor query, Tensor key, Tensor value, Tensor active) -> (Tensor, Tensor)")
LIBRARY.define(
    "peak_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor active, "
    "Tensor output, Tensor logsumexp) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "encode_patches(Tensor intensity, Tensor patch_weight, Tensor position, Tensor[] layers, float blank, "
    "float norm_eps) -> Tensor"
)

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def peak_attention(
    query: Tensor,  # (n_patterns, n_patches, width)
    key: Tensor,  # (n_patterns, n_patches, width)
    value: Tensor,  # (n_patterns, n_patches, width)
    active: Tensor,  # (n_patterns, n_patches)
) -> Tensor:
    """Attention of every patch to the active patches of its pattern.

        output_i = sum_j p_ij value_j,   p_i = softmax over active j of query_i . key_j / sqrt(width).

    A pattern without an active patch attends uniformly to all its patches: its scores are taken as equal, and no
    gradient goes to its queries and keys.

    Args:
        query: float32, float64 or bfloat16.
        key: as `query`.
        value: as `query`.
        active: bool, the patches that are keys.

    Returns:
        (n_patterns, n_patches, width), dtype of `query`.

    Raises:
        ValueError: for shapes or devices that do not agree, a width that is no multiple of 8 up to 64, or more than
            4096 patches.
        TypeError: for another dtype.

    Note:
        Deterministic. Work and memory go with the number of active patches; no matrix of patches by patches is made.
        bfloat16 is accumulated in float32. Gradients to query, key and value, once.

    Source:
        Yu et al., arXiv:2511.06976; the recomputing backward is that of Dao et al., "FlashAttention",
        arXiv:2205.14135, algorithm 4.

    Example:
        >>> x = torch.ones(1, 3, 8)
        >>> value = torch.arange(3.0)[None, :, None].expand(1, 3, 8)
        >>> peak_attention(x, x, value, torch.tensor([[False, True, True]]))[0, :, 0]
        tensor([1.5000, 1.5000, 1.5000])
    """
    return torch.ops.xrdfast.peak_attention(query, key, value, active)[0]


def encode_patches(
    intensity: Tensor,  # (n_patterns, n_patches * patch_points)
    patch_weight: Tensor,  # (patch_points, n_embedded)
    position: Tensor,  # (n_patches, width)
    layers: Sequence[Tensor],
    *,
    blank: float,
    norm_eps: float,
) -> Tensor:
    """Features of patterns: embedded patches through post-norm attention layers, then the maximum over patches.

        x = [patch @ patch_weight, 0 ..., max(patch)] + position
        x = norm(output(attention(query(x), key(x), value(x))) + x);  x = norm(contract(leaky(expand(x))) + x)

    Args:
        intensity: 0 to 100, float32 or float64 (others run on the reference).
        patch_weight: the affine patch embedding; its constant is part of `position`.
        position: what is added to a patch at its place.
        layers: 16 tensors a layer, weight and bias in turn: query, key, value, output, attention norm,
            expand (hidden, width), contract (width, hidden), feed-forward norm.
        blank: a patch whose maximum is below it is no key.
        norm_eps: of the layer norms.

    Returns:
        (n_patterns, width).

    Raises:
        ValueError: for shapes that do not agree.
        TypeError: for tensors of different dtypes.

    Note:
        For inference: there is no backward, `peak_attention` is the op to train with. A NaN patch is a key and makes
        its pattern's features NaN.
    """
    return torch.ops.xrdfast.encode_patches(intensity, patch_weight, position, list(layers), blank, norm_eps)


def peak_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, all scores written out; the yardstick of the kernels.

    Returns:
        The output, and (n_patterns, n_patches) logsumexp of the scores, float32 where the inputs are bfloat16.
    """
    probability, logsumexp = _probability(query, key, active)
    return (probability @ _accumulated(value)).to(value.dtype), logsumexp


def peak_attention_backward_reference(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    active: Tensor,
    output: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to query, key and value, all scores written out."""
    del logsumexp  # the kernels' way to the same probabilities
    probability, _ = _probability(query, key, active)
    grad, q, k, v, o = (_accumulated(x) for x in (grad_output, query, key, value, output))
    delta = (grad * o).sum(2, keepdim=True)
    any_active = active.any(dim=1)[:, None, None]
    grad_score = probability * (grad @ v.mT - delta) * any_active / math.sqrt(query.shape[2])
    grads = (grad_score @ k, grad_score.mT @ q, probability.mT @ grad)
    return tuple(x.to(query.dtype) for x in grads)


def _accumulated(x: Tensor) -> Tensor:
    """In the dtype of the arithmetic."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _probability(query: Tensor, key: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    any_active = active.any(dim=1)[:, None, None]
    score = _accumulated(query) * any_active @ _accumulated(key).mT / math.sqrt(query.shape[2])
    score = score.masked_fill(any_active & ~active[:, None, :], -math.inf)
    logsumexp = score.logsumexp(dim=2, keepdim=True)
    return (score - logsumexp).exp(), logsumexp[..., 0]


def encode_patches_reference(
    intensity: Tensor,
    patch_weight: Tensor,
    position: Tensor,
    layers: Sequence[Tensor],
    blank: float,
    norm_eps: float,
) -> Tensor:
    """Plain PyTorch, one step after the other; the yardstick of the kernel."""
    return _encode(
        intensity, patch_weight, position, layers, blank, norm_eps, attention=peak_attention_reference
    )


def _encode(intensity, patch_weight, position, layers, blank, norm_eps, *, attention) -> Tensor:
    patches = intensity.unflatten(1, (len(position), len(patch_weight)))
    patch_maximum = patches.amax(dim=2)
    width = position.shape[1]
    embedded = F.pad(patches @ patch_weight, (0, width - 1 - patch_weight.shape[1]))
    x = torch.cat([embedded, patch_maximum[..., None]], dim=2) + position
    active = ~(patch_maximum < blank)  # and not >=: a NaN patch stays a key
    for i in range(0, len(layers), _TENSORS_A_LAYER):
        weights = list(zip(layers[i : i + 16 : 2], layers[i + 1 : i + 16 : 2], strict=True))
        query, key, value, output, attention_norm, expand, contract, feed_forward_norm = weights
        attended, _ = attention(F.linear(x, *query), F.linear(x, *key), F.linear(x, *value), active)
        x = F.layer_norm(F.linear(attended, *output) + x, (width,), *attention_norm, norm_eps)
        inner = F.leaky_relu(F.linear(x, *expand), LEAKY_SLOPE)
        x = F.layer_norm(F.linear(inner, *contract) + x, (width,), *feed_forward_norm, norm_eps)
    return x.amax(dim=1)


_TENSORS_A_LAYER = 16


def _peak_attention_cpu(query: Tensor, key: Tensor, value: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    _check_attention("peak_attention", query, key, value, active)
    module = _native.cpu()
    if module is None:
        return peak_attention_reference(query, key, value, active)
    if query.dtype == torch.bfloat16:  # the CPU kernels are float and double
        output, logsumexp = _peak_attention_cpu(query.float(), key.float(), value.float(), active)
        return output.bfloat16(), logsumexp
    return _attend(module, torch.get_num_threads(), query, key, value, active)


def _peak_attention_cuda(query: Tensor, key: Tensor, value: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    _check_attention("peak_attention", query, key, value, active)
    module = _native.cuda()
    if module is None:
        return peak_attention_reference(query, key, value, active)
    return _peak_attention_on_device(module, query, key, value, active)


def _peak_attention_on_device(
    module: ModuleType, query: Tensor, key: Tensor, value: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    """The kernel of `_cuda`, or of `_emu` in the tests."""
    with device_stream(query) as stream:
        return _attend(module, stream, query, key, value, active)


def _attend(
    module: ModuleType, threads_or_stream: int, query: Tensor, key: Tensor, value: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    held = [x.contiguous() for x in (query, key, value, active)]
    output, logsumexp = _peak_attention_fake(query, key, value, active)
    pointers = [x.data_ptr() for x in (*held, output, logsumexp)]
    kernel = getattr(module, f"peak_attention_{_DTYPES[query.dtype]}")
    kernel(*pointers, *query.shape, threads_or_stream)
    return output, logsumexp


def _peak_attention_backward_cpu(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    active: Tensor,
    output: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (grad_output, query, key, value, active, output, logsumexp)
    _check_backward(*given)
    module = _native.cpu()
    if module is None:
        return peak_attention_backward_reference(*given)
    if query.dtype == torch.bfloat16:
        wide = (x.float() if x.dtype == torch.bfloat16 else x for x in given)
        return tuple(x.bfloat16() for x in _peak_attention_backward_cpu(*wide))
    return _attend_backward(module, (torch.get_num_threads(),), *given)


def _peak_attention_backward_cuda(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(*given)
    module = _native.cuda()
    if module is None:
        return peak_attention_backward_reference(*given)
    return _peak_attention_backward_on_device(module, *given)


def _peak_attention_backward_on_device(module: ModuleType, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels of `_cuda`, or of `_emu` in the tests."""
    delta = torch.empty_like(given[6], memory_format=torch.contiguous_format)
    with device_stream(delta) as stream:
        return _attend_backward(module, (delta.data_ptr(), stream), *given)


def _attend_backward(
    module: ModuleType, last: tuple[int, ...], *given: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    held = [x.contiguous() for x in given]
    query = held[1]
    grads = tuple(torch.empty_like(query) for _ in range(3))
    pointers = [x.data_ptr() for x in (*held, *grads)]
    kernel = getattr(module, f"peak_attention_backward_{_DTYPES[query.dtype]}")
    kernel(*pointers, *query.shape, *last)
    return grads


def _encode_patches_cpu(
    intensity: Tensor,
    patch_weight: Tensor,
    position: Tensor,
    layers: Sequence[Tensor],
    blank: float,
    norm_eps: float,
) -> Tensor:
    _check_patches(intensity, patch_weight, position, layers)
    module = _native.cpu()
    if module is None or intensity.dtype not in (torch.float32, torch.float64):
        return encode_patches_reference(intensity, patch_weight, position, layers, blank, norm_eps)
    intensity, patch_weight, position = (x.contiguous() for x in (intensity, patch_weight, position))
    packed = torch.cat([x.reshape(-1) for x in layers]) if layers else position.new_empty(0)
    n_patches, width = position.shape
    features = intensity.new_empty((len(intensity), width))
    kernel = getattr(module, f"encode_patches_{_DTYPES[intensity.dtype]}")
    kernel(
        *(x.data_ptr() for x in (intensity, patch_weight, position, packed, features)),
        len(intensity),
        n_patches,
        *patch_weight.shape,
        width,
        len(layers[10]) if layers else 0,
        len(layers) // _TENSORS_A_LAYER,
        blank,
        norm_eps,
        LEAKY_SLOPE,
        torch.get_num_threads(),
    )
    return features


def _encode_patches_cuda(
    intensity: Tensor,
    patch_weight: Tensor,
    position: Tensor,
    layers: Sequence[Tensor],
    blank: float,
    norm_eps: float,
) -> Tensor:
    """On a GPU the maps between the attentions are library matrix products."""
    _check_patches(intensity, patch_weight, position, layers)
    return _encode(
        intensity, patch_weight, position, layers, blank, norm_eps, attention=torch.ops.xrdfast.peak_attention
    )


def _check_attention(op: str, query: Tensor, key: Tensor, value: Tensor, active: Tensor) -> None:
    if query.dtype not in _DTYPES:
        raise TypeError(f"{op}: query must be float32, float64 or bfloat16, got {query.dtype}")
    if query.ndim != 3 or query.shape[2] not in range(8, MAX_WIDTH + 1, 8):
        raise ValueError(
            f"{op}: query must be (n_patterns, n_patches, width) with width a multiple of 8 up to {MAX_WIDTH}, "
            f"got {tuple(query.shape)}"
        )
    if not 1 <= query.shape[1] <= MAX_PATCHES:
        raise ValueError(f"{op}: n_patches must be 1 to {MAX_PATCHES}, got {query.shape[1]}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must be {query.dtype} as query, got {tensor.dtype}")
        if tensor.shape != query.shape or tensor.device != query.device:
            raise ValueError(
                f"{op}: {name} must be {tuple(query.shape)} on {query.device} as query, "
                f"got {tuple(tensor.shape)} on {tensor.device}"
            )
    if active.dtype != torch.bool:
        raise TypeError(f"{op}: active must be bool, got {active.dtype}")
    if active.shape != query.shape[:2] or active.device != query.device:
        raise ValueError(
            f"{op}: active must be {tuple(query.shape[:2])} on {query.device}, "
            f"got {tuple(active.shape)} on {active.device}"
        )


def _check_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    active: Tensor,
    output: Tensor,
    logsumexp: Tensor,
) -> None:
    op = "peak_attention_backward"
    _check_attention(op, query, key, value, active)
    wide = torch.float32 if query.dtype == torch.bfloat16 else query.dtype
    rules = {
        "grad_output": (grad_output, query.shape, query.dtype),
        "output": (output, query.shape, query.dtype),
        "logsumexp": (logsumexp, query.shape[:2], wide),
    }
    for name, (tensor, shape, dtype) in rules.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != query.device:
            raise ValueError(
                f"{op}: {name} must be {tuple(shape)} {dtype} on {query.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def _check_patches(
    intensity: Tensor, patch_weight: Tensor, position: Tensor, layers: Sequence[Tensor]
) -> None:
    op = "encode_patches"
    if position.ndim != 2 or position.shape[1] not in range(8, MAX_WIDTH + 1, 8):
        raise ValueError(
            f"{op}: position must be (n_patches, width) with width a multiple of 8 up to {MAX_WIDTH}, "
            f"got {tuple(position.shape)}"
        )
    n_patches, width = position.shape
    if not 1 <= n_patches <= MAX_PATCHES:
        raise ValueError(f"{op}: n_patches must be 1 to {MAX_PATCHES}, got {n_patches}")
    if patch_weight.ndim != 2 or not len(patch_weight) or not patch_weight.shape[1] < width:
        raise ValueError(
            f"{op}: patch_weight must be (patch_points, fewer than {width}), got {tuple(patch_weight.shape)}"
        )
    if len(layers) % _TENSORS_A_LAYER:
        raise ValueError(f"{op}: layers must be {_TENSORS_A_LAYER} tensors each, got {len(layers)} in all")
    hidden = len(layers[10]) if layers else 0
    square, line = [(width, width), (width,)], [(width,)]
    shapes = square * 4 + line * 2 + [(hidden, width), (hidden,), (width, hidden), (width,)] + line * 2
    rules = {"intensity": (intensity, (len(intensity), n_patches * len(patch_weight)))}
    rules["patch_weight"] = (patch_weight, tuple(patch_weight.shape))
    rules |= {f"layers[{i}]": (x, shapes[i % _TENSORS_A_LAYER]) for i, x in enumerate(layers)}
    for name, (tensor, shape) in rules.items():
        if tuple(tensor.shape) != shape or tensor.device != position.device:
            raise ValueError(
                f"{op}: {name} must be {shape} on {position.device}, got {tuple(tensor.shape)} on {tensor.device}"
            )
        if tensor.dtype != position.dtype:
            raise TypeError(f"{op}: {name} must be {position.dtype} as position, got {tensor.dtype}")


LIBRARY.impl("peak_attention", _peak_attention_cpu, "CPU")
LIBRARY.impl("peak_attention", _peak_attention_cuda, "CUDA")
LIBRARY.impl("peak_attention_backward", _peak_attention_backward_cpu, "CPU")
LIBRARY.impl("peak_attention_backward", _peak_attention_backward_cuda, "CUDA")
LIBRARY.impl("encode_patches", _encode_patches_cpu, "CPU")
LIBRARY.impl("encode_patches", _encode_patches_cuda, "CUDA")


@torch.library.register_fake("xrdfast::peak_attention")
def _peak_attention_fake(query, key, value, active):
    wide = torch.float32 if query.dtype == torch.bfloat16 else query.dtype
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=wide)


@torch.library.register_fake("xrdfast::peak_attention_backward")
def _peak_attention_backward_fake(grad_output, query, *rest):
    return tuple(query.new_empty(query.shape) for _ in range(3))


@torch.library.register_fake("xrdfast::encode_patches")
def _encode_patches_fake(intensity, patch_weight, position, layers, blank, norm_eps):
    return intensity.new_empty((intensity.shape[0], position.shape[1]))


def _keep_for_backward(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _peak_attention_gradients(ctx, grad_output, _grad_logsumexp):
    if grad_output is None:
        return None, None, None, None
    return *torch.ops.xrdfast.peak_attention_backward(grad_output, *ctx.saved_tensors), None


def _no_second_gradient(ctx, *_):
    raise NotImplementedError("peak_attention: second derivatives are not implemented")


torch.library.register_autograd(
    "xrdfast::peak_attention", _peak_attention_gradients, setup_context=_keep_for_backward
)
torch.library.register_autograd("xrdfast::peak_attention_backward", _no_second_gradient)
