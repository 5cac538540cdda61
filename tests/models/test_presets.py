"""The registry: every preset builds, runs and states what it is."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xrdfast.models import PRESETS, build_model
from xrdfast.symmetry import N_CLASSES


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_runs(name):
    model = build_model(name).eval()
    assert model.preset == PRESETS[name].name == name
    assert set(model.tasks) == set(PRESETS[name].head_widths)
    with torch.no_grad():
        features = model.encode(torch.zeros(2, 8500))
        logits = model.classify(features)
    assert features.shape == (2, model.encoder.n_features)
    for task, values in logits._asdict().items():
        if task in model.tasks:
            assert values.shape == (2, N_CLASSES[task]) and values.isfinite().all()
        else:
            assert values is None


def test_small_is_small(monkeypatch: pytest.MonkeyPatch):
    """At most 3 M parameters and 0.06 GFLOP a pattern: what two cores train."""
    model = build_model("small").eval()
    assert sum(p.numel() for p in model.parameters()) < 3e6
    # As a compiler sees it: the counter leaves out products that write in place.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(4, 8500))
    assert 0.05e9 < counter.get_total_flops() / 4 <= 0.06e9


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"build_model: name must be one of paper, .*got 'large'"):
        build_model("large")
