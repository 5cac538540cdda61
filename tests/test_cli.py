"""The command line: every verb end to end, and what users get wrong: one line, exit code 2, nothing lost."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from pymatgen.core import Lattice, Structure

from tests.data.formats_written import uxd
from tests.training.tiny import presets, write_cubic_store
from xrdfast import _native
from xrdfast.cli import cli
from xrdfast.data.store import PatternStore
from xrdfast.data.structures import PackedStructures
from xrdfast.models import PRESETS, build_model
from xrdfast.training.checkpoint import ModelCard, load_model_card, save_model
from xrdfast.training.trainer import RunResult, Trainer

ROOT = Path(__file__).resolve().parents[1]
SALT = """data_salt
_cell_length_a 5.6402
_cell_length_b 5.6402
_cell_length_c 5.6402
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'F m -3 m'
_symmetry_Int_Tables_number {number}
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Na1 0 0 0
Cl1 0.5 0.5 0.5
"""
STICKS = "27.37 8.0\n31.70 100.0\n45.45 64.7\n53.87 1.6\n56.47 20.8\n66.23 9.2\n75.30 24.6\n"
CONFIG = """[model]
preset = "tiny"
[data]
stores = ["{store}"]
[augment]
strain = 0.004
[train]
epochs = 40
batch_size = 16
learning_rate = 1e-2
ema_decay = 0.9
device = "cpu"
"""
CARD = ModelCard("small", 1.54056, {"two_theta_min": 5.0, "two_theta_max": 90.0, "two_theta_step": 0.01})


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(*arguments: object) -> str:
    """The message of a run that must fail as bad input does."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("xrdfast: error: ")
    return line.removeprefix("xrdfast: error: ")


