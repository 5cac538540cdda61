"""CIF text to packed structures: every atom of the cell listed, one structure a data block that has atoms.

Not for labels (`xrdfast.data.labels`) or for the powder patterns some CIFs carry (`xrdfast.data.scans`).
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xrdfast.data.cif_syntax import column_of, numbers_of, parse_blocks, text_of
from xrdfast.data.formats.bounded import read_bytes
from xrdfast.data.structures import PackedStructures, Rejected, from_arrays
from xrdfast.errors import InputError

if TYPE_CHECKING:
    from gemmi import GroupOps
    from gemmi.cif import Block

_MAX_SITES = 20_000  # of one cell, after expansion
_MAX_OPERATOR = 200  # characters
_MAX_OPERATORS = 1024  # 192 in the largest conventional cell; more in a supercell that lists its translations
_MAX_IMAGES = 200_000  # sites times operators, before images that fall together are merged
_SAME_PLACE = 0.01  # Angstrom
_SAME_CELL = 0.05  # strain: refined cells and their operators agree within 0.001; another setting's do not
_FULL_OCCUPANCY = 1.1  # refinements overshoot
_MAX_GRID = 1 << 14  # boxes along an axis: keeps the integer keys of `_same_places` below 2^63
_U_TO_B = 8.0 * math.pi**2

_OPERATORS = (
    "_space_group_symop_operation_xyz",
    "_space_group_symop.operation_xyz",
    "_symmetry_equiv_pos_as_xyz",
)
_HALL = ("_space_group_name_Hall", "_symmetry_space_group_name_Hall")
_HERMANN_MAUGUIN = (
    "_space_group_name_H-M_alt",
    "_symmetry_space_group_name_H-M",
    "_space_group_name_H-M",
    "_space_group_name_H-M_full",
)
_NUMBER = ("_space_group_IT_number", "_symmetry_Int_Tables_number")

_TYPE_SYMBOL = re.compile(r"([A-Za-z]{1,2})(?:\d*\.?\d*[+-]|[+-]?\d+\.?\d*|\(.*\))?")
# Symbols that labels in capitals mean as one element although the first letter is one too.
_CAPITAL_SYMBOLS = (
    "FE",
    "SI",
    "CL",
    "BR",
    "NI",
    "NA",
    "PB",
    "PT",
    "PD",
    "SR",
    "CR",
    "CU",
    "ZN",
    "MN",
    "MG",
    "AL",
)
_GROUP = re.compile(r"(wat|h2o|o-h|nh[34]?$)", re.IGNORECASE)
_TERM = re.compile(r"([+-]?)(?:(\d+\.?\d*|\.\d+)(?:/(\d+))?)?\*?([xyz]?)", re.IGNORECASE)


class _Sites(NamedTuple):
    atomic_number: NDArray[np.int64]  # (n,)
    fractional: NDArray[np.float64]  # (n, 3)
    occupancy: NDArray[np.float64]  # (n,)
    b_iso: NDArray[np.float64]  # (n,) Angstrom^2


def read_cif(path: str | Path, name: str | None = None) -> tuple[PackedStructures, list[Rejected]]:
    """Reads every structure of a CIF.

    Listed symmetry operators come first, then the Hall symbol, the Hermann-Mauguin symbol with its setting,
    and the number in its reference setting (of R groups, that of the cell). Images of a site within 0.01
    Angstrom of each other are one atom, at their mean. Sites of different elements or of partial occupancy
    that share a place stay several rows, with equal coordinates; a second full copy of an element at a place
    (all atoms listed beside operators) is dropped; a place with more than 1.1 atoms is refused, and so are
    operators of another cell than the one listed. Missing occupancies are 1, missing displacements B = 0,
    missing angles 90 degrees, as the CIF dictionary has it. An unquoted `P 1` and a block name of several
    words are repaired.

    Args:
        path: a regular text file of at most 64 MB, with at most 1,000 blocks and 20,000 atoms a cell.
        name: what structures are called; None for the file's name.

    Returns:
        The structures, named `file.cif`, or `file.cif#block` where several blocks have atoms, without labels;
        and the blocks left out, with the reason. Beside a structure, blocks without any site are no structures.

    Raises:
        InputError: for a file that cannot be read or is not CIF, in one line.

    Source:
        Hall, Allen & Brown, Acta Cryst. A47, 655 (1991): CIF.
        Trueblood et al., Acta Cryst. A52, 770 (1996): B = 8 pi^2 U and U_equiv.
    """
    path = Path(path)
    file = path.name if name is None else name
    blocks = _read_blocks(path)
    with_atoms = [block for block in blocks if column_of(block, "_atom_site_fract_x")]
    lattices, atoms, ids, families, numbers, rejected = [], [], [], [], [], []
    for block in blocks:
        if with_atoms and not _has_sites(block):
            continue
        alone = len(with_atoms) == 1 and block is with_atoms[0]
        name = file if alone or len(blocks) == 1 else f"{file}#{block.name}"
        try:
            lattice, sites, number = _read_block(block)
        except InputError as error:
            rejected.append(Rejected(name, str(error)))
            continue
        lattices.append(lattice)
        atoms.append((sites.atomic_number, sites.fractional, sites.occupancy, sites.b_iso))
        ids.append(name)
        families.append(text_of(block, "_chemical_name_mineral").strip())
        numbers.append(number)
    return from_arrays(lattices, atoms, ids, family=families, space_group_published=numbers), rejected


def _has_sites(block: Block) -> bool:
    return any(
        column_of(block, f"_atom_site_{name}") for name in ("fract_x", "Cartn_x", "label", "type_symbol")
    )


def _read_blocks(path: Path) -> list[Block]:
    try:
        return parse_blocks(read_bytes(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read_block(block: Block) -> tuple[NDArray[np.float64], _Sites, int]:
    """Lattice (3, 3), the atoms of the whole cell, and the stated space-group number (0 where none)."""
    if not column_of(block, "_atom_site_fract_x"):
        raise InputError("atoms: must be listed with fractional coordinates, got none")
    lattice, angles = _lattice(block)
    sites = _sites(block, lattice)
    stated, number = _stated_group(block, angles)
    rotations, translations = _operators(block, stated)
    _check_metric(lattice, rotations)
    return lattice, _expand(sites, lattice, rotations, translations), number


def _lattice(block: Block) -> tuple[NDArray[np.float64], list[float]]:
    """Rows a along x, b in the xy plane, c, in Angstrom; and alpha, beta, gamma in degrees."""
    from gemmi import UnitCell

    lengths = [_number(block, f"_cell_length_{axis}", None) for axis in "abc"]
    angles = [_number(block, f"_cell_angle_{angle}", 90.0) for angle in ("alpha", "beta", "gamma")]
    for name, value in zip("abc", lengths, strict=True):
        if not 0.1 < value < 1e4:
            raise InputError(f"_cell_length_{name}: must be in 0.1..10000 Angstrom, got {value:g}")
    for name, value in zip(("alpha", "beta", "gamma"), angles, strict=True):
        if not 1.0 < value < 179.0:
            raise InputError(f"_cell_angle_{name}: must be in 1..179 degrees, got {value:g}")
    lattice = np.array(UnitCell(*lengths, *angles).orth.mat.tolist(), dtype=np.float64).T
    if not (np.isfinite(lattice).all() and np.linalg.det(lattice) > 1.0):
        raise InputError(f"cell: must have a volume above 1 Angstrom^3, got angles {angles}")
    return lattice, angles


def _check_metric(lattice: NDArray[np.float64], rotations: NDArray[np.float64]) -> None:
    """Operators must keep the lengths and angles of the cell, or they are those of another setting."""
    metric = lattice @ lattice.T
    turned = rotations.swapaxes(1, 2) @ metric @ rotations
    lengths = np.sqrt(np.diag(metric))
    strain = float((np.abs(turned - metric) / np.outer(lengths, lengths)).max()) / 2.0
    if strain > _SAME_CELL:
        rule = f"must keep the cell within {100.0 * _SAME_CELL:g} %"
        raise InputError(f"symmetry operators: {rule}, got {100.0 * strain:.3g} %: those of another setting")


def _sites(block: Block, lattice: NDArray[np.float64]) -> _Sites:
    """The listed sites."""
    coordinates = [column_of(block, f"_atom_site_fract_{axis}") for axis in "xyz"]
    n = len(coordinates[0])
    if n > _MAX_SITES:
        raise InputError(f"atoms: must be at most {_MAX_SITES}, got {n} listed")
    if any(len(column) != n for column in coordinates):
        raise InputError("atoms: must have three coordinates, got columns of different length")
    fractional = np.array([numbers_of(column) for column in coordinates]).T
    labels = column_of(block, "_atom_site_label") or [""] * n
    types = column_of(block, "_atom_site_type_symbol") or [""] * n
    names = [label or f"site {row}" for row, label in enumerate(labels, 1)]
    for row in np.flatnonzero(~(np.abs(fractional) < 1000.0).all(1))[:1]:
        got = " ".join(column[row] or "?" for column in coordinates)[:100]
        raise InputError(f"{names[row]}: coordinates: must be finite, below 1000, got {got}")
    kinds = {key: _atomic_number(*key) for key in set(zip(types, labels, strict=True))}
    occupancy = numbers_of(column_of(block, "_atom_site_occupancy") or [""] * n, 1.0)
    for row in np.flatnonzero(~((occupancy >= 0.0) & (occupancy <= _FULL_OCCUPANCY)))[:1]:
        raise InputError(f"{names[row]}: occupancy: must be in 0..{_FULL_OCCUPANCY}, got {occupancy[row]:g}")
    return _Sites(
        np.array([kinds[key] for key in zip(types, labels, strict=True)], dtype=np.int64),
        fractional,
        occupancy,
        _b_iso(block, labels, lattice),
    )


def _atomic_number(type_symbol: str, label: str) -> int:
    """Of a type symbol such as Fe3+ or D, or without one of a label such as Fe1, OW2 or CaM2a."""
    from gemmi import Element

    for text in (type_symbol, label):
        if group := _GROUP.match(text):
            raise InputError(f"element: must be one element, got the group {text!r} ({group[0]})")
    if type_symbol:
        match = _TYPE_SYMBOL.fullmatch(type_symbol)
        number = Element(match[1]).atomic_number if match else 0
    else:
        letters = re.match(r"[A-Za-z]*", label)[0]
        one, two = Element(letters[:1]).atomic_number, Element(letters[:2]).atomic_number
        # In capitals, CA1 is a carbon named A1, and FE1 iron
        sure = letters[1:2].islower() or one == 0 or letters[:2] in _CAPITAL_SYMBOLS
        number = two if two and sure else one
    if number < 1:
        raise InputError(f"element: must be one element, got {type_symbol or label!r}")
    return number


def _b_iso(block: Block, labels: list[str], lattice: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) B in Angstrom^2: from B_iso, else U_iso, else the mean of the anisotropic tensor, else 0."""
    n = len(labels)
    b = np.full(n, np.nan)
    for tag, factor in (
        ("_atom_site_B_iso_or_equiv", 1.0),
        ("_atom_site_U_iso_or_equiv", _U_TO_B),
        ("_atom_site_U_equiv", _U_TO_B),
        ("_atom_site_U_iso", _U_TO_B),
        ("_atom_site_B_iso", 1.0),
    ):
        if len(column := column_of(block, tag)) == n:
            value = numbers_of(column)
            for row in np.flatnonzero([bool(text) for text in column] & ~np.isfinite(value))[:1]:
                raise InputError(f"{labels[row]}: {tag}: must be a finite number, got {column[row][:60]!r}")
            b = np.where(np.isfinite(b), b, factor * value)
    missing = np.flatnonzero(~np.isfinite(b))
    names = column_of(block, "_atom_site_aniso_label") if len(missing) else []
    # U_equiv = 1/3 sum_ij U_ij |a*_i| |a*_j| a_i . a_j
    metric = lattice @ lattice.T
    reciprocal = np.sqrt(np.diag(np.linalg.inv(metric)))
    weight = metric * np.outer(reciprocal, reciprocal) / 3.0
    for kind, factor in (("U", _U_TO_B), ("B", 1.0)):
        pairs = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
        columns = [column_of(block, f"_atom_site_aniso_{kind}_{i + 1}{j + 1}") for i, j in pairs]
        if not names or any(len(column) != len(names) for column in columns):
            continue
        tensor = np.array([numbers_of(column) for column in columns])
        weights = [(1 if i == j else 2) * weight[i, j] for i, j in pairs]
        mean = dict(zip(names, factor * (weights @ tensor), strict=True))
        b[missing] = [mean.get(labels[row], math.nan) for row in missing]
        break
    return np.where(np.isfinite(b), b, 0.0)


