"""Line positions and intensities against pymatgen's XRDCalculator, structure by structure.

    python -m benchmarks.agreement ../shared/data/inorganic_mp.npz ../shared/data/amcsd.npz

prints the largest differences and every structure beyond the tolerances, with the reason. Two cores: about 22 ms a
structure for pymatgen.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from xrdfast.data.structures import PackedStructures, load_structures
from xrdfast.ops.simulate import STATUS_REASONS, simulate_lines

POSITION_TOLERANCE = 1e-6  # degrees 2theta
INTENSITY_TOLERANCE = 1e-4  # of 100


class Comparison(NamedTuple):
    """One structure: how far the two simulators are apart, and why where that is too far."""

    id: str
    position: float  # largest difference, degrees
    intensity: float  # largest difference, of 100
    reason: str  # "" where they agree


def pymatgen_lines(one: PackedStructures) -> tuple[np.ndarray, np.ndarray]:
    """Angles and intensities by pymatgen, 5 to 90 degrees, Cu K-alpha."""
    from pymatgen.analysis.diffraction.xrd import XRDCalculator

    pattern = XRDCalculator().get_pattern(_pymatgen_structure(one), two_theta_range=(5, 90))
    return np.asarray(pattern.x), np.asarray(pattern.y)


def _pymatgen_structure(one: PackedStructures):
    """Row for row; occupancies are divided by the largest one above 1, which relative intensities do not feel.

    Sites that hold more than their share (AMCSD) would be refused by pymatgen's own check.
    """
    from pymatgen.core import Composition, Element, Lattice, PeriodicSite, Structure

    lattice = Lattice(one.lattice[0].numpy())
    sites = []
    most = max(1.0, float(one.occupancy.max()))
    for z, place, share in zip(
        one.atomic_number.tolist(), one.fractional.tolist(), one.occupancy.tolist(), strict=True
    ):
        if share > 0:
            species = Composition({Element.from_Z(z): share / most})
            sites.append(PeriodicSite(species, place, lattice, skip_checks=True))
    return Structure.from_sites(sites)


def compare(structures: PackedStructures) -> Iterator[Comparison]:
    """Every structure simulated both ways."""
    lines = simulate_lines(structures)
    bounds = lines.offset.tolist()
    for i, one in enumerate(structures):
        two_theta = lines.two_theta[bounds[i] : bounds[i + 1]].numpy()
        intensity = lines.intensity[bounds[i] : bounds[i + 1]].numpy()
        if code := int(lines.status[i]):
            yield Comparison(one.ids[0], np.nan, np.nan, f"not simulated: {STATUS_REASONS[code]}")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want_two_theta, want_intensity = pymatgen_lines(one)
        yield _difference(one.ids[0], two_theta, intensity, want_two_theta, want_intensity)


def _difference(
    name: str, x: np.ndarray, y: np.ndarray, want_x: np.ndarray, want_y: np.ndarray
) -> Comparison:
    if len(x) != len(want_x):
        return Comparison(name, np.nan, np.nan, f"{len(x)} lines against {len(want_x)}")
    position, intensity = float(np.abs(x - want_x).max()), float(np.abs(y - want_y).max())
    reasons = []
    if position > POSITION_TOLERANCE:
        reasons.append(f"position differs by {position:.1e} degrees")
    if intensity > INTENSITY_TOLERANCE:
        reasons.append(f"intensity differs by {intensity:.1e}")
    return Comparison(name, position, intensity, ", ".join(reasons))


def _compare_piece(piece: PackedStructures) -> list[Comparison]:
    return list(compare(piece))


def main() -> None:
    """Compares all structures of the given files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    for path in options.paths:
        structures, rejected = load_structures(path)
        pieces = [structures[i : i + 50] for i in range(0, len(structures), 50)]
        # Spawned: a fork of a process whose OpenMP threads have run would wait for them for ever.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
            rows = [row for part in pool.map(_compare_piece, pieces) for row in part]
        agreeing = [row for row in rows if not row.reason]
        print(f"{path}: {len(agreeing)} of {len(rows)} agree; {len(rejected)} rejected at reading")
        print(f"  largest difference: {max(r.position for r in agreeing):.1e} degrees,", end=" ")
        print(f"{max(r.intensity for r in agreeing):.1e} of 100")
        for row in rows:
            if row.reason:
                print(f"  {row.id}: {row.reason}")
        for item in rejected:
            print(f"  {item.id}: rejected: {item.reason}")


if __name__ == "__main__":
    main()
