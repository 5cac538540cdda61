"""Self-distillation losses on their own: against the formulas written out, and on any classifier."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from xrdfast.distillation import (
    AuxiliaryClassifier,
    DRGLoss,
    DSRLoss,
    SelfDistillation,
    _Pointwise,
    softened_divergence,
)


def kl_written_out(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 sum_j p_j (log p_j - log q_j), the mean over rows, in double."""
    p = torch.softmax(teacher.double() / temperature, dim=1)
    q = torch.softmax(student.double() / temperature, dim=1)
    return temperature**2 * (p * (p.log() - q.log())).sum(dim=1).mean()


def test_dsr_equals_the_formula_over_100_batches() -> None:
    generator = torch.Generator().manual_seed(3)
    for n_classes in (2, 7, 230):
        dsr = DSRLoss(temperature=4.0, weight=0.7)
        before = None
        for _ in range(100 if n_classes == 230 else 20):
            logits = (3.0 * torch.randn(9, n_classes, generator=generator)).requires_grad_()
            got = dsr(logits)
            if before is None:
                assert got.item() == 0.0
            else:
                twin = logits.detach().double().requires_grad_()
                want = 0.7 * kl_written_out(before, twin.sort(dim=1).values, 4.0)
                assert got.item() == pytest.approx(want.item(), rel=2e-4, abs=2e-6)
                gradient = torch.autograd.grad(got, logits)[0]
                torch.testing.assert_close(
                    gradient.double(), torch.autograd.grad(want, twin)[0], rtol=1e-4, atol=1e-7
                )
            before = logits.detach().sort(dim=1).values


def test_dsr_ignores_the_order_of_classes_and_is_zero_for_equal_ranks() -> None:
    logits = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    dsr = DSRLoss()
    dsr(logits)
    shuffled = torch.stack([row[torch.randperm(32)] for row in logits]).requires_grad_()
    loss = dsr(shuffled)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert float(torch.autograd.grad(loss, shuffled)[0].abs().max()) < 1e-6


def test_dsr_memory_has_no_gradient() -> None:
    dsr = DSRLoss()
    first = torch.randn(4, 7, requires_grad=True)
    dsr(first)
    assert not dsr.previous.requires_grad
    second = torch.randn(4, 7, requires_grad=True)
    dsr(second).backward()
    assert first.grad is None and float(second.grad.abs().max()) > 0


def test_dsr_of_several_heads_is_that_of_each() -> None:
    generator = torch.Generator().manual_seed(5)
    widths = {"space_group": 230, "crystal_system": 7, "lattice_centering": 6, "point_group": 32}
    together, alone = DSRLoss(), {name: DSRLoss() for name in widths}
    for _ in range(3):
        heads = {name: torch.randn(5, width, generator=generator) for name, width in widths.items()}
        got = together(heads)
        assert got.shape == (4,)
        for value, (name, logits) in zip(got, heads.items(), strict=True):
            torch.testing.assert_close(value, alone[name](logits))


def test_dsr_with_batches_of_other_lengths() -> None:
    """The first rows are compared, as many as the shorter batch has."""
    generator = torch.Generator().manual_seed(6)
    batches = [torch.randn(n, 11, generator=generator) for n in (8, 3, 8, 0, 5)]
    dsr = DSRLoss()
    got = [float(dsr(batch)) for batch in batches]
    ranked = [batch.sort(dim=1).values for batch in batches]
    want = [
        0.0,
        float(kl_written_out(ranked[0][:3], ranked[1], 4.0)),
        float(kl_written_out(ranked[1], ranked[2][:3], 4.0)),
        0.0,
        0.0,
    ]
    assert got == pytest.approx(want, rel=1e-4)


def test_dsr_forgets_and_travels_in_the_state() -> None:
    batch, other = torch.randn(4, 7), torch.randn(4, 7)
    dsr = DSRLoss()
    dsr(batch)
    twin = DSRLoss()
    twin.load_state_dict(dsr.state_dict())
    assert torch.equal(twin(other), dsr(other))
    dsr.forget()
    assert float(dsr(batch)) == 0.0
    with pytest.raises(ValueError, match="logits must have 7 classes as the batch before, got 6"):
        dsr(torch.randn(4, 6))
    dsr.eval()
    memory = dsr.previous.clone()
    assert float(dsr(other)) == 0.0
    assert torch.equal(dsr.previous, memory)


def test_drg_teaches_the_deep_classifier_only() -> None:
    deep, shallow = torch.randn(6, 7, requires_grad=True), torch.randn(6, 7, requires_grad=True)
    labels = torch.randint(0, 7, (6,))
    drg = DRGLoss(temperature=3.0, weight=0.4)
    loss = drg(deep, shallow, labels)
    entropy = nn.functional.cross_entropy(shallow, labels)
    want = entropy.item() + 0.4 * kl_written_out(shallow, deep, 3.0).item()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(shallow.grad, torch.autograd.grad(entropy, shallow)[0])  # of the labels alone
    assert float(deep.grad.abs().max()) > 0


