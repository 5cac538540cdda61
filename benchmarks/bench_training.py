"""Speed of training steps: the faithful preset against the published loop, the small one against its bar."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from benchmarks.paired import paired, seconds
from tests.models.published_reference import published_models, published_step
from xrdfast.data.generate import PatternSource, generate_store
from xrdfast.data.store import PatternStore
from xrdfast.data.structures import analyse_symmetry, load_structures
from xrdfast.models import SymmetryModel, build_model
from xrdfast.symmetry import TASKS, class_index
from xrdfast.training.balance import Balance, balanced_step
from xrdfast.training.config import config_from_dict
from xrdfast.training.distill import DistillationConfig, Distiller
from xrdfast.training.trainer import Trainer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 real inorganic structures, simulated."""
    data = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "inorganic_mp.npz"
    if not data.exists():
        pytest.skip("the shared data folder is not there")
    structures, _ = load_structures(data)
    path = tmp_path_factory.mktemp("store") / "inorganic.store.safetensors"
    generate_store(analyse_symmetry(structures[::5]), path)
    return path


def test_paper_step_against_the_published_loop(benchmark, row, threads, store: Path) -> None:
    """Batch 64, fused Adam, two threads and subnormals flushed on both sides; ours balances with MGDA."""
    threads(2)
    torch.set_flush_denormal(True)
    source = PatternSource(PatternStore.open(store))
    intensity, number = source.batch(torch.arange(64))
    labels = {task: torch.from_numpy(class_index(task).copy())[number - 1] for task in TASKS}
    torch.manual_seed(0)
    models = published_models()
    published_optimizer = torch.optim.Adam(
        [p for m in models.values() for p in m.parameters()], lr=5e-4, fused=True
    )
    model = build_model("paper").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, fused=True)
    balance = Balance("mgda", len(TASKS))

    def ours() -> None:
        optimizer.zero_grad(set_to_none=True)
        balanced_step(model, intensity, labels, balance)
        optimizer.step()

    pair = paired(ours, lambda: published_step(models, published_optimizer, intensity, labels), rounds=3)
    benchmark.pedantic(ours, rounds=1)
    row(
        "training step, paper preset, inorganic, batch 64, 2 cores",
        f"{pair.ratio:.2f} × the published loop ({64 / pair.ours:.1f} against {64 / pair.rival:.1f} patterns/s)",
        "≥ 1.3 ×",
        pair.ratio >= 1.3,
    )


@pytest.mark.parametrize(
    ("preset", "terms"), [("paper", "DRG + DSR"), ("small", "DRG + DSR"), ("small", "DRG"), ("small", "DSR")]
)
def test_cost_of_distillation(benchmark, row, threads, store: Path, preset: str, terms: str) -> None:
    """DRG and DSR on all four heads, against the same step without them; batch 64."""
    threads(2)
    torch.set_flush_denormal(True)
    intensity, number = PatternSource(PatternStore.open(store)).batch(torch.arange(64))
    labels = {task: torch.from_numpy(class_index(task).copy())[number - 1] for task in TASKS}
    torch.manual_seed(0)
    plain, distilled = build_model(preset).train(), build_model(preset).train()
    distiller = Distiller(DistillationConfig(drg="DRG" in terms, dsr="DSR" in terms), distilled)
    parameters = [p for _, p in distiller.named_parameters()]
    optimizers = {
        model: torch.optim.Adam([*model.parameters(), *more], lr=5e-4, fused=True)
        for model, more in ((plain, []), (distilled, parameters))
    }
    balances = {model: Balance("mgda", len(TASKS)) for model in (plain, distilled)}

    def step(model: SymmetryModel, extra: Distiller | None) -> None:
        optimizers[model].zero_grad(set_to_none=True)
        balanced_step(model, intensity, labels, balances[model], extra=extra)
        optimizers[model].step()

    rounds = 21 if preset == "paper" else 15  # pairs of steps of `paper` scatter by 9 %
    pair = paired(lambda: step(plain, None), lambda: step(distilled, distiller), rounds=rounds)
    benchmark.pedantic(lambda: step(distilled, distiller), rounds=1)
    row(
        f"{terms} in a training step, {preset} preset, inorganic, batch 64, 2 cores",
        f"{100.0 * (pair.ratio - 1.0):+.1f} % ({pair.ours:.3f} s without)",
        "≤ 8 %" if preset == "paper" else "reported",
        preset != "paper" or pair.ratio <= 1.08,
    )


@pytest.mark.parametrize(("preset", "balance"), [("small", "mgda"), ("small", "sum"), ("plain_cnn", "sum")])
def test_training_speed(
    benchmark, row, threads, store: Path, tmp_path: Path, preset: str, balance: str
) -> None:
    """The trainer's own step: reading, straining and rendering a batch of 64, forward, backward, update, average."""
    threads(2)
    trainer = Trainer(
        config_from_dict(
            {
                "model": {"preset": preset},
                "data": {"stores": [str(store)]},
                "train": {"epochs": 1, "balance": balance, "threads": 2},
            }
        ),
        tmp_path / "run",
    )
    for _ in range(5):
        trainer._train_step()
    times = [seconds(trainer._train_step) for _ in range(40)]
    benchmark.pedantic(trainer._train_step, rounds=5)
    speed = 64 / statistics.median(times)
    bar = "≥ 500 patterns/s" if preset == "small" else "reported"
    what = f"training, {preset} preset, balance {balance}, store to update, batch 64, 2 cores"
    row(what, f"{speed:.0f} patterns/s", bar, speed >= 500 or preset != "small")
