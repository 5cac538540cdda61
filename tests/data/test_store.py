"""The pattern store: what is written comes back, damage is named, and relatives share a side of a split."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from xrdfast.data.files import write_atomically
from xrdfast.data.folds import assign_folds
from xrdfast.data.store import PatternStore, SimulationConfig, StoreWriter
from xrdfast.data.structures import PackedStructures
from xrdfast.errors import InputError
from xrdfast.ops.simulate import Families


def make_structures(n: int, seed: int = 0) -> PackedStructures:
    """Structures of one atom each in random cells; structure i has i % 3 rotations."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.arange(n) % 3
    number = torch.randint(1, 231, (n,), generator=generator, dtype=torch.int16)
    return PackedStructures(
        offset=torch.arange(n + 1),
        lattice=torch.eye(3, dtype=torch.float64)
        * (3 + 5 * torch.rand(n, 1, 1, generator=generator)).double(),
        atomic_number=torch.full((n,), 14, dtype=torch.uint8),
        fractional=torch.zeros(n, 3, dtype=torch.float64),
        occupancy=torch.ones(n, dtype=torch.float64),
        b_iso=torch.zeros(n, dtype=torch.float64),
        ids=[f"s{seed}/{i}" for i in range(n)],
        formula=[f"Si{i}" for i in range(n)],
        family=["" if i % 2 else f"minéral {i}" for i in range(n)],
        fold=(torch.arange(n) % 10).to(torch.int8),
        space_group_published=number,
        space_group_001=number,
        space_group_01=number,
        rotation_offset=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        rotations=torch.eye(3, dtype=torch.int8).repeat(int(counts.sum()), 1, 1),
        to_standard=torch.full((n, 3, 3), float("nan"), dtype=torch.float64),
    )


def make_families(n: int, seed: int = 0) -> Families:
    """Random families, 0 to 19 a structure."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 20, (n,), generator=generator)
    total = int(counts.sum())
    return Families(
        offset=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        hkl=torch.randint(-9, 10, (total, 3), generator=generator, dtype=torch.int16),
        multiplicity=torch.randint(1, 49, (total,), generator=generator, dtype=torch.int16),
        f_squared=torch.rand(total, generator=generator),
        status=torch.zeros(n, dtype=torch.int32),
    )


def write_store(
    path: Path, n: int = 30, seed: int = 0, **simulation: float
) -> tuple[PackedStructures, Families]:
    structures, families = make_structures(n, seed), make_families(n, seed)
    with StoreWriter(path, SimulationConfig(**simulation), ["a.npz"]) as writer:
        writer.append(structures, families)
    return structures, families


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.store.safetensors"


def test_what_is_written_comes_back(path: Path) -> None:
    structures, families = write_store(path, wavelength=1.5)
    store = PatternStore.open(path)
    store.verify()
    assert len(store) == 30
    assert store.simulation == SimulationConfig(wavelength=1.5)
    assert (store.ids, store.formula, store.family) == (structures.ids, structures.formula, structures.family)
    for name in ("lattice", "fold", "space_group_published", "space_group_001", "space_group_01"):
        assert torch.equal(getattr(store, name), getattr(structures, name)), name
    assert bool(store.to_standard.isnan().all())
    assert torch.equal(store.n_families, families.offset.diff())
    batch = store.gather(torch.arange(30))
    for name in ("offset", "hkl", "multiplicity", "f_squared"):
        assert torch.equal(getattr(batch, name), getattr(families, name)), name
    for name in ("lattice", "rotation_offset", "rotations"):
        assert torch.equal(getattr(batch, name), getattr(structures, name)), name
    assert torch.equal(batch.space_group_number, structures.space_group_01.long())
    # any reader of the format sees the same tensors
    assert torch.equal(load_file(path)["hkl_multiplicity"][:, :3], families.hkl)


def test_pieces_make_the_same_file_as_one_append(path: Path, tmp_path: Path) -> None:
    structures, families = write_store(path)
    other = tmp_path / "b.store.safetensors"
    with StoreWriter(other, SimulationConfig(), ["a.npz"]) as writer:
        for begin, end in ((0, 7), (7, 7), (7, 30)):
            a, b = families.offset[begin], families.offset[end]
            piece = Families(
                families.offset[begin : end + 1] - a, *(x[a:b] for x in families[1:4]), families.status
            )
            writer.append(structures[begin:end], piece)
        assert len(writer) == 30
    assert other.read_bytes() == path.read_bytes()


def test_names_that_are_no_text_are_kept(path: Path) -> None:
    """A file's name is its id, and may be any bytes."""
    structures = make_structures(1)
    structures.ids[0] = "a\udcff.cif"
    with StoreWriter(path, SimulationConfig(), ["a.npz"]) as writer:
        writer.append(structures, make_families(1))
    assert PatternStore.open(path).ids == ["a\udcff.cif"]


