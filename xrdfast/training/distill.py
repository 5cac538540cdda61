"""What the `[distillation]` table of a configuration adds to a training step.

Binds the losses of `xrdfast.distillation` to a symmetry model: DRG and DSR for its heads, and further teachers, the
joint posterior of the model's own four heads and a trained model. Not for the losses themselves, and not for how a
step weighs them (`balance.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xrdfast.bragg import wavelength_of
from xrdfast.data.generate import AugmentConfig
from xrdfast.distillation import DRGLoss, DSRLoss, SelfDistillation, softened_divergence
from xrdfast.errors import InputError
from xrdfast.models import PRESETS, SymmetryModel, model_path
from xrdfast.models.encoder import N_POINTS
from xrdfast.posterior import joint_posterior
from xrdfast.training import checkpoint

OBJECTIVES = ("tasks", "own")


@dataclass(frozen=True)
class DistillationConfig:
    """[distillation].

    Attributes:
        drg, dsr: LightSKD's reverse guidance and ranked-output regularisation.
        joint: the joint posterior of the four heads teaches each head, as a further reverse guide.
        teacher: run folder, model file or name of weights that ship, whose answers teach this one; "" for none.
        stage: submodule that the auxiliary classifier of DRG reads; "" takes the preset's.
        temperature: T of all of them.
        drg_weight, dsr_weight, joint_weight, teacher_weight: factors of the KL terms.
        objective: "tasks" adds the KL terms to the losses of their tasks; "own" makes them one objective beside them.
    """

    drg: bool = False
    dsr: bool = False
    joint: bool = False
    teacher: str = ""
    stage: str = ""
    temperature: float = 4.0
    drg_weight: float = 0.2
    dsr_weight: float = 1.0
    joint_weight: float = 0.2
    teacher_weight: float = 1.0
    objective: str = "tasks"

    @property
    def active(self) -> bool:
        """Whether anything is distilled."""
        return self.drg or self.dsr or self.joint or bool(self.teacher)


class Distiller:
    """The extra losses of every step of one run (`xrdfast.training.balance.ExtraLosses`).

    Args:
        config: with something to distil.
        model: the model that is trained, on its device. A forward hook is put on its stage for DRG.

    Raises:
        InputError: a stage that is unknown or yields no map, a teacher that cannot be read or lacks a task, a joint
            posterior of a model with one task alone.
    """

    def __init__(self, config: DistillationConfig, model: SymmetryModel) -> None:
        self.config = config
        self.own_objective = config.objective == "own"
        device = next(model.parameters()).device
        if config.joint and len(model.tasks) < 2:
            raise InputError(
                f"distillation.joint: must be false for a model of one task, got true for {model.preset}"
            )
        self._wrapped: SelfDistillation | None = None
        if config.drg or config.dsr:
            preset = PRESETS[model.preset]
            try:
                self._wrapped = SelfDistillation(
                    model,
                    example=torch.zeros(2, N_POINTS, device=device),
                    stage=config.stage or preset.stage,
                    channels_last=preset.stage_channels_last,
                    drg=DRGLoss(config.temperature, config.drg_weight) if config.drg else None,
                    dsr=DSRLoss(config.temperature, config.dsr_weight) if config.dsr else None,
                ).train()
            except ValueError as error:
                raise InputError(f"distillation.stage: {error}") from error
        self._teacher = _teacher(config.teacher, model) if config.teacher else None

    def modules(self) -> list[nn.Module]:
        """The auxiliary classifier, where there is one."""
        wrapped = self._wrapped
        return [wrapped.auxiliary] if wrapped is not None and wrapped.auxiliary is not None else []

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained beside the model."""
        return [
            (f"auxiliary.{name}", p) for module in self.modules() for name, p in module.named_parameters()
        ]

    def new_epoch(self) -> None:
        """The first batch of an epoch is compared with none."""
        if self._wrapped is not None:
            self._wrapped.new_epoch()

    def terms(
        self, intensity: Tensor, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Guidance of each task (T,) and the auxiliary classifier's cross-entropy ()."""
        config = self.config
        first = next(iter(logits.values()))
        guidance, auxiliary = first.new_zeros(len(logits)), first.new_zeros(())
        if self._wrapped is not None:
            guidance, auxiliary = self._wrapped.terms(logits, labels)
        if config.joint:
            posterior = joint_posterior({task: rows.detach() for task, rows in logits.items()})
            tiny = torch.finfo(first.dtype).tiny
            teacher = {task: posterior.marginal(task).clamp_min(tiny).log() for task in logits}
            guidance = guidance + config.joint_weight * self._taught(logits, teacher)
        if self._teacher is not None:
            with torch.no_grad():
                teacher = self._teacher(intensity)._asdict()
            guidance = guidance + config.teacher_weight * self._taught(logits, teacher)
        return guidance, auxiliary

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and statistics of the auxiliary classifier; the memory of DSR is `memory`."""
        return {
            f"auxiliary.{name}": x for module in self.modules() for name, x in module.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        for module in self.modules():
            module.load_state_dict({name.removeprefix("auxiliary."): x for name, x in state.items()})

    @property
    def memory(self) -> Tensor | None:
        """DSR's ranked logits of this process's last batch, (n_patterns, n_classes); None without DSR."""
        dsr = self._wrapped.dsr if self._wrapped is not None else None
        return None if dsr is None else dsr.previous

    @memory.setter
    def memory(self, ranked: Tensor) -> None:
        self._wrapped.dsr.previous = ranked

    def _taught(self, logits: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(
            [
                softened_divergence(rows, teacher[task], self.config.temperature)
                for task, rows in logits.items()
            ]
        )


def check_teacher(
    path: str,
    folds_validation: Sequence[int],
    student: AugmentConfig,
    wavelength: float,
    stores: Sequence[str] = (),
) -> None:
    """Sees that a teacher knows the patterns of its student, and not those that judge the student.

    Args:
        path: run folder, model file or name of weights that ship.
        folds_validation, student, wavelength, stores: of the student's run; `student` is its augmentation.

    Raises:
        InputError: for other validation folds, another profile, preparation, width of smoothing or wavelength; what
            the file does not state, passes.
    """
    checkpoint.check_folds(model_path(path), folds_validation, stores, "the student's")
    card = checkpoint.load_model_card(model_path(path))
    augment = card.config.get("augment", {})
    of_student = dataclasses.asdict(student)
    for key in ("profile", "preparation", "smooth_width") if card.config else ():
        got = augment.get(key, getattr(AugmentConfig(), key))
        if got != of_student[key]:
            raise InputError(f"{path}: augment.{key}: must be the student's {of_student[key]}, got {got}")
    if not math.isclose(wavelength_of(card.wavelength), wavelength, rel_tol=1e-6):
        raise InputError(f"{path}: wavelength: must be the student's {wavelength}, got {card.wavelength}")


def _teacher(path: str, student: SymmetryModel) -> SymmetryModel:
    device = next(student.parameters()).device
    teacher = checkpoint.load_model(model_path(path), device).requires_grad_(False)
    missing = [task for task in student.tasks if task not in teacher.tasks]
    if missing:
        raise InputError(f"{path}: tasks: must be those of the student, got no {missing[0]}")
    return teacher
