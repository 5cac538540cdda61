"""The processes of one training run: one alone, or those that torchrun started.

Batches are split evenly, and gradients averaged by one all-reduce of a flat buffer: the balanced step is no
plain forward and backward, so torch's DistributedDataParallel does not fit it. Not for the step itself
(`balance.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import torch
from torch import Tensor, distributed, nn

from xrdfast.errors import InputError


class Processes:
    """One process among its peers; joins them where torchrun's variables are set.

    Args:
        device: where gradients live; decides between gloo and NCCL.

    Attributes:
        count, rank: number of processes, and this one's place among them.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self._joined = self.count > 1 and not distributed.is_initialized()
        if self._joined:
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def average_gradients(
        self, parameters: Sequence[nn.Parameter], elapsed: float, stop: bool
    ) -> tuple[float, bool]:
        """Replaces every `.grad` by its mean over processes; agrees on time and stopping on the way.

        Args:
            parameters: the model's; the same have gradients everywhere.
            elapsed: seconds.
            stop: whether this process wants to stop.

        Returns:
            The first process's seconds, and whether any process wants to stop.
        """
        if self.count == 1:
            return elapsed, stop
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        notes = torch.tensor([0.0 if self.rank else elapsed, float(stop)], device=gradients[0].device)
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), notes])
        distributed.all_reduce(flat)
        *sums, notes = flat.split([*(gradient.numel() for gradient in gradients), len(notes)])
        for gradient, total in zip(gradients, sums, strict=True):
            gradient.copy_(total.view_as(gradient) / self.count)
        seconds, stops = notes.tolist()
        return seconds, stops > 0

    def share_of(self, indices: Tensor) -> Tensor:
        """The part of (n,) indices that falls to this process; the last part is padded."""
        size = -(-len(indices) // self.count)
        padded = torch.cat([indices, indices[-1:].expand(size * self.count - len(indices))])
        return padded[self.rank * size : (self.rank + 1) * size]

    def join(self, part: Tensor, n_rows: int) -> Tensor:
        """Rows computed for every process's `share_of` n_rows indices, in their order, in every process."""
        if self.count == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.count)]
        distributed.all_gather(parts, part)
        return torch.cat(parts)[:n_rows]

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.count > 1:
            distributed.barrier()

    def leave(self) -> None:
        """Ends the group that this object joined."""
        if self._joined:
            distributed.destroy_process_group()
            self._joined = False


def local_device(name: str, field: str = "train.device") -> torch.device:
    """The device of this process: "cpu", "cuda" (one GPU a process), or "auto" for what there is.

    Args:
        name: one of the three.
        field: where the name was given, for the message.

    Raises:
        InputError: "cuda" where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"{field}: must be cpu where no GPU is found, got cuda")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def stop_on_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks for a stop, the second acts as ever. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    former = {kind: signal.getsignal(kind) for kind in kinds}

    def handle(number: int, _: FrameType | None) -> None:
        request_stop()
        signal.signal(number, former[signal.Signals(number)])

    for kind in kinds:
        signal.signal(kind, handle)
    try:
        yield
    finally:
        for kind in kinds:
            signal.signal(kind, former[kind])
