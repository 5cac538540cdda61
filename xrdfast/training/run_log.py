"""The log of a training run: JSON lines always, TensorBoard where asked, a callback for progress bars.

Not for deciding what is measured or when (`trainer.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from xrdfast.errors import InputError

LOG_FILE = "log.jsonl"

ProgressCallback = Callable[[dict[str, Any]], None]


class RunLog:
    """Writes records to `log.jsonl` and whoever else listens.

    Args:
        folder: of the run; the log is appended to, so a resumed run goes on in the same file.
        tensorboard: also write TensorBoard events there.
        report: called with every record.

    Raises:
        InputError: where the file cannot be written, or TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, report: ProgressCallback | None) -> None:
        self._path = folder / LOG_FILE
        self._report = report
        self._board = _summary_writer(folder) if tensorboard else None
        self._file = self._opened()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, record: dict[str, Any]) -> None:
        """One record; needs an integer "step"."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self._path}: log: must be writable, got {error.strerror or error}") from error
        if self._board is not None:
            for name, value in _numbers(record):
                self._board.add_scalar(name, value, record["step"])
        if self._report is not None:
            self._report(record)

    def _opened(self) -> IO[str]:
        try:
            return open(self._path, "a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self._path}: log: must be writable, got {error.strerror or error}") from error


class StepWindow:
    """Means of the steps since the last line of the log; reads the device only when asked."""

    def __init__(self, tasks: tuple[str, ...], device: torch.device) -> None:
        self._tasks = tasks
        # Losses, weights, and the number of finite steps.
        self._sums = torch.zeros(2 * len(tasks) + 1, dtype=torch.float64, device=device)
        self._steps = 0
        self._since = time.monotonic()

    def add(self, losses: Tensor, weights: Tensor, finite: Tensor) -> None:
        """One step; what is not finite counts as skipped."""
        row = torch.cat([losses.double(), weights.double(), torch.ones_like(losses[:1], dtype=torch.float64)])
        self._sums += torch.where(finite, row, 0.0)
        self._steps += 1

    def leave_out(self, seconds: float) -> None:
        """Takes a pause in training (a validation) out of the speed."""
        self._since += seconds

    def take(self, batch_size: int) -> dict[str, Any]:
        """Means by task and the speed since the last call, and begins anew."""
        *sums, n_finite = self._sums.tolist()
        seconds = time.monotonic() - self._since
        means = [value / max(n_finite, 1.0) for value in sums]
        record = {
            "loss": dict(zip(self._tasks, means, strict=False)),
            "weight": dict(zip(self._tasks, means[len(self._tasks) :], strict=True)),
            "skipped_steps": self._steps - round(n_finite),
            "patterns_per_second": self._steps * batch_size / max(seconds, 1e-9),
        }
        self._sums.zero_()
        self._steps = 0
        self._since = time.monotonic()
        return record


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "train.tensorboard: must be false where tensorboard is not installed, got true"
        ) from error
    return SummaryWriter(folder)


def _numbers(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)
