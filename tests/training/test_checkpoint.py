"""Model files and run states: whole or refused, in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from xrdfast.errors import InputError
from xrdfast.models import build_model
from xrdfast.training.checkpoint import (
    MODEL_FILE,
    ModelCard,
    load_model,
    load_model_card,
    load_state,
    publish_model,
    save_model,
    save_state,
)

pytestmark = pytest.mark.usefixtures("tiny_presets")
CARD = ModelCard(
    preset="tiny", wavelength=1.54056, grid={"two_theta_min": 5.0}, calibration={"temperature": 1.5}
)


def test_a_model_comes_back(tmp_path: Path) -> None:
    model = build_model("tiny")
    save_model(tmp_path / MODEL_FILE, model, CARD)
    for path in (tmp_path, tmp_path / MODEL_FILE, str(tmp_path)):
        again = load_model(path)
        assert again.preset == "tiny"
        assert not again.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        assert load_model_card(path) == CARD


def test_a_state_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tensors = {"a": shared.view(2, 3).T, "b": shared, "c": torch.tensor(3)}
    save_state(tmp_path / "s", tensors, {"step": 3, "best": {"x": 0.1}})
    again, state = load_state(tmp_path / "s")
    assert state == {"step": 3, "best": {"x": 0.1}}
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (None, {}, "file: must be a whole safetensors file"),
        ({}, {"format": "other"}, "format: must be xrdfast-model, got other"),
        ({}, {"format": "xrdfast-model", "version": "9"}, "version: must be 1, got 9"),
        ({}, {"format": "xrdfast-model", "version": "1"}, "card: must describe the model"),
        (
            {},
            {"format": "xrdfast-model", "version": "1", "card": '{"preset": "tiny"}'},
            "card: must describe the model",
        ),
        (
            {},
            {
                "format": "xrdfast-model",
                "version": "1",
                "card": '{"preset": "tiny", "wavelength": 1.5, "grid": {}, "config": {"data": []}}',
            },
            "card: must describe the model, got something else than a table",
        ),
        (
            {},
            {
                "format": "xrdfast-model",
                "version": "1",
                "card": '{"preset": "huge", "wavelength": 1.5, "grid": {}}',
            },
            "preset: must be one of .*, got huge",
        ),
        (
            {"encoder.layer.weight": torch.zeros(3)},
            {
                "format": "xrdfast-model",
                "version": "1",
                "card": '{"preset": "tiny", "wavelength": 1.5, "grid": {}}',
            },
            r"encoder.layer.bias: must be \(24,\), got nothing",
        ),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor] | None, metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "x.safetensors"
    if tensors is None:
        path.write_bytes(b"not a model")
    else:
        save_file(tensors or {"x": torch.zeros(1)}, path, metadata)
    with pytest.raises(InputError, match=message) as caught:
        load_model(path)
    assert "x.safetensors: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors: file: must be readable, got No such file"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="s: file: must be readable"):
        load_state(tmp_path / "s")
    save_file({"x": torch.zeros(1)}, tmp_path / "s", {"format": "xrdfast-run", "version": "1", "state": "3"})
    with pytest.raises(InputError, match="s: state: must be a JSON object"):
        load_state(tmp_path / "s")


def test_a_published_model_is_half_as_long_and_names_no_folder(tmp_path: Path) -> None:
    model = build_model("tiny")
    config = {
        "model": {"preset": "tiny", "weights": "/a/private/place/run"},
        "distillation": {"teacher": "/a/private/place/teacher"},
        "data": {"stores": ["/a/private/place/x.store.safetensors"]},
    }
    save_model(tmp_path / MODEL_FILE, model, dataclasses.replace(CARD, config=config))
    publish_model(tmp_path, tmp_path / "public.safetensors")
    card = load_model_card(tmp_path / "public.safetensors")
    assert card.config == {
        "model": {"preset": "tiny", "weights": "run"},
        "distillation": {"teacher": "teacher"},
        "data": {"stores": ["x.store.safetensors"]},
    }
    assert card.calibration == CARD.calibration
    with safe_open(tmp_path / "public.safetensors", "pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds == {torch.float16}
    again = load_model(tmp_path / "public.safetensors")
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
