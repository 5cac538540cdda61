"""Task balancing: how much each task's gradient weighs in the shared encoder, and the step that applies it.

For one training step up to the gradients: one encoder forward, one gradient of every task at the features,
the weights, one encoder backward. Everything stays on the device, without waiting for it. Not for the
optimiser, clipping, schedules or logs (`trainer.py`).

Sources: Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018 (MGDA-UB:
gradients at the shared features are enough, and the "loss+" normaliser of its code); Yu et al., AAAI-26
(arXiv:2511.06976); Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
Beyond", NeurIPS 2022 (mini-batch MGDA is biased; smoothed weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from xrdfast.models import SymmetryModel
from xrdfast.symmetry import class_index

METHODS = ("mgda", "mgda_ema", "sum")
MAX_TASKS = 5  # four tasks, and distillation where it is an objective of its own
DEAD_TASK = 1e-12  # a task with loss × gradient norm below this leaves the hull
EMA_DECAY = 0.9


class ExtraLosses(Protocol):
    """What a step may add to the cross-entropies (`xrdfast.training.distill`)."""

    own_objective: bool  # the guidance is an objective of its own, after the tasks

    def modules(self) -> list[nn.Module]:
        """Modules beside the model that are trained in the step."""

    def terms(
        self, intensity: Tensor, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Guidance (T,), losses of each task's logits; and a loss () of the encoder outside the balance."""


class StepResult(NamedTuple):
    """What one balanced step leaves beside the gradients, for the T objectives in their order."""

    losses: Tensor  # (T,) of each task, over all processes: cross-entropy and what is added to it
    weights: Tensor  # (T,) weights of the tasks in the encoder's gradient
    finite: Tensor  # () bool; False: a loss or gradient was not finite, and all gradients are zero


def min_norm_weights(gram: Tensor) -> Tensor:
    """Weights of the minimum-norm point of a convex hull: argmin over the simplex of αᵀ G α.

    The minimum lies inside one of the 2^T − 1 faces of the simplex (15 for four vectors). On a face S, the
    minimum under Σ α = 1 alone solves [[G_S, 1], [1ᵀ, 0]] (α_S, λ) = (0, 1); all faces take one batched
    solve. Each solution, with negative parts cut off, is a point u of the hull, and the one with the
    smallest duality gap ‖u‖² − min_t u·g_t is taken: 0 at the minimum, and sharper than ‖u‖² where several
    points are nearly as short. An optimal face with affinely independent vectors exists, and its system is
    regular; whatever the singular system of another face returns is judged by its gap like the rest.

    Args:
        gram: (..., T, T) inner products of T vectors, 1 <= T <= 5, finite. A vector of zeros takes all the
            weight.

    Returns:
        (..., T) float64, not negative, sum 1.

    Raises:
        ValueError: another shape.

    Note:
        No host synchronisation and no iteration; leading dimensions are independent problems.
    """
    n_tasks = _check_gram("min_norm_weights", gram)
    live = torch.ones(gram.shape[:-1], dtype=torch.bool, device=gram.device)
    return _min_norm_of_live(gram.double(), live, n_tasks)


def mgda_weights(losses: Tensor, gram: Tensor) -> Tensor:
    """MGDA weights of the raw task gradients, with the published "loss+" normaliser.

    With c_t = L_t ‖g_t‖ and α the minimum-norm weights of the g_t / c_t, task t weighs w_t = (α_t / c_t) /
    Σ_s (α_s / c_s). The division by c_t is what the published loop leaves out: there, weights of normalised
    gradients are applied to un-normalised losses, and some task's loss can rise.

    Args:
        losses: (..., T) losses, not negative.
        gram: (..., T, T) inner products of the raw gradients over the whole batch.

    Returns:
        (..., T) float64, sum 1. A task with c_t < 1e-12 weighs 0; where no task is left, or where any number
        is not finite, all weights are 0.

    Raises:
        ValueError: shapes that do not agree, or more than five tasks.
    """
    n_tasks = _check_gram("mgda_weights", gram)
    if losses.shape != gram.shape[:-1]:
        raise ValueError(
            f"mgda_weights: losses must be {tuple(gram.shape[:-1])} as gram, got {tuple(losses.shape)}"
        )
    finite = _all_finite(losses, gram)
    losses = torch.where(finite[..., None], losses.double(), 0.0)
    gram = torch.where(finite[..., None, None], gram.double(), 0.0)
    normaliser = losses * gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    live = normaliser >= DEAD_TASK
    scale = torch.where(live, 1.0 / normaliser, 0.0)
    alpha = _min_norm_of_live(gram * scale[..., :, None] * scale[..., None, :], live, n_tasks)
    weights = alpha * scale
    total = weights.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weights / total, 0.0)


