"""Files of a training run: the resumable state, and the model that predict and evaluate read.

Both are single safetensors files whose metadata holds JSON, so that one rename replaces weights and
description together and a write that fails leaves the previous file whole. Not for stores or for published
checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from xrdfast.data.files import open_safetensors, write_atomically
from xrdfast.errors import InputError
from xrdfast.models import PRESETS, SymmetryModel, build_model

MODEL_FILE = "model.safetensors"
STATE_FILE = "last.safetensors"
_VERSION = "1"


@dataclass(frozen=True)
class ModelCard:
    """What a model file says beside its weights.

    Attributes:
        preset: name of the architecture.
        wavelength: Angstrom, of the patterns the model was trained on.
        grid: fields of `xrdfast.bragg.Grid`.
        config: the resolved configuration of the run, {} for imported weights.
        calibration: what `xrdfast.posterior` fitted on validation patterns, {} where nothing was fitted.
        metrics: of the validation patterns.
    """

    preset: str
    wavelength: float
    grid: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


def save_model(path: str | Path, model: SymmetryModel, card: ModelCard) -> None:
    """Writes weights and card as one file, whole or not at all.

    Raises:
        InputError: where the file system refuses.
    """
    metadata = {"format": "xrdfast-model", "version": _VERSION, "card": json.dumps(vars(card))}
    _write(Path(path), model.state_dict(), metadata)


def publish_model(source: str | Path, path: str | Path) -> None:
    """Writes the model of a run for others: half the bytes (float16), and no path of this machine in its card.

    Args:
        source: run folder or model file.
        path: of the file to write.

    Raises:
        InputError: as `load_model`, or where the file system refuses.
    """
    card, model = load_model_card(source), load_model(source).half()
    config = dict(card.config)
    if "data" in config:
        config["data"] = config["data"] | {"stores": [Path(name).name for name in config["data"]["stores"]]}
    for table, key in (("model", "weights"), ("distillation", "teacher")):
        if table in config:
            config[table] = config[table] | {key: Path(config[table].get(key, "")).name}
    save_model(path, model, dataclasses.replace(card, config=config))


def load_model(path: str | Path, device: str | torch.device = "cpu") -> SymmetryModel:
    """Builds the model of a run folder or model file, in evaluation mode.

    Raises:
        InputError: for a file that is missing, damaged, of another kind, or whose weights do not fit its
            preset.
    """
    path = _model_path(path)
    metadata, tensors = _read(path, "xrdfast-model")
    card = _card(path, metadata)
    if card.preset not in PRESETS:
        raise InputError(f"{path}: preset: must be one of {', '.join(PRESETS)}, got {card.preset}")
    model = build_model(card.preset)
    load_weights(path, model, tensors)
    return model.to(device).eval()


def load_model_card(path: str | Path) -> ModelCard:
    """The description in a run folder or model file.

    Raises:
        InputError: as `load_model`.
    """
    path = _model_path(path)
    metadata, _ = _read(path, "xrdfast-model", tensors=False)
    return _card(path, metadata)


def check_folds(
    path: str | Path, folds_validation: Collection[int], stores: Collection[str], whose: str
) -> None:
    """Sees that a model was not trained on the patterns that are to judge another, as far as files tell.

    Warns where the other has stores that the model did not: a formula may lie in another fold of those.

    Args:
        path: run folder or model file; one that does not state its folds passes.
        folds_validation, stores: of the other.
        whose: names the other in the message: "the student's".

    Raises:
        InputError: for other validation folds, or as `load_model_card`.
    """
    data = load_model_card(path).config.get("data", {})
    folds = data.get("folds_validation")
    if folds is None:
        return
    if not isinstance(folds, list) or set(folds) != set(folds_validation):
        raise InputError(
            f"{path}: data.folds_validation: must be {whose} {sorted(folds_validation)}, got {folds}"
        )
    known = {Path(str(store)).name for store in data.get("stores", ())}
    if unknown := sorted({Path(store).name for store in stores} - known):
        warnings.warn(
            f"{path}: was not trained on {unknown[0]}, whose folds may be others: it may know {whose} validation "
            "patterns, and then metrics and calibration flatter",
            stacklevel=2,
        )


def load_weights(path: Path, model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into a model of exactly these names and shapes.

    Raises:
        InputError: naming `path` and the first tensor that does not fit.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        wanted = tuple(own[name].shape) if name in own else None
        got = tuple(tensors[name].shape) if name in tensors else None
        if wanted != got:
            raise InputError(f"{path}: {name}: must be {wanted or 'absent'}, got {got or 'nothing'}")
    model.load_state_dict(dict(tensors))


def save_state(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes a run's tensors and its JSON state as one file, whole or not at all.

    Raises:
        InputError: where the file system refuses; the previous state is still there then.
    """
    _write(path, tensors, {"format": "xrdfast-run", "version": _VERSION, "state": json.dumps(state)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_state` wrote.

    Raises:
        InputError: for a file that is missing, damaged or of another kind.
    """
    metadata, tensors = _read(path, "xrdfast-run")
    try:
        return tensors, dict(json.loads(metadata["state"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: state: must be a JSON object, got {error}") from error


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    # Clones, because safetensors refuses tensors that share memory.
    raw = save(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, metadata
    )
    with write_atomically(path) as file:
        file.write(raw)


def _read(path: Path, format_name: str, *, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    with open_safetensors(path, format_name) as (file, metadata):
        # Copies: views of the map would change under us if the file were rewritten in place.
        names = file.keys() if tensors else ()
        content = {name: file.get_tensor(name).clone() for name in names}
    if metadata.get("version") != _VERSION:
        raise InputError(f"{path}: version: must be {_VERSION}, got {metadata.get('version')}")
    return metadata, content


def _card(path: Path, metadata: Mapping[str, str]) -> ModelCard:
    try:
        card = ModelCard(**json.loads(metadata["card"]))
        tables = [card.grid, card.calibration, card.metrics, card.config, *card.config.values()]
        if not all(isinstance(table, dict) for table in tables):
            raise TypeError("something else than a table")
        return card
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: card: must describe the model, got {error}") from error


def _model_path(path: str | Path) -> Path:
    path = Path(path)
    return path / MODEL_FILE if path.is_dir() else path
