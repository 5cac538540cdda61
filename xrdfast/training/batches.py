"""Batches of a run by the number of their step; on a GPU drawn ahead, on threads and streams of their own.

What a batch is depends on the run's seed and the step alone, so drawing ahead changes nothing. Not for what patterns
look like (`xrdfast.data.generate`) or for the step itself (`step.py`).
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from xrdfast.data.generate import PatternSource
from xrdfast.training.config import TrainConfig
from xrdfast.training.processes import Processes

_THREADS = 2  # that draw
_AHEAD = 3  # batches that are drawn while one is trained on, and steps that may wait on the device


class Batches:
    """Patterns and labels of every step, this process's share of them.

    Args:
        source: where patterns are rendered.
        training: (n,) int64 rows of its store.
        config: seed, batch size and balance of classes.
        processes: the run's.
    """

    def __init__(
        self, source: PatternSource, training: Tensor, config: TrainConfig, processes: Processes
    ) -> None:
        self._source, self._training, self._config, self._processes = source, training, config, processes
        self.steps_per_epoch = len(training) // config.batch_size
        self._orders: dict[int, Tensor] = {}  # of the last two epochs, as threads meet where one ends
        self._threads: ThreadPoolExecutor | None = None
        if source.device.type == "cuda":
            self._threads = ThreadPoolExecutor(_THREADS, "batches")
            self._own = threading.local()  # the stream of a thread
            self._drawn: deque[tuple[int, Future[tuple[Tensor, Tensor, torch.cuda.Event]]]] = deque()
            self._taken: deque[torch.cuda.Event] = deque()

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        """Intensity (n_patterns, n_points) on the device and space groups (n_patterns,) on the CPU, of a step."""
        if self._threads is None:
            return self._draw(step)
        if self._drawn and self._drawn[0][0] != step:
            self._drawn.clear()
        next_step = self._drawn[-1][0] + 1 if self._drawn else step
        for ahead in range(next_step, step + _AHEAD + 1):
            self._drawn.append((ahead, self._threads.submit(self._draw_ahead, ahead)))
        intensity, number, ready = self._drawn.popleft()[1].result()
        stream = torch.cuda.current_stream(self._source.device)
        stream.wait_event(ready)
        intensity.record_stream(stream)
        self._taken.append(stream.record_event())
        if len(self._taken) > _AHEAD:  # a host that runs far ahead of the device would pile up batches
            self._taken.popleft().synchronize()
        return intensity, number

    def rows(self, step: int) -> Tensor:
        """Store rows of this process in a step."""
        config, count = self._config, self._processes.count
        epoch, position = divmod(step, self.steps_per_epoch)
        order = self._orders.get(epoch)
        if order is None:
            generator = torch.Generator().manual_seed(seed_of(config.seed, "order", epoch, 0))
            if config.class_balance:
                counts = self._source.store.group_counts(self._training)
                number = self._source.store.space_group_01[self._training].long()
                weight = counts[number - 1].double().pow(-config.class_balance)
                drawn = torch.multinomial(weight, len(weight), replacement=True, generator=generator)
            else:
                drawn = torch.randperm(len(self._training), generator=generator)
            order = self._training[drawn]
            self._orders = {e: rows for e, rows in self._orders.items() if abs(e - epoch) <= 1} | {
                epoch: order
            }
        size = config.batch_size // count
        begin = position * config.batch_size + self._processes.rank * size
        return order[begin : begin + size]

    def close(self) -> None:
        """Ends the threads; another run begins with new ones."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = ThreadPoolExecutor(_THREADS, "batches")
            self._drawn.clear()

    def _draw(self, step: int) -> tuple[Tensor, Tensor]:
        seed = seed_of(self._config.seed, "pattern", step, self._processes.rank)
        return self._source.batch(self.rows(step), torch.Generator().manual_seed(seed))

    def _draw_ahead(self, step: int) -> tuple[Tensor, Tensor, torch.cuda.Event]:
        device = self._source.device
        stream = getattr(self._own, "stream", None) or torch.cuda.Stream(device)
        self._own.stream = stream
        with torch.cuda.device(device), torch.cuda.stream(stream):
            intensity, number = self._draw(step)
            return intensity, number, stream.record_event()


def seed_of(seed: int, purpose: str, number: int, rank: int) -> int:
    """A generator's seed for one purpose of a run, 63 bits, as generators take."""
    digest = hashlib.blake2b(f"{seed} {purpose} {number} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
