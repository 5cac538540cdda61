"""Synthetic crystals of a wanted space group: random atoms on random Wyckoff positions of a plausible cell.

They fill the groups that have few real examples. Not for real structures (`xrdfast.data.structures`), and no chemistry:
only sizes of atoms, density, shape of the cell and number of elements are as in real crystals.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from xrdfast.data.structures import MAX_ATOMIC_NUMBER, PackedStructures, analyse_symmetry, from_arrays
from xrdfast.data.wyckoff import WyckoffPositions, wyckoff_positions
from xrdfast.symmetry import (
    CRYSTAL_SYSTEM_INDEX,
    CRYSTAL_SYSTEMS,
    LATTICE_CENTERING_INDEX,
    LATTICE_CENTERINGS,
)

_POINTS_OF_LATTICE = {"P": 1, "A": 2, "C": 2, "I": 2, "F": 4, "R": 3}
_SHARES = np.linspace(0.025, 0.975, 20)  # of the quantiles: what lies beyond is left to errors of databases
_BATCH = 256  # crystals tried at once: the widest arrays, 27 distances to 144 atoms each, are 8 MB
_MAX_SITES = 20
_FREEDOM = 4.0  # weight of a Wyckoff position for each free coordinate: crystals fill general positions most
_MAX_ATOMS = 96  # of a primitive cell: twice the largest orbit
_TRIES = 40  # places for a site before a crystal is given up
_MAX_ROUNDS = 60  # batches of a group before it is given up
_SHARE_KEPT = 0.05  # of a batch, below which the next ones begin with an atom on the general position
_FOLDS = 9  # 1..9: the fold that recipes validate on, 0, receives no synthetic crystal
# What `CrystalStatistics.of` found; see there.
# fmt: off
_PACKING = (
    0.14, 0.228, 0.282, 0.326, 0.359, 0.406, 0.448, 0.479, 0.505, 0.54, 0.574, 0.61, 0.64, 0.677, 0.716,
    0.751, 0.793, 0.832, 0.876, 0.991,
)
_AXIS_RATIO = (
    -1.22, -0.765, -0.61, -0.52, -0.381, -0.233, -0.114, -0.00604, 0.0371, 0.101, 0.167, 0.252, 0.339, 0.428,
    0.489, 0.572, 0.711, 0.886, 1.12, 1.56,
)
_ANGLE_DEVIATION = (
    0.229, 1.06, 2.13, 3.33, 4.38, 5.96, 8.27, 10.0, 11.5, 13.1, 14.4, 15.6, 17.6, 18.8, 20.4, 22.6, 25.8,
    29.1, 33.7, 35.7,
)
_N_ATOMS = (
    2.0, 4.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 13.0, 15.0, 17.0, 20.0, 22.0, 24.0, 28.0, 32.0, 36.0, 44.0,
    50.0,
)
_N_ELEMENTS = (0.034, 0.193, 0.51, 0.211, 0.044, 0.008, 0.0, 0.0)
_ELEMENT = (
    65, 0, 59, 4, 35, 56, 54, 378, 59, 0, 45, 35, 48, 62, 71, 83, 60, 0, 46, 56, 14, 21, 37, 25, 45, 47, 24,
    54, 62, 37, 30, 39, 32, 48, 20, 0, 30, 41, 21, 16, 17, 22, 2, 17, 25, 23, 22, 26, 39, 38, 37, 45, 29, 2,
    29, 68, 28, 32, 14, 9, 4, 21, 16, 11, 12, 21, 23, 18, 15, 18, 10, 5, 14, 11, 5, 6, 14, 22, 25, 19, 24, 30,
    36, 0, 0, 0, 0, 0, 3, 8, 1, 17, 0, 3, 0, 0, 0, 0,
)
# fmt: on
_IMAGES = np.array(list(itertools.product((-1, 0, 1), repeat=3)), dtype=np.float64)
_SELF = len(_IMAGES) // 2  # the image that is no translation


@dataclass(frozen=True)
class CrystalStatistics:
    """What real crystals look like: quantiles at 2.5, 7.5, ... 97.5 %, drawn from evenly in between, and frequencies.

    Attributes:
        packing: share of the volume that spheres of the covalent radii fill.
        axis_ratio: ln(b / a) and ln(c / a) of the standard conventional cell, where the crystal system leaves it free.
        angle_deviation: degrees from 90 of the angles that it leaves free.
        n_atoms: sites in the primitive cell.
        n_elements: relative frequency of 1, 2, 3 ... elements.
        element: relative frequency of structures with atomic number 1, 2, 3 ...

    Note:
        The defaults are what `of` finds in 1,000 structures drawn evenly, 750 from the inorganic set of the Materials
        Project and 250 from the American Mineralogist database, of which 913 are without mixed sites.
    """

    packing: tuple[float, ...] = _PACKING
    axis_ratio: tuple[float, ...] = _AXIS_RATIO
    angle_deviation: tuple[float, ...] = _ANGLE_DEVIATION
    n_atoms: tuple[float, ...] = _N_ATOMS
    n_elements: tuple[float, ...] = _N_ELEMENTS
    element: tuple[float, ...] = _ELEMENT

    @classmethod
    def of(cls, structures: PackedStructures) -> CrystalStatistics:
        """Statistics of structures.

        Args:
            structures: with labels and standardising transformations (`analyse_symmetry`); those without, and those
                with mixed or partly occupied sites, are left out. Where no structure has a free axis ratio or angle,
                these keep the defaults.

        Raises:
            ValueError: for fewer than 20 such structures.
        """
        radius = _radii()
        rows: dict[str, list[float]] = {"packing": [], "axis_ratio": [], "angle_deviation": [], "n_atoms": []}
        n_elements, element = np.zeros(8), np.zeros(MAX_ATOMIC_NUMBER)
        for one in structures:
            label, to_standard = int(one.space_group_01[0]), one.to_standard[0].numpy()
            kinds = one.atomic_number.numpy().astype(np.int64)
            whole = bool((one.occupancy > 0.99).all()) and len(kinds) > 0
            if not (whole and label and np.isfinite(to_standard).all()):
                continue
            lattice = one.lattice[0].numpy()
            standard = np.linalg.inv(to_standard).T @ lattice  # rows; x_standard = P x
            volume = abs(np.linalg.det(lattice))
            points = _POINTS_OF_LATTICE[LATTICE_CENTERINGS[LATTICE_CENTERING_INDEX[label - 1]]]
            primitive = abs(np.linalg.det(standard)) / points
            rows["packing"].append(_sphere_volume(radius[kinds]).sum() / volume)
            rows["n_atoms"].append(len(kinds) * primitive / volume)
            edge = np.linalg.norm(standard, axis=1)
            system = CRYSTAL_SYSTEMS[CRYSTAL_SYSTEM_INDEX[label - 1]]
            if system != "cubic":
                rows["axis_ratio"].append(np.log(edge[2] / edge[0]))
            if system in ("triclinic", "monoclinic", "orthorhombic"):
                rows["axis_ratio"].append(np.log(edge[1] / edge[0]))
            if system in ("triclinic", "monoclinic"):
                pairs = ((1, 2), (0, 2), (0, 1)) if system == "triclinic" else ((0, 2),)
                cosines = [standard[i] @ standard[j] / (edge[i] * edge[j]) for i, j in pairs]
                rows["angle_deviation"] += [abs(90.0 - np.degrees(np.arccos(cosine))) for cosine in cosines]
            distinct = np.unique(kinds)
            n_elements[min(len(distinct), len(n_elements)) - 1] += 1
            element[distinct - 1] += 1
        if len(rows["packing"]) < len(_SHARES):
            raise ValueError(
                f"CrystalStatistics: structures must be at least {len(_SHARES)} whole ones with a space group, "
                f"got {len(rows['packing'])}"
            )
        quantiles = {n: tuple(np.quantile(values, _SHARES).tolist()) for n, values in rows.items() if values}
        return cls(**quantiles, n_elements=tuple(n_elements.tolist()), element=tuple(element.tolist()))


def generate_crystals(
    space_group_numbers: Sequence[int],
    count: int,
    *,
    seed: int = 0,
    statistics: CrystalStatistics | None = None,
    closest: float = 0.75,
    n_workers: int | None = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[PackedStructures, list[int]]:
    """Random crystals of wanted space groups, each confirmed by spglib at 0.01 and at 0.1 Angstrom.

    Elements are drawn; sites fill Wyckoff positions, drawn with weight 4^(free coordinates), until the drawn number of
    atoms is reached (a position without freedom once); the cell follows from packing and shape; then each site is
    placed at random until it keeps its distances. A crystal that turns out to have more symmetry is dropped.

    Args:
        space_group_numbers: 1..230.
        count: crystals of each.
        seed: one seed gives the same crystals; a group's do not depend on the other groups asked for.
        statistics: None for the default.
        closest: shortest distance of two atoms, as share of the sum of their covalent radii (Cordero et al.).
        n_workers: processes of spglib, started anew for each batch: several pay for large cells alone.
        progress: called with (groups done, groups in all).

    Returns:
        Primitive cells, groups in rising order, with labels, rotations, formulas marked as synthetic and a fold in 1..9
        each (none in fold 0, which recipes validate on); and the groups that `_MAX_ROUNDS` batches could not fill.

    Raises:
        ValueError: for numbers, a count or a share outside these rules.

    Source:
        Fredericks et al., Comput. Phys. Commun. 261, 107810 (2021): random crystals by Wyckoff positions; radii:
        Cordero et al., Dalton Trans. 2832 (2008), through gemmi.
    """
    numbers = sorted(set(space_group_numbers))
    if not numbers or not 1 <= numbers[0] <= numbers[-1] <= 230:
        raise ValueError(f"generate_crystals: space_group_numbers must be in 1..230, got {numbers or 'none'}")
    if count < 1:
        raise ValueError(f"generate_crystals: count must be >= 1, got {count}")
    if not 0.3 <= closest <= 1.0:
        raise ValueError(f"generate_crystals: closest must be in 0.3..1, got {closest}")
    statistics = statistics or CrystalStatistics()
    parts, short = [from_arrays([], [], [])], []
    for done, number in enumerate(numbers, 1):
        found, general_first = parts[0], False
        for turn in range(_MAX_ROUNDS):
            rng = np.random.default_rng([seed, number, turn])
            batch = _try_crystals(number, statistics, closest, general_first, rng)
            batch = analyse_symmetry(batch, n_workers=n_workers)
            batch = batch[(batch.space_group_001 == number) & (batch.space_group_01 == number)]
            general_first |= len(batch) < _SHARE_KEPT * _BATCH
            found = PackedStructures.concatenate([found, batch])
            if len(found) >= count:
                break
        else:
            short.append(number)
        found = found[:count]
        label = torch.full((len(found),), number, dtype=torch.int16)
        # Not the formula of any real structure: it would tie these crystals to that one's fold.
        formula = [f"{text} (synthetic)" for text in found.formula]
        fold = [1 + zlib.crc32(text.encode()) % _FOLDS for text in formula]
        ids = [f"synthetic/{number}/{k}" for k in range(len(found))]
        parts.append(
            dataclasses.replace(
                found,
                ids=ids,
                formula=formula,
                fold=torch.tensor(fold, dtype=torch.int8),
                space_group_published=label,
            )
        )
        if progress:
            progress(done, len(numbers))
    return PackedStructures.concatenate(parts), short


def _try_crystals(
    number: int, statistics: CrystalStatistics, closest: float, general_first: bool, rng: np.random.Generator
) -> PackedStructures:
    """One batch of a group; those whose atoms found no place are left out. Labels are not known yet."""
    positions = wyckoff_positions(number)
    site, element = _draw_sites(positions, statistics, general_first, rng)
    some = site >= 0
    atoms = np.where(some, positions.multiplicity[site], 0)
    radius = np.where(some, _radii()[element], 0.0)
    packing = _drawn(statistics.packing, rng.random(_BATCH))
    volume = (_sphere_volume(radius) * atoms).sum(axis=1) / packing
    lattice = _draw_cells(number, positions, volume, statistics, rng)
    place = _place_sites(positions, site, radius, lattice, closest, rng)
    lattices, contents = [], []
    for row in np.flatnonzero(np.isfinite(place).all(axis=2).sum(axis=1) == some.sum(axis=1)):
        fractional, kinds = [], []
        for k in np.flatnonzero(some[row]):
            chosen = positions.representative[site[row, k]]
            fractional.append(positions.rotations[chosen] @ place[row, k] + positions.translations[chosen])
            kinds += [int(element[row, k])] * len(fractional[-1])
        n = len(kinds)
        lattices.append(lattice[row])
        contents.append((np.array(kinds), np.concatenate(fractional) % 1.0, np.ones(n), np.zeros(n)))
    return from_arrays(lattices, contents, [""] * len(lattices))


def _draw_sites(
    positions: WyckoffPositions, statistics: CrystalStatistics, general_first: bool, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n, _MAX_SITES) positions by rising dimension, -1 where none, and the atomic number of each site."""
    weight = np.array(statistics.n_elements) / np.sum(statistics.n_elements)
    n_elements = 1 + rng.choice(len(weight), size=_BATCH, p=weight)
    with np.errstate(divide="ignore"):
        preference = np.log(np.array(statistics.element)) + rng.gumbel(size=(_BATCH, len(statistics.element)))
    elements = 1 + np.argsort(-preference, axis=1)  # without replacement: the first n_elements of a row
    left = np.round(_drawn(statistics.n_atoms, rng.random(_BATCH))).astype(np.int64)
    left = np.clip(left, positions.multiplicity.min(), _MAX_ATOMS)
    site = np.full((_BATCH, _MAX_SITES), -1)
    taken = np.zeros((_BATCH, len(positions.multiplicity)), dtype=bool)
    general = len(positions.multiplicity) - 1
    if general_first:
        site[:, 0] = general
        left = np.maximum(left - positions.multiplicity[general], 0)
    for k in range(int(general_first), _MAX_SITES):
        allowed = (positions.multiplicity <= left[:, None]) & ~taken
        key = rng.random(allowed.shape) ** (_FREEDOM**-positions.dimension)  # the largest: drawn by weight
        drawn = np.where(allowed, key, -1.0).argmax(axis=1)
        fits = allowed.any(axis=1)
        site[fits, k] = drawn[fits]
        left[fits] -= positions.multiplicity[drawn[fits]]
        fixed = fits & (positions.dimension[drawn] == 0)
        taken[fixed, drawn[fixed]] = True
    # Every element once, as far as there are sites, then at random.
    n_sites = (site >= 0).sum(axis=1)
    kind = np.argsort(np.where(site >= 0, rng.random(site.shape), 2.0), axis=1).argsort(axis=1)
    more = (rng.random(site.shape) * n_elements[:, None]).astype(np.int64)
    kind = np.where(kind < np.minimum(n_elements, n_sites)[:, None], kind, more)
    element = np.take_along_axis(elements, kind, axis=1)
    order = np.argsort(np.where(site >= 0, site, len(positions.multiplicity)), axis=1, kind="stable")
    return np.take_along_axis(site, order, axis=1), np.take_along_axis(element, order, axis=1)


