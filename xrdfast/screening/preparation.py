"""What a reader makes of a scan before the model sees it: lines or points, a thumbnail, quality notes. No torch."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xrdfast.bragg import Radiation
from xrdfast.data.peaks import find_peaks
from xrdfast.data.scans import Scan
from xrdfast.errors import shown_path
from xrdfast.screening.sources import Chunk, Failure, Found, read_chunk

THUMBNAIL_BINS = 200
_MAX_POINTS = 1 << 26  # of a chunk; one of a container has no more
_NOISY = 20.0  # strongest point over the median, in deviations of the noise: weak lines are lost below
_LEAST = (
    1e-30  # of a highest intensity, and its inverse the most, that float32 holds with all that it is taken to
)
_FEW_PEAKS = 4  # fewer peaks than this in a scan fix no cell but a cubic one
_SECOND_DIFFERENCE = (
    0.6744897501960817 * 6.0**0.5
)  # median |x1 - 2 x2 + x3| of normal values with deviation 1


@dataclass(frozen=True)
class Prepared:
    """A scan ready for a model.

    Attributes:
        scan_id, file, member, scan_index, sha256: as `Found`.
        kind: "scan" or "sticks".
        wavelength, wavelength_source, is_doublet: as `Scan`.
        n_points, two_theta_first, two_theta_last: of the scan as measured, degrees.
        two_theta, intensity: (n_lines,) the lines of a list; of a scan its peaks, or for a model of scans its points,
            whose intensities are float32, as preprocessing takes them.
        notes: what was done, and what is wrong with the pattern, a sentence each.
        thumbnail: 200 bytes, see `thumbnail`.
        seconds: of reading and preparing.
    """

    scan_id: str
    file: str
    member: str
    scan_index: int
    sha256: str
    kind: str
    wavelength: float
    wavelength_source: str
    is_doublet: bool
    n_points: int
    two_theta_first: float
    two_theta_last: float
    two_theta: NDArray[np.float64]
    intensity: NDArray[np.floating]
    notes: tuple[str, ...]
    thumbnail: bytes
    seconds: float


def prepare_chunk(chunk: Chunk, given: Radiation | None, whole: bool) -> list[Prepared | Failure]:
    """Reads and prepares a chunk: the work of a reader process.

    Args:
        chunk: of `find_chunks`.
        given: radiation for files that state none.
        whole: scans keep their points, for a model that reads scans; else their peaks are found.
    """
    prepared: list[Prepared | Failure] = []
    axis: Axis | None = None
    n_points = 0
    for one in read_chunk(chunk, given):
        if isinstance(one, Failure):
            prepared.append(one)
            continue
        n_points += len(one.scan.two_theta)
        if n_points > _MAX_POINTS:  # files that hold far more than their sizes told
            rule = f"points: must be at most {_MAX_POINTS} in files read together, got more; screen it alone"
            reason = f"{shown_path(one.scan_id)}: {rule}"
            prepared.append(Failure(one.scan_id, one.file, one.member, one.index, reason))
            continue
        if axis is None or axis.two_theta is not one.scan.two_theta:  # many scans share one array
            axis = Axis(one.scan)
        prepared.append(prepare(one, axis, whole))
    return prepared


def prepare_scan(scan: Scan, whole: bool) -> Prepared | Failure:
    """The same for a scan at hand."""
    return prepare(Found(scan, scan.path, "", scan.scan, "", 0.0), Axis(scan), whole)


class Axis:
    """What only the angles of a scan decide.

    Args:
        scan: the first that has them.

    Attributes:
        two_theta: (n_points,) rising, degrees.
        kind: "scan" or "sticks".
        begin: (200,) the first point at or beyond the beginning of each bin of a thumbnail.
    """

    def __init__(self, scan: Scan) -> None:
        two_theta = self.two_theta = scan.two_theta
        self.kind = "scan" if scan.is_scan else "sticks"
        first, last = two_theta[0], two_theta[-1]
        edges = first + (last - first) / THUMBNAIL_BINS * np.arange(THUMBNAIL_BINS)
        self.begin = np.searchsorted(two_theta, edges)


def prepare(found: Found, axis: Axis, whole: bool) -> Prepared | Failure:
    """What the model and the table need of one scan."""
    start = time.perf_counter()
    scan = found.scan
    kind = axis.kind
    two_theta, notes = scan.two_theta, list(scan.notes)
    intensity: NDArray[np.floating] = scan.intensity
    highest = float(intensity.max())
    if not _LEAST < highest < 1.0 / _LEAST:
        intensity = intensity / highest
    counts = intensity.astype(np.float32)
    if kind == "scan":
        notes += _quality(counts)
        intensity = counts if whole else intensity
    else:
        notes.append(f"read as a list of {len(two_theta)} lines")
    if kind == "scan" and not whole:
        two_theta, intensity = find_peaks(two_theta, intensity)
        if len(two_theta) == 0:
            rule = "peaks: must stand out of the noise, got none: amorphous, empty or too noisy"
            reason = f"{shown_path(found.scan_id)}: {rule}"
            return Failure(found.scan_id, found.file, found.member, found.index, reason)
        if len(two_theta) < _FEW_PEAKS:
            notes.append(f"amorphous or nearly so: {len(two_theta)} peaks stand out")
    return Prepared(
        scan_id=found.scan_id,
        file=found.file,
        member=found.member,
        scan_index=found.index,
        sha256=found.sha256,
        kind=kind,
        wavelength=scan.wavelength,
        wavelength_source=scan.wavelength_source,
        is_doublet=scan.is_doublet,
        n_points=len(scan.two_theta),
        two_theta_first=float(scan.two_theta[0]),
        two_theta_last=float(scan.two_theta[-1]),
        two_theta=two_theta,
        intensity=intensity,
        notes=tuple(notes),
        thumbnail=thumbnail(axis, counts),
        seconds=found.seconds + time.perf_counter() - start,
    )


def thumbnail(axis: Axis, intensity: NDArray[np.floating]) -> bytes:
    r"""The pattern in 200 bytes: square root of the highest intensity of each bin of its own range, 0..255.

    Args:
        axis: of its angles.
        intensity: (n_points,), >= 0, positive somewhere.

    Example:
        >>> from xrdfast.data.scans import scan_of_points
        >>> scan = scan_of_points(np.array([10.0, 60.0]), np.array([25.0, 100.0]), path="two")
        >>> thumbnail(Axis(scan), scan.intensity)[::199]
        b'\x80\xff'
    """
    begin = axis.begin  # the last bin holds the last point
    highest = np.maximum.reduceat(intensity, begin)
    highest[:-1][begin[1:] == begin[:-1]] = 0.0  # of an empty bin reduceat gives the next point
    return np.rint(255.0 * np.sqrt(highest / highest.max())).astype(np.uint8).tobytes()


def _quality(intensity: NDArray[np.float32]) -> list[str]:
    rough = intensity[:-2] - intensity[1:-1]
    rough += intensity[2:] - intensity[1:-1]
    np.abs(rough, out=rough)
    highest, half = float(intensity.max()), len(rough) // 2
    # The median of intensities is at most twice their mean, which clears most scans without a sort.
    enough = (highest - 2.0 * float(intensity.mean())) * (_SECOND_DIFFERENCE / _NOISY)
    if np.count_nonzero(rough <= enough) > half:
        return []
    noise = float(np.partition(rough, half)[half]) / _SECOND_DIFFERENCE
    height = highest - float(np.partition(intensity, len(intensity) // 2)[len(intensity) // 2])
    if height < _NOISY * noise:
        return [f"too noisy: the strongest point stands {height / noise:.0f} deviations of the noise out"]
    return []