def test_an_empty_store_opens(path: Path) -> None:
    write_store(path, n=0)
    store = PatternStore.open(path)
    assert len(store) == 0
    assert len(store.gather(torch.zeros(0, dtype=torch.int64))) == 0
    assert len(store.select()) == 0


def test_gather_keeps_order_and_repeats(path: Path) -> None:
    _, families = write_store(path)
    batch = PatternStore.open(path).gather(torch.tensor([29, 3, 3]))
    for row, source in enumerate((29, 3, 3)):
        mine = slice(batch.offset[row], batch.offset[row + 1])
        theirs = slice(families.offset[source], families.offset[source + 1])
        assert torch.equal(batch.hkl[mine], families.hkl[theirs])
        assert torch.equal(batch.multiplicity[mine], families.multiplicity[theirs])
        assert torch.equal(batch.f_squared[mine], families.f_squared[theirs])
    assert batch.rotation_offset.tolist() == [0, 2, 2, 2]


@pytest.mark.parametrize(
    "indices", [torch.tensor([30]), torch.tensor([-1]), torch.tensor([0.5]), torch.zeros(1, 1).long()]
)
def test_gather_refuses_other_indices(path: Path, indices: torch.Tensor) -> None:
    write_store(path)
    with pytest.raises(ValueError, match="gather: indices must be"):
        PatternStore.open(path).gather(indices)


