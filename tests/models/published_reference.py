"""A literal transcription of the published XRDecoupler and of its training loop, as an oracle for tests.

Plain PyTorch, independent of the package: module layout and names of the published checkpoints, 850 × 850
scores written out, two encoder forwards a step. Slow on purpose; never used outside tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

N_POINTS = 8500
TASKS = ("sp", "lt", "cs", "pg")
TASK_NAMES = {
    "sp": "space_group",
    "lt": "lattice_centering",
    "cs": "crystal_system",
    "pg": "point_group",
}


class ResBlock1D(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.pre = nn.Conv1d(width_in, width, 1, bias=False) if width_in != width else nn.Identity()
        self.conv = nn.Sequential(
            nn.Conv1d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm1d(width),
            nn.LeakyReLU(),
            nn.Conv1d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm1d(width),
        )
        self.relu = nn.LeakyReLU()

    def forward(self, x: Tensor) -> Tensor:
        u = self.pre(x)
        return self.relu(u + self.conv(u))


class ResTcn(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.intensity_norm = nn.BatchNorm1d(1)
        steps = [
            (2, 32, nn.MaxPool1d(2, 2), False),
            (32, 32, nn.MaxPool1d(2, 2), False),
            (32, 64, nn.MaxPool1d(2, 2), False),
            (64, 128, nn.MaxPool1d(2, 2), False),
            (128, 128, nn.AvgPool1d(2, 2, 1), False),
            (128, 256, nn.AvgPool1d(2, 2), False),
            (256, 256, nn.AvgPool1d(2, 2, 1), False),
            (256, 512, nn.AvgPool1d(2, 2, 1), False),
            (512, 512, nn.AvgPool1d(2, 2), False),
            (512, 1024, nn.AvgPool1d(2, 2), True),
            (1024, 1024, nn.AvgPool1d(2, 2), True),
            (1024, 1024, nn.AvgPool1d(2, 2), True),
            (1024, 1024, nn.AvgPool1d(2, 2), False),
        ]
        layers: list[nn.Module] = []
        for width_in, width, pool, drops in steps:
            layers += [ResBlock1D(width_in, width), pool]
            if drops:
                layers.append(nn.Dropout(dropout))
        self.TCN = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 32))

    def forward(self, intensity: Tensor, angle: Tensor) -> Tensor:
        normed = self.intensity_norm(intensity.view(len(intensity), 1, -1))
        sine = torch.sin(angle.view(len(angle), 1, -1) * (math.pi / 180))
        return self.TCN(torch.cat([normed, sine], dim=1))


class PatchConvModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 2, (1, 3), 1, (0, 1)),
            nn.AvgPool2d((1, 2), (1, 2)),
            nn.Conv2d(2, 4, (1, 3), 1, (0, 1)),
            nn.AvgPool2d((1, 2), (1, 2), (0, 1)),
            nn.Conv2d(4, 8, (1, 3), 1, (0, 1)),
            nn.AvgPool2d((1, 2), (1, 2), (0, 1)),
            nn.Conv2d(8, 16, (1, 3), 1, (0, 1)),
            nn.AvgPool2d((1, 2), (1, 2)),
        )

    def forward(self, intensity: Tensor) -> Tensor:
        return self.conv(intensity.view(len(intensity), 1, 850, 10)).squeeze(3).transpose(1, 2)


class PositionEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        table = torch.zeros(850, 32, dtype=torch.float64)
        for i in range(16):
            phase = torch.arange(850, dtype=torch.float64) * 10000 ** (-2 * i / 32)
            table[:, 2 * i], table[:, 2 * i + 1] = torch.sin(phase), torch.cos(phase)
        self.position_embedding = nn.Parameter(table.float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position_embedding


class MultiHeadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.WQ, self.WK, self.WV = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor, blank: Tensor) -> Tensor:
        scores = self.WQ(x) @ self.WK(x).transpose(1, 2) / math.sqrt(32)
        weights = torch.softmax(scores.masked_fill(blank[:, None, :], -1e9), dim=-1)
        return self.linear(weights @ self.WV(x))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(32, 256), nn.Linear(256, 32)
        self.relu = nn.LeakyReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.relu(self.linear1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.mha, self.dropout1 = MultiHeadAttention(), nn.Dropout(dropout)
        self.layernorm1 = nn.LayerNorm(32, eps=1e-6)
        self.ffn, self.dropout2 = FeedForward(), nn.Dropout(dropout)
        self.layernorm2 = nn.LayerNorm(32, eps=1e-6)

    def forward(self, x: Tensor, blank: Tensor) -> Tensor:
        x = self.layernorm1(self.dropout1(self.mha(x, blank)) + x)
        return self.layernorm2(self.dropout2(self.ffn(x)) + x)


class TransformerEncoder(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.positionEnbeding = PositionEmbedding()  # sic
        self.encoder_layers = nn.ModuleList([EncoderLayer(dropout), EncoderLayer(dropout)])

    def forward(self, x: Tensor, blank: Tensor) -> Tensor:
        x = self.positionEnbeding(x)
        for layer in self.encoder_layers:
            x = layer(x, blank)
        return x


class AttentionModule(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(850, 15)
        self.index = nn.Parameter(torch.arange(850)[None], requires_grad=False)
        self.patch_conv = PatchConvModule()
        self.att = TransformerEncoder(dropout)

    def forward(self, intensity: Tensor) -> Tensor:
        maximum = intensity.view(-1, 850, 10).max(dim=-1).values
        learned = self.embed(self.index.repeat(len(intensity), 1))
        x = torch.cat([self.patch_conv(intensity), learned, maximum[..., None]], dim=-1)
        return self.att(x, maximum < 1e-5).max(dim=1).values


class XRDecouplerEncoder(nn.Module):
    def __init__(self, dropout: float = 0.25) -> None:
        super().__init__()
        self.conv_module = ResTcn(dropout)
        self.att = AttentionModule(dropout)

    def forward(self, intensity: Tensor, angle: Tensor) -> Tensor:
        return torch.cat([self.conv_module(intensity, angle), self.att(intensity)], dim=-1)


class _Cls(nn.Module):
    widths: tuple[int, ...]

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Sequential(
            *(nn.Linear(i, o) for i, o in zip(self.widths[:-1], self.widths[1:], strict=True))
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.cls(features)


class ClsSp(_Cls):
    widths = (64, 128, 256, 230)


class ClsLt(_Cls):
    widths = (64, 32, 16, 6)


class ClsCs(_Cls):
    widths = (64, 32, 16, 7)


class ClsPg(_Cls):
    widths = (64, 32, 32)


def published_models(dropout: float = 0.25) -> dict[str, nn.Module]:
    """The five modules, as the published training loop makes and saves them."""
    return {"rep": XRDecouplerEncoder(dropout), "sp": ClsSp(), "lt": ClsLt(), "cs": ClsCs(), "pg": ClsPg()}


def grid_angle(n_patterns: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """(n_patterns, 8500) 2θ of the published grid, degrees."""
    point = torch.arange(N_POINTS, dtype=torch.float64, device=device)
    return (5 + 0.01 * point).to(dtype).expand(n_patterns, -1)


def published_logits(models: dict[str, nn.Module], intensity: Tensor) -> dict[str, Tensor]:
    """Logits by our task names."""
    features = models["rep"](intensity, grid_angle(len(intensity), intensity.dtype))
    return {TASK_NAMES[t]: models[t](features) for t in TASKS}


def published_step(
    models: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    intensity: Tensor,
    labels: dict[str, Tensor],
) -> dict[str, float]:
    """One step of the published loop: a first forward for the tasks' gradients, a second one for the update.

    Args:
        models: the five modules, in train mode.
        optimizer: over all their parameters.
        intensity: (n_patterns, 8500).
        labels: by our task names, (n_patterns,) class indices.

    Returns:
        Losses of the second forward, by our task names.
    """
    angle = grid_angle(len(intensity), intensity.dtype, intensity.device)
    cross_entropy = nn.CrossEntropyLoss()
    features = models["rep"](intensity, angle).detach().clone().requires_grad_()
    for t in TASKS:  # the gradients that a solver would get
        optimizer.zero_grad()
        cross_entropy(models[t](features), labels[TASK_NAMES[t]]).backward()
        features.grad = None
    optimizer.zero_grad()
    features = models["rep"](intensity, angle)
    losses = {TASK_NAMES[t]: cross_entropy(models[t](features), labels[TASK_NAMES[t]]) for t in TASKS}
    sum(losses.values()).backward()  # the plain sum: every task weighs 1
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}
