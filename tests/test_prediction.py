"""Answers for lines, scans and structures: units, wavelengths, consistency, and refusals."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from tests.data.formats_written import raw3
from xrdfast.bragg import convert_two_theta, radiations
from xrdfast.data.generate import AugmentConfig
from xrdfast.data.structures import from_pymatgen
from xrdfast.errors import InputError
from xrdfast.lines import simulate_structure_lines
from xrdfast.models import build_model
from xrdfast.posterior import Calibration
from xrdfast.prediction import SUPERCLASSES, SymmetryPredictor
from xrdfast.screening.pipeline import Screener
from xrdfast.symmetry import SYMBOLS, TASKS, class_index, class_names
from xrdfast.training.checkpoint import ModelCard, save_model

LINES = np.array([[27.37, 8.0], [31.70, 100.0], [45.45, 64.7], [56.47, 20.8], [75.30, 24.6]])
COPPER = 1.54056


@pytest.fixture(scope="module")
def predictor() -> SymmetryPredictor:
    torch.manual_seed(0)
    return SymmetryPredictor(build_model("small").eval())


def salt():
    lattice = Lattice.cubic(5.6402)
    structure = Structure.from_spacegroup("Fm-3m", lattice, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    return from_pymatgen([structure], ["salt"])


def test_answer_is_consistent(predictor):
    answer = predictor.predict_sticks(*LINES.T, wavelength=COPPER, n_candidates=230)
    shares = np.array([candidate.probability for candidate in answer.candidates])
    assert (np.diff(shares) <= 0).all() and shares.sum() == pytest.approx(1.0, abs=1e-5)
    assert all(c.symbol == SYMBOLS[c.space_group_number - 1] for c in answer.candidates)
    by_index = dict(zip((c.space_group_number - 1 for c in answer.candidates), shares, strict=True))
    for level in SUPERCLASSES:
        ranked = dict(answer.superclasses[level])
        assert list(ranked.values()) == sorted(ranked.values(), reverse=True)
        for i, name in enumerate(class_names(level)):
            members = np.flatnonzero(class_index(level) == i)
            assert ranked[name] == pytest.approx(sum(by_index[int(g)] for g in members), abs=1e-5)
        for candidate in answer.candidates[:9]:
            index = class_index(level)[candidate.space_group_number - 1]
            assert candidate.superclasses[level] == class_names(level)[index]
    assert answer.wavelength_source == "given" and answer.kind == "sticks"


def test_scale_of_intensity_does_not_matter(predictor):
    one = predictor.predict_sticks(*LINES.T)
    other = predictor.predict_sticks(LINES[:, 0], 37.0 * LINES[:, 1])
    for scale, wavelength in itertools.product((1e-310, 1e306), (COPPER, 0.7)):
        given = predictor.predict_sticks(LINES[:, 0], scale * LINES[:, 1], wavelength=wavelength)
        ones = predictor.predict_sticks(*LINES.T, wavelength=wavelength)
        np.testing.assert_allclose(given.pattern.intensity, ones.pattern.intensity, rtol=1e-6)
    assert one.wavelength_source == "assumed" and one.wavelength == COPPER
    assert one.candidates[0].space_group_number == other.candidates[0].space_group_number
    np.testing.assert_allclose(one.pattern.intensity, other.pattern.intensity)


def test_another_wavelength_is_mapped_through_d(predictor):
    structure, copper = salt(), predictor.predict_structure(salt())
    molybdenum = radiations()["MoKa1"]
    lines = simulate_structure_lines(structure, wavelength=molybdenum, two_theta_min=2.0, two_theta_max=38.0)
    moved = predictor.predict_sticks(lines.two_theta, lines.intensity, wavelength=molybdenum)
    assert any("mapped from 0.70932" in note for note in moved.notes)
    n = min(len(moved.pattern.two_theta), len(copper.pattern.two_theta))
    assert n >= 8
    np.testing.assert_allclose(moved.pattern.two_theta[:n], copper.pattern.two_theta[:n], atol=1e-6)
    # Lorentz-polarisation factors are exchanged too, so the intensities are those of the model's wavelength.
    np.testing.assert_allclose(moved.pattern.intensity[:n], copper.pattern.intensity[:n], rtol=1e-3)
    for one, two in zip(moved.candidates, copper.candidates, strict=True):
        assert one.space_group_number == two.space_group_number


def test_structure_round_trip(predictor):
    answer = predictor.predict_structure(salt())
    assert answer.true_number == 225 and answer.kind == "structure"
    assert answer.wavelength_source == "simulated"
    assert answer.pattern.hkl[:3].tolist() == [[1, 1, 1], [2, 0, 0], [2, 2, 0]]
    assert answer.pattern.intensity.max() == pytest.approx(100.0)
    with pytest.raises(ValueError, match="structure"):
        two = type(salt()).concatenate([salt(), salt()])
        predictor.predict_structure(two)


def scan_of(lines: np.ndarray, second: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Counts with background and noise; with a second wavelength its half as strong lines too."""
    x = np.arange(10.0, 90.0, 0.02)
    y = 200.0 + 100.0 * np.exp(-x / 20.0)
    places = [(lines[:, 0], lines[:, 1])]
    if second is not None:
        places.append((convert_two_theta(lines[:, 0], radiations()["CuKa1"], second), 0.5 * lines[:, 1]))
    for two_theta, intensity in places:
        for place, height in zip(two_theta, intensity, strict=True):
            y = y + 50.0 * height * np.exp(-(((x - place) / 0.05) ** 2))
    return x, np.random.default_rng(0).poisson(y).astype(float)


