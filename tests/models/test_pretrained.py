"""Weights that ship, by name, and what else may lie under that name."""

from __future__ import annotations

from pathlib import Path

import pytest

from xrdfast.errors import InputError
from xrdfast.models import model_path, pretrained_path
from xrdfast.prediction import SymmetryPredictor
from xrdfast.screening.pipeline import Screener


@pytest.mark.parametrize("name", ["lab", "lab-small", "sticks"])
def test_a_name_is_that_of_the_weights_that_ship(tmp_path: Path, monkeypatch, name: str) -> None:
    """A folder of scans of that name changes nothing; a run or a file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    assert model_path(name) == model_path(Path(name)) == pretrained_path(name)
    (tmp_path / name).mkdir()
    assert model_path(name) == model_path(None, name) == pretrained_path(name)
    (tmp_path / name / "model.safetensors").touch()
    assert model_path(name) == Path(name)
    assert model_path(None, name) == pretrained_path(name)


def test_other_paths_stay_as_they_are(tmp_path: Path) -> None:
    beside = tmp_path / "run.safetensors"
    beside.touch()
    for path in (tmp_path / "run", beside, Path("..") / "weights" / "lab"):
        assert model_path(path) == path
    with pytest.raises(InputError, match="must be one that ships"):
        pretrained_path("other")


def test_what_is_taken_where_nothing_is_named() -> None:
    assert SymmetryPredictor.load().model.preset == "medium"
    assert SymmetryPredictor.load("lab-small").model.preset == Screener().predictor.model.preset == "small"
