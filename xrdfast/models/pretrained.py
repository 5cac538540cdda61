"""Where the weights lie that ship with the package. Not for reading them (`xrdfast.training.checkpoint`)."""

from __future__ import annotations

from pathlib import Path

from xrdfast.errors import InputError

_FOLDER = Path(__file__).resolve().parent.parent / "weights"


def pretrained_path(name: str = "lab") -> Path:
    """Model file of weights that ship: "lab", "lab-small" for speed, or "sticks" for calculated lines.

    "sticks" knows all lines of inorganic crystals and minerals, the weakest too: of measured lists "lab" makes more.

    Raises:
        InputError: for a name that none has.

    Example:
        >>> pretrained_path().name
        'lab.safetensors'
    """
    path = _FOLDER / f"{name}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.safetensors"))) or "none"
        raise InputError(f"model: name: must be one that ships ({there}), got {name!r}")
    return path


def model_path(model: str | Path | None, default: str = "lab") -> Path:
    """Where a model lies: a path as it is; for the name of weights that ship theirs, unless a model lies there.

    Args:
        model: a run folder, a model file or a name; None for the weights `default`.

    Example:
        >>> model_path("lab-small").name, model_path(None).name
        ('lab-small.safetensors', 'lab.safetensors')
    """
    if model is None:
        return pretrained_path(default)
    path, name = Path(model), str(model)
    ships = path.name == name and (_FOLDER / f"{name}.safetensors").is_file()
    is_model = path.is_file() or (path / "model.safetensors").is_file()
    return pretrained_path(name) if ships and not is_model else path
