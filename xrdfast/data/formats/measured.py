"""What every reader of a format hands over: the scans of a file, each with its title and stated radiation.

Not for judging points (`xrdfast.data.scans`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xrdfast.bragg import Radiation, radiation_of, radiation_of_lines

MAX_SCANS = 4096
Points = tuple[NDArray[np.float64], NDArray[np.float64]]  # 2theta in degrees, intensity; (n_points,) each

_HEADER = 1 << 16  # characters in which a text states its wavelength
_PLAUSIBLE = (0.05, 10.0)  # Angstrom: what diffraction is done with
_TITLE = 200
_WAVELENGTH = re.compile(
    r"(?:wave[ _-]*length|\blambda|λ)(?P<before>[^0-9\n]{0,40}?)(?P<value>\d{0,3}\.\d+(?:e[+-]?\d\d?)?|\d{1,3}e-\d\d?)"
    r"(?:[ \t]*(?P<unit>[np]?m)(?![a-z]))?",
    re.IGNORECASE,
)
_UNIT_BEFORE = re.compile(r"(?<![a-z])([np]m)(?![a-z])|[(\[](m)[)\]]", re.IGNORECASE)
_UNITS = {"nm": 10.0, "pm": 0.01, "m": 1e10}
_METRES = 1e-8  # a smaller number without a unit is one of metres, as pyFAI keeps it
# Ge(220), 2xGe111, Si (111): crystals that let K-alpha 1 pass alone. Not the mirror W/Si.
_SPLITTING_CRYSTAL = re.compile(r"(?:Ge|Si)\s*\(?\s*\d{3}")


@dataclass(frozen=True)
class Measured:
    """One scan of a file, its points still to be read.

    Attributes:
        title: as the file has it, on one line; may be empty.
        radiation: as the file states it; None where it does not.
        points: reads 2theta (degrees, as in the file) and intensity. Raises InputError.
    """

    title: str
    radiation: Radiation | None
    points: Callable[[], Points]


def one_line(text: str | bytes) -> str:
    r"""Text of a header without control characters, cut short.

    Example:
        >>> one_line(b"LaB6 \n run\x00 3")
        'LaB6 run 3'
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    shown = "".join(c if c.isprintable() else " " for c in text[: 10 * _TITLE])
    return " ".join(shown.split())[:_TITLE]


def number_of(text: str | bytes | None) -> float:
    """A number, NaN where there is none.

    Example:
        >>> number_of(" 1.5406 "), number_of("unknown"), number_of(None)
        (1.5406, nan, nan)
    """
    try:
        return float(text) if text else math.nan
    except ValueError:
        return math.nan


def as_written(value: float) -> float:
    """The decimal that a single-precision number of a binary header was: 15.985, not 15.984999656677246."""
    return float(f"{value:.7g}")


def stated_radiation(first: float, second: float = 0.0, ratio: float = 0.5) -> Radiation | None:
    """Radiation of the lines a header lists; None where it lists none that diffraction is done with.

    Args:
        first: Angstrom, K-alpha 1 or the only line; NaN for none.
        second: Angstrom, K-alpha 2; 0 or NaN for none.
        ratio: of their intensities; 0 says that the second was removed.
    """
    if not _PLAUSIBLE[0] <= first <= _PLAUSIBLE[1]:
        return None
    first = as_written(first)
    return radiation_of(first) if ratio == 0.0 else radiation_of_lines(first, second)


def first_line_alone(radiation: Radiation | None) -> Radiation | None:
    """The same without its K-alpha 2, where a monochromator took that away."""
    return (
        Radiation(radiation.wavelength, f"{radiation.name}1")
        if radiation and radiation.is_doublet
        else radiation
    )


def splits_doublet(monochromator: str) -> bool:
    """Whether a monochromator of this name lets K-alpha 1 pass alone.

    Example:
        >>> splits_doublet("Hybrid monochr. 2xGe(220) Cu asym."), splits_doublet("flat graphite")
        (True, False)
    """
    return bool(_SPLITTING_CRYSTAL.search(one_line(monochromator)))


def radiation_in_text(text: str) -> Radiation | None:
    """A wavelength written out in a header: `# Calibrated wavelength = 0.413529`, `lambda= 1.494`, in Angstrom where
    it has no unit.

    Example:
        >>> radiation_in_text("lambda=  1.49400, T= 300").wavelength
        1.494
        >>> radiation_in_text("# Wavelength: 4.13529e-11 m").wavelength
        0.413529
        >>> radiation_in_text("wavelength (nm) and counts") is None
        True
    """
    match = _WAVELENGTH.search(text[:_HEADER])
    if match is None:
        return None
    value, unit = float(match["value"]), match["unit"]
    if unit is None and (before := _UNIT_BEFORE.search(match["before"])):
        unit = before[1] or before[2]
    if unit is None and value < _METRES:
        unit = "m"
    return stated_radiation(value * _UNITS[unit.lower()] if unit else value)
