"""Two processes under torchrun (gloo) train as one process does on the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny import tiny_config, with_augment, write_cubic_store
from xrdfast.training.checkpoint import MODEL_FILE, STATE_FILE
from xrdfast.training.run_log import LOG_FILE
from xrdfast.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, os, sys
import torch
from tests.training.tiny import register_presets
from xrdfast.training.config import config_from_dict
from xrdfast.training.trainer import Trainer

torch.set_num_threads(1)
register_presets()
config = config_from_dict(json.loads(sys.argv[1]))
trainer = Trainer(config, sys.argv[2])
result = trainer.run()
assert result.status == "finished", result
torch.save([p.detach() for p in trainer.model.parameters()], f"{sys.argv[2]}/rank{os.environ['RANK']}.pt")
"""


@pytest.mark.usefixtures("tiny_presets")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    store = tmp_path / "odd.store.safetensors"
    write_cubic_store(store, 61)  # seven validation patterns, which two processes cannot share evenly
    config = with_augment(tiny_config(store, balance="mgda"), strain=0.0, b_max=0.0)
    trainer = Trainer(config, tmp_path / "one")
    begin = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    alone = trainer.run()

    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    two = tmp_path / "two"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, json.dumps(config.to_dict()), str(two)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    ranks = [torch.load(two / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert torch.equal(first, second)
    # The sums of a batch are taken in another order, so equality is up to rounding: small beside what
    # training did.
    moved = max(
        float((a.detach() - b).abs().max()) for a, b in zip(trainer.model.parameters(), begin, strict=True)
    )
    for name in (STATE_FILE, MODEL_FILE):
        ours, theirs = load_file(tmp_path / "one" / name), load_file(two / name)
        for key in ours:
            if key.startswith(("model.", "averaged.", "encoder.", "heads.")):
                assert float((ours[key] - theirs[key]).abs().max()) < 1e-3 * moved, key
    logs = [
        [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
        for folder in (tmp_path / "one", two)
    ]
    losses = [[line["loss"] for line in log if line["event"] == "step"] for log in logs]
    assert len(losses[0]) == len(losses[1]) == alone.step == 6
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    validations = [[line["metrics"]["top1"] for line in log if line["event"] == "validation"] for log in logs]
    assert validations[0] == validations[1]
