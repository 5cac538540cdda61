"""CIF: symmetry, merging, elements, displacements, repairs, refusals, and agreement with pymatgen."""

from __future__ import annotations

import math
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymatgen.core import Structure
from pymatgen.io.cif import CifWriter

from xrdfast.data import cif
from xrdfast.data.cif import read_cif
from xrdfast.data.formats import bounded
from xrdfast.data.structures import PackedStructures, Rejected, load_structures, to_pymatgen
from xrdfast.errors import InputError
from xrdfast.ops.simulate import simulate_lines

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CELL = "_cell_length_a {}\n_cell_length_b {}\n_cell_length_c {}\n_cell_angle_alpha {}\n_cell_angle_beta {}\n"
CUBIC = CELL.format(5.6402, "5.6402(3)", 5.6402, 90, 90) + "_cell_angle_gamma 90\n"
SITES = "loop_\n_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n"
SALT = SITES + "Na1 0 0 0\nCl1 0.5 0.5 0.5\n"
OPERATORS = "loop_\n_symmetry_equiv_pos_as_xyz\n"
P1 = OPERATORS + "x,y,z\n"


def read(tmp_path, content: str | bytes) -> tuple[PackedStructures, list[Rejected]]:
    path = tmp_path / "a.cif"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_cif(path)


def one(tmp_path, *parts: str) -> PackedStructures:
    structures, rejected = read(tmp_path, "data_x\n" + "\n".join(parts))
    assert not rejected
    assert len(structures) == 1
    return structures


def reason(tmp_path, *parts: str) -> str:
    structures, rejected = read(tmp_path, "data_x\n" + "\n".join(parts))
    assert len(structures) == 0 and rejected[0].id == "a.cif" and "\n" not in rejected[0].reason
    return rejected[0].reason


def test_raw_formats(shared_data):
    formats = shared_data / "raw_formats"
    expected = {
        "cif/1550397.cif": ("Li1O2Co1", 12, 166),
        "cif/dsmo-raw.cif": (None, 24, 62),
        "cif_malformed/ABAVIJ_freeONLY.cif": ("H8C12N2O4Co1", 108, 1),
        "cif_malformed/ABEXEM_freeONLY.cif": ("H10C14N4O15La2", 180, 1),
        "cif_malformed/ABEXIQ_freeONLY.cif": ("H10C14N4O15Ce2", 180, 1),
        "cif_malformed/ABEXOW_freeONLY.cif": ("H10C14N4O15Pr2", 180, 1),
        "cif_malformed/ABEXUC_freeONLY.cif": ("H10C14N4O15Nd2", 180, 1),
        "cif_with_pattern/br1322Isup2.rtv.combined.cif": ("O4Al1P1", 12, 186),
        "cif_with_pattern/sh0123Xraysup5.rtv.combined.cif": ("O6Sr2Nb1Yb1", 20, 14),
    }
    assert {str(p.relative_to(formats)) for p in formats.glob("cif*/*.cif")} == set(expected)
    for name, (formula, n_atoms, number) in expected.items():
        structures, rejected = read_cif(formats / name)
        assert len(structures) == 1 and structures.faults() == {}
        assert structures.ids == [name.split("/")[1]]
        assert formula in (None, structures.formula[0])
        assert len(structures.atomic_number) == n_atoms
        assert structures.space_group_published.tolist() == [number]
        assert all("fractional coordinates, got none" in r.reason for r in rejected)
        assert ((structures.fractional >= 0) & (structures.fractional < 1)).all()


