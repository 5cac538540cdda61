"""Candidates fitted to measured patterns: the kernel against its reference, and what any fit must do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from xrdfast import _native
from xrdfast.ops.retrieval import (
    FIT_PARAMETERS,
    ISOTROPIC_SLOPE,
    match_structures,
    match_structures_reference,
)

LOG_Q_MIN, STEP, WAVELENGTH = -2.2, 0.0015, 1.54056
N_POINTS = 1400
AXIS = {"log_q_min": LOG_Q_MIN, "log_q_step": STEP, "wavelength": WAVELENGTH}


def cells(n: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Orthorhombic cells with some 40 lines each, and one without any: offset, hkl, amplitude, metric, change."""
    g = torch.Generator().manual_seed(seed)
    edges = 4.0 + 3.0 * torch.rand(n, 3, generator=g, dtype=torch.float64)
    metric, change = torch.zeros(n, 6, dtype=torch.float64), torch.zeros(n, 6, 6, dtype=torch.float64)
    metric[:, :3] = edges**-2
    # Strains of a cell along its axes: e1 isotropic, e2 and e3 without a change of volume.
    strains = torch.tensor([[1, 1, 1], [1, -1, 0], [1, 1, -2]], dtype=torch.float64)
    strains = strains / strains.norm(dim=1, keepdim=True)
    change[:, :3, :3] = -2.0 * strains * metric[:, None, :3]
    axes = torch.arange(4)
    hkl = torch.stack(torch.meshgrid(axes, axes, axes, indexing="ij"), dim=-1).reshape(-1, 3)[1:]
    counts = torch.full((n,), 40)
    counts[-1] = 0
    lines = torch.cat([hkl[torch.randperm(len(hkl), generator=g)[:40]] for _ in range(n - 1)])
    amplitude = 10.0 * torch.rand(len(lines), generator=g).sqrt()
    offset = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return offset, lines.to(torch.int16), amplitude, metric, change


def pattern_of(
    structures: tuple[Tensor, ...], structure: int, strain: tuple[float, ...] = (), shift: float = 0.0
) -> Tensor:
    """Amplitudes as a diffractometer would measure them from a strained cell."""
    offset, hkl, amplitude, metric, change = structures
    of = slice(int(offset[structure]), int(offset[structure + 1]))
    strained = metric[structure] + sum(
        x * row for x, row in zip(strain, change[structure], strict=False)
    )  # to first order
    q = torch.sqrt((hkl[of].double().square() * strained[:3]).sum(1))
    sine = (0.5 * WAVELENGTH * q).clamp(max=0.999)
    place = torch.log(torch.sin(torch.asin(sine) + math.radians(0.5 * shift)) * 2.0 / WAVELENGTH)
    width = 0.06 * math.pi / 360.0 * torch.sqrt(sine**-2 - 1.0)
    at = LOG_Q_MIN + STEP * torch.arange(N_POINTS)
    u = (at - place[:, None]) / width[:, None]
    return (amplitude[of].double()[:, None] ** 2 * torch.exp(-u.square())).sum(0).sqrt().float()


def batch(n_scans: int = 3, n_structures: int = 6, seed: int = 0) -> list[Tensor]:
    structures = cells(n_structures, seed)
    g = torch.Generator().manual_seed(seed + 1)
    scans = [
        pattern_of(structures, i % (n_structures - 1), (0.01 * (i - 1), 0.006), 0.03) for i in range(n_scans)
    ]
    amplitude = torch.stack(scans) if scans else torch.zeros(0, N_POINTS)
    amplitude = amplitude + 0.1 * torch.rand(amplitude.shape, generator=g)
    measured = torch.tensor([[0, N_POINTS], [100, 1300], [0, 900]], dtype=torch.int32).repeat(9, 1)[:n_scans]
    candidate = torch.stack([torch.randperm(n_structures, generator=g) for _ in range(n_scans)] or [])
    candidate[:, 1] = -1
    offset, hkl, line_amplitude, metric, change = structures
    weight = torch.linspace(0.5, 2.0, N_POINTS)
    return [amplitude, measured, weight, candidate, offset, hkl, line_amplitude, metric, change]


@pytest.mark.parametrize("n_scans", [1, 3])
def test_kernel_is_as_near_to_double_as_single_precision_is(n_scans: int) -> None:
    if _native.cpu() is None:
        pytest.skip("no native build")
    given = batch(n_scans, seed=n_scans)
    got = match_structures(*given, **AXIS)
    single = match_structures_reference(*given, *AXIS.values())
    double = match_structures_reference(given[0].double(), *given[1:], *AXIS.values())
    for ours, rough, exact in zip(got, single, double, strict=True):
        bound = 2.0 * (rough - exact).abs().max() + 2e-5
        assert (ours - exact).abs().max() <= bound
    assert bool((got.score[:, 1] == -1.0).all())
    assert not bool(got.fit[:, 1].any())


