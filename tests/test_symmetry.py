"""The tables of all 230 space groups against spglib and gemmi; extinction groups derived from scratch."""

from __future__ import annotations

import itertools

import gemmi
import numpy as np
import pytest
import spglib
from hypothesis import given
from hypothesis import strategies as st

from xrdfast import symmetry
from xrdfast.symmetry import (
    N_CLASSES,
    N_SPACE_GROUPS,
    TASKS,
    class_index,
    class_names,
    members,
    spoken_classes,
)

LEVELS = (*TASKS, "laue_class", "bravais_lattice", "extinction_group")
NUMBERS = range(1, N_SPACE_GROUPS + 1)


def names(level: str) -> list[str]:
    """The class name of every space group, by number."""
    return [class_names(level)[i] for i in class_index(level)]


@pytest.fixture(scope="module")
def from_spglib() -> list[spglib.SpaceGroupType]:
    """The first setting of every space group, which is the standard one."""
    first: dict[int, spglib.SpaceGroupType] = {}
    for hall_number in range(1, 531):
        kind = spglib.get_spacegroup_type(hall_number)
        first.setdefault(kind.number, kind)
    return [first[number] for number in NUMBERS]


@pytest.fixture(scope="module")
def from_gemmi() -> list[gemmi.SpaceGroup]:
    return [gemmi.find_spacegroup_by_number(number) for number in NUMBERS]


def test_symbols_and_point_groups_are_those_of_spglib(from_spglib: list[spglib.SpaceGroupType]) -> None:
    assert list(symmetry.SYMBOLS) == [kind.international_short for kind in from_spglib]
    assert names("point_group") == [kind.pointgroup_international for kind in from_spglib]
    # the arithmetic classes refine lattices, so no lattice of ours may cut one of spglib's in two
    pairs = {
        (kind.arithmetic_crystal_class_number, lattice)
        for kind, lattice in zip(from_spglib, names("bravais_lattice"), strict=True)
    }
    assert len(pairs) == 73


def test_every_table_is_that_of_gemmi(from_gemmi: list[gemmi.SpaceGroup]) -> None:
    assert names("crystal_system") == [group.crystal_system_str() for group in from_gemmi]
    assert names("lattice_centering") == [group.centring_type() for group in from_gemmi]
    assert names("laue_class") == [group.laue_str() for group in from_gemmi]
    # gemmi has one name for the two settings of the class -6m2
    assert [n.replace("-6m2", "-62m") for n in names("point_group")] == [
        g.point_group_hm() for g in from_gemmi
    ]
    # old symbols before the e of 1992, and H for hexagonal axes
    e_glides = {39: "Abm2", 41: "Aba2", 64: "Cmca", 67: "Cmma", 68: "Ccca"}
    expected = [
        e_glides.get(n, symbol.replace("_", "")) for n, symbol in zip(NUMBERS, symmetry.SYMBOLS, strict=True)
    ]
    assert [group.short_name().replace("H", "R") for group in from_gemmi] == expected


def test_bravais_lattices_are_family_and_centring(from_gemmi: list[gemmi.SpaceGroup]) -> None:
    letters = {"triclinic": "a", "monoclinic": "m", "orthorhombic": "o", "tetragonal": "t", "cubic": "c"}
    expected = [
        letters.get(group.crystal_system_str(), "h")
        + {"A": "C"}.get(group.centring_type(), group.centring_type())
        for group in from_gemmi
    ]
    assert names("bravais_lattice") == expected
    assert len(set(expected)) == len(symmetry.BRAVAIS_LATTICES) == 14


def test_point_groups_are_in_order_of_first_appearance() -> None:
    assert list(dict.fromkeys(names("point_group"))) == list(symmetry.POINT_GROUPS)


def test_sizes_of_the_classes() -> None:
    assert {task: len(class_names(task)) for task in TASKS} == N_CLASSES
    counts = np.bincount(class_index("crystal_system"))
    assert counts.tolist() == [2, 13, 59, 68, 25, 27, 36]  # International Tables A
    assert len(class_names("laue_class")) == 11


# --- extinction groups, by a route of their own: lists of reflections, not of conditions

_REACH = 9  # the same groups come out with 14
_HKL = np.array(
    [h for h in itertools.product(range(-_REACH, _REACH + 1), repeat=3) if any(h)], dtype=np.int32
)


def metric_family(group: gemmi.SpaceGroup) -> str:
    system = group.crystal_system_str()
    if system in ("trigonal", "hexagonal"):
        return "rhombohedral" if group.centring_type() == "R" else "hexagonal"
    return system


