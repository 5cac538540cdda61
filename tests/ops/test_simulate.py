"""Simulation against its reference, pymatgen, and the symmetries of the problem itself."""

from __future__ import annotations

import dataclasses
import datetime
import math

import numpy as np
import pytest
import torch

from xrdfast import _native
from xrdfast.data.structures import (
    PackedStructures,
    analyse_symmetry,
    from_arrays,
    from_pymatgen,
    load_structures,
    to_pymatgen,
)
from xrdfast.ops import simulate
from xrdfast.ops.simulate import Families, Lines, simulate_families, simulate_lines

BACKENDS = {
    "reference": (simulate.simulate_lines_reference, simulate.simulate_families_reference),
    "cpu": (simulate._lines_cpu, simulate._families_cpu),
}


def random_structures(n: int, seed: int, *, n_atoms: int = 7, b_iso: bool = True) -> PackedStructures:
    """Cells of all shapes, partial occupancies, several elements, some with displacement parameters."""
    rng = np.random.default_rng(seed)
    lattices = rng.normal(size=(n, 3, 3)) + 4.0 * np.eye(3) * rng.uniform(0.8, 2.5, size=(n, 3, 1))
    atoms = []
    for _ in range(n):
        count = int(rng.integers(1, n_atoms + 1))
        atoms.append(
            (
                rng.choice([1, 8, 14, 26, 82], size=count),
                rng.uniform(0, 1, size=(count, 3)),
                rng.choice([1.0, 0.35], size=count),
                rng.choice([0.0, 0.7, 1.3], size=count) if b_iso else np.zeros(count),
            )
        )
    return from_arrays(list(lattices), atoms, [str(i) for i in range(n)])


