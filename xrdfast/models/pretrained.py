"""Where the weights lie that ship with the package. Not for reading them (`xrdfast.training.checkpoint`)."""

from __future__ import annotations

from pathlib import Path

from xrdfast.errors import InputError

_FOLDER = Path(__file__).resolve().parent.parent / "weights"


def pretrained_path(name: str = "lab") -> Path:
    """Model file of weights that ship, named by the recipe that made them: "lab", or "lab-small" for speed.

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


def model_path(model: str | Path) -> Path:
    """A path as it is, or, where nothing lies there, that of the weights that ship under this name.

    Example:
        >>> model_path("lab-small").name
        'lab-small.safetensors'
    """
    ships = (_FOLDER / f"{model}.safetensors").is_file() and not Path(model).exists()
    return pretrained_path(str(model)) if ships else Path(model)
