"""The `paper` encoder equals the published architecture: outputs, gradients, sizes and cost."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.models.published_reference import PositionEmbedding, grid_angle, published_logits, published_models
from xrdfast.models import build_model
from xrdfast.models.encoder import PatchEmbedding, sinusoidal_positions
from xrdfast.models.published_checkpoint import published_name


def close(got: torch.Tensor, want: torch.Tensor, rtol: float = 1e-10) -> None:
    scale = want.abs().max().item() or 1.0
    assert (got - want).abs().max().item() <= rtol * scale


@pytest.mark.parametrize("training", [False, True])
def test_forward_equals_published(paper_pair, patterns, training):
    models, own = paper_pair
    for module in (*models.values(), own):
        module.train(training)
    with torch.no_grad():
        want = published_logits(models, patterns)
        got = own(patterns)._asdict()
    for task in want:
        close(got[task], want[task])


def test_gradients_equal_published(paper_pair, patterns):
    models, own = paper_pair
    for module in (*models.values(), own):
        module.train()
        module.zero_grad()
    intensity = patterns.clone().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    want, got = published_logits(models, intensity), own(intensity)._asdict()
    cotangent = {t: torch.randn(want[t].shape, generator=generator, dtype=torch.float64) for t in want}
    sum((cotangent[t] * want[t]).sum() for t in want).backward()
    want_input, intensity.grad = intensity.grad, None
    sum((cotangent[t] * got[t]).sum() for t in got).backward()
    close(intensity.grad, want_input, rtol=1e-9)
    theirs = {f"{part}.{name}": p for part, m in models.items() for name, p in m.named_parameters()}
    largest = max(p.grad.abs().max().item() for p in theirs.values() if p.grad is not None)
    for name, parameter in own.named_parameters():
        want = theirs[published_name(name)].grad.flatten()
        # The second term is for the keys' bias: it shifts all scores alike, so its gradient is rounding.
        bound = 1e-9 * want.abs().max().item() + 1e-14 * largest
        assert (parameter.grad.flatten() - want).abs().max().item() <= bound, name


def test_pattern_without_active_patch_is_finite_and_uniform(paper_pair):
    models, own = paper_pair
    own.eval()
    blank = torch.zeros(1, 8500, dtype=torch.float64)
    mixed = torch.cat([blank, torch.full_like(blank, 50.0)])
    with torch.no_grad():
        close(own.encode(mixed)[:1], own.encode(blank))
        models["rep"].eval()
        close(own.encode(blank), models["rep"](blank, grid_angle(1, torch.float64)))


def test_an_empty_batch_has_no_features():
    model = build_model("paper").eval()
    with torch.no_grad():
        assert model.encoder.local_branch(torch.zeros(0, 8500)).shape == (0, 32)


def test_patch_embedding_is_the_chain_of_convolutions():
    torch.manual_seed(0)
    embedding = PatchEmbedding().double()
    patches = 100 * torch.rand(3, 850, 10, dtype=torch.float64)
    x = patches.view(-1, 1, 10)
    for convolution, padding in zip(embedding.convolutions, (0, 1, 1, 0), strict=True):
        x = F.avg_pool1d(convolution(x), 2, padding=padding)
    close(embedding(patches), x.view(3, 850, 16), rtol=1e-13)


def test_fixed_positions_equal_published():
    close(sinusoidal_positions(850, 32), PositionEmbedding().position_embedding, rtol=1e-6)


def test_dropout_places():
    """Three in the local branch, two in each attention layer, all at the published rate."""
    model = build_model("paper").train()
    places = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert places == [0.25] * 3  # one module a branch or layer, used at each of its places
    torch.manual_seed(0)
    drops = []
    original = F.dropout

    def counting(x, p, training, inplace=False):
        drops.append(tuple(x.shape[1:]))
        return original(x, p, training, inplace)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "dropout", counting)
        model(torch.rand(2, 8500))
    assert drops == [(1024,)] * 3 + [(850, 32)] * 4  # rows of the local branch: one a position and pattern


def test_parameters_and_flops():
    """30.25 M parameters and 1.93 GFLOP a pattern; ours does no more than the transcription, and less on sticks."""
    model, published = build_model("paper").eval(), published_models()
    n_parameters = sum(p.numel() for p in model.parameters())
    assert n_parameters == sum(
        p.numel() for m in published.values() for p in m.parameters() if p.requires_grad
    )
    assert 30.2e6 < n_parameters < 30.3e6

    def patch_flops(intensity, patch_weight, position, layers, *_, **__) -> int:
        """With all patches active, and all products done."""
        patch_products = 2 * math.prod(position[:1] + patch_weight)
        score_products = 4 * position[0] ** 2 * position[1]
        maps = sum(2 * position[0] * math.prod(shape) for shape in layers if len(shape) == 2)
        return intensity[0] * (patch_products + len(layers) // 16 * score_products + maps)

    counted = {  # torch doesn't count our operators
        torch.ops.xrdfast.encode_patches: patch_flops,
        torch.ops.xrdfast.peak_conv: lambda x, weight, *_, **__: 2 * x[0] * math.prod(weight),
        torch.ops.aten.mm: lambda *_, **__: (
            0
        ),  # those inside peak_conv; it leaves out the widening of the residuals
    }
    dense, sparse = torch.rand(2, 8500), torch.zeros(8, 8500)
    sparse[:, ::120] = 1.0
    gflop = {}
    for name, intensity in (("dense", dense), ("sparse", sparse)):
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counted) as counter:
            model(intensity)
        gflop[name] = counter.get_total_flops() / len(intensity) / 1e9
    for module in published.values():
        module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        published_logits(published, dense)
    want = counter.get_total_flops() / len(dense) / 1e9
    assert 1.92 < want < 1.94
    # Widening is folded into a convolution where that is a gain, and positions far from every peak are left out.
    assert gflop["sparse"] < 0.9 * gflop["dense"] < 0.9 * want


def test_the_middle_map_is_that_after_the_seventh_block():
    """(n_patterns, 67, 256), by pattern and position: each pattern's own whatever the batch."""
    branch = build_model("paper").double().eval().encoder.local_branch
    seen = []
    branch.middle.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    x = torch.zeros(3, 8500, dtype=torch.float64)
    x[:, ::211] = torch.rand(3, 41, dtype=torch.float64)
    with torch.no_grad():
        for batch in (x, x[1:2]):
            branch(batch)
    assert seen[0].shape == (3, 67, 256)
    torch.testing.assert_close(seen[0][1], seen[1][0], rtol=1e-9, atol=1e-12)