@pytest.fixture
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in presets().items():
        monkeypatch.setitem(PRESETS, name, config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small preset, not trained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_model(path, build_model("small"), CARD)
    return path


def test_help_names_every_verb_and_imports_nothing_heavy():
    code = (
        "import sys, xrdfast.cli; "
        "heavy = {'torch', 'numpy', 'rich', 'matplotlib', 'pymatgen', 'spglib', 'gemmi'} & set(sys.modules); "
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    done = subprocess.run(
        [sys.executable, "-m", "xrdfast", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for verb in (
        "doctor",
        "build",
        "simulate",
        "generate",
        "train",
        "evaluate",
        "predict",
        "match",
        "library",
        "import-checkpoint",
        "demo",
    ):
        assert verb in done.stdout


def test_doctor_and_build():
    found = json.loads(succeed("doctor", "--json"))
    assert {"xrdfast", "torch", "_cpu", "compiler", "numpy"} <= found.keys()
    assert "torch" in succeed("doctor")
    if _native.cpu() is not None:
        assert "_cpu" in succeed("build")


def test_simulate_writes_store_and_lists(tmp_path):
    folder = tmp_path / "cifs"
    folder.mkdir()
    (folder / "right.cif").write_text(SALT.format(number=225))
    (folder / "wrong.cif").write_text(SALT.format(number=216).replace("'F m -3 m'", "?"))
    (folder / "broken.cif").write_text("data_x\n_cell_length_a 3\n")
    out = tmp_path / "salt.store.safetensors"
    text = succeed("simulate", folder, "-o", out, "--workers", 1)
    store = PatternStore.open(out)
    assert len(store) == 2 and set(store.space_group_01.tolist()) == {225}
    rejected = [json.loads(line) for line in (tmp_path / "salt.rejected.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rejected] == ["broken.cif"] and rejected[0]["reason"]
    listed = (tmp_path / "salt.disagreements.jsonl").read_text().splitlines()
    assert [json.loads(line)["stated"] for line in listed] == [216]
    assert "2 patterns, 1 structures rejected" in text and "1 state another space group" in text
    # A second run with nothing to list takes the old lists away.
    succeed("simulate", folder / "right.cif", "-o", out, "--workers", 1)
    assert not (tmp_path / "salt.rejected.jsonl").exists()
    assert not (tmp_path / "salt.disagreements.jsonl").exists()


def test_files_of_one_name_in_two_folders(tmp_path):
    """One that is rejected must not hide the other; a run that simulates nothing keeps the earlier store."""
    for folder, text in (("a", SALT.format(number=225)), ("b", "data_x\n_cell_length_a 3\n")):
        (tmp_path / "cifs" / folder).mkdir(parents=True)
        (tmp_path / "cifs" / folder / "salt.cif").write_text(text)
    out = tmp_path / "x.store.safetensors"
    text = succeed("simulate", tmp_path / "cifs", "-o", out, "--workers", 1)
    assert "1 patterns, 1 structures rejected" in text
    assert PatternStore.open(out).ids == ["a/salt.cif"]
    (row,) = map(json.loads, (tmp_path / "x.rejected.jsonl").read_text().splitlines())
    assert row["id"] == "b/salt.cif"
    whole = out.read_bytes()
    empty = tmp_path / "cifs" / "a" / "salt.cif"
    message = refuse("simulate", empty, "-o", out, "--workers", 1, "--wavelength", 40)
    assert f"{out}: structures: must be at least one that can be simulated, got none" in message
    assert "salt.cif: " in message and out.read_bytes() == whole


def test_files_whose_names_are_no_text(tmp_path):
    (tmp_path / "cifs").mkdir()
    (tmp_path / "cifs" / "a\udcff.cif").write_text(SALT.format(number=225))
    (tmp_path / "cifs" / "b\udcff.cif").write_text("data_x\n_cell_length_a 3\n")
    out = tmp_path / "x.store.safetensors"
    succeed("simulate", tmp_path / "cifs", "-o", out, "--workers", 1)
    assert PatternStore.open(out).ids == ["a\\udcff.cif"]
    (row,) = map(json.loads, (tmp_path / "x.rejected.jsonl").read_text().splitlines())
    assert row["id"] == "b\\udcff.cif"


def test_generate_and_move_sites(tmp_path):
    out = tmp_path / "synthetic.safetensors"
    text = succeed("generate", "--groups", "2,4-5", "--count", 2, "-o", out)
    assert f"{out}: 6 crystals of 3 space groups" in text
    made = PackedStructures.load(out)
    assert made.space_group_01.tolist() == [2, 2, 4, 4, 5, 5]
    store = tmp_path / "synthetic.store.safetensors"
    succeed("simulate", out, "-o", store, "--variants", 2, "--workers", 1)
    found = PatternStore.open(store)
    assert len(found) > 6 and set(found.space_group_01.tolist()) == {2, 4, 5}
    assert {name.partition("/moved-")[0] for name in found.ids} == set(made.ids)


def test_generate_fills_rare_groups_and_refuses(tmp_path):
    out = tmp_path / "synthetic.safetensors"
    twenty = tmp_path / "some.safetensors"
    succeed("generate", "--groups", "1-2", "--count", 10, "-o", twenty)
    assert "2 crystals of 1 space groups" in succeed(
        "generate", twenty, "--groups", "2,81", "--fewer-than", 10, "--count", 2, "-o", out, "--workers", 1
    )
    assert PackedStructures.load(out).space_group_01.tolist() == [81, 81]
    again = refuse("generate", twenty, "--groups", "2", "--fewer-than", 5, "-o", out, "--workers", 1)
    assert again == "--fewer-than: must leave a group, got 5: all have as many"
    assert refuse("generate", "--fewer-than", 5, "-o", out).startswith("--fewer-than: must come with files")
    assert refuse("generate", "-o", tmp_path / "a.npz").endswith("must end in .safetensors, got .npz")
    for groups in ("0", "231", "5-3", "a", "1,,2"):
        message = f"--groups: must be numbers in 1..230 as 89,195-199, got '{groups}'"
        assert refuse("generate", "--groups", groups, "-o", out) == message


def test_simulate_lines(tmp_path):
    path = tmp_path / "salt.cif"
    path.write_text(SALT.format(number=225))
    lines = succeed("simulate", path, "--lines", "--radiation", "CuKa").splitlines()
    assert lines[0] == "two_theta,d_spacing,intensity,h,k,l"
    assert "--variants goes with" in refuse("simulate", path, "--lines", "--variants", 2)
    first = lines[1].split(",")
    assert first[3:] == ["1", "1", "1"] and float(first[1]) == pytest.approx(5.6402 / 3**0.5, abs=1e-5)
    succeed("simulate", path, "--lines", "-o", tmp_path / "salt.csv", "--two-theta-max", 60)
    table = np.loadtxt(tmp_path / "salt.csv", delimiter=",", skiprows=1)
    assert table[:, 0].max() < 60.0 and table[:, 2].max() == 100.0


def test_train_evaluate_predict(tmp_path, monkeypatch, tiny_presets):
    store, run_folder = tmp_path / "cubic.store.safetensors", tmp_path / "run"
    write_cubic_store(store, 240)
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(store=store))
    text = succeed("train", config, "-o", run_folder, "--set", "train.epochs=20", "--set", "train.seed=3")
    assert "finished" in text and "space group" in text
    card = load_model_card(run_folder)
    assert card.config["train"]["epochs"] == 20 and card.config["train"]["seed"] == 3
    assert (run_folder / "config.toml").exists()
    odd = tmp_path / "r 2"
    setting = f'data.stores=["{store}"]'
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run", lambda self: RunResult("interrupted", 3, {}))
        told = run("train", config, "-o", odd, "--set", setting).stderr
    words = shlex.split(told[told.index("xrdfast train") :])
    assert words == ["xrdfast", "train", str(config), "-o", str(odd), "--set", setting, "--resume"]
    text = succeed("evaluate", run_folder, store, "--folds", "0", "--json", tmp_path / "metrics.json")
    assert "joint posterior" in text and "majority class" in text
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["n_patterns"] == 24
    assert metrics["tasks"]["space_group"]["top1"] > metrics["majority"]["space_group"]
    sticks = tmp_path / "salt.xy"
    sticks.write_text(STICKS)
    answer = json.loads(
        succeed("predict", sticks, "--model", run_folder, "--json", "--plot", tmp_path / "a.png")
    )
    assert answer["kind"] == "sticks" and len(answer["candidates"]) == 5
    assert answer["candidates"][0]["space_group_number"] == answer["conformal_set"][0]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    text = succeed("predict", sticks, "--model", run_folder, "--top", 2)
    assert "extinction class" in text and "crystal system" in text and "assumed" in text
    assert "95 % set of space groups: " in text


def test_train_refuses_and_resumes(tmp_path, tiny_presets):
    store, folder, config = tmp_path / "cubic.store.safetensors", tmp_path / "run", tmp_path / "run.toml"
    write_cubic_store(store)
    config.write_text(CONFIG.format(store=store))
    assert "did you mean epochs" in refuse("train", config, "-o", folder, "--set", "train.epoch=1")
    succeed("train", config, "-o", folder, "--set", "train.epochs=1")
    model = (folder / "model.safetensors").read_bytes()
    assert "must be new or resumed" in refuse("train", config, "-o", folder, "--set", "train.epochs=1")
    assert "train.epochs: must be 1" in refuse("train", config, "-o", folder, "--resume")
    assert (folder / "model.safetensors").read_bytes() == model
    succeed("train", config, "-o", folder, "--set", "train.epochs=1", "--resume")


def test_interrupted_training_ends_with_130_and_says_how_to_go_on(tmp_path, tiny_presets):
    store, folder, config = tmp_path / "cubic.store.safetensors", tmp_path / "run", tmp_path / "run.toml"
    write_cubic_store(store)
    config.write_text(CONFIG.format(store=store))
    code = (
        "import os, signal, threading\n"
        "from tests.training.tiny import register_presets\n"
        "from xrdfast.training import trainer\n"
        "from xrdfast import cli\n"
        "register_presets()\n"
        "step = trainer.Trainer._train_step\n"
        "def stopping(self):\n"
        "    if self.step == 2:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return step(self)\n"
        "trainer.Trainer._train_step = stopping\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", code, "train", str(config), "-o", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert "--resume" in done.stderr and "Traceback" not in done.stderr
    assert (folder / "last.safetensors").exists()
    text = succeed("train", config, "-o", folder, "--resume", "--set", "train.log_steps=5")
    assert "finished" in text


def test_import_checkpoint(tmp_path):
    import xrdfast.models.published_checkpoint as published

    weights = build_model("paper").state_dict()
    state = {published.published_name(name): tensor for name, tensor in weights.items()}
    torch.save(state, tmp_path / "published.pt")
    out = tmp_path / "paper.safetensors"
    assert "paper preset" in succeed("import-checkpoint", tmp_path / "published.pt", "-o", out)
    assert load_model_card(out).preset == "paper"
    (tmp_path / "no.pt").write_bytes(b"not a checkpoint")
    assert "no.pt" in refuse("import-checkpoint", tmp_path / "no.pt", "-o", tmp_path / "no.safetensors")


def scan(points: int) -> str:
    x = np.linspace(10.0, 80.0, points)
    y = 20.0 + 1000.0 * np.exp(-(((x - 31.7) / 0.1) ** 2))
    return "\n".join(f"{a:.4f} {b:.3f}" for a, b in zip(x, y, strict=True))


BAD_PATTERNS = {
    "empty": ("", "points: must be at least 2"),
    "truncated": ("10.0 1.0\n20.0", "line 2: must be two or three numbers"),
    "words": ("10.0 1.0\n20.0 strong\n", "line 2: must be two or three numbers"),
    "nan": ("10.0 1.0\n20.0 nan\n", "point 2: intensity must be finite"),
    "infinite": ("10.0 1.0\ninf 2.0\n", "point 2: two_theta must be finite"),
    "negative": ("10.0 1.0\n20.0 -3.0\n", "point 2: intensity must be >= 0"),
    "negative angle": ("-10.0 1.0\n20.0 3.0\n", "point 1: two_theta must be between 0 and 180"),
    "unsorted": ("20.0 1.0\n10.0 3.0\n", "point 2: two_theta must be above"),
    "all zero": ("10.0 0.0\n20.0 0.0\n", "intensity: must be positive somewhere"),
    "outside": ("95.0 1.0\n120.0 2.0\n", "two_theta: must have a line within 5..90"),
    "binary": ("\0\0\0\0", "must be"),
}


@pytest.mark.parametrize("name", BAD_PATTERNS)
def test_bad_patterns(tmp_path, model, name):
    content, rule = BAD_PATTERNS[name]
    path = tmp_path / "pattern.xy"
    path.write_text(content)
    message = refuse("predict", path, "--model", model)
    assert message.startswith(str(path)) and rule in message


BAD_STRUCTURES = {
    "truncated": (SALT[:60], "must"),
    "empty": ("", "must"),
    "missing lattice": (SALT.replace("_cell_length_a 5.6402\n", ""), "_cell_length_a"),
    "negative lattice": (SALT.replace("_cell_length_a 5.6402", "_cell_length_a -5"), "_cell_length_a"),
    "unknown element": (SALT.replace("Na1", "Zz1"), "Zz1"),
    "nan place": (SALT.replace("Na1 0 0 0", "Na1 nan 0 0"), "must"),
}


@pytest.mark.parametrize("name", BAD_STRUCTURES)
@pytest.mark.parametrize("verb", ["simulate", "predict"])
def test_bad_structures(tmp_path, model, name, verb):
    content, rule = BAD_STRUCTURES[name]
    path = tmp_path / "salt.cif"
    path.write_text(content.format(number=225))
    out = tmp_path / "x.store.safetensors"
    options = ("-o", out) if verb == "simulate" else ("--model", model)
    message = refuse(verb, path, *options)
    assert str(path) in message and rule in message
    assert not out.exists()


@pytest.mark.parametrize("value", ["0", "-1.5", "nan", "inf", "CuKz"])
@pytest.mark.parametrize("option", ["--wavelength", "--radiation"])
def test_bad_wavelengths(tmp_path, model, value, option):
    path = tmp_path / "salt.xy"
    path.write_text(STICKS)
    assert "wavelength: " in refuse("predict", path, "--model", model, f"{option}={value}")
    assert "wavelength: " in refuse("simulate", path, f"{option}={value}")


@pytest.mark.parametrize(
    "arguments", [("demo", "--minutes"), ("screen", "x.xy", "-o", "x.parquet", "--interval")]
)
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_numbers_that_are_none(arguments, value):
    done = run(*arguments, value)
    assert done.exit_code == 2
    assert arguments[-1] in done.output


def test_bad_stores_and_models(tmp_path, model, tiny_presets):
    store, sticks = tmp_path / "cubic.store.safetensors", tmp_path / "salt.xy"
    sticks.write_text(STICKS)
    write_cubic_store(store)
    whole = store.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        store.write_bytes(whole[:size])
        message = refuse("evaluate", model, store)
        assert str(store) in message and "must be a whole safetensors file" in message
    config, library = tmp_path / "run.toml", tmp_path / "known.safetensors"
    config.write_text(CONFIG.format(store=store))
    begin = 8 + int.from_bytes(whole[:8], "little")
    for name in ("hkl_multiplicity", "f_squared"):  # what is not read when a store is opened
        at = begin + json.loads(whole[8:begin])[name]["data_offsets"][0]
        store.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        for words in (
            ("evaluate", model, store),
            ("train", config, "-o", tmp_path / "run"),
            ("library", store, "-o", library),
        ):
            assert f"{store}: {name}: must match its checksum" in refuse(*words)
    store.write_bytes(whole)
    assert "format: must be xrdfast-library, got xrdfast-model" in refuse(
        "predict", sticks, "--model", model, "--library", model
    )
    assert "format: must be xrdfast structures, got xrdfast-model" in refuse("simulate", model, "-o", store)
    assert f"{tmp_path}: file: must be readable, got Is a directory" in refuse("evaluate", model, tmp_path)
    assert "format: must be xrdfast-store" in refuse("evaluate", model, model)
    assert "format: must be xrdfast-model" in refuse("evaluate", store, store)
    assert "must be readable" in refuse("evaluate", model, tmp_path / "none.store.safetensors")
    assert "--folds: must be" in refuse("evaluate", model, store, "--folds", "x")
    assert "none: file: must be readable" in refuse("predict", sticks, "--model", tmp_path / "none")
    other = tmp_path / "other.safetensors"
    card = ModelCard("plain_cnn", CARD.wavelength, CARD.grid)
    save_model(other, build_model("small"), card)  # the weights of another preset
    assert f"{other}: " in refuse("predict", sticks, "--model", other)
    save_model(other, build_model("small"), ModelCard("none", CARD.wavelength, CARD.grid))
    assert "preset: must be one of" in refuse("predict", sticks, "--model", other)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model.read_bytes()[:-5])
    assert "must be a whole safetensors file" in refuse("predict", sticks, "--model", cut)
    assert "must end in .png" in refuse("predict", sticks, "--model", model, "--plot", tmp_path / "a.bmp")
    assert "must be readable" in refuse("train", tmp_path / "none.toml", "-o", tmp_path / "run")


def test_export(tmp_path, model):
    half, program = tmp_path / "half.safetensors", tmp_path / "model.pt2"
    assert "float16" in succeed("export", model, "-o", half)
    assert half.stat().st_size < 0.6 * model.stat().st_size
    assert "not calibrated" in succeed("export", model, "-o", program)
    assert torch.export.load(program).module()(torch.zeros(1, 8500))[0].shape == (1, 230)
    assert "must end in one of .safetensors, .onnx, .pt2, got .bin" in refuse(
        "export", model, "-o", tmp_path / "a.bin"
    )
    paper = tmp_path / "paper.safetensors"
    save_model(paper, build_model("paper"), ModelCard("paper", CARD.wavelength, CARD.grid))
    message = refuse("export", paper, "-o", tmp_path / "a.onnx")
    assert message.startswith(f"{paper}: model: must be a fixed graph, got the preset paper")


@pytest.mark.parametrize("verb", ["export", "simulate", "evaluate", "predict"])
def test_outputs_are_checked_before_the_work(tmp_path, verb):
    nowhere = tmp_path / "none" / "x.safetensors"
    words = {
        "export": ("m", "-o", nowhere),
        "simulate": ("a.cif", "-o", nowhere),
        "evaluate": ("m", "s", "--json", nowhere),
        "predict": ("a.xy", "--plot", nowhere),
    }[verb]
    message = refuse(verb, *words)
    assert message.startswith(f"{nowhere}: --") and "must lie in a folder that exists" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk(tmp_path, model, monkeypatch):
    """The device that is always full stands in for the disk; what was there before is still there."""
    sticks, plot, store = tmp_path / "a.xy", tmp_path / "a.png", tmp_path / "a.store.safetensors"
    cif = tmp_path / "salt.cif"
    cif.write_text(SALT.format(number=225))
    sticks.write_text(STICKS)
    plot.write_bytes(b"earlier")
    exported = tmp_path / "a.pt2"
    exported.write_bytes(b"earlier")
    store.write_bytes(b"earlier")
    import builtins

    true_open = builtins.open

    def full_open(path, mode="r", *arguments, **keywords):
        writes = "w" in mode and str(path).startswith(str(tmp_path))
        return true_open("/dev/full" if writes else path, mode, *arguments, **keywords)

    monkeypatch.setattr(builtins, "open", full_open)
    assert "No space left" in refuse("predict", sticks, "--model", model, "--plot", plot)
    assert "No space left" in refuse("export", model, "-o", exported)
    result = run("simulate", cif, "-o", store, "--workers", 1)
    assert result.exit_code == 2 and "No space left" in result.stderr
    monkeypatch.undo()
    assert plot.read_bytes() == exported.read_bytes() == b"earlier" and store.read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_standard_output_that_is_full_or_closed(tmp_path, model):
    sticks = tmp_path / "a.xy"
    sticks.write_text(STICKS)
    command = f"{sys.executable} -m xrdfast predict {sticks} --model {model}"
    for redirection, code, message in (
        (">/dev/full", 2, "xrdfast: error: standard output: file: must be accessible, got No space left"),
        (">&-", 0, ""),
    ):
        done = subprocess.run(
            f"{command} {redirection}", shell=True, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == code and done.stderr.startswith(message)
        assert "Traceback" not in done.stderr


def test_usage_errors_are_one_line(tmp_path):
    assert "Missing argument" in refuse("predict")
    assert "No such option" in refuse("predict", "x.xy", "--nothing")
    assert "No such command" in refuse("nothing")
    assert "--top" in refuse("predict", "x.xy", "--top", "0")


def test_debug_shows_the_traceback(tmp_path):
    result = run("--debug", "predict", tmp_path / "none.xy", "--model", tmp_path)
    assert isinstance(result.exception, ValueError)


def test_module_entry_point(tmp_path):
    command = [sys.executable, "-m", "xrdfast", "simulate", str(tmp_path / "none.cif")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"xrdfast: error: {tmp_path / 'none.cif'}: file: must exist, got none\n"


def test_no_output_takes_the_place_of_an_input(tmp_path, model):
    cif, store = tmp_path / "salt.cif", tmp_path / "salt.store.safetensors"
    cif.write_text(SALT.format(number=225))
    succeed("simulate", cif, "-o", store, "--workers", 1)
    crystals = tmp_path / "crystals.safetensors"
    succeed("generate", "--groups", 225, "--count", 1, "-o", crystals)
    for path, words in (
        (cif, ("simulate", cif, "--lines", "-o", cif)),
        (store, ("evaluate", model, store, "--json", store)),
        (crystals, ("generate", crystals, "--groups", 1, "--count", 1, "-o", crystals)),
        (model, ("export", model, "-o", model)),
    ):
        before = path.read_bytes()
        assert refuse(*words) == f"{path}: output: must not be an input, got the same file"
        assert path.read_bytes() == before


def test_weights_that_ship_are_exported_by_name(tmp_path):
    assert "float16" in succeed("export", "lab-small", "-o", tmp_path / "weights.safetensors")


def test_angles_are_those_of_the_file(tmp_path):
    """Of another radiation, too: the model's axis is nobody's business."""
    x = np.arange(3.0, 40.0, 0.01)
    y = 50.0 + sum(h * np.exp(-(((x - at) / 0.03) ** 2)) for at, h in ((10.0, 3000.0), (14.2, 900.0)))
    path = tmp_path / "b\udcff.xy"
    path.write_text("".join(f"{a:.2f} {b:.1f}\n" for a, b in zip(x, y, strict=True)))
    words = ("predict", path, "--model", "lab-small", "--wavelength", "0.7")
    plot = tmp_path / "a.png"
    answer = json.loads(succeed(*words, "--top", 230, "--json", "--plot", plot))
    found = sorted(peak["two_theta"] for peak in answer["rests_on"])
    assert found == pytest.approx([10.0, 14.2], abs=0.01)
    assert any(note.startswith("mapped from 0.70000 to 1.54") for note in answer["notes"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert succeed(*words).splitlines()[0].endswith("b\\udcff.xy")


def test_structure_round_trip(tmp_path, model):
    sites = [[1 / 3, 2 / 3, 0.25]]
    structure = Structure.from_spacegroup("P6_3/mmc", Lattice.hexagonal(3.2, 5.2), ["Mg"], sites)
    structure.to(filename=str(tmp_path / "mg.cif"))
    answer = json.loads(succeed("predict", tmp_path / "mg.cif", "--model", model, "--json"))
    assert answer["kind"] == "structure" and answer["true_space_group_number"] == 194
    scan_file = tmp_path / "scan.xy"
    scan_file.write_text(scan(4000))
    answer = json.loads(succeed("predict", scan_file, "--model", model, "--json", "--radiation", "CuKa1"))
    assert answer["kind"] == "scan" and "peaks" in " ".join(answer["notes"])
    assert answer["wavelength_source"] == "given"
    several = tmp_path / "several.uxd"
    several.write_bytes(uxd("_2THETACOUNTS") * 2)
    assert "a file of 2: 0 (a sample, 12 points" in refuse("predict", several, "--model", model)
    answer = json.loads(
        succeed("predict", several, "--model", model, "--json", "--scan", 1, "--kind", "sticks")
    )
    assert answer["kind"] == "sticks" and answer["wavelength_source"] == "file"