def lines_of(family: str) -> np.ndarray:
    """(n_reflections,) index of the powder line of each of _HKL: equal d in every cell of the family."""
    h, k, l = _HKL.astype(np.int64).T  # noqa: E741
    match family:
        case "triclinic":
            key = np.stack([h * h, k * k, l * l, k * l, h * l, h * k])
        case "monoclinic":
            key = np.stack([h * h, k * k, l * l, h * l])
        case "orthorhombic":
            key = np.stack([h * h, k * k, l * l])
        case "tetragonal":
            key = np.stack([h * h + k * k, l * l])
        case "hexagonal" | "rhombohedral":
            key = np.stack([h * h + h * k + k * k, l * l])
        case _:
            key = (h * h + k * k + l * l)[None]
    return np.unique(key, axis=1, return_inverse=True)[1].ravel()


def settings_of(family: str) -> list[tuple[int, ...]]:
    """Orders of the axes that a pattern cannot tell apart."""
    return list(itertools.permutations(range(3))) if family == "orthorhombic" else [(0, 1, 2)]


def present_lines(group: gemmi.SpaceGroup, lines: np.ndarray, axes: tuple[int, ...] = (0, 1, 2)) -> bytes:
    absent = np.asarray(group.operations().systematic_absences(np.ascontiguousarray(_HKL[:, axes])))
    present = np.zeros(lines.max() + 1, dtype=bool)
    present[lines[~absent]] = True
    return present.tobytes()


def test_extinction_groups_derived_again(from_gemmi: list[gemmi.SpaceGroup]) -> None:
    lines = {family: lines_of(family) for family in {metric_family(group) for group in from_gemmi}}
    found: dict[tuple[str, bytes], int] = {}
    labels, unpermuted = [], set()
    for group in from_gemmi:
        family = metric_family(group)
        if family == "rhombohedral":
            assert group.ext == "H"  # indices in hexagonal axes
        unpermuted.add((family, present_lines(group, lines[family])))
        key = family, min(present_lines(group, lines[family], axes) for axes in settings_of(family))
        labels.append(found.setdefault(key, len(found)))
    assert len(found) == symmetry.N_EXTINCTION_GROUPS == 97
    assert len(unpermuted) == 108
    assert labels == class_index("extinction_group").tolist()


def test_enantiomorphic_pairs_share_their_extinction_group() -> None:
    pairs = [(76, 78), (91, 95), (92, 96), (144, 145), (151, 153), (152, 154),
             (169, 170), (171, 172), (178, 179), (180, 181), (212, 213)]  # fmt: skip
    groups = class_index("extinction_group")
    assert all(groups[a - 1] == groups[b - 1] for a, b in pairs)


# --- the functions


@given(st.sampled_from(LEVELS), st.sampled_from(NUMBERS))
def test_members_and_class_index_agree(level: str, number: int) -> None:
    index = int(class_index(level)[number - 1])
    group = members(level, index)
    assert number in group
    assert all(class_index(level)[n - 1] == index for n in group)


@pytest.mark.parametrize("level", LEVELS)
def test_classes_are_a_partition(level: str) -> None:
    count = len(class_names(level))
    assert len(set(class_names(level))) == count
    assert sorted(n for i in range(count) for n in members(level, i)) == list(NUMBERS)


@pytest.mark.parametrize("level", LEVELS)
def test_space_groups_of_one_class_share_what_follows(level: str) -> None:
    """The superclass of a superclass is well defined: a point group has one Laue class, and so on."""
    follows = {"point_group": ("laue_class", "crystal_system"), "laue_class": ("crystal_system",),
               "space_group": LEVELS}  # fmt: skip
    for other in follows.get(level, ()):
        pairs = set(zip(class_index(level).tolist(), class_index(other).tolist(), strict=True))
        assert len(pairs) == len(class_names(level))


def test_spoken_classes() -> None:
    assert spoken_classes("extinction_group", "1, 2") == "1, 2"
    assert spoken_classes("crystal_system", "cubic") == "cubic"


def test_tables_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        class_index("point_group")[0] = 1


@pytest.mark.parametrize("function", [class_index, class_names, lambda level: members(level, 0)])
def test_unknown_levels_are_refused(function) -> None:
    with pytest.raises(
        ValueError, match=r"level must be one of space_group, .*extinction_group, got 'colour'"
    ):
        function("colour")


@pytest.mark.parametrize("index", [-1, 7, 0.5, float("nan"), None])
def test_indices_outside_a_level_are_refused(index: object) -> None:
    with pytest.raises(
        ValueError, match=rf"members: index must be an integer in 0\.\.6 for crystal_system, got {index}"
    ):
        members("crystal_system", index)
