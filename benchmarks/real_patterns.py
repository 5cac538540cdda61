"""Batches of real stick patterns for the model benchmarks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from xrdfast.bragg import Grid
from xrdfast.data.structures import load_structures
from xrdfast.ops.render import sticks_to_grid
from xrdfast.ops.simulate import simulate_lines


def stick_batch(shared_data: Path, name: str, n_patterns: int = 64) -> Tensor:
    """(n_patterns, 8500) float32 sticks of structures taken evenly from a set."""
    structures, _ = load_structures(shared_data / f"{name}.npz")
    chosen = torch.linspace(0, len(structures) - 1, n_patterns).long()
    lines = simulate_lines(structures[chosen])
    return sticks_to_grid(lines.offset, lines.two_theta, lines.intensity, Grid())
