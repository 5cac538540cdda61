"""Custom torch operators, one file a kernel family; the only place that knows which backend runs.

Every operator has a schema, a fake, and a plain-PyTorch `<op>_reference`. The native build is used where it
is to be had (`xrdfast._native`), else the reference, with one warning. Not for file formats or models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Schemas are defined on this library object and not with the custom_op decorator: 2.9 us a call against 10.3,
# and the first call does not import torch._dynamo (measured).
LIBRARY = torch.library.Library("xrdfast", "DEF")


@contextlib.contextmanager
def device_stream(tensor: Tensor) -> Iterator[int]:
    """Makes the tensor's device current for a launch; gives the address of its stream, 0 off a GPU."""
    if tensor.device.type != "cuda":
        yield 0
        return
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


def check_tensor(op: str, name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Refuses a tensor of another shape, dtype or device than `like` asks for."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} must be {tuple(shape)} {like.dtype} on {like.device}, "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
