"""Exported models answer as the model they came from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xrdfast.errors import InputError
from xrdfast.models import build_model
from xrdfast.models.export import encode_model


def sticks(n_patterns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(n_patterns, 8500, generator=generator) < 0.005
    return 100.0 * torch.rand(n_patterns, 8500, generator=generator) * keep


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("small").eval()


def test_torch_export(model, tmp_path):
    (tmp_path / "model.pt2").write_bytes(encode_model(model, ".pt2"))
    program = torch.export.load(tmp_path / "model.pt2").module()
    for n_patterns in (1, 3):
        intensity = sticks(n_patterns)
        with torch.no_grad():
            for got, want in zip(program(intensity), model(intensity), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_onnx(model):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(encode_model(model, ".onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == list(model.tasks)
    for n_patterns in (1, 3):
        intensity = sticks(n_patterns)
        got = session.run(None, {"intensity": intensity.numpy()})
        with torch.no_grad():
            want = model(intensity)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-3, atol=1e-4)


def test_refusals(model):
    with pytest.raises(ValueError, match=r"encode_model: suffix must be one of \.onnx, \.pt2, got '\.bin'"):
        encode_model(model, ".bin")
    for suffix in (".onnx", ".pt2"):
        with pytest.raises(InputError, match="model: must be a fixed graph, got the preset paper"):
            encode_model(build_model("paper").eval(), suffix)
