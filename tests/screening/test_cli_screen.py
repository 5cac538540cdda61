"""`xrdfast screen` and `xrdfast pack`: exit codes, messages, progress."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result

from tests.screening.scans_written import write_folder, write_npz
from xrdfast.bragg import KA1_WAVELENGTH, Grid
from xrdfast.cli import cli
from xrdfast.models import build_model
from xrdfast.screening import readers
from xrdfast.training.checkpoint import ModelCard, save_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "plain.safetensors"
    card = ModelCard(preset="plain_cnn", wavelength=KA1_WAVELENGTH, grid=dataclasses.asdict(Grid()))
    save_model(path, build_model("plain_cnn"), card)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_exit_codes_and_progress(model, tmp_path):
    folder, output = write_folder(tmp_path / "scans", 2), tmp_path / "out.parquet"
    options = ("--model", model, "--readers", 0, "--device", "cpu", "--batch", 1)
    done = run("screen", folder, "-o", output, *options, "--json")
    assert done.exit_code == 0, done.output
    assert "2 answered, 0 failed" in done.stdout
    last = json.loads(done.stderr.splitlines()[-1])
    assert (last["answered"], last["failed"], last["known"]) == (2, 0, 2) and last["rate"] > 0.0
    (folder / "bad.xy").write_text("nothing here\n")
    done = run("screen", folder, "-o", output, *options)
    assert done.exit_code == 1 and "2 answered, 1 failed; of these now 0 and 1" in done.stdout
    done = run("screen", tmp_path / "none", "-o", tmp_path / "none.parquet", *options)
    assert done.exit_code == 2 and "0 answered, 1 failed" in done.stdout
    assert f"why: {tmp_path / 'none.errors.jsonl'}" in done.stdout
    assert "no such file" in (tmp_path / "none.errors.jsonl").read_text().lower()


def test_nothing_to_screen_is_told(model, tmp_path):
    (tmp_path / "empty").mkdir()
    options = ("-o", tmp_path / "out.parquet", "--model", model, "--readers", 0)
    for what in (tmp_path / "empty", tmp_path / "none*.xy"):
        done = run("screen", what, *options)
        assert done.exit_code == 2 and done.stderr.endswith(f"{what}: paths: must hold a file, got none\n")


def test_pack_leaves_what_it_cannot_replace(tmp_path):
    folder, packed = write_folder(tmp_path / "scans", 2), tmp_path / "a.scans.safetensors"
    assert run("pack", folder, "-o", packed).exit_code == 0
    before = packed.read_bytes()
    done = run("pack", packed, folder, "-o", packed)
    assert done.exit_code == 2 and "output: must not be an input, got the same file" in done.stderr
    done = run("pack", tmp_path / "typo", "-o", packed)
    assert done.exit_code == 2 and "scans: must be at least one to pack, got none" in done.stderr
    assert packed.read_bytes() == before


@pytest.mark.parametrize(
    "variables", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")], ids=["torchrun", "srun"]
)
def test_processes_share_the_work(model, tmp_path, variables):
    """Two at once, as torchrun and srun start them, answer every scan once."""
    folder, output = write_folder(tmp_path / "scans", 2), tmp_path / "out.parquet"
    stacks = [write_npz(tmp_path / f"{i}.npz", 2) for i in range(3)]
    command = [sys.executable, "-m", "xrdfast", "screen", folder, *stacks, "-o", output, "--model", model]
    environment = {**os.environ, variables[1]: "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*map(str, command), "--readers", "0"],
            env=environment | {variables[0]: str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    names = pq.read_table(output, columns=["scan_id"])["scan_id"].to_pylist()
    wanted = [f"{folder}/{i:04d}.xy" for i in range(2)] + [f"{path}#{i}" for path in stacks for i in range(2)]
    assert sorted(names) == sorted(wanted)
    assert sum("now" in text or "by this process" in text for pair in said for text in pair) == 2


def test_a_process_that_others_outlast_exits_with_0(model, tmp_path, monkeypatch):
    """Whatever it answered: the last one's exit code says how all went."""
    write_folder(tmp_path / "scans", 1)
    (tmp_path / "scans" / "bad.xy").write_text("nothing here\n")
    work = ("screen", tmp_path / "scans", write_npz(tmp_path / "some.npz", 1), "-o", tmp_path / "out.parquet")
    options = ("--model", model, "--readers", 0, "--device", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, code, said in (
        (2, 0, "0 answered by this"),
        (1, 0, "1 answered by this"),
        (0, 1, "2 answered, 1"),
    ):
        monkeypatch.setenv("RANK", str(rank))
        done = run(*work, *options)
        assert done.exit_code == code and said in done.output, done.output


@pytest.mark.long
def test_torchrun_itself(model, tmp_path):
    """The real launcher."""
    folder, output = write_folder(tmp_path / "scans", 3), tmp_path / "out.parquet"
    stack = write_npz(tmp_path / "some.npz", 3)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    work = ["-m", "xrdfast", "screen", folder, stack, "-o", output, "--model", model, "--readers", "0"]
    done = subprocess.run([*launcher, *map(str, work)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert len(pq.read_table(output)) == 6


def test_refusals(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = write_folder(tmp_path / "scans", 1)
    for arguments, message in (
        ((folder, "-o", tmp_path / "out.csv"), "must end in .parquet"),
        (
            (folder, "-o", tmp_path / "out.parquet", "--model", tmp_path / "none"),
            "none: file: must be readable",
        ),
        ((folder, "-o", tmp_path / "none" / "out.parquet", "--model", model), "must lie in a folder"),
        ((folder, "-o", tmp_path / "out.parquet", "--model", model, "--watch", "--engine", "ray"), "--watch"),
        ((folder, "-o", tmp_path / "out.parquet", "--device", "cuda", "--engine", "ray"), "--device"),
        (
            (folder, "-o", tmp_path / "out.parquet", "--device", "cuda"),
            "--device: must be cpu where no GPU is found",
        ),
    ):
        done = run("screen", *arguments)
        assert done.exit_code == 2 and message in done.stderr, done.output


def test_a_reader_for_each_core_that_may_be_used(model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    monkeypatch.setattr(readers.Readers, "read", lambda self, chunks: asked.append(self._n_readers) or ())
    run("screen", tmp_path, "-o", tmp_path / "out.parquet", "--model", model, "--device", "cpu")
    assert set(asked) == {1}


def test_pack(model, tmp_path):
    folder = write_folder(tmp_path / "scans", 2)
    packed = folder / "all.scans.safetensors"
    for _ in range(2):  # what is there already is none of the scans
        done = run("pack", folder, "-o", packed)
        assert done.exit_code == 0 and "2 scans, 0 failed" in done.stdout
    done = run("screen", packed, "-o", tmp_path / "out.parquet", "--model", model, "--readers", 0)
    assert done.exit_code == 0 and "2 answered" in done.stdout
    (folder / "bad.xy").write_text("nothing here\n")
    done = run("pack", folder, "-o", packed)
    assert done.exit_code == 1 and "2 scans, 1 failed" in done.stdout
