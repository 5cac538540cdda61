"""Convolution stages on lists of rows: the first two blocks, and where packed rows stop being a gain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.paired import paired
from benchmarks.real_patterns import stick_batch
from tests.models.published_reference import ResTcn, grid_angle
from xrdfast.models.encoder import PADDED_POOLS, LocalBranch
from xrdfast.ops import peak_plan
from xrdfast.ops.peak_plan import plan_rows

PADDINGS = [int(i in PADDED_POOLS) for i in range(13)]


def first_blocks(branch: LocalBranch, intensity: Tensor, n_blocks: int, packed_stages: int) -> Tensor:
    """Rows after the first blocks, from the intensities, plan included."""
    plan = plan_rows(intensity, PADDINGS[:n_blocks], packed_stages=packed_stages)
    x = branch.input_rows(intensity, plan)
    for block, stage in zip(branch.blocks, plan.stages, strict=False):
        x = block(x, stage)
    return x


@pytest.mark.parametrize("name", ["inorganic_mp", "coremof"])
def test_first_two_blocks(benchmark, row, threads, shared_data, name: str) -> None:
    """Forward and backward in train mode, batch 64, two threads, against the published modules."""
    threads(2)
    torch.set_flush_denormal(True)
    intensity = stick_batch(shared_data, name)
    sine = torch.sin(torch.deg2rad(grid_angle(1, torch.float32)))
    torch.manual_seed(0)
    published, branch = ResTcn(dropout=0.0).train(), LocalBranch(32, 0.0).train()

    def ours() -> None:
        branch.zero_grad()
        first_blocks(branch, intensity, 2, packed_stages=2).sum().backward()

    def theirs() -> None:
        published.zero_grad()
        normed = published.intensity_norm(intensity[:, None])
        published.TCN[:4](torch.cat([normed, sine.expand_as(normed)], dim=1)).sum().backward()

    pair = paired(ours, theirs)
    benchmark.pedantic(ours, rounds=3)
    bar = 4.0 if name == "inorganic_mp" else 0.0
    row(
        f"first two encoder blocks, forward + backward, {name}, batch 64, 2 cores",
        f"{pair.ratio:.1f} × the published modules ({1e3 * pair.ours:.0f} ms)",
        f"≥ {bar:.0f} ×" if bar else "reported",
        pair.ratio >= bar,
    )


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("share", [0.7, 0.9])
def test_switch(benchmark, row, threads, monkeypatch, stage: int, share: float, training: bool) -> None:
    """One block, packed against dense, at row shares around `PACKED_SHARE`: where this is 1, it belongs."""
    threads(2)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    n_patterns, length = 16, 8500 >> stage
    # Peaks so far apart that each computes 5 positions and 2 halos of its own, up to the share.
    intensity = torch.zeros(n_patterns, length)
    n_segments = int((share * n_patterns - 1) * length / n_patterns / 7)
    intensity[:, torch.linspace(2, length - 3, n_segments).long()] = 50.0
    monkeypatch.setattr(peak_plan, "PACKED_SHARE", 1.0)
    monkeypatch.setattr(peak_plan, "MAX_GAP", 0)
    block: nn.Module = LocalBranch(32, 0.0).blocks[stage].train(training)
    packed, dense = (plan_rows(intensity, [0], packed_stages=n).stages[0] for n in (1, 0))
    n_rows = len(packed.count)
    width = block.conv1.in_channels if isinstance(block.widen, nn.Identity) else block.widen.in_channels
    inputs = [torch.randn(n, width) for n in (n_rows, dense.n_touched)]

    def run(x: Tensor, plan) -> None:
        with torch.set_grad_enabled(training):
            out = block(x.requires_grad_(training), plan)
            if training:
                out.sum().backward()

    pair = paired(lambda: run(inputs[0], packed), lambda: run(inputs[1], dense), rounds=5)
    benchmark.pedantic(lambda: run(inputs[0], packed), rounds=1)
    row(
        f"block {stage + 1}, {'forward + backward' if training else 'forward'}, "
        f"packed rows {n_rows / dense.n_touched:.2f} of the dense ones",
        f"{pair.ratio:.2f} × dense",
        "reported",
        True,
    )