@pytest.mark.parametrize(
    ("symmetry", "number", "n_atoms"),
    [
        ("_symmetry_space_group_name_H-M 'F m -3 m'\n", 225, 8),
        ("_space_group_name_H-M_alt 'F m -3 m'\n_space_group_IT_number 225\n", 225, 8),
        ("_space_group_name_Hall '-F 4 2 3'\n", 225, 8),
        ("_symmetry_Int_Tables_number 225\n", 225, 8),
        ("_space_group_IT_number ?\n_symmetry_Int_Tables_number 225\n", 225, 8),
        ("_symmetry_space_group_name_H-M Fm-3m\n", 225, 8),
        ("_symmetry_space_group_name_H-M F m -3 m\n", 225, 8),
        ("_SYMMETRY_SPACE_GROUP_NAME_H-M P 1\n", 1, 2),
        ("_space_group_name_Hall junk\n_space_group_name_H-M_alt 'F m -3 m'\n", 225, 8),
        (P1 + "_symmetry_space_group_name_H-M 'F m -3 m'\n", 225, 2),
        (P1, 0, 2),
        (OPERATORS + "x,y,z\n'x, y+1/2, z+1/2'\n1/2+x,y,0.5+z\n\"X+.5,Y+.5,Z\"\n", 0, 8),
        ("_symmetry_equiv_pos_as_xyz 'x,y,z'\n", 0, 2),
        ("_symmetry_equiv_pos_as_xyz ?\n_symmetry_space_group_name_H-M 'F m -3 m'\n", 225, 8),
        ("_space_group_IT_number 999\n" + P1, 0, 2),
    ],
)
def test_symmetry(tmp_path, symmetry, number, n_atoms):
    salt = one(tmp_path, CUBIC, symmetry, SALT)
    assert salt.space_group_published.tolist() == [number]
    assert len(salt.atomic_number) == n_atoms
    assert salt.formula == ["Na1Cl1"]
    if n_atoms == 8:
        places = {tuple(p) for p in (salt.fractional[salt.atomic_number == 11] * 2).round().int().tolist()}
        assert places == {(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)}


def test_hexagonal_and_rhombohedral_settings_are_one_crystal(tmp_path):
    hexagonal = CELL.format(4.7602, 4.7602, 12.9933, 90, 90) + "_cell_angle_gamma 120\n"
    a, c = 4.7602, 12.9933
    edge = math.sqrt(a**2 / 3 + c**2 / 9)
    angle = math.degrees(2 * math.asin(a / 2 / edge))
    rhombohedral = CELL.format(edge, edge, edge, angle, angle) + f"_cell_angle_gamma {angle}\n"
    corundum = [
        SITES + "Al 0 0 0.35216\nO 0.30624 0 0.25\n",
        SITES + "Al .35216 .35216 .35216\nO .55624 .94376 .25\n",
    ]
    name = "_symmetry_space_group_name_H-M '{}'\n"
    crystals = [
        one(tmp_path, hexagonal, name.format("R -3 c :H"), corundum[0]),
        one(tmp_path, hexagonal, name.format("R -3 c"), corundum[0]),
        one(tmp_path, rhombohedral, name.format("R -3 c:R"), corundum[1]),
        one(tmp_path, rhombohedral, name.format("R -3 c"), corundum[1]),
        one(tmp_path, hexagonal, "_symmetry_Int_Tables_number 167\n", corundum[0]),
        one(tmp_path, rhombohedral, "_symmetry_Int_Tables_number 167\n", corundum[1]),
    ]
    assert [len(crystal.atomic_number) for crystal in crystals] == [30, 30, 10, 10, 30, 10]
    for cell, setting, sites in ((hexagonal, "R", corundum[0]), (rhombohedral, "H", corundum[1])):
        assert "must keep the cell" in reason(tmp_path, cell, name.format(f"R -3 c :{setting}"), sites)
    assert all(crystal.space_group_published.tolist() == [167] for crystal in crystals)
    first, *others = [simulate_lines(crystal) for crystal in crystals]
    for lines in others:
        np.testing.assert_allclose(lines.two_theta, first.two_theta, atol=2e-4)
        np.testing.assert_allclose(lines.intensity, first.intensity, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "stated", ["_symmetry_space_group_name_H-M 'R -3 m'\n", "_symmetry_Int_Tables_number 166\n"]
)
def test_obtuse_rhombohedral_cells(tmp_path, stated):
    cell = CELL.format(5, 5, 5, 110, 110) + "_cell_angle_gamma 110\n"
    crystal = one(tmp_path, cell, stated, SITES + "Fe 0 0 0\nO 0.2 0.2 0.2\n")
    assert len(crystal.atomic_number) == 3 and crystal.space_group_published.tolist() == [166]


@pytest.mark.parametrize(("setting", "place"), [(":1", 0.0), (" S", 0.0), (":2", 0.125), (" Z", 0.125)])
def test_origin_choices(tmp_path, setting, place):
    silicon = one(
        tmp_path,
        CUBIC,
        f"_symmetry_space_group_name_H-M 'F d -3 m{setting}'",
        SITES + f"Si1 {place} {place} {place}\n",
    )
    assert len(silicon.atomic_number) == 8


