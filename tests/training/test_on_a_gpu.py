"""The whole loop on a device: structures to patterns to steps, in a CUDA graph too, against the same on the CPU.

Whole steps are compared in double. A batch of four goes through thirteen batch norms, maxima and kinks, some of which
rounding in float32 turns over: on the CPU alone, that moved a weight's gradient by a fifth, and losses by a hundredth
within four steps. In double it was 3e-12 of a gradient and 1e-14 of a loss.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.graphed_step import GraphedStep
from tests.training.tiny import tiny_config, write_cubic_store
from xrdfast.bragg import Grid
from xrdfast.data.generate import AugmentConfig, PatternSource
from xrdfast.data.store import PatternStore
from xrdfast.models import build_model
from xrdfast.models.xrdecoupler import SymmetryModel
from xrdfast.ops.render import render_sticks
from xrdfast.ops.simulate import simulate_families
from xrdfast.symmetry import N_CLASSES, TASKS
from xrdfast.training.balance import Balance, balanced_step
from xrdfast.training.trainer import Trainer

N_PATTERNS = 4


def paper_model(dtype: torch.dtype = torch.float32) -> SymmetryModel:
    torch.manual_seed(0)
    model = build_model("paper").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each device draws its own
    return model.to(dtype)


def batches(n: int, n_patterns: int = N_PATTERNS) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Sticks in double and random labels; the last batch is full of points."""
    generator = torch.Generator().manual_seed(1)
    intensity = torch.zeros(n, n_patterns, 8500)
    peaks = torch.randint(0, 8500, (n, n_patterns, 60), generator=generator)
    intensity.scatter_(2, peaks, 100 * torch.rand(n, n_patterns, 60, generator=generator))
    intensity[-1] = 100 * torch.rand(n_patterns, 8500, generator=generator)
    return [
        (x, {t: torch.randint(0, N_CLASSES[t], (n_patterns,), generator=generator) for t in TASKS})
        for x in intensity.double()
    ]


