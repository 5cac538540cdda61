"""Wyckoff positions of all space groups, worked out from the operations that spglib lists.

Everything is in the primitive cell of the standard setting, so that centrings cost nothing. Not for finding the
group of a structure (`xrdfast.data.labels`) or for filling positions with atoms (`xrdfast.data.crystals`).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xrdfast.symmetry import N_SPACE_GROUPS, SYMBOLS

_CLOSE = 1e-6
# Primitive vectors as columns, in the conventional cell; spglib's choices, R obverse on hexagonal axes.
_PRIMITIVE = {
    "P": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "A": [[1, 0, 0], [0, 1 / 2, 1 / 2], [0, -1 / 2, 1 / 2]],
    "C": [[1 / 2, 1 / 2, 0], [-1 / 2, 1 / 2, 0], [0, 0, 1]],
    "I": [[-1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [1 / 2, 1 / 2, -1 / 2]],
    "F": [[0, 1 / 2, 1 / 2], [1 / 2, 0, 1 / 2], [1 / 2, 1 / 2, 0]],
    "R": [[2 / 3, -1 / 3, -1 / 3], [1 / 3, 1 / 3, -2 / 3], [1 / 3, 1 / 3, 1 / 3]],
}
# A point that lies on no symmetry element of any group, nor do its projections where they need not.
_GENERIC = np.array([0.13790817, 0.34172953, 0.71936419])
_NEAR = np.array(
    list(itertools.product(range(-2, 3), repeat=3)), dtype=np.float64
)  # lattice vectors around a cell


@dataclass(frozen=True)
class WyckoffPositions:
    """The k positions of a space group of n operations, by rising dimension, then rising multiplicity.

    A point r anywhere gives the point P r + t on a position; its orbit is W x + w over the position's
    representatives. All in fractional coordinates of the primitive cell.

    Attributes:
        rotations, translations: (n, 3, 3) W and (n, 3) w, the identity first.
        projector, offset: (k, 3, 3) P and (k, 3) t.
        multiplicity: (k,) points of an orbit in the primitive cell.
        dimension: (k,) free coordinates, 0..3.
        representative: (k, n) one operation for each point of the orbit, the identity among them.
        to_conventional: (3, 3), x_conventional = T x_primitive; its columns are the primitive vectors.
    """

    rotations: NDArray[np.float64]
    translations: NDArray[np.float64]
    projector: NDArray[np.float64]
    offset: NDArray[np.float64]
    multiplicity: NDArray[np.int64]
    dimension: NDArray[np.int64]
    representative: NDArray[np.bool_]
    to_conventional: NDArray[np.float64]


@functools.lru_cache(maxsize=N_SPACE_GROUPS)
def wyckoff_positions(space_group_number: int) -> WyckoffPositions:
    """All Wyckoff positions of a group.

    A position is the set of points that some operations keep. The search begins with the general position, meets
    each position with the fixed points of each operation, and keeps one of every orbit of sets.

    Args:
        space_group_number: 1..230.

    Returns:
        `WyckoffPositions`; 1,731 over all groups, as in International Tables A.

    Raises:
        ValueError: for another number.

    Example:
        >>> wyckoff_positions(225).multiplicity.tolist()  # of Fm-3m, a quarter of the tables' 4, 4, 8, 24 ... 192
        [1, 1, 2, 6, 6, 8, 12, 12, 12, 24, 24, 48]
    """
    if not 1 <= space_group_number <= N_SPACE_GROUPS:
        raise ValueError(f"wyckoff_positions: space_group_number must be in 1..230, got {space_group_number}")
    rotations, translations, to_conventional = _primitive_operations(space_group_number)
    found = [_position(_GENERIC, rotations, translations)]
    for place in found:  # grows while it is gone through
        for point in _meetings(place, rotations, translations):
            candidate = _position(point, rotations, translations)
            if not any(_same(candidate, known, rotations, translations) for known in found):
                found.append(candidate)
    stabiliser = [place[2] for place in found]
    dimension = np.array([round(float(np.trace(place[0]))) for place in found])
    multiplicity = np.array([len(rotations) // int(kept.sum()) for kept in stabiliser])
    order = np.lexsort((np.arange(len(found)), multiplicity, dimension))
    representative = np.zeros((len(found), len(rotations)), dtype=bool)
    for row, place in enumerate(order):
        projector, offset, _ = found[place]
        images = rotations @ (projector @ _GENERIC + offset) + translations
        keys = np.round((images + _CLOSE) % 1.0, 5)
        representative[row, np.unique(keys, axis=0, return_index=True)[1]] = True
    return WyckoffPositions(
        rotations=rotations,
        translations=translations,
        projector=np.stack([found[i][0] for i in order]),
        offset=np.stack([found[i][1] for i in order]),
        multiplicity=multiplicity[order],
        dimension=dimension[order],
        representative=representative,
        to_conventional=to_conventional,
    )


_Place = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]  # P, t, which operations keep it


@functools.lru_cache(maxsize=1)
def _first_hall_numbers() -> dict[int, int]:
    """Hall number of spglib's standard setting: the first one of each group."""
    import spglib

    first: dict[int, int] = {}
    for hall_number in range(1, 531):
        first.setdefault(spglib.get_spacegroup_type(hall_number).number, hall_number)
    return first


