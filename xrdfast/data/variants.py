"""Copies of structures whose sites moved without losing or gaining symmetry.

Moves run along the free Wyckoff coordinates alone, so the space group stays. Cells are strained later, when patterns
are rendered (`xrdfast.data.generate`); crystals that never were are in `xrdfast.data.crystals`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import numpy as np
import torch
from numpy.typing import NDArray

from xrdfast.data.folds import assign_folds
from xrdfast.data.labels import Cell, merge_sites
from xrdfast.data.structures import PackedStructures, analyse_symmetry, from_arrays

_SYMPREC = 0.01  # Angstrom, of the operations: a move must keep the symmetry at the tighter tolerance too
_LARGEST = 2.0  # sigma


def move_sites(
    structures: PackedStructures,
    n_variants: int,
    *,
    sigma: float = 0.08,
    seed: int = 0,
    folds_left_alone: Collection[int] = (0,),
    n_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PackedStructures:
    """Variants of structures with moved sites, of unchanged space group.

    Each orbit of sites gets one random vector. Its mean over the operations that keep a site is a move that they keep:
    what is left lies along the free coordinates of the Wyckoff position, and the other sites of the orbit move by its
    images. Structures without a free coordinate have no variant, nor have those whose group differs between the two
    tolerances; a variant to which spglib gives another number, at either tolerance, is dropped.

    Args:
        structures: N structures with labels (`analyse_symmetry`).
        n_variants: of each structure.
        sigma: standard deviation of the vectors' Cartesian components, Angstrom; they are cut at two sigma.
        seed: one seed gives the same variants.
        folds_left_alone: structures of these folds have none, so that validation stays on real structures.
        n_workers: processes of spglib; None for one a core.
        progress: called with (structures done, N).

    Returns:
        The variants alone, with labels and rotations, in the folds of their structures.

    Raises:
        ValueError: for n_variants < 1, or sigma that is not in 0..0.5.
    """
    if n_variants < 1:
        raise ValueError(f"move_sites: n_variants must be >= 1, got {n_variants}")
    if not 0.0 < sigma <= 0.5:
        raise ValueError(f"move_sites: sigma must be in 0..0.5 Angstrom, got {sigma}")
    folds = assign_folds(structures.formula, structures.family, structures.fold)
    label = structures.space_group_01
    clean = (label > 0) & (structures.space_group_001 == label)
    rows, places = [], []
    for row, one in enumerate(structures):
        if bool(clean[row]) and int(folds[row]) not in folds_left_alone:
            rng = np.random.default_rng([seed, row])
            moved = _moved_copies(one, n_variants, sigma, rng)
            rows += [row] * len(moved)
            places += moved
        if progress:
            progress(row + 1, len(structures))
    if not rows:
        return from_arrays([], [], [])
    blank = torch.zeros(len(rows), dtype=torch.int16)
    variants = dataclasses.replace(
        structures[rows],
        fractional=torch.from_numpy(np.concatenate(places)),
        ids=[f"{structures.ids[row]}/moved-{k % n_variants}" for k, row in enumerate(rows)],
        fold=folds[rows],
        space_group_001=blank,
        space_group_01=blank,
    )
    variants = analyse_symmetry(variants, n_workers=n_workers)
    kept = (variants.space_group_001 == label[rows]) & (variants.space_group_01 == label[rows])
    return variants[kept]


def _moved_copies(
    structure: PackedStructures, n_variants: int, sigma: float, rng: np.random.Generator
) -> list[NDArray[np.float64]]:
    """Fractional coordinates of each copy, (n_atoms, 3); none where no coordinate is free."""
    import spglib

    lattice, fractional = structure.lattice[0].numpy(), structure.fractional.numpy()
    number = structure.atomic_number.numpy().astype(np.int64)
    sites, kinds = merge_sites(Cell(lattice, fractional, number, structure.occupancy.numpy()))
    try:
        found = spglib.get_symmetry_dataset((lattice, sites, kinds), symprec=_SYMPREC)
    except spglib.SpglibError:
        found = None
    if found is None:
        return []
    rotations = found.rotations.astype(np.float64)
    to_fractional = np.linalg.inv(lattice)
    moves = np.zeros((n_variants, len(sites), 3))
    for first in np.unique(found.equivalent_atoms):
        orbit = np.flatnonzero(found.equivalent_atoms == first)
        images = rotations @ sites[first] + found.translations
        gap = images[:, None] - sites[orbit]
        gap -= np.round(gap)
        target = np.square(gap @ lattice).sum(axis=2).argmin(axis=1)  # where each operation takes the first
        one_each = np.unique(target, return_index=True)[1]
        kept = rotations[target == np.searchsorted(orbit, first)].mean(axis=0)
        vector = rng.standard_normal((n_variants, 3)).clip(-_LARGEST, _LARGEST) * sigma
        if len(one_each) < len(orbit):  # operations and orbits that disagree, at the edge of the tolerance
            return []
        free = vector @ to_fractional @ kept.T
        moves[:, orbit] = np.einsum("oij,vj->voi", rotations[one_each], free)
    if np.abs(moves).max() < 1e-9:
        return []
    of_site = np.arange(len(sites))
    if len(sites) < len(fractional):  # rows of mixed sites move together
        gap = fractional[:, None] - sites
        of_site = np.square(gap - np.round(gap)).sum(axis=2).argmin(axis=1)
    return [fractional + move[of_site] for move in moves]