class Called(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_packed_rows_are_normed_as_by_the_module():
    """Values, gradients and running statistics; no gradient through the gather, which is slow on a GPU."""
    x = torch.zeros(3, 8500, dtype=torch.float64)
    x[:, ::211] = 100 * torch.rand(3, 41, dtype=torch.float64)
    branch = build_model("paper").double().train().encoder.local_branch
    norm, plan = copy.deepcopy(branch.intensity_norm), branch.plan(x)
    assert plan.stages[0].count is not None
    with torch.no_grad():
        for module in (branch.intensity_norm, norm):
            module.weight.fill_(0.7)
            module.bias.fill_(-0.2)
    for training in (True, False):
        branch.train(training)
        norm.train(training)
        got = branch.input_rows(x, plan)
        want = norm(x[:, None]).flatten()[plan.point] * (plan.position >= 0)
        torch.testing.assert_close(got[:, 0], want, rtol=1e-11, atol=1e-12)
        cotangent = torch.randn(len(want), dtype=torch.float64)
        learned = [branch.intensity_norm.weight, branch.intensity_norm.bias]
        with Called() as called:
            mine = torch.autograd.grad((got[:, 0] * cotangent).sum(), learned)
        assert not [name for name in called.names if "index" in name]
        theirs = torch.autograd.grad((want * cotangent).sum(), [norm.weight, norm.bias])
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(branch.intensity_norm.state_dict(), norm.state_dict())
