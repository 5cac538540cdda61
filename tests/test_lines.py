"""Lines of one structure with standard hkl, against gemmi's extinction rules and pymatgen's positions."""

from __future__ import annotations

import dataclasses

import gemmi
import numpy as np
import pytest
import torch

from xrdfast.data.structures import PackedStructures, analyse_symmetry, from_arrays
from xrdfast.demo import load_prototypes
from xrdfast.lines import simulate_structure_lines


@pytest.fixture(scope="module")
def prototypes() -> PackedStructures:
    """Every fourth prototype, those left out whose group depends on the tolerance."""
    every = load_prototypes()
    found = analyse_symmetry(every[torch.arange(0, len(every), 4)], n_workers=1)
    return found[found.space_group_001 == found.space_group_01]


def test_no_line_is_named_by_an_absent_reflection(prototypes: PackedStructures) -> None:
    n_lines = 0
    for one in prototypes:
        group = gemmi.find_spacegroup_by_number(int(one.space_group_01[0]))
        operations = (gemmi.SpaceGroup(f"{group.hm}:H") if group.ext == "H" else group).operations()
        hkl = simulate_structure_lines(one, wavelength=1.54056).hkl
        n_lines += len(hkl)
        assert [h for h in hkl.tolist() if operations.is_systematically_absent(h)] == []
    assert n_lines > 3000


def test_hkl_give_the_d_spacings_of_the_standard_cell(prototypes: PackedStructures) -> None:
    for one in prototypes[:20]:
        lines = simulate_structure_lines(one, wavelength=1.54056)
        # columns of the basis: (a b c) = (a_s b_s c_s) P, so that x_s = P x
        standard = np.linalg.inv(one.to_standard[0].numpy()).T @ one.lattice[0].numpy()
        d_spacing = 1.0 / np.linalg.norm(lines.hkl @ np.linalg.inv(standard).T, axis=1)
        np.testing.assert_allclose(d_spacing, lines.d_spacing, rtol=2e-4)  # merged lines, symprec 0.1


def rock_salt() -> PackedStructures:
    """NaCl in its primitive cell."""
    atoms = (np.array([11, 17]), np.array([[0.0, 0, 0], [0.5, 0.5, 0.5]]), np.ones(2), np.zeros(2))
    cell = 2.82 * (np.ones((3, 3)) - np.eye(3))
    return analyse_symmetry(from_arrays([cell], [atoms], ["NaCl"]), n_workers=1)


def test_a_primitive_cell_is_named_in_the_conventional_one() -> None:
    lines = simulate_structure_lines(rock_salt(), wavelength=1.54056, two_theta_max=60.0)
    assert lines.hkl.tolist() == [[1, 1, 1], [2, 0, 0], [2, 2, 0], [3, 1, 1], [2, 2, 2]]
    np.testing.assert_allclose(lines.d_spacing[1], 2.82, rtol=1e-12)


def test_without_a_standard_setting_the_given_cell_names_the_lines() -> None:
    structure = rock_salt()
    plain = dataclasses.replace(structure, to_standard=torch.full((1, 3, 3), torch.nan, dtype=torch.float64))
    lines = simulate_structure_lines(plain, wavelength=1.54056, two_theta_max=35.0)
    # in the primitive cell the planes 111 of the conventional one are 100 and its like
    np.testing.assert_allclose(lines.d_spacing[0], 5.64 / 3**0.5, rtol=1e-12)
    assert np.abs(lines.hkl[0]).max() == 1


@pytest.mark.parametrize("n", [0, 2])
def test_one_structure_is_needed(prototypes: PackedStructures, n: int) -> None:
    with pytest.raises(ValueError, match="structure: must be one"):
        simulate_structure_lines(prototypes[:n], wavelength=1.54056)


def test_a_structure_that_does_not_diffract_says_why() -> None:
    with pytest.raises(ValueError, match="no reflection between the limits"):
        simulate_structure_lines(rock_salt(), wavelength=1.54056, two_theta_max=6.0)
