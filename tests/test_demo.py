"""The demo: its structures, their made-up relatives, a run in seconds, and, marked long, the whole of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator

from xrdfast import demo
from xrdfast.data.store import PatternStore
from xrdfast.data.structures import PackedStructures, analyse_symmetry
from xrdfast.prediction import Prediction
from xrdfast.symmetry import TASKS


@pytest.fixture(scope="module")
def prototypes() -> PackedStructures:
    return demo.load_prototypes()


@pytest.fixture(scope="module")
def some(prototypes) -> PackedStructures:
    """Every twelfth of the small prototypes, analysed."""
    small = torch.nonzero(prototypes.offset.diff() <= 16)[:, 0]
    return analyse_symmetry(prototypes[small[::12]], n_workers=1)


def test_prototypes(prototypes):
    assert len(prototypes) == 288 and not prototypes.faults()
    assert len(set(prototypes.ids)) == 288
    # AFLOW's label ends in space group and occupied sites, as AB_cF8_225_a_b.
    salt = next(i for i, name in enumerate(prototypes.ids) if "AB_cF8_225_a_b" in name)
    one = prototypes[salt]
    assert len(one.atomic_number) in (2, 8) and one.family == ["AB_cF8_225_a_b"]
    analysed = analyse_symmetry(prototypes[salt : salt + 1], n_workers=1)
    assert analysed.space_group_01.tolist() == [225]


def test_relatives_keep_their_symmetry_and_differ(some):
    n_variants = 3
    made = demo.vary_structures(some, n_variants, Generator().manual_seed(1))
    assert len(made) == n_variants * len(some) and not made.faults()
    assert made.family == [family for family in some.family for _ in range(n_variants)]
    unlabelled = dataclasses.replace(
        made,
        space_group_001=torch.zeros_like(made.space_group_001),
        space_group_01=torch.zeros_like(made.space_group_01),
    )
    found = analyse_symmetry(unlabelled, n_workers=1)
    # Never below the group they come from; by chance a little above it, which spglib then finds.
    same = found.space_group_01 == made.space_group_01
    assert float(same.double().mean()) > 0.95
    volume = torch.linalg.det(made.lattice).abs().view(-1, n_variants)
    assert (volume.std(1) > 0).all()
    again = demo.vary_structures(some, n_variants, Generator().manual_seed(1))
    assert torch.equal(again.lattice, made.lattice) and torch.equal(again.atomic_number, made.atomic_number)
    for one, parent in zip(made[::n_variants], some, strict=True):
        n_elements = len(parent.atomic_number.unique())
        assert len(one.atomic_number.unique()) == n_elements  # different elements stay different


def test_split_keeps_relatives_together_and_teaches_every_group(prototypes):
    analysed = analyse_symmetry(prototypes, n_workers=1)
    clean = analysed[analysed.space_group_001 == analysed.space_group_01]
    parts = demo.split_structures(clean)
    training, calibration, held_out = parts
    assert sum(map(len, parts)) == len(clean)
    assert len(calibration) >= 20 and len(held_out) >= 50
    names = [set(part.family) | set(part.formula) for part in parts]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    taught = set(training.space_group_01.tolist())
    assert set(held_out.space_group_01.tolist()) <= taught
    for part, same in zip(parts, demo.split_structures(clean), strict=True):
        assert part.ids == same.ids


def run(folder: Path, minutes: float) -> tuple[bool, Prediction, dict]:
    shown: list[Prediction] = []
    passed = demo.run_demo(folder, minutes, shown.append)
    scanned, prediction = shown
    assert scanned.kind == "scan" and scanned.true_number == 0
    return passed, prediction, json.loads((folder / "metrics.json").read_text())


def check_files(folder: Path, prediction: Prediction, metrics: dict) -> None:
    for name in ("scan.png", "answer.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert np.loadtxt(folder / "scan.xy").shape == (3501, 2)
    lines = np.loadtxt(folder / "pattern.xy")
    assert lines.shape == (len(prediction.pattern.two_theta), 2)
    assert prediction.true_number > 0 and metrics["majority"].keys() >= set(TASKS)
    learnt = PatternStore.open(folder / "training.store.safetensors")
    held_out = PatternStore.open(folder / "held-out.store.safetensors")
    assert metrics["n_patterns"] == len(held_out)
    assert not set(held_out.family) & set(learnt.family)
    originals = {name for name in learnt.ids if "#" not in name}
    formulas = {text for text, name in zip(learnt.formula, learnt.ids, strict=True) if name in originals}
    assert not set(held_out.formula) & formulas
    assert not set(held_out.ids) & set(learnt.ids)


def test_small_demo(tmp_path, prototypes, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_prototypes", lambda: prototypes[::2])
    monkeypatch.setattr(demo, "_VARIANTS", 1)
    passed, prediction, metrics = run(tmp_path / "demo", 0.01)
    check_files(tmp_path / "demo", prediction, metrics)
    text = capsys.readouterr().out
    assert "majority class" in text and "crystal system" in text
    assert ("NOT PASSED" in text) is not passed
    run(tmp_path / "demo", 0.01)  # in the same folder again


def test_laboratory_scan_has_the_lines_of_both_wavelengths(prototypes):
    rutile = prototypes[next(i for i, name in enumerate(prototypes.ids) if "Rutile" in name)]
    two_theta, counts = demo.laboratory_scan(rutile, Generator().manual_seed(0))
    # Its strongest line, 110, near 27.4 degrees; the counts far from all lines are the background's.
    assert abs(two_theta[counts.argmax()] - 27.4) < 0.3 and 4700 < counts.max() < 5400
    assert 85 < np.median(counts) < 260 and (counts == np.rint(counts)).all()


def test_verdict_needs_every_task(tmp_path, prototypes, monkeypatch):
    """All four above the majority class, and crystal system by 15 points: nothing less passes."""
    monkeypatch.setattr(demo, "load_prototypes", lambda: prototypes[::2])
    monkeypatch.setattr(demo, "_VARIANTS", 1)
    shares = dict.fromkeys(TASKS, 0.5)

    def metrics(*_: object) -> dict:
        return {"joint": {"tasks": {task: {"top1": share} for task, share in shares.items()}}}

    monkeypatch.setattr(demo, "evaluate_predictions", metrics)
    majority = dict.fromkeys(TASKS, 0.4)
    monkeypatch.setattr(demo, "majority_baseline", lambda *_: majority)
    outcomes = []
    training, held_out = demo._prepare(tmp_path, demo.load_prototypes())
    predictor = demo.SymmetryPredictor(demo_model())
    for change in ({"crystal_system": 0.56}, {"crystal_system": 0.54}, {"point_group": 0.4}, {}):
        shares.update(dict.fromkeys(TASKS, 0.5) | {"crystal_system": 0.6} | change)
        outcomes.append(demo._evaluate(tmp_path, predictor, training, held_out))
    assert outcomes == [True, False, False, True]


def demo_model():
    from xrdfast.models import build_model

    return build_model("plain_cnn").eval()


@pytest.mark.long
def test_whole_demo(tmp_path, capsys):
    passed, prediction, metrics = run(tmp_path / "demo", 2.0)
    check_files(tmp_path / "demo", prediction, metrics)
    assert passed, capsys.readouterr().out
