"""A whole training step as a CUDA graph: one for batches whose packed rows find room, a dense one for the others.

For benchmarks and tests on a GPU; the trainer's own step waits once for the count of rows instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from xrdfast.models import SymmetryModel
from xrdfast.training.balance import Balance, StepResult, balanced_step


class GraphedStep:
    """Forward, balance, backward and update of the `paper` preset, replayed on batches of one size.

    Args:
        model: in train mode, on a GPU.
        optimizer: of its parameters, fused and capturable.
        balance: of its tasks.
        intensity: (n_patterns, 8500), an example.
        labels: of the example, for each task (n_patterns,).
        room: rows of the first blocks (`xrdfast.ops.peak_plan.plan_rows`).
    """

    def __init__(
        self,
        model: SymmetryModel,
        optimizer: Optimizer,
        balance: Balance,
        intensity: Tensor,
        labels: Mapping[str, Tensor],
        room: Sequence[int],
    ) -> None:
        self.model, self.optimizer, self.balance = model, optimizer, balance
        self.intensity = intensity.clone()
        self.labels = {task: rows.clone() for task, rows in labels.items()}
        self._branch, self._room = model.encoder.local_branch, list(room)
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, StepResult]] = {}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the libraries make their workspaces before a capture
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        for packed in (True, False):
            self._branch.room = self._room if packed else None
            graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                self._graphs[packed] = graph, self._step()
        self._branch.room = None

    def __call__(self, intensity: Tensor, labels: Mapping[str, Tensor]) -> tuple[StepResult, bool]:
        """One step; its result, which the next step overwrites, and whether rows were packed."""
        self.intensity.copy_(intensity)
        for task, rows in labels.items():
            self.labels[task].copy_(rows)
        self._branch.room = self._room
        packed = not bool(
            self._branch.plan(self.intensity).overflow
        )  # waits for the plan, and for nothing else
        self._branch.room = None
        graph, result = self._graphs[packed]
        graph.replay()
        return result, packed

    def _step(self) -> StepResult:
        self.optimizer.zero_grad(set_to_none=True)
        result = balanced_step(self.model, self.intensity, self.labels, self.balance)
        self.optimizer.found_inf = (~result.finite).float()
        self.optimizer.step()
        return result
