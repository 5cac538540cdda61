"""A model as a file other programs run: ONNX, or torch.export's archive. Not for checkpoints (`training`)."""

from __future__ import annotations

import io
import warnings

import torch
from torch import Tensor, nn

from xrdfast.errors import InputError
from xrdfast.models.encoder import N_POINTS
from xrdfast.models.xrdecoupler import SymmetryModel

SUFFIXES = (".onnx", ".pt2")
_OPSET = 18  # the first with a scatter that keeps the maximum


def encode_model(model: SymmetryModel, suffix: str) -> bytes:
    """Content of a file with a model whose input is `intensity` (n_patterns, 8500) float32, 0 to 100, n_patterns free.

    Outputs are the logits of `SymmetryModel.tasks` in their order, named by task in ONNX. Not for a preset that
    computes other rows for every pattern (`paper`): no fixed graph holds that.

    Args:
        model: in evaluation mode, on the CPU.
        suffix: of the file, one of SUFFIXES.

    Raises:
        ValueError: for another suffix.
        InputError: for a model that no fixed graph holds.
        ImportError: .onnx needs the packages onnx and onnxscript.
    """
    if suffix not in SUFFIXES:
        raise ValueError(f"encode_model: suffix must be one of {', '.join(SUFFIXES)}, got {suffix!r}")
    example = torch.zeros(2, N_POINTS)
    example[:, ::100] = 50.0
    free = ({0: torch.export.Dim("n_patterns", min=1, max=1 << 20)},)
    try:
        with torch.no_grad():
            program = torch.export.export(_Logits(model).eval(), (example,), dynamic_shapes=free)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"model: must be a fixed graph, got the preset {model.preset} ({reason})") from error
    if suffix == ".pt2":
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return buffer.getvalue()
    with warnings.catch_warnings():  # of the exporter's own parts
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        onnx = torch.onnx.export(
            program,
            input_names=["intensity"],
            output_names=list(model.tasks),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    return onnx.model_proto.SerializeToString()


class _Logits(nn.Module):
    """The model with a plain tuple of the logits it has."""

    def __init__(self, model: SymmetryModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, intensity: Tensor) -> tuple[Tensor, ...]:
        return tuple(rows for rows in self.model(intensity) if rows is not None)