def _stated_group(block: Block, angles: list[float]) -> tuple[GroupOps | None, int]:
    """Operators by the Hall symbol, the Hermann-Mauguin symbol or the number; and the published number."""
    import gemmi

    alpha, _, gamma = angles  # they tell the axes of R groups
    group = operators = None
    if hall := text_of(block, *_HALL).rstrip("\"' "):
        try:
            operators = gemmi.symops_from_hall(hall)
            group = gemmi.find_spacegroup_by_ops(operators)
        except (ValueError, RuntimeError):
            operators = None  # the Hermann-Mauguin symbol may be better
    name = re.sub(r"[()]", "", text_of(block, *_HERMANN_MAUGUIN)).strip()
    # ICSD writes the origin as a letter after the name
    name = re.sub(r" S$", ":1", re.sub(r" Z$", ":2", name))
    group = group or (gemmi.find_spacegroup_by_name(name, alpha, gamma) if name else None)
    stated = next((text for tag in _NUMBER if (text := text_of(block, tag))), "")
    number = int(stated) if re.fullmatch(r"\d{1,3}", stated) and 1 <= int(stated) <= 230 else 0
    if number and not (group or name or hall):
        # By its symbol, which takes the rhombohedral axes where the cell has them
        group = gemmi.find_spacegroup_by_name(gemmi.find_spacegroup_by_number(number).hm, alpha, gamma)
    if operators is None and group is not None:
        operators = group.operations()
    return operators, number or (group.number if group else 0)


