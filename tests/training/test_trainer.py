"""Whole runs on a tiny store: they learn, stop, resume bit for bit, and name what is wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny import tiny_config, with_augment, write_cubic_store
from xrdfast.errors import InputError
from xrdfast.models import build_model
from xrdfast.training.batches import Batches
from xrdfast.training.checkpoint import (
    MODEL_FILE,
    STATE_FILE,
    load_model,
    load_model_card,
    load_state,
)
from xrdfast.training.config import DataConfig, PresetConfig, TrainConfig, load_config
from xrdfast.training.run_log import LOG_FILE
from xrdfast.training.trainer import (
    CONFIG_FILE,
    Trainer,
    learning_rate_factor,
    recalibrate_batch_norm,
)

pytestmark = pytest.mark.usefixtures("tiny_presets")


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def stop_at(step: int, kind: signal.Signals = signal.SIGTERM) -> Callable[[dict[str, Any]], None]:
    """A progress callback that sends this process a signal."""

    def callback(record: dict[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == step:
            os.kill(os.getpid(), kind)

    return callback


def assert_same_files(first: Path, second: Path) -> None:
    """Equal weights, averages, moments and best models, bit for bit."""
    for name in (STATE_FILE, MODEL_FILE):
        ours, theirs = load_file(first / name), load_file(second / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), (name, key)


def test_a_run_learns_and_leaves_what_is_needed(cubic_store: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    config = tiny_config(cubic_store, epochs=30, learning_rate=1e-2, balance="sum")
    result = Trainer(config, tmp_path, progress=seen.append).run()
    assert (result.status, result.step) == ("finished", 90)
    assert result.metrics["top1"]["space_group"] >= 2 / 3
    assert result.metrics["top1"]["crystal_system"] == 1.0
    assert load_config(tmp_path / CONFIG_FILE) == config

    steps = records(tmp_path, "step")
    assert len(steps) == 90
    assert steps[-1]["fraction"] == 1.0
    assert steps[-1]["loss"]["space_group"] < 0.5 * steps[0]["loss"]["space_group"]
    assert all(step["patterns_per_second"] > 0 and step["skipped_steps"] == 0 for step in steps)
    assert len(records(tmp_path, "validation")) == 30
    assert [record["event"] for record in seen][:2] == ["start", "step"]
    assert seen[-1]["event"] == "end"

    card = load_model_card(tmp_path)
    assert (card.preset, card.wavelength, card.grid["two_theta_step"]) == ("tiny", 1.54056, 0.01)
    assert card.config == config.to_dict()
    assert card.calibration
    assert card.metrics["top1"] == result.metrics["top1"]
    trainer = Trainer(config, tmp_path, resume=True)
    intensity, number = trainer.source.batch(trainer.validation)
    model = load_model(tmp_path)
    assert not model.training
    with torch.inference_mode():
        predicted = model(intensity).space_group.argmax(1) + 1
    assert float((predicted == number).double().mean()) == pytest.approx(
        result.metrics["top1"]["space_group"]
    )


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_continues_bit_for_bit(cubic_store: Path, tmp_path: Path, kind: signal.Signals) -> None:
    """Six steps in one sitting, or two, with batch norm, dropout, augmentation and smoothed task weights."""
    config = tiny_config(cubic_store, "tiny_noisy", balance="mgda_ema")
    whole = Trainer(config, tmp_path / "whole").run()
    assert (whole.status, whole.step) == ("finished", 6)
    handler = signal.getsignal(kind)
    first = Trainer(config, tmp_path / "parts", progress=stop_at(2, kind)).run()
    assert (first.status, first.step) == ("interrupted", 2)
    assert signal.getsignal(kind) == handler
    torch.rand(7)  # whatever state the process is in
    second = Trainer(config, tmp_path / "parts", resume=True).run()
    assert (second.status, second.step) == ("finished", 6)
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    assert whole.metrics == second.metrics
    assert [record["step"] for record in records(tmp_path / "parts", "step")] == [1, 2, 3, 4, 5, 6]
    # a finished run that is resumed stays as it is
    assert Trainer(config, tmp_path / "parts", resume=True).run().step == 6
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


def test_the_averages_keep_no_graph(cubic_store: Path, tmp_path: Path) -> None:
    """One that grew by a step a step held all memory of a long run."""
    trainer = Trainer(tiny_config(cubic_store), tmp_path)
    for _ in range(2):
        trainer._train_step()
    assert not any(average.requires_grad for average in trainer.averaged.parameters())


def test_another_seed_is_another_run(cubic_store: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        Trainer(tiny_config(cubic_store, epochs=1, seed=seed), tmp_path / name).run()
    ours, theirs = (
        load_file(tmp_path / name / STATE_FILE)["model.heads.space_group.0.weight"] for name in "ab"
    )
    assert not torch.equal(ours, theirs)


def test_resuming_something_else_is_refused(cubic_store: Path, tmp_path: Path) -> None:
    config = tiny_config(cubic_store, epochs=1)
    out = tmp_path / "run"
    Trainer(config, out, resume=True).run()  # nothing to resume: begins
    with pytest.raises(InputError, match="run: folder: must be new or resumed, got a run"):
        Trainer(config, out)
    for other, message in (
        (
            tiny_config(cubic_store, "tiny_single", epochs=1),
            "model.preset: must be tiny to resume this run, got tiny_single",
        ),
        (tiny_config(cubic_store, epochs=2), "train.epochs: must be 1 to resume this run, got 2"),
        (with_augment(config, b_max=1.0), "augment.b_max: must be 2.0 to resume"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            Trainer(other, out, resume=True)
        assert "\n" not in str(caught.value)
    Trainer(tiny_config(cubic_store, epochs=1, log_steps=7, checkpoint_minutes=1), out, resume=True)


def test_resuming_on_other_data_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "a.store.safetensors"
    write_cubic_store(store, 60)
    Trainer(tiny_config(store, epochs=1), tmp_path / "run").run()
    write_cubic_store(store, 63)
    with pytest.raises(InputError, match="data: must be the stores this run began with"):
        Trainer(tiny_config(store, epochs=1), tmp_path / "run", resume=True)


def test_a_damaged_checkpoint_is_named(cubic_store: Path, tmp_path: Path) -> None:
    config = tiny_config(cubic_store, epochs=1)
    Trainer(config, tmp_path).run()
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"last\.safetensors: file: must be a whole safetensors file"):
        Trainer(config, tmp_path, resume=True)


def test_a_full_disk_keeps_the_last_checkpoint(
    cubic_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(cubic_store, "tiny_noisy", balance="mgda_ema")
    Trainer(config, tmp_path / "whole").run()
    out = tmp_path / "full"
    Trainer(config, out, progress=stop_at(2)).run()
    before = (out / STATE_FILE).read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="must be writable, got No space left on device"):
            Trainer(config, out, resume=True).run()
    assert (out / STATE_FILE).read_bytes() == before
    assert not [entry for entry in out.iterdir() if entry.name.endswith(".tmp")]
    Trainer(config, out, resume=True).run()
    assert_same_files(tmp_path / "whole", out)


def test_a_time_budget_ends_the_run_and_survives_a_resume(cubic_store: Path, tmp_path: Path) -> None:
    config = tiny_config(cubic_store, epochs=0, max_minutes=0.02, validate_epochs=50)
    first = Trainer(config, tmp_path, progress=stop_at(4)).run()
    assert first.status == "interrupted"
    _, state = load_state(tmp_path / STATE_FILE)
    assert 0 < state["elapsed"] < 1.2
    trainer = Trainer(config, tmp_path, resume=True)
    assert trainer.elapsed == state["elapsed"]
    assert trainer.run().status == "finished"
    steps = records(tmp_path, "step")
    fractions = [step["fraction"] for step in steps]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert steps[-1]["elapsed"] >= 1.2
    assert steps[-1]["learning_rate"] < 0.01 * max(step["learning_rate"] for step in steps)


def test_early_stopping(cubic_store: Path, tmp_path: Path) -> None:
    config = tiny_config(cubic_store, epochs=50, learning_rate=1e-12, early_stopping_patience=3)
    result = Trainer(config, tmp_path).run()
    assert (result.status, result.step) == ("stopped_early", 4 * 3)
    assert Trainer(config, tmp_path, resume=True).run().status == "stopped_early"


def test_a_run_that_diverges_is_told(cubic_store: Path, tmp_path: Path) -> None:
    """NaN for an answer counts as wrong, whatever class comes first; the log stays JSON."""
    with pytest.raises(
        InputError, match=r"run: train.learning_rate: must be lower for this run: it diverged"
    ):
        Trainer(tiny_config(cubic_store, learning_rate=1e30), tmp_path / "run").run()
    told = records(tmp_path / "run", "validation")[-1]["metrics"]
    assert set(told["top1"].values()) == {0.0} and None in told["loss"].values()
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_a_step_that_is_not_finite_changes_nothing(
    cubic_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_config(cubic_store, "tiny_noisy"), tmp_path)
    render, snapshots = trainer.source.batch, []

    def poisoned(
        indices: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        intensity, number = render(indices, generator)
        if generator is not None:
            snapshots.append([x.clone() for x in trainer.model.state_dict().values()])
            if trainer.step == 2:
                intensity[0, 0] = math.inf
        return intensity, number

    monkeypatch.setattr(trainer.source, "batch", poisoned)
    assert trainer.run().status == "finished"
    skipped = [step["skipped_steps"] for step in records(tmp_path, "step")]
    assert skipped == [0, 0, 1, 0, 0, 0]
    counted = [
        i for i, (name, _) in enumerate(trainer.model.state_dict().items()) if "num_batches" not in name
    ]
    assert all(torch.equal(snapshots[2][i], snapshots[3][i]) for i in counted)
    assert not all(torch.equal(snapshots[3][i], snapshots[4][i]) for i in counted)
    assert all(bool(x.isfinite().all()) for x in trainer.averaged.state_dict().values())


@pytest.mark.parametrize(
    "train",
    [
        {"balance": "mgda"},
        {"precision": "bf16"},
        {
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "clip_norm": 0.0,
            "ema_decay": 0.0,
            "label_smoothing": 0.0,
        },
        {"class_balance": 0.5},
        {"class_balance": 0.5, "logit_adjustment": 1.0},
    ],
    ids=["mgda", "bf16", "plain", "class_balance", "logit_adjustment"],
)
def test_settings_run(cubic_store: Path, tmp_path: Path, train: dict[str, Any]) -> None:
    trainer = Trainer(tiny_config(cubic_store, epochs=1, **train), tmp_path)
    assert trainer.run().status == "finished"
    if train.get("ema_decay") == 0.0:
        for averaged, own in zip(trainer.averaged.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(averaged, own)


def test_a_model_of_one_task(cubic_store: Path, tmp_path: Path) -> None:
    result = Trainer(tiny_config(cubic_store, "tiny_single", epochs=1), tmp_path).run()
    assert list(result.metrics["top1"]) == ["space_group"]


def test_a_run_starts_from_weights(cubic_store: Path, tmp_path: Path) -> None:
    Trainer(tiny_config(cubic_store), tmp_path / "first").run()
    before = load_model(tmp_path / "first").state_dict()
    config = replace(tiny_config(cubic_store), model=PresetConfig("tiny", str(tmp_path / "first")))
    trainer = Trainer(config, tmp_path / "second")
    for model in (trainer.model, trainer.averaged):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    trainer.run()
    after = load_model(tmp_path / "second").state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    # A stopped run goes on from its own weights, wherever those it began with are now.
    (tmp_path / "first" / MODEL_FILE).unlink()
    Trainer(config, tmp_path / "second", resume=True)


def test_weights_that_do_not_fit_are_refused(cubic_store: Path, tmp_path: Path) -> None:
    Trainer(tiny_config(cubic_store), tmp_path / "first").run()
    first = str(tmp_path / "first")
    single = replace(tiny_config(cubic_store), model=PresetConfig("tiny_single", first))
    with pytest.raises(InputError, match="first: preset: must be tiny_single to start from, got tiny"):
        Trainer(single, tmp_path / "second")
    folds = replace(
        tiny_config(cubic_store),
        model=PresetConfig("tiny", first),
        data=DataConfig((str(cubic_store),), (1,)),
    )
    with pytest.raises(InputError, match=r"folds_validation: must be this run's \[1\], got \[0\]"):
        Trainer(folds, tmp_path / "second")
    other = tmp_path / "other.store.safetensors"
    other.write_bytes(cubic_store.read_bytes())
    strange = replace(tiny_config(other), model=PresetConfig("tiny", first))
    with pytest.warns(
        UserWarning, match="was not trained on other.store.safetensors, whose folds may be others"
    ):
        Trainer(strange, tmp_path / "strange")
    nowhere = replace(tiny_config(cubic_store), model=PresetConfig("tiny", "nowhere/run"))
    with pytest.raises(InputError, match="nowhere/run: file: must be readable"):
        Trainer(nowhere, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_every_pattern_comes_once_an_epoch(cubic_store: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(cubic_store, batch_size=9), tmp_path)
    epochs = []
    for epoch in range(2):
        rows = []
        for position in range(trainer.steps_per_epoch):
            rows += trainer._batches.rows(epoch * trainer.steps_per_epoch + position).tolist()
        assert sorted(rows) == trainer.training.tolist()
        epochs.append(rows)
    assert epochs[0] != epochs[1]
    assert not set(trainer.training.tolist()) & set(trainer.validation.tolist())


def test_what_does_not_fit_is_named(cubic_store: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.store.safetensors"
    write_cubic_store(small, 20)  # folds 0 to 6
    held_out = DataConfig(stores=(str(small),), folds_validation=(9,))
    for config, message in (
        (
            tiny_config(cubic_store, batch_size=64),
            "train.batch_size: must be <= 54 training patterns, got 64",
        ),
        (
            tiny_config(cubic_store, cuda_graph=True),
            "train.cuda_graph: must be false where there is no GPU, got true",
        ),
        (
            replace(tiny_config(small), data=held_out),
            r"data.folds_validation: must hold patterns of the stores, got none in \[9\]",
        ),
        (
            replace(tiny_config(small), data=DataConfig((str(small),), tuple(range(10)))),
            "data.folds_validation: must leave patterns to train on, got none beside",
        ),
        (tiny_config(tmp_path / "none.store"), "none.store: file: must be readable"),
    ):
        with pytest.raises(InputError, match=message):
            Trainer(config, tmp_path / "run")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="file: folder: must be writable"):
        Trainer(tiny_config(cubic_store), blocked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_must_be_there(cubic_store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.device: must be cpu where no GPU is found, got cuda"):
        Trainer(tiny_config(cubic_store, device="cuda"), tmp_path)


@pytest.mark.parametrize(
    ("class_balance", "rare"), [(0.0, 6 / 42), (1.0, 1 / 3)], ids=["as they come", "groups evenly"]
)
def test_class_balance_shows_rare_groups_more_often(
    tmp_path: Path, class_balance: float, rare: float
) -> None:
    store = tmp_path / "a.store.safetensors"
    write_cubic_store(store, 60)
    trainer = Trainer(tiny_config(store, class_balance=class_balance, batch_size=42), tmp_path / "run")
    number = trainer.store.space_group_01[trainer.training]
    few = torch.cat([trainer.training[number != 225], trainer.training[number == 225][:6]])
    batches = Batches(trainer.source, few, trainer.config.train, trainer._processes)
    drawn = [trainer.store.space_group_01[batches.rows(step)] for step in range(50)]
    assert float((torch.cat(drawn) == 225).double().mean()) == pytest.approx(rare, abs=0.03)


def test_tensorboard_is_asked_for_by_name(cubic_store: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(cubic_store, epochs=1, tensorboard=True), tmp_path)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(
            InputError, match=r"train.tensorboard: must be false where tensorboard is not installed"
        ):
            trainer.run()
    else:
        trainer.run()
        assert list(tmp_path.glob("events.out.*"))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_and_falls(schedule: str) -> None:
    config = TrainConfig(schedule=schedule, warmup_fraction=0.1, final_fraction=0.01)
    factors = [learning_rate_factor(i / 1000, config) for i in range(1001)]
    assert factors[:101] == sorted(factors[:101])
    assert factors[100] == pytest.approx(1.0)
    assert factors[100:] == sorted(factors[100:], reverse=True)
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.01)
    assert all(0.0 <= factor <= 1.0 for factor in factors)


def test_recalibration_takes_plain_averages() -> None:
    torch.manual_seed(0)
    model = build_model("tiny_noisy").eval()
    norm = model.encoder.norm
    norm.running_mean.fill_(7.0)
    batches = [100.0 * torch.rand(8, 8500) for _ in range(3)]
    recalibrate_batch_norm(model, batches)
    pooled = [torch.log1p(batch).unflatten(1, (170, 50)).sum(2) for batch in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in pooled]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in pooled]).mean(0))
    assert norm.momentum == 0.1
    assert not any(module.training for module in model.modules())
