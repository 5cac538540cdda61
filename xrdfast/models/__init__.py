"""Symmetry models: encoders, heads, presets, import of published checkpoints. Not for training them."""

from xrdfast.models.presets import PRESETS, ModelConfig, build_model
from xrdfast.models.pretrained import model_path, pretrained_path
from xrdfast.models.published_checkpoint import import_published_checkpoint
from xrdfast.models.xrdecoupler import SymmetryLogits, SymmetryModel

__all__ = [
    "PRESETS",
    "ModelConfig",
    "SymmetryLogits",
    "SymmetryModel",
    "build_model",
    "import_published_checkpoint",
    "model_path",
    "pretrained_path",
]
