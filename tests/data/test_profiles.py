"""Random measurements: within their ranges, seedable, and fit to be rendered."""

from __future__ import annotations

import pytest
import torch

from xrdfast.data import profiles
from xrdfast.data.profiles import PROFILES, ProfileConfig, draw_profiles
from xrdfast.ops.line_profile import ProfileParameters
from xrdfast.ops.render_patterns import _check_profile


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_seed_gives_one_set() -> None:
    first, again, other = (draw_profiles(50, ProfileConfig(), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.table(), again.table())
    assert not torch.equal(first.table(), other.table())
    assert len({tuple(row) for row in first.table().tolist()}) == 50


def test_every_uniform_number_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    profiles._profiles(
        2, ProfileConfig(), lambda: taken.append(1) or torch.full((2,), 0.5, dtype=torch.float64)
    )
    assert len(taken) == profiles._DRAWS


@pytest.mark.parametrize("name", PROFILES)
def test_draws_lie_in_their_ranges(name: str) -> None:
    config = PROFILES[name]
    drawn = draw_profiles(4000, config, generator())
    assert all(x.shape == (4000,) and x.dtype == torch.float64 for x in drawn)
    for field in ProfileParameters._fields:
        bounds = getattr(config, field, None)
        if isinstance(bounds, tuple) and field not in ("caglioti_v", "march_r", "hump_height"):
            values = getattr(drawn, field)
            assert bounds[0] <= float(values.min()) <= float(values.max()) <= bounds[1], field
    _check_profile(drawn.table(), 0.0, 180.0)  # any grid may render them
    textured = drawn.march_r != 1.0
    assert float(textured.double().mean()) == pytest.approx(config.texture_share, abs=0.05)
    assert float((drawn.second_ratio > 0.0).double().mean()) == pytest.approx(config.doublet_share, abs=0.05)
    behind_graphite = [0.7995] if config.monochromator_share else []
    assert torch.unique(drawn.polarisation).tolist() == pytest.approx([*behind_graphite, 1.0], abs=1e-3)
