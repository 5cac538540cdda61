"""Scores that speak against an answer: their parts, their limits, and how they rank halos and mixtures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.honesty import auroc, halos, judge
from xrdfast.data.generate import AugmentConfig
from xrdfast.models import build_model
from xrdfast.posterior import Calibration, joint_posterior
from xrdfast.prediction import SymmetryPredictor
from xrdfast.suspicion import (
    N_OWN_FEATURES,
    disagreement,
    doubts,
    fit_several_phases,
    halo,
    pattern_shape,
    phase_features,
)
from xrdfast.symmetry import class_index, class_names


@pytest.fixture(scope="module")
def predictor() -> SymmetryPredictor:
    torch.manual_seed(0)
    return SymmetryPredictor(build_model("small").eval(), augment=AugmentConfig(profile="lab"))


def scans(predictor: SymmetryPredictor, n: int, n_peaks: int, seed: int) -> torch.Tensor:
    """Preprocessed scans of sharp peaks on a background, counted."""
    rng = np.random.default_rng(seed)
    two_theta = predictor.grid.two_theta()
    counts = []
    for _ in range(n):
        places, heights = rng.uniform(10.0, 88.0, n_peaks), rng.exponential(800.0, n_peaks) + 100.0
        clean = 40.0 + 100.0 * np.exp(-two_theta / 20.0)
        clean += (heights * np.exp(-(((two_theta[:, None] - places) / 0.07) ** 2))).sum(1)
        counts.append(rng.poisson(clean).astype(np.float64))
    return predictor.prepare_scans([two_theta] * n, counts, [predictor.wavelength] * n)


def test_disagreement_of_heads():
    groups = torch.full((2, 230), -30.0)
    groups[:, 224] = 30.0
    systems = torch.full((2, 7), -30.0)
    systems[0, int(class_index("crystal_system")[224])] = 30.0
    systems[1, class_names("crystal_system").index("triclinic")] = 30.0
    logits = {"space_group": groups, "crystal_system": systems}
    posterior = joint_posterior(logits)
    agree, differ = disagreement(logits, posterior, None).tolist()
    assert agree == pytest.approx(0.0, abs=1e-5) and differ > 0.2
    assert disagreement({"space_group": groups}, posterior, None) is None


def test_what_is_not_known_is_none():
    intensity, features = torch.zeros(2, 100), torch.ones(2, 3)
    intensity[:, 50] = 100.0
    whole = torch.tensor([True, False])
    one_head = {"space_group": torch.zeros(2, 230)}
    posterior = joint_posterior(one_head)
    unlike, several = doubts(one_head, features, posterior, None, intensity, whole)
    assert unlike[0] > 0.9 and unlike[1] is None and several == [None, None]
    same = {"space_group": 1.0}
    calibration = Calibration(same, same, several_phases=(0.0,) * N_OWN_FEATURES + (1.0, 0.0, -2.0))
    _, several = doubts(one_head, features, posterior, calibration, intensity, whole)
    assert several == [pytest.approx(1.0 / (1.0 + math.e)), None]
    two_heads = one_head | {"crystal_system": torch.zeros(2, 7)}
    posterior = joint_posterior(two_heads)
    unlike, several = doubts(two_heads, features, posterior, None, intensity, whole)
    assert unlike[1] == pytest.approx(float(disagreement(two_heads, posterior, None)[1]))
    assert unlike[0] > unlike[1]


def test_crest_and_active_share():
    intensity = torch.zeros(3, 8505)
    intensity[0, [3, 4, 5]] = torch.tensor([50.0, 100.0, 50.0])
    intensity[1] = 100.0
    shape = pattern_shape(intensity)
    assert shape.crest.tolist() == pytest.approx([200.0 / 300.0, 1.0, 0.0])
    assert shape.active_share.tolist() == pytest.approx([1 / 850, 1.0, 0.0])
    assert halo(shape.crest)[2] == 1.0
    posterior = joint_posterior({"space_group": torch.zeros(3, 230)})
    found = phase_features(torch.ones(3, 5), posterior, shape)
    assert found.shape == (3, N_OWN_FEATURES + 5) and bool(found.isfinite().all())


def test_halos_rank_above_single_phases(predictor):
    """With a model that knows nothing: what the pattern itself says."""
    amorphous = judge(predictor, halos(predictor, 64, np.random.default_rng(3)))
    alone = judge(predictor, scans(predictor, 64, 20, 1))
    assert auroc(amorphous["out_of_distribution"], alone["out_of_distribution"]) > 0.95
    assert bool(alone["several_phases"].isnan().all())  # nothing was fitted


def test_area_under_the_curve_and_fit():
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randn(500, generator=generator), torch.randn(500, generator=generator) + 1.0
    everything = [(b > a) + 0.5 * (b == a) for b in high.tolist() for a in low.tolist()]
    assert auroc(high, low) == pytest.approx(sum(everything) / len(everything))
    assert auroc(low, low) == pytest.approx(0.5)
    assert auroc(high, low) > 0.7


def test_the_fit_finds_what_differs_and_leaves_the_rest():
    """Two normals one apart in the second column; the third is noise, the fourth constant."""
    generator = torch.Generator().manual_seed(0)
    one, two = (
        torch.stack(
            [torch.ones(4000), torch.randn(4000, generator=generator) + i, noise, torch.ones(4000)], 1
        )
        for i, noise in enumerate(10.0 * torch.randn(2, 4000, generator=generator))
    )
    weights = fit_several_phases(one, two)
    assert weights[1] == pytest.approx(1.0, abs=0.1) and abs(weights[2]) < 0.02 and weights[3] == 0.0
    score = [x @ torch.tensor(weights) for x in (one, two)]
    assert float(score[0].mean() + score[1].mean()) == pytest.approx(0.0, abs=0.1)
