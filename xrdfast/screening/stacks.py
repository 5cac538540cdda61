"""Stacks of scans in HDF5 and NPZ files, read row by row; hostile ones are refused, nothing is unpickled.

Layout of both: `intensity` (n_scans, n_points), numbers; `two_theta` (n_points,) or (n_scans, n_points), degrees;
perhaps `wavelength`, one number or (n_scans,), Angstrom (in HDF5 also an attribute of the file).
"""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xrdfast.bragg import Radiation, radiation_of
from xrdfast.data.formats.bounded import MAX_BYTES, open_zip
from xrdfast.data.scans import MAX_POINTS, Scan, scan_of_points
from xrdfast.errors import InputError, shown_path

if TYPE_CHECKING:
    import h5py

_NAMES = ("intensity", "two_theta", "wavelength")
_MAX_VALUES = MAX_BYTES // 8  # that are read at once: of one axis, or of wavelengths
_MAX_RATIO = 1100  # deflate packs 1,032 to 1 at most
_BOMB = 200  # to 1, of more than 64 MB: no measured counts pack like that
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError)


class _Stack:
    """What both have in common: checks of the layout, and a scan by index."""

    def __init__(self, path: str) -> None:
        self.path = path
        if not os.path.isfile(path):
            raise self._refusal("file: must be a regular file that is there, got none")
        try:
            self._open()
            self._check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.shapes["intensity"][0]

    def name(self, index: int) -> str:
        """Stacks name no scans."""
        return ""

    def scan(self, index: int, given: Radiation | None = None) -> Scan:
        """One scan.

        Args:
            index: 0..len - 1.
            given: radiation for a stack that states none.

        Raises:
            InputError: for points that break the rules of a scan.
        """
        two_theta = self._row("two_theta", index) if len(self.shapes["two_theta"]) == 2 else self._axis
        stated = None
        if self._wavelength is not None:
            value = float(self._wavelength[index if len(self._wavelength) > 1 else 0])
            try:
                stated = radiation_of(value)
            except ValueError as error:
                raise InputError(f"wavelength: must be finite and > 0 Angstrom, got {value:g}") from error
        return scan_of_points(
            two_theta,
            self._row("intensity", index),
            path=self.path,
            stated=stated,
            given=given,
            format=self.format,
            scan=index,
            n_scans=len(self),
        )

    def _check(self) -> None:
        shapes = self.shapes
        for name in ("intensity", "two_theta"):
            if name not in shapes:
                raise self._refusal(f"{name}: must be there, got {', '.join(map(repr, shapes)) or 'nothing'}")
        if (
            len(shapes["intensity"]) != 2
            or shapes["intensity"][0] < 0
            or not 2 <= shapes["intensity"][1] <= MAX_POINTS
        ):
            raise self._refusal(
                f"intensity: must be (n_scans, n_points), n_points in 2..{MAX_POINTS}, got {shapes['intensity']}"
            )
        if shapes["two_theta"] not in (shapes["intensity"][1:], shapes["intensity"]):
            raise self._refusal(f"two_theta: must be (n_points,) or as intensity, got {shapes['two_theta']}")
        if shapes.get("wavelength", ()) not in ((), (1,), shapes["intensity"][:1]):
            raise self._refusal(f"wavelength: must be one or (n_scans,), got {shapes['wavelength']}")
        self._wavelength = self._whole("wavelength") if "wavelength" in shapes else self._stated()
        if len(shapes["two_theta"]) == 1:
            self._axis = self._whole("two_theta")

    def _stated(self) -> NDArray[np.float64] | None:
        return None

    def _refusal(self, message: str) -> InputError:
        return InputError(f"{shown_path(self.path)}: {message}")


