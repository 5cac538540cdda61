"""A plain strided CNN on space groups alone: the baseline that every other preset is measured against.

For comparison only; it has none of the ideas of the other encoders. Layer norm over the channels at each
position replaces batch norm, whose running statistics mislead on nearly empty patterns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (32, 48, 64, 96, 128, 160, 192, 256)  # each layer halves the length: 4250 points become 17
KERNEL = 5
FINAL_POSITIONS = 17


class StridedLayer(nn.Module):
    """Strided convolution, layer norm over channels at each position, ReLU; length l becomes (l + 1) // 2.

    Everything is kept in (position, channel) order: the norm reads contiguous rows, and the convolution sees
    a channels-last image of height one. On one core this took half the time of conv1d with two transposes.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, (1, KERNEL), stride=(1, 2), padding=(0, KERNEL // 2))
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n_patterns, 1, length, in_channels) to (n_patterns, 1, (length + 1) // 2, out_channels)."""
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return F.relu(self.norm(x), inplace=True)


class PlainCnnEncoder(nn.Module):
    """Eight strided convolutions over 0.02° bins, then one linear map of the last 17 positions.

    Args:
        n_features: width of the result.
    """

    def __init__(self, n_features: int = 96) -> None:
        super().__init__()
        self.n_features = n_features
        inputs = (1, *WIDTHS[:-1])
        self.layers = nn.ModuleList(StridedLayer(i, o) for i, o in zip(inputs, WIDTHS, strict=True))
        self.project = nn.Linear(FINAL_POSITIONS * WIDTHS[-1], n_features)

    def forward(self, intensity: Tensor) -> Tensor:
        """Returns features (n_patterns, n_features) from intensity (n_patterns, 8500), 0 to 100."""
        bins = intensity.unflatten(1, (-1, 2)).amax(dim=2)  # 0.02 degree bins
        x = torch.log1p(bins)[:, None, :, None]  # weak lines decide between space groups: compress the range
        for layer in self.layers:
            x = layer(x)
        return F.relu(self.project(x.flatten(1)))
