"""Profiles as text with "start step stop" on a line and nothing but counts after it.

DBWS, LHPM and FullProf read them; neutron instruments (ILL D1A and D1B, PSI DMC and HRPT) write them, with a few
lines of title before and, some, the standard deviations behind.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np

from xrdfast.data.formats.measured import Measured, Points, number_of, one_line, radiation_in_text
from xrdfast.errors import InputError

_TITLE_LINES = 6
_MAX_LINE = 400  # characters
_MIN_POINTS, _MAX_POINTS = 10, 1_000_000


def starts_and_steps(text: str) -> bool:
    r"""Whether the text begins so: a range, and behind it a line of other than two or three numbers.

    Example:
        >>> starts_and_steps("10.0 0.1 20.0\n 5 6 7 8 9\n")
        True
        >>> starts_and_steps("10.0 0.1 20.0\n 10.1 0.2 20.2\n")
        False
    """
    return _find(text) is not None


def read_start_step_stop(text: str) -> list[Measured]:
    """The one scan of the text."""
    found = _find(text)
    if found is None:
        raise InputError("range: must be a line of start, step and stop, got none")
    at, start, step, n_points = found
    header = "\n".join(_head(text)[:at])
    title = one_line(header.partition("\n")[0])
    return [
        Measured(title, radiation_in_text(header), functools.partial(_read, text, at, start, step, n_points))
    ]


def _head(text: str) -> list[str]:
    return text[: (_TITLE_LINES + 2) * _MAX_LINE].split("\n")[: _TITLE_LINES + 2]


def _find(text: str) -> tuple[int, float, float, int] | None:
    """Index of the line, start, step and number of points."""
    head = _head(text)
    for at, (line, following) in enumerate(itertools.pairwise(head)):
        start, step, stop = [number_of(field) for field in (line.replace(",", " ").split() + [""] * 3)[:3]]
        if not (math.isfinite(start) and step > 0.0 and start + _MIN_POINTS * step < stop < 180.0):
            continue
        steps = (stop - start) / step
        counts = following.split()
        if len(counts) in (0, 2, 3) or not all(math.isfinite(number_of(field)) for field in counts):
            continue
        if abs(steps - round(steps)) < 0.01 and steps < _MAX_POINTS:
            return at, start, step, round(steps) + 1
    return None


def _read(text: str, at: int, start: float, step: float, n_points: int) -> Points:
    body = text.split("\n", at + 1)[at + 1]
    fields = body.split(None, n_points)[:n_points]
    intensity = np.array([number_of(field) for field in fields])
    if len(intensity) < n_points:
        raise InputError(f"points: must be the declared {n_points}, got {len(intensity)}")
    return start + step * np.arange(n_points), intensity
