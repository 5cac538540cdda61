"""Training with distillation: what reaches the encoder, resuming, two processes, teachers, complaints."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.training.test_trainer import assert_same_files, records, stop_at
from tests.training.tiny import tiny_config, write_cubic_store
from xrdfast.bragg import KA1_WAVELENGTH
from xrdfast.cli import cli
from xrdfast.data.generate import AugmentConfig
from xrdfast.distillation import softened_divergence
from xrdfast.errors import InputError
from xrdfast.models import build_model
from xrdfast.symmetry import TASKS
from xrdfast.training.balance import Balance, balanced_step
from xrdfast.training.checkpoint import MODEL_FILE, STATE_FILE, load_model
from xrdfast.training.config import RunConfig, load_config
from xrdfast.training.distill import DistillationConfig, Distiller, check_teacher
from xrdfast.training.trainer import CONFIG_FILE, Trainer

pytestmark = pytest.mark.usefixtures("tiny_presets")
ROOT = Path(__file__).resolve().parents[2]


def with_distillation(config: RunConfig, **settings: Any) -> RunConfig:
    return dataclasses.replace(config, distillation=DistillationConfig(**settings))


@pytest.fixture
def batch() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    sizes = dict(zip(TASKS, (230, 7, 6, 32), strict=True))
    intensity = 100.0 * torch.rand(6, 8500, generator=generator)
    return intensity, {t: torch.randint(0, n, (6,), generator=generator) for t, n in sizes.items()}


def test_the_gradients_are_those_of_the_written_out_sum(batch) -> None:
    """Sum balance: dCE + d(DRG KL) + d(DSR KL) + d(CE of the auxiliary classifier), every parameter."""
    intensity, labels = batch
    torch.manual_seed(0)
    model = build_model("tiny").double().train()
    torch.set_default_dtype(torch.float64)
    try:
        distiller = Distiller(DistillationConfig(drg=True, dsr=True), model)
    finally:
        torch.set_default_dtype(torch.float32)
    distiller.modules()[0].double()
    intensity = intensity.double()
    first = model(intensity.flip(0))._asdict()
    distiller._wrapped.dsr(first)
    memory = {task: logits.detach().sort(dim=1).values for task, logits in first.items()}
    distiller._wrapped._map = None

    balanced_step(model, intensity, labels, Balance("sum", 4), extra=distiller)
    named = [*model.named_parameters(), *distiller.named_parameters()]
    got = {name: p.grad.clone() for name, p in named}
    for _, parameter in named:
        parameter.grad = None

    logits = model(intensity)._asdict()
    auxiliary = distiller._wrapped.auxiliary(distiller._wrapped._taken_map())
    total = 0.0
    for task in TASKS:
        z, z_aux = logits[task], auxiliary[task]
        total = total + F.cross_entropy(z, labels[task]) + F.cross_entropy(z_aux, labels[task])
        for weight, teacher, student in (
            (0.2, z_aux.detach(), z),
            (1.0, memory[task], z.sort(dim=1).values),
        ):
            p, log_q = torch.softmax(teacher / 4, 1), torch.log_softmax(student / 4, 1)
            total = total + weight * 16 * (p * (p.log() - log_q)).sum(1).mean()
    total.backward()
    for name, parameter in named:
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("balance", ["sum", "mgda", "mgda_ema"])
@pytest.mark.parametrize("objective", ["tasks", "own"])
def test_every_balance_runs_and_resumes_bit_for_bit(
    cubic_store: Path, tmp_path: Path, balance: str, objective: str
) -> None:
    """Stopped in the middle of an epoch, where DSR remembers a batch."""
    config = with_distillation(
        tiny_config(cubic_store, "tiny_noisy", balance=balance),
        drg=True,
        dsr=True,
        joint=True,
        objective=objective,
    )
    whole = Trainer(config, tmp_path / "whole").run()
    assert Trainer(config, tmp_path / "parts", progress=stop_at(2)).run().status == "interrupted"
    second = Trainer(config, tmp_path / "parts", resume=True).run()
    assert (second.status, second.step) == ("finished", whole.step)
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    names = load_file(tmp_path / "whole" / STATE_FILE)
    assert "memory.dsr" in names
    assert any(name.startswith("optimizer.exp_avg.auxiliary.") for name in names)
    assert set(load_file(tmp_path / "whole" / MODEL_FILE)) == set(build_model("tiny_noisy").state_dict())
    steps = records(tmp_path / "whole", "step")
    assert set(steps[0]["weight"]) == {*TASKS, *(["distillation"] if objective == "own" else [])}
    assert load_config(tmp_path / "whole" / CONFIG_FILE) == config


def test_distillation_changes_the_weights_and_keeps_the_start(cubic_store: Path, tmp_path: Path) -> None:
    """Runs with and without begin from the same weights, so that seeds pair."""
    plain = tiny_config(cubic_store, balance="sum", epochs=1)
    trainers = [
        Trainer(config, tmp_path / str(i))
        for i, config in enumerate((plain, with_distillation(plain, drg=True, dsr=True)))
    ]
    begin = [[p.detach().clone() for p in trainer.model.parameters()] for trainer in trainers]
    for one, other in zip(*begin, strict=True):
        assert torch.equal(one, other)
    for trainer in trainers:
        trainer.run()
    ends = [torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) for trainer in trainers]
    assert not torch.equal(*ends)


def test_a_batch_that_is_not_finite_changes_nothing(batch) -> None:
    intensity, labels = batch
    model = build_model("tiny_noisy").train()
    distiller = Distiller(DistillationConfig(drg=True, dsr=True), model)
    state = {name: x.clone() for name, x in distiller.state_dict().items()}
    intensity[0, 0] = torch.nan
    result = balanced_step(model, intensity, labels, Balance("mgda", 4), extra=distiller)
    assert not result.finite
    for _, parameter in [*model.named_parameters(), *distiller.named_parameters()]:
        assert parameter.grad is None or float(parameter.grad.abs().max()) == 0.0
    for name, x in distiller.state_dict().items():
        if "running" in name:
            assert torch.equal(x, state[name]), name


SCRIPT = """
import json, sys
import torch
from tests.training.tiny import register_presets
from xrdfast.training.config import config_from_dict
from xrdfast.training.trainer import Trainer
from tests.training.test_trainer import stop_at

