"""A rival: the published modules in evaluation mode, as well as eager PyTorch alone can run them.

Batch norms folded into convolutions, channels-last maps, scaled_dot_product_attention with a mask, in-place
activations. Not the package, and nothing sparse: every position and every key is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_weights

from tests.models.published_reference import EncoderLayer, ResBlock1D, ResTcn, XRDecouplerEncoder


class TunedEager(nn.Module):
    """Logits of the published modules, from copies of their weights."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        super().__init__()
        encoder: XRDecouplerEncoder = models["rep"]
        self.local = _TunedLocal(encoder.conv_module)
        self.attention = encoder.att
        self.layers = nn.ModuleList(_TunedLayer(layer) for layer in encoder.att.att.encoder_layers)
        self.heads = nn.ModuleDict({name: models[name] for name in ("sp", "lt", "cs", "pg")})

    def forward(self, intensity: Tensor, sine: Tensor) -> dict[str, Tensor]:
        """Logits by the published task names, from (n_patterns, 8500) and the sine of the angles (8500,)."""
        n_patterns = len(intensity)
        maximum = intensity.view(n_patterns, 850, 10).amax(dim=2)
        learned = self.attention.embed.weight.expand(n_patterns, -1, -1)
        x = torch.cat([self.attention.patch_conv(intensity), learned, maximum[..., None]], dim=2)
        x = self.attention.att.positionEnbeding(x)
        active = ~(maximum < 1e-5)
        active = (active | ~active.any(dim=1, keepdim=True))[:, None, None, :]
        for layer in self.layers:
            x = layer(x, active)
        features = torch.cat([self.local(intensity, sine), x.amax(dim=1)], dim=1)
        return {name: head(features) for name, head in self.heads.items()}


class _TunedLocal(nn.Module):
    def __init__(self, published: ResTcn) -> None:
        super().__init__()
        self.intensity_norm = published.intensity_norm
        steps: list[nn.Module] = []
        for module in published.TCN:
            if isinstance(module, ResBlock1D):
                steps.append(_TunedBlock(module))
            elif isinstance(module, nn.MaxPool1d):
                steps.append(nn.MaxPool2d((1, 2)))
            elif isinstance(module, nn.AvgPool1d):
                steps.append(nn.AvgPool2d((1, 2), padding=(0, *module.padding)))
            elif isinstance(module, nn.Linear):
                steps += [nn.Flatten(), module]
        self.steps = nn.Sequential(*steps)

    def forward(self, intensity: Tensor, sine: Tensor) -> Tensor:
        normed = self.intensity_norm(intensity[:, None])
        x = torch.stack([normed, sine.expand_as(normed)], dim=-1)  # (n, 1, 8500, 2)
        return self.steps(x.permute(0, 3, 1, 2))  # channels last in memory


class _TunedBlock(nn.Module):
    def __init__(self, published: ResBlock1D) -> None:
        super().__init__()
        widen = published.pre
        self.widen = None if isinstance(widen, nn.Identity) else _as_2d(widen.weight, None)
        conv1, norm1, _, conv2, norm2 = published.conv
        self.conv1, self.conv2 = _folded(conv1, norm1), _folded(conv2, norm2)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.widen is None else self.widen(x)
        inner = F.leaky_relu_(self.conv1(wide))
        return F.leaky_relu_(self.conv2(inner).add_(wide))


class _TunedLayer(nn.Module):
    def __init__(self, published: EncoderLayer) -> None:
        super().__init__()
        self.published = published

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        layer = self.published
        query, key, value = (m(x)[:, None] for m in (layer.mha.WQ, layer.mha.WK, layer.mha.WV))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=active)[:, 0]
        x = layer.layernorm1(layer.mha.linear(attended) + x)
        inner = F.leaky_relu_(layer.ffn.linear1(x))
        return layer.layernorm2(layer.ffn.linear2(inner) + x)


def _folded(convolution: nn.Conv1d, norm: nn.BatchNorm1d) -> nn.Conv2d:
    return _as_2d(
        *fuse_conv_bn_weights(
            convolution.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    )


def _as_2d(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    n_out, n_in, width = weight.shape
    convolution = nn.Conv2d(n_in, n_out, (1, width), padding=(0, width // 2), bias=bias is not None)
    with torch.no_grad():
        convolution.weight.copy_(weight[:, :, None])
        if bias is not None:
            convolution.bias.copy_(bias)
    return convolution.to(memory_format=torch.channels_last)