def test_operators_of_supercells(tmp_path):
    listed = OPERATORS + "x,y,z\nx+1/5,y,z\nx+2/5,y,z\nx+3/5,y,z\nx+4/5,y,z\n"
    row = one(tmp_path, CUBIC, listed, SITES + "Fe 0.1 0 0\n")
    np.testing.assert_allclose(row.fractional[:, 0].sort().values, [0.1, 0.3, 0.5, 0.7, 0.9])


def test_images_near_a_special_position_become_one_at_their_mean(tmp_path):
    cell = CELL.format(10, 10, 10, 90, 90) + "_cell_angle_gamma 120\n"
    # 0.3333 is 0.0003 Angstrom off the threefold axis, where images fall together; 0.9999 is by a border
    threefold = OPERATORS + "x,y,z\n-y,x-y,z\n-x+y,-x,z\n"
    atoms = one(tmp_path, cell, threefold, SITES + "O 0.3333 0.6667 0.5\nC 0.9999 0.0001 0.1\nN 0.2 0.1 0\n")
    assert atoms.atomic_number.tolist() == [8, 6, 7, 7, 7]
    np.testing.assert_allclose(atoms.fractional[0], [1 / 3, 2 / 3, 0.5], atol=1e-12)
    nearest = atoms.fractional[1] - atoms.fractional[1].round()
    np.testing.assert_allclose(nearest, [0, 0, 0.1], atol=1e-12)
    mirror = OPERATORS + "x,y,z\n-x,y,z\n"
    for x, n_atoms in ((0.0004, 1), (0.0006, 2)):  # 0.008 and 0.012 Angstrom between the images
        upright = cell.replace("gamma 120", "gamma 90")
        assert len(one(tmp_path, upright, mirror, SITES + f"O {x} 0.3 0.2\n").atomic_number) == n_atoms


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_same_places_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    lattice = np.diag(rng.uniform(2, 30, 3)) + rng.normal(0, 1.0, (3, 3))
    centres = rng.uniform(0, 1, (12, 3))
    centres[:4] = rng.integers(0, 3, (4, 3)) / 3.0
    owner = rng.integers(0, 12, 60)
    jitter = rng.uniform(-0.002, 0.002, (60, 3)) @ np.linalg.inv(lattice)
    fractional = cif._wrap(centres[owner] + jitter)
    label = rng.integers(0, 2, 60)
    first = cif._same_places(fractional, lattice, label)
    shift = fractional[:, None] - fractional
    near = np.linalg.norm((shift - np.round(shift)) @ lattice, axis=-1) < 0.01
    near &= label[:, None] == label
    # clusters are 0.007 Angstrom wide at most, so nearness is transitive but for centres that meet by chance
    np.testing.assert_array_equal(first, near.argmax(1))


def test_mixed_and_copied_sites(tmp_path):
    occupied = SITES + "_atom_site_occupancy\n"
    mixed = one(
        tmp_path, CUBIC, P1, occupied + "Mg1 0.1 0.2 0.3 0.4(1)\nFe1 .10001 0.2 0.3 0.6\nO 0.5 0 0 .\n"
    )
    assert mixed.atomic_number.tolist() == [12, 26, 8]
    assert mixed.occupancy.tolist() == [0.4, 0.6, 1.0]
    assert torch.equal(mixed.fractional[0], mixed.fractional[1])
    valences = one(tmp_path, CUBIC, P1, occupied + "Fe1 0 0 0 0.4\nFe2 0 0 0 0.6\n")
    assert valences.occupancy.tolist() == [0.4, 0.6]
    overshoot = one(tmp_path, CUBIC, P1, occupied + "Fe1 0 0 0 0.55\nMg1 0 0 0 0.54\n")
    assert overshoot.occupancy.tolist() == [0.55, 0.54]
    twice = one(tmp_path, CUBIC, P1, occupied + "Fe1 0 0 0 0.9\nFe1 0 0 0 0.9\n")
    assert twice.occupancy.tolist() == [0.9]
    everything = (
        SITES + "Na 0 0 0\nNa 0 .5 .5\nNa .5 0 .5\nNa .5 .5 0\nCl .5 .5 .5\nCl .5 0 0\nCl 0 .5 0\nCl 0 0 .5\n"
    )
    salt = one(tmp_path, CUBIC, "_symmetry_space_group_name_H-M 'F m -3 m'", everything)
    assert salt.atomic_number.sort().values.tolist() == [11] * 4 + [17] * 4


