"""A packed container of measured scans: one file instead of a hundred thousand. Not for reflections (`data.store`).

Tensors of `<name>.scans.safetensors`, N scans, P points, A angles, B bytes of names:

    offset (N + 1,) int64, intensity (P,) float32: points of scan i are intensity[offset[i]:offset[i + 1]];
    start, step (N,) float64: degrees, of scans with equal steps; where step is 0, the angles are listed:
    angle_offset (N + 1,) int64, angle (A,) float64; wavelength (N,) float64, 0 where unknown;
    doublet, stated (N,) uint8: whether K-alpha 2 was there, and whether the scan's file stated the wavelength;
    name_offset (N + 1,) int64, names (B,) uint8: UTF-8, where each scan came from.

It is read by position rather than mapped: pages of a map would count as this process's memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from xrdfast.bragg import Radiation, radiation_of
from xrdfast.data.scans import MAX_POINTS, PACKED, Scan, scan_of_points
from xrdfast.errors import InputError, shown_path

FORMAT = "xrdfast-scans"
SUFFIX = ".scans.safetensors"
_VERSION = "1"
_MAX_HEADER = 1 << 20
_COPY_BYTES = 1 << 22
_MAX_NAME = 1 << 16  # bytes: a path of 4,096 as it may be written
_EVEN = 1e-6  # degrees: steps that differ by less are equal
# Dtype and index of the length in the header; wide ones first keep all of them aligned.
_LAYOUT = {
    "offset": ("I64", "<i8"),
    "angle_offset": ("I64", "<i8"),
    "name_offset": ("I64", "<i8"),
    "start": ("F64", "<f8"),
    "step": ("F64", "<f8"),
    "wavelength": ("F64", "<f8"),
    "angle": ("F64", "<f8"),
    "intensity": ("F32", "<f4"),
    "doublet": ("U8", "u1"),
    "stated": ("U8", "u1"),
    "names": ("U8", "u1"),
}
_STREAMED = ("angle", "intensity", "names")
_OFFSETS = {"offset": "intensity", "angle_offset": "angle", "name_offset": "names"}


def pack(path: str | Path, scans: Iterable[Scan]) -> int:
    """Writes scans into one packed file, streaming.

    Args:
        path: of the file; its name ends in `.scans.safetensors`.
        scans: as `xrdfast.read` gives them.

    Returns:
        How many there were.

    Raises:
        InputError: for another name, no scan, or where the file cannot be written; a file that was there stays.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIX):
        raise InputError(f"{shown_path(path)}: name: must end in {SUFFIX}, got another")
    small: dict[str, list[float]] = {
        name: [] for name in _LAYOUT if name not in _STREAMED and name not in _OFFSETS
    }
    ends: dict[str, list[int]] = {name: [0] for name in _OFFSETS}
    temporary = {name: path.with_name(f".{path.name}.{name}.{os.getpid()}.tmp") for name in _STREAMED}
    streams: dict[str, IO[bytes]] = {}
    try:
        for name, place in temporary.items():
            streams[name] = open(place, "wb")  # noqa: SIM115 (closed below)
        for scan in scans:
            step = _even_step(scan.two_theta)
            pieces = {
                "angle": b"" if step else scan.two_theta.astype("<f8").tobytes(),
                "intensity": scan.intensity.astype("<f4").tobytes(),
                "names": _name_of(scan).encode("utf-8", "backslashreplace"),
            }
            for name, key in (("intensity", "offset"), ("angle", "angle_offset"), ("names", "name_offset")):
                streams[name].write(pieces[name])
                size = np.dtype(_LAYOUT[name][1]).itemsize
                ends[key].append(ends[key][-1] + len(pieces[name]) // size)
            assumed = scan.wavelength_source == "assumed"
            values = (
                float(scan.two_theta[0]),
                step,
                0.0 if assumed else scan.wavelength,
                scan.is_doublet and not assumed,
                scan.wavelength_source == "file",
            )
            for name, value in zip(small, values, strict=True):
                small[name].append(value)
        for stream in streams.values():
            stream.close()
        if not small["start"]:
            raise InputError(f"{shown_path(path)}: scans: must be at least one to pack, got none")
        _assemble(path, small | ends, temporary)
    except OSError as error:
        raise InputError(
            f"{shown_path(path)}: file: must be writable, got {error.strerror or error}"
        ) from error
    finally:
        for stream in streams.values():
            stream.close()
        for place in temporary.values():
            place.unlink(missing_ok=True)
    return len(small["start"])


class PackedScans:
    """Scans of a packed file, by index.

    Attributes:
        path: of the file.

    Raises:
        InputError: for a file that is missing, cut short, of another kind or version, or inconsistent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._axis = (0.0, 0.0, 0), np.zeros(0)
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise self._refusal("file: must be readable", error.strerror or error) from error
        try:
            self._small = self._read_small()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._small["start"])

    def __enter__(self) -> PackedScans:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def name(self, index: int) -> str:
        """Where the scan came from, as `pack` was told."""
        begin, end = self._span("name_offset", index)
        return self._read("names", begin, end).tobytes().decode("utf-8", "replace")

    def scan(self, index: int, given: Radiation | None = None) -> Scan:
        """One scan.

        Args:
            index: 0..len - 1.
            given: radiation for a scan of which none is known.

        Raises:
            InputError: for points that break the rules of a scan.
        """
        small = self._small
        begin, end = self._span("offset", index)
        if not 2 <= end - begin <= MAX_POINTS:
            raise InputError(f"points: must be in 2..{MAX_POINTS}, got {end - begin}")
        intensity = self._read("intensity", begin, end).astype(np.float64)
        start, step = float(small["start"][index]), float(small["step"][index])
        if step:
            two_theta = self._even_axis(start, step, end - begin)
        else:
            two_theta = self._read("angle", *self._span("angle_offset", index))
        wavelength = float(small["wavelength"][index])
        radiation = None
        if wavelength:
            anode = radiation_of(wavelength).name.removesuffix("1")
            radiation = Radiation(wavelength, anode) if small["doublet"][index] else radiation_of(wavelength)
        stated = bool(small["stated"][index])
        return scan_of_points(
            two_theta,
            intensity,
            path=str(self.path),
            stated=radiation if stated else None,
            given=given if stated or radiation is None else radiation,
            format=PACKED,
            scan=index,
            n_scans=len(self),
        )

    def _even_axis(self, start: float, step: float, n_points: int) -> NDArray[np.float64]:
        """The same array for scan after scan of one axis."""
        key = start, step, n_points
        if self._axis[0] != key:
            two_theta = start + step * np.arange(n_points)
            two_theta.flags.writeable = False
            self._axis = key, two_theta
        return self._axis[1]

    def _span(self, name: str, index: int) -> tuple[int, int]:
        offset = self._small[name]
        return int(offset[index]), int(offset[index + 1])

    def _read_small(self) -> dict[str, NDArray[Any]]:
        """Everything but points and names, checked."""
        try:
            self._tensors = self._read_header()
            small = {name: self._read(name) for name in _LAYOUT if name not in _STREAMED}
        except OSError as error:
            raise self._refusal("file: must be readable", error.strerror or error) from error
        n_scans = len(small["start"])
        for name, array in small.items():
            if len(array) != n_scans + (name in _OFFSETS):
                raise self._refusal(f"{name}: must have one entry a scan, {n_scans} in all", len(array))
        for name, target in _OFFSETS.items():
            offset = small[name]
            if offset[0] != 0 or offset[-1] != self._tensors[target][1] or (np.diff(offset) < 0).any():
                raise self._refusal(f"{name}: must rise from 0 to the length of {target}", "other values")
        if n_scans and (longest := int(np.diff(small["name_offset"]).max())) > _MAX_NAME:
            raise self._refusal(f"names: must be at most {_MAX_NAME} bytes each", longest)
        wavelength = small["wavelength"]
        if not ((wavelength >= 0.0) & (wavelength < np.inf)).all():
            raise self._refusal("wavelength: must be finite and >= 0 Angstrom", "other values")
        return small

    def _read_header(self) -> dict[str, tuple[int, int]]:
        """Position in the file and length of every tensor."""
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise self._refusal("header: must be that of a safetensors file", f"a length of {length}")
        try:
            header = json.loads(self._file.read(length))
            metadata = header.get("__metadata__", {})
            found = metadata.get("format"), metadata.get("version")
            if found != (FORMAT, _VERSION):
                raise self._refusal(f"format: must be {FORMAT}, version {_VERSION}", found)
            tensors = {}
            for name, (kind, dtype) in _LAYOUT.items():
                ((n,), (begin, end)) = header[name]["shape"], header[name]["data_offsets"]
                whole = 0 <= begin <= end <= size - 8 - length and end - begin == n * np.dtype(dtype).itemsize
                if header[name]["dtype"] != kind or not whole:
                    raise self._refusal(f"{name}: must be {kind} inside the file", "another layout")
                tensors[name] = (8 + length + begin, n)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise self._refusal("header: must be that of packed scans", error) from error
        return tensors

    def _read(self, name: str, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        position, n = self._tensors[name]
        dtype = np.dtype(_LAYOUT[name][1])
        end = n if end is None else end
        self._file.seek(position + begin * dtype.itemsize)
        array = np.frombuffer(self._file.read((end - begin) * dtype.itemsize), dtype)
        if len(array) != end - begin:
            raise self._refusal("file: must be whole", "its beginning")
        return array

    def _refusal(self, rule: str, got: object) -> InputError:
        return InputError(f"{shown_path(self.path)}: {rule}, got {got}")


def _even_step(two_theta: NDArray[np.float64]) -> float:
    """The step of equally spaced angles; 0 for others."""
    n = len(two_theta)
    step = float(two_theta[-1] - two_theta[0]) / (n - 1)
    even = two_theta[0] + step * np.arange(n)
    return step if np.abs(two_theta - even).max() < _EVEN else 0.0


def _name_of(scan: Scan) -> str:
    return scan.path if scan.n_scans == 1 else f"{scan.path}#{scan.scan}"


def _assemble(path: Path, small: dict[str, list[float]], streamed: dict[str, Path]) -> None:
    arrays = {name: np.array(values, _LAYOUT[name][1]) for name, values in small.items()}
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": _VERSION}}
    position = 0
    for name, (kind, dtype) in _LAYOUT.items():
        size = streamed[name].stat().st_size if name in streamed else arrays[name].nbytes
        length = size // np.dtype(dtype).itemsize
        header[name] = {"dtype": kind, "shape": [length], "data_offsets": [position, position + size]}
        position += size
    from xrdfast.data.files import write_atomically  # needs torch, which processes that only read do without

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors: 8-byte length, JSON padded to 8 bytes, then the data
    with write_atomically(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in _LAYOUT:
            if name not in streamed:
                file.write(arrays[name].data)
                continue
            with open(streamed[name], "rb") as stream:
                while piece := stream.read(_COPY_BYTES):
                    file.write(piece)