def test_scan_goes_through_its_peaks_and_says_so(predictor):
    answer = predictor.predict_scan(*scan_of(LINES), wavelength=COPPER)
    assert answer.kind == "scan" and "trained on lines" in answer.notes[0]
    np.testing.assert_allclose(answer.pattern.two_theta, LINES[:, 0], atol=0.02)
    assert answer.pattern.scan is not None


def test_doublet_of_a_scan(predictor):
    x, y = scan_of(LINES, second=radiations()["CuKa2"])
    answer = predictor.predict_scan(x, y)
    assert answer.wavelength_source == "assumed" and answer.wavelength == radiations()["CuKa1"]
    assert any("K-alpha 2 satellites" in note for note in answer.notes)
    # Every line once, at its place for K-alpha 1: satellites that stand apart are gone.
    assert len(answer.pattern.two_theta) == len(LINES)
    np.testing.assert_allclose(answer.pattern.two_theta, LINES[:, 0], atol=0.04)


def raw3_of(two_theta: np.ndarray, intensity: np.ndarray, n_ranges: int) -> bytes:
    """The scan as a Bruker file, once a range, with its copper doublet stated."""
    data = bytearray(raw3(n_ranges=1)[: 712 + 304])
    struct.pack_into("<I", data, 12, n_ranges)
    struct.pack_into("<I", data, 712 + 4, len(two_theta))
    struct.pack_into("<d", data, 712 + 16, two_theta[0])
    struct.pack_into("<d", data, 712 + 176, two_theta[1] - two_theta[0])
    return bytes(data[:712]) + (bytes(data[712:]) + intensity.astype("<f4").tobytes()) * n_ranges


def test_the_file_states_the_wavelength(tmp_path, predictor):
    x, y = scan_of(LINES, second=radiations()["CuKa2"])
    path = tmp_path / "scan.raw"
    path.write_bytes(raw3_of(x, y, 1))
    answer = predictor.predict_file(path, wavelength=0.7)
    assert answer.wavelength_source == "file" and answer.kind == "scan"
    assert answer.wavelength == 1.5406  # as it is there, not as tables have it
    assert "the wavelength given, 0.7, is not the file's, 1.5406, which was kept" in answer.notes
    assert any("K-alpha 2 satellites" in note for note in answer.notes)
    expected = predictor.predict_scan(x, y.astype(np.float32), wavelength="CuKa")
    np.testing.assert_allclose(answer.pattern.two_theta, expected.pattern.two_theta, rtol=0, atol=3e-3)
    path.write_bytes(raw3_of(x, y, 2))
    with pytest.raises(InputError, match=r"scan: must be chosen in a file of 2: 0 \("):
        predictor.predict_file(path)
    assert predictor.predict_file(path, scan=1).candidates == answer.candidates