def _operators(block: Block, stated: GroupOps | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distinct (n, 3, 3) rotations and (n, 3) translations on fractional columns."""
    import gemmi

    listed = next((column for tag in _OPERATORS if any(column := column_of(block, tag))), [])
    if len(listed) > _MAX_OPERATORS:
        raise InputError(f"symmetry operators: must be at most {_MAX_OPERATORS}, got {len(listed)}")
    if listed:
        parsed = np.array([_parse_operator(text) for text in listed])
    elif stated is not None:
        parsed = np.array([np.c_[op.rot, op.tran] for op in stated]) / gemmi.Op.DEN
    else:
        got = text_of(block, *_HERMANN_MAUGUIN) or text_of(block, *_HALL) or "none"
        raise InputError(f"symmetry: must be operators or a known space-group symbol, got {got[:60]!r}")
    parsed[:, :, 3] %= 1.0
    _, first = np.unique(np.round(parsed.reshape(len(parsed), -1), 3), axis=0, return_index=True)
    parsed = parsed[np.sort(first)]
    return parsed[:, :, :3], parsed[:, :, 3]


def _parse_operator(text: str) -> NDArray[np.float64]:
    """(3, 4) rotation and translation of `-y+1/2, x-y, z`; decimals near n/24 become exact.

    Gemmi's parser refuses what a supercell needs: denominators other than those of 24.
    """
    rows = re.sub(r"[\s'\"()]", "", text[: _MAX_OPERATOR + 1]).split(",")
    operator = np.zeros((3, 4))
    for row, expression in enumerate(rows[:3]):
        position = 0
        while position < len(expression):
            match = _TERM.match(expression, position)
            if match.end() == position or not (match[2] or match[4]) or (position and not match[1]):
                break
            value = float(match[2] or 1.0) / (float(match[3] or 1.0) or math.nan)
            column = "xyz".index(match[4].lower()) if match[4] else 3
            operator[row, column] += -value if match[1] == "-" else value
            position = match.end()
        if position < len(expression) or not expression:
            operator[row] = np.nan
    exact = np.round(operator[:, 3] * 24.0) / 24.0
    operator[:, 3] = np.where(np.abs(operator[:, 3] - exact) < 1e-3, exact, operator[:, 3])
    determinant = np.linalg.det(operator[:, :3]) if np.isfinite(operator).all() else 0.0
    if len(text) > _MAX_OPERATOR or len(rows) != 3 or abs(abs(determinant) - 1.0) > 1e-6:
        raise InputError(f"symmetry operator: must be like '-x, y+1/2, z', got {text[:60]!r}")
    return operator


def _expand(sites: _Sites, lattice: NDArray, rotations: NDArray, translations: NDArray) -> _Sites:
    """Every atom of the cell, fractional coordinates in [0, 1)."""
    n_sites, n_operators = len(sites.fractional), len(rotations)
    if n_sites * n_operators > _MAX_IMAGES:
        got = f"{n_sites} sites under {n_operators} operators"
        raise InputError(f"atoms: must be at most {_MAX_SITES} a cell, got {got}")
    images = np.einsum("oij,sj->soi", rotations, sites.fractional) + translations
    images = _wrap(images.reshape(-1, 3))
    site = np.repeat(np.arange(n_sites), n_operators)
    first = _same_places(images, lattice, site)
    shift = images - images[first]
    shift -= np.round(shift)
    count = np.bincount(first, minlength=len(first))
    kept = np.flatnonzero(count)
    if len(kept) > _MAX_SITES:
        raise InputError(f"atoms: must be at most {_MAX_SITES} a cell, got {len(kept)}")
    mean = np.stack([np.bincount(first, shift[:, axis], len(first)) for axis in range(3)], 1)[kept]
    fractional, site = _wrap(images[kept] + mean / count[kept, None]), site[kept]
    # Rows at one place get equal coordinates; copies of a full site, equal in element and occupancy, go.
    place = _same_places(fractional, lattice, np.zeros(len(site), dtype=np.int64))
    number, occupancy = sites.atomic_number[site], sites.occupancy[site]
    _, lead, kind = np.unique(place * 128 + number, return_index=True, return_inverse=True)
    kind = kind.reshape(-1)
    copied = np.bincount(kind, occupancy)[kind] > _FULL_OCCUPANCY
    copied &= np.abs(occupancy - occupancy[lead[kind]]) < 0.01
    row = np.flatnonzero(~copied | (lead[kind] == np.arange(len(site))))
    total = np.bincount(place[row], occupancy[row])
    if len(total) and total.max() > _FULL_OCCUPANCY:
        where = " ".join(f"{x:.4f}" for x in fractional[total.argmax()])
        rule = f"must sum to at most {_FULL_OCCUPANCY} at a place"
        raise InputError(f"occupancy: {rule}, got {total.max():.3g} at {where}")
    return _Sites(number[row], fractional[place[row]], occupancy[row], sites.b_iso[site[row]])


def _wrap(fractional: NDArray[np.float64]) -> NDArray[np.float64]:
    wrapped = fractional - np.floor(fractional)
    return np.where(wrapped < 1.0, wrapped, 0.0)  # a tiny negative number rounds up to 1


def _same_places(
    fractional: NDArray[np.float64], lattice: NDArray[np.float64], label: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(n,) for each row the first row of its label within 0.01 Angstrom, over chains and cell borders.

    Boxes of twice the tolerance: two points that close share a box of at least one of the eight grids shifted
    by half a box, so eight sorts find all pairs.
    """
    height = 1.0 / np.linalg.norm(np.linalg.inv(lattice), axis=0)  # of the cell over each face
    boxes = np.clip(np.floor(height / (2.0 * _SAME_PLACE)), 1, _MAX_GRID).astype(np.int64)
    first = np.arange(len(fractional))
    pairs = []
    for half in itertools.product((0.0, 0.5), repeat=3):
        box = np.floor(fractional * boxes + half).astype(np.int64) % boxes
        key = ((label * boxes[0] + box[:, 0]) * boxes[1] + box[:, 1]) * boxes[2] + box[:, 2]
        order = np.argsort(key, kind="stable")
        fresh = np.r_[True, np.diff(key[order]) != 0]
        lead = order[np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]
        shift = fractional[order] - fractional[lead]
        distance = np.linalg.norm((shift - np.round(shift)) @ lattice, axis=1)
        close = (distance < _SAME_PLACE) & (order != lead)
        pairs.append(np.stack([lead[close], order[close]]))
    one, other = np.concatenate(pairs, axis=1)
    while True:
        before = first.copy()
        np.minimum.at(first, other, first[one])
        np.minimum.at(first, one, first[other])
        if np.array_equal(first, before):
            return first


def _number(block: Block, tag: str, default: float | None) -> float:
    text = text_of(block, tag)
    value = float(numbers_of([text], math.nan if default is None else default)[0])
    if not math.isfinite(value):
        raise InputError(f"{tag}: must be a finite number, got {text or 'none'!r}")
    return value
