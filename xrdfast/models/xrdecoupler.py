"""A symmetry model: one encoder shared by up to four heads, one a task, with named outputs.

For the model object that training, evaluation and prediction share, whatever the encoder. Not for encoders
(`encoder.py`, `small.py`, `plain_cnn.py`) and not for choosing one by name (`presets.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from xrdfast.models.encoder import N_POINTS
from xrdfast.symmetry import N_CLASSES, TASKS


class SymmetryLogits(NamedTuple):
    """Logits of the four tasks, each (n_patterns, n_classes); None where the model has no such head."""

    space_group: Tensor | None  # (n_patterns, 230), space_group_index
    crystal_system: Tensor | None  # (n_patterns, 7)
    lattice_centering: Tensor | None  # (n_patterns, 6), P C R F I A
    point_group: Tensor | None  # (n_patterns, 32)


class SymmetryModel(nn.Module):
    """An encoder and its heads.

    Args:
        encoder: maps (n_patterns, 8500) intensities to (n_patterns, encoder.n_features).
        head_widths: for each task, the hidden widths of its head. A head is a chain of linear maps with
            nothing between, as published; an empty tuple is one plain linear map.
        preset: name of the preset that this model was built from; checkpoints carry it.

    Raises:
        ValueError: an unknown task, or none.
    """

    def __init__(self, encoder: nn.Module, head_widths: Mapping[str, tuple[int, ...]], preset: str) -> None:
        super().__init__()
        unknown = set(head_widths) - set(TASKS)
        if unknown or not head_widths:
            raise ValueError(
                f"SymmetryModel: head_widths must name tasks of {TASKS}, got {sorted(head_widths)}"
            )
        self.preset = preset
        self.encoder = encoder
        self.heads = nn.ModuleDict(
            {
                t: _linear_chain((encoder.n_features, *head_widths[t], N_CLASSES[t]))
                for t in TASKS
                if t in head_widths
            }
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that this model answers, in the order of `xrdfast.symmetry.TASKS`."""
        return tuple(self.heads)

    def encode(self, intensity: Tensor) -> Tensor:
        """Features shared by the heads.

        Args:
            intensity: (n_patterns, 8500), 0 to 100, on the published 2θ grid.

        Returns:
            (n_patterns, n_features).

        Raises:
            ValueError: another shape.
        """
        if intensity.ndim != 2 or intensity.shape[1] != N_POINTS:
            raise ValueError(
                f"encode: intensity must be (n_patterns, {N_POINTS}), got {tuple(intensity.shape)}"
            )
        return self.encoder(intensity)

    def classify(self, features: Tensor) -> SymmetryLogits:
        """Logits of every task from features (n_patterns, n_features)."""
        return SymmetryLogits(*(self.heads[task](features) if task in self.heads else None for task in TASKS))

    def forward(self, intensity: Tensor) -> SymmetryLogits:
        """Logits of every task from intensity (n_patterns, 8500), 0 to 100."""
        return self.classify(self.encode(intensity))


def _linear_chain(widths: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(widths)))