def moved(batch: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    return batch[0].cuda(), {task: rows.cuda() for task, rows in batch[1].items()}


@pytest.mark.gpu
def test_gradients_of_a_step_equal_those_of_the_cpu(gpu) -> None:
    """Packed and dense batches of the faithful preset, through the operators of either device."""
    model = paper_model(torch.float64)
    there = copy.deepcopy(model).cuda()
    for batch in batches(2):
        for which, given in ((model, batch), (there, moved(batch))):
            which.zero_grad()
            assert bool(balanced_step(which, *given, Balance("sum", 4, given[0].device)).finite)
        largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
        for (name, mine), theirs in zip(there.named_parameters(), model.parameters(), strict=True):
            assert mine.grad.is_cuda
            # Some gradients are rounding alone: a bias of keys adds the same to all scores.
            scale = max(float(theirs.grad.abs().max()), 1e-3 * largest)
            difference = float((mine.grad.cpu() - theirs.grad).abs().max())
            assert difference <= 1e-8 * scale, f"{name}: {difference:.1e} of {scale:.1e}"


@pytest.mark.gpu
def test_a_graph_of_the_whole_step_trains_as_the_step_itself(gpu) -> None:
    """Sparse batches packed; the full one finds no room and takes the dense graph."""
    given = [moved(batch) for batch in batches(6)]
    eager = paper_model(torch.float64).cuda()
    rows = [
        len(stage.count) for stage in eager.encoder.local_branch.plan(given[0][0]).stages if stage.shift == 1
    ]
    assert rows
    room = [int(1.2 * n) for n in rows]
    models, results = (eager, copy.deepcopy(eager)), []
    for model, graphed in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
        balance = Balance("mgda", 4, given[0][0].device)
        initial = {name: x.clone() for name, x in model.state_dict().items()}
        step = GraphedStep(model, optimizer, balance, *given[0], room) if graphed else None
        model.load_state_dict(initial)  # the graph's warm-up has trained
        losses, packed = [], []
        for batch in given:
            if step is not None:
                result, was_packed = step(*batch)
                packed.append(was_packed)
            else:
                optimizer.zero_grad()
                result = balanced_step(model, *batch, balance)
                optimizer.step()
            losses.append(result.losses.clone())
        results.append(torch.stack(losses))
        if graphed:
            assert packed == [True] * 5 + [False]
    assert all(x.is_cuda for x in results)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_simulation_rendering_and_training_on_the_device(gpu) -> None:
    """Structures go there once; neither families, patterns nor gradients come back."""
    from tests.ops.test_device_code import structures, to_device

    there = to_device(structures()[:4])
    families = simulate_families(there)
    metric = torch.linalg.inv(there.lattice @ there.lattice.mT)
    metric = metric[:, [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]].contiguous()
    still = torch.zeros(4, dtype=torch.float64, device="cuda")
    rows = families.offset, families.hkl, families.multiplicity, families.f_squared
    intensity = render_sticks(*rows, metric, still, wavelength=1.54056, grid=Grid())
    assert intensity.is_cuda and intensity.amax(1).tolist() == [100.0] * 4
    model = paper_model().cuda()
    labels = {task: torch.arange(4, device="cuda") for task in TASKS}
    result = balanced_step(model, intensity, labels, Balance("mgda", 4, intensity.device))
    assert bool(result.finite)


@pytest.mark.gpu
@pytest.mark.parametrize("profile", ["sticks", "lab"])
def test_a_source_renders_where_it_is_told_to(gpu, tmp_path: Path, profile: str) -> None:
    write_cubic_store(tmp_path / "cubic.store.safetensors")
    store, results = PatternStore.open(tmp_path / "cubic.store.safetensors"), []
    for device in ("cpu", "cuda"):
        source = PatternSource(store, augment=AugmentConfig(profile=profile), device=device)
        results.append(source.batch(torch.arange(20), torch.Generator().manual_seed(3)))
    (want, number), (got, same) = results
    assert got.is_cuda and torch.equal(number, same)
    assert float(((got.cpu() - want).abs() > 1e-3).double().mean()) <= 1e-4


@pytest.mark.gpu
def test_the_trainer_finishes_on_the_device(gpu, tmp_path: Path) -> None:
    write_cubic_store(tmp_path / "cubic.store.safetensors")
    config = tiny_config(tmp_path / "cubic.store.safetensors", preset="small", device="cuda")
    result = Trainer(config, tmp_path / "run").run()
    assert result.status == "finished"
    assert result.step == 6


@pytest.mark.gpu
@pytest.mark.parametrize("profile", ["sticks", "lab"])
def test_batches_drawn_ahead_are_those_drawn_at_once(gpu, tmp_path: Path, profile: str) -> None:
    """Over the end of an epoch, and after a jump to another step."""
    write_cubic_store(tmp_path / "cubic.store.safetensors")
    config = tiny_config(tmp_path / "cubic.store.safetensors", preset="small", device="cuda")
    augment = AugmentConfig(profile=profile, preparation="known" if profile == "sticks" else "measured")
    trainer = Trainer(dataclasses.replace(config, augment=augment), tmp_path / "run")
    for step in (0, 1, 2, 3, 4, 9, 10, 2):
        got, number = trainer._batches.take(step)
        want, same = trainer._batches._draw(step)
        assert torch.equal(got, want) and torch.equal(number, same)
    trainer._batches.close()
    assert torch.equal(trainer._batches.take(0)[0], trainer._batches._draw(0)[0])


@pytest.mark.gpu
def test_the_trainer_s_graph_trains_as_single_steps(gpu, tmp_path: Path) -> None:
    """Batches drawn ahead, dropout, clipping and the rate's rise and fall included."""
    write_cubic_store(tmp_path / "cubic.store.safetensors")
    losses, weights = [], []
    for graphed in (True, False):
        config = tiny_config(
            tmp_path / "cubic.store.safetensors", preset="small", device="cuda", epochs=4, cuda_graph=graphed
        )
        records: list[dict] = []
        trainer = Trainer(config, tmp_path / str(graphed), progress=records.append)
        assert trainer.run().status == "finished"
        assert (trainer._update._graph is not None) == graphed
        losses.append([[*r["loss"].values()] for r in records if r["event"] == "step"])
        weights.append(torch.cat([p.flatten() for p in trainer.averaged.parameters()]))
    assert len(losses[0]) == trainer.step == 12
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-3)
    assert float((weights[0] - weights[1]).norm() / weights[1].norm()) < 1e-2
