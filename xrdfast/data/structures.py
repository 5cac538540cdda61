"""Crystal structures in packed arrays: reading, checking, joining, keeping and labelling them.

Readers of CIF text are in `xrdfast.data.cif`; simulation is in `xrdfast.ops.simulate`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xrdfast.data.files import load_checked, save_checked
from xrdfast.data.labels import Cell, find_symmetries
from xrdfast.errors import InputError, shown_path
from xrdfast.ops.reflections import MAX_ROTATIONS
from xrdfast.scattering import N_ELEMENTS, element_symbols

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure

FORMAT = "xrdfast structures"
MAX_ATOMIC_NUMBER = 98  # Cf: the last element of both form-factor tables
_MIN_VOLUME = 1.0  # Angstrom^3; no atom fits into less
_MAX_OCCUPANCY = 1.1  # refinements overshoot: up to 1.08 in the mineral database

_PER_STRUCTURE = {
    "lattice": ((3, 3), torch.float64),
    "fold": ((), torch.int8),
    "space_group_published": ((), torch.int16),
    "space_group_001": ((), torch.int16),
    "space_group_01": ((), torch.int16),
    "to_standard": ((3, 3), torch.float64),
}
_PER_ATOM = {
    "atomic_number": ((), torch.uint8),
    "fractional": ((3,), torch.float64),
    "occupancy": ((), torch.float64),
    "b_iso": ((), torch.float64),
}
_STRINGS = ("ids", "formula", "family")
_FIELDS = {*_PER_STRUCTURE, *_PER_ATOM, *_STRINGS, "offset", "rotation_offset", "rotations"}


class Rejected(NamedTuple):
    """A structure that was left out, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class PackedStructures:
    """N crystal structures with M atoms and R rotations in all; every atom of a cell is listed.

    Indexing with an int, slice, or 1-D index array gives the chosen structures as another `PackedStructures`.
    """

    offset: Tensor  # (N + 1,) int64, first atom of each structure
    lattice: Tensor  # (N, 3, 3) float64, rows a, b, c, Angstrom
    atomic_number: Tensor  # (M,) uint8
    fractional: Tensor  # (M, 3) float64
    occupancy: Tensor  # (M,) float64, 0..1 (refined values may pass 1 a little)
    b_iso: Tensor  # (M,) float64, Angstrom^2, B = 8 pi^2 U; 0 where the source gives none
    ids: list[str]
    formula: list[str]  # reduced, elements by atomic number
    family: list[str]  # key of relatives that a split keeps together; "" where none
    fold: Tensor  # (N,) int8, 0..9, -1 where none
    space_group_published: Tensor  # (N,) int16, as the source states it; 0 where it does not
    space_group_001: Tensor  # (N,) int16, spglib's at symprec 0.01; 0 where not known
    space_group_01: Tensor  # (N,) int16, at symprec 0.1: the label
    rotation_offset: Tensor  # (N + 1,) int64
    rotations: Tensor  # (R, 3, 3) int8, W on fractional columns, hkl' = hkl W; none where not known
    to_standard: Tensor  # (N, 3, 3) float64, x_standard = P x + p; NaN where not known

    def __len__(self) -> int:
        return len(self.lattice)

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray | Tensor) -> PackedStructures:
        if isinstance(index, int | np.integer):
            index = int(index)
            if not -len(self) <= index < len(self):
                raise IndexError(f"structure index must be in 0..{len(self) - 1}, got {index}")
            index %= len(self)
            return self._window(index, index + 1)
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if step == 1:
                return self._window(begin, max(begin, end))
            index = range(begin, end, step)
        rows = torch.as_tensor(index if len(index) else np.zeros(0, dtype=np.int64))
        if rows.dtype == torch.bool and rows.shape == (len(self),):
            rows = rows.nonzero()[:, 0]
        if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            got = f"{tuple(rows.shape)} {rows.dtype}"
            raise IndexError(f"structure indices must be 1-D integers, or as many truth values, got {got}")
        rows = torch.where(rows < 0, rows.long() + len(self), rows.long())
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(
                f"structure indices must be in 0..{len(self) - 1}, got {int(rows.max())} among them"
            )
        atoms, offset = _ragged_rows(self.offset, rows)
        operators, rotation_offset = _ragged_rows(self.rotation_offset, rows)
        chosen = rows.tolist()
        return PackedStructures(
            offset=offset,
            rotation_offset=rotation_offset,
            rotations=self.rotations[operators],
            **{name: getattr(self, name)[atoms] for name in _PER_ATOM},
            **{name: getattr(self, name)[rows] for name in _PER_STRUCTURE},
            **{name: [getattr(self, name)[i] for i in chosen] for name in _STRINGS},
        )

    def _window(self, begin: int, end: int) -> PackedStructures:
        """Structures begin..end, unchecked; a view is cut when asked for: all 15 would cost a simulation."""
        window = object.__new__(PackedStructures)
        window.__dict__["_source"] = (self, begin, end)
        return window

    def __getattr__(self, name: str) -> Tensor | list[str]:
        if "_source" not in self.__dict__ or name not in _FIELDS:
            raise AttributeError(f"PackedStructures has no attribute {name!r}")
        source, begin, end = self.__dict__["_source"]
        fields = self.__dict__
        if name in ("offset", "rotation_offset"):
            bounds = getattr(source, name)[begin : end + 1]
            fields[name] = bounds - bounds[0]
        elif name == "rotations":
            fields[name] = source.rotations[source.rotation_offset[begin] : source.rotation_offset[end]]
        elif name in _PER_ATOM:
            first, last = int(source.offset[begin]), int(source.offset[end])
            fields.update({key: getattr(source, key)[first:last] for key in _PER_ATOM})
        else:
            fields[name] = getattr(source, name)[begin:end]
        return fields[name]

    def __iter__(self) -> Iterator[PackedStructures]:
        return (self._window(i, i + 1) for i in range(len(self)))

    def to(self, device: str | torch.device) -> PackedStructures:
        """The same structures with every tensor on a device."""
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return PackedStructures(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})

    @staticmethod
    def concatenate(parts: Sequence[PackedStructures]) -> PackedStructures:
        """Structures of all parts, in order.

        Raises:
            ValueError: for no part.
        """
        if not parts:
            raise ValueError("concatenate: parts must be at least one, got none")
        return PackedStructures(
            offset=_joined_offsets([p.offset for p in parts]),
            rotation_offset=_joined_offsets([p.rotation_offset for p in parts]),
            rotations=torch.cat([p.rotations for p in parts]),
            **{name: torch.cat([getattr(p, name) for p in parts]) for name in (*_PER_ATOM, *_PER_STRUCTURE)},
            **{name: [text for p in parts for text in getattr(p, name)] for name in _STRINGS},
        )

    def faults(self) -> dict[int, str]:
        """Structures that cannot be simulated, by row, each with the rule it breaks: field, rule, value."""
        counts, number, share = self.offset.diff(), self.atomic_number.long(), self.occupancy
        structure = torch.repeat_interleave(torch.arange(len(self)), counts)
        volume = torch.linalg.det(torch.nan_to_num(self.lattice)).abs()
        lattice_bad = ~torch.isfinite(self.lattice).all(2).all(1) | (volume < _MIN_VOLUME)
        atom_rules = [
            (~(self.fractional.abs() < 1000.0).all(1), "fractional: must be finite, below 1000"),
            (
                (number < 1) | (number > MAX_ATOMIC_NUMBER),
                f"atomic_number: must be in 1..{MAX_ATOMIC_NUMBER}",
            ),
            (~((share >= 0) & (share <= _MAX_OCCUPANCY)), f"occupancy: must be in 0..{_MAX_OCCUPANCY}"),
            (~(self.b_iso.abs() < 1000.0), "b_iso: must be finite, below 1000 Angstrom^2"),
        ]
        rules = [(structure[bad].unique(), rule) for bad, rule in atom_rules]
        lattice_rule = f"lattice: must be finite with a volume of at least {_MIN_VOLUME} Angstrom^3"
        rules.append(((counts == 0).nonzero()[:, 0], "atoms: must be at least one"))
        rules.append((lattice_bad.nonzero()[:, 0], lattice_rule))
        return {row: rule for rows, rule in rules for row in rows.tolist()}

    def save(self, path: str | Path) -> None:
        """Writes a checked safetensors file, whole or not at all.

        Raises:
            InputError: where it cannot be written.
        """
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _STRINGS}
        text = json.dumps({name: getattr(self, name) for name in _STRINGS}).encode()
        tensors["strings"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        save_checked(Path(path), tensors, {"format": FORMAT, "version": "1"})

    @staticmethod
    def load(path: str | Path) -> PackedStructures:
        """Reads what `save` wrote.

        Raises:
            InputError: for a file that is not such a file, cut short, or changed.
        """
        path = Path(path)
        tensors, _ = load_checked(path, FORMAT)
        try:
            strings = json.loads(tensors.pop("strings").numpy().tobytes())
            fields = {name: [str(text) for text in strings[name]] for name in _STRINGS} | tensors
            structures = PackedStructures(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: fields: must be those of PackedStructures, got {error}") from error
        check_packed(path, structures)
        return structures


def load_structures(
    paths: str | Path | Iterable[str | Path], *, progress: Callable[[int, int], None] | None = None
) -> tuple[PackedStructures, list[Rejected]]:
    """Structures of files and folders: .cif, packed .npz and packed .safetensors.

    Folders are searched for .cif and .npz, recursively, in sorted order, without following links to folders;
    structures of a CIF are called by its place in the folder.

    Args:
        paths: one path or several.
        progress: called with (files done, files in all).

    Returns:
        The structures, and those left out with the reason; one bad structure or CIF never stops the rest.

    Raises:
        InputError: for a path that does not exist, a packed file that is damaged, or no structure at all.
    """
    from xrdfast.data.cif import read_cif
    from xrdfast.data.packed_npz import read_npz

    files = list(_structure_files([paths] if isinstance(paths, str | Path) else paths))
    if not files:
        raise InputError("structures: paths: must be at least one, got none")
    parts, rejected = [], []
    for done, (file, name) in enumerate(files, 1):
        refused: list[Rejected] = []
        if file.suffix.lower() == ".npz":
            part = read_npz(file)
        elif file.suffix.lower() == ".safetensors":
            part = PackedStructures.load(file)
        else:
            try:
                part, refused = read_cif(file, name)
            except InputError as error:
                part = from_arrays([], [], [])
                refused = [Rejected(name, str(error).removeprefix(f"{file}: "))]
        faults = part.faults()
        rejected += [*refused, *(Rejected(part.ids[row], reason) for row, reason in sorted(faults.items()))]
        if faults:
            part = part[[i for i in range(len(part)) if i not in faults]]
        parts.append(part)
        if progress:
            progress(done, len(files))
    structures = PackedStructures.concatenate(parts)
    if len(structures) == 0:
        reason = f"; the first reason: {rejected[0].id}: {rejected[0].reason}" if rejected else ""
        raise InputError(f"{files[0][0]}: structures: must be at least one, got none{reason}")
    return structures, rejected


def from_arrays(
    lattices: Sequence[np.ndarray],
    atoms: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    ids: Sequence[str],
    *,
    family: Sequence[str] | None = None,
    space_group_published: Sequence[int] | None = None,
) -> PackedStructures:
    """Packs structures given one by one, without labels.

    Args:
        lattices: (3, 3) each, rows in Angstrom.
        atoms: for each, atomic numbers (n,), fractional (n, 3), occupancy (n,), B_iso (n,) in Angstrom^2.
        ids: names.
        family: keys of relatives; None for none.
        space_group_published: stated numbers; None for none.

    Raises:
        ValueError: for an atomic number outside 0..255, or lengths that differ.
    """
    n = len(lattices)
    for name, rows in (("atoms", atoms), ("ids", ids), ("family", family)):
        if rows is not None and len(rows) != n:
            raise ValueError(f"from_arrays: {name} must have {n} rows as lattices, got {len(rows)}")
    counts = [len(a[0]) for a in atoms]
    columns = [
        np.concatenate([np.zeros(0), *(np.asarray(a[i], np.float64) for a in atoms)]) for i in (0, 2, 3)
    ]
    places = [np.asarray(a[1], dtype=np.float64).reshape(-1, 3) for a in atoms]
    fractional = np.concatenate([np.zeros((0, 3)), *places])
    if not ((columns[0] >= 0) & (columns[0] <= 255)).all():
        raise ValueError(
            f"from_arrays: atomic numbers must be in 0..255, got {columns[0].max():g} among them"
        )
    return PackedStructures(
        offset=torch.tensor(np.concatenate([[0], np.cumsum(counts)]), dtype=torch.int64),
        lattice=torch.tensor(np.array(lattices, dtype=np.float64).reshape(n, 3, 3)),
        atomic_number=torch.tensor(np.asarray(columns[0]), dtype=torch.uint8),
        fractional=torch.tensor(fractional),
        occupancy=torch.tensor(np.asarray(columns[1]), dtype=torch.float64),
        b_iso=torch.tensor(np.asarray(columns[2]), dtype=torch.float64),
        ids=list(ids),
        formula=[reduced_formula(a[0], a[2]) for a in atoms],
        family=list(family) if family is not None else [""] * n,
        fold=torch.full((n,), -1, dtype=torch.int8),
        space_group_published=torch.tensor(list(space_group_published or [0] * n), dtype=torch.int16),
        space_group_001=torch.zeros(n, dtype=torch.int16),
        space_group_01=torch.zeros(n, dtype=torch.int16),
        rotation_offset=torch.zeros(n + 1, dtype=torch.int64),
        rotations=torch.zeros((0, 3, 3), dtype=torch.int8),
        to_standard=torch.full((n, 3, 3), math.nan, dtype=torch.float64),
    )


def from_pymatgen(structures: Sequence[Structure], ids: Sequence[str] | None = None) -> PackedStructures:
    """Packs pymatgen structures; mixed sites become several rows at one place.

    Raises:
        TypeError: for anything but several Structures.
        ValueError: for a species that is no element, or another number of ids.
    """
    from pymatgen.core import IStructure

    if isinstance(structures, IStructure) or not all(isinstance(one, IStructure) for one in structures):
        raise TypeError("from_pymatgen: structures must be a list of Structures, got something else")
    atoms = []
    for structure in structures:
        rows = []
        for site in structure:
            for species, share in site.species.items():
                number = getattr(species, "Z", None)
                if not isinstance(number, int) or not 1 <= number < N_ELEMENTS:
                    raise ValueError(f"from_pymatgen: species must be an element, got {species}")
                rows.append((number, site.frac_coords, share))
        z, fractional, occupancy = zip(*rows, strict=True) if rows else ((), (), ())
        atoms.append((np.array(z), np.array(fractional), np.array(occupancy), np.zeros(len(z))))
    names = list(ids) if ids is not None else [f"structure-{i}" for i in range(len(atoms))]
    return from_arrays([s.lattice.matrix for s in structures], atoms, names)


def to_pymatgen(structure: PackedStructures) -> Structure:
    """The first of the packed structures as a pymatgen Structure; rows at one place become one mixed site."""
    from pymatgen.core import Element, Lattice, Structure

    one = structure._window(0, 1)
    content: dict[tuple[float, ...], dict[str, float]] = {}
    rows = zip(one.atomic_number.tolist(), one.fractional.tolist(), one.occupancy.tolist(), strict=True)
    for number, place, share in rows:
        site = content.setdefault(tuple(place), {})
        symbol = Element.from_Z(number).symbol
        site[symbol] = site.get(symbol, 0.0) + share
    return Structure(Lattice(one.lattice[0].numpy()), list(content.values()), list(content))


def from_ase(atoms: Sequence[Atoms], ids: Sequence[str] | None = None) -> PackedStructures:
    """Packs ASE Atoms with full occupancy.

    Raises:
        TypeError: for anything but several Atoms.
        ValueError: for another number of ids.
    """
    from ase import Atoms

    if isinstance(atoms, Atoms) or not all(isinstance(one, Atoms) for one in atoms):
        raise TypeError("from_ase: atoms must be a list of Atoms, got something else")
    parts = [(a.numbers, a.get_scaled_positions(wrap=True), np.ones(len(a)), np.zeros(len(a))) for a in atoms]
    names = list(ids) if ids is not None else [f"structure-{i}" for i in range(len(parts))]
    return from_arrays([np.asarray(a.cell) for a in atoms], parts, names)


def analyse_symmetry(
    structures: PackedStructures,
    symprec: tuple[float, float] = (0.01, 0.1),
    *,
    n_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PackedStructures:
    """Fills in labels, rotations and standardising transformations with spglib.

    Labels that are given are kept, and then one search, at the second tolerance, is made.

    Args:
        structures: N structures.
        symprec: tolerances in Angstrom of `space_group_001` and `space_group_01`.
        n_workers: processes; None for one a core.
        progress: called with (structures done, N).

    Returns:
        The structures with these fields set; where spglib finds nothing, labels stay 0, without rotations.
    """
    bounds = structures.offset.tolist()
    lattice, fractional = structures.lattice.numpy(), structures.fractional.numpy()
    number, occupancy = structures.atomic_number.numpy().astype(np.int64), structures.occupancy.numpy()
    cells = [
        Cell(lattice[i], fractional[a:b], number[a:b], occupancy[a:b])
        for i, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    given = bool((structures.space_group_001 > 0).all() and (structures.space_group_01 > 0).all())
    found = find_symmetries(cells, symprec[1:] if given else symprec, n_workers=n_workers, progress=progress)
    labels = {}
    if not given:
        for name, column in (("space_group_001", 0), ("space_group_01", 1)):
            fresh = torch.tensor([s.numbers[column] for s in found], dtype=torch.int16)
            labels[name] = torch.where(getattr(structures, name) > 0, getattr(structures, name), fresh)
    rotations = [s.rotations for s in found]
    counts = np.cumsum([0, *map(len, rotations)])
    return dataclasses.replace(
        structures,
        rotation_offset=torch.tensor(counts, dtype=torch.int64),
        rotations=torch.from_numpy(np.concatenate([np.zeros((0, 3, 3), np.int8), *rotations])),
        to_standard=torch.from_numpy(np.array([s.to_standard for s in found]).reshape(-1, 3, 3)),
        **labels,
    )


def reduced_formula(
    atomic_number: Sequence[int] | np.ndarray, occupancy: Sequence[float] | np.ndarray
) -> str:
    """Reduced formula, elements by atomic number, partial sites scaled to integers through per cent.

    Example:
        >>> reduced_formula([26, 8, 8], [1.0, 1.0, 0.5])
        'O3Fe2'
        >>> reduced_formula([11, 17], [1.0, 1.0])
        'Na1Cl1'
    """
    percent: dict[int, int] = {}
    for z, share in zip(np.asarray(atomic_number).tolist(), np.asarray(occupancy).tolist(), strict=True):
        percent[int(z)] = percent.get(int(z), 0) + round(share * 100)
    divisor = reduce(math.gcd, percent.values(), 0) or 1
    symbols = element_symbols()
    known = ((symbols[z] if z < N_ELEMENTS else "X", amount) for z, amount in sorted(percent.items()))
    return "".join(f"{symbol}{amount // divisor}" for symbol, amount in known)


def _ragged_rows(offset: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the elements of chosen rows of a ragged array, and the new offsets."""
    counts = offset.diff()[rows]
    fresh = torch.zeros(len(rows) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=fresh[1:])
    shift = torch.repeat_interleave(offset[:-1][rows] - fresh[:-1], counts)
    return torch.arange(int(fresh[-1])) + shift, fresh


def _joined_offsets(offsets: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat([o.diff() for o in offsets]).cumsum(0)])


def _structure_files(paths: Iterable[str | Path]) -> Iterator[tuple[Path, str]]:
    """Files, and what they are called."""
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".cif", ".npz") and p.is_file())
            if not found:
                raise InputError(f"{path}: folder: must hold .cif or packed .npz files, got none")
            yield from ((file, shown_path(file.relative_to(path).as_posix())) for file in found)
        elif not path.exists():
            raise InputError(f"{path}: file: must exist, got none")
        elif path.suffix.lower() not in (".cif", ".npz", ".safetensors"):
            got = path.suffix or "no suffix"
            raise InputError(f"{path}: type: must be .cif, .npz or .safetensors, got {got}")
        else:
            yield path, shown_path(path.name)


def check_packed(path: Path, structures: PackedStructures) -> None:
    """Checks what every later step relies on; values that concern one structure only are `faults`.

    Args:
        path: of the file they came from, for the message.
        structures: fields of any shape and type.

    Raises:
        InputError: for a shape, a type, offsets or labels that cannot be.
    """
    for name in ("lattice", "atomic_number", "rotations", "offset", "rotation_offset"):
        if getattr(structures, name).ndim == 0:
            raise InputError(f"{path}: {name}: must be an array, got a single number")
    n, n_atoms = len(structures), len(structures.atomic_number)
    for rows, table in ((n, _PER_STRUCTURE), (n_atoms, _PER_ATOM)):
        for name, (tail, dtype) in table.items():
            tensor = getattr(structures, name)
            if tuple(tensor.shape) != (rows, *tail) or tensor.dtype != dtype:
                got = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise InputError(f"{path}: {name}: must be {(rows, *tail)} {dtype}, got {got}")
    for name, end in (("offset", n_atoms), ("rotation_offset", len(structures.rotations))):
        offset = getattr(structures, name)
        rising = offset.shape == (n + 1,) and offset.dtype == torch.int64 and int(offset[0]) == 0
        if not rising or int(offset[-1]) != end or bool((offset.diff() < 0).any()):
            got = f"{tuple(offset.shape)} beginning {offset.reshape(-1)[:3].tolist()}"
            raise InputError(f"{path}: {name}: must rise from 0 to {end} in {n} steps, got {got}")
    if structures.rotations.shape[1:] != (3, 3) or structures.rotations.dtype != torch.int8:
        got = f"{tuple(structures.rotations.shape)} {structures.rotations.dtype}"
        raise InputError(f"{path}: rotations: must be (rows, 3, 3) int8, got {got}")
    if n and (most := int(structures.rotation_offset.diff().max())) > MAX_ROTATIONS:
        raise InputError(f"{path}: rotations: must be at most {MAX_ROTATIONS} a structure, got {most}")
    for name in _STRINGS:
        if len(getattr(structures, name)) != n:
            raise InputError(f"{path}: {name}: must be {n} texts, got {len(getattr(structures, name))}")
    for name in ("space_group_published", "space_group_001", "space_group_01"):
        labels = getattr(structures, name)
        if n and not 0 <= int(labels.min()) <= int(labels.max()) <= 230:
            got = f"{int(labels.min())}..{int(labels.max())}"
            raise InputError(f"{path}: {name}: must be in 0..230, got {got}")
