"""Measured-like patterns: the kernels against the float64 reference, and the reference against physics."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ops.gpu_runs import on_a_gpu
from tests.ops.pattern_batches import (
    cubic_rotations,
    mixed_profiles,
    operator_arguments,
    pattern_batch,
    plain_profiles,
    tetragonal_rotations,
)
from xrdfast import _native
from xrdfast.bragg import Grid
from xrdfast.ops import render_patterns as op
from xrdfast.ops.line_profile import ProfileParameters, weigh_families
from xrdfast.ops.preprocess import active_patches
from xrdfast.ops.render_patterns import RenderedPatterns, render_patterns

ROOT = Path(__file__).resolve().parent.parent.parent
COARSE = Grid(5.0, 90.0, 0.05)
WAVELENGTH = 1.54056


@pytest.fixture(params=["cpu", "emu"])
def kernel(request: pytest.FixtureRequest):
    """The operator on a native backend."""
    if request.param == "cpu":
        assert _native.cpu() is not None
        return op._patterns_cpu
    module = request.getfixturevalue("emulated")
    return lambda *arguments: op._patterns_on_device(module, *arguments)


def assert_close_to_reference(
    got: RenderedPatterns, want: RenderedPatterns, profile: ProfileParameters
) -> None:
    """Within 1e-5 of the maximum, and with noise at most a count apart at a share of the points.

    A count changes where single precision moves a rate across a step of the quantile function: at a rate of 10^4 by
    some 10^-3, so at about as large a share of the points.
    """
    for i in range(len(want.intensity)):
        difference = (got.intensity[i] - want.intensity[i]).abs()
        apart = difference > 1e-3
        if profile.counts[i] == 0.0:
            assert not bool(apart.any()), i
        else:
            assert float(apart.double().mean()) <= 3e-3, i
    assert torch.equal(got.intensity.amax(1), want.intensity.amax(1))
    count, patch = active_patches(got.intensity)
    assert torch.equal(got.active_count, count)
    assert torch.equal(got.active_patch, patch)


@pytest.mark.parametrize("clip_sigma", [0.0, 3.0])
@pytest.mark.parametrize("counts", [0.0, 40.0, 3000.0])
def test_kernels_equal_the_reference(kernel, counts: float, clip_sigma: float) -> None:
    profile = mixed_profiles(7, counts=counts)
    given = operator_arguments(7, profile, COARSE, clip_sigma, n_families=40)
    want = RenderedPatterns(*op.render_patterns_reference(*given))
    assert_close_to_reference(RenderedPatterns(*kernel(*given)), want, profile)
    assert not bool(want.intensity[0].any())
    assert want.intensity[1:].amax(1).tolist() == [100.0] * 6


def test_the_usual_grid_equals_the_reference() -> None:
    profile = mixed_profiles(5)
    given = operator_arguments(5, profile)
    got = RenderedPatterns(*torch.ops.xrdfast.render_patterns(*given))
    assert_close_to_reference(got, RenderedPatterns(*op.render_patterns_reference(*given)), profile)


@pytest.mark.parametrize("order", ["0", "1", "7"])
def test_device_code_gives_the_pattern_of_the_cpu(emulated, order: str, monkeypatch) -> None:
    """Bit by bit, in every thread order."""
    monkeypatch.setenv("CUEMU_ORDER", order)
    given = operator_arguments(6, mixed_profiles(6), COARSE, n_families=30)
    got, want = op._patterns_on_device(emulated, *given), op._patterns_cpu(*given)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n_points", [1, 2, 9, 10, 15, 17, 31, 33, 63, 64, 65, 127, 129, 850, 1701])
def test_sizes(kernel, n_points: int) -> None:
    grid = Grid(20.0, 20.0 + 0.05 * n_points, 0.05)
    assert grid.n_points == n_points
    profile = mixed_profiles(3, two_theta_first=0.0, two_theta_last=180.0)
    given = operator_arguments(3, profile, grid, n_families=30)
    got = RenderedPatterns(*kernel(*given))
    assert got.active_patch.shape == (3, -(-n_points // 10))
    assert_close_to_reference(got, RenderedPatterns(*op.render_patterns_reference(*given)), profile)


@pytest.mark.parametrize("n_patterns", [0, 1])
def test_small_batches(kernel, n_patterns: int) -> None:
    got = RenderedPatterns(*kernel(*operator_arguments(n_patterns, plain_profiles(n_patterns), COARSE)))
    assert got.intensity.shape == (n_patterns, 1700)
    assert not bool(got.intensity.any())
    assert got.active_count.tolist() == [0] * n_patterns
    assert bool((got.active_patch == -1).all())


def test_strides_change_nothing(kernel) -> None:
    given = operator_arguments(4, mixed_profiles(4), COARSE, n_families=30)
    spread = [torch.stack([x, x], dim=-1)[..., 0] if isinstance(x, torch.Tensor) else x for x in given]
    for a, b in zip(kernel(*given), kernel(*spread), strict=True):
        assert torch.equal(a, b)


def test_a_pattern_depends_on_its_id_and_not_on_its_place(kernel) -> None:
    given = list(operator_arguments(1, mixed_profiles(1), COARSE))
    families = [x.clone() for x in pattern_batch(3, n_families=30)]
    one = [families[0][1:3] - families[0][1], *(x[: int(families[0][2])] for x in families[1:4])]
    one += [families[4][1:2], families[5][1:2], torch.tensor([0, 48]), cubic_rotations()]
    assert int(families[0][1]) == 0
    table, rest = mixed_profiles(2).table()[1:], given[10:]
    alone, again, other, seeded = (
        kernel(*one, table, torch.tensor([identity]), seed, *rest[1:])[0]
        for identity, seed in ((5, 7), (5, 7), (6, 7), (5, 8))
    )
    assert torch.equal(alone, again)
    assert not torch.equal(alone, other)
    assert not torch.equal(alone, seeded)
    three = [torch.arange(4) * int(one[0][1]), *(torch.cat([x] * 3) for x in one[1:6])]
    three += [torch.arange(4) * 48, torch.cat([one[7]] * 3)]
    together = kernel(*three, torch.cat([table] * 3), torch.tensor([6, 5, 5]), 7, *rest[1:])[0]
    assert torch.equal(together, torch.cat([other, alone, alone]))


def test_what_is_not_a_number_has_no_line(kernel) -> None:
    profile = plain_profiles(3)
    given = list(operator_arguments(3, profile, COARSE, n_families=30))
    given[3] = given[3].clone()
    given[3][::3] = math.nan
    given[3][1::5] = math.inf
    assert_close_to_reference(
        RenderedPatterns(*kernel(*given)), RenderedPatterns(*op.render_patterns_reference(*given)), profile
    )
    given[4] = torch.full_like(given[4], math.nan)
    assert not bool(kernel(*given)[0].any())


# --- physics --------------------------------------------------------------------------------------------------------


def single_line(two_theta: float, grid: Grid | None = None, **fields: float) -> torch.Tensor:
    """One line of one family at an angle; noise-free, maximum 100."""
    g = 2.0 * math.sin(math.radians(two_theta / 2.0)) / WAVELENGTH
    metric = torch.tensor([[g * g, 1.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    families = (
        torch.tensor([0, 1]),
        torch.tensor([[1, 0, 0]], dtype=torch.int16),
        torch.ones(1, dtype=torch.int16),
    )
    rest = (torch.ones(1), metric, torch.zeros(1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    return render_patterns(
        *families,
        *rest,
        torch.zeros(0, 3, 3, dtype=torch.int8),
        plain_profiles(1, **fields),
        torch.zeros(1, dtype=torch.int64),
        seed=0,
        wavelength=WAVELENGTH,
        grid=grid or Grid(),
    ).intensity[0]


def crossings(pattern: torch.Tensor, level: float) -> tuple[float, float]:
    """Angles at which a single peak rises above and falls below a level, interpolated."""
    y, x = pattern.double().numpy(), Grid().two_theta()
    above = np.flatnonzero(y >= level)
    first, last = above[0], above[-1]
    rise = x[first - 1] + 0.01 * (level - y[first - 1]) / (y[first] - y[first - 1])
    return rise, x[last] + 0.01 * (y[last] - level) / (y[last] - y[last + 1])


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("two_theta", [20.0, 63.21, 85.0])
def test_width_and_place_of_a_line(two_theta: float, eta: float) -> None:
    theta = math.radians(two_theta / 2.0)
    fields = {"caglioti_u": 0.01, "caglioti_v": -0.004, "caglioti_w": 0.008, "crystallite_size": 400.0}
    low, high = crossings(single_line(two_theta, eta=eta, microstrain=0.001, **fields), 50.0)
    size = math.degrees(0.9 * WAVELENGTH / (400.0 * math.cos(theta)))
    strain = math.degrees(0.004 * math.tan(theta))
    caglioti = 0.01 * math.tan(theta) ** 2 - 0.004 * math.tan(theta) + 0.008
    assert high - low == pytest.approx(math.sqrt(caglioti + size**2 + strain**2), abs=2e-3)
    assert (high + low) / 2.0 == pytest.approx(two_theta, abs=1e-3)


def test_shift_and_displacement() -> None:
    low, high = crossings(
        single_line(40.0, zero_shift=0.07, sample_displacement=-0.2, goniometer_radius=150.0), 50.0
    )
    displaced = math.degrees(2.0 * 0.2 * math.cos(math.radians(20.0)) / 150.0)
    assert (high + low) / 2.0 == pytest.approx(40.0 + 0.07 + displaced, abs=1e-3)


@pytest.mark.parametrize(("two_theta", "asymmetry"), [(10.0, 0.05), (60.0, 0.1), (6.0, 1.0)])
def test_asymmetry_widens_the_low_side(two_theta: float, asymmetry: float) -> None:
    pattern = single_line(two_theta, asymmetry=asymmetry)
    low, high = crossings(pattern, 50.0)
    split = min(asymmetry / math.tan(math.radians(two_theta)), 0.5)
    assert (two_theta - low) / (high - two_theta) == pytest.approx((1.0 + split) / (1.0 - split), rel=0.05)
    assert high - low == pytest.approx(
        crossings(single_line(two_theta), 50.0)[1] * 2.0 - 2.0 * two_theta, abs=2e-3
    )


def test_a_profile_ends_where_it_is_faint() -> None:
    """Within one block of 16 points beyond 1e-4 of the height, and not before."""
    for eta in (0.0, 0.3, 1.0):
        pattern = single_line(50.0, eta=eta)
        lit = torch.nonzero(pattern).squeeze(1)
        assert len(lit) == lit[-1] - lit[0] + 1
        faint = torch.nonzero(pattern >= 0.01).squeeze(1)
        assert 0 <= int(faint[0] - lit[0]) < 16
        assert 0 <= int(lit[-1] - faint[-1]) < 16
        assert int(lit[0]) % 16 == 0


def test_the_doublet() -> None:
    pattern = single_line(80.0, second_ratio=0.5, caglioti_u=0.0, caglioti_v=0.0, caglioti_w=0.0025, eta=0.0)
    sine = math.sin(math.radians(40.0)) * 1.54439 / WAVELENGTH
    second = round((2.0 * math.degrees(math.asin(sine)) - 5.0) / 0.01)
    assert abs(int(pattern[second - 8 : second + 9].argmax()) - 8) <= 1
    assert float(pattern[second - 8 : second + 9].max()) == pytest.approx(50.0, abs=1.0)


def test_range_cut_off() -> None:
    pattern = single_line(50.0, eta=1.0, two_theta_first=49.9, two_theta_last=50.1)
    assert torch.nonzero(pattern).squeeze(1).tolist() == list(range(4490, 4510))
    assert not bool(single_line(50.0, eta=1.0, two_theta_first=50.01).any())  # its line lies outside
    assert not bool(single_line(50.0, two_theta_first=60.0, two_theta_last=20.0).any())


@pytest.mark.parametrize("polarisation", [0.0, 0.8, 1.0])
def test_intensities_of_two_lines(polarisation: float) -> None:
    """Areas follow multiplicity, |F|^2, B and Lorentz-polarisation."""
    metric = torch.tensor([[0.05, 0.3, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    hkl = torch.tensor([[1, 0, 0], [0, 1, 0]], dtype=torch.int16)
    multiplicity, f_squared = torch.tensor([2, 6], dtype=torch.int16), torch.tensor([70.0, 30.0])
    pattern = render_patterns(
        torch.tensor([0, 2]),
        hkl,
        multiplicity,
        f_squared,
        metric,
        torch.tensor([1.3], dtype=torch.float64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(0, 3, 3, dtype=torch.int8),
        plain_profiles(1, eta=0.0, polarisation=polarisation),
        torch.zeros(1, dtype=torch.int64),
        seed=0,
        wavelength=WAVELENGTH,
        grid=Grid(),
    ).intensity[0]
    expected = []
    for g2, weight in ((0.05, 140.0), (0.3, 180.0)):
        theta = math.asin(0.5 * WAVELENGTH * math.sqrt(g2))
        lp = (1 + polarisation * math.cos(2 * theta) ** 2) / (math.sin(theta) ** 2 * math.cos(theta))
        expected.append(weight * lp * math.exp(-0.65 * g2))
    middle = 2000
    assert float(pattern[:middle].sum() / pattern[middle:].sum()) == pytest.approx(
        expected[0] / expected[1], rel=1e-3
    )


@pytest.mark.parametrize("axis", [(0, 0, 1), (1, 1, 0), (1, 2, 3)])
@pytest.mark.parametrize("group", ["cubic", "tetragonal"])
def test_texture_is_the_mean_over_the_family(group: str, axis: tuple[int, int, int]) -> None:
    rotations = cubic_rotations() if group == "cubic" else tetragonal_rotations()
    edge = torch.tensor([4.0, 4.0, 4.0 if group == "cubic" else 6.5], dtype=torch.float64)
    metric = torch.cat([1.0 / edge**2, torch.zeros(3, dtype=torch.float64)])
    hkl = torch.tensor(list(itertools.product(range(-2, 3), repeat=3)), dtype=torch.int16)
    hkl = hkl[hkl.abs().sum(1) > 0]
    p = plain_profiles(1, march_r=0.6, march_h=axis[0], march_k=axis[1], march_l=axis[2])
    _, weight = weigh_families(hkl, metric, rotations, ProfileParameters(*(x[0] for x in p)))
    normal = torch.tensor(axis) / edge
    for h, got in zip(hkl.double(), weight.tolist(), strict=True):
        members = torch.unique((h @ rotations.double()).round(), dim=0) / edge
        cos2 = ((members @ normal) / (members.norm(dim=1) * normal.norm())).square()
        want = (0.36 * cos2 + (1.0 - cos2) / 0.6).pow(-1.5).mean()
        assert got == pytest.approx(float(want), rel=1e-12)


def test_foreign_lines_are_few_and_faint() -> None:
    clean = single_line(50.0, eta=0.0)
    pattern = single_line(50.0, eta=0.0, impurity_count=3.0, impurity_strength=0.05)
    extra = (pattern - clean).clamp(min=0.0)
    assert 0.0 < float(extra.max()) < 12.0  # lines are narrower at lower angles, so higher
    peaks = (extra[1:-1] > extra[:-2]) & (extra[1:-1] >= extra[2:]) & (extra[1:-1] > 0.01)
    assert 1 <= int(peaks.sum()) <= 3


def test_noise_is_clipped_and_peaks_stay() -> None:
    pattern = single_line(50.0, counts=2000.0, background_0=0.1, eta=0.3)
    assert float(pattern.max()) == 100.0
    assert abs(int(pattern.argmax()) - 4500) <= 4
    far = torch.cat([pattern[:4000], pattern[5000:]])
    assert 0.0 < float((far > 0.0).double().mean()) < 0.006  # 3 sigma of noise: 0.0013, of an estimate
    unclipped = single_line(
        50.0, counts=2000.0, background_0=0.1, eta=0.3, hump_height=0.1, background_1=0.05
    )
    assert float((unclipped > 0.0).double().mean()) < 0.2


def test_the_known_background_is_taken_off() -> None:
    """What is left beside the peak is noise around zero, of the counts' own variance."""
    given = list(operator_arguments(2, plain_profiles(2, counts=1000.0, background_0=0.5), n_families=2))
    peaks, p = torch.zeros(8500, dtype=torch.float64), ProfileParameters(*given[8][1])
    peaks[4000] = 1.0
    left = []
    for pattern_id in range(4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(op, "local_noise_reference", lambda x: left.append(x) or torch.zeros_like(x))
            op._as_preprocessed(peaks, p, 0.0, (5.0, 0.01, 8500), 0, 8500, pattern_id, 3)
    blank = torch.cat([torch.cat([x[:3000], x[5000:]]) for x in left])
    assert abs(float(blank.mean())) < 5 * math.sqrt(500.0 / len(blank))
    assert float(blank.var()) == pytest.approx(500.0, rel=0.05)


# --- the operator ---------------------------------------------------------------------------------------------------


def test_the_operator_keeps_torchs_contracts() -> None:
    given = operator_arguments(3, mixed_profiles(3), COARSE, n_families=20)
    torch.library.opcheck(torch.ops.xrdfast.render_patterns.default, given)
    compiled = torch.compile(lambda *x: torch.ops.xrdfast.render_patterns(*x), fullgraph=True)
    for a, b in zip(compiled(*given), torch.ops.xrdfast.render_patterns(*given), strict=True):
        assert torch.equal(a, b)


def test_the_reference_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    given = operator_arguments(2, mixed_profiles(2), COARSE, n_families=20)
    monkeypatch.setattr(_native, "cpu", lambda: None)
    want = op.render_patterns_reference(*given)
    assert torch.equal(torch.ops.xrdfast.render_patterns(*given)[0], want[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eta": 1.5}, r"render_patterns: profile.eta must be in 0..1, got \[1.5"),
        ({"eta": math.nan}, "profile.eta must be in 0..1"),
        ({"zero_shift": math.inf}, "profile.zero_shift must be in -10..10"),
        ({"hump_center": math.inf}, "profile.hump_center must be finite, got"),
        ({"crystallite_size": 0.0}, "profile.crystallite_size must be > 0"),
        ({"goniometer_radius": -1.0}, "profile.goniometer_radius must be finite and > 0"),
        ({"counts": 2e6}, r"profile.counts must be in 0..1e\+06"),
        ({"impurity_count": 17.0}, "profile.impurity_count must be in 0..16"),
        ({"march_l": 0.0}, "march_h, march_k, march_l must be not all 0"),
        ({"caglioti_w": 0.0}, r"caglioti_u, v, w must be such that FWHM\^2 > 0 on the grid"),
        ({"caglioti_v": -0.02}, r"caglioti_u, v, w must be such that FWHM\^2 > 0 on the grid"),
    ],
)
def test_bad_parameters(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.xrdfast.render_patterns(*operator_arguments(3, plain_profiles(3, **fields), COARSE))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.tensor([0, 5, 3, 9]), "offset must rise from 0 to"),
        (1, torch.zeros(4, 3), r"hkl must be \(4, 3\) torch.int16"),
        (
            6,
            torch.tensor([0, 200, 200, 200]),
            "rotation_offset must rise from 0 to 56, by at most 192 a pattern",
        ),
        (7, torch.zeros(56, 3, 3), r"rotations must be \(56, 3, 3\) torch.int8"),
        (8, torch.zeros(3, 4, dtype=torch.float64), r"profile must be \(3, 29\) torch.float64"),
        (9, torch.zeros(3), r"pattern_id must be \(3,\) torch.int64"),
        (11, -0.5, "clip_sigma must be finite and >= 0, or None, got -0.5"),
        (12, math.nan, "wavelength must be finite and > 0"),
        (13, -5.0, "grid must be within 0..180 degrees"),
        (14, 0.0, "grid must have a step > 0"),
        (15, 10**6, "grid must be of at most 327670 points"),
    ],
)
def test_bad_arguments(at: int, value: object, message: str) -> None:
    given = list(operator_arguments(3, plain_profiles(3), COARSE))
    given[at] = value
    with pytest.raises(ValueError, match=f"render_patterns: {message}"):
        torch.ops.xrdfast.render_patterns(*given)


