"""Stores from structures, strains that keep the symmetry, and rendered batches."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import spglib
import torch

from xrdfast.bragg import Grid
from xrdfast.data import generate
from xrdfast.data.generate import (
    AugmentConfig,
    PatternSource,
    draw_strain,
    generate_store,
    strained_reciprocal_metric,
)
from xrdfast.data.store import PatternStore, SimulationConfig
from xrdfast.data.structures import PackedStructures, load_structures
from xrdfast.data.whole_scans import preprocess_whole_scans
from xrdfast.errors import InputError
from xrdfast.ops.render_patterns import render_patterns
from xrdfast.ops.simulate import simulate_families

# name: cell (a, b, c, alpha, beta, gamma), sites (Z, x, y, z), space group, free metric parameters
CRYSTALS = {
    "albite-like": ((4.1, 5.2, 6.3, 81.0, 94.0, 107.0), [(14, 0.1, 0.2, 0.3), (8, 0.4, 0.15, 0.7)], 1, 6),
    "P2_1/m-like": ((4.1, 3.9, 6.3, 90.0, 101.0, 90.0), [(26, 0.2, 0.25, 0.1), (26, 0.8, 0.75, 0.9)], 11, 4),
    "Pmmm": ((3.1, 4.2, 5.3, 90.0, 90.0, 90.0), [(26, 0.0, 0.0, 0.0), (8, 0.5, 0.5, 0.5)], 47, 3),
    "rutile": (
        (4.594, 4.594, 2.958, 90.0, 90.0, 90.0),
        [(22, 0, 0, 0), (22, 0.5, 0.5, 0.5)]
        + [
            (8, x, y, z)
            for x, y, z in ((0.305, 0.305, 0), (0.695, 0.695, 0), (0.195, 0.805, 0.5), (0.805, 0.195, 0.5))
        ],
        136,
        2,
    ),
    "arsenic, primitive": (
        (4.13, 4.13, 4.13, 54.1, 54.1, 54.1),
        [(33, 0.227, 0.227, 0.227), (33, 0.773, 0.773, 0.773)],
        166,
        2,
    ),
    "magnesium": (
        (3.209, 3.209, 5.211, 90.0, 90.0, 120.0),
        [(12, 1 / 3, 2 / 3, 0.25), (12, 2 / 3, 1 / 3, 0.75)],
        194,
        2,
    ),
    "copper, primitive": ((2.556, 2.556, 2.556, 60.0, 60.0, 60.0), [(29, 0, 0, 0)], 225, 1),
    "cesium chloride": (
        (4.123, 4.123, 4.123, 90.0, 90.0, 90.0),
        [(55, 0, 0, 0), (17, 0.5, 0.5, 0.5)],
        221,
        1,
    ),
}


def cell_of(a: float, b: float, c: float, alpha: float, beta: float, gamma: float) -> np.ndarray:
    """Rows a, b, c in Angstrom."""
    ca, cb, cg = (math.cos(math.radians(angle)) for angle in (alpha, beta, gamma))
    sg = math.sin(math.radians(gamma))
    y = (ca - cb * cg) / sg
    return np.array([[a, 0, 0], [b * cg, b * sg, 0], [c * cb, c * y, c * math.sqrt(1 - cb * cb - y * y)]])


@pytest.fixture(scope="module")
def crystals() -> PackedStructures:
    lattice, sites, rotations, numbers = [], [], [], []
    for cell, atoms, number, _ in CRYSTALS.values():
        lattice.append(cell_of(*cell))
        sites.append(np.array(atoms, dtype=float))
        dataset = spglib.get_symmetry_dataset(
            (lattice[-1], sites[-1][:, 1:], sites[-1][:, 0].astype(int)), symprec=0.01
        )
        assert dataset.number == number
        rotations.append(np.unique(dataset.rotations, axis=0))
        numbers.append(number)
    n = len(CRYSTALS)
    atoms = torch.from_numpy(np.concatenate(sites))
    label = torch.tensor(numbers, dtype=torch.int16)
    offsets = [torch.tensor([0, *np.cumsum([len(x) for x in ragged])]) for ragged in (sites, rotations)]
    return PackedStructures(
        offset=offsets[0],
        lattice=torch.from_numpy(np.stack(lattice)),
        atomic_number=atoms[:, 0].to(torch.uint8),
        fractional=atoms[:, 1:].contiguous(),
        occupancy=torch.ones(len(atoms), dtype=torch.float64),
        b_iso=torch.zeros(len(atoms), dtype=torch.float64),
        ids=list(CRYSTALS),
        formula=[f"X{i}" for i in range(n)],
        family=[""] * n,
        fold=torch.full((n,), -1, dtype=torch.int8),
        space_group_published=label,
        space_group_001=label,
        space_group_01=label,
        rotation_offset=offsets[1],
        rotations=torch.from_numpy(np.concatenate(rotations).astype(np.int8)),
        to_standard=torch.eye(3, dtype=torch.float64).repeat(n, 1, 1),
    )


@pytest.fixture
def store(crystals: PackedStructures, tmp_path: Path) -> PatternStore:
    path = tmp_path / "crystals.store.safetensors"
    assert generate_store(crystals, path) == []
    return PatternStore.open(path)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_store_holds_the_simulated_families(crystals: PackedStructures, store: PatternStore) -> None:
    families = simulate_families(crystals)
    batch = store.gather(torch.arange(len(crystals)))
    for name in ("offset", "hkl", "multiplicity", "f_squared"):
        assert torch.equal(getattr(batch, name), getattr(families, name)), name
    assert store.ids == list(CRYSTALS)
    assert bool((store.fold >= 0).all())


def test_chunks_do_not_show(
    crystals: PackedStructures, store: PatternStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "_CHUNK_REFLECTIONS", 300)
    seen = []
    path = tmp_path / "chunked.store.safetensors"
    generate_store(crystals, path, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == store.paths[0].read_bytes()
    assert len(seen) > 2
    assert seen[-1] == (len(crystals), len(crystals))
    assert seen == sorted(seen)


def test_what_cannot_be_simulated_is_listed(crystals: PackedStructures, tmp_path: Path) -> None:
    lattice = crystals.lattice.clone()
    lattice[1] = 0.0
    lattice[4, 0, 0] = float("nan")
    occupancy = crystals.occupancy.clone()
    occupancy[int(crystals.offset[6])] = 0.0
    broken = dataclasses.replace(crystals, lattice=lattice, occupancy=occupancy)
    path = tmp_path / "some.store.safetensors"
    rejected = generate_store(broken, path)
    names = list(CRYSTALS)
    assert [entry.id for entry in rejected] == [names[1], names[4], names[6]]
    assert "lattice" in rejected[0].reason
    assert "structure factor" in rejected[2].reason
    whole = path.read_bytes()
    with pytest.raises(
        InputError, match=f"one that can be simulated, got none; the first reason: {names[1]}"
    ):
        generate_store(broken[[1, 4]], path)
    assert path.read_bytes() == whole
    store = PatternStore.open(path)
    kept = torch.tensor([0, 2, 3, 5, 7])
    assert store.ids == [names[i] for i in kept]
    families = simulate_families(crystals[kept])
    batch = store.gather(torch.arange(len(kept)))
    assert torch.equal(batch.offset, families.offset)
    assert torch.equal(batch.hkl, families.hkl)


def test_a_store_that_cannot_be_written_is_named(crystals: PackedStructures, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be writable"):
        generate_store(crystals, tmp_path / "none" / "a.store.safetensors")


def strained(structures: PackedStructures, row: int, n: int, sigma: float = 0.01) -> np.ndarray:
    """Direct metrics of n strained copies of one structure, (n, 3, 3)."""
    begin, end = structures.rotation_offset[row : row + 2].tolist()
    rotations = structures.rotations[begin:end]
    reciprocal = strained_reciprocal_metric(
        structures.lattice[row].expand(n, 3, 3),
        torch.arange(n + 1) * len(rotations),
        rotations.repeat(n, 1, 1),
        draw_strain(n, sigma, generator(row)),
    ).numpy()
    aa, bb, cc, bc, ac, ab = reciprocal.T
    return np.linalg.inv(np.stack([[aa, ab, ac], [ab, bb, bc], [ac, bc, cc]]).transpose(2, 0, 1))


@pytest.mark.parametrize("row", range(len(CRYSTALS)), ids=list(CRYSTALS))
def test_strain_moves_the_free_parameters_and_no_others(crystals: PackedStructures, row: int) -> None:
    """The strained metrics keep every rotation and span exactly the system's free parameters."""
    metrics = strained(crystals, row, 64)
    begin, end = crystals.rotation_offset[row : row + 2].tolist()
    for rotation in crystals.rotations[begin:end].numpy().astype(float):
        np.testing.assert_allclose(rotation.T @ metrics @ rotation, metrics, rtol=0, atol=1e-11)
    lattice = crystals.lattice[row].numpy()
    change = (metrics - lattice @ lattice.T).reshape(64, 9)
    singular = np.linalg.svd(change, compute_uv=False)
    free = list(CRYSTALS.values())[row][3]
    assert int((singular > 1e-3 * singular[0]).sum()) == free
    # of the size asked for: relative changes of squared lengths are about twice the strain
    relative = np.abs(change.reshape(64, 3, 3)[:, [0, 1, 2], [0, 1, 2]] / np.diag(lattice @ lattice.T))
    assert 0.004 < relative.mean() < 0.03