def test_several_files_are_one_store(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.store.safetensors"
    first, second = write_store(path, n=7), write_store(other, n=11, seed=1)
    store = PatternStore.open([path, other])
    assert len(store) == 18
    assert store.ids == first[0].ids + second[0].ids
    batch = store.gather(torch.tensor([17, 0]))
    assert torch.equal(
        batch.hkl, torch.cat([second[1].hkl[second[1].offset[10] :], first[1].hkl[: first[1].offset[1]]])
    )
    assert torch.equal(batch.lattice, torch.stack([second[0].lattice[10], first[0].lattice[0]]))
    write_store(other, n=11, wavelength=1.0)
    with pytest.raises(InputError, match=r"b\.store\.safetensors: simulation: must equal"):
        PatternStore.open([path, other])
    with pytest.raises(ValueError, match="open: paths must be at least one"):
        PatternStore.open([])
    with pytest.raises(InputError, match=r"a\.store\.safetensors: stores: must each be given once"):
        PatternStore.open([path, tmp_path / "." / path.name])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_store_cut_short_is_named(path: Path, share: float) -> None:
    write_store(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=r"a\.store\.safetensors: file: must be") as caught:
        PatternStore.open(path)
    assert "\n" not in str(caught.value)


def test_a_missing_store_is_named(path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.store\.safetensors: file: must be readable"):
        PatternStore.open(path)


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> None:
    """Saves a store again with some tensors or metadata changed (checksums left as they were)."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        old = file.metadata()
    content = {name: tensor.clone() for name, tensor in load_file(path).items()} | (tensors or {})
    save_file(
        {name: tensor for name, tensor in content.items() if tensor.numel() or tensor.dim()},
        path,
        old | metadata,
    )


def with_checksums(path: Path) -> dict[str, str]:
    """Metadata whose checksums fit the tensors in the file, to reach the checks behind them."""
    import zlib

    sums = {name: zlib.crc32(tensor.numpy().tobytes()) for name, tensor in load_file(path).items()}
    return {"crc32": json.dumps(sums)}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "other"}, "format: must be xrdfast-store, got other"),
        ({"version": "99"}, "version: must be 1, got 99"),
        ({"simulation": "{}x"}, "metadata: must describe"),
        ({"simulation": '{"colour": 1}'}, "metadata: must describe"),
        ({"crc32": "{}"}, "checksum"),
    ],
)
def test_other_formats_and_versions_are_named(path: Path, metadata: dict[str, str], message: str) -> None:
    write_store(path)
    rewrite(path, **metadata)
    with pytest.raises(InputError, match=message):
        PatternStore.open(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fold", torch.full((30,), 12, dtype=torch.int8), "fold: must be in -1..9"),
        (
            "space_group_01",
            torch.full((30,), 231, dtype=torch.int16),
            r"space_group_01: must be in 0\.\.230, got 231",
        ),
        ("space_group_001", torch.full((30,), -1, dtype=torch.int16), "space_group_001: must be in"),
        ("family_offset", torch.arange(31), "family_offset: must rise from 0 to"),
        (
            "rotation_offset",
            torch.cat([torch.tensor([0, 30]), torch.full((29,), 29)]),
            "rotation_offset: must rise",
        ),
        ("lattice", torch.full((30, 3, 3), float("nan"), dtype=torch.float64), "lattice: must be finite"),
        ("lattice", torch.zeros(29, 3, 3, dtype=torch.float64), r"lattice: must be \(30, 3, 3\) float64"),
        ("f_squared", torch.zeros(5, dtype=torch.float64), "hkl_multiplicity: must be|f_squared: must be"),
        ("strings", torch.tensor(list(b"{}"), dtype=torch.uint8), "strings: must be JSON lists"),
        (
            "strings",
            torch.tensor(list(b'{"ids":[],"formula":[],"family":[]}'), dtype=torch.uint8),
            "strings: must be 30",
        ),
    ],
)
def test_values_outside_their_rules_are_named(
    path: Path, name: str, value: torch.Tensor, message: str
) -> None:
    write_store(path)
    rewrite(path, {name: value})
    rewrite(path, **with_checksums(path))
    with pytest.raises(InputError, match=message):
        PatternStore.open(path)


def test_changed_bytes_are_found(path: Path) -> None:
    write_store(path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    entries = json.loads(path.read_bytes()[8 : 8 + header])
    for name, when in (
        ("lattice", "open"),
        ("strings", "open"),
        ("f_squared", "verify"),
        ("hkl_multiplicity", "verify"),
    ):
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[8 + header + entries[name]["data_offsets"][0] + 5] ^= 1
        damaged = path.with_name("damaged.safetensors")
        damaged.write_bytes(changed)
        with pytest.raises(InputError, match=rf"damaged\.safetensors: {name}: must match its checksum"):
            store = PatternStore.open(damaged)
            assert when == "verify"
            store.verify()


def test_a_write_that_fails_keeps_the_old_store(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            InputError, match=r"a\.store\.safetensors: file: must be writable, got No space left"
        ):
            write_store(path, seed=1)
    with pytest.raises(KeyboardInterrupt), StoreWriter(path, SimulationConfig()) as writer:
        writer.append(make_structures(3), make_families(3))
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be writable, got No such file"):
        write_store(tmp_path / "none" / "a.store.safetensors")
    with (
        pytest.raises(InputError, match="must be writable"),
        write_atomically(tmp_path / "none" / "b") as file,
    ):
        file.write(b"")


def test_append_refuses_families_of_other_structures(path: Path) -> None:
    message = "append: families must be of 3 structures, got 4"
    with pytest.raises(ValueError, match=message), StoreWriter(path, SimulationConfig()) as writer:
        writer.append(make_structures(3), make_families(4))
    assert not path.exists()


def write_labelled(path: Path, **columns: list) -> PatternStore:
    n = len(next(iter(columns.values())))
    types = {"formula": None, "family": None, "fold": torch.int8}
    values = {
        name: column
        if types.get(name, torch.int16) is None
        else torch.tensor(column, dtype=types.get(name, torch.int16))
        for name, column in columns.items()
    }
    with StoreWriter(path, SimulationConfig()) as writer:
        writer.append(replace(make_structures(n), **values), make_families(n))
    return PatternStore.open(path)


def test_select_takes_labelled_clean_patterns_of_folds(path: Path) -> None:
    store = write_labelled(path, space_group_01=[0, 5, 5, 9], space_group_001=[0, 5, 3, 9], fold=[0, 0, 1, 2])
    assert store.select().tolist() == [1, 3]
    assert store.select(clean=False).tolist() == [1, 2, 3]
    assert store.select([0, 1], clean=False).tolist() == [1, 2]
    counts = store.group_counts()
    assert counts.shape == (230,)
    assert (int(counts.sum()), int(counts[4]), int(counts[8])) == (3, 2, 1)
    assert int(store.group_counts(torch.tensor([3, 3]))[8]) == 2


def test_split_holds_folds_out(path: Path) -> None:
    store = write_labelled(path, formula=["A", "A", "B", "C"], fold=[0, 0, 1, 2])
    training, validation = store.split([0])
    assert (training.tolist(), validation.tolist()) == ([2, 3], [0, 1])


def test_split_refuses_relatives_on_both_sides(path: Path) -> None:
    store = write_labelled(path, formula=["A", "B", "A"], fold=[0, 1, 2])
    with pytest.raises(InputError, match=r"fold: must be one for equal formulas .* got two for A"):
        store.split([0])
    store.split([1])
    store = write_labelled(path, formula=["A", "B", "C"], family=["", "x", "X"], fold=[0, 1, 2])
    with pytest.raises(InputError, match=r"fold: must be one for equal families .* got two for x"):
        store.split([1])
    assert store.split([0])[1].tolist() == [0]
    store = write_labelled(path, fold=[0, -1, 2])
    with pytest.raises(InputError, match="fold: must be assigned for a split, got -1 for s0/1"):
        store.split([0])


names = st.lists(st.tuples(st.sampled_from("ABCDEFGH"), st.sampled_from(["", "x", "y", "z"])), max_size=30)


@given(names, st.randoms())
@settings(max_examples=60, deadline=None)
def test_relatives_share_a_fold_in_any_order(rows: list[tuple[str, str]], random) -> None:
    folds = assign_folds([a for a, _ in rows], [b for _, b in rows])
    assert folds.dtype == torch.int8
    assert bool(((folds >= 0) & (folds < 10)).all())
    for (formula, family), fold in zip(rows, folds.tolist(), strict=True):
        for (other_formula, other_family), other in zip(rows, folds.tolist(), strict=True):
            if formula == other_formula or (family and family == other_family):
                assert fold == other
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = assign_folds([rows[i][0] for i in order], [rows[i][1] for i in order])
    assert shuffled.tolist() == [int(folds[i]) for i in order]


def test_given_folds_are_kept_and_passed_on() -> None:
    given_folds = torch.tensor([7, -1, -1, 3], dtype=torch.int8)
    folds = assign_folds(["A", "A", "B", "C"], ["", "m", "M", ""], given_folds)
    assert folds.tolist() == [7, 7, 7, 3]
    with pytest.raises(
        ValueError, match=r"assign_folds: fold must be one for the relatives of B, got \[3, 7\]"
    ):
        assign_folds(["A", "B", "C"], ["m", "m", "m"], torch.tensor([7, -1, 3]))
    with pytest.raises(ValueError, match="assign_folds: family and fold must have 1 rows"):
        assign_folds(["A"], [])


def test_folds_spread_evenly() -> None:
    counts = torch.bincount(assign_folds([f"X{i}" for i in range(5000)], [""] * 5000).long(), minlength=10)
    assert 400 < int(counts.min()) <= int(counts.max()) < 600


def test_no_formula_and_group_lies_on_both_sides_of_the_shared_files(shared_data: Path) -> None:
    """All shared structure files together: by their own folds, and by folds computed as for a user's data."""
    formula, group, own = [], [], []
    for name in ("coremof", "inorganic_mp", "amcsd", "extra_structures"):
        data = np.load(shared_data / f"{name}.npz", allow_pickle=False)
        formula += [text.decode() for text in data["formula"]]
        group += data["sg_01"].tolist()
        own += data["fold"].tolist()
    pairs = list(zip(formula, group, strict=True))
    computed = assign_folds(formula, [""] * len(formula)).tolist()
    for folds in (own, computed):
        training = {pair for pair, fold in zip(pairs, folds, strict=True) if fold != 0}
        validation = {pair for pair, fold in zip(pairs, folds, strict=True) if fold == 0}
        assert len(training) > 10_000
        assert len(validation) > 1_000
        assert not training & validation
    assert assign_folds(formula, [""] * len(formula), torch.tensor(own, dtype=torch.int8)).tolist() == own
