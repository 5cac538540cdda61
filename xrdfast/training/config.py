"""The configuration of a training run: TOML in, frozen dataclasses out, every complaint names its key.

Not for what the settings do (`trainer.py`).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import tomllib
import typing
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xrdfast.data.generate import PREPARATIONS, AugmentConfig
from xrdfast.data.profiles import PROFILES
from xrdfast.errors import InputError
from xrdfast.models import PRESETS
from xrdfast.training.balance import METHODS
from xrdfast.training.distill import OBJECTIVES, DistillationConfig

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bf16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class PresetConfig:
    """[model].

    Attributes:
        preset: a name in `xrdfast.models.PRESETS`.
        weights: what training starts from: run folder, model file or name of weights that ship, of this preset; ""
            starts anew.
    """

    preset: str = "small"
    weights: str = ""


@dataclass(frozen=True)
class DataConfig:
    """[data].

    Attributes:
        stores: paths of pattern stores, relative to the working directory.
        folds_validation: folds held out of training; the model is chosen and calibrated on them.
        clean: use only patterns whose space group is the same at both tolerances.
    """

    stores: tuple[str, ...] = ()
    folds_validation: tuple[int, ...] = (0,)
    clean: bool = True


@dataclass(frozen=True)
class TrainConfig:
    """[train].

    Attributes:
        epochs, max_minutes: limits of the run, 0 for none; it ends at whichever comes first, and the schedule
            follows the one nearer to its end. max_minutes is wall-clock time, validation included, kept over
            resumes.
        batch_size: patterns a step, over all processes.
        learning_rate, weight_decay, betas: of AdamW.
        warmup_fraction: share of the run over which the rate rises linearly.
        schedule: how it falls afterwards, to final_fraction of the rate.
        label_smoothing: share of each label given to all classes alike.
        clip_norm: largest norm of the whole gradient, 0 for no limit.
        ema_decay: of the averaged weights that are validated and saved; 0 takes the raw weights.
        balance: task balancing.
        class_balance: balanced sampling: 0 shows every pattern once an epoch; x > 0 draws patterns with weight
            count(group)^-x. (`balance` weighs tasks, not classes.)
        logit_adjustment: tau of the offsets tau ln(share of a class drawn) inside the cross-entropies, 0 for none:
            the model's own logits then rank rare classes as if all were equally frequent (at 1).
        precision: float32, or bf16 for matrix products under autocast.
        cuda_graph: on a GPU, launch the step as one CUDA graph; for presets whose step never waits for the device
            (all but `paper`), one process, no distillation.
        device: auto takes a GPU where there is one.
        seed: of weights, order, augmentation and dropout.
        validate_epochs: epochs between validations.
        early_stopping_patience: validations without a better space-group top-1 before the run ends, 0 for
            never.
        checkpoint_minutes: minutes between checkpoints beside those at validations.
        threads: of PyTorch, 0 to leave them as they are.
        log_steps: steps between lines of the log.
        tensorboard: also write TensorBoard events (needs the package).
    """

    epochs: int = 30
    max_minutes: float = 0.0
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_fraction: float = 0.03
    schedule: str = "cosine"
    final_fraction: float = 0.002
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    balance: str = "mgda"
    class_balance: float = 0.0
    logit_adjustment: float = 0.0
    precision: str = "float32"
    cuda_graph: bool = False
    device: str = "auto"
    seed: int = 0
    validate_epochs: int = 1
    early_stopping_patience: int = 0
    checkpoint_minutes: float = 5.0
    threads: int = 0
    log_steps: int = 20
    tensorboard: bool = False


_Rule = tuple[str, Callable[[Any], bool]]
_POSITIVE: _Rule = ("> 0", lambda x: x > 0)
_NOT_NEGATIVE: _Rule = (">= 0", lambda x: x >= 0)
_SHARE: _Rule = ("in [0, 1)", lambda x: 0 <= x < 1)


def _one_of(names: Collection[str]) -> _Rule:
    return f"one of {', '.join(names)}", lambda x: x in names


_RULES: dict[str, _Rule] = {
    "model.preset": _one_of(PRESETS),
    "data.stores": ("one store or more", lambda x: len(x) > 0 and all(x)),
    "data.folds_validation": ("folds in 0..9", lambda x: len(x) > 0 and all(0 <= fold <= 9 for fold in x)),
    # Stores hold lines 5 % beyond their range; strains of 3 sigma must stay within it.
    "augment.strain": ("in [0, 0.02]", lambda x: 0 <= x <= 0.02),
    "augment.b_max": _NOT_NEGATIVE,
    "augment.profile": _one_of(("sticks", *PROFILES)),
    "augment.preparation": _one_of(PREPARATIONS),
    "augment.smooth_width": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "train.epochs": _NOT_NEGATIVE,
    "train.max_minutes": _NOT_NEGATIVE,
    "train.batch_size": _POSITIVE,
    "train.learning_rate": _POSITIVE,
    "train.weight_decay": _NOT_NEGATIVE,
    "train.betas": ("two numbers in [0, 1)", lambda x: all(0 <= beta < 1 for beta in x)),
    "train.warmup_fraction": _SHARE,
    "train.schedule": _one_of(SCHEDULES),
    "train.final_fraction": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "train.label_smoothing": _SHARE,
    "train.clip_norm": _NOT_NEGATIVE,
    "train.ema_decay": _SHARE,
    "train.balance": _one_of(METHODS),
    "train.class_balance": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "train.logit_adjustment": ("in [0, 2]", lambda x: 0 <= x <= 2),
    "train.precision": _one_of(PRECISIONS),
    "train.device": _one_of(DEVICES),
    "train.seed": ("in 0..2^63 - 1", lambda x: 0 <= x < 1 << 63),  # as the generators of torch
    "train.validate_epochs": _POSITIVE,
    "train.early_stopping_patience": _NOT_NEGATIVE,
    "train.checkpoint_minutes": _POSITIVE,
    "train.threads": ("in 0..1024", lambda x: 0 <= x <= 1024),
    "train.log_steps": _POSITIVE,
    "distillation.temperature": _POSITIVE,
    "distillation.drg_weight": _NOT_NEGATIVE,
    "distillation.dsr_weight": _NOT_NEGATIVE,
    "distillation.joint_weight": _NOT_NEGATIVE,
    "distillation.teacher_weight": _NOT_NEGATIVE,
    "distillation.objective": _one_of(OBJECTIVES),
}


@dataclass(frozen=True)
class RunConfig:
    """A whole run, one attribute a TOML table.

    Raises:
        InputError: where a value breaks its rule; the message names the key.
    """

    model: PresetConfig = field(default_factory=PresetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        values = self.flat()
        for key, (rule, holds) in _RULES.items():
            if not holds(values[key]):
                raise InputError(f"{key}: must be {rule}, got {_shown(values[key])}")
        if self.augment.profile == "sticks" and self.augment.preparation != "known":
            raise InputError(f"augment.preparation: must be known for sticks, got {self.augment.preparation}")
        if self.train.epochs == 0 and self.train.max_minutes == 0:
            raise InputError("train.epochs: must be > 0 where train.max_minutes is 0, got 0")

    def flat(self) -> dict[str, Any]:
        """Values by "table.key", tuples kept."""
        return {
            f"{table.name}.{key.name}": getattr(getattr(self, table.name), key.name)
            for table in dataclasses.fields(self)
            for key in dataclasses.fields(getattr(self, table.name))
        }

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Tables of values that JSON and TOML can hold; `config_from_dict` reads it back."""
        tables = dataclasses.asdict(self)
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}
            for name, table in tables.items()
        }

    def to_toml(self) -> str:
        """The resolved configuration as TOML text."""
        tables = []
        for name, table in self.to_dict().items():
            lines = [f"{key} = {_shown(value)}" for key, value in table.items()]
            tables.append("\n".join([f"[{name}]", *lines]))
        return "\n\n".join(tables) + "\n"


