"""The verbs that keep and ask known structures: library, match, predict --library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from pymatgen.core import Lattice, Structure

from xrdfast import retrieval
from xrdfast.cli import cli
from xrdfast.models import build_model
from xrdfast.retrieval import KnownStructures
from xrdfast.training.checkpoint import ModelCard, save_model

SALT_LINES = "27.37 8.0\n31.70 100.0\n45.45 64.7\n53.87 1.6\n56.47 20.8\n66.23 9.2\n75.30 24.6\n"
CARD = ModelCard("small", 1.54056, {"two_theta_min": 5.0, "two_theta_max": 90.0, "two_theta_step": 0.01})


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def refusal(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIF files, the library of them, the lines of salt, and an untrained model."""
    place = tmp_path_factory.mktemp("known")
    cifs = place / "cifs"
    cifs.mkdir()
    cells = {"salt": (225, 5.64, "Na"), "silver": (225, 5.55, "Ag"), "caesium": (221, 4.12, "Cs")}
    for name, (number, edge, cation) in cells.items():
        structure = Structure.from_spacegroup(
            number, Lattice.cubic(edge), [cation, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
        )
        structure.to(str(cifs / f"{name}.cif"))
    result = run("library", cifs, "-o", place / "known.safetensors", "--workers", 1)
    assert result.exit_code == 0, result.stderr
    assert "3 structures, 0 rejected" in result.stdout
    (place / "salt.xy").write_text(SALT_LINES)
    torch.manual_seed(0)
    save_model(place / "model.safetensors", build_model("small").eval(), CARD)
    return place


def test_match_names_the_structure(folder: Path) -> None:
    answer = run("match", folder / "salt.xy", folder / "known.safetensors", "--json", "--top", 2)
    found = json.loads(answer.stdout)
    assert found["nearest"][0]["formula"] == "Na1Cl1"
    assert found["nearest"][0]["score"] > 0.9
    assert found["candidates"][0]["space_group_number"] == 225
    assert (found["wavelength_source"], found["notes"]) == ("assumed", [])
    text = run("match", folder / "salt.xy", folder / "known.safetensors").stdout
    assert "Na1Cl1" in text and "Å (assumed)" in text
    assert "by 3 known structures: Fm-3m" in text


def test_predict_joins_both_answers(folder: Path) -> None:
    ask = ("predict", folder / "salt.xy", "--model", folder / "model.safetensors", "--json")
    alone = json.loads(run(*ask).stdout)
    both = json.loads(run(*ask, "--library", folder / "known.safetensors").stdout)
    assert "nearest" not in alone
    assert alone["candidates"][0]["space_group_number"] != 225
    assert both["candidates"][0]["space_group_number"] == 225
    assert len(both["candidates"]) == 5
    assert both["superclasses"]["crystal_system"][0]["name"] == "cubic"
    assert both["nearest"][0]["formula"] == "Na1Cl1"
    assert both["notes"][-1] == "joined with the answer of 3 known structures"
    assert both["conformal_set"] == []  # calibrated with the weights that ship, on scans
    text = run(*ask[:-1], "--library", folder / "known.safetensors").stdout
    assert "nearest known" in text


def test_the_joined_answer_of_a_scan_has_a_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights that ship and a library as large as that of the calibration; other answers have none."""
    two_theta = np.arange(10.0, 85.0, 0.02)
    places, heights = np.array([line.split() for line in SALT_LINES.splitlines()], dtype=float).T
    counts = 30.0 + 40.0 * (heights * np.exp(-0.5 * ((two_theta[:, None] - places) / 0.05) ** 2)).sum(1)
    scan = folder / "scan.xy"
    np.savetxt(scan, np.c_[two_theta, np.random.default_rng(0).poisson(counts)])
    ask = ("predict", scan, "--wavelength", "CuKa1", "--json", "--library", folder / "known.safetensors")
    assert json.loads(run(*ask).stdout)["conformal_set"] == []
    monkeypatch.setattr(retrieval, "POOL_LEAST_KNOWN", 3)
    found = json.loads(run(*ask).stdout)
    assert found["candidates"][0]["space_group_number"] == 225 and 225 in found["conformal_set"]
    assert len(found["conformal_set"]) < 100
    own = json.loads(run(*ask, "--model", folder / "model.safetensors").stdout)
    assert own["conformal_set"] == []


def test_a_library_of_a_store_is_that_of_its_structures(folder: Path) -> None:
    store = folder / "some.store.safetensors"
    assert run("simulate", folder / "cifs", "-o", store, "--workers", 1).exit_code == 0
    assert run("library", store, "-o", folder / "again.safetensors").exit_code == 0
    one, other = (KnownStructures.load(folder / name) for name in ("known.safetensors", "again.safetensors"))
    assert one.ids == other.ids
    torch.testing.assert_close(one.line_amplitude, other.line_amplitude)


def test_refusals(folder: Path) -> None:
    cifs, known = folder / "cifs", folder / "known.safetensors"
    assert "must end in .safetensors" in refusal("library", cifs, "-o", folder / "known.npz")
    assert "must not be an input" in refusal("library", known, "-o", known)
    mixed = folder / "mixed.store.safetensors"
    assert "all stores or all structures" in refusal("library", mixed, cifs, "-o", folder / "x.safetensors")
    ask = ("predict", cifs / "salt.cif", "--model", folder / "model.safetensors")
    assert "must come with a measured pattern" in refusal(*ask, "--library", known)
    message = refusal("match", folder / "salt.xy", folder / "model.safetensors")
    assert "model.safetensors: format: must be xrdfast-library, got xrdfast-model" in message
