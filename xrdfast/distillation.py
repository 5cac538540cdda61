"""Self-distillation for any PyTorch classifier: reverse guidance (DRG) and ranked-output regularisation (DSR).

`SelfDistillation(model, stage=...)` wraps a classifier of one or several heads; `DSRLoss` and `DRGLoss` serve alone.
Nothing here touches the wrapped model's weights or names. Not for the weighing of tasks (`xrdfast.training.balance`).

Source: Tang et al., "Lightweight Self-Knowledge Distillation with Multi-source Information Fusion", arXiv:2305.09183.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xrdfast.ops.dsr_loss import dsr_loss

Logits = Tensor | Mapping[str, Tensor] | Sequence[Tensor]  # of one head, or of several


def softened_divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(sg(teacher) / T) || softmax(logits / T)), the mean over patterns.

    Args:
        logits: (n_patterns, n_classes).
        teacher_logits: the same shape; no gradient reaches them. Log-probabilities serve as well.
        temperature: T > 0.

    Returns:
        () of the logits' dtype, at least float32.

    Raises:
        ValueError: shapes that differ.

    Source:
        Hinton et al., arXiv:1503.02531, section 2, for the factor T^2, which keeps gradients of one size.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"softened_divergence: teacher_logits must be {tuple(logits.shape)} as logits, "
            f"got {tuple(teacher_logits.shape)}"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    student = F.log_softmax(logits.to(dtype) / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


class DSRLoss(nn.Module):
    """Ranked-output regularisation: beta T^2 KL(softmax(sg(s_prev) / T) || softmax(s / T)), s the sorted logits.

    s_prev are the ranked logits of the mini-batch before, row by row, with no labels: how sure the network is of its
    first, second, third ... choice should not jump from batch to batch.

    The memory of the last batch is a buffer, `previous`: it is saved and restored with the state, and each process of
    a distributed run keeps its own. Of two batches of different lengths the first rows are compared, as many as the
    shorter one has; the memory then holds the newer batch. The first batch after `forget` costs nothing.

    Args:
        temperature: T > 0.
        weight: beta >= 0.

    Raises:
        ValueError: numbers outside these ranges.

    Note:
        In evaluation mode it returns 0 and remembers nothing.

    Example:
        >>> dsr = DSRLoss()
        >>> [round(float(dsr(torch.tensor([x]))), 3) for x in ([1.0, 2.0], [2.0, 1.0], [5.0, 1.0])]
        [0.0, 0.0, 1.051]
    """

    previous: Tensor

    def __init__(self, temperature: float = 4.0, weight: float = 1.0) -> None:
        super().__init__()
        self.temperature, self.weight = _checked("DSRLoss", temperature, weight)
        self.register_buffer("previous", torch.empty(0, 0))

    def forget(self) -> None:
        """Empties the memory; call it at the start of an epoch."""
        self.previous = self.previous.new_empty(0, 0)

    def forward(self, logits: Logits) -> Tensor:
        """The loss of each head, and the memory of this batch.

        Args:
            logits: (n_patterns, n_classes) of one head, or several such, as a mapping or sequence; all heads take
                one launch.

        Returns:
            () for one head given as a tensor, else (n_heads,), mean over the rows compared.

        Raises:
            ValueError: heads of other widths than in the batch before.
        """
        heads = [logits] if isinstance(logits, Tensor) else list(_by_name(logits).values())
        widths = [head.shape[1] for head in heads]
        joined = heads[0] if len(heads) == 1 else torch.cat(heads, dim=1)
        loss = joined.new_zeros(len(heads), dtype=torch.promote_types(joined.dtype, torch.float32))
        if self.training:
            if self.previous.numel() and self.previous.shape[1] != joined.shape[1]:
                raise ValueError(
                    f"DSRLoss: logits must have {self.previous.shape[1]} classes as the batch before, "
                    f"got {joined.shape[1]}; call forget() between models"
                )
            offset = [0, *accumulate(widths)]
            n_common = min(len(joined), len(self.previous))
            settings = {"temperature": self.temperature, "class_offset": offset}
            if n_common:
                row_losses, ranked = dsr_loss(
                    joined[:n_common], self.previous[:n_common].to(joined), **settings
                )
                loss = self.weight * row_losses.mean(dim=0)
            if n_common < len(joined):  # rows without a partner are only ranked
                rest = dsr_loss(joined[n_common:].detach(), None, **settings)[1]
                ranked = torch.cat([ranked, rest]) if n_common else rest
            self.previous = ranked if len(joined) else joined.detach()
        return loss[0] if isinstance(logits, Tensor) else loss

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "previous")
        if saved is not None and saved.ndim == 2:  # the memory has the shape of the last batch
            self.previous = self.previous.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DRGLoss(nn.Module):
    """Reverse guidance: CE(z_aux, y) + alpha T^2 KL(softmax(sg(z_aux) / T) || softmax(z / T)).

    The shallow auxiliary classifier learns the labels, and its softened answer teaches the deep one.

    Args:
        temperature: T > 0.
        weight: alpha >= 0.

    Raises:
        ValueError: numbers outside these ranges.
    """

    def __init__(self, temperature: float = 4.0, weight: float = 0.2) -> None:
        super().__init__()
        self.temperature, self.weight = _checked("DRGLoss", temperature, weight)

    def guidance(self, logits: Tensor, auxiliary_logits: Tensor) -> Tensor:
        """The KL term alone: a loss of the deep classifier, (n_patterns, n_classes) each."""
        return self.weight * softened_divergence(logits, auxiliary_logits, self.temperature)

    def forward(self, logits: Tensor, auxiliary_logits: Tensor, labels: Tensor) -> Tensor:
        """Both terms.

        Args:
            logits, auxiliary_logits: (n_patterns, n_classes).
            labels: (n_patterns,) int64.
        """
        return F.cross_entropy(auxiliary_logits, labels) + self.guidance(logits, auxiliary_logits)


class _Pointwise(nn.Conv2d):
    """1x1, no bias; where a map has its channels in rows, one matrix product: up to a third faster on a CPU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        if rows.is_contiguous():
            return F.linear(rows, self.weight.flatten(1)).movedim(-1, 1)
        return super().forward(x)


