"""The main job on structures that ship with pymatgen: simulate, train, evaluate on held-out structures, answer.

Shows, offline and within minutes, that every part works together on real structure types. Not a benchmark: 288
prototypes are far too few for a model that is of use elsewhere.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from xrdfast.data.folds import assign_folds
from xrdfast.data.generate import draw_strain, strained_reciprocal_metric
from xrdfast.data.structures import PackedStructures, analyse_symmetry, from_arrays
from xrdfast.errors import InputError
from xrdfast.scattering import element_symbols, form_factor_table

FOLDS_TEST = (0, 1)  # never seen by training
FOLD_CALIBRATION = 2  # for temperatures and exponents

# Relatives of a structure type: how far axes and cell differ. NaCl's isotypes run from a = 4.0 to 7.7 Angstrom.
_SCALE = 0.15  # largest share by which all edges grow or shrink
_STRAIN = 0.03  # standard deviation of the strain that keeps the symmetry
_DISPLACEMENT = 0.3  # Angstrom, standard deviation before it is averaged over the symmetry
_HEAVIEST = 83  # Bi: what follows is radioactive
_NOBLE_GASES = (2, 10, 18, 36, 54)


def load_prototypes() -> PackedStructures:
    """The AFLOW prototypes inside pymatgen: real structure types, without labels.

    `family` is the AFLOW label (stoichiometry, Pearson symbol, space group, occupied sites), so that relatives
    share a fold.

    Raises:
        InputError: where pymatgen or its file is missing.

    Source:
        Mehl et al., Comput. Mater. Sci. 136, S1 (2017): the AFLOW library of crystallographic prototypes.
    """
    entries = json.loads(gzip.decompress(_prototype_file().read_bytes()))
    number = {symbol: z for z, symbol in enumerate(element_symbols())} | {"D": 1}
    lattices, atoms, ids, families = [], [], [], []
    for row, entry in enumerate(entries):
        structure = entry["snl"]
        sites = [(site["abc"], part) for site in structure["sites"] for part in site["species"]]
        z = np.array([number[part["element"]] for _, part in sites])
        occupancy = np.array([part["occu"] for _, part in sites])
        lattices.append(np.array(structure["lattice"]["matrix"]))
        atoms.append((z, np.array([place for place, _ in sites]), occupancy, np.zeros(len(z))))
        mineral = entry["tags"]["mineral"] or "unnamed"
        ids.append(f"{row:03d} {mineral} {entry['tags']['aflow']}")
        families.append(entry["tags"]["aflow"])
    return from_arrays(lattices, atoms, ids, family=families)


def vary_structures(structures: PackedStructures, n_variants: int, generator: Generator) -> PackedStructures:
    """Made-up relatives of structures: other elements on moved sites, in cells of other size and shape.

    Different elements stay different, and atoms and cell move only as the symmetry allows, so labels, rotations
    and folds stay right.

    Args:
        structures: N structures with rotations.
        n_variants: of each structure, >= 1.
        generator: source of elements, sizes and strains.

    Returns:
        N * n_variants structures.
    """
    n = len(structures)
    base = structures[torch.arange(n).repeat_interleave(n_variants)]
    strain = draw_strain(len(base), _STRAIN, generator)
    scale = 1.0 + _SCALE * (2.0 * torch.rand(len(base), generator=generator, dtype=torch.float64) - 1.0)
    reciprocal = strained_reciprocal_metric(base.lattice, base.rotation_offset, base.rotations, strain)
    rows = torch.tensor([[0, 5, 4], [5, 1, 3], [4, 3, 2]])
    # G = A A^T with A lower triangular is a cell of that metric: a along x, b in the xy plane.
    lattice = torch.linalg.cholesky(torch.linalg.inv(reciprocal[:, rows])) * scale[:, None, None]
    return dataclasses.replace(
        base,
        lattice=lattice,
        fractional=base.fractional + _allowed_displacements(structures, n_variants, generator),
        atomic_number=_other_elements(base, generator),
        ids=[f"{name} #{i % n_variants + 1}" for i, name in enumerate(base.ids)],
    )


def _allowed_displacements(structures: PackedStructures, n_variants: int, generator: Generator) -> Tensor:
    """(M * n_variants, 3) fractional: random displacements, averaged over the operations of each space group.

    An operation that carries atom i onto atom j demands u_j = W u_i.
    """
    import spglib

    moved = []
    for one in structures:
        lattice, places = one.lattice[0].numpy(), one.fractional.numpy()
        found = spglib.get_symmetry_dataset((lattice, places, one.atomic_number.numpy()), symprec=0.1)
        drawn = torch.randn(n_variants, len(places), 3, generator=generator, dtype=torch.float64).numpy()
        drawn = _DISPLACEMENT * drawn @ np.linalg.inv(lattice)
        mean = np.zeros_like(drawn)
        for turn, shift in zip(found.rotations, found.translations, strict=True):
            apart = (places @ turn.T + shift)[:, None] - places
            onto = np.linalg.norm((apart - np.rint(apart)) @ lattice, axis=2).argmin(axis=1)
            mean[:, onto] += drawn @ turn.T
        moved.append(mean.reshape(-1, 3) / len(found.rotations))
    return torch.from_numpy(np.concatenate(moved))


def _other_elements(structures: PackedStructures, generator: Generator) -> Tensor:
    """(M,) uint8: in each structure every element replaced by one drawn anew, different ones by different ones."""
    known = ~np.isnan(form_factor_table("pymatgen").c)
    candidates = [z for z in range(1, _HEAVIEST + 1) if known[z] and z not in _NOBLE_GASES]
    drawn = structures.atomic_number.clone()
    bounds = structures.offset.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        own, which = torch.unique(structures.atomic_number[begin:end], return_inverse=True)
        order = torch.randperm(len(candidates), generator=generator)[: len(own)]
        drawn[begin:end] = torch.tensor(candidates, dtype=torch.uint8)[order][which]
    return drawn


def _prototype_file() -> Path:
    for module in ("pymatgen.analysis.prototypes", "pymatgen.analysis"):
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder) / "aflow_prototypes.json.gz"
            if path.exists():
                return path
    raise InputError("pymatgen: aflow_prototypes.json.gz: must come with the package, got none: pip install pymatgen")
