"""Rows of a GPU run: inference and training of the `paper` preset, kernels against the memory and against the library.

Patterns are random, so that the run needs no data: 80 sticks each, as real inorganic ones have. Floors: NOTES.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.bench_render import families
from benchmarks.graphed_step import GraphedStep
from xrdfast.bragg import Grid
from xrdfast.data.profiles import PROFILES, draw_profiles
from xrdfast.models import build_model
from xrdfast.ops.peak_conv import MAX_DEVICE_WIDTH
from xrdfast.ops.render import render_sticks
from xrdfast.ops.render_patterns import render_patterns
from xrdfast.symmetry import N_CLASSES, TASKS
from xrdfast.training.balance import Balance

pytestmark = pytest.mark.gpu
_BATCH, _N_POINTS = 512, 8500


@pytest.fixture(autouse=True)
def on_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def gpu_seconds(call: Callable[[], object], rounds: int = 20) -> float:
    """Median time of a call by the device's own clock, after three to warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return statistics.median(times)


def sticks(n_patterns: int = _BATCH, n_peaks: int = 80) -> Tensor:
    """(n_patterns, 8500) on the device."""
    generator = torch.Generator().manual_seed(0)
    intensity = torch.zeros(n_patterns, _N_POINTS)
    peaks = torch.randint(0, _N_POINTS, (n_patterns, n_peaks), generator=generator)
    return intensity.scatter_(1, peaks, 100 * torch.rand(n_patterns, n_peaks, generator=generator)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paper_inference(benchmark, row, dtype: torch.dtype) -> None:
    """Equal answers and accuracy, which the bar asks for too, need trained weights and are not in this row."""
    model, intensity = build_model("paper").cuda().eval(), sticks()

    def call() -> None:
        with torch.inference_mode(), torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
            model(intensity)

    speed = _BATCH / gpu_seconds(call)
    benchmark.pedantic(call, rounds=3)
    what = f"inference, paper preset, {str(dtype).removeprefix('torch.')}, 80 sticks, batch {_BATCH}, GPU"
    bar = "≥ 100,000 patterns/s" if dtype == torch.bfloat16 else "reported"
    row(what, f"{speed:,.0f} patterns/s", bar, dtype != torch.bfloat16 or speed >= 1e5)


def test_paper_training(benchmark, row) -> None:
    """The whole step as a CUDA graph, mgda, AdamW."""
    intensity = sticks()
    labels = {t: torch.randint(0, N_CLASSES[t], (_BATCH,), device="cuda") for t in TASKS}
    model = build_model("paper").cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True, capturable=True)
    stages = model.encoder.local_branch.plan(intensity).stages
    room = [int(1.1 * len(stage.count)) for stage in stages if stage.count is not None]
    step = GraphedStep(
        model, optimizer, Balance("mgda", len(TASKS), intensity.device), intensity, labels, room
    )
    assert step(intensity, labels)[1]
    speed = _BATCH / gpu_seconds(lambda: step(intensity, labels))
    benchmark.pedantic(lambda: step(intensity, labels), rounds=3)
    what = f"training step in a CUDA graph, paper preset, float32, 80 sticks, batch {_BATCH}, GPU"
    row(what, f"{speed:,.0f} patterns/s", "≥ 15,000 patterns/s", speed >= 15e3)


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("direction", ["forward", "weights"])
def test_convolution_against_the_library(benchmark, row, width: int, direction: str) -> None:
    """Where own kernels stop being a gain, `MAX_DEVICE_WIDTH` belongs."""
    from xrdfast import _native
    from xrdfast.ops import peak_conv as op

    x, weight = torch.randn(400_000, width, device="cuda"), torch.randn(3, width, width, device="cuda")
    module = _native.cuda()
    ours = {
        "forward": lambda: op._conv_on_device(module, x, weight, 1),
        "weights": lambda: op._conv_weight_on_device(module, x, x, 1),
    }[direction]
    theirs = {
        "forward": lambda: op.peak_conv_reference(x, weight, 1),
        "weights": lambda: op.peak_conv_weight_reference(x, x, 1),
    }[direction]
    took, rival = gpu_seconds(ours), gpu_seconds(theirs)
    benchmark.pedantic(ours, rounds=3)
    speed = 6e-12 * len(x) * width**2 / took
    row(
        f"peak_conv {direction}, 400,000 rows, {width} channels, float32, GPU",
        f"{rival / took:.2f} × the library's products ({speed:.1f} TFLOP/s)",
        "≥ 1 ×" if width <= MAX_DEVICE_WIDTH else "reported",
        width > MAX_DEVICE_WIDTH or took <= rival,
    )


def test_sticks(benchmark, row) -> None:
    """Against a copy of as many bytes as are written."""
    rows = [x.cuda() for x in families()[:6]]
    call = lambda: render_sticks(*rows, wavelength=1.54056, grid=Grid())  # noqa: E731
    pattern = call()
    spare = torch.empty_like(pattern)
    took, copied = gpu_seconds(call), gpu_seconds(lambda: spare.copy_(pattern)) / 2  # read and written
    benchmark.pedantic(call, rounds=3)
    share = copied / took
    what = f"render, sticks, 150 families, 8,500 points, batch {len(pattern)}, GPU"
    row(
        what,
        f"{len(pattern) / took:,.0f} patterns/s, {100 * share:.0f} % of copy bandwidth",
        "≥ 60 %",
        share >= 0.6,
    )


def test_augmented_patterns(benchmark, row) -> None:
    rows = [x.cuda() for x in families()]
    n_patterns = len(rows[0]) - 1
    profile = draw_profiles(n_patterns, PROFILES["lab"], torch.Generator().manual_seed(0))
    profile = type(profile)(*(x.cuda() for x in profile))
    identity = torch.arange(n_patterns, device="cuda")
    call = lambda: render_patterns(  # noqa: E731
        *rows, profile, identity, seed=1, wavelength=1.54056, grid=Grid()
    )
    took = gpu_seconds(call)
    benchmark.pedantic(call, rounds=3)
    floor = 6e6  # patterns/s of an H200, in NOTES.md
    what = f"render, augmented patterns, 150 families, 8,500 points, batch {n_patterns}, GPU"
    speed = n_patterns / took
    row(
        what,
        f"{speed:,.0f} patterns/s, {100 * speed / floor:.0f} % of an H200's floor",
        "≥ 30 %",
        speed >= 0.3 * floor,
    )
