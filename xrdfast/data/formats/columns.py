"""Two or three columns of text: .xy, .xye, .csv, .txt, .dat, FIT2D .chi and the like."""

from __future__ import annotations

import functools
import io
import re

import numpy as np

from xrdfast import _native
from xrdfast.data.formats.measured import Measured, Points, one_line, radiation_in_text
from xrdfast.errors import InputError

_MAX_LINES = 1_000_000  # as separate strings, 60 MB
_MAX_LINE = 1000  # characters of a point; a longer line is text
_NEWLINE = ord("\n")
_DOT = (ord(".") - ord("0")) % 256
_MAX_DIGITS = 15  # below 2^53
_MAX_DECIMAL = _MAX_DIGITS + 2  # with sign and point
_POWERS = 10.0 ** np.arange(_MAX_DECIMAL)
_COMMENT = ("#", "!", "*", "%", "/", "'", ";")
_OTHER_AXIS = re.compile(
    r"time[ -]of[ -]flight|\btof\b|\bq\s*[\[(]|\bd[ -]spacing"
    r"|\bq_(?:nm|a)\^-1|\b2th_rad\b|\br_mm?(?=\s)|\bd\*2_|q\.(?:n?m|a)\)",  # pyFAI's columns
    re.IGNORECASE,
)


def read_columns(text: str) -> list[Measured]:
    """The one scan of the text.

    One point a line, 2theta in degrees, intensity, and perhaps an error, which is not kept. Columns are separated
    by spaces, tabs, commas or semicolons; with semicolons or tabs, a comma is a decimal point. Blank lines, lines
    that begin with one of `# ! * % / ' ;`, and a text header are passed over.
    """
    header = "\n".join(_header(text))
    title = next((line.lstrip("".join(_COMMENT)) for line in header.split("\n") if line.strip()), "")
    return [Measured(one_line(title), radiation_in_text(header), functools.partial(_read, text, header))]


def _header(text: str) -> list[str]:
    """Lines before the first point, of the first 64 kB."""
    text, lines, begin = text[: 1 << 16], [], 0
    while (end := text.find("\n", begin)) >= 0:  # what is behind the last one may be cut
        line = text[begin:end]
        if not line.lstrip().startswith(_COMMENT) and len(_values(line)) >= 2:
            break
        lines.append(line)
        begin = end + 1
    return lines


def _read(text: str, header: str) -> Points:
    if other := _OTHER_AXIS.search(header):
        raise InputError(f"axis: must be 2theta in degrees, got {one_line(other[0])!r} in the header")
    if (n_lines := text.count("\n")) > _MAX_LINES:
        raise InputError(f"lines: must be at most {_MAX_LINES}, got {n_lines}")
    table = _plain_points(text[len(header) :])
    if table is None:
        table = _rows(text)
    if len(table) < 2:
        lines = text[: 1 << 16].split("\n")
        other = next((line for line in lines if line.lstrip()[:1].isdigit() and len(_values(line)) < 2), "")
        got = f"{len(table)}, and lines such as {one_line(other)[:60]!r}" if other else len(table)
        raise InputError(f"points: must be at least 2 lines of two or three numbers, got {got}")
    return table[:, 0].copy(), table[:, 1].copy()


def _plain_points(body: str) -> np.ndarray | None:
    """(n_points, 2 or 3) numbers of rows separated by spaces, as nearly every file has them; None for any other.

    Decimal numbers are parsed natively, or where that cannot be by whole arrays; numbers with exponents or many digits
    by NumPy's parser; `_rows`, which says what is wrong, is the slowest by far.
    """
    content = np.frombuffer(body.encode(), np.uint8)
    table = _native_decimals(content)
    if table is None:
        ends = np.flatnonzero(content == _NEWLINE)
        if len(ends) == 0 or np.diff(ends, append=len(content)).max() > _MAX_LINE:
            return None
        table = _decimals(content)
    if table is None:
        try:
            table = (
                np.loadtxt(io.StringIO(body), comments=None, ndmin=2) if body.strip() else np.zeros((0, 2))
            )
        except ValueError:
            return None
    return table if table.shape[1] in (2, 3) else None


