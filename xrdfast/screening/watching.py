"""Waiting between looks at a growing folder, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Watch:
    """The first SIGINT or SIGTERM ends the watching once what was found is answered; the second acts as ever.

    Args:
        interval: seconds between two looks. A file is read when two looks saw it with one size and time.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._over = threading.Event()
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._former[kind] = signal.signal(kind, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for kind, former in self._former.items():
            signal.signal(kind, former)

    def __call__(self) -> bool:
        """Waits; whether to look again."""
        return not self._over.wait(self._interval)

    def stop(self) -> None:
        """Ends the watching."""
        self._over.set()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.stop()
        kind = signal.Signals(number)
        signal.signal(kind, self._former[kind])