class Hdf5Stack(_Stack):
    """A stack in an HDF5 file. Links to other files and storage outside the file are not followed."""

    format = "HDF5 stack"

    def _open(self) -> None:
        import h5py

        try:
            # A cache that holds any chunk: chunks across many scans would be unpacked again for each of them.
            self._file = h5py.File(self.path, "r", locking=False, rdcc_nbytes=MAX_BYTES)
            self._data: dict[str, h5py.Dataset] = {}
            for name in _NAMES:
                if isinstance(self._file.get(name, getlink=True), h5py.HardLink):
                    dataset = self._file[name]
                    if isinstance(dataset, h5py.Dataset):
                        self._data[name] = self._checked(name, dataset)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise self._refusal(f"file: must be a whole HDF5 file, got {error}") from error
        self.shapes = {name: dataset.shape for name, dataset in self._data.items()}

    def _checked(self, name: str, dataset: h5py.Dataset) -> h5py.Dataset:
        if dataset.dtype.kind not in "fiu":
            raise self._refusal(f"{name}: must be of numbers, got {dataset.dtype}")
        if dataset.is_virtual or dataset.external:
            raise self._refusal(f"{name}: must be stored in the file, got one stored elsewhere")
        piece = int(np.prod(dataset.chunks or (1,), dtype=object)) * dataset.dtype.itemsize
        if piece > MAX_BYTES:
            raise self._refusal(f"{name}: chunks must be of at most {MAX_BYTES} bytes, got {piece}")
        stored, declared = dataset.id.get_storage_size(), dataset.size * dataset.dtype.itemsize
        if declared > _MAX_RATIO * stored:
            raise self._refusal(f"{name}: must be stored in full, got {stored} bytes for {declared}")
        return dataset

    def _stated(self) -> NDArray[np.float64] | None:
        try:
            return (
                np.array([float(self._file.attrs["wavelength"])])
                if "wavelength" in self._file.attrs
                else None
            )
        except (TypeError, ValueError, OSError) as error:
            raise self._refusal(f"wavelength: must be a number, got {error}") from error

    def _whole(self, name: str) -> NDArray[np.float64]:
        if self._data[name].size > _MAX_VALUES:
            raise self._refusal(
                f"{name}: must have at most {_MAX_VALUES} values, got {self._data[name].size}"
            )
        return np.atleast_1d(np.asarray(self._data[name][()], np.float64))

    def _row(self, name: str, index: int) -> NDArray[np.float64]:
        try:
            return np.asarray(self._data[name][index], np.float64)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{name}: must be readable, got {error}") from error

    def close(self) -> None:
        """Closes the file."""
        if hasattr(self, "_file"):
            self._file.close()


class NpzStack(_Stack):
    """A stack in a NumPy archive, stored or deflated, in C order. Rows are read one after another."""

    format = "NPZ stack"

    def _open(self) -> None:
        self._streams: dict[str, Any] = {}
        self._next: dict[str, int] = {}
        self._types: dict[str, np.dtype[Any]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 (closed by `close`)
            try:
                self._archive = open_zip(self._file)
            except InputError as error:
                raise self._refusal(str(error)) from error
            members = {info.filename: info for info in self._archive.infolist()}
            for name in _NAMES:
                if (info := members.get(f"{name}.npy")) is None:
                    continue
                if info.file_size > MAX_BYTES and info.file_size > _BOMB * info.compress_size:
                    raise self._refusal(
                        f"{name}: must be measured, got {info.file_size} bytes of next to nothing"
                    )
                self._rewind(name)
                if (
                    int(np.prod(self.shapes[name], dtype=object)) * self._types[name].itemsize
                    > info.file_size
                ):
                    raise self._refusal(f"{name}: must be whole, got {info.file_size} bytes")
        except InputError:
            raise
        except _ZIP_ERRORS as error:
            raise self._refusal(f"file: must be a whole NumPy archive, got {error}") from error

    def _rewind(self, name: str) -> None:
        stream = self._archive.open(f"{name}.npy")
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise self._refusal(f"{name}: must be of format 1 or 2, got {version}")
        if int.from_bytes(stream.peek(4)[: 2 * version[0]], "little") > 10_000:
            raise self._refusal(f"{name}: header: must be at most 10000 bytes, got more")
        read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.kind not in "fiu" or (fortran and len(shape) > 1):
            raise self._refusal(
                f"{name}: must be numbers in C order, got {dtype}{' in Fortran order' * fortran}"
            )
        self._streams[name], self._next[name] = stream, 0
        self.shapes[name], self._types[name] = shape, dtype

    def _whole(self, name: str) -> NDArray[np.float64]:
        n = int(np.prod(self.shapes[name], dtype=object))
        if n > _MAX_VALUES:
            raise self._refusal(f"{name}: must have at most {_MAX_VALUES} values, got {n}")
        return self._values(name, n)

    def _row(self, name: str, index: int) -> NDArray[np.float64]:
        n = self.shapes[name][1]
        try:
            if index < self._next[name]:
                self._rewind(name)
            for _ in range(self._next[name], index):
                self._streams[name].read(n * self._types[name].itemsize)
            self._next[name] = index + 1
            return self._values(name, n)
        except _ZIP_ERRORS as error:
            raise InputError(f"{name}: must be whole, got {error}") from error

    def _values(self, name: str, n: int) -> NDArray[np.float64]:
        values = np.frombuffer(self._streams[name].read(n * self._types[name].itemsize), self._types[name])
        if len(values) != n:
            raise InputError(f"{name}: must be whole, got its beginning")
        return values.astype(np.float64)

    def close(self) -> None:
        """Closes the file."""
        if hasattr(self, "_archive"):
            self._archive.close()
        if hasattr(self, "_file"):
            self._file.close()