def _native_decimals(content: np.ndarray) -> np.ndarray | None:  # (n_bytes,) uint8
    """`_decimals` in one pass; None also without native code."""
    module = _native.text() if len(content) else None
    if module is None:
        return None
    value = np.empty(len(content) // 2 + 1)
    n_values, n_columns = module.parse_columns(
        content.ctypes.data, value.ctypes.data, len(content), _MAX_LINE
    )
    return value[:n_values].reshape(-1, n_columns) if n_columns else None


def _decimals(content: np.ndarray) -> np.ndarray | None:  # (n_bytes,) uint8
    """(n_rows, n_columns) of rows of decimal numbers between spaces and tabs; None for anything else.

    A number of at most 15 digits is an exact integer over an exact power of ten, so one division rounds it right.
    """
    digit = content - np.uint8(ord("0"))
    is_digit, is_dot, is_minus = digit < 10, content == ord("."), content == ord("-")
    newline = content == _NEWLINE
    in_number = is_digit | is_dot | is_minus
    if not (in_number | newline | (content == ord(" ")) | (content == ord("\t"))).all():
        return None
    edges = np.flatnonzero(np.diff(in_number, prepend=False, append=False))
    begin, length = edges[::2], edges[1::2] - edges[::2]
    if len(begin) < 2 or length.max() > _MAX_DECIMAL:
        return None
    breaks = np.logical_or.reduceat(newline, begin)[:-1]  # whether a line ends between a number and the next
    n_columns = int(breaks.argmax()) + 1 if breaks.any() else len(begin)
    if len(begin) % n_columns or not (
        breaks[n_columns - 1 :: n_columns].all() and breaks.sum() == len(begin) // n_columns - 1
    ):
        return None
    mantissa, n_digits, n_after = np.zeros(len(begin)), np.zeros(len(begin)), np.zeros(len(begin))
    has_dot = np.zeros(len(begin), bool)
    for at in range(int(length.max())):  # no branch depends on a number: mispredicted ones would cost more
        inside = at < length
        here = digit.take(begin + at, mode="clip")
        is_here = (here < 10) & inside
        mantissa = np.where(is_here, 10.0 * mantissa + here, mantissa)
        n_digits += is_here
        n_after += is_here & has_dot
        has_dot |= (here == _DOT) & inside
    negative = is_minus[begin]
    if (length != n_digits + has_dot + negative).any() or n_digits.min() < 1 or n_digits.max() > _MAX_DIGITS:
        return None
    value = mantissa / _POWERS[n_after.astype(np.intp)]
    return np.where(negative, -value, value).reshape(-1, n_columns)


def _rows(text: str) -> np.ndarray:
    """(n_points, 2) 2theta and intensity; text before the first point is a header."""
    points: list[float] = []
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith(_COMMENT):
            continue
        values = _values(stripped)
        if not points and len(values) < 2:
            continue
        if len(values) not in (2, 3):
            n_fields = len(_split(stripped)) if len(stripped) <= _MAX_LINE else 1
            what = f"{n_fields} columns" if values else repr(one_line(stripped[:60]))
            raise InputError(f"line {number}: must be two or three numbers, got {what}")
        points += values[:2]
    return np.array(points).reshape(-1, 2)


def _values(line: str) -> list[float]:
    """Numbers of a line, NaN and infinity among them; none where a field is no number."""
    line = line.strip()
    if not line or len(line) > _MAX_LINE or "_" in line:  # Python reads 1_000
        return []
    try:
        return [float(field) for field in _split(line)]
    except ValueError:
        return []


def _split(text: str) -> list[str]:
    """Fields of a line. A comma between digits is never taken for both a point and a separator."""
    if ";" in text:
        fields = text.removesuffix(";").replace(",", ".").split(";")
    elif "\t" in text:
        fields = text.replace(",", ".").split()
    elif "," in text:
        fields = text.removesuffix(",").split(",")  # `20,02 49` is left with a field that is no number
    else:
        fields = text.split()
    return [field.strip(" \"'") for field in fields]
