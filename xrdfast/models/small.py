"""The encoder of the `small` and `medium` presets: a hierarchy of patches on a logarithmic axis of d.

Own design, not the published one (`encoder.py`): the same four tasks on the same grid for a thirtieth of the cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xrdfast.bragg import Grid

# On an axis of ln d an isotropic change of the cell is a shift, which strided layers take in their stride. Half-way
# through a short run it stood level with as many bins of 2theta; no gain in accuracy has been shown.
N_BINS = 4096
PATCH = 16
DROPOUT = (
    0.25  # of the features; without it, the held-out loss rose from half-way through 25 minutes of training
)
WIDTHS = (96, 128, 192, 256, 384)  # `small`: 256, 128, 64, 32, 16 patches and one each


class _ShiftedSum(torch.autograd.Function):
    """y[:, :-1, :c] + y[:, 1:, c:]. PyTorch's own backward of the slices fills and copies, 30 % of a training step."""

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        width = y.shape[2] // 2
        return y[:, :-1, :width] + y[:, 1:, width:]

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        n_patterns, length, width = grad.shape
        out = grad.new_empty(n_patterns, length + 1, 2 * width)
        out[:, :-1, :width] = grad
        out[:, -1, :width] = 0
        out[:, 1:, width:] = grad
        out[:, 0, width:] = 0
        return out


class PatchMerge(nn.Module):
    """Convolution of stride s and kernel 2 s over (position, channel) rows: one matrix product and a shifted sum.

    Args:
        in_channels, out_channels: widths.
        stride: s; l positions become ceil(l / s) + 1.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(2 * out_channels, stride * in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.weight, std=(2 * stride * in_channels) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n_patterns, length, in_channels) to (n_patterns, ceil(length / stride) + 1, out_channels)."""
        n_patterns, length, channels = x.shape
        n_patches = -(-length // self.stride) + 2
        before = self.stride // 2
        x = F.pad(x, (0, 0, before, n_patches * self.stride - length - before))
        patches = x.view(n_patterns, n_patches, self.stride * channels)
        if (
            torch.is_grad_enabled() or torch.compiler.is_compiling()
        ):  # an exported graph may meet gradients later
            return _ShiftedSum.apply(patches @ self.weight.T) + self.bias
        # The sum within the products, over all patterns in a row: what crosses from one to the next is left out.
        rows = patches.flatten(0, 1)
        y = patches.new_empty(rows.shape[0], self.bias.shape[0])
        first, second = self.weight.chunk(2)
        torch.addmm(self.bias, rows[:-1], first.T, out=y[:-1])
        y[:-1].addmm_(rows[1:], second.T)
        return y.view(n_patterns, n_patches, self.bias.shape[0])[:, :-1]


class SmallEncoder(nn.Module):
    """Eighth root of the intensity in 4,096 bins of ln d, patches of 16 with a learned position, four mergers.

    Layer norm over the channels of each position, not batch norm, whose statistics mislead on nearly empty patterns.

    Args:
        widths: channels of the patches and after each of the four mergers.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.n_features = 2 * widths[-1]
        grid = Grid()
        middle = torch.from_numpy(grid.two_theta()) + 0.5 * grid.two_theta_step
        log_q = torch.log(torch.sin(torch.deg2rad(middle / 2)))
        share = (log_q - log_q[0]) / (log_q[-1] - log_q[0])
        self.register_buffer("bin", (share * (N_BINS - 1e-6)).long(), persistent=False)
        self.stem = PatchMerge(1, widths[0], PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(N_BINS // PATCH + 1, widths[0]))
        pairs = list(itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(i) for i, _ in pairs)
        self.mergers = nn.ModuleList(PatchMerge(i, o) for i, o in pairs)
        self.norm = nn.LayerNorm(self.n_features)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, intensity: Tensor) -> Tensor:
        """Returns features (n_patterns, n_features) from intensity (n_patterns, 8500), 0 to 100."""
        # Which weak lines are there decides between space groups: at equal size and training (100,000 patterns) the
        # square root of the intensity gave 48 % top-1, the fourth root 54, the eighth 56.
        n_patterns = intensity.shape[0]  # len() would fix the number of patterns of an exported model
        bins = intensity.new_zeros(n_patterns, N_BINS)
        bins = bins.scatter_reduce(1, self.bin.expand(n_patterns, -1), intensity, "amax")
        amplitude = (0.01 * bins).sqrt().sqrt().sqrt()  # roots rise, so they may come after the maximum
        x = F.gelu(self.stem(amplitude[:, :, None]) + self.position)
        for norm, merge in zip(self.norms, self.mergers, strict=True):
            x = F.gelu(merge(norm(x)))
        return self.dropout(self.norm(torch.cat([x.mean(1), x.amax(1)], dim=1)))