TYPED = SITES + "_atom_site_type_symbol\n"


@pytest.mark.parametrize(
    ("label", "symbol", "number"),
    [
        ("A", "Fe", 26),
        ("A", "Fe3+", 26),
        ("A", "fe+3", 26),
        ("A", "FE", 26),
        ("A", "O2-", 8),
        ("A", "O-2", 8),
        ("A", "Cl1-", 17),
        ("A", "Si0+", 14),
        ("A", "Mn2.5+", 25),
        ("A", "C4", 6),
        ("H1", "D", 1),
        ("D1", ".", 1),
        ("Fe1", "?", 26),
        ("FE1", ".", 26),
        ("SI(1)", ".", 14),
        ("CA1", ".", 6),
        ("Ca1", ".", 20),
        ("CaM2a", ".", 20),
        ("AlT", ".", 13),
        ("OW1", ".", 8),
        ("OA1", ".", 8),
        ("Oco", ".", 8),
        ("w", ".", 74),
        ("Sr(1)", "?", 38),
    ],
)
def test_elements(tmp_path, label, symbol, number):
    atom = one(tmp_path, CUBIC, P1, TYPED + f"{label} 0 0 0 {symbol}\n")
    assert atom.atomic_number.tolist() == [number]


@pytest.mark.parametrize(
    ("label", "symbol", "message"),
    [
        ("Wat1", ".", "the group 'Wat1'"),
        ("W", "Wat", "the group 'Wat'"),
        ("O-H", "?", "the group 'O-H'"),
        ("O", "O-H", "the group 'O-H'"),
        ("Nh", ".", "the group 'Nh'"),
        ("O", "OH", "'OH'"),
        ("Q1", ".", "'Q1'"),
        ("X", "X", "'X'"),
        ("1", ".", "'1'"),
        (".", ".", "''"),
    ],
)
def test_what_is_no_element_is_rejected(tmp_path, label, symbol, message):
    why = reason(tmp_path, CUBIC, P1, TYPED + f"{label} 0 0 0 {symbol}\n")
    assert why.startswith("element: must be one element, got") and message in why


def test_displacements(tmp_path):
    u_to_b = 8 * math.pi**2
    for tag, value, b in [
        ("_atom_site_B_iso_or_equiv", "1.25(3)", 1.25),
        ("_atom_site_U_iso_or_equiv", "0.01(2)", 0.01 * u_to_b),
        ("_atom_site_u_iso_or_equiv", ".02", 0.02 * u_to_b),
        ("_atom_site_U_equiv", ".02", 0.02 * u_to_b),
        ("_atom_site_U_iso_or_equiv", "?", 0.0),
        ("_atom_site_U_iso_or_equiv", ".", 0.0),
    ]:
        atom = one(tmp_path, CUBIC, P1, SITES + f"{tag}\nFe1 0 0 0 {value}\n")
        assert atom.b_iso.tolist() == pytest.approx([b])


@pytest.mark.parametrize(("kind", "factor"), [("U", 8 * math.pi**2), ("B", 1.0)])
def test_anisotropic_displacements_mean_a_third_of_the_trace(tmp_path, kind, factor):
    cell = CELL.format(5, 7, 9, 75, 105) + "_cell_angle_gamma 115\n"
    aniso = "loop_\n_atom_site_aniso_label\n" + "".join(
        f"_atom_site_aniso_{kind}_{ij}\n" for ij in ("11", "22", "33", "12", "13", "23")
    )
    atoms = SITES + "_atom_site_U_iso_or_equiv\nFe1 0 0 0 ?\nO1 .5 0 0 0.01\nO2 .5 .5 .5 ?\n"
    packed = one(tmp_path, cell, P1, atoms, aniso + "O1 1 1 1 1 1 1\nFe1 .01 .02 .03(1) .004 -.002 .001\n")
    # Cartesian U = A N U N A^T, N the reciprocal lengths on the diagonal
    u = np.array([[0.01, 0.004, -0.002], [0.004, 0.02, 0.001], [-0.002, 0.001, 0.03]])
    columns = packed.lattice[0].numpy().T
    scaled = columns * np.linalg.norm(np.linalg.inv(columns), axis=1)
    expected = np.trace(scaled @ u @ scaled.T) / 3.0 * factor
    np.testing.assert_allclose(packed.b_iso, [expected, 0.01 * 8 * math.pi**2, 0.0], rtol=1e-9)


