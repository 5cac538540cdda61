"""The encoder of the `small` preset: its merging of patches against plain operations, and batches of any size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xrdfast.models.small import PatchMerge, SmallEncoder


def plain_merge(merge: PatchMerge, x: Tensor) -> Tensor:
    """A convolution of stride s and kernel 2 s, as PyTorch has it."""
    stride, length, channels = merge.stride, x.shape[1], x.shape[2]
    kernel = torch.cat([w.view(-1, stride, channels) for w in merge.weight.chunk(2)], dim=1).movedim(2, 1)
    before, n_patches = stride // 2, -(-length // stride) + 2
    padded = F.pad(x.movedim(2, 1), (before, n_patches * stride - length - before))
    return F.conv1d(padded, kernel, merge.bias, stride=stride).movedim(1, 2)


@pytest.mark.parametrize(
    ("length", "stride", "n_patterns"), [(4096, 16, 3), (257, 2, 2), (66, 2, 1), (7, 3, 5), (7, 2, 0)]
)
def test_merging_is_a_convolution(length, stride, n_patterns):
    """Values and all gradients; nothing crosses from one pattern to the next. In double: nothing hides in rounding."""
    torch.manual_seed(0)
    merge = PatchMerge(4, 6, stride).double()
    torch.nn.init.normal_(merge.bias)
    x = torch.randn(n_patterns, length, 4, dtype=torch.float64, requires_grad=True)
    given = [x, merge.weight, merge.bias]
    merged, expected = merge(x), plain_merge(merge, x)
    assert merged.shape == (n_patterns, -(-length // stride) + 1, 6)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(merged)
    ours, theirs = (torch.autograd.grad(y, given, upstream) for y in (merged, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_merging_under_autocast():
    """Products of training are short, sums and parameters' gradients are not; evaluation and doubles stay exact."""
    torch.manual_seed(0)
    merge = PatchMerge(8, 16)
    x = torch.randn(3, 65, 8, requires_grad=True)
    exact = merge(x)
    compiled = torch.compile(merge, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = merge(x)
        assert rounded.dtype == compiled(x).dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(merge(x), exact)
        doubled = copy.deepcopy(merge).double()(x.double())
    assert doubled.dtype == torch.float64
    torch.testing.assert_close(doubled.float(), exact)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
    rounded.square().sum().backward()
    assert merge.weight.grad.dtype == merge.bias.grad.dtype == x.grad.dtype == torch.float32


def test_backward_inside_autocast_keeps_the_precision_of_the_forward():
    torch.manual_seed(0)
    merge = PatchMerge(8, 16)
    x = torch.randn(3, 65, 8, requires_grad=True)
    (want,) = torch.autograd.grad(merge(x).square().sum(), x)
    loss = merge(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(loss, x)
    assert torch.equal(got, want)


def test_merging_goes_on_as_other_layers_do():
    """Its result can be changed in place, it takes tensors without data, and says so where it cannot differentiate."""
    merge = PatchMerge(4, 6)
    x = torch.randn(2, 33, 4, requires_grad=True)
    merge(x).relu_().sum().backward()
    assert merge.to("meta")(torch.empty(2, 33, 4, device="meta")).shape == (2, 18, 6)
    (grad,) = torch.autograd.grad(PatchMerge(4, 6)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_merging_compiled():
    """What torch.compile and exports see are plain operations with the same result."""
    torch.manual_seed(0)
    merge = PatchMerge(4, 6)
    x = torch.randn(2, 33, 4)
    compiled = torch.compile(merge, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), merge(x))


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