def arguments(
    structures: PackedStructures, *, dispersion: bool = False, table: str = "pymatgen", top: float = 90.0
):
    first = simulate._arguments("test", structures, 1.54184, table, dispersion)
    g_min, g_max = (2.0 * math.sin(math.radians(t / 2.0)) / 1.54184 for t in (5.0, top))
    return (*first, 1.54184, g_min, g_max)


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both backends through the public functions."""
    if request.param == "reference":
        monkeypatch.setenv("XRDFAST_BACKEND", "reference")
        monkeypatch.setattr(_native, "_modules", {})
    else:
        assert _native.cpu() is not None, "the native module must build where tests run"
    return request.param


@pytest.mark.parametrize("table", ["pymatgen", "international"])
@pytest.mark.parametrize("dispersion", [False, True])
def test_native_lines_equal_the_reference(table: str, dispersion: bool) -> None:
    structures = random_structures(40, seed=1)
    given = arguments(structures, dispersion=dispersion, table=table)
    want, got = (Lines(*BACKENDS[name][0](*given)) for name in ("reference", "cpu"))
    assert torch.equal(got.offset, want.offset)
    assert torch.equal(got.hkl, want.hkl)
    assert torch.equal(got.status, want.status)
    torch.testing.assert_close(got.two_theta, want.two_theta, rtol=0, atol=1e-11)
    torch.testing.assert_close(got.d_spacing, want.d_spacing, rtol=1e-13, atol=0)
    # Form factors are evaluated once a line, 1e-5 degrees wide: 1e-6 of 100, see simulate.cpp.
    torch.testing.assert_close(got.intensity, want.intensity, rtol=0, atol=2e-5)


def test_native_families_equal_the_reference() -> None:
    structures = analyse_symmetry(
        PackedStructures.concatenate([random_structures(10, seed=2), salts()]), n_workers=1
    )
    extra = (structures.rotation_offset, structures.rotations, 1e-6)
    want, got = (
        Families(*BACKENDS[name][1](*arguments(structures), *extra)) for name in ("reference", "cpu")
    )
    for name in ("offset", "hkl", "multiplicity", "status"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(got.f_squared, want.f_squared, rtol=2e-6, atol=1e-4)


def salts() -> PackedStructures:
    """Rock salt (conventional and primitive cell), CsCl, hcp Mg, rutile: known multiplicities."""
    from pymatgen.core import Lattice, Structure

    rock_salt = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    )
    return from_pymatgen(
        [
            rock_salt,
            rock_salt.get_primitive_structure(),
            Structure.from_spacegroup(
                "Pm-3m", Lattice.cubic(4.12), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
            ),
            Structure.from_spacegroup(
                "P6_3/mmc", Lattice.hexagonal(3.21, 5.21), ["Mg"], [[1 / 3, 2 / 3, 0.25]]
            ),
            Structure.from_spacegroup(
                "P4_2/mnm", Lattice.tetragonal(4.594, 2.959), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]]
            ),
        ]
    )


def test_known_multiplicities(backend: str) -> None:
    families = simulate_families(analyse_symmetry(salts(), n_workers=1), two_theta_max=60.0, margin=0.0)
    rows = slice(int(families.offset[0]), int(families.offset[1]))
    found = dict(
        zip(map(tuple, families.hkl[rows].tolist()), families.multiplicity[rows].tolist(), strict=True)
    )
    assert found == {(1, 1, 1): 8, (2, 0, 0): 6, (2, 2, 0): 12, (3, 1, 1): 24, (2, 2, 2): 8}
    # The primitive cell has the same families under other indices.
    sizes = families.offset.diff().tolist()
    assert sizes[0] == sizes[1]
    primitive = slice(int(families.offset[1]), int(families.offset[2]))
    assert families.multiplicity[primitive].tolist() == families.multiplicity[rows].tolist()
    # |F|^2 scales with the square of the cell's content: four formula units against one.
    torch.testing.assert_close(
        families.f_squared[rows], 16.0 * families.f_squared[primitive], rtol=1e-5, atol=1e-2
    )


def test_families_carry_the_intensity_of_the_lines() -> None:
    """Sum of multiplicity |F|^2 LP over the families of a line = its intensity."""
    structures = analyse_symmetry(salts(), n_workers=1)
    families = simulate_families(structures, wavelength=1.54184, margin=0.0, relative_cutoff=0.0)
    lines = simulate_lines(structures)
    for i in range(len(structures)):
        rows = slice(int(families.offset[i]), int(families.offset[i + 1]))
        reciprocal = torch.linalg.inv(structures.lattice[i])
        g = (families.hkl[rows].double() @ reciprocal.T).norm(dim=1)
        theta = torch.asin(0.5 * 1.54184 * g)
        polarised = (1 + torch.cos(2 * theta) ** 2) / (torch.sin(theta) ** 2 * torch.cos(theta))
        strength = families.multiplicity[rows] * families.f_squared[rows].double() * polarised
        angle = torch.rad2deg(2 * theta)
        here = slice(int(lines.offset[i]), int(lines.offset[i + 1]))
        summed = torch.stack([strength[(angle - t).abs() < 1e-5].sum() for t in lines.two_theta[here]])
        torch.testing.assert_close(summed / summed.max() * 100.0, lines.intensity[here], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", ["inorganic_mp.npz", "amcsd.npz"])
def test_lines_agree_with_pymatgen_on_real_structures(source: str, shared_data) -> None:
    """300 random structures over both sets; `python -m benchmarks.agreement` takes all."""
    from benchmarks.agreement import compare

    structures, _ = load_structures(shared_data / source)
    rows = np.random.default_rng(7).choice(len(structures), 150, replace=False)
    different = [row for row in compare(structures[sorted(rows.tolist())]) if row.reason]
    assert different == []


def test_international_form_factors_reach_the_known_intensity_ratio() -> None:
    """f(0) is the number of electrons in both tables, so very low angles agree; high ones differ by a few per cent."""
    structure = salts()[0]
    first, second = (simulate_lines(structure, form_factors=name) for name in ("pymatgen", "international"))
    assert torch.equal(first.offset, second.offset)
    assert 0.01 < float((first.intensity - second.intensity).abs().max()) < 10.0


def test_dispersion_moves_copper_lines() -> None:
    from pymatgen.core import Lattice, Structure

    copper = from_pymatgen(
        [Structure.from_spacegroup("Pm-3m", Lattice.cubic(4.0), ["Cu", "Cl"], [[0, 0, 0], [0.5] * 3])]
    )
    plain, corrected = (simulate_lines(copper, dispersion=flag).intensity for flag in (False, True))
    assert float((plain - corrected).abs().max()) > 1.0


def test_origin_shift_and_supercell_change_nothing(backend: str) -> None:
    structure = salts()[0]
    shifted = dataclasses.replace(
        structure, fractional=structure.fractional + torch.tensor([0.13, 0.27, -0.4]).double()
    )
    doubled = from_pymatgen([to_pymatgen(structure).make_supercell([1, 1, 2])])
    want = simulate_lines(structure)
    for other in (shifted, doubled):
        got = simulate_lines(other)
        torch.testing.assert_close(got.two_theta, want.two_theta, rtol=0, atol=1e-9)
        torch.testing.assert_close(got.intensity, want.intensity, rtol=0, atol=1e-4)


def test_the_direct_call_equals_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    structures = random_structures(5, seed=8)
    direct = simulate_lines(structures)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for a, b in zip(direct, simulate_lines(structures), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("simulate_it", [simulate_lines, simulate_families])
def test_what_is_not_packed_is_named(simulate_it) -> None:
    with pytest.raises(TypeError, match=r"structures must be PackedStructures .*, got Structure"):
        simulate_it(to_pymatgen(salts()[0]))


def test_strided_offsets_are_checked_as_they_are_read() -> None:
    structures = random_structures(2, seed=9)
    n_atoms = len(structures.atomic_number)
    spread = torch.tensor([0, 0, n_atoms + 5, 0, n_atoms])[::2]  # 0, n_atoms + 5, n_atoms
    with pytest.raises(ValueError, match=f"atom_offset must rise from 0 to {n_atoms}"):
        simulate_lines(dataclasses.replace(structures, offset=spread))


@pytest.mark.parametrize("simulate_it", [simulate_lines, simulate_families])
def test_the_default_device_changes_nothing(simulate_it) -> None:
    structures = random_structures(3, seed=9)
    want = simulate_it(structures, dispersion=True)
    for table in (simulate._form_factor_tensor, simulate._dispersion_tensor):
        table.cache_clear()
    with torch.device("meta"):
        got = simulate_it(structures, dispersion=True)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_thread_count_changes_nothing(n_threads: int) -> None:
    structures = random_structures(20, seed=4)
    want = simulate_lines(structures)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        got = simulate_lines(structures)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


def test_structures_that_cannot_be_simulated_say_why(backend: str) -> None:
    fe = (np.array([26]), np.zeros((1, 3)), np.ones(1), np.zeros(1))
    unknown = (np.array([118]), np.zeros((1, 3)), np.ones(1), np.zeros(1))
    empty_site = (np.array([26]), np.zeros((1, 3)), np.zeros(1), np.zeros(1))
    cells = [np.eye(3) * 3, np.zeros((3, 3)), np.eye(3) * math.nan, np.eye(3) * 1e6, np.eye(3) * 0.5]
    structures = from_arrays(
        [*cells, np.eye(3) * 3, np.eye(3) * 3], [fe] * 5 + [unknown, empty_site], list("abcdefg")
    )
    for result in (simulate_lines(structures), simulate_families(structures)):
        assert result.status.tolist() == [0, 4, 4, 3, 1, 2, 5]
        assert result.offset.diff()[1:].tolist() == [0] * 6
        assert result.offset[1] > 0


def test_no_structure_at_all(backend: str) -> None:
    lines = simulate_lines(random_structures(2, seed=5)[0:0])
    assert lines.offset.tolist() == [0]
    assert len(lines.two_theta) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"wavelength": 0.0}, "wavelength must be finite and > 0"),
        ({"wavelength": math.nan}, "wavelength must be finite and > 0"),
        ({"two_theta_max": 200.0}, r"two_theta_max must be in \[0, 180\]"),
        ({"two_theta_min": 50.0, "two_theta_max": 40.0}, "two_theta_max must be above"),
        ({"form_factors": "mine"}, "form_factor_table: name must be one of"),
    ],
)
def test_settings_outside_the_rules(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_lines(random_structures(1, seed=6), **changed)
    with pytest.raises(ValueError, match=message):
        simulate_families(random_structures(1, seed=6), **changed)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lattice", torch.zeros(1, 3, 3), "lattice must be"),
        ("offset", torch.tensor([0, 99]), "atom_offset must rise"),
        ("offset", torch.tensor([0, 1], dtype=torch.int32), "atom_offset must be"),
        ("atomic_number", torch.zeros(3, dtype=torch.int64), "atomic_number must be"),
        ("occupancy", torch.zeros(99, dtype=torch.float64), "occupancy must be"),
    ],
)
def test_tensors_outside_the_rules(field: str, value: torch.Tensor, message: str) -> None:
    structures = dataclasses.replace(random_structures(1, seed=8), **{field: value})
    with pytest.raises(ValueError, match=message):
        simulate_lines(structures)


def test_no_structure_has_more_rotations_than_a_space_group() -> None:
    structures = salts()[:1]
    rotations = torch.eye(3, dtype=torch.int8).expand(193, 3, 3).contiguous()
    with pytest.raises(ValueError, match="rotations must be at most 192 a structure, got 193"):
        torch.ops.xrdfast.simulate_families(*arguments(structures), torch.tensor([0, 193]), rotations, 1e-6)


def test_opcheck() -> None:
    structures = random_structures(3, seed=9)
    torch.library.opcheck(torch.ops.xrdfast.simulate_lines.default, arguments(structures))
    extra = (structures.rotation_offset, structures.rotations, 1e-6)
    torch.library.opcheck(torch.ops.xrdfast.simulate_families.default, (*arguments(structures), *extra))


def test_the_module_takes_its_own_objects_alone():
    """Never memory that is something else: it would be read."""
    module = _native.cpu()
    if module is None:
        pytest.skip("no native module")
    offset = torch.tensor([0, 1, 2])
    for object_given in (datetime.datetime_CAPI, 0, 1.5):
        with pytest.raises(ValueError, match="an object of type SimulatedLines belongs here"):
            module.count_lines(object_given)
    with pytest.raises(ValueError, match="an object was given where a number belongs"):
        module.offsets_rise(datetime.datetime_CAPI, 2, 2)
    with pytest.raises(ValueError, match="a float was given where an integer belongs"):
        module.offsets_rise(offset.data_ptr(), 2.0, 2)
    with pytest.raises(TypeError, match="offsets_rise takes 3 arguments, got 1"):
        module.offsets_rise(1)
