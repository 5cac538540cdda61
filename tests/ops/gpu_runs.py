"""What every operator is put through on a GPU: a side stream, poisoned memory, the same bits again, a graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xrdfast import _native


def on_a_gpu(call: Callable[[], Sequence[Tensor]], *, captures: bool = True) -> list[Tensor]:
    """Results of `call`, on the CPU, after the same bits came again where new memory is NaN and from a graph's replay.

    Args:
        call: makes tensors on the current device and stream from inputs that lie there.
        captures: False where the host has to know a count in between, so that no graph can be made.
    """
    assert _native.cuda() is not None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    filled = torch.are_deterministic_algorithms_enabled()
    with torch.cuda.stream(stream):
        first = [tensor.detach() for tensor in call()]
        try:
            torch.use_deterministic_algorithms(True)  # which fills new memory
            second = [tensor.detach() for tensor in call()]
        finally:
            torch.use_deterministic_algorithms(filled)
    stream.synchronize()
    runs = [second]
    # Under the sanitizer memory comes straight from the device, which a capture doesn't allow.
    if captures and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            third = [tensor.detach() for tensor in call()]
        for tensor in third:  # the replay has to write every number
            tensor.fill_(
                torch.nan if tensor.is_floating_point() else True if tensor.dtype == torch.bool else -7
            )
        graph.replay()
        torch.cuda.synchronize()
        runs.append(third)
    for run in runs:
        for mine, theirs in zip(run, first, strict=True):
            assert mine.is_cuda
            assert mine.dtype == theirs.dtype and torch.equal(bits(mine), bits(theirs))
    return [tensor.cpu() for tensor in first]


def bits(x: Tensor) -> Tensor:
    """A tensor that is equal where x is, NaN included."""
    return x.contiguous().view(torch.uint8) if x.dim() else x[None].view(torch.uint8)
