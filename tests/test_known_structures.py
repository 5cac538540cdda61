"""The library of known structures: building, keeping, matching, and what it says about space groups."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from xrdfast.bragg import KA1_WAVELENGTH, Grid
from xrdfast.data.generate import (
    draw_strain,
    free_metric_changes,
    generate_store,
    strained_reciprocal_metric,
)
from xrdfast.data.profiles import ProfileConfig, draw_profiles
from xrdfast.data.store import PatternStore
from xrdfast.data.structures import PackedStructures, analyse_symmetry, from_arrays
from xrdfast.errors import InputError
from xrdfast.ops.render_patterns import render_patterns
from xrdfast.posterior import pool_posteriors
from xrdfast.retrieval import POOL_EXPONENTS, KnownStructures, Matches, fit_join, join
from xrdfast.symmetry import class_index

ZERO, HALF = [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]


def structures() -> PackedStructures:
    """Caesium chlorides (cubic, 221) and tetragonal cells (123) of several edges, and one triclinic cell."""
    cells, atoms, ids = [], [], []
    for i, edge in enumerate(np.linspace(3.6, 4.6, 6)):
        cells += [np.eye(3) * edge, np.diag([edge, edge, 1.3 * edge])]
        atoms += [(np.array([20 + i, 17]), np.array([ZERO, HALF]), np.ones(2), np.zeros(2))] * 2
        ids += [f"cubic/{i}", f"mp-{i}"]
    cells.append(np.array([[5.1, 0, 0], [0.9, 6.2, 0], [0.7, 1.1, 7.3]]))
    places = np.array([ZERO, [0.21, 0.43, 0.11], [0.62, 0.17, 0.71]])
    atoms.append((np.array([26, 8, 8]), places, np.ones(3), np.zeros(3)))
    return analyse_symmetry(from_arrays(cells, atoms, [*ids, "triclinic"]), n_workers=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PatternStore:
    path = tmp_path_factory.mktemp("known") / "known.store.safetensors"
    assert generate_store(structures(), path) == []
    return PatternStore.open(path)


@pytest.fixture(scope="module")
def known(store: PatternStore) -> KnownStructures:
    return KnownStructures.build(store)


def scans_of(store: PatternStore, rows: list[int], strain: float, seed: int = 0) -> tuple[list, list]:
    """Angles and counts of laboratory scans of strained cells."""
    generator = torch.Generator().manual_seed(seed)
    families = store.gather(torch.tensor(rows))
    n = len(rows)
    strains = draw_strain(n, strain, generator)
    metric = strained_reciprocal_metric(
        families.lattice, families.rotation_offset, families.rotations, strains
    )
    none = torch.zeros(n, dtype=torch.float64)
    usual = ProfileConfig(
        fwhm=(0.09, 0.09), crystallite_size=(1000.0, 1000.0), microstrain=(5e-4, 5e-4), doublet_share=1.0
    )
    profile = draw_profiles(n, usual, generator)._replace(
        counts=none,
        march_r=none + 1.0,
        zero_shift=none,
        sample_displacement=none,
        two_theta_first=none,
        two_theta_last=none + 180.0,
        impurity_count=none,
    )
    columns = families.offset, families.hkl, families.multiplicity, families.f_squared, metric
    rendered = render_patterns(
        *columns,
        torch.ones(n, dtype=torch.float64),
        families.rotation_offset,
        families.rotations,
        profile,
        torch.arange(n),
        seed=seed,
        wavelength=KA1_WAVELENGTH,
        grid=Grid(),
    )
    counts = np.random.default_rng(seed).poisson(rendered.intensity.numpy() * 20.0 + 40.0).astype(np.float64)
    return [Grid().two_theta()] * n, list(counts)


def test_free_strains_keep_the_symmetry_and_no_other_does() -> None:
    some = structures()
    change = free_metric_changes(some.lattice, some.rotation_offset, some.rotations).numpy()
    assert (change != 0.0).any(axis=2).sum(axis=1).tolist() == [1, 2] * 6 + [6]
    metric = strained_reciprocal_metric(some.lattice, some.rotation_offset, some.rotations).numpy()
    np.testing.assert_allclose(change[:, 0], -2.0 / math.sqrt(3.0) * metric, rtol=1e-12, atol=1e-15)

    def full(six: np.ndarray) -> np.ndarray:
        a, b, c, d, e, f = six
        return np.array([[a, f, e], [f, b, d], [e, d, c]])

    for i, one in enumerate(some):
        for row in change[i]:
            for turn in one.rotations.numpy().astype(np.float64):  # hkl' = hkl W keeps hkl G hkl
                np.testing.assert_allclose(turn @ full(row) @ turn.T, full(row), atol=1e-12)
    # The six of the triclinic cell are independent and orthonormal as strains: E = -B^-T dG B^-1 / 2.
    cell = some.lattice[-1].numpy()
    strains = np.stack([-0.5 * cell.T @ full(row) @ cell for row in change[-1]]).reshape(6, 9)
    np.testing.assert_allclose(strains @ strains.T, np.eye(6), atol=1e-12)


def test_nearest_structure_is_the_one_that_was_measured(store: PatternStore, known: KnownStructures) -> None:
    rows = [0, 3, 6, 9, 12]
    angles, counts = scans_of(store, rows, strain=0.002)
    matches = known.match(angles, counts, [KA1_WAVELENGTH] * 5, n_best=4)
    assert matches.structure[:, 0].tolist() == rows
    assert bool((matches.score[:, 0] > 0.8).all())
    assert bool((matches.score[:, 0] == matches.score.amax(1)).all())
    assert (matches.space_group.argmax(1) + 1).tolist() == store.space_group_01[rows].tolist()
    torch.testing.assert_close(matches.space_group.sum(1), torch.ones(5))
    described = known.describe(matches)
    assert [scan[0]["id"] for scan in described] == [store.ids[row] for row in rows]


def test_strain_is_measured_against_the_library(known: KnownStructures) -> None:
    """Lines of a cell that is 1.2 % larger."""
    edge = 1.012 * 3.6
    hkl = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [2, 0, 0], [2, 1, 0], [2, 1, 1]])
    sine = 0.5 * KA1_WAVELENGTH * np.sqrt((hkl**2).sum(1)) / edge
    two_theta = torch.from_numpy(2.0 * np.degrees(np.arcsin(sine)))
    heights = torch.tensor([10.0, 100.0, 3.0, 20.0, 5.0, 40.0], dtype=torch.float64)
    matches = known.match_lines(torch.tensor([0, 6, 6]), two_theta, heights, n_best=20)
    assert known.ids[int(matches.structure[0, 0])] == "cubic/0"
    assert float(matches.strain[0, 0]) == pytest.approx(0.012, abs=0.001)
    assert float(matches.distortion[0, 0]) == 0.0
    assert matches.structure[0, 13:].tolist() == [-1] * 7
    # A list without lines is like nothing: no structure, and no group before another; so is a scan without peaks.
    assert matches.structure[1].unique().tolist() == [-1]
    flat = known.match([np.arange(10.0, 60.0, 0.02)], [np.full(2500, 100.0)], [KA1_WAVELENGTH])
    for row in (matches.space_group[1], flat.space_group[0]):
        torch.testing.assert_close(row, torch.full((230,), 1.0 / 230.0))


def test_excluded_structures_are_not_found(store: PatternStore, known: KnownStructures) -> None:
    angles, counts = scans_of(store, [0], strain=0.0)
    exclude = torch.zeros(1, len(known), dtype=torch.bool)
    exclude[0, 0] = True
    matches = known.match(angles, counts, [KA1_WAVELENGTH], n_best=20, exclude=exclude)
    assert 0 not in matches.structure[0].tolist()
    with pytest.raises(ValueError, match="exclude must be"):
        known.match(angles, counts, [KA1_WAVELENGTH], exclude=exclude[:, :3])


def test_many_scans_are_as_each_alone(store: PatternStore, known: KnownStructures) -> None:
    rows = [i % 13 for i in range(40)]
    angles, counts = scans_of(store, rows, strain=0.01)
    together = known.match(angles, counts, [KA1_WAVELENGTH] * 40)
    alone = known.match(angles[35:36], counts[35:36], [KA1_WAVELENGTH])
    for many, one in zip(together, alone, strict=True):
        torch.testing.assert_close(many[35:36], one, rtol=1e-4, atol=1e-5)
    assert isinstance(known.match([], [], []), Matches)
    assert known.match([], [], []).space_group.shape == (0, 230)


def test_other_wavelengths_are_mapped(store: PatternStore, known: KnownStructures) -> None:
    angles, counts = scans_of(store, [6], strain=0.0)
    sine = np.sin(np.radians(0.5 * angles[0])) * (0.9 / KA1_WAVELENGTH)
    matches = known.match([2.0 * np.degrees(np.arcsin(sine))], counts, [0.9])
    assert int(matches.structure[0, 0]) == 6


def test_a_library_is_kept_whole(known: KnownStructures, tmp_path: Path) -> None:
    path = tmp_path / "known.safetensors"
    known.save(path)
    again = KnownStructures.load(path)
    assert again.ids == known.ids
    torch.testing.assert_close(again.metric_change, known.metric_change)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="checksum"):
        KnownStructures.load(path)
    path.write_bytes(content[:200])
    with pytest.raises(InputError, match="must be"):
        KnownStructures.load(path)


@pytest.mark.parametrize(
    ("name", "change", "rule"),
    [
        ("line_offset", lambda x: x.flip(0), "line_offset: must rise"),
        ("hkl", lambda x: x[:-1], "line_amplitude: must be"),
        ("space_group_number", lambda x: x + 200, "must be in 0..230"),
        ("metric", lambda x: x * math.nan, "metric: must be finite"),
        ("ids", lambda x: x[1:], "strings: must be"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    known: KnownStructures, tmp_path: Path, name: str, change, rule: str
) -> None:
    fields = {key: value for key, value in vars(known).items() if not key.startswith("_")}
    changed = KnownStructures(**(fields | {name: change(fields[name])}))
    changed.save(tmp_path / "changed.safetensors")
    with pytest.raises(InputError, match=rule):
        KnownStructures.load(tmp_path / "changed.safetensors")


def test_a_library_of_nothing_is_refused(known: KnownStructures, tmp_path: Path) -> None:
    fields = {key: value for key, value in vars(known).items() if not key.startswith("_")}
    none = {name: value[:0] for name, value in fields.items() if name not in ("line_offset", "evidence")}
    KnownStructures(**none, line_offset=torch.zeros(1, dtype=torch.int64)).save(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="structures: must be one or more, got none"):
        KnownStructures.load(tmp_path / "none.safetensors")


def test_other_files_are_refused(store: PatternStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format: must be xrdfast-library"):
        KnownStructures.load(store.paths[0])
    with pytest.raises(InputError, match="must be"):
        KnownStructures.load(tmp_path / "nothing.safetensors")


def test_a_store_of_fewer_angles_is_refused(tmp_path: Path) -> None:
    from xrdfast.data.store import SimulationConfig

    path = tmp_path / "short.store.safetensors"
    generate_store(structures()[:2], path, simulation=SimulationConfig(two_theta_max=60.0))
    with pytest.raises(InputError, match="must reach"):
        KnownStructures.build(PatternStore.open(path))


def test_unlabelled_structures_say_nothing(store: PatternStore, known: KnownStructures) -> None:
    fields = {key: value for key, value in vars(known).items() if not key.startswith("_")}
    mute = KnownStructures(
        **(fields | {"space_group_number": torch.zeros(len(known), dtype=torch.int16)}),
    )
    angles, counts = scans_of(store, [0], strain=0.0)
    matches = mute.match(angles, counts, [KA1_WAVELENGTH])
    assert int(matches.structure[0, 0]) == 0
    system = torch.tensor(mute.evidence.system).exp()[torch.tensor(class_index("crystal_system"))]
    torch.testing.assert_close(matches.space_group[0], system / system.sum())


def test_evidence_can_be_replaced(store: PatternStore, known: KnownStructures) -> None:
    angles, counts = scans_of(store, [0], strain=0.0)
    sure = known.match(angles, counts, [KA1_WAVELENGTH]).space_group.max()
    fields = {key: value for key, value in vars(known).items() if not key.startswith("_")}
    flat = dataclasses.replace(known.evidence, floor=50.0)
    doubting = KnownStructures(**(fields | {"evidence": flat}))
    assert float(doubting.match(angles, counts, [KA1_WAVELENGTH]).space_group.max()) < 0.01 < float(sure)


def matches_of(score: torch.Tensor, space_group: torch.Tensor) -> Matches:
    """Of scans with these likenesses (n_scans, n_best) and probabilities."""
    nothing = torch.zeros_like(score)
    return Matches(nothing.long(), score, nothing, nothing, nothing, space_group)


def test_known_structures_say_more_where_one_of_them_is_like_the_scan() -> None:
    generator = torch.Generator().manual_seed(0)
    network, own = (torch.randn(3, 230, generator=generator).softmax(1) for _ in range(2))
    matches = matches_of(torch.tensor([[0.9, 0.2], [0.6, 0.1], [0.1, 0.65]]), own)
    unlike, like = ((1.0, 0.0), (0.0, 0.0)), ((0.0, 0.0), (1.0, 0.0))
    joined = join(network, matches, (unlike, like)).space_group
    torch.testing.assert_close(joined[[0, 2]], pool_posteriors([own], [(1.0, 0.0)]).space_group[[0, 2]])
    torch.testing.assert_close(joined[1], pool_posteriors([network], [(1.0, 0.0)]).space_group[1])


def test_a_kind_of_scans_that_is_not_there_keeps_its_exponents() -> None:
    number = torch.tensor([1, 2, 3])
    own = torch.full((3, 230), 0.1 / 229).scatter(1, number[:, None] - 1, 0.9)
    for score, kept in ((0.2, 1), (0.9, 0)):
        fitted = fit_join(own, matches_of(torch.full((3, 10), score), own), number)
        assert fitted[kept] == POOL_EXPONENTS[kept]
        assert fitted[1 - kept] != POOL_EXPONENTS[1 - kept]


def test_what_is_right_where_is_found_by_the_fit() -> None:
    """The network is right where nothing is alike, known structures where something is."""
    generator = torch.Generator().manual_seed(1)
    number = torch.randint(1, 231, (400,), generator=generator)
    like = torch.arange(400) % 2 == 0
    right = torch.full((400, 230), 0.1 / 229).scatter(1, number[:, None] - 1, 0.9)
    other = (number + torch.randint(1, 230, (400,), generator=generator) - 1) % 230
    wrong = torch.full((400, 230), 0.1 / 229).scatter(1, other[:, None], 0.9)
    network, own = torch.where(like[:, None], wrong, right), torch.where(like[:, None], right, wrong)
    matches = matches_of(torch.where(like, 0.8, 0.5)[:, None], own)
    unlike, alike = fit_join(network, matches, number)
    assert unlike[0][0] > 2 * unlike[1][0]
    assert alike[1][0] > 2 * alike[0][0]
    joined = join(network, matches, (unlike, alike)).space_group
    assert float((joined.argmax(1) == number - 1).double().mean()) > 0.99
