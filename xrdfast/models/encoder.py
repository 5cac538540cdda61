"""Encoder of the published XRDecoupler: a local (convolution) and a global (patch attention) branch.

For the faithful `paper` preset: same maths, paddings, masks and dropout as the published architecture, in
readable names. Not for heads and task names (`xrdecoupler.py`), and not for our own encoders (one file each).

Source: Yu et al., "Rethinking Crystal Symmetry Prediction: A Decoupled Perspective", AAAI-26
(arXiv:2511.06976), and the architecture of the authors' published code, which decides where the paper is
silent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xrdfast.ops.peak_attention import encode_patches, peak_attention
from xrdfast.ops.peak_conv import peak_conv, peak_stage
from xrdfast.ops.peak_norm import peak_norm
from xrdfast.ops.peak_plan import Plan, Stage, plan_rows

# The published grid: 8,500 points of 0.01 degrees from 5 degrees two_theta up to, not including, 90 degrees.
N_POINTS = 8500
TWO_THETA_MIN = 5.0
TWO_THETA_STEP = 0.01

LOCAL_WIDTHS = (32, 32, 64, 128, 128, 256, 256, 512, 512, 1024, 1024, 1024, 1024)
N_MAX_POOLS = 4  # the first four pools take the maximum, the others the average
PADDED_POOLS = frozenset({4, 6, 7})  # pools (counted from 0) with one padding zero at each end
DROPOUT_POOLS = frozenset({9, 10, 11})  # pools followed by dropout
MIDDLE_BLOCK, MIDDLE_LENGTH = 6, 67  # the pool after this block gives the map of an auxiliary classifier

PATCH_POINTS = 10
PATCH_CHANNELS = (1, 2, 4, 8, 16)
PATCH_PADDED_POOLS = frozenset({1, 2})
POSITION_FEATURES = 15
FEED_FORWARD_FEATURES = 256
N_ATTENTION_LAYERS = 2
BLANK_PATCH = 1e-5  # a patch whose maximum is below this is no key of the attention


class ResidualBlock(nn.Module):
    """Pool of LeakyReLU(u + BN(conv3(LeakyReLU(BN(conv3(u)))))); u is x, widened where the width changes.

    The modules hold the parameters under their published roles; the work is done on lists of rows, each the
    channels of one position of one pattern (`xrdfast.ops.peak_plan`).
    """

    def __init__(self, in_channels: int, out_channels: int, pool: str) -> None:
        super().__init__()
        changes = in_channels != out_channels
        self.widen = nn.Conv1d(in_channels, out_channels, 1, bias=False) if changes else nn.Identity()
        self.conv1 = nn.Conv1d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm1d(out_channels)
        self.conv2 = nn.Conv1d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm1d(out_channels)
        self.pool = pool
        for conv in (self.conv1, self.conv2):
            # Tap by tap in memory, so that every tap is a matrix as it lies: copying them took 2 ms a pattern.
            conv.weight = nn.Parameter(conv.weight.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0))

    def forward(self, x: Tensor, stage: Stage) -> Tensor:
        """Returns the rows of the next stage, (n_rows, out_channels), from x (n_rows, in_channels)."""
        first, second = (conv.weight.permute(2, 1, 0) for conv in (self.conv1, self.conv2))
        matrix = None if isinstance(self.widen, nn.Identity) else self.widen.weight[..., 0].T
        # Widening has no bias, so it and the convolution are one convolution from the narrow width. Forming that costs
        # as much as it saves on `out_channels` rows.
        folds = matrix is not None and len(x) > second.shape[-1]
        if folds:
            first = (first.mT @ matrix.mT).mT
        if (folds or matrix is None) and self._only_evaluates(x):
            norms = [_scale_and_offset(norm) for norm in (self.norm1, self.norm2)]
            return peak_stage(x, first, second, matrix, norms, stage, pool=self.pool)
        wide = x if matrix is None else x @ matrix
        inner = normalise(self.norm1, peak_conv(x if folds else wide, first, stage.shift), stage)
        return normalise(self.norm2, peak_conv(inner, second, stage.shift), stage, wide, self.pool)

    def _only_evaluates(self, x: Tensor) -> bool:
        """Running statistics, no gradient, and the dtype of the parameters."""
        trains = self.norm1.training or self.norm2.training or torch.is_grad_enabled()
        return not trains and not torch.is_autocast_enabled(x.device.type)


def _scale_and_offset(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """The affine map that a batch norm is with its running statistics."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def normalise(
    norm: nn.BatchNorm1d, h: Tensor, stage: Stage, residual: Tensor | None = None, pool: str | None = None
) -> Tensor:
    """Batch norm and what follows it in `peak_norm`; running statistics as the module itself keeps them."""
    batch = norm.training or norm.running_mean is None
    statistics = None if batch else (norm.running_mean, norm.running_var)
    normed = peak_norm(
        h, norm.weight, norm.bias, stage, statistics=statistics, eps=norm.eps, residual=residual, pool=pool
    )
    _track(norm, normed.mean, normed.var, stage.total)
    return normed.out


