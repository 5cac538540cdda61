"""Packed structures: archives, faults, saving, conversion and indexing."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Composition, DummySpecies, Lattice, Structure

from xrdfast.data import packed_npz
from xrdfast.data.files import save_checked
from xrdfast.data.structures import (
    FORMAT,
    PackedStructures,
    check_packed,
    from_arrays,
    from_ase,
    from_pymatgen,
    load_structures,
    reduced_formula,
    to_pymatgen,
)
from xrdfast.errors import InputError

SETS = {"coremof": 11153, "inorganic_mp": 21979, "amcsd": 7330, "extra_structures": 1579}


def equal(one: PackedStructures, other: PackedStructures) -> bool:
    """Whether every field is, NaN equal to NaN."""
    for field in dataclasses.fields(PackedStructures):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            if (
                a.dtype != b.dtype
                or a.shape != b.shape
                or not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
            ):
                return False
        elif a != b:
            return False
    return True


def random_structures(n: int, seed: int = 0) -> PackedStructures:
    """Structures of 1 to 6 atoms with all fields set to something."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 7, n)
    atoms = [
        (rng.integers(1, 95, k), rng.uniform(0, 1, (k, 3)), rng.uniform(0, 1, k), rng.uniform(0, 3, k))
        for k in counts
    ]
    lattices = [np.diag(rng.uniform(3, 9, 3)) + rng.normal(0, 0.3, (3, 3)) for _ in range(n)]
    packed = from_arrays(lattices, atoms, [f"s{i}" for i in range(n)], family=[f"f{i % 3}" for i in range(n)])
    operators = torch.from_numpy(rng.integers(0, 4, n))
    return dataclasses.replace(
        packed,
        fold=torch.from_numpy(rng.integers(-1, 10, n).astype(np.int8)),
        space_group_01=torch.from_numpy(rng.integers(0, 231, n).astype(np.int16)),
        rotation_offset=torch.cat([torch.zeros(1, dtype=torch.int64), operators.cumsum(0)]),
        rotations=torch.from_numpy(rng.integers(-1, 2, (int(operators.sum()), 3, 3)).astype(np.int8)),
    )


def arrays(n: int = 3) -> dict[str, np.ndarray]:
    """Arrays of an archive of n rock-salt-like cells."""
    return {
        "offset": np.arange(0, 2 * n + 1, 2),
        "lattice": np.tile(4.0 * np.eye(3), (n, 1, 1)),
        "z": np.tile(np.array([11, 17], np.uint8), n),
        "frac": np.tile(np.array([[0, 0, 0], [0.5, 0.5, 0.5]], np.float32), (n, 1)),
        "occ_pct": np.full(2 * n, 100, np.uint8),
        "id": np.array([f"x/{i}" for i in range(n)], dtype="S8"),
        "formula": np.array(["Na1Cl1"] * n, dtype="S8"),
        "fold": np.arange(n, dtype=np.uint8),
        "sg_published": np.full(n, 221, np.int16),
        "sg_001": np.full(n, 221, np.int16),
        "sg_01": np.full(n, 221, np.int16),
    }


@pytest.mark.parametrize("name", SETS)
def test_shared_sets_load(shared_data, name):
    structures, rejected = load_structures(shared_data / f"{name}.npz")
    assert len(structures) + len(rejected) == SETS[name]
    assert len(rejected) <= 5 and all(r.reason for r in rejected)
    source = dict(np.load(shared_data / f"{name}.npz"))
    bad = {r.id for r in rejected}
    good = [i for i, identity in enumerate(source["id"][:200].tolist()) if identity.decode() not in bad]
    head = structures[: len(good)]
    assert head.ids == [source["id"][i].decode() for i in good]
    assert head.space_group_01.tolist() == source["sg_01"][good].tolist()
    for row, i in enumerate(good[:40]):
        one, (a, b) = head[row], source["offset"][i : i + 2]
        np.testing.assert_array_equal(one.fractional.numpy(), source["frac"][a:b].astype(np.float64))
        np.testing.assert_array_equal(one.atomic_number.numpy(), source["z"][a:b])
        np.testing.assert_array_equal(one.lattice[0].numpy(), source["lattice"][i])
        np.testing.assert_allclose(one.occupancy.numpy(), source["occ_pct"][a:b] / 100.0)
        if (one.occupancy == 1.0).all():  # per cent are too coarse to give the formula back
            assert reduced_formula(one.atomic_number.numpy(), one.occupancy.numpy()) == one.formula[0]


def test_labels_are_optional(tmp_path):
    required = ("offset", "lattice", "z", "frac", "occ_pct", "id")
    np.savez(tmp_path / "x.npz", **{name: arrays()[name] for name in required})
    structures, rejected = load_structures(str(tmp_path / "x.npz"))
    assert not rejected and structures.formula == ["Na1Cl1"] * 3 and structures.fold.tolist() == [-1] * 3
    assert structures.space_group_01.tolist() == [0] * 3


