"""Progress bars and tables for people. Not for what a command computes or says (`xrdfast.cli`).

Tables go to standard output. Bars go to standard error, and only where that is a terminal.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_PLAIN_WIDTH = 120  # columns where standard output is no terminal


@contextlib.contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and remaining time, moved by calls with (done, in all)."""
    with _progress() as progress:
        task = progress.add_task(title, total=None, unit=unit)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def training_bar(title: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar moved by the records of a run's log; without a terminal, a line for each validation."""
    shows = _shows(sys.stderr)
    with _progress() as progress:
        task = progress.add_task(title, total=1.0, unit="patterns", speed=0.0)

        def follow(record: dict[str, Any]) -> None:
            if "patterns_per_second" in record:
                progress.update(task, speed=record["patterns_per_second"])
            progress.update(task, completed=record["fraction"])
            if record["event"] == "validation":
                shares = record["metrics"]["top1"].items()
                text = ", ".join(f"{name.replace('_', ' ')} {100.0 * share:.1f}" for name, share in shares)
                line = f"epoch {record['epoch']:.1f}, {record['elapsed']:.0f} s, top-1: {text}"
                if shows:
                    progress.console.print(Text(line))
                else:
                    print(line, file=sys.stderr, flush=True)

        yield follow


@contextlib.contextmanager
def screening_progress(as_json: bool) -> Iterator[Callable[[int, int, int], None]]:
    """A bar moved by calls with (answered, failed, known so far); or, as JSON, a line a second and one at the end."""
    if not as_json:
        with _progress() as progress:
            task = progress.add_task("screening", total=None, unit="scans")
            yield lambda answered, failed, known: progress.update(
                task, completed=answered + failed, total=known
            )
        return
    begin = last = time.monotonic()
    state = (0, 0, 0)

    def line() -> None:
        answered, failed, known = state
        rate = (answered + failed) / max(time.monotonic() - begin, 1e-9)
        left = (known - answered - failed) / rate if rate else None
        record = {"answered": answered, "failed": failed, "known": known}
        record |= {"rate": round(rate, 2), "eta": None if left is None else round(left, 1)}
        print(json.dumps(record), file=sys.stderr, flush=True)

    def follow(answered: int, failed: int, known: int) -> None:
        nonlocal last, state
        state = (answered, failed, known)
        if time.monotonic() - last >= 1.0:
            last = time.monotonic()
            line()

    try:
        yield follow
    finally:
        line()


def print_table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int] = ()
) -> None:
    """Prints rows of texts under their headers; the columns in `right` are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(headers):
        table.add_column(Text(name), justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if _shows(sys.stdout) else _PLAIN_WIDTH).print(table)


class _RateColumn(ProgressColumn):
    """Things a second, as the log says or as the bar measures."""

    def render(self, task: Task) -> Text:
        speed = task.fields.get("speed") or task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "")


def _shows(stream: IO[str] | None) -> bool:
    """Whether a person looks at a stream; Python has None for one that was closed before it began."""
    return stream is not None and stream.isatty()


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _RateColumn())
    return Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not _shows(sys.stderr)
    )