@pytest.mark.gpu
def test_on_a_gpu(gpu) -> None:
    given = operator_arguments(64, mixed_profiles(64))
    there = [x.cuda() if isinstance(x, torch.Tensor) else x for x in given]
    # The kernel alone can be captured; the operator checks profiles and offsets on the host.
    got = on_a_gpu(lambda: op._patterns_on_device(_native.cuda(), *there))
    want = torch.ops.xrdfast.render_patterns(*given)
    assert float(((got[0] - want[0]).abs() > 1e-3).double().mean()) <= 1e-4
    for mine, theirs in zip(torch.ops.xrdfast.render_patterns(*there), got, strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("counts", [0.0, 40.0, 3000.0])
def test_counts_as_measured_equal_the_reference(kernel, counts: float) -> None:
    """Background and all, on the detector's scale; without counts the peaks, as ever."""
    profile = mixed_profiles(7, counts=counts)
    given = operator_arguments(7, profile, COARSE, -1.0, n_families=40)
    got, want = kernel(*given)[0], op.render_patterns_reference(*given)[0]
    if counts == 0.0:
        assert torch.equal(kernel(*operator_arguments(7, profile, COARSE, 3.0, n_families=40))[0], got)
        return
    assert torch.equal(got, got.round())
    assert float(got[1:].amax(1).min()) > 0.5 * counts
    difference = (got - want).abs()
    assert float(difference.max()) <= 1.0
    assert float((difference > 0.0).double().mean()) <= 3e-3


def test_counts_are_asked_for_by_no_clip() -> None:
    profile = mixed_profiles(3, counts=500.0)
    given = operator_arguments(3, profile, COARSE, -1.0, n_families=40)
    got = render_patterns(
        *given[:8], profile, given[9], seed=given[10], wavelength=given[12], grid=COARSE, clip_sigma=None
    )
    assert torch.equal(got.intensity, op._patterns_cpu(*given)[0])
    with pytest.raises(ValueError, match=r"clip_sigma must be finite and >= 0, or None, got -0\.5"):
        render_patterns(
            *given[:8], profile, given[9], seed=0, wavelength=given[12], grid=COARSE, clip_sigma=-0.5
        )