DAMAGE = {
    "no_frac": ({"frac": None}, "frac: must be present"),
    "no_id": ({"id": None}, "id: must be present"),
    "lattice_int": ({"lattice": np.ones((3, 3, 3), np.int64)}, "lattice: must be"),
    "lattice_flat": ({"lattice": np.ones((3, 9))}, "lattice: must be"),
    "z_float": ({"z": np.ones(6)}, "z: must be"),
    "z_large": ({"z": np.full(6, 257)}, "z: must be in 0..255, got 257..257"),
    "frac_text": ({"frac": np.full((6, 3), "a")}, "frac: must be"),
    "frac_short": ({"frac": np.zeros((5, 3))}, "frac: must have as many rows as z, 6, got 5"),
    "id_numbers": ({"id": np.arange(3)}, "id: must be"),
    "ids_few": ({"id": np.array(["a", "b"])}, "id: must have as many rows as lattice, 3, got 2"),
    "offset_end": ({"offset": np.array([0, 2, 4, 7])}, "offset: must rise from 0 to 6"),
    "offset_begin": ({"offset": np.array([1, 2, 4, 6])}, "offset: must rise"),
    "offset_falls": ({"offset": np.array([0, 4, 2, 6])}, "offset: must rise"),
    "offset_short": ({"offset": np.array([0, 6])}, "offset: must rise"),
    "offset_empty": ({"offset": np.zeros(0, np.int64)}, "offset: must rise"),
    "offset_huge": ({"offset": np.array([0, 2**62, 2**63, 6], np.uint64)}, "offset: must rise"),
    "label": ({"sg_01": np.array([1, 2, 231])}, "sg_01: must be in 0..230, got 1..231"),
    "label_wraps": ({"sg_01": np.array([1, 2, 65537])}, "sg_01: must be in 0..230"),
    "label_text": ({"sg_01": np.array(["a", "b", "c"])}, "sg_01: must be"),
    "label_short": ({"sg_01": np.array([1, 2])}, "sg_01: must have as many rows"),
    "fold": ({"fold": np.array([0, 1, 10])}, "fold: must be in -1..9"),
    "pickle": (
        {"formula": np.array([{}, {}, {}], dtype=object)},
        "file: must be a whole .npz without pickled",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_archives_are_refused(tmp_path, name):
    changes, message = DAMAGE[name]
    content = {key: value for key, value in (arrays() | changes).items() if value is not None}
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(InputError, match=f"x.npz: {message}") as caught:
        load_structures(tmp_path / "x.npz")
    assert "\n" not in str(caught.value)


def test_flipped_and_missing_bytes_of_archives_are_refused_or_harmless(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", **arrays(40))
    whole = (tmp_path / "whole.npz").read_bytes()
    rng = np.random.default_rng(0)
    damaged = tmp_path / "x.npz"
    refused = 0
    for trial in range(300):
        content = bytearray(whole)
        if trial % 3:
            content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        else:
            content = content[: rng.integers(len(content))]
        damaged.write_bytes(content)
        try:
            load_structures(damaged)
        except InputError as error:
            assert str(error).startswith(f"{damaged}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 200


def test_archives_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", **arrays())
    monkeypatch.setattr(packed_npz, "_MAX_UNPACKED", 100)
    with pytest.raises(InputError, match="size: must be at most 100 bytes unpacked"):
        load_structures(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("fractional", float("nan"), "fractional: must be finite"),
        ("lattice", float("inf"), "lattice: must be finite"),
        ("lattice", 0.0, "lattice: must be finite with a volume"),
        ("atomic_number", 0, "atomic_number: must be in 1..98"),
        ("atomic_number", 99, "atomic_number: must be in 1..98"),
        ("occupancy", -0.1, "occupancy: must be in 0.."),
        ("occupancy", float("nan"), "occupancy: must be in 0.."),
        ("b_iso", float("inf"), "b_iso: must be finite"),
    ],
)
def test_faults(field, value, reason):
    structures = random_structures(5)
    assert structures.faults() == {}
    tensor = getattr(structures, field).clone()
    rows = slice(2, 3) if field == "lattice" else slice(int(structures.offset[2]), int(structures.offset[3]))
    tensor[rows] = value
    faults = dataclasses.replace(structures, **{field: tensor}).faults()
    assert list(faults) == [2] and faults[2].startswith(reason)


def test_structures_with_faults_are_left_out(tmp_path):
    content = arrays()
    content["frac"][2] = np.nan
    np.savez(tmp_path / "x.npz", **content)
    structures, rejected = load_structures(tmp_path / "x.npz")
    assert structures.ids == ["x/0", "x/2"]
    assert rejected == [("x/1", "fractional: must be finite, below 1000")]


def test_paths_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "no.cif", "file: must exist"),
        (tmp_path / "a.txt", "type: must be .cif, .npz or .safetensors, got .txt"),
        (tmp_path / "empty", "folder: must hold .cif or packed .npz"),
        ([], "paths: must be at least one"),
    ]:
        with pytest.raises(InputError, match=message):
            load_structures(path)


def test_folders_go_on_past_bad_cifs(tmp_path):
    np.savez(tmp_path / "b.npz", **arrays())
    (tmp_path / "b.npz").rename(tmp_path / "b.NPZ")
    (tmp_path / "a.cif").write_text("not a CIF")
    calls = []
    structures, rejected = load_structures(tmp_path, progress=lambda *done: calls.append(done))
    assert len(structures) == 3 and calls == [(1, 2), (2, 2)]
    assert [r.id for r in rejected] == ["a.cif"] and rejected[0].reason.startswith(
        "file: must follow the CIF"
    )
    (tmp_path / "b.NPZ").unlink()
    with pytest.raises(InputError, match=r"got none; the first reason: a\.cif: file: must follow the CIF"):
        load_structures(tmp_path)


def test_save_and_load(tmp_path):
    for structures in (random_structures(20), random_structures(0), random_structures(30)[::-3]):
        structures.save(tmp_path / "x.safetensors")
        assert equal(PackedStructures.load(tmp_path / "x.safetensors"), structures)
    loaded, rejected = load_structures(tmp_path / "x.safetensors")
    assert equal(loaded, structures) and not rejected
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_every_flipped_bit_of_a_saved_tensor_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    structures = random_structures(10)
    structures.save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(1)
    for place in rng.integers(header, len(whole), 150).tolist():
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << int(rng.integers(8)))]) + whole[place + 1 :]
        )
        with pytest.raises(InputError, match="must match its checksum"):
            PackedStructures.load(path)
    for place in rng.integers(0, header, 250).tolist():
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << int(rng.integers(8)))]) + whole[place + 1 :]
        )
        try:
            assert equal(PackedStructures.load(path), structures)  # a flip in the format's version, for one
        except InputError as error:
            assert "\n" not in str(error)
    for end in (0, 7, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"x\.safetensors: "):
            PackedStructures.load(path)


