"""The baseline: size, blank positions, gradients, and that it sees half-degree details."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from xrdfast.models import build_model
from xrdfast.models.plain_cnn import PlainCnnEncoder, StridedLayer


def test_size():
    model = build_model("plain_cnn")
    assert model.tasks == ("space_group",)
    assert 1.0e6 < sum(p.numel() for p in model.parameters()) < 1.1e6


def test_layer_equals_conv1d_and_layer_norm():
    torch.manual_seed(0)
    layer = StridedLayer(3, 8).double()
    for length in (1, 2, 7, 850):
        x = torch.randn(2, length, 3, dtype=torch.float64)
        plain = F.conv1d(x.transpose(1, 2), layer.conv.weight[:, :, 0], layer.conv.bias, stride=2, padding=2)
        want = F.relu(layer.norm(plain.transpose(1, 2)))
        got = layer(x[:, None])
        assert got.shape == (2, 1, (length + 1) // 2, 8)
        torch.testing.assert_close(got[:, 0], want)


def test_pairs_of_points_share_a_bin():
    torch.manual_seed(0)
    encoder = PlainCnnEncoder().eval()
    left, right, next_bin = torch.zeros(3, 1, 8500)
    left[0, 4000], right[0, 4001], next_bin[0, 4002] = 100.0, 100.0, 100.0
    with torch.no_grad():
        features = encoder(torch.cat([left, right, next_bin]))
    torch.testing.assert_close(features[0], features[1])
    assert not torch.allclose(features[0], features[2])


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = build_model("plain_cnn")
    F.cross_entropy(model(100 * torch.rand(4, 8500)).space_group, torch.arange(4)).backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