@torch.no_grad()
def _track(norm: nn.BatchNorm1d, mean: Tensor, var: Tensor, total: float) -> None:
    """Running statistics after a batch of `total` samples, as the module itself keeps them."""
    if not (norm.training and norm.track_running_stats):
        return
    norm.num_batches_tracked += 1
    momentum = norm.momentum
    if momentum is None:
        momentum = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(var * (total / (total - 1.0)), momentum)


class LocalBranch(nn.Module):
    """Thirteen residual blocks, each followed by a pool of two, from 8,500 points to one vector.

    The second input channel is the sine of the grid's 2θ itself, as published (Bragg's law would take θ).
    Positions far from every peak are computed once for the whole batch (`xrdfast.ops.peak_plan`).

    Attributes:
        room: rows that its first stages are packed into, for a CUDA graph; None (always, but for that): counted.
        overflow: () bool of the last batch, where `room` is set: it had more rows, and its features are of no use.
    """

    def __init__(self, n_features: int, dropout: float) -> None:
        super().__init__()
        self.intensity_norm = nn.BatchNorm1d(1)
        inputs = (2, *LOCAL_WIDTHS[:-1])
        self.blocks = nn.ModuleList(
            ResidualBlock(n_in, n_out, "max" if i < N_MAX_POOLS else "mean")
            for i, (n_in, n_out) in enumerate(zip(inputs, LOCAL_WIDTHS, strict=True))
        )
        self.middle = nn.Identity()  # passes (n_patterns, 67, 256) on to hooks; nothing follows from it here
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(LOCAL_WIDTHS[-1], n_features)
        two_theta = TWO_THETA_MIN + TWO_THETA_STEP * torch.arange(N_POINTS, dtype=torch.float64)
        sine = torch.sin(torch.deg2rad(two_theta)).to(torch.get_default_dtype())
        self.register_buffer("sine", sine, persistent=False)
        self.room: Sequence[int] | None = None
        self.overflow: Tensor | None = None

    def forward(self, intensity: Tensor) -> Tensor:
        """Returns (n_patterns, n_features) from intensity (n_patterns, 8500)."""
        plan = self.plan(intensity)
        self.overflow = plan.overflow
        x = self.input_rows(intensity, plan)
        for i, (block, stage) in enumerate(zip(self.blocks, plan.stages, strict=True)):
            x = block(x, stage)
            if i == MIDDLE_BLOCK:  # dense by now: rows go through the patterns of a position
                self.middle(x.unflatten(0, (MIDDLE_LENGTH, len(intensity))).transpose(0, 1))
            if i in DROPOUT_POOLS:
                x = self.dropout(x)
        return self.project(x)

    def plan(self, intensity: Tensor) -> Plan:
        """Rows of all blocks."""
        return plan_rows(intensity, [int(i in PADDED_POOLS) for i in range(len(self.blocks))], room=self.room)

    def input_rows(self, intensity: Tensor, plan: Plan) -> Tensor:
        """Rows (n_rows, 2) of the first block: normed intensity and sine, zero beyond the grid.

        Only the rows are normed: so no gradient goes through the gather, where many blank rows share a point (10 ms on
        a GPU), nor through the library's norm of one channel (5 ms).
        """
        norm = self.intensity_norm
        if norm.training or norm.running_mean is None:
            mean = intensity.mean()[None]
            var = (intensity - mean).square().mean()[None]  # `var_mean` took a CPU twice as long
            _track(norm, mean, var, float(intensity.numel()))
        else:
            mean, var = norm.running_mean, norm.running_var
        scale = norm.weight * (var + norm.eps).rsqrt()
        normed = torch.addcmul(norm.bias, intensity.flatten()[plan.point] - mean, scale)
        x = torch.stack([normed, self.sine[plan.position]], dim=1)
        return x * (plan.position >= 0)[:, None]