def test_saved_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_checked(path, {"a": torch.zeros(1)}, {"format": "something else"})
    with pytest.raises(InputError, match="format: must be xrdfast structures, got something else"):
        PackedStructures.load(path)
    save_checked(path, {"a": torch.zeros(1)}, {"format": FORMAT})
    with pytest.raises(InputError, match="fields: must be those of PackedStructures"):
        PackedStructures.load(path)
    with pytest.raises(InputError, match="file: must be writable"):
        random_structures(1).save(tmp_path / "no" / "x.safetensors")


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 12))
def test_indexing_equals_picking_one_by_one(data, n):
    structures = random_structures(n, seed=n)
    singles = list(structures)
    form = data.draw(st.sampled_from(["slice", "list", "array", "tensor", "int32", "mask", "mask_tensor"]))
    if form == "slice":
        bound = st.one_of(st.none(), st.integers(-15, 15))
        index = slice(data.draw(bound), data.draw(bound), data.draw(st.sampled_from([None, 1, 2, 3, -1, -2])))
        rows = list(range(n))[index]
    elif form.startswith("mask"):
        mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
        rows = [i for i in range(n) if mask[i]]
        index = np.array(mask, dtype=bool) if form == "mask" else torch.tensor(mask, dtype=torch.bool)
    else:
        rows = data.draw(st.lists(st.integers(-n, n - 1), max_size=20)) if n else []
        index = {
            "list": list,
            "array": lambda r: np.array(r, dtype=np.int64),
            "tensor": lambda r: torch.tensor(r, dtype=torch.int64),
            "int32": lambda r: torch.tensor(r, dtype=torch.int32),
        }[form](rows)
    chosen = structures[index]
    expected = PackedStructures.concatenate([random_structures(0), *(singles[row] for row in rows)])
    assert equal(chosen, expected)
    assert chosen.faults() == {}


def test_indexing_with_numbers():
    structures = random_structures(4)
    for index in (2, -2, np.int64(2), np.int16(-2)):
        assert structures[index].ids == ["s2"] and len(structures[index]) == 1
    for index in (4, -5, [0, 4], [-5], torch.tensor([7]), [0.5], np.zeros((1, 1), int), [True, False]):
        with pytest.raises(IndexError, match="structure ind"):
            structures[index]