def _primitive_operations(
    number: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """W (n, 3, 3), w (n, 3) in 0..1 and T: one operation for each rotation, the identity first."""
    import spglib

    listed = spglib.get_symmetry_from_database(_first_hall_numbers()[number])
    to_conventional = np.array(_PRIMITIVE[SYMBOLS[number - 1][0]])
    inverse = np.linalg.inv(to_conventional)
    rotations = np.round(inverse @ listed["rotations"] @ to_conventional)
    translations = np.round(24.0 * (listed["translations"] @ inverse.T)) / 24.0 % 1.0
    # Operations that differ by a centring are the same one here.
    first = np.sort(np.unique(rotations.reshape(-1, 9), axis=0, return_index=True)[1])
    return rotations[first], translations[first], to_conventional


def _position(point: NDArray[np.float64], rotations: NDArray, translations: NDArray) -> _Place:
    """The set of points that the operations keeping this one keep: their mean x -> P x + t projects on it."""
    moved = rotations @ point + translations - point
    shift = np.round(moved)
    kept = np.abs(moved - shift).max(axis=1) < _CLOSE
    return rotations[kept].mean(axis=0), (translations - shift)[kept].mean(axis=0), kept


def _meetings(place: _Place, rotations: NDArray, translations: NDArray) -> NDArray[np.float64]:
    """A generic point on each meeting of a set with the fixed points of an operation and a lattice vector.

    x = P r + t is fixed where (1 - W) P r = w + n - (1 - W) t, solved next to the generic r.
    """
    projector, offset, kept = place
    moved = np.eye(3) - rotations[~kept]
    system = moved @ projector  # (n, 3, 3)
    wanted = (translations[~kept] - moved @ offset)[:, None] + _NEAR  # (n, 125, 3)
    missing = wanted - (system @ _GENERIC)[:, None]
    step = missing @ np.linalg.pinv(system, rcond=1e-9).transpose(0, 2, 1)
    solved = np.abs(step @ system.transpose(0, 2, 1) - missing).max(axis=2) < _CLOSE
    points = (_GENERIC + step[solved]) @ projector.T + offset
    if not len(points):
        return points
    points = (points + _CLOSE) % 1.0 - _CLOSE
    return points[np.unique(np.round(points, 5), axis=0, return_index=True)[1]]


def _same(one: _Place, other: _Place, rotations: NDArray, translations: NDArray) -> bool:
    """Whether an operation and a lattice vector carry one set onto the other."""
    if one[2].sum() != other[2].sum():
        return False
    turned = rotations @ other[0] @ np.linalg.inv(rotations)
    moved = rotations @ other[1] + translations - (turned @ translations[:, :, None])[:, :, 0]
    alike = np.abs(turned - one[0]).max(axis=(1, 2)) < _CLOSE
    if not alike.any():
        return False
    across = np.eye(3) - one[0]
    gap = (one[1] - moved[alike]) @ across.T  # both t lie across the set: P t = 0
    gap -= np.round(gap) @ across.T
    return bool((np.abs(gap[:, None] - _NEAR @ across.T).max(axis=2) < _CLOSE).any())
