"""The pattern store: reflection families of many structures with their labels, in one mapped file.

A store keeps what a pattern is rendered from (families, lattice, rotations), not rendered patterns, so that
every epoch can strain the cells anew. Not for simulating (`xrdfast.data.generate`) or for atoms
(`xrdfast.data.structures`).

Tensors of `<name>.store.safetensors`, N patterns, F families, R rotations:

    family_offset (N + 1,) int64, hkl_multiplicity (F, 4) int16, f_squared (F,) float32,
    lattice (N, 3, 3) float64, rotation_offset (N + 1,) int64, rotations (R, 3, 3) int8, to_standard (N, 3, 3)
    float64, space_group_published / space_group_001 / space_group_01 (N,) int16, fold (N,) int8,
    strings: UTF-8 JSON of {"ids": [...], "formula": [...], "family": [...]} as bytes.

The file's metadata holds the format version, the settings of the simulation and a CRC-32 of each tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xrdfast.data.files import open_safetensors, write_atomically
from xrdfast.data.folds import N_FOLDS
from xrdfast.errors import InputError
from xrdfast.symmetry import N_SPACE_GROUPS

if TYPE_CHECKING:
    from xrdfast.data.structures import PackedStructures
    from xrdfast.ops.simulate import Families

FORMAT = "xrdfast-store"
VERSION = "1"

# Dtype and trailing shape of every tensor, in file order: wide items first keep all of them aligned.
_LAYOUT: dict[str, tuple[str, tuple[int, ...]]] = {
    "family_offset": ("I64", ()),
    "rotation_offset": ("I64", ()),
    "lattice": ("F64", (3, 3)),
    "to_standard": ("F64", (3, 3)),
    "hkl_multiplicity": ("I16", (4,)),  # rows of 8 bytes, on an 8-byte boundary: gathered as one int64 each
    "f_squared": ("F32", ()),
    "space_group_published": ("I16", ()),
    "space_group_001": ("I16", ()),
    "space_group_01": ("I16", ()),
    "fold": ("I8", ()),
    "rotations": ("I8", (3, 3)),
    "strings": ("U8", ()),
}
_NUMPY_TYPES = {"I64": "<i8", "F64": "<f8", "F32": "<f4", "I16": "<i2", "I8": "i1", "U8": "u1"}
_LARGE = ("hkl_multiplicity", "f_squared")  # streamed when written, left on disk when opened
_STRINGS = ("ids", "formula", "family")
_LABELS = ("space_group_published", "space_group_001", "space_group_01")
_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class SimulationConfig:
    """Settings the families of a store were simulated with.

    Attributes:
        wavelength: Angstrom; fixes the range of d (and the dispersion correction).
        two_theta_min, two_theta_max: degrees.
        margin: share by which the range of 1/d is widened, for strained cells.
        form_factors: "pymatgen" or "international".
        dispersion: whether f' + i f'' were added.
    """

    wavelength: float = 1.54056
    two_theta_min: float = 5.0
    two_theta_max: float = 90.0
    margin: float = 0.05
    form_factors: str = "pymatgen"
    dispersion: bool = False


@dataclass(frozen=True)
class FamilyBatch:
    """Families of B patterns, F families and R rotations in all, ragged by the two offsets."""

    offset: Tensor  # (B + 1,) int64
    hkl_multiplicity: Tensor  # (F, 4) int16
    f_squared: Tensor  # (F,) float32, electrons^2
    lattice: Tensor  # (B, 3, 3) float64, rows a, b, c, Angstrom
    rotation_offset: Tensor  # (B + 1,) int64
    rotations: Tensor  # (R, 3, 3) int8, W on fractional columns
    space_group_number: Tensor  # (B,) int64, 1..230, 0 where unknown

    @property
    def hkl(self) -> Tensor:
        """(F, 3), a view."""
        return self.hkl_multiplicity[:, :3]

    @property
    def multiplicity(self) -> Tensor:
        """(F,), a view."""
        return self.hkl_multiplicity[:, 3]

    def __len__(self) -> int:
        return len(self.lattice)


class StoreWriter:
    """Writes a store piece by piece; families go straight to disk, so memory holds only what is small.

    Use as a context manager: leaving it without an exception puts the finished file in place, leaving it with
    one keeps whatever stood there before.

    Args:
        path: of the store.
        simulation: the settings of every families object that will be appended.
        source: names of the files the structures came from, kept in the metadata.
    """

    def __init__(self, path: str | Path, simulation: SimulationConfig, source: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.simulation = simulation
        self.source = list(source)
        self._small: dict[str, list[np.ndarray]] = {
            name: []
            for name in _LAYOUT
            if name not in (*_LARGE, "strings", "family_offset", "rotation_offset")
        }
        self._family_counts: list[np.ndarray] = []
        self._rotation_counts: list[np.ndarray] = []
        self._strings: dict[str, list[str]] = {name: [] for name in _STRINGS}
        self._streams: dict[str, IO[bytes]] = {}
        self._crc = dict.fromkeys(_LARGE, 0)

    def __len__(self) -> int:
        return len(self._strings["ids"])

    def __enter__(self) -> StoreWriter:
        with self._refusals():
            for name in _LARGE:
                self._streams[name] = open(self._stream_path(name), "wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # The stack closes every stream, also where another has no space left.
            with self._refusals(), contextlib.ExitStack() as closing:
                for stream in self._streams.values():
                    closing.callback(stream.close)
            if kind is None:
                self._assemble()
        finally:
            for name in _LARGE:
                self._stream_path(name).unlink(missing_ok=True)

    def append(self, structures: PackedStructures, families: Families) -> None:
        """Adds structures and their families, one pattern each.

        Raises:
            ValueError: where the two do not have the same number of structures.
            InputError: where the disk is full.
        """
        if len(families.offset) != len(structures) + 1:
            raise ValueError(
                f"append: families must be of {len(structures)} structures, got {len(families.offset) - 1}"
            )
        columns = {
            "hkl_multiplicity": torch.cat([families.hkl, families.multiplicity[:, None]], dim=1),
            "f_squared": families.f_squared,
        }
        with self._refusals():
            for name, tensor in columns.items():
                raw = _bytes(_as_stored(name, tensor.numpy()))
                self._crc[name] = zlib.crc32(raw, self._crc[name])
                self._streams[name].write(raw)
        self._family_counts.append(np.diff(families.offset.numpy()))
        self._rotation_counts.append(np.diff(structures.rotation_offset.numpy()))
        for name, pieces in self._small.items():
            pieces.append(_as_stored(name, getattr(structures, name).numpy()))
        for name, texts in self._strings.items():
            texts.extend(getattr(structures, name))

    def _assemble(self) -> None:
        small = {name: np.concatenate([_empty(name), *pieces]) for name, pieces in self._small.items()}
        small["family_offset"] = _offsets(self._family_counts)
        small["rotation_offset"] = _offsets(self._rotation_counts)
        small["strings"] = np.frombuffer(json.dumps(self._strings).encode(), dtype=np.uint8)
        n_families = int(small["family_offset"][-1])
        crc, header, position = {}, {}, 0
        for name, (dtype, tail) in _LAYOUT.items():
            shape = [n_families, *tail] if name in _LARGE else list(small[name].shape)
            size = int(np.prod(shape)) * np.dtype(_NUMPY_TYPES[dtype]).itemsize
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            crc[name] = self._crc[name] if name in _LARGE else zlib.crc32(_bytes(small[name]))
            position += size
        header["__metadata__"] = {
            "format": FORMAT,
            "version": VERSION,
            "simulation": json.dumps(asdict(self.simulation)),
            "source": json.dumps(self.source),
            "crc32": json.dumps(crc),
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # safetensors: 8-byte length, JSON padded to 8 bytes, then the data
        with write_atomically(self.path) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in _LAYOUT:
                if name in _LARGE:
                    with open(self._stream_path(name), "rb") as stream:
                        while piece := stream.read(_COPY_BYTES):
                            file.write(piece)
                else:
                    file.write(_bytes(small[name]))

    def _stream_path(self, name: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{name}.{os.getpid()}.tmp")

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path}: store: must be writable, got {error.strerror or error}"
            ) from error


class PatternStore:
    """One store file, or several seen as one. Families stay on disk (memory map), the rest is in memory.

    Attributes:
        ids, formula, family: (N) lists of strings; `formula` is the reduced formula, `family` "" where none.
        space_group_published, space_group_001, space_group_01: (N,) int16, 0 where unknown.
        fold: (N,) int8, -1 where not assigned.
        lattice, to_standard: (N, 3, 3) float64.
        simulation: the settings shared by all files.
    """

    def __init__(self, files: Sequence[_StoreFile]) -> None:
        self.paths = [file.path for file in files]
        self.simulation = files[0].simulation
        for file in files[1:]:
            if file.simulation != self.simulation:
                raise InputError(
                    f"{file.path}: simulation: must equal that of {files[0].path.name}, got {file.simulation}"
                )
        self._files = files
        self.ids: list[str] = [text for file in files for text in file.strings["ids"]]
        self.formula: list[str] = [text for file in files for text in file.strings["formula"]]
        self.family: list[str] = [text for file in files for text in file.strings["family"]]
        self.lattice = self._joined("lattice")
        self.to_standard = self._joined("to_standard")
        self.fold = self._joined("fold")
        self.space_group_published = self._joined("space_group_published")
        self.space_group_001 = self._joined("space_group_001")
        self.space_group_01 = self._joined("space_group_01")
        self._rotations = self._joined("rotations").numpy()
        self._rotation_offset = _offsets([np.diff(file.tensors["rotation_offset"].numpy()) for file in files])
        offsets = [file.tensors["family_offset"].numpy() for file in files]
        self._begin = np.concatenate([offset[:-1] for offset in offsets])
        self._end = np.concatenate([offset[1:] for offset in offsets])
        self._file_of = np.repeat(np.arange(len(files)), [len(offset) - 1 for offset in offsets])
        # hkl and multiplicity are 8 bytes a row: one int64 a row makes slices and copies plain 1-D.
        self._hkl_multiplicity = [
            file.tensors["hkl_multiplicity"].numpy().view(np.int64)[:, 0] for file in files
        ]
        self._f_squared = [file.tensors["f_squared"].numpy() for file in files]

    @classmethod
    def open(cls, paths: str | Path | Sequence[str | Path]) -> PatternStore:
        """Opens one store or several of equal simulation settings.

        Everything small is read and checked against its checksum; families are mapped, and `verify` checks them:
        training, evaluation and libraries do so first.

        Raises:
            InputError: for a file that is missing, cut short, of another kind or version, or inconsistent.
        """
        if isinstance(paths, (str, Path)):
            paths = [paths]
        if not paths:
            raise ValueError("open: paths must be at least one store, got none")
        seen: set[str] = set()
        for path in paths:
            if (place := os.path.realpath(path)) in seen:
                raise InputError(f"{path}: stores: must each be given once, got it twice")
            seen.add(place)
        return cls([_StoreFile(Path(path)) for path in paths])

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_families(self) -> Tensor:
        """Families of each pattern, (N,) int64."""
        return torch.from_numpy(self._end - self._begin)

    def verify(self) -> None:
        """Reads every family once and compares checksums.

        Raises:
            InputError: naming the file and tensor that changed since it was written.
        """
        for file in self._files:
            file.verify(_LARGE)

    def gather(self, indices: Tensor) -> FamilyBatch:
        """Families, lattices, rotations and labels (`space_group_01`) of patterns, in the order given.

        Args:
            indices: (n_patterns,) integers in 0..N-1, repeats allowed.

        Raises:
            ValueError: for an index outside the store.
        """
        rows = indices.numpy()
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise ValueError(f"gather: indices must be 1-D integers, got {tuple(rows.shape)} {rows.dtype}")
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise ValueError(f"gather: indices must be in 0..{len(self) - 1}, got {rows.min()}..{rows.max()}")
        begin, end = self._begin[rows], self._end[rows]
        spans = list(zip(self._file_of[rows].tolist(), begin.tolist(), end.tolist(), strict=True))
        packed = _concatenated([self._hkl_multiplicity[f][a:b] for f, a, b in spans], np.int64)
        f_squared = _concatenated([self._f_squared[f][a:b] for f, a, b in spans], np.float32)
        first, last = self._rotation_offset[rows], self._rotation_offset[rows + 1]
        turns = [self._rotations[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        rotations = np.concatenate([self._rotations[:0], *turns])
        return FamilyBatch(
            offset=torch.from_numpy(_offsets([end - begin])),
            hkl_multiplicity=torch.from_numpy(packed.view(np.int16).reshape(-1, 4)),
            f_squared=torch.from_numpy(f_squared),
            lattice=self.lattice[indices],
            rotation_offset=torch.from_numpy(_offsets([last - first])),
            rotations=torch.from_numpy(rotations),
            space_group_number=self.space_group_01[indices].long(),
        )

    def select(self, folds: Collection[int] | None = None, *, clean: bool = True) -> Tensor:
        """Indices of the labelled patterns of some folds, ascending, (n,) int64.

        Args:
            folds: fold numbers, or None for all patterns.
            clean: keep only patterns whose group is the same at both tolerances (0.01 and 0.1 Angstrom).
        """
        keep = self.space_group_01 > 0
        if clean:
            keep &= self.space_group_01 == self.space_group_001
        if folds is not None:
            keep &= torch.isin(self.fold, torch.tensor(sorted(folds), dtype=self.fold.dtype))
        return torch.nonzero(keep).squeeze(1)

    def split(self, validation_folds: Collection[int], *, clean: bool = True) -> tuple[Tensor, Tensor]:
        """Training and validation indices: the patterns outside and inside the given folds.

        Raises:
            InputError: where patterns have no fold, or a formula or family lies on both sides (stores whose folds
                were not assigned together).
        """
        selected = self.select(clean=clean)
        fold = self.fold[selected]
        if bool((fold < 0).any()):
            first = self.ids[int(selected[fold < 0][0])]
            raise InputError(f"{self._names()}: fold: must be assigned for a split, got -1 for {first}")
        held_out = torch.isin(fold, torch.tensor(sorted(validation_folds), dtype=fold.dtype))
        training, validation = selected[~held_out], selected[held_out]
        families = [key.casefold() for key in self.family]
        for kind, names in (("formulas", self.formula), ("families", families)):
            shared = {names[i] for i in training.tolist()} & {names[i] for i in validation.tolist()} - {""}
            if shared:
                raise InputError(
                    f"{self._names()}: fold: must be one for equal {kind} (simulate into one store), "
                    f"got two for {min(shared)}"
                )
        return training, validation

    def group_counts(self, indices: Tensor | None = None) -> Tensor:
        """Patterns of each space group, (230,) int64; entry 0 is group 1. Unlabelled ones do not count."""
        number = self.space_group_01 if indices is None else self.space_group_01[indices]
        return torch.bincount(number.long(), minlength=N_SPACE_GROUPS + 1)[1:]

    def _joined(self, name: str) -> Tensor:
        return torch.cat([file.tensors[name] for file in self._files])

    def _names(self) -> str:
        return ", ".join(path.name for path in self.paths)


class _StoreFile:
    """One checked store file: tensors by name (large ones mapped), strings, settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata, self.tensors = self._mapped()
        if metadata.get("version") != VERSION:
            raise InputError(f"{path}: version: must be {VERSION}, got {metadata.get('version')}")
        try:
            self.simulation = SimulationConfig(**json.loads(metadata["simulation"]))
            self._crc: dict[str, int] = json.loads(metadata["crc32"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: metadata: must describe the simulation and checksums, got {error}"
            ) from error
        self._check_shapes()
        self.verify([name for name in _LAYOUT if name not in _LARGE])
        self.strings = self._read_strings()
        self._check_values()

    def _mapped(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        with open_safetensors(self.path, FORMAT) as (file, metadata):
            names = set(file.keys())
            return metadata, {name: file.get_tensor(name) for name in _LAYOUT if name in names}

    def _check_shapes(self) -> None:
        rows = {name: len(tensor) for name, tensor in self.tensors.items() if tensor.dim()}
        n_patterns, n_families = rows.get("fold", 0), rows.get("f_squared", 0)
        expected = dict.fromkeys(_LAYOUT, n_patterns)
        expected |= {"family_offset": n_patterns + 1, "rotation_offset": n_patterns + 1}
        expected |= {"hkl_multiplicity": n_families, "f_squared": n_families}
        expected |= {name: rows.get(name, 0) for name in ("rotations", "strings")}
        for name, (dtype, tail) in _LAYOUT.items():
            wanted = ((expected[name], *tail), np.dtype(_NUMPY_TYPES[dtype]).name)
            tensor = self.tensors.get(name)
            got = None if tensor is None else (tuple(tensor.shape), tensor.numpy().dtype.name)
            if got != wanted:
                raise InputError(f"{self.path}: {name}: must be {wanted[0]} {wanted[1]}, got {got}")

    def _check_values(self) -> None:
        tensors = self.tensors
        for name, rows in (("family_offset", "f_squared"), ("rotation_offset", "rotations")):
            offset, end = tensors[name], len(tensors[rows])
            if int(offset[0]) != 0 or int(offset[-1]) != end or bool((offset.diff() < 0).any()):
                raise InputError(
                    f"{self.path}: {name}: must rise from 0 to {end}, got {offset[:3].tolist()} ..."
                )
        for name, low, high in (
            *((label, 0, N_SPACE_GROUPS) for label in _LABELS),
            ("fold", -1, N_FOLDS - 1),
        ):
            values = tensors[name]
            if bool(((values < low) | (values > high)).any()):
                span = f"{int(values.min())}..{int(values.max())}"
                raise InputError(f"{self.path}: {name}: must be in {low}..{high}, got {span}")
        if not bool(torch.isfinite(tensors["lattice"]).all()):
            raise InputError(f"{self.path}: lattice: must be finite, got NaN or infinity")

    def _read_strings(self) -> dict[str, list[str]]:
        n_patterns = len(self.tensors["fold"])
        try:
            strings: dict[str, Any] = json.loads(self.tensors["strings"].numpy().tobytes())
            lengths = {name: len(strings[name]) for name in _STRINGS}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path}: strings: must be JSON lists of ids, formula, family, got {error}"
            ) from error
        if set(lengths.values()) != {n_patterns}:
            raise InputError(f"{self.path}: strings: must be {n_patterns} of each, got {lengths}")
        return strings

    def verify(self, names: Sequence[str]) -> None:
        for name in names:
            crc = zlib.crc32(_bytes(self.tensors[name].numpy()))
            if crc != self._crc.get(name):
                raise InputError(
                    f"{self.path}: {name}: must match its checksum {self._crc.get(name)}, got {crc}"
                )


def _as_stored(name: str, values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=_NUMPY_TYPES[_LAYOUT[name][0]])


def _bytes(values: np.ndarray) -> np.ndarray:
    """The same memory as (n_bytes,) uint8; an empty array has no memoryview of bytes."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _empty(name: str) -> np.ndarray:
    dtype, tail = _LAYOUT[name]
    return np.zeros((0, *tail), dtype=_NUMPY_TYPES[dtype])


def _offsets(counts: Sequence[np.ndarray]) -> np.ndarray:
    """Starts and end of consecutive runs, (N + 1,) int64, from pieces of their lengths."""
    offset = np.zeros(sum(len(piece) for piece in counts) + 1, dtype=np.int64)
    if counts:
        np.cumsum(np.concatenate(counts), out=offset[1:])
    return offset


def _concatenated(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=dtype)
