"""Moved sites: the group stays, only free coordinates change, relatives keep their fold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from xrdfast.data.crystals import generate_crystals
from xrdfast.data.structures import PackedStructures, analyse_symmetry, from_arrays
from xrdfast.data.variants import move_sites


def packed(lattices: list[np.ndarray], sites: list[list[tuple]], fold: int = 3) -> PackedStructures:
    """Structures of rows (Z, x, y, z, occupancy), analysed."""
    rows = [np.array(one, dtype=float) for one in sites]
    atoms = [(r[:, 0].astype(int), r[:, 1:4], r[:, 4], np.zeros(len(r))) for r in rows]
    found = from_arrays(lattices, atoms, [f"s{i}" for i in range(len(rows))])
    found = dataclasses.replace(found, fold=torch.full((len(rows),), fold, dtype=torch.int8))
    return analyse_symmetry(found, n_workers=1)


RUTILE = [(22, 0, 0, 0, 1), (22, 0.5, 0.5, 0.5, 1)] + [
    (8, *place, 1)
    for place in ((0.305, 0.305, 0), (0.695, 0.695, 0), (0.195, 0.805, 0.5), (0.805, 0.195, 0.5))
]
SALT = [(11, 0, 0, 0, 1), (17, 0.5, 0.5, 0.5, 1)]
TETRAGONAL = np.diag([4.594, 4.594, 2.958])


def test_only_the_free_coordinate_of_rutile_moves():
    (structure,) = packed([TETRAGONAL], [RUTILE])
    variants = move_sites(structure, 5, n_workers=1)
    assert len(variants) == 5 and variants.space_group_01.tolist() == [136] * 5
    shifts = []
    for one in variants:
        move = (one.fractional - structure.fractional).numpy()
        np.testing.assert_allclose(move[:2], 0.0, atol=1e-12)
        shift = move[2, 0]
        signs = np.array([[1, 1, 0], [-1, -1, 0], [-1, 1, 0], [1, -1, 0]])
        np.testing.assert_allclose(move[2:], shift * signs, atol=1e-12)
        shifts.append(shift)
    assert len(set(shifts)) == 5 and 0.0 < np.abs(shifts).max() * 4.594 <= 2 * 0.08 + 1e-9
    assert variants.ids == [f"s0/moved-{k}" for k in range(5)] and variants.fold.tolist() == [3] * 5


def test_structures_without_freedom_or_in_validation_have_none():
    salt = packed([2.82 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])], [SALT])
    assert salt.space_group_01.tolist() == [225]
    assert len(move_sites(salt, 3, n_workers=1)) == 0
    assert len(move_sites(packed([TETRAGONAL], [RUTILE], fold=0), 3, n_workers=1)) == 0


def test_mixed_sites_stay_together():
    mixed = [(z, x, y, z_, share) for z_old, x, y, z_, _ in RUTILE for z, share in (
        ((8, 0.6), (9, 0.4)) if z_old == 8 else ((z_old, 1.0),)
    )]  # fmt: skip
    structure = packed([TETRAGONAL], [mixed])
    variants = move_sites(structure, 2, n_workers=1)
    assert variants.space_group_01.tolist() == [136, 136]
    for one in variants:
        place = one.fractional.numpy()[2:]
        assert (place[::2] == place[1::2]).all()
        assert not np.allclose(place, structure.fractional.numpy()[2:])


def test_spglib_gives_the_same_number_in_every_crystal_system():
    structures, _ = generate_crystals((1, 2, 14, 33, 92, 122, 152, 161, 180, 198, 215), 2)
    variants = move_sites(structures, 2, folds_left_alone=(), n_workers=1)
    assert (
        len(variants) > 30
    )  # those that would have gained symmetry, or lost their distance to it, are dropped
    parent = {name: row for row, name in enumerate(structures.ids)}
    rows = [parent[name.partition("/moved-")[0]] for name in variants.ids]
    blank = torch.zeros(len(variants), dtype=torch.int16)
    again = analyse_symmetry(
        dataclasses.replace(variants, space_group_001=blank, space_group_01=blank), n_workers=1
    )
    assert torch.equal(again.space_group_001, structures.space_group_01[rows])
    assert torch.equal(again.space_group_01, structures.space_group_01[rows])
    assert torch.equal(variants.fold, structures.fold[rows])
    assert torch.equal(variants.lattice, structures.lattice[rows])


def test_one_seed_one_set():
    structure = packed([TETRAGONAL], [RUTILE])
    first, again, other = (move_sites(structure, 2, seed=seed, n_workers=1) for seed in (1, 1, 2))
    assert torch.equal(first.fractional, again.fractional)
    assert not torch.equal(first.fractional, other.fractional)


def test_bad_arguments_are_refused():
    structure = packed([TETRAGONAL], [RUTILE])
    with pytest.raises(ValueError, match="move_sites: n_variants must be >= 1, got 0"):
        move_sites(structure, 0)
    for sigma in (0.0, 0.6, float("nan")):
        with pytest.raises(ValueError, match=r"move_sites: sigma must be in 0..0.5 Angstrom"):
            move_sites(structure, 1, sigma=sigma)