def test_lattice_has_the_stated_lengths_and_angles(tmp_path):
    cell = CELL.format(5, 7, 9, 75, 105) + "_cell_angle_gamma 115\n"
    lattice = one(tmp_path, cell, P1, SALT).lattice[0].numpy()
    lengths = np.linalg.norm(lattice, axis=1)
    cosines = (lattice @ lattice.T) / np.outer(lengths, lengths)
    np.testing.assert_allclose(lengths, [5, 7, 9])
    np.testing.assert_allclose(np.degrees(np.arccos(cosines[[1, 0, 0], [2, 2, 1]])), [75, 105, 115])
    assert lattice[0, 1] == lattice[0, 2] == lattice[1, 2] == 0.0


def test_angles_are_right_by_default(tmp_path):
    cell = "_cell_length_a 3\n_cell_length_b 4\n_cell_length_c 5\n_cell_angle_beta ?\n"
    np.testing.assert_allclose(one(tmp_path, cell, P1, SALT).lattice[0], np.diag([3.0, 4.0, 5.0]), atol=1e-12)


def test_blocks(tmp_path):
    text = f"data_global\n_publ_author X\ndata_a\n{CUBIC}{P1}{SALT}\n"
    structures, rejected = read(tmp_path, text)
    assert structures.ids == ["a.cif"] and rejected == []  # a block of authors is no structure
    text += "data_angles\n_atom_site_label Na\n"
    text += f"data_b\n_chemical_name_mineral ' Halite '\n{CUBIC}{P1}{SALT}\n"
    text += f"data_c\n{CUBIC}{P1}{SALT}Cl2 ? 0 0\n"
    structures, rejected = read(tmp_path, text)
    assert structures.ids == ["a.cif#a", "a.cif#b"] and structures.family == ["", "Halite"]
    assert rejected == [
        ("a.cif#angles", "atoms: must be listed with fractional coordinates, got none"),
        ("a.cif#c", "Cl2: coordinates: must be finite, below 1000, got ? 0 0"),
    ]


def test_block_names_of_several_words_and_byte_order_marks(tmp_path):
    structures, _ = read(tmp_path, f"\ufeffdata_ of a salt\n{CUBIC}{P1}{SALT}")
    assert structures.ids == ["a.cif"] and structures.formula == ["Na1Cl1"]


