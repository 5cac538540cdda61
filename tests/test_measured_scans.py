"""The evaluation on measured scans: how it scores, what it takes out of the library, its rows with a network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.measured_scans import (
    Measured,
    answers,
    matched,
    network_posterior,
    scores,
    what_was_measured,
)
from xrdfast.models import build_model
from xrdfast.prediction import SymmetryPredictor
from xrdfast.retrieval import KnownStructures, Matches


def library(formula: list[str], family: list[str], number: list[int]) -> KnownStructures:
    """Cubic cells of rising edges, with the lines of a simple lattice."""
    n = len(number)
    axes = torch.arange(5)
    hkl = torch.stack(torch.meshgrid(axes, axes, axes, indexing="ij"), dim=-1).reshape(-1, 3)[1:40]
    metric = torch.zeros(n, 6, dtype=torch.float64)
    metric[:, :3] = (4.0 + 0.9 * torch.arange(n, dtype=torch.float64))[:, None] ** -2
    change = torch.zeros(n, 6, 6, dtype=torch.float64)
    change[:, 0] = -2.0 / 3.0**0.5 * metric
    return KnownStructures(
        ids=[str(i) for i in range(n)],
        formula=formula,
        family=family,
        line_offset=len(hkl) * torch.arange(n + 1),
        hkl=hkl.repeat(n, 1).to(torch.int16),
        line_amplitude=torch.linspace(10.0, 2.0, len(hkl)).repeat(n),
        metric=metric,
        metric_change=change,
        space_group_number=torch.tensor(number, dtype=torch.int16),
    )


def scan(edge: float) -> np.ndarray:
    """Counts of a scan of such a cell."""
    two_theta = 5.0 + 0.01 * np.arange(8500)
    squares = np.array([h * h + k * k + m * m for h in range(5) for k in range(5) for m in range(5)][1:40])
    heights = np.linspace(10.0, 2.0, 39) ** 2
    sine = 0.5 * 1.54056 * np.sqrt(squares) / edge
    there = sine < 0.7
    places = 2.0 * np.degrees(np.arcsin(sine[there]))
    peaks = (heights[there] * np.exp(-0.5 * ((two_theta[:, None] - places) / 0.05) ** 2)).sum(1)
    return np.random.default_rng(0).poisson(100.0 * peaks + 30.0).astype(np.float64)


def measured(edges: list[float], number: list[int], name: list[str] | None = None) -> Measured:
    n = len(edges)
    two_theta = [5.0 + 0.01 * np.arange(8500)] * n
    counts = [scan(edge) for edge in edges]
    groups = torch.arange(n)
    return Measured(two_theta, counts, [1.54056] * n, torch.tensor(number), groups, name or [""] * n)


def test_scores_by_pattern_and_by_group() -> None:
    """Two near copies, one right, and a third that is right in crystal system alone."""
    probability = torch.zeros(3, 230)
    probability[0, 224] = probability[1, 0] = probability[2, 220] = 1.0
    found = scores(probability, torch.tensor([225, 225, 225]), torch.tensor([7, 7, 9]))
    third = 100.0 / 3.0
    assert found == pytest.approx([2 * third, third, third, 75.0, 25.0, 25.0])


def found_in(rows: list[int], score: list[float]) -> Matches:
    none = torch.zeros(1, len(rows))
    return Matches(
        torch.tensor([rows]), torch.tensor([score]), none, none, none, torch.full((1, 230), 1 / 230)
    )


def test_what_was_measured_is_taken_out() -> None:
    formula, family = ["AB", "AB", "CD", "EF", "GH"], ["salt", "", "Salt", "other", "other"]
    known = library(formula, family, [225, 221, 225, 225, 225])
    scans = measured([4.0], [225])

    def gone(rows: list[int], score: list[float], scans: Measured = scans) -> list[int]:
        out = what_was_measured(known, scans, found_in(rows, score))
        return out[0].nonzero().flatten().tolist()

    # The nearest of the right group, its formula and its name; what is alike, too; what is not alike stays.
    assert gone([0, 3], [0.9, 0.3]) == [0, 1, 2]
    assert gone([0, 3], [0.9, 0.8]) == [0, 1, 2, 3, 4]
    assert gone([1, 3], [0.9, 0.2]) == [3, 4]
    assert gone([1, -1], [0.9, 0.0]) == []
    # A mineral that the file names is taken out with its formulas, whatever is found.
    assert gone([1, -1], [0.9, 0.0], measured([4.0], [225], ["Salt"])) == [0, 1, 2]


def rows(network: Tensor | None) -> list[tuple[str, str]]:
    known = library(["AB", "CD"], ["", ""], [225, 221])
    scans = measured([4.0, 4.9], [225, 221])
    alone = ((0.0, 0.0), (1.0, 0.0))
    table = list(answers(matched(known, scans), network, (alone, alone)))
    for library_, who, probability in table:
        # Shares of retrieval are float32.
        one = torch.ones(2, dtype=torch.float64)
        torch.testing.assert_close(probability.sum(1), one, rtol=0.0, atol=1e-6)
        if (library_, who) == ("whole", "retrieval") or (library_, who) == ("whole", "both"):
            assert (probability.argmax(1) + 1).tolist() == [225, 221]
        if (library_, who) == ("without it", "retrieval"):
            assert (probability.argmax(1) + 1).tolist() != [225, 221]
    return [(library_, who) for library_, who, _ in table]


def test_rows_of_the_table() -> None:
    assert rows(None) == [("whole", "retrieval"), ("without it", "retrieval")]
    torch.manual_seed(0)
    predictor = SymmetryPredictor(build_model("small").eval())
    network = network_posterior(predictor, measured([4.0, 4.9], [225, 221]))
    assert network.shape == (2, 230)
    expected = [
        (library_, who) for library_ in ("whole", "without it") for who in ("network", "retrieval", "both")
    ]
    assert rows(network) == expected
    flat = measured([4.0], [225])._replace(intensity=[np.ones(8500)])
    assert network_posterior(predictor, flat).unique().tolist() == [1.0 / 230.0]
