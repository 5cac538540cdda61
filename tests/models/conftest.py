"""Fixtures of the model tests: the oracle's modules and our `paper` model with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.models.published_reference import published_models
from xrdfast.models import SymmetryModel, import_published_checkpoint


def settle(models: dict[str, nn.Module], seed: int) -> None:
    """Gives batch norms the statistics and scales of a trained model, so that none is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in (m for part in models.values() for m in part.modules()):
        if isinstance(module, nn.BatchNorm1d):
            with torch.no_grad():
                module.running_mean.uniform_(-0.2, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.2, 0.2, generator=generator)


@pytest.fixture(scope="session")
def patterns() -> Tensor:
    """(4, 8500) float64: sparse sticks, a pattern without any line, a dense one, and lines at both ends."""
    generator = torch.Generator().manual_seed(5)
    intensity = torch.zeros(4, 8500, dtype=torch.float64)
    intensity[0, torch.randint(0, 8500, (80,), generator=generator)] = (
        100 * torch.rand(80, generator=generator).double()
    )
    intensity[2] = 100 * torch.rand(8500, generator=generator).double()
    intensity[3, [0, 1, 9, 10, 4000, 8499]] = torch.tensor([100.0, 3.0, 1e-6, 1e-4, 50.0, 7.0]).double()
    return intensity


@pytest.fixture(scope="session")
def paper_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, nn.Module], SymmetryModel]:
    """The oracle's five modules and our model, dropout 0, float64; our weights came through the importer."""
    torch.manual_seed(1)
    models = published_models(dropout=0.0)
    settle(models, seed=2)
    path: Path = tmp_path_factory.mktemp("published") / "states.pth"
    torch.save({name: module.state_dict() for name, module in models.items()}, path)
    torch.set_default_dtype(torch.float64)  # so that fixed buffers are not rounded to float32 first
    try:
        own = import_published_checkpoint(path)
    finally:
        torch.set_default_dtype(torch.float32)
    for module in own.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return {name: module.double() for name, module in models.items()}, own
