"""The encoder of the `small` and `medium` presets: a hierarchy of patches on a logarithmic axis of d.

Own design, not the published one (`encoder.py`): the same four tasks on the same grid for a thirtieth of the cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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


class _MergedPatches(torch.autograd.Function):
    """y[i] = rows[i] @ first.T + rows[i + 1] @ second.T + bias; first and second are the halves of the weight.

    Where patches of all patterns are one list of rows, the sum takes place within two products; what the last row of a
    pattern holds crosses into the next and is for nobody. The sums and slices by themselves, and PyTorch's backward of
    them, took 12 % of a step. Rows and weight are of one type, which is kept; autocast has no say inside.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        first, second = weight.chunk(2)
        y = rows.new_empty(rows.shape[0], first.shape[0])
        with torch.autocast(rows.device.type, enabled=False):
            if bias is None:
                torch.mm(rows[:-1], first.T, out=y[:-1])
            else:
                torch.addmm(bias, rows[:-1], first.T, out=y[:-1])
            y[:-1].addmm_(rows[1:], second.T)
        ctx.save_for_backward(rows, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        first, second = weight.chunk(2)
        grad_rows = grad_weight = None
        with torch.autocast(rows.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_rows = grad @ first
                grad_rows[1:].addmm_(grad[:-1], second)
            if ctx.needs_input_grad[1]:
                grad_weight = torch.empty_like(weight)
                of_first, of_second = grad_weight.chunk(2)
                torch.mm(grad.T, rows, out=of_first)
                torch.mm(grad[:-1].T, rows[1:], out=of_second)
        return grad_rows, grad_weight, grad.sum(dim=0) if ctx.needs_input_grad[2] else None


class PatchMerge(nn.Module):
    """Convolution of stride s and kernel 2 s over (position, channel) rows: two matrix products.

    Args:
        in_channels, out_channels: widths.
        stride: s; l positions become ceil(l / s) + 1.

    Note:
        Second derivatives are refused, but for compiled models.
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
        device, weight = x.device.type, self.weight
        # A compiler's graph, and devices that hold no numbers, take plain operations.
        if torch.compiler.is_compiling() or device not in ("cpu", "cuda"):
            first, second = (patches @ weight.T).chunk(2, dim=2)
            return first[:, :-1] + second[:, 1:] + self.bias
        rows = patches.flatten(0, 1)
        # Autocast makes the products of training short, as it would make them of `@`; evaluation keeps its precision,
        # and double always does.
        if torch.is_grad_enabled() and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            y = _MergedPatches.apply(rows.to(dtype), weight.to(dtype), None) + self.bias
        else:
            y = _MergedPatches.apply(rows, weight, self.bias)
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
