"""Models by name: the registry of presets.

For building a model from its name. Not for the layers themselves, and not for training settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from xrdfast.models.encoder import XRDecouplerEncoder
from xrdfast.models.plain_cnn import PlainCnnEncoder
from xrdfast.models.small import WIDTHS as SMALL_WIDTHS
from xrdfast.models.small import SmallEncoder
from xrdfast.models.xrdecoupler import SymmetryModel
from xrdfast.symmetry import TASKS


@dataclass(frozen=True)
class ModelConfig:
    """One preset."""

    name: str
    encoder: Callable[[], nn.Module]  # builds the encoder; the encoder states its n_features
    head_widths: Mapping[str, tuple[int, ...]]  # hidden widths of each task's head; the tasks of the model
    summary: str  # one line for people
    stage: str = ""  # submodule whose output an auxiliary classifier of self-distillation reads
    stage_channels_last: bool = False  # that output is (n_patterns, position, channel)
    graphable: bool = True  # a training step never waits for the device, so a CUDA graph can hold it


PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        ModelConfig(
            name="paper",
            encoder=XRDecouplerEncoder,
            head_widths={
                "space_group": (128, 256),
                "crystal_system": (32, 16),
                "lattice_centering": (32, 16),
                "point_group": (32,),
            },
            summary="the published XRDecoupler, 30.25 M parameters, 1.93 GFLOP a pattern",
            stage="encoder.local_branch.middle",
            stage_channels_last=True,
            graphable=False,
        ),
        ModelConfig(
            name="small",
            encoder=SmallEncoder,
            head_widths=dict.fromkeys(TASKS, ()),
            summary="own hierarchical encoder on a log d axis, 1.0 M parameters, 0.06 GFLOP a pattern",
            stage="encoder.mergers.1",
            stage_channels_last=True,
        ),
        ModelConfig(
            name="medium",
            encoder=partial(SmallEncoder, tuple(2 * width for width in SMALL_WIDTHS)),
            head_widths=dict.fromkeys(TASKS, ()),
            summary="the encoder of small, twice as wide: 3.4 M parameters, 0.22 GFLOP a pattern",
            stage="encoder.mergers.1",
            stage_channels_last=True,
        ),
        ModelConfig(
            name="plain_cnn",
            encoder=PlainCnnEncoder,
            head_widths={"space_group": ()},
            summary="baseline: strided CNN on space groups alone, 1.06 M parameters",
            stage="encoder.layers.3.norm",
            stage_channels_last=True,
        ),
    )
}


def build_model(name: str) -> SymmetryModel:
    """Builds a preset with freshly initialised weights (torch's default initialisation and generator).

    Args:
        name: a key of `PRESETS`.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> build_model("plain_cnn").tasks
        ('space_group',)
    """
    if name not in PRESETS:
        raise ValueError(f"build_model: name must be one of {', '.join(PRESETS)}, got {name!r}")
    config = PRESETS[name]
    return SymmetryModel(config.encoder(), config.head_widths, preset=name)
