"""Presets and stores small enough to train in a test: three cubic groups told apart by their absences."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xrdfast.data.store import SimulationConfig, StoreWriter
from xrdfast.data.structures import PackedStructures
from xrdfast.models import PRESETS, ModelConfig
from xrdfast.ops.simulate import Families
from xrdfast.symmetry import TASKS
from xrdfast.training.config import RunConfig, config_from_dict

# hkl conditions of Pm-3m, Im-3m, Fm-3m
GROUPS: dict[int, Callable[[int, int, int], bool]] = {
    221: lambda h, k, ell: True,
    229: lambda h, k, ell: (h + k + ell) % 2 == 0,
    225: lambda h, k, ell: h % 2 == k % 2 == ell % 2,
}


class TinyEncoder(nn.Module):
    """Mean logarithms of 50 points at a time, and one layer. Optionally batch norm and dropout."""

    def __init__(self, noisy: bool) -> None:
        super().__init__()
        self.n_features = 24
        self.norm = nn.BatchNorm1d(170) if noisy else nn.LayerNorm(170)
        self.dropout = nn.Dropout(0.2 if noisy else 0.0)
        self.map = nn.Unflatten(1, (5, 34))  # what an auxiliary classifier may read
        self.layer = nn.Linear(170, self.n_features)

    def forward(self, intensity: Tensor) -> Tensor:
        pooled = torch.log1p(intensity).unflatten(1, (170, 50)).sum(2)
        return torch.relu(self.layer(self.dropout(self.map(self.norm(pooled)).flatten(1))))


def presets() -> dict[str, ModelConfig]:
    """`tiny` (no randomness), `tiny_noisy` (batch norm, dropout), `tiny_single` (space groups alone)."""
    every = dict.fromkeys(TASKS, ())
    return {
        "tiny": ModelConfig("tiny", lambda: TinyEncoder(False), every, "for tests", "encoder.map"),
        "tiny_noisy": ModelConfig("tiny_noisy", lambda: TinyEncoder(True), every, "for tests", "encoder.map"),
        "tiny_single": ModelConfig(
            "tiny_single", lambda: TinyEncoder(False), {"space_group": ()}, "for tests"
        ),
    }


def register_presets() -> None:
    """Makes the tiny presets known in this process (subprocesses of tests)."""
    PRESETS.update(presets())


def write_cubic_store(path: Path, n: int = 60) -> None:
    """Cubic patterns, n of them: folds 0..9 in turn, groups in turn, random cell edges and |F|^2."""
    generator = torch.Generator().manual_seed(n)
    simulation = SimulationConfig()
    edges = (3.0 + 2.5 * torch.rand(n, generator=generator, dtype=torch.float64)).tolist()
    numbers = [list(GROUPS)[i % 3] for i in range(n)]
    hkl: list[tuple[int, int, int]] = []
    multiplicity: list[int] = []
    offset = [0]
    for edge, number in zip(edges, numbers, strict=True):
        reach = (2.0 * edge / simulation.wavelength) ** 2
        for h in range(8):
            for k, ell in itertools.combinations_with_replacement(range(h, -1, -1), 2):
                if 0 < h * h + k * k + ell * ell < reach and GROUPS[number](h, k, ell):
                    hkl.append((h, k, ell))
                    signs = 2 ** sum(index > 0 for index in (h, k, ell))
                    multiplicity.append(signs * len(set(itertools.permutations((h, k, ell)))))
        offset.append(len(hkl))
    families = Families(
        offset=torch.tensor(offset),
        hkl=torch.tensor(hkl, dtype=torch.int16),
        multiplicity=torch.tensor(multiplicity, dtype=torch.int16),
        f_squared=50.0 + 100.0 * torch.rand(len(hkl), generator=generator),
        status=torch.zeros(n, dtype=torch.int32),
    )
    label = torch.tensor(numbers, dtype=torch.int16)
    structures = PackedStructures(
        offset=torch.arange(n + 1),
        lattice=torch.diag_embed(torch.tensor(edges, dtype=torch.float64)[:, None].expand(n, 3)).contiguous(),
        atomic_number=torch.full((n,), 29, dtype=torch.uint8),
        fractional=torch.zeros(n, 3, dtype=torch.float64),
        occupancy=torch.ones(n, dtype=torch.float64),
        b_iso=torch.zeros(n, dtype=torch.float64),
        ids=[f"cubic/{i}" for i in range(n)],
        formula=[f"X{i}" for i in range(n)],
        family=[""] * n,
        fold=(torch.arange(n) // 3 % 10).to(torch.int8),
        space_group_published=label,
        space_group_001=label,
        space_group_01=label,
        rotation_offset=torch.arange(n + 1),
        rotations=torch.eye(3, dtype=torch.int8).repeat(n, 1, 1),
        to_standard=torch.eye(3, dtype=torch.float64).repeat(n, 1, 1),
    )
    with StoreWriter(path, simulation) as writer:
        writer.append(structures, families)


def tiny_config(store: Path, preset: str = "tiny", **train: Any) -> RunConfig:
    """Two epochs of three steps on the 54 patterns outside fold 0; keywords go to [train]."""
    settings = {
        "epochs": 2,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "log_steps": 1,
        "ema_decay": 0.9,
        "device": "cpu",
    }
    return config_from_dict(
        {
            "model": {"preset": preset},
            "data": {"stores": [str(store)]},
            "augment": {"strain": 0.004},
            "train": settings | train,
        }
    )


def with_augment(config: RunConfig, **augment: float) -> RunConfig:
    """The same run with other augmentation."""
    return dataclasses.replace(config, augment=dataclasses.replace(config.augment, **augment))
