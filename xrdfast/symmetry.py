"""Space groups and what follows from them: crystal system, centring, point group, Laue class, extinctions.

Every table is indexed by `space_group_index` = space group number - 1. Not for finding the group of a
structure: that is spglib's work (`xrdfast.data.structures`).

Source: International Tables for Crystallography A; short symbols of the standard settings as in spglib. The
tests derive every table again from spglib and from gemmi.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

N_SPACE_GROUPS = 230

# The tasks of XRDecoupler in the order of the published heads (arXiv:2511.06976), and their class counts.
TASKS = ("space_group", "crystal_system", "lattice_centering", "point_group")
N_CLASSES = {"space_group": 230, "crystal_system": 7, "lattice_centering": 6, "point_group": 32}

CRYSTAL_SYSTEMS = ("triclinic", "monoclinic", "orthorhombic", "tetragonal", "trigonal", "hexagonal", "cubic")
LATTICE_CENTERINGS = ("P", "C", "R", "F", "I", "A")
BRAVAIS_LATTICES = ("aP", "mP", "mC", "oP", "oC", "oF", "oI", "tP", "tI", "hP", "hR", "cP", "cF", "cI")
LAUE_CLASSES = ("-1", "2/m", "mmm", "4/m", "4/mmm", "-3", "-3m", "6/m", "6/mmm", "m-3", "m-3m")

# The last space group number of each crystal system.
_SYSTEM_ENDS = (2, 15, 74, 142, 167, 194, 230)

# Point groups in order of first appearance, each with its first space group number and its Laue class.
_POINT_GROUPS = (
    ("1", 1, "-1"),
    ("-1", 2, "-1"),
    ("2", 3, "2/m"),
    ("m", 6, "2/m"),
    ("2/m", 10, "2/m"),
    ("222", 16, "mmm"),
    ("mm2", 25, "mmm"),
    ("mmm", 47, "mmm"),
    ("4", 75, "4/m"),
    ("-4", 81, "4/m"),
    ("4/m", 83, "4/m"),
    ("422", 89, "4/mmm"),
    ("4mm", 99, "4/mmm"),
    ("-42m", 111, "4/mmm"),
    ("4/mmm", 123, "4/mmm"),
    ("3", 143, "-3"),
    ("-3", 147, "-3"),
    ("32", 149, "-3m"),
    ("3m", 156, "-3m"),
    ("-3m", 162, "-3m"),
    ("6", 168, "6/m"),
    ("-6", 174, "6/m"),
    ("6/m", 175, "6/m"),
    ("622", 177, "6/mmm"),
    ("6mm", 183, "6/mmm"),
    ("-6m2", 187, "6/mmm"),
    ("6/mmm", 191, "6/mmm"),
    ("23", 195, "m-3"),
    ("m-3", 200, "m-3"),
    ("432", 207, "m-3m"),
    ("-43m", 215, "m-3m"),
    ("m-3m", 221, "m-3m"),
)
POINT_GROUPS = tuple(name for name, _, _ in _POINT_GROUPS)

_SYMBOLS = (
    "P1 P-1 P2 P2_1 C2 Pm Pc Cm Cc P2/m P2_1/m C2/m P2/c P2_1/c C2/c P222 P222_1 P2_12_12 P2_12_12_1 "
    "C222_1 C222 F222 I222 I2_12_12_1 Pmm2 Pmc2_1 Pcc2 Pma2 Pca2_1 Pnc2 Pmn2_1 Pba2 Pna2_1 Pnn2 Cmm2 "
    "Cmc2_1 Ccc2 Amm2 Aem2 Ama2 Aea2 Fmm2 Fdd2 Imm2 Iba2 Ima2 Pmmm Pnnn Pccm Pban Pmma Pnna Pmna Pcca "
    "Pbam Pccn Pbcm Pnnm Pmmn Pbcn Pbca Pnma Cmcm Cmce Cmmm Cccm Cmme Ccce Fmmm Fddd Immm Ibam Ibca "
    "Imma P4 P4_1 P4_2 P4_3 I4 I4_1 P-4 I-4 P4/m P4_2/m P4/n P4_2/n I4/m I4_1/a P422 P42_12 P4_122 "
    "P4_12_12 P4_222 P4_22_12 P4_322 P4_32_12 I422 I4_122 P4mm P4bm P4_2cm P4_2nm P4cc P4nc P4_2mc "
    "P4_2bc I4mm I4cm I4_1md I4_1cd P-42m P-42c P-42_1m P-42_1c P-4m2 P-4c2 P-4b2 P-4n2 I-4m2 I-4c2 "
    "I-42m I-42d P4/mmm P4/mcc P4/nbm P4/nnc P4/mbm P4/mnc P4/nmm P4/ncc P4_2/mmc P4_2/mcm P4_2/nbc "
    "P4_2/nnm P4_2/mbc P4_2/mnm P4_2/nmc P4_2/ncm I4/mmm I4/mcm I4_1/amd I4_1/acd P3 P3_1 P3_2 R3 P-3 "
    "R-3 P312 P321 P3_112 P3_121 P3_212 P3_221 R32 P3m1 P31m P3c1 P31c R3m R3c P-31m P-31c P-3m1 "
    "P-3c1 R-3m R-3c P6 P6_1 P6_5 P6_2 P6_4 P6_3 P-6 P6/m P6_3/m P622 P6_122 P6_522 P6_222 P6_422 "
    "P6_322 P6mm P6cc P6_3cm P6_3mc P-6m2 P-6c2 P-62m P-62c P6/mmm P6/mcc P6_3/mcm P6_3/mmc P23 F23 "
    "I23 P2_13 I2_13 Pm-3 Pn-3 Fm-3 Fd-3 Im-3 Pa-3 Ia-3 P432 P4_232 F432 F4_132 I432 P4_332 P4_132 "
    "I4_132 P-43m F-43m I-43m P-43n F-43c I-43d Pm-3m Pn-3n Pm-3n Pn-3m Fm-3m Fm-3c Fd-3m Fd-3c Im-3m "
    "Ia-3d "
)
SYMBOLS = tuple(_SYMBOLS.split())

# Groups that no powder pattern can tell apart by its absences: equal crystal family (trigonal P with
# hexagonal, R by itself) and equal absent lines, where a line is absent only if every reflection of equal d
# is absent; orthorhombic settings are compared up to a permutation of the axes. Numbered by first appearance.
_EXTINCTION_GROUP = (
    "0 0 1 2 3 1 4 3 5 1 2 3 4 6 5 7 8 9 10 11 12 13 14 14 7 15 16 15 17 18 19 20 21 22 12 23 24 12 "
    "25 23 26 13 27 14 28 29 7 30 16 31 15 32 18 33 20 34 17 22 19 35 36 21 23 26 12 24 25 37 13 38 "
    "14 28 39 29 40 41 42 41 43 44 40 43 40 42 45 46 43 47 40 48 41 49 42 50 41 49 43 44 40 51 52 53 "
    "54 55 56 57 43 58 59 60 40 56 48 61 40 52 51 53 43 58 43 59 40 54 62 63 51 55 45 64 56 52 65 66 "
    "57 53 67 68 43 58 69 70 71 72 72 73 71 73 71 71 72 72 72 72 73 71 71 74 75 73 76 71 75 71 74 73 "
    "76 71 77 77 72 72 78 71 71 78 71 77 77 72 72 78 71 79 74 75 71 74 71 75 71 79 74 75 80 81 82 83 "
    "82 80 84 81 85 82 86 87 80 83 81 88 82 89 89 90 80 81 82 91 92 93 80 94 91 84 81 92 85 95 82 96 "
)


def _frozen(values: object) -> NDArray[np.int64]:
    array = np.asarray(values, dtype=np.int64)
    array.flags.writeable = False
    return array


_NUMBERS = np.arange(1, N_SPACE_GROUPS + 1)
CRYSTAL_SYSTEM_INDEX = _frozen(np.searchsorted(_SYSTEM_ENDS, _NUMBERS))
_POINT_GROUP_STARTS = [first for _, first, _ in _POINT_GROUPS]
POINT_GROUP_INDEX = _frozen(np.searchsorted(_POINT_GROUP_STARTS, _NUMBERS, side="right") - 1)
LATTICE_CENTERING_INDEX = _frozen([LATTICE_CENTERINGS.index(symbol[0]) for symbol in SYMBOLS])
LAUE_CLASS_INDEX = _frozen([LAUE_CLASSES.index(_POINT_GROUPS[i][2]) for i in POINT_GROUP_INDEX])
_SHOWN_GROUPS = 3  # of an extinction group, in a table
_FAMILY_LETTER = "amothhc"  # of each crystal system
BRAVAIS_LATTICE_INDEX = _frozen(
    [
        BRAVAIS_LATTICES.index(_FAMILY_LETTER[system] + symbol[0].replace("A", "C"))
        for system, symbol in zip(CRYSTAL_SYSTEM_INDEX, SYMBOLS, strict=True)
    ]
)
EXTINCTION_GROUP_INDEX = _frozen([int(i) for i in _EXTINCTION_GROUP.split()])
N_EXTINCTION_GROUPS = int(EXTINCTION_GROUP_INDEX.max()) + 1

_INDEX = {
    "space_group": _frozen(np.arange(N_SPACE_GROUPS)),
    "crystal_system": CRYSTAL_SYSTEM_INDEX,
    "lattice_centering": LATTICE_CENTERING_INDEX,
    "point_group": POINT_GROUP_INDEX,
    "laue_class": LAUE_CLASS_INDEX,
    "bravais_lattice": BRAVAIS_LATTICE_INDEX,
    "extinction_group": EXTINCTION_GROUP_INDEX,
}


def class_index(level: str) -> NDArray[np.int64]:
    """Class of every space group at a level of description.

    Args:
        level: a task of `TASKS`, "laue_class", "bravais_lattice" or "extinction_group".

    Returns:
        (230,) int64, by space group index; read-only.

    Raises:
        ValueError: for another level.

    Example:
        >>> class_index("crystal_system")[225 - 1]
        np.int64(6)
    """
    if level not in _INDEX:
        raise ValueError(f"class_index: level must be one of {', '.join(_INDEX)}, got {level!r}")
    return _INDEX[level]


@functools.cache
def class_names(level: str) -> tuple[str, ...]:
    """Names of the classes of a level, by class index.

    An extinction group is named by its space group numbers.

    Raises:
        ValueError: for an unknown level.

    Example:
        >>> class_names("lattice_centering")
        ('P', 'C', 'R', 'F', 'I', 'A')
        >>> class_names("extinction_group")[0]
        '1, 2'
    """
    if level == "extinction_group":
        return tuple(", ".join(map(str, members(level, i))) for i in range(N_EXTINCTION_GROUPS))
    names = {
        "space_group": SYMBOLS,
        "crystal_system": CRYSTAL_SYSTEMS,
        "lattice_centering": LATTICE_CENTERINGS,
        "point_group": POINT_GROUPS,
        "laue_class": LAUE_CLASSES,
        "bravais_lattice": BRAVAIS_LATTICES,
    }
    if level not in names:
        raise ValueError(f"class_names: level must be one of {', '.join(_INDEX)}, got {level!r}")
    return names[level]


def spoken_classes(level: str, name: str) -> str:
    """A class name of a level for a table: long extinction groups are cut short.

    Example:
        >>> spoken_classes("extinction_group", "143, 147, 150, 156, 157")
        '143, 147, 150 + 2'
    """
    parts = name.split(", ")
    if level != "extinction_group" or len(parts) <= _SHOWN_GROUPS:
        return name
    return f"{', '.join(parts[:_SHOWN_GROUPS])} + {len(parts) - _SHOWN_GROUPS}"


def members(level: str, index: int) -> tuple[int, ...]:
    """Space group numbers of one class.

    Args:
        level: as in `class_index`.
        index: class index.

    Raises:
        ValueError: for an unknown level or an index outside it.

    Example:
        >>> members("point_group", 0)
        (1,)
    """
    classes = class_index(level)
    last = int(classes.max())
    if index not in range(last + 1):
        raise ValueError(f"members: index must be an integer in 0..{last} for {level}, got {index}")
    return tuple(int(n) + 1 for n in np.flatnonzero(classes == index))
