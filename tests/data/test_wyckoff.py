"""Wyckoff positions: their number in all groups, orbits, and spglib's multiplicities."""

from __future__ import annotations

import numpy as np
import pytest

from xrdfast.data.wyckoff import wyckoff_positions

SOME = (1, 2, 5, 15, 43, 62, 89, 109, 122, 141, 155, 166, 176, 194, 199, 206, 214, 220, 227, 230)
# Of the conventional cell, from International Tables A, as multisets.
TABLES = {
    2: [1] * 8 + [2],
    62: [4, 4, 4, 8],
    166: [3, 3, 6, 9, 9, 18, 18, 18, 36],
    225: [4, 4, 8, 24, 24, 32, 48, 48, 48, 96, 96, 192],
    230: [16, 16, 24, 24, 32, 48, 48, 96],
}


def test_there_are_as_many_as_in_the_tables():
    assert sum(len(wyckoff_positions(number).multiplicity) for number in range(1, 231)) == 1731


@pytest.mark.parametrize("number", TABLES)
def test_multiplicities_are_those_of_the_tables(number):
    positions = wyckoff_positions(number)
    cells = round(1.0 / np.linalg.det(positions.to_conventional))
    assert sorted((cells * positions.multiplicity).tolist()) == TABLES[number]


@pytest.mark.parametrize("number", SOME)
def test_orbits_are_closed_and_without_repetition(number):
    positions = wyckoff_positions(number)
    assert (positions.rotations[0] == np.eye(3)).all() and (positions.translations[0] == 0.0).all()
    rng = np.random.default_rng(number)
    rows = zip(positions.projector, positions.offset, positions.representative, strict=True)
    for k, (projector, offset, chosen) in enumerate(rows):
        assert np.linalg.matrix_rank(projector) == positions.dimension[k]
        assert chosen[0] and chosen.sum() == positions.multiplicity[k]
        point = projector @ rng.random(3) + offset
        orbit = positions.rotations[chosen] @ point + positions.translations[chosen]
        every = positions.rotations @ point + positions.translations
        gap = every[:, None] - orbit
        near = np.abs(gap - np.round(gap)).max(axis=2) < 1e-9
        assert (
            near.sum(axis=1) == 1
        ).all()  # each image is one point of the orbit, and no two points are one
        stays = near[:, np.flatnonzero(chosen).tolist().index(0)].sum()
        assert stays * positions.multiplicity[k] == len(positions.rotations)


@pytest.mark.parametrize("number", [0, 231])
def test_other_numbers_are_refused(number):
    with pytest.raises(ValueError, match=r"wyckoff_positions: space_group_number must be in 1..230"):
        wyckoff_positions(number)