class PatchEmbedding(nn.Module):
    """Four convolutions with average pools between, which turn a patch of 10 points into 16 numbers.

    There is no activation, so the chain is one affine map. It is read off by sending zero and the ten unit
    patches through the chain (11 short rows instead of 850 a pattern) and applied as a matrix product: the
    same numbers and the same gradients up to rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        steps = itertools.pairwise(PATCH_CHANNELS)
        self.convolutions = nn.ModuleList(nn.Conv1d(i, o, 3, padding=1) for i, o in steps)

    def affine(self) -> tuple[Tensor, Tensor]:
        """The map's weight (10, 16) and bias (16)."""
        like = self.convolutions[0].weight
        response = torch.eye(PATCH_POINTS + 1, PATCH_POINTS, dtype=like.dtype, device=like.device)[:, None]
        for i, convolution in enumerate(self.convolutions):
            response = F.avg_pool1d(convolution(response), 2, padding=int(i in PATCH_PADDED_POOLS))
        # (11, 16): the ten unit patches, then the blank one; autocast may have made it bfloat16
        response = response.flatten(1).to(like.dtype)
        return response[:PATCH_POINTS] - response[PATCH_POINTS:], response[PATCH_POINTS]

    def forward(self, patches: Tensor) -> Tensor:
        """Returns (n_patterns, n_patches, 16) from patches (n_patterns, n_patches, 10)."""
        weight, bias = self.affine()
        return patches @ weight + bias


