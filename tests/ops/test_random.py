"""Counter-based random numbers against published vectors, and Poisson counts against scipy's distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from xrdfast.ops import random


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_published_vectors(counter, key, words: str) -> None:
    """kat_vectors of Random123, philox4x32 with 10 rounds."""
    index, stream, seed_high, pattern_high = counter
    got = random.philox(
        torch.tensor([index]), stream, pattern_id=pattern_high << 32 | key[1], seed=seed_high << 32 | key[0]
    )
    assert " ".join(f"{word:08x}" for word in got[:, 0].tolist()) == words


def test_words_are_uniform_and_differ_by_point_pattern_and_seed() -> None:
    words = torch.stack(
        [random.noise_words(8501, pattern, seed) for pattern in (0, 1) for seed in (0, 2**40)]
    )
    assert len(torch.unique(words)) > 0.9999 * words.numel()
    assert stats.kstest(random.unit(words).flatten().numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(random.noise_words(100, 3, 5), random.noise_words(8500, 3, 5)[:100])


@pytest.mark.parametrize("mean", [0.0, 0.02, 0.7, 3.0, 9.99, 10.01, 14.0, 40.0, 333.3, 5e3, 1e5])
def test_counts_follow_the_poisson_law(mean: float) -> None:
    n = 400_000
    word = random.noise_words(n, pattern_id=7, seed=int(mean * 100))
    counts = random.poisson(torch.full((n,), mean, dtype=torch.float64), word).numpy()
    assert (counts == np.round(counts)).all()
    if mean == 0.0:
        assert not counts.any()
        return
    assert abs(counts.mean() - mean) < 5 * np.sqrt(mean / n)
    assert abs(counts.var() / mean - 1.0) < 5 * np.sqrt((2.0 + 1.0 / mean) / n)
    law = stats.poisson(mean)
    edges = np.unique(law.ppf(np.linspace(0.001, 0.999, 60)))
    expected = np.diff(np.concatenate([[0.0], law.cdf(edges), [1.0]])) * n
    observed = np.bincount(np.searchsorted(edges, counts), minlength=len(expected))
    keep = expected > 5
    assert (
        stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue
        > 1e-3
    )


def test_large_means_are_the_exact_quantile_nearly_everywhere() -> None:
    """Against scipy's inverse distribution function, over both tails."""
    word = random.noise_words(20_000, 1, 1)
    for mean, share in ((10.0, 3e-3), (100.0, 1e-3), (1e4, 1e-4)):
        counts = random.poisson(torch.full((len(word),), mean, dtype=torch.float64), word).numpy()
        exact = stats.poisson.ppf(random.unit(word).numpy(), mean)
        assert np.abs(counts - exact).max() <= 1
        assert (counts != exact).mean() <= share
