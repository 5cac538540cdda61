"""Convergence: our step against a literal transcription of the published loop."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.published_reference import published_models, published_step
from xrdfast.models import import_published_checkpoint
from xrdfast.symmetry import N_CLASSES, TASKS
from xrdfast.training.balance import Balance, balanced_step


def test_twenty_steps_equal_the_published_loop(tmp_path):
    """Plain sum, dropout 0, the same initial weights, Adam at the published rate: equal losses, float64.

    In float32 the two drift apart within a few steps, because Adam's first updates are nearly signs of the
    gradients.
    """
    torch.manual_seed(1)
    models = published_models(dropout=0.0)
    path = tmp_path / "initial.pth"
    torch.save({name: module.state_dict() for name, module in models.items()}, path)
    torch.set_default_dtype(torch.float64)  # so that the fixed buffers are not rounded to float32 first
    try:
        model = import_published_checkpoint(path)
    finally:
        torch.set_default_dtype(torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    models = {name: module.double() for name, module in models.items()}
    learned = [p for m in models.values() for p in m.parameters() if p.requires_grad]
    theirs = torch.optim.Adam(learned, lr=5e-4, fused=True)
    ours = torch.optim.Adam(model.parameters(), lr=5e-4, fused=True)
    balance = Balance("sum", 4)
    generator = torch.Generator().manual_seed(2)
    intensity = torch.zeros(20, 2, 8500, dtype=torch.float64)
    peaks = torch.randint(0, 8500, (20, 2, 60), generator=generator)
    intensity.scatter_(2, peaks, 100 * torch.rand(20, 2, 60, generator=generator, dtype=torch.float64))
    for batch in intensity:
        labels = {t: torch.randint(0, N_CLASSES[t], (2,), generator=generator) for t in TASKS}
        want = published_step(models, theirs, batch, labels)
        ours.zero_grad()
        got = balanced_step(model, batch, labels, balance)
        ours.step()
        want = torch.tensor([want[t] for t in TASKS], dtype=torch.float64)
        torch.testing.assert_close(got.losses, want, rtol=1e-6, atol=0)
