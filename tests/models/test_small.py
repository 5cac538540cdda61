"""The encoder of the `small` preset: evaluation takes another way to the same numbers as training."""

from __future__ import annotations

import pytest
import torch

from xrdfast.models.small import PatchMerge, SmallEncoder


@pytest.mark.parametrize(
    ("length", "stride", "n_patterns"), [(4096, 16, 3), (257, 2, 2), (66, 2, 1), (7, 3, 5)]
)
def test_merging_without_gradients(length, stride, n_patterns):
    """Nothing crosses from one pattern to the next; in double, so that nothing hides in rounding."""
    torch.manual_seed(0)
    merge = PatchMerge(4, 6, stride).double()
    torch.nn.init.normal_(merge.bias)
    x = torch.randn(n_patterns, length, 4, dtype=torch.float64)
    trained = merge(x)
    with torch.no_grad():
        evaluated = merge(x)
    assert evaluated.shape == trained.shape == (n_patterns, -(-length // stride) + 1, 6)
    torch.testing.assert_close(evaluated, trained.detach(), rtol=1e-12, atol=1e-12)


def test_no_pattern_and_several():
    """Features of a pattern do not depend on which others are in the batch."""
    torch.manual_seed(0)
    encoder = SmallEncoder().eval()
    intensity = 100.0 * torch.rand(3, 8500) ** 8
    with torch.inference_mode():
        together = encoder(intensity)
        alone = torch.cat([encoder(intensity[i : i + 1]) for i in range(3)])
        assert encoder(intensity[:0]).shape == (0, encoder.n_features)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
