"""Two ways of doing one thing, timed in turn, so that a drift of the machine's speed cancels in the ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


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