def number_of(metric: np.ndarray, positions: np.ndarray, numbers: np.ndarray, symprec: float) -> int:
    return spglib.get_symmetry_dataset(
        (np.linalg.cholesky(metric), positions, numbers), symprec=symprec
    ).number


def test_strain_keeps_the_space_group(crystals: PackedStructures) -> None:
    for row, (_, atoms, number, _) in enumerate(CRYSTALS.values()):
        sites = np.array(atoms, dtype=float)
        for metric in strained(crystals, row, 8, sigma=0.02):
            assert number_of(metric, sites[:, 1:], sites[:, 0].astype(int), 1e-4) == number


def test_strain_keeps_the_space_group_of_real_structures(shared_data: Path) -> None:
    """Forty structures over all seven systems, in the cells as published."""
    data = np.load(shared_data / "inorganic_mp.npz", allow_pickle=False)
    clean = np.flatnonzero((data["sg_001"] == data["sg_01"]) & (np.diff(data["offset"]) <= 24))
    systems = np.searchsorted([2, 15, 74, 142, 167, 194, 230], data["sg_01"][clean])
    rows = np.concatenate([clean[systems == system][5:200:35] for system in range(7)])
    assert len(rows) >= 40
    for row in rows.tolist():
        atoms = slice(data["offset"][row], data["offset"][row + 1])
        lattice, positions, numbers = (
            data["lattice"][row],
            data["frac"][atoms].astype(float),
            data["z"][atoms],
        )
        dataset = spglib.get_symmetry_dataset((lattice, positions, numbers), symprec=0.01)
        rotations = torch.from_numpy(np.unique(dataset.rotations, axis=0).astype(np.int8))
        reciprocal = strained_reciprocal_metric(
            torch.from_numpy(lattice)[None],
            torch.tensor([0, len(rotations)]),
            rotations,
            draw_strain(1, 0.01, generator(row)),
        )
        aa, bb, cc, bc, ac, ab = reciprocal[0].tolist()
        metric = np.linalg.inv([[aa, ab, ac], [ab, bb, bc], [ac, bc, cc]])
        assert number_of(metric, positions, numbers, 0.01) == data["sg_01"][row], row


