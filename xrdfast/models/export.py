"""A model as a file other programs run: ONNX, or torch.export's archive. Not for checkpoints (`training`)."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from xrdfast.errors import InputError, shown_path
from xrdfast.models.encoder import N_POINTS
from xrdfast.models.xrdecoupler import SymmetryModel

SUFFIXES = (".onnx", ".pt2")
_OPSET = 18  # the first with a scatter that keeps the maximum


def export_model(model: SymmetryModel, path: str | Path) -> None:
    """Writes a model whose input is `intensity` (n_patterns, 8500) float32, 0 to 100, n_patterns free.

    Outputs are the logits of `SymmetryModel.tasks` in their order, named by task in ONNX. A preset with operators of
    this package's own runs from .pt2 where xrdfast is installed, and has no ONNX form.

    Args:
        model: in evaluation mode, on the CPU.
        path: ends in .onnx or .pt2.

    Raises:
        InputError: for another name, a model without an ONNX form, or where the file cannot be written.
        ImportError: .onnx needs the packages onnx and onnxscript.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{shown_path(path)}: name: must end in {' or '.join(SUFFIXES)}, got {path.suffix!r}"
        )
    example = torch.zeros(2, N_POINTS)
    example[:, ::100] = 50.0
    free = ({0: torch.export.Dim("n_patterns", min=1, max=1 << 20)},)
    with torch.no_grad():
        program = torch.export.export(_Logits(model).eval(), (example,), dynamic_shapes=free)
    if path.suffix == ".pt2":
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        content = buffer.getvalue()
    else:
        if own := {
            str(node.target) for node in program.graph.nodes if str(node.target).startswith("xrdfast.")
        }:
            raise InputError(
                f"{shown_path(path)}: model: must consist of standard operators for ONNX, got {min(own)}"
            )
        onnx = torch.onnx.export(
            program,
            input_names=["intensity"],
            output_names=list(model.tasks),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
        content = onnx.model_proto.SerializeToString()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"{shown_path(path)}: file: must be writable, got {error.strerror}") from error


class _Logits(nn.Module):
    """The model with a plain tuple of the logits it has."""

    def __init__(self, model: SymmetryModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, intensity: Tensor) -> tuple[Tensor, ...]:
        return tuple(rows for rows in self.model(intensity) if rows is not None)
