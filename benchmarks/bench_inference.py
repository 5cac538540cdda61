"""Whole inference of the `paper` preset against the published modules and against tuned eager PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.paired import paired, seconds
from benchmarks.real_patterns import stick_batch
from benchmarks.tuned_eager import TunedEager
from tests.models.published_reference import TASK_NAMES, grid_angle, published_logits, published_models
from xrdfast.models import SymmetryModel, import_published_checkpoint

BARS = {"inorganic_mp": (4.0, 2.0), "coremof": (2.0, 1.3)}  # times P, times T


def models_with_statistics(intensity: Tensor, folder) -> tuple[dict[str, nn.Module], SymmetryModel]:
    """The published modules with batch-norm statistics of these patterns, and ours with the same weights."""
    torch.manual_seed(0)
    models = published_models(dropout=0.0)
    norms = [m for part in models.values() for m in part.modules() if isinstance(m, nn.BatchNorm1d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        published_logits(models, intensity[:16])
    for part in models.values():
        part.eval()
    path = folder / "published.pth"
    torch.save({name: part.state_dict() for name, part in models.items()}, path)
    return models, import_published_checkpoint(path).eval()


def same_answers(got: dict[str, Tensor], usual: dict[str, Tensor], exact: dict[str, Tensor]) -> bool:
    """style.md's parity rule on the logits, and equal top-1."""
    for task, want in exact.items():
        error, allowed = ((x[task].double() - want).abs().max() for x in (got, usual))
        if error > 2 * allowed + 1e-6 * want.abs().max():
            return False
        if not torch.equal(got[task].argmax(1), want.argmax(1)):
            return False
    return True


@pytest.mark.parametrize("name", list(BARS))
def test_paper_inference(benchmark, row, threads, shared_data, tmp_path, name: str) -> None:
    """float32, batch 64, two threads, subnormals flushed on all sides; T at its best batch size.

    Every 4th pattern's answers are compared: float64 takes as long as all the rest.
    """
    threads(2)
    torch.set_flush_denormal(True)
    intensity = stick_batch(shared_data, name)
    models, ours = models_with_statistics(intensity, tmp_path)
    tuned = TunedEager(models).eval()
    sine = torch.sin(grid_angle(1, torch.float32)[0] * (math.pi / 180))
    with torch.inference_mode():
        some = intensity[::4]
        usual = published_logits(models, some)
        theirs = {TASK_NAMES[t]: x[::4] for t, x in tuned(intensity, sine).items()}
        exact = published_logits({k: m.double() for k, m in models.items()}, some.double())
        for part in models.values():
            part.float()
        answers = {task: x[::4] for task, x in ours(intensity)._asdict().items()}
        assert same_answers(answers, usual, exact)
        assert same_answers(theirs, usual, exact)

        def tuned_in(size: int) -> None:
            for part in intensity.split(size):
                tuned(part, sine)

        best = min((8, 16, 32, 64), key=lambda size: min(seconds(lambda: tuned_in(size)) for _ in range(2)))
        p = paired(lambda: ours(intensity), lambda: published_logits(models, intensity), rounds=3)
        t = paired(lambda: ours(intensity), lambda: tuned_in(best), rounds=5)
        benchmark.pedantic(lambda: ours(intensity), rounds=3)
    bar_p, bar_t = BARS[name]
    row(
        f"inference, paper preset, float32, {name} sticks, batch 64, 2 cores",
        f"{p.ratio:.1f} × P, {t.ratio:.1f} × T at batch {best} ({64 / t.ours:.0f} patterns/s)",
        f"≥ {bar_p:.0f} × P, ≥ {bar_t:.1f} × T",
        p.ratio >= bar_p and t.ratio >= bar_t,
    )
