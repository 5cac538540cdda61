"""One hundred AFLOW prototype structures that pymatgen ships, in turn over the seven crystal systems."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pymatgen.core import Structure

_SYSTEMS = ("triclinic", "monoclinic", "orthorhombic", "tetragonal", "trigonal", "hexagonal", "cubic")


@functools.cache
def aflow_sample(n: int = 100) -> list[Structure]:
    """The first n structures with known form factors, taken in turn from the crystal systems."""
    import pymatgen.analysis.prototypes as prototypes
    from monty.serialization import loadfn
    from pymatgen.analysis.diffraction.xrd import ATOMIC_SCATTERING_PARAMS
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    by_system: dict[str, list[Structure]] = {name: [] for name in _SYSTEMS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in loadfn(Path(prototypes.__file__).parent / "aflow_prototypes.json.gz"):
            structure = entry["snl"].structure
            if all(element.symbol in ATOMIC_SCATTERING_PARAMS for element in structure.composition.elements):
                structure.remove_oxidation_states()
                by_system[SpacegroupAnalyzer(structure, symprec=1e-3).get_crystal_system()].append(structure)
    picked: list[Structure] = []
    for turn in range(max(map(len, by_system.values()))):
        picked += [by_system[name][turn] for name in _SYSTEMS if turn < len(by_system[name])]
    return picked[:n]
