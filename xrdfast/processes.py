"""How many worker processes to start, and how, from whatever script the user wrote. Not for what the workers do."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Iterator


def n_cores() -> int:
    """Cores that this process may use, fewer than there are under taskset, in a container or a batch job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def hidden_main() -> Iterator[None]:
    """Keeps processes that start meanwhile from importing the main script, which they do not need.

    Without its own guard, it would start all over again in each of them. Pools start processes at submission.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