def _draw_cells(
    number: int,
    positions: WyckoffPositions,
    volume: NDArray[np.float64],  # (n,) of the primitive cells
    statistics: CrystalStatistics,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """(n, 3, 3) primitive lattices, rows, of the group's crystal system."""
    n, system = len(volume), CRYSTAL_SYSTEMS[CRYSTAL_SYSTEM_INDEX[number - 1]]
    drawn = _drawn(statistics.axis_ratio, rng.random((2, n)))
    edge = np.exp(np.stack([np.zeros(n), drawn[0], drawn[1]], axis=1))
    if system in ("tetragonal", "trigonal", "hexagonal", "cubic"):
        edge[:, 1] = 1.0
    if system == "cubic":
        edge[:, 2] = 1.0
    angle = np.full((n, 3), 90.0)
    # Up to 25 degrees, so that any three angles span a cell.
    oblique = np.clip(_drawn(statistics.angle_deviation, rng.random((n, 3))), 0.0, 25.0)
    oblique *= np.where(rng.random((n, 3)) < 0.5, -1.0, 1.0)
    if system == "triclinic":
        angle += oblique
    elif system == "monoclinic":
        angle[:, 1] += np.abs(oblique[:, 1])
    elif system in ("trigonal", "hexagonal"):
        angle[:, 2] = 120.0
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    across = (cosine[:, 0] - cosine[:, 1] * cosine[:, 2]) / sine[:, 2]
    cell = np.zeros((n, 3, 3))
    cell[:, 0, 0] = 1.0
    cell[:, 1, 0], cell[:, 1, 1] = cosine[:, 2], sine[:, 2]
    cell[:, 2, 0], cell[:, 2, 1] = cosine[:, 1], across
    cell[:, 2, 2] = np.sqrt(1.0 - cosine[:, 1] ** 2 - across**2)
    lattice = positions.to_conventional.T @ (edge[:, :, None] * cell)
    return lattice * np.cbrt(volume / np.abs(np.linalg.det(lattice)))[:, None, None]


def _place_sites(
    positions: WyckoffPositions,
    site: NDArray[np.int64],
    radius: NDArray[np.float64],
    lattice: NDArray[np.float64],
    closest: float,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """(n, _MAX_SITES, 3) a point of each site's orbit that keeps its distances; NaN where none was found.

    By symmetry the distances of one point of an orbit, to its other points and to all atoms before, are those of all.
    """
    metric = lattice @ lattice.transpose(0, 2, 1)
    place = np.full((*site.shape, 3), np.nan)
    # Atoms so far, (n, _MAX_ATOMS + largest orbit, 3), packed to the left; their radii, 0 where none.
    room = _MAX_ATOMS + len(positions.rotations)
    atom, atom_radius = np.zeros((len(site), room, 3)), np.zeros((len(site), room))
    n_atoms = np.zeros(len(site), dtype=np.int64)
    alive = np.ones(len(site), dtype=bool)
    for k in range(site.shape[1]):
        waiting = np.flatnonzero(alive & (site[:, k] >= 0))
        for turn in range(_TRIES):
            if turn:  # a fixed point has one chance
                waiting = waiting[positions.dimension[site[waiting, k]] > 0]
            if not len(waiting):
                break
            where = site[waiting, k]
            anywhere = 12.0 * rng.random((len(waiting), 3, 1))  # over many cells: even along every direction
            point = (positions.projector[where] @ anywhere)[:, :, 0] + positions.offset[where]
            orbit = np.einsum("oij,nj->noi", positions.rotations, point) + positions.translations
            member = positions.representative[where]
            width = int(n_atoms[waiting].max())
            own = radius[waiting, k, None]
            radii = np.concatenate([np.where(member, own, 0.0), atom_radius[waiting, :width]], axis=1)
            others = np.concatenate([orbit, atom[waiting, :width]], axis=1)
            limit = np.where(radii > 0.0, closest * (radii + own), 0.0) ** 2
            free = (_squared_distances(point, others, metric[waiting]) >= limit).all(axis=1)
            for row, points in zip(waiting[free], orbit[free], strict=True):
                chosen = points[positions.representative[site[row, k]]]
                fresh = slice(n_atoms[row], n_atoms[row] + len(chosen))
                atom[row, fresh], atom_radius[row, fresh] = chosen, radius[row, k]
                n_atoms[row] += len(chosen)
            place[waiting[free], k] = point[free]
            waiting = waiting[~free]
        alive[np.isnan(place[:, k, 0]) & (site[:, k] >= 0)] = False
    return place


def _squared_distances(
    point: NDArray[np.float64],  # (n, 3), the first of others
    others: NDArray[np.float64],  # (n, m, 3)
    metric: NDArray[np.float64],  # (n, 3, 3)
) -> NDArray[np.float64]:
    """(n, m) shortest squared distances over the translations, of the point itself to its own images.

    Differences are reduced to the cell around 0; the nearest image is then among the 27 about it for the primitive
    cells made here (a test compares with a wider search).
    """
    gap = others - point[:, None]
    gap -= np.round(gap)
    covector = gap @ metric
    own = (gap * covector).sum(axis=2)
    images = np.einsum("ti,nij,tj->nt", _IMAGES, metric, _IMAGES)
    squared = own[:, :, None] + 2.0 * covector @ _IMAGES.T + images[:, None]
    squared[:, 0, _SELF] = np.inf
    return squared.min(axis=2)


def _drawn(quantiles: Sequence[float], share: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.interp(share, np.linspace(0.0, 1.0, len(quantiles)), quantiles)


def _sphere_volume(radius: NDArray[np.float64]) -> NDArray[np.float64]:
    return 4.0 / 3.0 * np.pi * radius**3


@functools.lru_cache(maxsize=1)
def _radii() -> NDArray[np.float64]:
    """Covalent radii in Angstrom by atomic number, 0 first."""
    import gemmi

    return np.array([0.0, *(gemmi.Element(z).covalent_r for z in range(1, MAX_ATOMIC_NUMBER + 1))])