def test_text_of_other_encodings(tmp_path):
    assert (
        len(read(tmp_path, f"data_x\n_publ_author 'M\xfcller'\n{CUBIC}{P1}{SALT}".encode("latin-1"))[0]) == 1
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((CUBIC, P1), "atoms: must be listed with fractional coordinates, got none"),
        ((CUBIC, SALT), "symmetry: must be operators or a known space-group symbol, got 'none'"),
        ((CUBIC, "_symmetry_space_group_name_H-M 'Q 7'", SALT), "symmetry: must be .*, got 'Q 7'"),
        ((P1, SALT), "_cell_length_a: must be a finite number, got 'none'"),
        (
            (CUBIC.replace("a 5.6402", "a five"), P1, SALT),
            "_cell_length_a: must be a finite number, got 'five'",
        ),
        (
            (CUBIC.replace("a 5.6402", "a 0"), P1, SALT),
            r"_cell_length_a: must be in 0.1..10000 Angstrom, got 0",
        ),
        (
            (CUBIC.replace("gamma 90", "gamma 180"), P1, SALT),
            "_cell_angle_gamma: must be in 1..179 degrees, got 180",
        ),
        ((CELL.format(5, 5, 5, 20, 20) + "_cell_angle_gamma 170\n", P1, SALT), "cell: must have a volume"),
        ((CUBIC, OPERATORS + "x,y\n", SALT), "symmetry operator: must be like .*, got 'x,y'"),
        ((CUBIC, OPERATORS + "x,y,q\n", SALT), "symmetry operator: must be like"),
        ((CUBIC, OPERATORS + "x,y,z+1/0\n", SALT), "symmetry operator: must be like"),
        ((CUBIC, OPERATORS + "x,x,z\n", SALT), "symmetry operator: must be like"),
        ((CUBIC, OPERATORS + "2x,y,z\n", SALT), "symmetry operator: must be like"),
        ((CUBIC, OPERATORS + ".\n", SALT), "symmetry: must be operators or a known"),
        (
            (CUBIC.replace("a 5.6402", "a 6.5"), OPERATORS + "x,y,z\nz,x,y\n", SALT),
            "symmetry operators: must keep the cell within 5 %, got .*: those of another setting",
        ),
        (
            (CUBIC, P1, SITES + "_atom_site_U_iso_or_equiv\nNa 0 0 0 small\n"),
            "Na: _atom_site_U_iso_or_equiv: must be a finite number, got 'small'",
        ),
        ((CUBIC, OPERATORS + "x" + "+0" * 100 + ",y,z\n", SALT), "symmetry operator: must be like"),
        ((CUBIC, OPERATORS + "x,y,z\n" * 1025, SALT), "symmetry operators: must be at most 1024, got 1025"),
        ((CUBIC, P1, SITES + "Na 1e300 0 0\n"), "Na: coordinates: must be finite, below 1000, got 1e300 0 0"),
        ((CUBIC, P1, SITES + "Na zero 0 0\n"), "Na: coordinates: must be finite"),
        (
            (CUBIC, P1, SITES + "_atom_site_occupancy\nNa 0 0 0 1.5\n"),
            r"Na: occupancy: must be in 0..1.1, got 1.5",
        ),
        ((CUBIC, P1, SITES + "_atom_site_occupancy\nNa 0 0 0 -1\n"), "Na: occupancy: must be in"),
        (
            (CUBIC, P1, SITES + "Na 0 0 .5\nK 0 0 .5\n"),
            "occupancy: must sum to at most 1.1 at a place, got 2 at 0.0000 0.0000 0.5000",
        ),
        (
            (CUBIC, P1, SITES + "_atom_site_occupancy\nNa 0 0 0 .7\nNa 0 0 0 .5\n"),
            "occupancy: must sum to at most 1.1 at a place, got 1.2",
        ),
        ((CUBIC, P1, SITES + "_atom_site_occupancy\nNa 0 0 0 full\n"), "Na: occupancy: must be in"),
        ((CUBIC, P1, "_atom_site_fract_x 0\n_atom_site_label Na\n"), "atoms: must have three coordinates"),
        ((CUBIC, P1, SITES + "Na 0 0 0\n" * 20_001), "atoms: must be at most 20000, got 20001 listed"),
    ],
)
def test_blocks_that_cannot_be_are_rejected(tmp_path, parts, message):
    assert re.match(message, reason(tmp_path, *parts))


def test_expansion_is_bounded(tmp_path):
    rng = np.random.default_rng(0)
    general = "".join(
        f"Na {x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in np.sort(rng.uniform(0.01, 0.49, (2000, 3)))
    )
    group = "_symmetry_space_group_name_H-M '{}'"
    cell = CUBIC.replace("5.6402", "90")
    tetragonal = reason(tmp_path, cell, group.format("P 4/m m m"), SITES + general)
    assert re.fullmatch(
        r"atoms: must be at most 20000 a cell, got 3\d{4}", tetragonal
    )  # few on a mirror plane
    assert reason(tmp_path, cell, group.format("F m -3 m"), SITES + general).endswith(
        "2000 sites under 192 operators"
    )
    assert len(one(tmp_path, cell, group.format("P m m m"), SITES + general).atomic_number) == 16_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "blocks: must be 1..1000, got 0"),
        ("# nothing\n", "blocks: must be"),
        ("<html>", "file: must follow the CIF grammar"),
        ("data_x\nloop_\n_a\n_b\n1 2 3\n", "file: must follow the CIF grammar"),
        ("data_x\n_a 'open\n", "file: must follow the CIF grammar"),
        ("data_x\n;\nopen\n", "file: must follow the CIF grammar"),
        (b"data_x\n\x00\n", "file: must be text, got a NUL byte at 7"),
        (b"PK\x03\x04\x14\x00", "file: must be text, got a NUL byte at 5"),
        ("data_x\n" * 1001, r"(blocks: must be 1..1000, got 1001|file: must follow)"),
    ],
)
def test_files_that_are_no_cif_are_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=f"a.cif: {message}") as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"absent\.cif: file: must be readable"):
        read_cif(tmp_path / "absent.cif")
    os.mkfifo(tmp_path / "pipe.cif")
    for path in (tmp_path / "pipe.cif", tmp_path):
        with pytest.raises(InputError, match="file: must be a regular file"):
            read_cif(path)
    monkeypatch.setattr(bounded, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="size: must be at most 10 bytes, got"):
        read(tmp_path, "data_x\n" + CUBIC)


