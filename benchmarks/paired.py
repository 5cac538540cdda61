"""Two ways of doing one thing, timed in turn, so that a drift of the machine's speed cancels in the ratio; GPU timing.

On a GPU the host may take longer to launch a kernel than the kernel takes: `captured` leaves that out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Paired(NamedTuple):
    """Medians in seconds, and the median of rival / ours pair by pair."""

    ours: float
    rival: float
    ratio: float


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gpu_seconds(call: Callable[[], object], rounds: int = 20) -> float:
    """Median time of a call by the GPU's own clock, after three to warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return statistics.median(times)


def captured(call: Callable[[], object], times: int = 1) -> Callable[[], None]:
    """The call as a CUDA graph, so many times in a row: its replay, which leaves out the host's time for launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the libraries make their workspaces before a capture
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


def paired(ours: Callable[[], object], rival: Callable[[], object], rounds: int = 5) -> Paired:
    """Times both `rounds` times in turn, after one warm-up each."""
    ours()
    rival()
    times = [(seconds(ours), seconds(rival)) for _ in range(rounds)]
    return Paired(
        statistics.median(t for t, _ in times),
        statistics.median(t for _, t in times),
        statistics.median(r / o for o, r in times),
    )


def paired_loops(
    ours: Sequence[Callable[[], object]], rival: Sequence[Callable[[], object]], rounds: int = 3
) -> Paired:
    """Many short calls, each program looping over all of its own in turn, as it is used; medians over the calls.

    Calls of microseconds between a rival's of milliseconds would find the rival's data in the caches, not their own.
    """
    for call in (*ours, *rival):
        call()
    times = [([seconds(call) for call in ours], [seconds(call) for call in rival]) for _ in range(rounds)]
    medians = [
        [statistics.median(of_call) for of_call in zip(*(turn[side] for turn in times), strict=True)]
        for side in (0, 1)
    ]
    one, other = (statistics.median(side) for side in medians)
    return Paired(one, other, other / one)