def test_a_doublet_states_k_alpha_1_of_a_list_of_lines(tmp_path, predictor):
    """As `read` has it, and so screening and `match`."""
    path = tmp_path / "lines.xy"
    path.write_text("# lambda 1.54184\n" + "".join(f"{x} {y}\n" for x, y in LINES))
    answer = predictor.predict_file(path)
    (row,) = Screener(predictor).run([path])
    assert (answer.kind, answer.wavelength, answer.wavelength_source) == ("sticks", COPPER, "file")
    assert (row["kind"], row["wavelength"], row["wavelength_source"]) == ("sticks", COPPER, "file")
    assert row["space_group"] == [c.space_group_number for c in answer.candidates]
    assert row["probability"] == pytest.approx([c.probability for c in answer.candidates], abs=1e-5)


def test_files_choose_their_kind(tmp_path, predictor):
    sticks, scan = tmp_path / "lines.csv", tmp_path / "scan.xy"
    sticks.write_text("two_theta,intensity\n" + "\n".join(f"{a},{b}" for a, b in LINES))
    np.savetxt(scan, np.column_stack(scan_of(LINES)))
    assert predictor.predict_file(sticks).kind == "sticks"
    assert predictor.predict_file(scan).kind == "scan"
    assert predictor.predict_file(scan, kind="sticks").kind == "sticks"
    structure = tmp_path / "salt.safetensors"
    salt().save(structure)
    assert predictor.predict_file(structure).true_number == 225
    for name, value in (("kind", "scan"), ("wavelength", 0.7), ("scan", 0)):
        with pytest.raises(InputError, match=f"{name}: must be left out for a structure"):
            predictor.predict_file(structure, **{name: value})
    profile = tmp_path / "profile.cif"  # a CIF that carries what was measured
    points = "\n".join(f"{a:.3f} {b:.1f}" for a, b in zip(*scan_of(LINES), strict=True))
    profile.write_text(f"data_x\nloop_\n_pd_meas_2theta_scan\n_pd_meas_intensity_total\n{points}\n")
    assert predictor.predict_file(profile, kind="scan").kind == "scan"
    assert predictor.predict_file(profile, kind="sticks", wavelength=1.54056).wavelength_source == "given"
    with pytest.raises(InputError, match="structures: must be at least one"):
        predictor.predict_file(profile)
    with pytest.raises(ValueError, match="kind must be one of"):
        predictor.predict_file(sticks, kind="photo")
    flat = tmp_path / "flat.xy"
    np.savetxt(flat, np.column_stack([np.linspace(10, 80, 2000), np.full(2000, 5.0)]))
    with pytest.raises(InputError, match=r"flat.xy: peaks: must stand out of the noise, got none"):
        predictor.predict_file(flat)


@pytest.mark.parametrize(
    ("two_theta", "intensity", "rule"),
    [
        ([], [], "not empty"),
        ([10.0], [1.0, 2.0], "must be"),
        ([0.0, 10.0], [1.0, 2.0], "two_theta must be between 0 and 180"),
        ([10.0, np.nan], [1.0, 2.0], "two_theta must be between 0 and 180"),
        ([10.0, 20.0], [1.0, -2.0], "intensity must be finite and >= 0"),
        ([10.0, 20.0], [1.0, np.inf], "intensity must be finite and >= 0"),
        ([10.0, 20.0], [0.0, 0.0], "must have a line within"),
        ([100.0], [1.0], "must have a line within"),
    ],
)
def test_refuses_bad_lines(predictor, two_theta, intensity, rule):
    with pytest.raises(ValueError, match=rule):
        predictor.predict_sticks(two_theta, intensity)


