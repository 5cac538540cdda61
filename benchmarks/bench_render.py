"""Speed of rendering batches, one core: sticks, and patterns as measured."""

from __future__ import annotations

import torch

from benchmarks.paired import seconds
from tests.ops.pattern_batches import pattern_batch
from xrdfast.bragg import Grid
from xrdfast.data.profiles import PROFILES, draw_profiles
from xrdfast.ops.render import render_sticks
from xrdfast.ops.render_patterns import render_patterns

_BATCH, _FAMILIES, _WAVELENGTH = 512, 150, 1.54056


def families() -> tuple[torch.Tensor, ...]:
    """A batch in which every pattern has 150 families."""
    batch = pattern_batch(_BATCH, n_families=2 * _FAMILIES)
    offset = torch.arange(_BATCH + 1) * _FAMILIES
    some = torch.arange(int(offset[-1])) % len(batch[1])
    return offset, batch[1][some], batch[2][some], batch[3][some], *batch[4:]


def test_sticks(benchmark, row, threads) -> None:
    threads(1)
    rows = families()[:6]
    call = lambda: render_sticks(*rows, wavelength=_WAVELENGTH, grid=Grid())  # noqa: E731
    call()
    took = min(seconds(call) for _ in range(10))
    benchmark.pedantic(call, rounds=5)
    row(
        "render, sticks, 150 families, 8,500 points, one core",
        f"{_BATCH / took:,.0f} patterns/s",
        "reported",
        True,
    )


def test_augmented_patterns(benchmark, row, threads) -> None:
    """The laboratory's ranges: doublet, texture, noise, clip and patches, all drawn anew for every pattern."""
    threads(1)
    rows = families()
    generator, identity = torch.Generator().manual_seed(0), torch.arange(_BATCH)

    def call() -> None:
        profile = draw_profiles(_BATCH, PROFILES["lab"], generator)
        render_patterns(*rows, profile, identity, seed=1, wavelength=_WAVELENGTH, grid=Grid())

    call()
    took = min(seconds(call) for _ in range(10))
    benchmark.pedantic(call, rounds=5)
    speed = _BATCH / took
    what = "render, augmented patterns, 150 families, 8,500 points, one core"
    row(what, f"{speed:,.0f} patterns/s", "≥ 5,000 patterns/s", speed >= 5000)
