"""The symmetry model: shapes, named outputs, absent tasks, refused arguments."""

from __future__ import annotations

import pytest
import torch

from xrdfast.models import SymmetryLogits, SymmetryModel, build_model
from xrdfast.models.plain_cnn import PlainCnnEncoder
from xrdfast.symmetry import N_CLASSES, TASKS


def test_named_outputs_in_task_order():
    assert SymmetryLogits._fields == TASKS
    heads = {"point_group": (), "space_group": (8,)}
    model = SymmetryModel(PlainCnnEncoder(16), heads, preset="trial")
    assert model.tasks == ("space_group", "point_group")
    assert model.preset == "trial"
    logits = model(torch.zeros(3, 8500))
    assert logits.crystal_system is None and logits.lattice_centering is None
    for task in model.tasks:
        assert getattr(logits, task).shape == (3, N_CLASSES[task])


def test_forward_is_classify_of_encode():
    model = build_model("plain_cnn").eval()
    intensity = torch.rand(2, 8500)
    assert torch.equal(model(intensity).space_group, model.classify(model.encode(intensity)).space_group)


@pytest.mark.parametrize("heads", [{}, {"space_groups": ()}])
def test_unknown_tasks_are_refused(heads):
    with pytest.raises(ValueError, match="head_widths must name tasks"):
        SymmetryModel(PlainCnnEncoder(), heads, preset="trial")


@pytest.mark.parametrize("shape", [(8500,), (2, 8501), (2, 1, 8500)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"encode: intensity must be \(n_patterns, 8500\)"):
        build_model("plain_cnn").encode(torch.zeros(shape))
