"""One update of a model's weights: balanced gradients, clipping, optimiser; on a GPU replayed as a CUDA graph.

Launching a step's 400 kernels takes longer than running them on a small model; a graph is one launch. Not for task
weights (`balance.py`), schedules, averages or batches (`trainer.py`, `batches.py`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from xrdfast.models import SymmetryModel
from xrdfast.training.balance import Balance, ExtraLosses, StepResult, balanced_step

_WARM_UP = 3  # steps before a capture, in which libraries make their workspaces


class TrainingStep:
    """The update of one step, on batches of one size.

    Args:
        model: in train mode.
        parameters: all that is trained; those of two dimensions or more decay.
        balance: of the tasks.
        weight_decay, betas: of AdamW.
        label_smoothing, clip_norm: as in `TrainConfig`.
        bf16: matrix products under autocast.
        extra: losses of distillation.
        offsets: of the logits, by task.
        graphed: replay a CUDA graph after the first steps. For models whose step never waits for the device, in one
            process, without `extra`.
    """

    def __init__(
        self,
        model: SymmetryModel,
        parameters: Sequence[nn.Parameter],
        balance: Balance,
        *,
        weight_decay: float,
        betas: tuple[float, float],
        label_smoothing: float,
        clip_norm: float,
        bf16: bool,
        extra: ExtraLosses | None,
        offsets: Mapping[str, Tensor] | None,
        graphed: bool,
    ) -> None:
        device = parameters[0].device
        # Matrices decay; biases, norms and scales do not. In a graph the rate is read from the device.
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=torch.zeros((), device=device) if graphed else 0.0,
            betas=betas,
            fused=True,
            capturable=graphed,
        )
        self._model, self._parameters, self._balance = model, parameters, balance
        self._label_smoothing, self._clip_norm = label_smoothing, clip_norm or math.inf
        self._device_type, self._bf16 = device.type, bf16
        self._extra, self._offsets = extra, offsets
        self._graphed, self._warmed = graphed, 0
        self._stream = torch.cuda.Stream(device) if graphed else None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self, intensity: Tensor, labels: Mapping[str, Tensor], learning_rate: Callable[[], float]
    ) -> StepResult:
        """One update.

        Args:
            intensity: (n_patterns, 8500), 0 to 100.
            labels: for each task (n_patterns,) int64.
            learning_rate: called when the gradients are there, or, in a graph, before; it may average them over
                processes.

        Returns:
            Losses, weights, and whether all was finite (else nothing was updated). A graph's result is overwritten by
            the next step.
        """
        if not self._graphed:
            return self._update(intensity, labels, learning_rate)
        if self._warmed < _WARM_UP:
            self._warmed += 1
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = self._update(intensity, labels, learning_rate)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize(intensity.device)  # what the stream used may go back to others' memory
            return result
        if self._graph is None:
            self._capture(intensity, labels)
        self._intensity.copy_(intensity)
        for task, rows in labels.items():
            self._labels[task].copy_(rows)
        self._set_rate(learning_rate())
        self._graph.replay()
        return self._result

    def _capture(self, intensity: Tensor, labels: Mapping[str, Tensor]) -> None:
        self._intensity = intensity.clone()
        self._labels = {task: rows.clone() for task, rows in labels.items()}
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # Other threads draw batches meanwhile, which is none of this capture's business.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._result = self._update(self._intensity, self._labels, None)
        self._graph = graph

    def _update(
        self,
        intensity: Tensor,
        labels: Mapping[str, Tensor],
        learning_rate: Callable[[], float] | None,
    ) -> StepResult:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self._device_type, self._bf16):
            result = balanced_step(
                self._model,
                intensity,
                labels,
                self._balance,
                self._label_smoothing,
                self._extra,
                self._offsets,
            )
        if learning_rate is not None:
            self._set_rate(learning_rate())
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        finite = result.finite & norm.isfinite()
        # The fused kernel skips the update where this is 1, without the host having to know.
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        return result._replace(finite=finite)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if self._graphed:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def autocast(device_type: str, bf16: bool) -> contextlib.AbstractContextManager:
    """Matrix products in bfloat16, or everything as it is."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=bf16)
