"""Synthetic crystals: the group that was asked for, distances kept, one seed one set, statistics followed."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from xrdfast.data.crystals import CrystalStatistics, _radii, _squared_distances, generate_crystals
from xrdfast.data.generate import generate_store
from xrdfast.data.store import PatternStore
from xrdfast.data.structures import PackedStructures, analyse_symmetry
from xrdfast.symmetry import CRYSTAL_SYSTEM_INDEX

# Every crystal system and centring, polar and chiral groups; none of 89, and few of 93 and 207, are in the shared sets.
GROUPS = (1, 2, 9, 62, 89, 98, 143, 146, 177, 196, 207, 227)
# Small cells, where most of the time is not spglib's.
SMALL = dataclasses.replace(CrystalStatistics(), n_atoms=(4.0, 12.0))


@pytest.fixture(scope="module")
def crystals() -> PackedStructures:
    found, short = generate_crystals(GROUPS, 3, statistics=SMALL)
    assert short == []
    return found


def test_spglib_confirms_the_groups(crystals):
    assert crystals.space_group_published.tolist() == [number for number in GROUPS for _ in range(3)]
    blank = torch.zeros_like(crystals.space_group_01)
    again = analyse_symmetry(
        dataclasses.replace(crystals, space_group_001=blank, space_group_01=blank), n_workers=1
    )
    for name in ("space_group_001", "space_group_01"):
        assert torch.equal(getattr(again, name), crystals.space_group_published)
        assert torch.equal(getattr(crystals, name), crystals.space_group_published)
    assert crystals.faults() == {}
    assert len(set(crystals.ids)) == len(crystals)


def test_atoms_keep_their_distances(crystals):
    shifts = np.array(list(itertools.product(range(-3, 4), repeat=3)))
    for one in crystals:
        lattice, place = one.lattice[0].numpy(), one.fractional.numpy()
        radius = _radii()[one.atomic_number.numpy()]
        gap = place[:, None] - place
        gap = (gap - np.round(gap))[:, :, None] + shifts
        distance = np.linalg.norm(gap @ lattice, axis=3)
        distance[distance < 1e-9] = np.inf  # an atom and itself; two atoms at one place fail below
        assert np.isinf(distance).sum() == len(place)
        assert (distance.min(axis=2) >= 0.75 * (radius[:, None] + radius) - 1e-6).all()


def test_cells_have_the_shape_of_their_system(crystals):
    free = (6, 4, 3, 2, 2, 2, 1)
    for one in crystals:
        metric = (one.lattice[0] @ one.lattice[0].T).numpy()
        w = one.rotations.numpy().astype(float)
        np.testing.assert_allclose(
            w.transpose(0, 2, 1) @ metric @ w, metric[None].repeat(len(w), 0), atol=1e-6
        )
        basis = np.array([m + m.T for m in np.eye(9).reshape(9, 3, 3)]).reshape(9, 9)
        kept = [(w.transpose(0, 2, 1) @ m.reshape(3, 3) @ w).mean(axis=0).ravel() for m in basis]
        system = CRYSTAL_SYSTEM_INDEX[int(one.space_group_01[0]) - 1]
        assert np.linalg.matrix_rank(np.array(kept), tol=1e-6) == free[system]


def test_one_seed_one_set_whatever_else_is_asked_for(crystals):
    alone, _ = generate_crystals([62], 3, statistics=SMALL)
    same = crystals[crystals.space_group_published == 62]
    assert torch.equal(alone.fractional, same.fractional) and alone.ids == same.ids
    other, _ = generate_crystals([62], 3, statistics=SMALL, seed=1)
    assert other.formula != alone.formula


def test_none_is_in_the_fold_of_validation(crystals, tmp_path):
    assert set(crystals.fold.tolist()) <= set(range(1, 10))
    assert all(formula.endswith(" (synthetic)") for formula in crystals.formula)  # no real one's relatives
    path = tmp_path / "synthetic.store.safetensors"
    assert generate_store(crystals[::3], path) == []
    store = PatternStore.open(path)
    assert store.space_group_01.tolist() == list(GROUPS)
    assert (store.select((0,))).numel() == 0


def test_statistics_come_back():
    """What was drawn is found again, up to what distances and groups sort out."""
    wanted = CrystalStatistics(
        packing=(0.3, 0.34),
        axis_ratio=(0.1, 0.5),
        angle_deviation=(5.0, 15.0),
        n_atoms=(6.0, 10.0),
        n_elements=(0.0, 1.0, 3.0),
        element=tuple(float(z in (8, 14, 22)) for z in range(1, 99)),
    )
    crystals, _ = generate_crystals([2, 14, 33, 113], 20, statistics=wanted)
    found = CrystalStatistics.of(crystals)
    assert 0.3 <= found.packing[0] <= found.packing[-1] <= 0.34
    assert found.axis_ratio[6] > 0.0  # a third may be exchanged by standard settings
    assert 4.0 <= found.n_atoms[0] <= found.n_atoms[-1] <= 10.0
    assert sum(found.n_elements[3:]) == 0.0  # fewer than wanted where there are fewer sites
    assert set(np.flatnonzero(found.element) + 1) == {8, 14, 22}


def test_statistics_need_structures(crystals):
    with pytest.raises(ValueError, match="CrystalStatistics: structures must be at least 20 whole ones"):
        CrystalStatistics.of(crystals[:5])


def test_the_nearest_image_is_found_in_skewed_cells():
    rng = np.random.default_rng(3)
    half = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])  # F: angles of 60 degrees
    metric = np.stack([cell @ cell.T for cell in (half, np.eye(3), half @ np.diag([1.0, 1.3, 1.6]))])
    point, others = rng.random((3, 3)), rng.random((3, 40, 3))
    others[:, 0] = point
    got = _squared_distances(point, others, metric)
    shifts = np.array(list(itertools.product(range(-4, 5), repeat=3)))
    for row in range(3):
        gap = (others[row] - point[row])[:, None] + shifts
        squared = np.einsum("mti,ij,mtj->mt", gap, metric[row], gap)
        squared[0, len(shifts) // 2] = np.inf
        np.testing.assert_allclose(got[row], squared.min(axis=1), rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1), "space_group_numbers must be in 1..230, got none"),
        (([231], 1), r"space_group_numbers must be in 1..230, got \[231\]"),
        (([1], 0), "count must be >= 1, got 0"),
        (([1], 1, 0.1), "closest must be in 0.3..1, got 0.1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    numbers, count, *closest = arguments
    with pytest.raises(ValueError, match=f"generate_crystals: {message}"):
        generate_crystals(numbers, count, **({"closest": closest[0]} if closest else {}))
