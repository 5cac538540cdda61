"""Programs that people use today beside ours, in one run: pattern simulators, MGDA solvers, the published DSR loss.

A peer that isn't installed is skipped. Rows are reported, not judged; the bars are in the benchmarks of each family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.aflow_sample import aflow_sample
from benchmarks.bench_dsr_loss import eager_loss, our_loss, random_batch, step
from benchmarks.paired import paired, paired_loops
from xrdfast.data.structures import from_pymatgen
from xrdfast.ops.simulate import simulate_lines
from xrdfast.training.balance import min_norm_weights

WAVELENGTH = 1.54184  # Angstrom, pymatgen's own; the others are told to take it
TWO_THETA = (5.0, 90.0)

# A simulator takes a structure of the sample by its place in it.
Simulator = Callable[[int], object]


def pymatgen(_folder: Path) -> Simulator:
    """The XRDCalculator of pymatgen, from Structure objects."""
    from pymatgen.analysis.diffraction.xrd import XRDCalculator

    calculator = XRDCalculator(WAVELENGTH)
    return lambda i: calculator.get_pattern(aflow_sample()[i], two_theta_range=TWO_THETA)


def xrd_rust(_folder: Path) -> Simulator:
    """xrd-rust's calculator, one thread, from Structure objects."""
    from xrd_rust_calculator import XRDCalculatorRust

    calculator = XRDCalculatorRust(WAVELENGTH)
    return lambda i: calculator.get_pattern(aflow_sample()[i], two_theta_range=TWO_THETA)


def gemmi_recipe(folder: Path) -> Simulator:
    """Structure factors by gemmi over one Friedel half, lines in numpy; its structures are read beforehand."""
    import gemmi

    structures = []
    for i, structure in enumerate(aflow_sample()):
        path = folder / f"{i}.cif"
        structure.to(filename=str(path))
        structures.append(gemmi.read_small_structure(str(path)))
        structures[-1].change_occupancies_to_crystallographic()
    least_d = WAVELENGTH / 2.0 / math.sin(math.radians(TWO_THETA[1] / 2.0))

    def lines(i: int) -> tuple[np.ndarray, np.ndarray]:
        cell = structures[i].cell
        hkl = gemmi.make_miller_array(cell, gemmi.SpaceGroup("P 1"), least_d, 0.0, True)
        calculator = gemmi.StructureFactorCalculatorX(cell)
        factors = [calculator.calculate_sf_from_small_structure(structures[i], h) for h in hkl.tolist()]
        theta = np.arcsin(WAVELENGTH / 2.0 / cell.calculate_d_array(hkl))
        lorentz_polarisation = (1.0 + np.cos(2.0 * theta) ** 2) / (np.sin(theta) ** 2 * np.cos(theta))
        two_theta, intensity = np.degrees(2.0 * theta), np.abs(factors) ** 2 * lorentz_polarisation
        inside = two_theta >= TWO_THETA[0]
        line, member = np.unique(np.round(two_theta[inside] / 1e-5), return_inverse=True)
        return line * 1e-5, np.bincount(member, intensity[inside])

    return lines


@pytest.mark.parametrize(
    ("peer", "package"),
    [(pymatgen, "pymatgen"), (xrd_rust, "xrd_rust_calculator"), (gemmi_recipe, "gemmi")],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_simulators(benchmark, row, threads, tmp_path: Path, peer: Callable, package: str) -> None:
    """The 100 AFLOW prototypes, one structure a call, one core; ours from packed arrays."""
    pytest.importorskip(package)
    threads(1)
    packed = [from_pymatgen([structure]) for structure in aflow_sample()]
    simulate = peer(tmp_path)
    pair = paired_loops(
        [lambda one=one: simulate_lines(one) for one in packed],
        [lambda i=i: simulate(i) for i in range(len(packed))],
    )
    benchmark.pedantic(lambda: [simulate_lines(one) for one in packed], rounds=5)
    row(
        f"simulate beside {peer.__name__.replace('_', ' ')}, one structure a call, one core, median of 100 prototypes",
        f"{pair.ratio:.1f} × ({1 / pair.ours:,.0f} against {1 / pair.rival:,.0f} patterns/s)",
        "reported",
        True,
    )


def test_mgda_weights(benchmark, row, threads) -> None:
    """Four tasks, gradients of 64 features for 64 patterns; TorchJD with its own defaults."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    threads(1)
    gradients = torch.randn(4, 64 * 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients *= torch.tensor([[1.0], [0.5], [2.0], [0.8]], dtype=torch.float64)
    gradients += (
        0.3 * gradients[:1]
    )  # tasks that share part of their direction, so that the minimum is inside
    gram = gradients @ gradients.T
    weighting = aggregation.MGDAWeighting()
    pair = paired(lambda: min_norm_weights(gram), lambda: weighting(gram), rounds=51)
    benchmark.pedantic(lambda: min_norm_weights(gram), rounds=20)
    ours, rival = (float(w @ gram @ w) for w in (min_norm_weights(gram), weighting(gram)))
    row(
        "MGDA weights of four tasks beside TorchJD's, from the Gram matrix, one core",
        f"{pair.ratio:.1f} × ({pair.ours * 1e6:.0f} against {pair.rival * 1e6:.0f} µs; the peer's squared norm is "
        f"{rival / ours - 1.0:.1e} above the minimum)",
        "reported",
        True,
    )


def test_published_dsr_loss(benchmark, row, threads) -> None:
    """LightSKD's loss as it is written, forward and backward."""
    threads(2)
    logits, previous = random_batch("cpu", torch.float32, (0, 230))
    pair = paired(
        lambda: step(our_loss, logits, previous), lambda: step(eager_loss, logits, previous), rounds=51
    )
    benchmark.pedantic(lambda: step(our_loss, logits, previous), rounds=20)
    row(
        "DSR loss beside LightSKD's in eager PyTorch, forward + backward, 512 × 230, 2 cores",
        f"{pair.ratio:.1f} × ({pair.ours * 1e6:.0f} against {pair.rival * 1e6:.0f} µs)",
        "reported",
        True,
    )