def test_without_strain_or_rotations_the_metric_is_the_cells_own(crystals: PackedStructures) -> None:
    n = len(crystals)
    none = torch.zeros(n + 1, dtype=torch.int64), torch.zeros(0, 3, 3, dtype=torch.int8)
    reciprocal = torch.linalg.inv(crystals.lattice).transpose(1, 2)  # rows a*, b*, c*
    dots = reciprocal @ reciprocal.transpose(1, 2)
    expected = dots[:, [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    torch.testing.assert_close(
        strained_reciprocal_metric(crystals.lattice, *none), expected, rtol=1e-10, atol=1e-12
    )
    averaged = strained_reciprocal_metric(crystals.lattice, crystals.rotation_offset, crystals.rotations)
    torch.testing.assert_close(averaged, expected, rtol=1e-10, atol=1e-12)
    # a batch where only some patterns have rotations
    keep = crystals.rotation_offset[:4]
    offset = torch.cat([keep, keep[-1:].expand(n - 3)])
    mixed = strained_reciprocal_metric(
        crystals.lattice, offset, crystals.rotations[: int(keep[-1])], draw_strain(n, 0.01, generator())
    )
    assert mixed.shape == (n, 6)
    unprojected = strained_reciprocal_metric(crystals.lattice, *none, draw_strain(n, 0.01, generator()))
    assert torch.equal(mixed[3:], unprojected[3:])


def test_clean_patterns_have_their_lines_where_bragg_puts_them(store: PatternStore) -> None:
    source = PatternSource(store)
    intensity, number = source.batch(torch.tensor([7, 6]))
    assert intensity.shape == (2, 8500)
    assert intensity.dtype == torch.float32
    assert number.tolist() == [221, 225]
    assert intensity.amax(dim=1).tolist() == [100.0, 100.0]
    a = 2.556 * math.sqrt(2.0)  # copper, conventional
    expected = []
    for h2 in (3, 4, 8, 11, 12):  # face-centred: 111 200 220 311 222
        sine = 1.54056 * math.sqrt(h2) / (2.0 * a)
        two_theta = 2.0 * math.degrees(math.asin(sine)) if sine < 1 else 180.0
        if two_theta < 90.0:
            expected.append(int((two_theta - 5.0) / 0.01))
    assert torch.nonzero(intensity[1]).squeeze(1).tolist() == expected
    assert torch.equal(intensity, source.batch(torch.tensor([7, 6]))[0])


def test_one_seed_gives_one_batch(store: PatternStore) -> None:
    source = PatternSource(store, augment=AugmentConfig(strain=0.01, b_max=2.0))
    indices = torch.arange(len(store))
    first, again, other = (source.batch(indices, generator(seed))[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert bool((first.amax(dim=1) == 100.0).all())
    still, _ = PatternSource(store, augment=AugmentConfig(strain=0.0, b_max=0.0)).batch(indices, generator())
    assert torch.equal(still, source.batch(indices)[0])


def test_b_damps_high_angles(store: PatternStore) -> None:
    row = torch.tensor([7])
    clean, _ = PatternSource(store).batch(row)
    damped, _ = PatternSource(store, augment=AugmentConfig(strain=0.0, b_max=8.0)).batch(row, generator(1))
    lines = torch.nonzero(clean[0]).squeeze(1)
    ratio = damped[0, lines] / clean[0, lines]
    assert bool((ratio.diff() < 0).all())


def test_measured_patterns(store: PatternStore) -> None:
    """One seed one batch; without a generator a row of the store looks the same in every batch."""
    source = PatternSource(store, augment=AugmentConfig(profile="lab"))
    indices = torch.arange(len(store))
    first, again, other = (source.batch(indices, generator(seed))[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert bool((first.amax(dim=1) == 100.0).all())
    still, number = source.batch(indices)
    assert bool((still.amax(dim=1) == 100.0).all())
    assert number.tolist() == store.space_group_01.tolist()
    assert torch.equal(source.batch(indices.flip(0))[0], still.flip(0))
    sticks, _ = PatternSource(store).batch(indices)
    assert float((still > 0.0).double().mean()) > 5 * float((sticks > 0.0).double().mean())
    with pytest.raises(
        ValueError, match=r"PatternSource: augment.profile must be one of sticks, lab, synchrotron, got 'x'"
    ):
        PatternSource(store, augment=AugmentConfig(profile="x"))


def test_measured_preparation_is_what_prediction_does(store: PatternStore, monkeypatch) -> None:
    """The counts that were rendered, through the function that prepares scans for a model."""
    rendered = []

    def recorded(*arguments, **settings):
        rendered.append((arguments[8], settings, render_patterns(*arguments, **settings).intensity))
        return render_patterns(*arguments, **settings)

    monkeypatch.setattr(generate, "render_patterns", recorded)
    source = PatternSource(store, augment=AugmentConfig(profile="lab", preparation="measured"))
    rows = torch.arange(4)
    got, number = source.batch(rows, generator(3))
    ((profile, settings, counts),) = rendered
    assert settings["clip_sigma"] is None
    assert torch.equal(counts, counts.round()) and float(counts.max()) > 200
    angles = torch.from_numpy(Grid().two_theta())
    first, last = profile.two_theta_first[:, None] - 1e-9, profile.two_theta_last[:, None] - 1e-9
    inside = (angles >= first) & (angles < last)
    wavelength = [store.simulation.wavelength] * 4
    want, _ = preprocess_whole_scans(
        [angles[keep].numpy() for keep in inside],
        [row[keep].numpy() for keep, row in zip(inside, counts, strict=True)],
        wavelength,
        grid=Grid(),
        model_wavelength=wavelength[0],
        smooth_width=source.augment.smooth_width,
    )
    assert torch.equal(got, want)
    assert got.amax(dim=1).tolist() == [100.0] * 4
    assert number.tolist() == store.space_group_01[:4].tolist()
    assert torch.equal(
        source.batch(rows[2:3])[0], source.batch(rows)[0][2:3]
    )  # validation's are drawn by row
    with pytest.raises(ValueError, match="preparation must be one of known, measured, got 'x'"):
        PatternSource(store, augment=AugmentConfig(profile="lab", preparation="x"))


def test_a_grid_beyond_the_store_is_refused(
    store: PatternStore, crystals: PackedStructures, tmp_path: Path
) -> None:
    path = tmp_path / "narrow.store.safetensors"
    generate_store(crystals, path, simulation=SimulationConfig(two_theta_max=60.0))
    rule = r"narrow.*: simulation: must hold the model's axis, 5..90 degrees, got 5..60"
    with pytest.raises(InputError, match=rule):
        PatternSource(PatternStore.open(path))
    PatternSource(PatternStore.open(path), Grid(two_theta_max=60.0))


def test_a_shared_file_becomes_a_store(shared_data: Path, tmp_path: Path) -> None:
    structures, _ = load_structures(shared_data / "extra_structures.npz")
    small = structures.offset.diff() <= 12
    some = structures[torch.nonzero(small).squeeze(1)[:60]]
    path = tmp_path / "extra.store.safetensors"
    rejected = generate_store(some, path, source=["extra_structures.npz"])
    store = PatternStore.open(path)
    assert len(store) + len(rejected) == len(some)
    intensity, _ = PatternSource(store).batch(torch.arange(len(store)), generator())
    assert bool((intensity.amax(dim=1) == 100.0).all())