class Balance:
    """Chooses the task weights of each step, and keeps what must survive between steps.

    Args:
        method: `mgda` (exact min-norm weights of this batch), `mgda_ema` (their exponential mean over steps,
            started without bias), `sum` (every task weighs 1).
        n_tasks: number of objectives, 1 to 5.
        device: where the weights are computed.

    Raises:
        ValueError: an unknown method or number of tasks.
    """

    def __init__(self, method: str, n_tasks: int, device: torch.device | str = "cpu") -> None:
        if method not in METHODS:
            raise ValueError(f"Balance: method must be one of {', '.join(METHODS)}, got {method!r}")
        if not 1 <= n_tasks <= MAX_TASKS:
            raise ValueError(f"Balance: n_tasks must be 1 to {MAX_TASKS}, got {n_tasks}")
        self.method = method
        self.n_tasks = n_tasks
        # Decayed sum of the weights and of the decays themselves; their quotient is the unbiased mean.
        self._decayed_weights = torch.zeros(n_tasks, dtype=torch.float64, device=device)
        self._decayed_count = torch.zeros((), dtype=torch.float64, device=device)

    def weigh(self, losses: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Weights for one step; advances the mean of `mgda_ema`.

        Args:
            losses: (T,) losses.
            gram: (T, T) inner products of the tasks' gradients at the features.

        Returns:
            weights (T,) float64, all 0 where a number is not finite; finite () bool.
        """
        finite = _all_finite(losses, gram)
        if self.method == "sum":
            return finite.double().expand(self.n_tasks), finite
        weights = mgda_weights(losses, gram)
        if self.method == "mgda":
            return weights, finite
        updates = finite & (weights.sum() > 0)
        decay = torch.where(updates, EMA_DECAY, 1.0)
        self._decayed_weights.mul_(decay).add_(
            (1.0 - decay) * weights
        )  # in place: a CUDA graph keeps the address
        self._decayed_count.mul_(decay).add_(1.0 - decay)
        return torch.where(updates, self._decayed_weights / self._decayed_count, 0.0), finite

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `load_state_dict` needs to continue bit for bit."""
        return {
            "decayed_weights": self._decayed_weights.clone(),
            "decayed_count": self._decayed_count.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: state of another number of tasks.
        """
        weights = state["decayed_weights"]
        want, got = tuple(self._decayed_weights.shape), tuple(weights.shape)
        if got != want:
            raise ValueError(f"Balance: decayed_weights must be {want}, got {got}")
        self._decayed_weights = weights.to(self._decayed_weights)
        self._decayed_count = state["decayed_count"].to(self._decayed_count)


def balanced_step(
    model: SymmetryModel,
    intensity: Tensor,
    labels: Mapping[str, Tensor],
    balance: Balance,
    label_smoothing: float = 0.0,
    extra: ExtraLosses | None = None,
    offsets: Mapping[str, Tensor] | None = None,
) -> StepResult:
    """Gradients of one step: a single encoder forward, balanced at the features.

    The encoder receives Σ w_t ∂L_t/∂features, and each head the unscaled gradient of its own loss. Gradients
    are added to the parameters' `.grad`, as backward does.

    What distillation adds to a task belongs to that task's loss, or is one more objective, as `extra` says; its
    auxiliary classifier does not pass through the features, so its loss reaches the encoder with weight 1.

    Args:
        model: in train mode.
        intensity: (n_patterns, 8500), 0 to 100.
        labels: for each of the model's tasks, (n_patterns,) int64 class indices.
        balance: for as many objectives as the model has tasks, and one more where `extra` is one of its own.
        label_smoothing: share of each label given to all classes alike.
        extra: losses beside the cross-entropies; None for none.
        offsets: for each task, (n_classes,) added to the logits inside its cross-entropy (`logit_offsets`); None for
            none. What `extra` reads stays as the model says it.

    Returns:
        Losses, weights and whether all was finite; all on the device.

    Raises:
        ValueError: labels of a task are missing, or another number of tasks.

    Note:
        Where a loss or a gradient at the features is not finite, every `.grad` becomes zero and the batch
        norms keep the running statistics they had; the caller skips its update on `finite` too (momentum
        would move the weights). With several processes, losses and Gram matrix are averaged over them (equal
        batch sizes), so that all take the same weights; averaging the parameters' gradients is the caller's.
    """
    tasks = model.tasks
    missing = [task for task in tasks if task not in labels]
    if missing:
        raise ValueError(
            f"balanced_step: labels must hold every task of the model, got none for {', '.join(missing)}"
        )
    own_objective = extra is not None and extra.own_objective
    n_objectives = len(tasks) + own_objective
    if balance.n_tasks != n_objectives:
        raise ValueError(f"balanced_step: balance must be for {n_objectives} tasks, got {balance.n_tasks}")
    modules = [model, *(extra.modules() if extra is not None else ())]
    statistics = [
        buffer
        for whole in modules
        for module in whole.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
        for buffer in (module.running_mean, module.running_var)
    ]
    before = [buffer.clone() for buffer in statistics]

    features = model.encode(intensity)
    # One copy of the features an objective, (T, n_patterns, n_features): a single backward gives every one's own
    # gradient there; float32 at least, under autocast too.
    dtype = torch.promote_types(features.dtype, torch.float32)
    copies = features.detach().to(dtype).repeat(n_objectives, 1, 1).requires_grad_()
    logits = {task: model.heads[task](copy).to(dtype) for task, copy in zip(tasks, copies, strict=False)}
    adjusted = logits if offsets is None else {task: logits[task] + offsets[task] for task in tasks}
    losses = torch.stack(
        [F.cross_entropy(adjusted[task], labels[task], label_smoothing=label_smoothing) for task in tasks]
    )
    beside = losses.new_zeros(())  # outside the balance
    if extra is not None:
        if own_objective:
            logits = {task: model.heads[task](copies[-1]).to(dtype) for task in tasks}
        guidance, beside = extra.terms(intensity, logits, labels)
        losses = torch.cat([losses, guidance.sum()[None]]) if own_objective else losses + guidance
    losses.sum().backward()
    gradients = copies.grad
    flat = gradients.flatten(1).double()
    packed = torch.cat([losses.detach(), beside.detach()[None].to(losses)])
    packed, gram = _mean_over_processes(packed, flat @ flat.T)
    losses = packed[:-1]
    weights, finite = balance.weigh(losses, gram)
    finite = finite & packed[-1].isfinite()

    combined = (weights.to(dtype)[:, None, None] * torch.where(finite, gradients, 0.0)).sum(dim=0)
    roots, upstream = [features], [combined.to(features)]
    if beside.requires_grad:
        roots, upstream = [features, beside], [*upstream, None]
    torch.autograd.backward(roots, upstream)
    for whole in modules:
        for parameter in whole.parameters():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~finite, 0.0)
    for buffer, old in zip(statistics, before, strict=True):
        buffer.copy_(torch.where(finite, buffer, old))
    return StepResult(losses, weights.to(losses), finite)


def logit_offsets(group_weight: Tensor, tau: float, tasks: Sequence[str]) -> dict[str, Tensor]:
    """What logit adjustment adds to the logits in training: tau ln pi of each class.

    With pi the share of a class among the patterns that training draws, the cross-entropy of f + tau ln pi makes the
    model's own f rank classes as if all were equally frequent (at tau = 1): rare ones are no longer held back.

    Args:
        group_weight: (230,) how often each space group is drawn, in any unit; groups that are never drawn count as
            the rarest one that is, so that their offset stays finite.
        tau: >= 0; 0 changes nothing.
        tasks: of `xrdfast.symmetry.TASKS`.

    Returns:
        For each task (n_classes,) float32.

    Note:
        The model's probabilities then belong to a world where all classes are equally frequent, and so do those of a
        calibration fitted afterwards, which has no term that depends on the class.

    Source:
        Menon et al., ICLR 2021 (arXiv:2007.07314), eq. 10.

    Example:
        >>> weight = torch.ones(230)
        >>> logit_offsets(weight, 1.0, ("crystal_system",))["crystal_system"].argmin()  # triclinic: 2 of 230
        tensor(0)
    """
    weight = group_weight.double()
    weight = torch.where(weight > 0, weight, weight[weight > 0].min())
    offsets = {}
    for task in tasks:
        classes = torch.tensor(class_index(task))
        share = weight.new_zeros(int(classes.max()) + 1).index_add(0, classes, weight / weight.sum())
        offsets[task] = (tau * share.log()).float()
    return offsets


def _min_norm_of_live(gram: Tensor, live: Tensor, n_tasks: int) -> Tensor:
    """Min-norm weights (..., T) of the vectors marked in live (..., T); all 0 where none is."""
    device = gram.device
    bits = torch.arange(1, 2**n_tasks, device=device)[:, None] >> torch.arange(n_tasks, device=device)
    member = ((bits & 1).bool() & live[..., None, :]).double()  # (..., faces, T)

    # Scaled so that the largest square norm is 1, which keeps the bordered systems well scaled.
    largest = torch.where(live, gram.diagonal(dim1=-2, dim2=-1), 0.0).amax(dim=-1)[..., None, None]
    gram = torch.where(largest > 0, gram / largest, 0.0)

    pairs = member[..., :, None] * member[..., None, :]
    system = gram.new_zeros(*member.shape[:-1], n_tasks + 1, n_tasks + 1)
    system[..., :n_tasks, :n_tasks] = gram[..., None, :, :] * pairs + torch.diag_embed(1.0 - member)
    system[..., :n_tasks, n_tasks] = member
    system[..., n_tasks, :n_tasks] = member
    target = torch.zeros(n_tasks + 1, 1, dtype=gram.dtype, device=device)
    target[n_tasks] = 1.0
    solution, _ = torch.linalg.solve_ex(system, target.expand(*system.shape[:-1], 1))

    candidate = solution[..., :n_tasks, 0].nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0) * member
    total = candidate.sum(dim=-1, keepdim=True)
    usable = (total > 0) & total.isfinite()
    candidate = torch.where(usable, candidate / total, 0.0)
    products = candidate @ gram  # (..., faces, T) of the candidate's point with every vector
    square = (candidate * products).sum(dim=-1)
    gap = square - torch.where(live[..., None, :], products, torch.inf).amin(dim=-1)
    gap = torch.where(usable[..., 0], gap, torch.inf)
    best = gap.argmin(dim=-1)[..., None, None].expand(*gap.shape[:-1], 1, n_tasks)
    return candidate.gather(-2, best).squeeze(-2)


def _all_finite(losses: Tensor, gram: Tensor) -> Tensor:
    """() or (...) bool: every loss and every inner product is finite."""
    return losses.isfinite().all(dim=-1) & gram.isfinite().all(dim=-1).all(dim=-1)


def _check_gram(op: str, gram: Tensor) -> int:
    n_tasks = gram.shape[-1] if gram.ndim >= 2 else 0
    if not 1 <= n_tasks <= MAX_TASKS or gram.shape[-2] != n_tasks:
        raise ValueError(
            f"{op}: gram must be (..., T, T) with T from 1 to {MAX_TASKS}, got {tuple(gram.shape)}"
        )
    return n_tasks


def _mean_over_processes(losses: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (any number) and Gram matrix (T, T) of the batch made of all processes' batches; all of equal size."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return losses, gram
    packed = torch.cat([losses.to(gram), gram.flatten()])
    distributed.all_reduce(packed)
    n_processes = distributed.get_world_size()
    n_losses = len(losses)
    # Each process's gradient counts 1 / n of the whole batch's, its inner products 1 / n².
    return (packed[:n_losses] / n_processes).to(losses), packed[n_losses:].view_as(gram) / n_processes**2