def test_fit_finds_the_strain_and_the_shift() -> None:
    structures = cells(4, seed=3)
    strain, shift = (0.02, 0.006, -0.005), 0.06
    amplitude = pattern_of(structures, 1, strain, shift)[None]
    measured = torch.tensor([[0, N_POINTS]], dtype=torch.int32)
    candidate = torch.arange(4)[None]
    given = [amplitude, measured, torch.ones(N_POINTS), candidate, *structures]
    score, fit = match_structures(*given, **AXIS)
    assert int(score.argmax()) == 1
    assert float(score[0, 1]) > 0.97
    assert float(score[0].sort().values[-2]) < 0.9
    # What is expected holds back: the shift most, since strain can do nearly the same.
    torch.testing.assert_close(fit[0, 1, :3], torch.tensor(strain), rtol=0.0, atol=2e-3)
    assert 0.01 < float(fit[0, 1, 6]) <= shift
    assert float(score[0, 3]) == 0.0  # no line


def test_missing_and_foreign_lines_both_cost() -> None:
    structures = cells(4, seed=5)
    offset, hkl, amplitude, metric, change = structures
    measured = torch.tensor([[0, N_POINTS]], dtype=torch.int32)

    def score(scan: Tensor, heights: Tensor) -> float:
        given = [scan[None], measured, torch.ones(N_POINTS), torch.tensor([[0]]), offset, hkl, heights]
        return float(match_structures(*given, metric, change, **AXIS).score)

    scan = pattern_of(structures, 0)
    halved = amplitude.clone()
    halved[:40:4] = 0.0
    own = score(scan, amplitude)
    assert own > 0.98
    assert score(scan, halved) < own - 0.02  # peaks without a line
    assert (
        score(pattern_of((offset, hkl, halved, metric, change), 0), amplitude) < own - 0.02
    )  # lines without a peak


def test_only_what_was_measured_counts() -> None:
    given = batch(1)
    given[1] = torch.tensor([[150, 1100]], dtype=torch.int32)
    before = match_structures(*given, **AXIS).score
    given[0] = given[0].clone()
    given[2] = given[2].clone()
    given[2][:150] = given[2][1100:] = 1e6
    torch.testing.assert_close(match_structures(*given, **AXIS).score, before)


def test_empty_batches_and_blank_scans() -> None:
    given = batch(2)
    none = match_structures(given[0][:0], given[1][:0], given[2], given[3][:0], *given[4:], **AXIS)
    assert none.score.shape == (0, 6)
    assert none.fit.shape == (0, 6, FIT_PARAMETERS)
    blank = match_structures(torch.zeros_like(given[0]), *given[1:], **AXIS)
    assert sorted(blank.score[0].unique().tolist()) == [-1.0, 0.0]


def test_isotropic_slope_is_the_first_strain_s() -> None:
    _, hkl, _, metric, change = cells(2)
    products = hkl[:40].double().square()
    slope = 0.5 * (products @ change[0, 0, :3]) / (products @ metric[0, :3])
    torch.testing.assert_close(slope, torch.full_like(slope, ISOTROPIC_SLOPE))


def test_opcheck() -> None:
    given = batch(2)
    torch.library.opcheck(torch.ops.xrdfast.match_structures.default, (*given, *AXIS.values()))


def test_compiles_whole() -> None:
    given = batch(1)
    compiled = torch.compile(lambda *x: match_structures(*x, **AXIS), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), match_structures(*given, **AXIS))


def test_inputs_out_of_larger_buffers() -> None:
    given = batch(2)
    apart = [torch.stack([x, x], dim=-1)[..., 0] for x in given]
    torch.testing.assert_close(match_structures(*apart, **AXIS), match_structures(*given, **AXIS))


@pytest.mark.parametrize(
    ("which", "change", "rule"),
    [
        (0, lambda x: x.double(), "amplitude must be"),
        (0, lambda x: x[0], "must have a row a scan"),
        (1, lambda x: x + N_POINTS, "measured must rise within"),
        (3, lambda x: x + 1, "candidate must be below 6"),
        (4, lambda x: x + 1, "line_offset must rise"),
        (8, lambda x: x[:, :3], "metric_change must be"),
    ],
)
def test_refuses(which: int, change, rule: str) -> None:
    given = batch(2)
    given[which] = change(given[which])
    with pytest.raises(ValueError, match=rule):
        match_structures(*given, **AXIS)


def test_refuses_an_axis_without_steps() -> None:
    with pytest.raises(ValueError, match="axis must be finite"):
        match_structures(*batch(1), **(AXIS | {"log_q_step": 0.0}))
