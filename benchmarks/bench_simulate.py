"""Speed of the structure simulation: against pymatgen, and over the large real sets. Floors: NOTES.md."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.aflow_sample import aflow_sample
from benchmarks.paired import paired, paired_loops, seconds
from xrdfast.data.structures import from_pymatgen, load_structures
from xrdfast.ops.simulate import simulate_lines


def test_single_structure_calls(benchmark, row, threads) -> None:
    """One call a structure: structures packed on our side, Structure objects on pymatgen's."""
    from pymatgen.analysis.diffraction.xrd import XRDCalculator

    threads(1)
    sample = aflow_sample()
    packed = [from_pymatgen([s]) for s in sample]
    calculator = XRDCalculator()
    pair = paired_loops(
        [lambda one=one: simulate_lines(one) for one in packed],
        [lambda s=s: calculator.get_pattern(s, two_theta_range=(5, 90)) for s in sample],
    )
    benchmark.pedantic(lambda: [simulate_lines(one) for one in packed], rounds=5)
    row(
        "simulate, one structure a call, one core, median of 100 AFLOW prototypes",
        f"{pair.ratio:.0f} × pymatgen ({1 / pair.ours:,.0f} against {1 / pair.rival:,.0f} patterns/s)",
        "≥ 100 ×",
        pair.ratio >= 100,
    )


@pytest.mark.parametrize("source", ["packed", "Structure objects"])
def test_whole_sample_in_one_call(benchmark, row, threads, source: str) -> None:
    from pymatgen.analysis.diffraction.xrd import XRDCalculator

    threads(1)
    sample = aflow_sample()
    packed = from_pymatgen(sample)
    calculator = XRDCalculator()
    call = (
        (lambda: simulate_lines(packed))
        if source == "packed"
        else (lambda: simulate_lines(from_pymatgen(sample)))
    )
    pair = paired(
        call, lambda: [calculator.get_pattern(s, two_theta_range=(5, 90)) for s in sample], rounds=3
    )
    benchmark.pedantic(call, rounds=5)
    row(
        f"simulate, the 100 prototypes in one call, from {source}",
        f"{pair.ratio:.0f} × pymatgen ({len(sample) / pair.ours:,.0f} patterns/s)",
        "≥ 100 ×" if source == "packed" else "reported",
        pair.ratio >= 100 or source != "packed",
    )


@pytest.mark.parametrize(("name", "limit"), [("inorganic_mp", 1.0), ("amcsd", 1.0), ("coremof", 60.0)])
def test_whole_sets(benchmark, row, threads, shared_data, name: str, limit: float) -> None:
    """All structures of a set to merged lines, two cores, from packed arrays in memory."""
    threads(2)
    structures, _ = load_structures(shared_data / f"{name}.npz")
    simulate_lines(structures[:64])
    times = [seconds(lambda: simulate_lines(structures)) for _ in range(1 if limit > 10 else 5)]
    benchmark.pedantic(lambda: simulate_lines(structures[:64]), rounds=3)
    took = statistics.median(times)
    row(
        f"simulate, all {len(structures):,} structures of {name}, 2 cores",
        f"{took:.2f} s",
        f"< {limit:.0f} s",
        took < limit,
    )
