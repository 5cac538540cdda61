"""What an answer rests on: a model that looks at one place only has to say so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from xrdfast.data.generate import AugmentConfig
from xrdfast.evidence import find_evidence
from xrdfast.models import SymmetryLogits, build_model
from xrdfast.prediction import SymmetryPredictor

PEAKS = (20.0, 31.7, 45.5)


class OnePlace(nn.Module):
    """Logits of space group 225 from the intensity within a degree of 31.7, nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tasks, self.encoder = ("space_group",), model.encoder

    def encode(self, intensity: torch.Tensor) -> torch.Tensor:
        return intensity[:, 2570:2770].sum(1, keepdim=True).clamp(max=1.0)

    def classify(self, features: torch.Tensor) -> SymmetryLogits:
        groups = torch.zeros(len(features), 230)
        groups[:, 224:225] = 5.0 * features
        return SymmetryLogits(groups, None, None, None)


def scan() -> tuple[np.ndarray, np.ndarray]:
    x = np.arange(10.0, 60.0, 0.02)
    y = 50.0 + sum(1000.0 * np.exp(-(((x - at) / 0.08) ** 2)) for at in PEAKS)
    return x, np.random.default_rng(0).poisson(y).astype(np.float64)


@pytest.fixture
def predictors():
    model = OnePlace(build_model("plain_cnn").eval())
    return [SymmetryPredictor(model, augment=AugmentConfig(profile=profile)) for profile in ("lab", "sticks")]


def test_the_telling_peak_comes_first(predictors):
    for predictor in predictors:
        answer = predictor.predict_scan(*scan(), wavelength=1.54056)
        evidence = find_evidence(predictor, answer)
        assert len(evidence) == len(answer.pattern.two_theta) >= 3
        assert evidence[0].two_theta == pytest.approx(31.7, abs=0.02) and evidence[0].drop > 1.0
        assert all(abs(one.drop) < 1e-4 for one in evidence[1:])
        assert len(find_evidence(predictor, answer, 2)) == 2
        with pytest.raises(ValueError, match="n_peaks"):
            find_evidence(predictor, answer, 0)


def test_one_line_alone(predictors):
    answer = predictors[1].predict_sticks([31.7], [1.0])
    assert [one.drop for one in find_evidence(predictors[1], answer)] == [0.0]
