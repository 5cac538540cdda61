"""The coarse comparison of scans with known structures: what it makes of weak points and of lines out of range."""

from __future__ import annotations

import torch

from xrdfast.data.known_bins import GRID, CoarseLines, on_axis, without_weak


def cubic(edges: list[float]) -> CoarseLines:
    """Structures of one strong line, 100, of cubic cells."""
    n = len(edges)
    metric = torch.zeros(n, 6, dtype=torch.float64)
    metric[:, :3] = torch.tensor(edges, dtype=torch.float64)[:, None] ** -2
    return CoarseLines(
        torch.arange(n + 1), torch.tensor([[1, 0, 0]] * n, dtype=torch.int16), torch.full((n,), 10.0), metric
    )


def test_weak_points_count_little_and_strong_ones_as_they_are() -> None:
    kept = without_weak(torch.tensor([0.0, 0.1, 1.0, 100.0]))
    torch.testing.assert_close(kept, torch.tensor([0.0, 0.01 / 1.1, 0.5, 100.0 / 1.01]))


def test_structures_without_lines_in_the_measured_range_are_unlike() -> None:
    """A line just beyond the range, whose blurred foot reaches into it, is no reason for a large cosine."""
    intensity = torch.zeros(1, GRID.n_points)
    intensity[0, 2000:2010] = 100.0  # at 25 degrees: d = 3.56
    moved, span = on_axis(intensity, torch.tensor([[1500, 2500]], dtype=torch.int32))
    cosine, _ = cubic([3.56, 2.9, 4.6, 2.965, 1.5]).compare(moved, span)  # 30 degrees end the range: d = 2.98
    assert float(cosine[0, 0]) > 0.9
    assert bool((cosine <= 1.0 + 1e-5).all())
    assert cosine[0, [1, 4]].tolist() == [0.0, 0.0]
