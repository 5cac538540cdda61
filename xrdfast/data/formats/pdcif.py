"""Powder CIF: measured profiles in data blocks (the dictionary pdCIF). Not for structures (`xrdfast.data.cif`)."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xrdfast.bragg import Radiation
from xrdfast.data.cif_syntax import column_of, numbers_of, parse_blocks, text_of
from xrdfast.data.formats.measured import (
    Measured,
    Points,
    first_line_alone,
    one_line,
    splits_doublet,
    stated_radiation,
)
from xrdfast.errors import InputError

if TYPE_CHECKING:
    from gemmi.cif import Block

_MAX_BYTES = 8 << 20  # a parsed value takes fifty times the bytes of a short one
_ANGLES = ("_pd_proc_2theta_corrected", "_pd_meas_2theta_scan", "_pd_meas_2theta_corrected")
_RANGES = ("_pd_proc_2theta_range", "_pd_meas_2theta_range")
_INTENSITIES = (
    "_pd_meas_counts_total",
    "_pd_meas_intensity_total",
    "_pd_proc_intensity_total",
    "_pd_meas_intensity_net",
    "_pd_meas_counts_net",
    "_pd_proc_intensity_net",
)
_TIMES = ("_pd_meas_time_of_flight", "_pd_proc_time_of_flight")


def read_pdcif(data: bytes) -> list[Measured]:
    """Profiles in the order of their blocks. Total intensities come before net ones, corrected angles before read ones.

    Source:
        Toby, Int. Tables Crystallography G (2006), chapters 3.3 and 4.2: the dictionary.
    """
    if len(data) > _MAX_BYTES:
        raise InputError(f"size: must be at most {_MAX_BYTES} bytes for a CIF, got {len(data)}")
    blocks = parse_blocks(data)
    stated = [_radiation(block) for block in blocks]
    of_file = next((radiation for radiation in stated if radiation), None)
    scans = []
    for block, own in zip(blocks, stated, strict=True):
        if any(column_of(block, tag) for tag in _INTENSITIES) or any(column_of(block, tag) for tag in _TIMES):
            radiation = own or of_file
            title = one_line(text_of(block, "_chemical_name_common", "_chemical_name_mineral") or block.name)
            scans.append(Measured(title, radiation, functools.partial(_read_profile, block)))
    if not scans:
        raise InputError(
            "profile: must be a measured powder profile, got a CIF without one, perhaps a structure"
        )
    return scans


def _radiation(block: Block) -> Radiation | None:
    """Of a single wavelength or of a list; K-alpha 1 where both lines came through is told by the type."""
    wavelengths = numbers_of(column_of(block, "_diffrn_radiation_wavelength"))
    wavelengths = wavelengths[np.isfinite(wavelengths)]
    if not len(wavelengths):
        return None
    radiation = stated_radiation(wavelengths[0], wavelengths[1] if len(wavelengths) > 1 else math.nan)
    if radiation is None:
        return None
    kind = "".join(text_of(block, "_diffrn_radiation_type").lower().split())
    if splits_doublet(text_of(block, "_diffrn_radiation_monochromator")):
        return first_line_alone(radiation)
    both = kind.endswith(("k\\a", "kalpha", "ka", "kα"))
    if radiation.name.endswith("1") and both:
        return Radiation(radiation.wavelength, radiation.name.removesuffix("1"))
    return radiation


def _read_profile(block: Block) -> Points:
    if any(column_of(block, tag) for tag in _TIMES):
        raise InputError("axis: must be 2theta at one wavelength, got time-of-flight data")
    intensity = next(values for tag in _INTENSITIES if len(values := numbers_of(column_of(block, tag))))
    two_theta = _two_theta(block, len(intensity))
    measured = np.isfinite(intensity)  # `?` and `.` stand for points left out
    return two_theta[measured], intensity[measured]


def _two_theta(block: Block, n_points: int) -> NDArray[np.float64]:
    for tag in _ANGLES:
        if len(two_theta := numbers_of(column_of(block, tag))) == n_points > 1:
            return two_theta
    for tag in _RANGES:
        start, stop, step = (
            numbers_of(column_of(block, f"{tag}_{end}")[:1]) for end in ("min", "max", "inc")
        )
        if len(start) and len(step) and step[0] > 0.0:
            if len(stop) and abs(start[0] + step[0] * (n_points - 1) - stop[0]) > 0.5 * step[0]:
                raise InputError(
                    f"{tag}: must be that of {n_points} points, got {start[0]:g} to {stop[0]:g} by {step[0]:g}"
                )
            return start[0] + step[0] * np.arange(n_points)
    raise InputError(
        f"angles: must be one for each of {n_points} intensities, or min, max and inc, got neither"
    )
