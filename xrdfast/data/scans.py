"""Measured patterns from files: `read` for every format, one result. Not for finding peaks (`xrdfast.data.peaks`).

How a format is told and read is in `xrdfast.data.formats`; what a scan must be, and where its wavelength comes
from, is here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xrdfast.bragg import Radiation, radiation_of
from xrdfast.data.formats import COLUMNS, read_scans, refusal
from xrdfast.data.formats.bounded import decompress, read_bytes
from xrdfast.data.formats.measured import Measured
from xrdfast.data.peaks import is_scan
from xrdfast.errors import InputError, shown_path

MAX_POINTS = 1 << 18  # the longest measured scans have 1e5
_DIP = 0.05  # of the maximum: a background-corrected scan goes this far below zero
PACKED = "packed scans"  # the format of scans in `xrdfast.screening.packed`
_ASSUMED = "CuKa"
_LISTED = 8  # scans that a message names


@dataclass(frozen=True)
class Scan:
    """A measured pattern or a list of its lines.

    Attributes:
        two_theta: (n_points,) float64, degrees, strictly rising.
        intensity: (n_points,) float64, >= 0, in the file's unit.
        path: of the file.
        wavelength: Angstrom; of K-alpha 1 for a doublet.
        wavelength_source: "file", "given" or "assumed".
        radiation: "CuKa" for both K-alpha lines, "CuKa1" for the first alone, "" for any other.
        format: as recognised from the content, such as "Bruker RAW".
        scan: index of the scan in the file, from 0.
        n_scans: of the file.
        title: as the file has it; may be empty.
        notes: what was done that the file does not say, one sentence each.
    """

    two_theta: NDArray[np.float64]
    intensity: NDArray[np.float64]
    path: str
    wavelength: float
    wavelength_source: str
    radiation: str = ""
    format: str = COLUMNS
    scan: int = 0
    n_scans: int = 1
    title: str = ""
    notes: tuple[str, ...] = ()

    @property
    def is_scan(self) -> bool:
        """Whether this is a scan, not a list of lines.

        Files of instruments and stacks hold nothing else. Of columns of text the angles tell (`peaks.is_scan`), and of
        packed scans, which may have been columns, as well: there more than 50 equal steps are enough.
        """
        return _are_of_a_scan(self.two_theta, self.format)

    @property
    def is_doublet(self) -> bool:
        """Whether both K-alpha lines were there: every peak has its satellite."""
        return Radiation(self.wavelength, self.radiation).is_doublet


def read(path: str | Path, *, wavelength: str | float | None = None, scan: int | None = None) -> Scan:
    r"""Reads a measured powder pattern, whatever instrument wrote it.

    PANalytical XRDML; Bruker RAW 1 to 4, UXD and BRML; Rigaku RAS and RASX; STOE RAW; GSAS; powder CIF; text with
    a start, a step and counts; two or three columns of text. The content tells the format, not the name; a .gz or
    .bz2 is opened first. Intensities are as in the file, multiplied by attenuation factors it lists; those of a
    list of lines are >= 0, and a scan (`Scan.is_scan`) may dip to -5 % of its maximum and is clipped to 0. Points at or
    below 0 degrees, which a detector that crosses the beam has, are left out.

    The wavelength is the file's; else the one given; else copper K-alpha is assumed. `wavelength_source` says
    which. A stated weighted mean, such as 1.5418, means the doublet.

    Args:
        path: a regular file of at most 64 MB, unpacked too, with at most 262,144 points a scan.
        wavelength: Angstrom, or a name such as "CoKa", for a file that states none.
        scan: index, from 0, in a file of several; needed there.

    Raises:
        InputError: for a file that breaks a rule, in one line: `file: field: rule, got what`. Of a file of several
            scans where none is chosen, the line lists them.
        ValueError: for a wavelength that is no wavelength.

    Example:
        >>> path = getfixture("tmp_path") / "quartz.xy"
        >>> _ = path.write_text("# wavelength 0.7\n20.8 21\n26.6 100\n")
        >>> found = read(path)
        >>> found.two_theta.tolist(), found.wavelength, found.wavelength_source
        ([20.8, 26.6], 0.7, 'file')
    """
    given = None if wavelength is None else radiation_of(wavelength)
    try:
        name, scans = read_scans(decompress(read_bytes(Path(path))))
        if scan is None and len(scans) > 1:
            raise InputError(f"scan: must be chosen in a file of {len(scans)}: {_listed(scans)}")
        index = 0 if scan is None else scan
        if not 0 <= index < len(scans):
            raise InputError(f"scan: must be in 0..{len(scans) - 1}, got {index}")
        return _checked(path, name, scans, index, given)
    except InputError as error:
        raise InputError(f"{shown_path(path)}: {error}") from error


def read_all(path: str | Path, *, wavelength: str | float | None = None) -> Iterator[Scan | InputError]:
    """Every scan of a file in its order, as `read` reads it; in the place of one that breaks a rule, its error.

    Raises:
        InputError: for a file that cannot be read at all.
        ValueError: for a wavelength that is no wavelength.
    """
    given = None if wavelength is None else radiation_of(wavelength)
    try:
        data = read_bytes(Path(path))
    except InputError as error:
        raise InputError(f"{shown_path(path)}: {error}") from error
    yield from scans_of_content(data, path, given)


def scans_of_content(
    data: bytes, path: str | Path, given: Radiation | None = None
) -> Iterator[Scan | InputError]:
    """Every scan of a file's content, as `read_all`; `path` names it, and need not exist.

    Raises:
        InputError: for content that cannot be read at all.
    """
    try:
        name, scans = read_scans(decompress(data))
    except InputError as error:
        raise InputError(f"{shown_path(path)}: {error}") from error
    for index in range(len(scans)):
        try:
            yield _checked(path, name, scans, index, given)
        except InputError as error:
            yield InputError(f"{shown_path(path)}: scan {index}: {error}")


def _checked(path: str | Path, name: str, scans: list[Measured], index: int, given: Radiation | None) -> Scan:
    measured = scans[index]
    notes = []
    try:
        two_theta, intensity = measured.points()
        before = int((two_theta <= 0.0).sum())
        if before and name != COLUMNS:
            notes.append(f"{before} points at or below 0 degrees left out")
            two_theta, intensity = two_theta[before:], intensity[before:]
        return scan_of_points(
            two_theta,
            intensity,
            stated=measured.radiation,
            given=given,
            path=str(path),
            format=name,
            scan=index,
            n_scans=len(scans),
            title=measured.title,
            notes=tuple(notes),
        )
    except InputError as error:
        raise refusal(name, error) from error


def scan_of_points(
    two_theta: NDArray[np.float64],  # (n_points,)
    intensity: NDArray[np.float64],  # (n_points,)
    *,
    path: str,
    stated: Radiation | None = None,
    given: Radiation | None = None,
    format: str = COLUMNS,
    scan: int = 0,
    n_scans: int = 1,
    title: str = "",
    notes: tuple[str, ...] = (),
) -> Scan:
    """A scan of arrays, under the rules and with the assumptions of `read`.

    Args:
        two_theta: degrees.
        intensity: any unit.
        path: of the file they came from.
        stated: radiation by the file; None where it states none.
        given: by whoever asks, for a file that states none.
        format: as `Scan` has it, and `scan`, `n_scans`, `title`, `notes`.

    Raises:
        InputError: for points that break a rule.
    """
    _check_points(two_theta, intensity, format)
    more = []
    if intensity.min() < 0.0:
        negative = int((intensity < 0.0).sum())
        more.append(f"{negative} negative intensities set to 0")
        intensity = np.maximum(intensity, 0.0)
    radiation, source = stated, "file"
    if radiation is None:
        radiation, source = (radiation_of(_ASSUMED), "assumed") if given is None else (given, "given")
    elif given is not None and given != radiation and abs(given.wavelength - radiation.wavelength) > 1e-3:
        more.append(
            f"the wavelength given, {given.wavelength:g}, is not the file's, {radiation.wavelength:g}, which was kept"
        )
    return Scan(
        two_theta,
        intensity,
        path,
        radiation.wavelength,
        source,
        radiation.name,
        format,
        scan,
        n_scans,
        title,
        (*notes, *more),
    )


def _are_of_a_scan(two_theta: NDArray[np.float64], format: str) -> bool:
    if format == PACKED:
        return is_scan(two_theta, more_than=50)
    return format != COLUMNS or is_scan(two_theta)


def _check_points(two_theta: NDArray[np.float64], intensity: NDArray[np.float64], format: str) -> None:
    """The rules of every scan."""
    if len(two_theta) < 2 or len(two_theta) != len(intensity):
        raise InputError(f"points: must be at least 2, got {len(two_theta)}")
    if len(two_theta) > MAX_POINTS:
        raise InputError(f"points: must be at most {MAX_POINTS}, got {len(two_theta)}")
    lowest, maximum = float(intensity.min()), float(intensity.max())  # NaN where there is one
    if not (
        (two_theta[1:] > two_theta[:-1]).all()
        and two_theta[0] > 0.0
        and two_theta[-1] < 180.0
        and -math.inf < lowest
        and maximum < math.inf
    ):
        raise _broken_rule(two_theta, intensity)
    if maximum <= 0.0:
        raise InputError(f"intensity: must be positive somewhere, got a maximum of {maximum:g}")
    if lowest >= 0.0:
        return
    if _are_of_a_scan(two_theta, format):
        if lowest < -_DIP * maximum:
            at = int(intensity.argmin())
            rule = "at least -5 % of the maximum of the scan"
            raise InputError(f"point {at + 1}: intensity must be {rule}, got {lowest:.10g}")
        return
    at = int(np.argmax(intensity < 0.0))
    raise InputError(f"point {at + 1}: intensity must be >= 0 in a list of lines, got {intensity[at]:.10g}")


def _broken_rule(two_theta: NDArray[np.float64], intensity: NDArray[np.float64]) -> InputError:
    """The first rule that points break."""
    for bad, field, rule, values in (
        (~np.isfinite(two_theta), "two_theta", "finite", two_theta),
        (~np.isfinite(intensity), "intensity", "finite", intensity),
        (~((two_theta > 0.0) & (two_theta < 180.0)), "two_theta", "between 0 and 180 degrees", two_theta),
        (
            np.diff(two_theta, prepend=-np.inf) <= 0.0,
            "two_theta",
            "above that of the point before",
            two_theta,
        ),
    ):
        if bad.any():
            at = int(np.argmax(bad))
            return InputError(f"point {at + 1}: {field} must be {rule}, got {values[at]:.10g}")
    raise AssertionError("some rule is broken")


def _listed(scans: list[Measured]) -> str:
    """The first scans with their ranges, for a message."""
    shown = []
    for index, measured in enumerate(scans[:_LISTED]):
        try:
            two_theta, _ = measured.points()
            what = f"{len(two_theta)} points from {two_theta[0]:g} to {two_theta[-1]:g} degrees"
        except InputError:
            what = "not readable"
        shown.append(f"{index} ({measured.title + ', ' if measured.title else ''}{what})")
    more = len(scans) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")