def load_config(
    path: str | Path | None = None, overrides: Iterable[str] = (), base: dict[str, Any] | None = None
) -> RunConfig:
    """Reads a run's configuration.

    Args:
        path: of a TOML file; None for the defaults.
        overrides: settings that win over the file, as "train.epochs=3". A list may be given in TOML's way or,
            with one element, plainly.

    Raises:
        InputError: a file that cannot be read, an unknown key (with the closest known one), a wrong type or
            value.
    """
    tables: dict[str, Any] = copy.deepcopy(base or {})
    if path is not None:
        try:
            tables = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows writes a mark
        except OSError as error:
            raise InputError(f"{path}: file: must be readable, got {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: file: must be TOML, got {error}") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        table, dot, name = key.strip().partition(".")
        if not (equals and table and dot and name):
            raise InputError(f"override: must be table.key=value, got {override!r}")
        content = tables.setdefault(table, {})
        if isinstance(content, dict):  # otherwise config_from_dict complains of the file's own table
            content[name] = _parsed(text.strip())
    try:
        return config_from_dict(tables)
    except InputError as error:
        if path is None:
            raise
        raise InputError(f"{path}: {error}") from error


def config_from_dict(tables: dict[str, Any]) -> RunConfig:
    """Builds a configuration from plain tables; what is left out keeps its default.

    Raises:
        InputError: as `load_config`.
    """
    sections = typing.get_type_hints(RunConfig)
    built = {}
    for name, table in tables.items():
        if name not in sections:
            raise InputError(
                f"{name}: must be one of the tables {', '.join(sections)}{_hint(name, sections)}, got {name}"
            )
        if not isinstance(table, dict):
            raise InputError(f"{name}: must be a table, got {_shown(table)}")
        types = typing.get_type_hints(sections[name])
        values = {}
        for key, value in table.items():
            if key not in types:
                raise InputError(f"{name}.{key}: must be a known key{_hint(key, types)}, got {key}")
            values[key] = _typed(f"{name}.{key}", types[key], value)
        built[name] = sections[name](**values)
    return RunConfig(**built)


def _typed(key: str, wanted: Any, value: Any) -> Any:
    """The value as the type a field declares: str, bool, int, float or a tuple of one of them."""
    if typing.get_origin(wanted) is tuple:
        element, *more = typing.get_args(wanted)
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if more and more[0] is not Ellipsis and len(values) != 1 + len(more):
            raise InputError(f"{key}: must be {1 + len(more)} values, got {_shown(value)}")
        return tuple(_typed(key, element, entry) for entry in values)
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}
    accepted = (int, float) if wanted is float else (wanted,)
    fits = isinstance(value, accepted) and (wanted is bool or not isinstance(value, bool))
    if not fits or (wanted is float and not math.isfinite(value)):
        raise InputError(f"{key}: must be {names[wanted]}, got {_shown(value)}")
    return wanted(value)


def _parsed(text: str) -> Any:
    """A TOML value, or the text itself where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _shown(value: Any) -> str:
    """A value as TOML would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a JSON string is a TOML basic string
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shown(entry) for entry in value) + "]"
    return repr(value)