torch.set_num_threads(1)
register_presets()
config = config_from_dict(json.loads(sys.argv[1]))
progress = stop_at(int(sys.argv[3])) if len(sys.argv) > 3 else None
Trainer(config, sys.argv[2], resume=True, progress=progress).run()
"""


def test_each_process_keeps_its_own_memory(tmp_path: Path) -> None:
    """Two processes, stopped in the middle of an epoch and resumed: bit for bit the run in one sitting."""
    store = tmp_path / "cubic.store.safetensors"
    write_cubic_store(store)
    config = with_distillation(tiny_config(store, balance="mgda"), drg=True, dsr=True)
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def run(folder: str, *rest: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [str(script), json.dumps(config.to_dict()), str(tmp_path / folder), *rest]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    run("whole")
    run("parts", "2")
    memory = load_file(tmp_path / "parts" / STATE_FILE)["memory.dsr"]
    assert memory.shape == (16, 275)
    assert not torch.equal(memory[:8], memory[8:])
    run("parts")
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


def test_a_student_learns_from_a_teacher(cubic_store: Path, tmp_path: Path) -> None:
    Trainer(tiny_config(cubic_store, epochs=20, learning_rate=1e-2), tmp_path / "teacher").run()
    # Of another seed: with the teacher's own, a student alone ends as its twin.
    alone = tiny_config(cubic_store, "tiny_single", epochs=20, learning_rate=1e-2, seed=5)
    Trainer(alone, tmp_path / "alone").run()
    words = f"distill --teacher {tmp_path}/teacher --preset tiny_single -o {tmp_path}/student"
    done = CliRunner().invoke(
        cli, [*words.split(), "--set", "distillation.teacher_weight=10", "--set", "train.seed=5"]
    )
    assert done.exit_code == 0, done.output
    config = load_config(tmp_path / "student" / CONFIG_FILE)
    assert config.distillation.teacher == str(tmp_path / "teacher")
    assert (config.model.preset, config.train.epochs) == ("tiny_single", 20)
    student = load_model(tmp_path / "student")
    assert student.tasks == ("space_group",)
    teacher = load_model(tmp_path / "teacher")
    trainer = Trainer(config, tmp_path / "student", resume=True)
    intensity, _ = trainer.source.batch(trainer.training)
    with torch.inference_mode():
        want = teacher(intensity).space_group
        distances = [
            softened_divergence(model(intensity).space_group, want, 4.0)
            for model in (student, load_model(tmp_path / "alone"))
        ]
    assert distances[0] < 0.5 * distances[1]


def test_train_distill_is_a_flag(cubic_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(tiny_config(cubic_store, epochs=1).to_toml())
    done = CliRunner().invoke(cli, ["train", str(path), "-o", str(tmp_path / "run"), "--distill"])
    assert done.exit_code == 0, done.output
    settings = load_config(tmp_path / "run" / CONFIG_FILE).distillation
    assert settings.drg and settings.dsr and not settings.joint


@pytest.mark.parametrize(
    ("preset", "settings", "message"),
    [
        ("tiny", {"drg": True, "stage": "encoder.nowhere"}, "distillation.stage: .*got 'encoder.nowhere'"),
        ("tiny", {"drg": True, "stage": "encoder.layer"}, "distillation.stage: .*encoder.layer gave"),
        ("tiny_single", {"joint": True}, "distillation.joint: must be false for a model of one task"),
        ("tiny", {"teacher": "nowhere/run"}, "nowhere/run"),
        ("tiny", {"drg": True, "temperature": 0.0}, "distillation.temperature: must be > 0, got 0.0"),
        ("tiny", {"drg_weight": -0.1}, "distillation.drg_weight: must be >= 0, got -0.1"),
        ("tiny", {"objective": "both"}, "distillation.objective: must be one of tasks, own, got"),
    ],
)
def test_bad_settings_stop_before_training(
    cubic_store: Path, tmp_path: Path, preset: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(with_distillation(tiny_config(cubic_store, preset), **settings), tmp_path / "run")


def test_a_teacher_must_know_the_students_tasks(cubic_store: Path, tmp_path: Path) -> None:
    Trainer(tiny_config(cubic_store, "tiny_single", epochs=1), tmp_path / "teacher").run()
    config = with_distillation(tiny_config(cubic_store), teacher=str(tmp_path / "teacher"))
    with pytest.raises(InputError, match="tasks: must be those of the student, got no crystal_system"):
        Trainer(config, tmp_path / "student")


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        ("data", "folds_validation", (1,), r"data.folds_validation: must be the student's \[1\], got \[0\]"),
        ("augment", "profile", "lab", "augment.profile: must be the student's lab, got sticks"),
    ],
)
def test_a_teacher_must_have_seen_the_students_patterns(
    cubic_store: Path, tmp_path: Path, table: str, key: str, value: Any, message: str
) -> None:
    Trainer(tiny_config(cubic_store, epochs=1), tmp_path / "teacher").run()
    config = with_distillation(tiny_config(cubic_store), teacher=str(tmp_path / "teacher"))
    config = dataclasses.replace(
        config, **{table: dataclasses.replace(getattr(config, table), **{key: value})}
    )
    with pytest.raises(InputError, match=message):
        Trainer(config, tmp_path / "student")


def test_a_teacher_of_another_preparation_is_refused(cubic_store: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config(cubic_store, epochs=1), augment=AugmentConfig(profile="lab"))
    Trainer(config, tmp_path / "teacher").run()
    measured = AugmentConfig(profile="lab", preparation="measured")
    with pytest.raises(InputError, match=r"augment\.preparation: must be the student's measured, got known"):
        check_teacher(str(tmp_path / "teacher"), (0,), measured, KA1_WAVELENGTH)


def test_weights_that_ship_teach_by_name() -> None:
    """The name stays in the run's settings, so that it resumes wherever the package is."""
    student = AugmentConfig(profile="lab", preparation="measured")
    check_teacher("lab-small", (0,), student, KA1_WAVELENGTH)
    other = dataclasses.replace(student, smooth_width=0.05)
    with pytest.raises(InputError, match=r"augment\.smooth_width: must be the student's 0\.05, got 0\.12"):
        check_teacher("lab-small", (0,), other, KA1_WAVELENGTH)


def test_a_teacher_of_another_wavelength_is_refused(cubic_store: Path, tmp_path: Path) -> None:
    Trainer(tiny_config(cubic_store, epochs=1), tmp_path / "teacher").run()
    with pytest.raises(InputError, match=r"wavelength: must be the student's 0\.7, got 1\.54"):
        check_teacher(str(tmp_path / "teacher"), (0,), AugmentConfig(), 0.7)
