"""Which rows a batch computes: native and device code against the reference, and room for a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.gpu_runs import on_a_gpu
from tests.ops.row_lists import PADDINGS, by_layers, by_rows, parameters, sticks
from xrdfast.ops import peak_plan
from xrdfast.ops.peak_plan import Plan, Stage, plan_rows, plan_rows_reference


def lengths_of(length: int) -> list[int]:
    lengths = [length]
    for padding in PADDINGS:
        lengths.append((lengths[-1] + 2 * padding) // 2)
    return lengths


@pytest.fixture
def plan(backend: str, request: pytest.FixtureRequest) -> Callable[..., Plan]:
    """`plan_rows` of a backend, from and to the CPU."""

    def on_emulator(intensity: Tensor, packed_stages: int, room: list[int] | None = None) -> Plan:
        packed = None
        if packed_stages and intensity.numel():
            module, lengths = request.getfixturevalue("emulated"), lengths_of(intensity.shape[1])
            packed = peak_plan._packed_on_device(module, intensity, PADDINGS, lengths, packed_stages, room)
        dense = plan_rows(intensity, PADDINGS, packed_stages=0)
        if packed is None:
            return dense
        return packed._replace(stages=packed.stages + dense.stages[len(packed.stages) :])

    def on_gpu(intensity: Tensor, packed_stages: int, room: list[int] | None = None) -> Plan:
        there, shape = intensity.cuda(), []

        def call() -> list[Tensor]:
            made = plan_rows(there, PADDINGS, packed_stages=packed_stages, room=room)
            shape[:] = [made]
            return [x for x in flat(made) if x is not None]

        tensors = iter(on_a_gpu(call, captures=room is not None or not packed_stages))
        return unflat(shape[0], [None if x is None else next(tensors) for x in flat(shape[0])])

    def on_cpu(intensity: Tensor, packed_stages: int, room: list[int] | None = None) -> Plan:
        return plan_rows(intensity, PADDINGS, packed_stages=packed_stages, room=room)

    return {"cpu": on_cpu, "emu": on_emulator, "cuda": on_gpu}[backend]


def flat(plan: Plan) -> list[Tensor | None]:
    return [plan.point, plan.position, plan.overflow, *(x for s in plan.stages for x in s[3:])]


def unflat(like: Plan, tensors: list[Tensor | None]) -> Plan:
    stages = [Stage(*s[:3], *tensors[3 + 3 * i : 6 + 3 * i]) for i, s in enumerate(like.stages)]
    return Plan(tensors[0], tensors[1], stages, tensors[2])


def assert_equal_plans(got: Plan, want: Plan, intensity: Tensor) -> None:
    """Any point that is zero will do for a blank row."""
    assert torch.equal(got.position, want.position)
    values = [torch.nan_to_num(intensity.flatten()[p.point], -1.0)[p.position >= 0] for p in (got, want)]
    assert torch.equal(*values)
    assert (got.overflow is None) == (want.overflow is None)
    assert got.overflow is None or torch.equal(got.overflow, want.overflow)
    for mine, theirs in zip(got.stages, want.stages, strict=True):
        assert (mine.shift, mine.n_touched, mine.total) == (theirs.shift, theirs.n_touched, theirs.total)
        for name in ("count", "halo", "pairs"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


SHAPES = [(0, 64), (1, 64), (2, 8), (3, 131), (7, 200), (64, 33), (40, 500), (3, 8501)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n_patterns", "length"), SHAPES)
@pytest.mark.parametrize("packed_stages", [0, 2, 3])
def test_plans_equal_the_reference(plan, dtype, n_patterns: int, length: int, packed_stages: int) -> None:
    intensity = sticks(n_patterns, length, dtype=dtype)
    if n_patterns > 3:
        intensity[3, length // 2] = torch.nan
    want = plan_rows_reference(intensity != 0, PADDINGS, packed_stages)
    assert_equal_plans(plan(intensity, packed_stages), want, intensity)


@pytest.mark.parametrize("order", ["0", "1", "7"])
def test_device_code_in_any_order_of_threads(emulated, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    intensity = sticks(9, 700)
    want = plan_rows_reference(intensity != 0, PADDINGS, 3)
    monkeypatch.setenv("CUEMU_ORDER", order)
    got = peak_plan._packed_on_device(emulated, intensity, PADDINGS, lengths_of(700), 3, None)
    assert_equal_plans(got, want, intensity)


def test_defaults_of_torch_change_nothing(emulated) -> None:
    """The host reads and writes lists by address, of one dtype: they must not follow the default device or dtype."""
    intensity = sticks(7, 200)
    want = plan_rows_reference(intensity != 0, PADDINGS, 3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            plans = [
                plan_rows(intensity, PADDINGS, packed_stages=3),
                peak_plan._packed_on_device(emulated, intensity, PADDINGS, lengths_of(200), 3, None),
            ]
    finally:
        torch.set_default_dtype(torch.float32)
    for got in plans:
        assert_equal_plans(got, want, intensity)


def test_eight_stages_are_packed_at_most() -> None:
    """On every backend what the device code has room for."""
    intensity = torch.zeros(40, 1024)
    intensity[3, 500] = 1.0
    stages = plan_rows(intensity, [0] * 9, packed_stages=9).stages
    assert [stage.count is not None for stage in stages] == [True] * 8 + [False]


@pytest.mark.parametrize(("n_patterns", "length"), SHAPES[1:])
@pytest.mark.parametrize("blank", [True, False])
def test_room_is_filled_up_with_nothing(plan, n_patterns: int, length: int, blank: bool) -> None:
    """Packed whatever comes, full patterns without a zero point too; where a row is missing, all is left empty."""
    intensity = sticks(n_patterns, length) if blank else torch.ones(n_patterns, length, dtype=torch.float64)
    packed = plan_rows_reference(intensity != 0, PADDINGS, 3, [4 * intensity.numel()] * 3)
    assert not packed.overflow
    rows = [int((stage.halo[0] >= 0).nonzero()[-1]) + 2 for stage in packed.stages]
    for room in (rows, [n + 5 for n in rows], [rows[0], rows[1] - 1, rows[2]], [1, 1, 1]):
        want = plan_rows_reference(intensity != 0, PADDINGS, 3, room)
        got = plan(intensity, 3, room)
        assert_equal_plans(got, want, intensity)
        fits = all(a >= b for a, b in zip(room, rows, strict=True))
        assert bool(got.overflow) != fits
        assert [len(stage.count) for stage in got.stages] == room
        if fits:
            assert all(float(stage.count.sum()) == stage.total for stage in got.stages)


@pytest.mark.parametrize("batch", [True, False], ids=["training", "inference"])
def test_a_stack_with_room_equals_dense_layers(batch: bool) -> None:
    """Rows that are left over change no value, no statistic and no gradient."""
    intensity, blocks = sticks(7, 200), parameters()
    want, want_statistics = by_layers(intensity, blocks, batch)
    rows = [len(stage.count) for stage in plan_rows(intensity, PADDINGS, packed_stages=3).stages]
    room = [rows[0] + 40, rows[1], rows[2] + 1]
    got, statistics, stages = by_rows(intensity, blocks, batch, room=room)
    assert [len(stage.count) for stage in stages] == room
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    for mine, theirs in zip(statistics, want_statistics, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    learned = [p for block in blocks for p in block.values() if p.requires_grad]
    grads = [torch.autograd.grad(x.square().sum(), learned) for x in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_row_stands_for_the_samples_that_lack_it() -> None:
    intensity = sticks(7, 200)
    for stage in plan_rows(intensity, PADDINGS, packed_stages=3).stages:
        assert float(stage.count.sum()) == stage.total
        assert int((stage.halo[0] < 0).sum()) >= 2


def test_a_gradient_of_the_intensities_is_had_at_every_point() -> None:
    intensity, blocks = sticks(4, 131), parameters()
    grads = []
    for run in (lambda x: by_layers(x, blocks, True)[0], lambda x: by_rows(x, blocks, True, 3)[0]):
        x = intensity.clone().requires_grad_()
        (grad,) = torch.autograd.grad(run(x).square().sum(), x)
        grads.append(grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_rows(torch.zeros(8), (0,)), "plan_rows: intensity must be"),
        (lambda: plan_rows(torch.zeros(1, 8), (2,)), "plan_rows: paddings must be 0 or 1"),
        (lambda: plan_rows(torch.zeros(1, 3), (0, 0)), "plan_rows: length must last for 2 pools"),
        (
            lambda: plan_rows(torch.zeros(1, 8), (0,), room=[]),
            "plan_rows: room must be rows of 1 to 1 stages",
        ),
        (lambda: plan_rows(torch.zeros(1, 8), (0,), room=[0]), "plan_rows: room must be"),
        (lambda: plan_rows(torch.zeros(1, 8), (0,), room=[9, 9]), "plan_rows: room must be"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