@pytest.mark.parametrize("length", [67, 34, 9, 1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_auxiliary_classifier_in_one_dimension(length: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    auxiliary = AuxiliaryClassifier(8, {"a": 5, "b": 3}, 1, channels_last=channels_last)
    x = torch.randn(4, length, 8) if channels_last else torch.randn(4, 8, length)
    got = auxiliary(x)
    assert {name: tuple(logits.shape) for name, logits in got.items()} == {"a": (4, 5), "b": (4, 3)}
    if channels_last:
        auxiliary.channels_last = False
        torch.testing.assert_close(auxiliary(x.transpose(1, 2))["a"], got["a"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_pointwise_convolution_in_either_layout(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    ours, plain = _Pointwise(6, 10), nn.Conv2d(6, 10, 1, bias=False)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, 4, 5).to(memory_format=layout).requires_grad_()
    upstream = torch.randn(3, 10, 4, 5)
    got, want = (torch.autograd.grad(m(x), (x, m.weight), upstream) for m in (ours, plain))
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("length", [66, 513])
def test_auxiliary_classifier_in_bfloat16(length: int) -> None:
    torch.manual_seed(0)
    auxiliary = AuxiliaryClassifier(8, {"a": 5}, 1, channels_last=True).eval()
    x = torch.randn(4, length, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = auxiliary(x)["a"]
    torch.testing.assert_close(rounded.float(), auxiliary(x)["a"], rtol=0.02, atol=0.01)


def test_auxiliary_classifier_is_the_one_of_the_paper() -> None:
    """Widths c, 2c, 4c, no biases before the linear map, and a gate as large as the map."""
    auxiliary = AuxiliaryClassifier(128, {"logits": 100}, 2)
    pointwise = [
        (m.in_channels, m.out_channels)
        for m in auxiliary.modules()
        if isinstance(m, nn.Conv2d) and m.groups == 1
    ]
    assert pointwise == [(128, 128), (128, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    assert all(m.bias is None for m in auxiliary.modules() if isinstance(m, nn.Conv2d))
    assert auxiliary(torch.randn(2, 128, 16, 16))["logits"].shape == (2, 100)


class TwoHeads(NamedTuple):
    coarse: Tensor
    fine: Tensor
    unused: Tensor | None = None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 6, 5, stride=2)
        self.norm = nn.BatchNorm1d(6)
        self.coarse, self.fine = nn.Linear(6, 3), nn.Linear(6, 9)

    def forward(self, x: Tensor) -> TwoHeads:
        features = torch.relu(self.norm(self.stem(x))).mean(dim=2)
        return TwoHeads(self.coarse(features), self.fine(features))


def test_a_model_of_several_heads_learns_and_is_given_back_clean() -> None:
    torch.manual_seed(0)
    net = Net()
    names = set(net.state_dict())
    statistics = net.norm.running_mean.clone()
    x = torch.randn(30, 1, 64)
    labels = {"coarse": torch.randint(0, 3, (30,)), "fine": torch.randint(0, 9, (30,))}
    wrapped = SelfDistillation(net, example=x[:2], stage="stem", drg=DRGLoss(), dsr=DSRLoss())
    assert torch.equal(net.norm.running_mean, statistics)  # looking at the shapes leaves no trace
    assert net.training
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        wrapped.new_epoch()
        for half in (slice(0, 15), slice(15, 30)):
            loss = wrapped.loss(wrapped(x[half]), {name: y[half] for name, y in labels.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None for p in wrapped.auxiliary.parameters())
    bare = wrapped.detach()
    assert bare is net and set(bare.state_dict()) == names
    assert not net.stem._forward_hooks


def test_a_loss_needs_a_forward() -> None:
    net = Net()
    wrapped = SelfDistillation(net, example=torch.randn(2, 1, 64), stage="stem", drg=DRGLoss())
    output = wrapped(torch.randn(4, 1, 64))
    labels = {"coarse": torch.zeros(4, dtype=torch.long), "fine": torch.zeros(4, dtype=torch.long)}
    wrapped.loss(output, labels)
    with pytest.raises(ValueError, match="the model must have run forward since the last loss"):
        wrapped.loss(output, labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DSRLoss(temperature=0.0), "DSRLoss: temperature must be finite and > 0, got 0.0"),
        (lambda: DSRLoss(weight=-1.0), "DSRLoss: weight must be finite and >= 0, got -1.0"),
        (lambda: DRGLoss(temperature=float("nan")), "DRGLoss: temperature must be finite and > 0, got nan"),
        (lambda: DRGLoss(weight=-0.2), "DRGLoss: weight must be finite and >= 0, got -0.2"),
        (lambda: wrap(with_drg=False), "SelfDistillation: drg, dsr must be at least one, got neither"),
        (
            lambda: wrap(stage="layer9"),
            "SelfDistillation: stage must name a submodule, as stem, norm, coarse, got 'layer9'",
        ),
        (
            lambda: wrap(stage="fine"),
            "SelfDistillation: stage must yield a tensor of 3 or 4 dimensions, fine gave (2, 9)",
        ),
        (
            lambda: wrap(nn.Conv1d(1, 4, 3), stage=""),
            "SelfDistillation: stage must name a submodule",
        ),
        (
            lambda: wrap(nn.Sequential(nn.Conv1d(1, 4, 3)), stage="0"),
            "SelfDistillation: model must give (n_patterns, n_classes) logits, logits is none",
        ),
        (
            lambda: softened_divergence(torch.zeros(2, 7), torch.zeros(2, 6), 4.0),
            "softened_divergence: teacher_logits must be (2, 7) as logits, got (2, 6)",
        ),
    ],
)
def test_bad_settings_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def wrap(net: nn.Module | None = None, stage: str = "stem", with_drg: bool = True) -> SelfDistillation:
    drg = DRGLoss() if with_drg else None
    return SelfDistillation(net or Net(), example=torch.randn(2, 1, 64), stage=stage, drg=drg)