class AttentionLayer(nn.Module):
    """Post-norm transformer layer: single-head attention over the patches, then a feed-forward network."""

    def __init__(self, n_features: int, dropout: float) -> None:
        super().__init__()
        self.query = nn.Linear(n_features, n_features)
        self.key = nn.Linear(n_features, n_features)
        self.value = nn.Linear(n_features, n_features)
        self.output = nn.Linear(n_features, n_features)
        self.attention_norm = nn.LayerNorm(n_features, eps=1e-6)
        self.expand = nn.Linear(n_features, FEED_FORWARD_FEATURES)
        self.contract = nn.Linear(FEED_FORWARD_FEATURES, n_features)
        self.feed_forward_norm = nn.LayerNorm(n_features, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """One layer.

        Blank patches are masked as keys only. The published code sets their scores to -1e9, so a pattern
        without any active patch attends uniformly, and so it does here.

        Args:
            x: (n_patterns, n_patches, n_features).
            active: (n_patterns, n_patches) bool, the patches that may be keys.

        Returns:
            (n_patterns, n_patches, n_features).
        """
        attended = peak_attention(self.query(x), self.key(x), self.value(x), active)
        x = self.attention_norm(self.dropout(self.output(attended)) + x)
        inner = F.leaky_relu(self.expand(x), inplace=True)
        return self.feed_forward_norm(self.dropout(self.contract(inner)) + x)

    def tensors(self) -> list[Tensor]:
        """Weights and biases in the order of `encode_patches`."""
        maps = (self.query, self.key, self.value, self.output, self.attention_norm)
        maps += (self.expand, self.contract, self.feed_forward_norm)
        return [tensor for module in maps for tensor in (module.weight, module.bias)]


class GlobalBranch(nn.Module):
    """Attention over 850 patches of 10 points, then the maximum over all patches.

    Where neither dropout nor gradients are asked for, the whole branch is one operator, `encode_patches`.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.n_patches = N_POINTS // PATCH_POINTS
        self.n_features = PATCH_CHANNELS[-1] + POSITION_FEATURES + 1
        self.patch_embedding = PatchEmbedding()
        self.learned_position = nn.Parameter(torch.randn(self.n_patches, POSITION_FEATURES))
        self.register_buffer("fixed_position", sinusoidal_positions(self.n_patches, self.n_features))
        self.layers = nn.ModuleList(
            AttentionLayer(self.n_features, dropout) for _ in range(N_ATTENTION_LAYERS)
        )

    def forward(self, intensity: Tensor) -> Tensor:
        """Returns (n_patterns, 32) from intensity (n_patterns, 8500)."""
        if not self.training and not torch.is_grad_enabled():
            return self._infer(intensity)
        patches = intensity.unflatten(1, (self.n_patches, PATCH_POINTS))
        patch_maximum = patches.max(dim=2).values
        position = self.learned_position.expand(len(intensity), -1, -1)
        x = torch.cat([self.patch_embedding(patches), position, patch_maximum[..., None]], dim=2)
        x = x + self.fixed_position
        # ~(m < t) and not (m >= t): the published mask lets a NaN patch stay a key.
        active = ~(patch_maximum < BLANK_PATCH)
        for layer in self.layers:
            x = layer(x, active)
        return x.max(dim=1).values

    def _infer(self, intensity: Tensor) -> Tensor:
        weight, bias = self.patch_embedding.affine()
        constant = torch.cat([bias.expand(self.n_patches, -1), self.learned_position], dim=1)
        return encode_patches(
            intensity,
            weight,
            F.pad(constant, (0, 1)) + self.fixed_position,
            [tensor for layer in self.layers for tensor in layer.tensors()],
            blank=BLANK_PATCH,
            norm_eps=self.layers[0].attention_norm.eps,
        )


class XRDecouplerEncoder(nn.Module):
    """The published encoder: 32 local features, then 32 global ones.

    Args:
        n_local_features: features of the local branch.
        dropout: rate after the pools of blocks 10 to 12 and after the attention and feed-forward maps.
    """

    def __init__(self, n_local_features: int = 32, dropout: float = 0.25) -> None:
        super().__init__()
        self.local_branch = LocalBranch(n_local_features, dropout)
        self.global_branch = GlobalBranch(dropout)
        self.n_features = n_local_features + self.global_branch.n_features

    def forward(self, intensity: Tensor) -> Tensor:
        """Returns features (n_patterns, 64) from intensity (n_patterns, 8500), 0 to 100."""
        return torch.cat([self.local_branch(intensity), self.global_branch(intensity)], dim=1)


def sinusoidal_positions(n_positions: int, n_features: int) -> Tensor:
    """Fixed positions PE[p, 2i] = sin(p · 10000^(−2i / n_features)), PE[p, 2i+1] = cos of the same.

    Returns:
        (n_positions, n_features) in the default dtype, computed in float64.

    Source: Vaswani et al., "Attention Is All You Need", section 3.5.
    """
    position = torch.arange(n_positions, dtype=torch.float64)[:, None]
    frequency = torch.exp(
        torch.arange(0, n_features, 2, dtype=torch.float64) * (-math.log(10000.0) / n_features)
    )
    angle = position * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).to(torch.get_default_dtype())