@pytest.mark.parametrize("wavelength", [0.0, -1.0, np.nan, np.inf])
def test_refuses_bad_wavelengths(predictor, wavelength):
    with pytest.raises(ValueError, match="wavelength must be finite and > 0"):
        predictor.predict_sticks(*LINES.T, wavelength=wavelength)
    with pytest.raises(ValueError, match="wavelength must be finite and > 0"):
        predictor.predict_scan(*scan_of(LINES), wavelength=wavelength)


def test_refuses_bad_numbers_of_candidates(predictor):
    for number in (0, 231):
        with pytest.raises(ValueError, match=r"n_candidates must be in 1\.\.230"):
            predictor.predict_sticks(*LINES.T, n_candidates=number)


def test_load_brings_grid_wavelength_and_calibration(tmp_path):
    torch.manual_seed(0)
    model, path = build_model("small"), tmp_path / "model.safetensors"
    calibration = Calibration(dict.fromkeys(TASKS, 2.0), dict.fromkeys(TASKS, 0.5))
    grid = {"two_theta_min": 5.0, "two_theta_max": 90.0, "two_theta_step": 0.01}
    config = {"data": {"folds_validation": [0, 3]}}
    save_model(path, model, ModelCard("small", COPPER, grid, config, calibration.to_dict()))
    loaded = SymmetryPredictor.load(path)
    assert loaded.calibration == calibration and loaded.grid.n_points == 8500
    assert loaded.folds_held_out == (0, 3)
    assert not loaded.model.training
    answer = loaded.predict_sticks(*LINES.T)
    assert not any("not calibrated" in note for note in answer.notes)
    save_model(path, model, ModelCard("small", COPPER, {"two_theta_min": 95.0}))
    with pytest.raises(InputError, match="card: must describe"):
        SymmetryPredictor.load(path)


@pytest.fixture(scope="module")
def scan_predictor() -> SymmetryPredictor:
    torch.manual_seed(0)
    return SymmetryPredictor(build_model("small").eval(), augment=AugmentConfig(profile="lab"))


def test_a_model_of_scans_gets_whole_scans(scan_predictor, predictor) -> None:
    two_theta = np.arange(10.0, 80.0, 0.02)
    counts = 200.0 + sum(30.0 * h / (1.0 + ((two_theta - t) / 0.06) ** 2) for t, h in LINES)
    counts = np.random.default_rng(0).poisson(counts).astype(float)
    answer = scan_predictor.predict_scan(two_theta, counts, wavelength=1.5418)
    row = scan_predictor.prepare_scans([two_theta], [counts], [COPPER])
    assert row.shape == (1, 8500) and float(row.max()) == 100.0
    assert float((row == 0.0).double().mean()) > 0.5  # background and noise are blank
    share = scan_predictor.posterior(row).space_group[0]
    assert answer.candidates[0].probability == pytest.approx(float(share.max()), abs=1e-6)
    assert not any("trained on lines" in note for note in answer.notes)
    assert any("trained on lines" in note for note in predictor.predict_scan(two_theta, counts).notes)


def test_a_model_of_scans_refuses_what_is_all_background(scan_predictor) -> None:
    two_theta = np.arange(10.0, 80.0, 0.02)
    flat = np.full(len(two_theta), 50.0)
    flat[1000:1010] += np.hanning(10) * 500.0  # a peak beyond the model's range
    with pytest.raises(ValueError, match="within"):
        scan_predictor.predict_scan(two_theta, flat, wavelength=12.0)


def test_a_model_of_scans_gets_lines_with_the_shape_of_peaks(scan_predictor) -> None:
    pattern, _ = scan_predictor.lines_on_axis(*LINES.T, COPPER)
    row = scan_predictor.prepare_lines([pattern])[0]
    assert float(row.max()) == pytest.approx(100.0, rel=1e-6)
    at = int((float(pattern.two_theta[pattern.intensity.argmax()]) - 5.0) / 0.01)
    assert float(row[at]) == 100.0
    assert float(row[at + 5]) == pytest.approx(50.0, abs=1.5)  # half of the height half a width away
    assert scan_predictor.predict_sticks(*LINES.T).kind == "sticks"