def test_windows_are_views_of_windows():
    structures = random_structures(9)
    whole = structures[np.arange(9)]
    assert equal(structures[2:8][1:5][-2], whole[[5]]) and equal(copy.copy(structures[3:5]), whole[[3, 4]])
    one = structures[4]
    assert one.fractional.data_ptr() == structures.fractional[structures.offset[4] :].data_ptr()
    with pytest.raises(AttributeError, match="PackedStructures has no attribute 'atoms'"):
        _ = one.atoms
    assert not hasattr(structures, "atoms")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.lattice = structures.lattice


def test_concatenate_needs_parts():
    with pytest.raises(ValueError, match="concatenate: parts must be at least one"):
        PackedStructures.concatenate([])


def test_more_rotations_than_a_structure_has_are_refused(tmp_path):
    """Their number goes into 16 bits of a multiplicity."""
    source = Structure(Lattice.cubic(4.0), ["Fe"], [[0, 0, 0]])
    packed = from_pymatgen([source], ids=["a"])
    many = torch.eye(3, dtype=torch.int8).expand(193, 3, 3).contiguous()
    hostile = dataclasses.replace(packed, rotations=many, rotation_offset=torch.tensor([0, 193]))
    with pytest.raises(InputError, match="rotations: must be at most 192 a structure, got 193"):
        check_packed(Path("a.safetensors"), hostile)


def test_pymatgen_there_and_back():
    lattice = Lattice.from_parameters(4, 5, 6, 80, 95, 101)
    source = Structure(
        lattice, ["Fe3+", {"Mg": 0.25, "Ca": 0.7}, "D"], [[0, 0, 0], [0.1, 0.2, 0.3], [0.6, 0.5, 0.9]]
    )
    packed = from_pymatgen([source], ids=["a"])
    assert packed.ids == ["a"] and packed.atomic_number.tolist() == [26, 12, 20, 1]
    assert packed.occupancy.tolist() == [1.0, 0.25, 0.7, 1.0]
    back = to_pymatgen(packed)
    np.testing.assert_allclose(back.lattice.matrix, source.lattice.matrix)
    np.testing.assert_allclose(back.frac_coords, source.frac_coords)
    assert all(
        site.species.almost_equals(Composition(c))
        for site, c in zip(back, ["Fe", "Mg.25Ca.7", "H"], strict=True)
    )
    again = from_pymatgen([back])
    assert torch.equal(again.atomic_number, packed.atomic_number) and again.formula == packed.formula


@pytest.mark.parametrize("symbol", ["X", "Xa", "Qq"])
def test_pymatgen_dummies_are_refused(symbol):
    source = Structure(Lattice.cubic(3), [DummySpecies(symbol)], [[0, 0, 0]])
    with pytest.raises(ValueError, match="from_pymatgen: species must be an element, got"):
        from_pymatgen([source])


def test_ase_there():
    atoms = ase.Atoms("NaCl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 1.25]], cell=[3, 4, 5], pbc=True)
    packed = from_ase([atoms, atoms])
    assert packed.ids == ["structure-0", "structure-1"] and packed.formula == ["Na1Cl1"] * 2
    np.testing.assert_allclose(packed.fractional[:2].numpy(), [[0, 0, 0], [0.5, 0.5, 0.25]], atol=1e-12)
    np.testing.assert_allclose(packed.lattice[0].numpy(), np.diag([3.0, 4.0, 5.0]))


def test_one_structure_is_no_list_of_them():
    one = Structure(Lattice.cubic(4.0), ["Na"], [[0, 0, 0]])
    for structures in (one, ["Na"], [one, 3]):
        with pytest.raises(TypeError, match="from_pymatgen: structures must be a list of Structures"):
            from_pymatgen(structures)
    for atoms in (ase.Atoms("Na", cell=[4, 4, 4]), ["Na"]):
        with pytest.raises(TypeError, match="from_ase: atoms must be a list of Atoms"):
            from_ase(atoms)
    with pytest.raises(ValueError, match="from_arrays: ids must have 2 rows as lattices, got 1"):
        from_pymatgen([one, one], ["a"])


def test_atomic_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"from_arrays: atomic numbers must be in 0\.\.255, got 300"):
        from_arrays([np.eye(3)], [(np.array([300]), np.zeros((1, 3)), np.ones(1), np.zeros(1))], ["a"])


@pytest.mark.parametrize(
    ("numbers", "occupancy", "formula"),
    [
        ([], [], ""),
        ([8, 1, 1], [1, 1, 1], "H2O1"),
        ([26, 26, 8], [0.5, 0.45, 1], "O20Fe19"),
        ([120], [1], "X1"),
    ],
)
def test_reduced_formula(numbers, occupancy, formula):
    assert reduced_formula(numbers, occupancy) == formula