@QUICK
@given(st.data())
def test_damaged_text_never_raises_anything_else(tmp_path, data):
    text = bytearray(f"data_x\n{CUBIC}_symmetry_space_group_name_H-M 'F m -3 m'\n{P1}{SALT}".encode())
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(text) - 1))
        what = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if what == "flip":
            text[place] = data.draw(st.integers(1, 255))
        elif what == "cut":
            del text[place : place + data.draw(st.integers(1, 20))]
        else:
            text[place:place] = data.draw(
                st.sampled_from(
                    [b"loop_", b"data_", b"nan", b"'", b"\n;\n", b"1e999", b"?", b"-", b"\xff", b"save_"]
                )
            )
        text = text or bytearray(b" ")
    try:
        structures, rejected = read(tmp_path, bytes(text))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert len(structures) + len(rejected) >= 1
        assert torch.isfinite(structures.fractional).all()


def test_operator_forms():
    for text in ("x,y,z", " X , Y , Z ", "+x,+y,+z", "(x,y,z)", "x+1,y-1,z+0"):
        np.testing.assert_array_equal(cif._parse_operator(text)[:, :3], np.eye(3))
    expected = [[0, -1, 0, 0.5], [1, -1, 0, 1 / 3], [0, 0, -1, -2 / 3]]
    for text in ("-y+1/2,x-y+1/3,-z-2/3", "1/2-y,1/3+x-y,-2/3-z", "-1*y+0.5,x-y+.33333,-z-0.6667"):
        np.testing.assert_allclose(cif._parse_operator(text), expected, atol=1e-15)


def test_written_by_pymatgen_and_read_again_gives_the_same_lines(shared_data, tmp_path):
    rng = np.random.default_rng(11)
    compared = 0
    for name, n in (("inorganic_mp", 30), ("amcsd", 12), ("extra_structures", 8)):
        structures, _ = load_structures(shared_data / f"{name}.npz")
        small = (structures.offset.diff() <= 60).nonzero()[:, 0].numpy()
        for row in rng.permutation(small).tolist():
            source = structures[row]
            try:
                CifWriter(to_pymatgen(source), symprec=0.01).write_file(tmp_path / "a.cif")
            except (TypeError, ValueError):
                continue  # pymatgen itself refuses occupancies above 1
            read_again, rejected = read_cif(tmp_path / "a.cif")
            assert not rejected
            refined = Structure.from_file(tmp_path / "a.cif")  # standardised: not the source's own cell
            mine = to_pymatgen(read_again)
            distances = refined.lattice.get_all_distances(mine.frac_coords, refined.frac_coords)
            nearest = distances.argmin(1)
            assert sorted(nearest) == list(range(len(refined))) and distances.min(1).max() < 1e-3
            assert all(
                site.species.almost_equals(refined[i].species.element_composition)
                for site, i in zip(mine, nearest, strict=True)
            )
            lines, again = simulate_lines(source), simulate_lines(read_again)
            first = torch.linspace(5, 90, 851, dtype=torch.float64)
            # symprec moves atoms and axes by up to 0.01 Angstrom: compare the sums of lines to their left
            for one_lines in (lines, again):
                assert one_lines.status.tolist() == [0]
            sums = [
                (x.intensity * torch.sigmoid((first[:, None] - x.two_theta) / 0.1)).sum(1) / x.intensity.sum()
                for x in (lines, again)
            ]
            assert (sums[0] - sums[1]).abs().max() < 0.02, source.ids
            n -= 1
            compared += 1
            if n == 0:
                break
    assert compared == 50