class _Separable(nn.Sequential):
    """Depthwise 3 of stride 2, 1x1, batch norm, ReLU; depthwise 3, 1x1, batch norm, ReLU. No biases.

    A map of one dimension is one of two with height 1: laid out by channel, the 2-D convolutions of the CPU take two
    thirds of the time of the 1-D ones.
    """

    def __init__(self, in_channels: int, out_channels: int, n_dims: int) -> None:
        conv, norm = nn.Conv2d, nn.BatchNorm2d
        w, v = in_channels, out_channels
        kernel, stride, padding = ((1, 3), (1, 2), (0, 1)) if n_dims == 1 else (3, 2, 1)
        super().__init__(
            conv(w, w, kernel, stride=stride, padding=padding, groups=w, bias=False),
            _Pointwise(w, w),
            norm(w),
            nn.ReLU(inplace=True),
            conv(w, w, kernel, padding=padding, groups=w, bias=False),
            _Pointwise(w, v),
            norm(v),
            nn.ReLU(inplace=True),
        )


class AuxiliaryClassifier(nn.Module):
    """A light classifier on an early map x of c channels, one trunk for all heads.

    gate = sigmoid(upsample(ReLU(BN(S(c -> c)(x))))) · x, then S(c -> 2c), S(2c -> 4c), the mean over positions, and
    one linear map a head; S is a pair of separable convolutions that halves the length, the upsampling is linear with
    corners aligned.

    Args:
        channels: c.
        classes: number of classes of each head.
        n_dims: 1 for maps (n, c, length), 2 for (n, c, height, width).
        channels_last: the map has its channels in the last place.
    """

    def __init__(
        self, channels: int, classes: Mapping[str, int], n_dims: int, *, channels_last: bool = False
    ) -> None:
        super().__init__()
        self.n_dims, self.channels_last = n_dims, channels_last
        self.gate = nn.Sequential(
            _Separable(channels, channels, n_dims), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.trunk = nn.Sequential(
            _Separable(channels, 2 * channels, n_dims), _Separable(2 * channels, 4 * channels, n_dims)
        )
        self.heads = nn.ModuleDict({head: nn.Linear(4 * channels, n) for head, n in classes.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of every head from a map (n_patterns, channels, ...), or (n_patterns, ..., channels)."""
        if self.channels_last:
            x = x.movedim(-1, 1)
        if self.n_dims == 1:
            x = x.unsqueeze(2)
        gate = F.interpolate(self.gate(x), size=x.shape[2:], mode="bilinear", align_corners=True)
        rows = self.trunk(gate.sigmoid() * x).flatten(2).transpose(1, 2)  # whose mean sends back rows, too
        features = rows.mean(dim=1)
        return {head: linear(features) for head, linear in self.heads.items()}


class DistillationTerms(NamedTuple):
    """What distillation adds to the cross-entropies of the deep classifier."""

    guidance: Tensor  # (n_heads,) KL terms on each head's logits, DRG's and DSR's
    auxiliary: Tensor  # () cross-entropy of the auxiliary classifier, summed over heads


class SelfDistillation(nn.Module):
    """Wraps a classifier for training with DRG, DSR or both; the classifier itself stays as it is.

    Args:
        model: gives (n_patterns, n_classes) logits, or several such by name (a mapping or a NamedTuple).
        stage: name of the submodule whose output the auxiliary classifier reads (`model.named_modules()`); needed
            for DRG alone.
        example: an input of the model, to find the shape of that output; a few patterns are enough.
        drg, dsr: None for none.
        channels_last: the stage's output has its channels in the last place.

    Raises:
        ValueError: an unknown stage, one that yields no map of 3 or 4 dimensions, no logits, or neither loss.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 5))
        >>> wrapped = SelfDistillation(net, stage="0", example=torch.zeros(2, 1, 50), drg=DRGLoss(), dsr=DSRLoss())
        >>> loss = wrapped.loss(wrapped(torch.zeros(2, 1, 50)), torch.tensor([0, 4]))
        >>> wrapped.detach() is net
        True

    Note:
        `parameters()` holds the auxiliary classifier's too. Call `new_epoch` before every epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        example: Tensor,
        stage: str = "",
        drg: DRGLoss | None = None,
        dsr: DSRLoss | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if drg is None and dsr is None:
            raise ValueError("SelfDistillation: drg, dsr must be at least one, got neither")
        self.model, self.drg, self.dsr = model, drg, dsr
        self._map: Tensor | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        module = None
        if drg is not None:
            modules = dict(model.named_modules())
            if not stage or stage not in modules:
                raise ValueError(
                    f"SelfDistillation: stage must name a submodule, as {', '.join(list(modules)[1:4])}, got {stage!r}"
                )
            module = modules[stage]
            self._hook = module.register_forward_hook(self._keep)
        try:
            classes = self._classes(example)
            self.auxiliary = None
            if drg is not None:
                seen = self._map
                if not isinstance(seen, Tensor) or seen.ndim not in (3, 4):
                    got = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
                    raise ValueError(
                        f"SelfDistillation: stage must yield a tensor of 3 or 4 dimensions, {stage} gave {got}"
                    )
                channels = seen.shape[-1 if channels_last else 1]
                self.auxiliary = AuxiliaryClassifier(
                    channels, classes, seen.ndim - 2, channels_last=channels_last
                ).to(example.device)
        except ValueError:
            self.detach()
            raise
        finally:
            self._map = None

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._map = output

    def _classes(self, example: Tensor) -> dict[str, int]:
        """Classes by head, from one forward that leaves no trace."""
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        with torch.no_grad():
            heads = _by_name(self.model(example))
        for module, mode in training.items():
            module.training = mode
        for name, logits in heads.items():
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                raise ValueError(
                    f"SelfDistillation: model must give (n_patterns, n_classes) logits, {name} is none"
                )
        return {name: logits.shape[1] for name, logits in heads.items()}

    def forward(self, *inputs: Any) -> Any:
        """The model's own output; the stage's map is kept for the loss."""
        return self.model(*inputs)

    def new_epoch(self) -> None:
        """Forgets the last batch of the epoch before."""
        if self.dsr is not None:
            self.dsr.forget()

    def terms(self, output: Logits, labels: Tensor | Mapping[str, Tensor]) -> DistillationTerms:
        """What DRG and DSR add for the batch of the last forward.

        Args:
            output: the model's logits of that batch.
            labels: (n_patterns,) int64, by head where there are several.
        """
        heads, targets = _by_name(output), _by_name(labels)
        first = next(iter(heads.values()))
        guidance = first.new_zeros(len(heads), dtype=torch.promote_types(first.dtype, torch.float32))
        auxiliary_loss = guidance.new_zeros(())
        if self.dsr is not None:
            guidance = guidance + self.dsr(heads)
        if self.drg is not None:
            auxiliary = self.auxiliary(self._taken_map())
            guidance = guidance + torch.stack(
                [self.drg.guidance(logits, auxiliary[name]) for name, logits in heads.items()]
            )
            auxiliary_loss = sum(F.cross_entropy(auxiliary[name], targets[name]) for name in heads)
        return DistillationTerms(guidance, auxiliary_loss)

    def loss(
        self, output: Logits, labels: Tensor | Mapping[str, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """The whole objective: cross-entropies of all heads, DRG and DSR."""
        heads, targets = _by_name(output), _by_name(labels)
        own = sum(
            F.cross_entropy(logits, targets[name], label_smoothing=label_smoothing)
            for name, logits in heads.items()
        )
        terms = self.terms(output, labels)
        return own + terms.guidance.sum() + terms.auxiliary

    def detach(self) -> nn.Module:
        """Gives the model back with nothing of the distillation on it."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        return self.model

    def _taken_map(self) -> Tensor:
        if self._map is None:
            raise ValueError(
                "SelfDistillation: the model must have run forward since the last loss, it has not"
            )
        taken, self._map = self._map, None
        return taken


def _by_name(values: Logits) -> dict[str, Tensor]:
    """Heads by name; a lone one is called "logits". Heads that are None are left out."""
    if isinstance(values, Mapping):
        named = dict(values)
    elif hasattr(values, "_asdict"):
        named = values._asdict()
    elif isinstance(values, Tensor):
        named = {"logits": values}
    else:
        named = {str(i): value for i, value in enumerate(values)}
    return {name: value for name, value in named.items() if value is not None}


def _checked(op: str, temperature: float, weight: float) -> tuple[float, float]:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{op}: temperature must be finite and > 0, got {temperature}")
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{op}: weight must be finite and >= 0, got {weight}")
    return temperature, weight
