"""Measured scans on the model's grid: noise, background, clip, resampling; references against independent code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.gpu_runs import on_a_gpu
from xrdfast import _native
from xrdfast.bragg import KA1_WAVELENGTH, Grid, scan_wavelengths
from xrdfast.ops import preprocess as ops
from xrdfast.ops.preprocess import PreprocessedScans, local_noise_reference, preprocess_scans


def noise_by_hand(x: np.ndarray) -> np.ndarray:
    """The definition, point by point."""
    n = len(x)
    n_blocks = max(n // 64, 1)
    middle, level = [], []
    for block in range(n_blocks):
        end = n if block == n_blocks - 1 else 64 * (block + 1)
        rough = sorted(abs(x[i - 1] - 2 * x[i] + x[i + 1]) for i in range(64 * block, end) if 0 < i < n - 1)
        level.append(rough[len(rough) // 2] / (0.6744897501960817 * math.sqrt(6.0)) if rough else 0.0)
        middle.append(64 * block + 31.5)
    return np.interp(np.arange(n), middle, level)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 191, 192, 500, 1279])
def test_noise_is_what_its_definition_says(n: int) -> None:
    x = np.random.default_rng(n).normal(size=n) * np.linspace(1.0, 5.0, n)
    got = local_noise_reference(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, noise_by_hand(x), rtol=1e-12, atol=0)


def test_noise_of_counts_is_their_square_root() -> None:
    """Also under peaks as wide as a laboratory's, and with a sloping background."""
    at = np.arange(20_000)
    mean = 400.0 + 0.01 * at + 3000.0 * np.exp(-(((at % 2000) - 1000.0) ** 2) / (2 * 8.0**2))
    counts = np.random.default_rng(1).poisson(mean).astype(np.float64)
    noise = local_noise_reference(torch.from_numpy(counts)).numpy()
    away = np.abs((at % 2000) - 1000) > 200
    assert np.median(noise[away] / np.sqrt(mean[away])) == pytest.approx(1.0, abs=0.02)
    assert noise[~away].max() < 0.2 * counts.max()


GRID = Grid(5.0, 90.0, 0.05)  # 1,700 points: enough for every rule


def measured(n: int, first: float = 5.0, last: float = 90.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Counts of a scan with 12 peaks on a falling background, points not quite evenly spaced."""
    rng = np.random.default_rng(seed)
    two_theta = np.linspace(first, last, n) + (last - first) / max(n, 1) * rng.uniform(-0.2, 0.2, n)
    mean = 150.0 + 400.0 * np.exp(-two_theta / 20.0)
    for center in rng.uniform(first, last, 12):
        mean = mean + rng.uniform(50.0, 5000.0) / (1.0 + ((two_theta - center) / 0.1) ** 2)
    return two_theta, rng.poisson(mean).astype(np.float64)


def batch(
    *scans: tuple[np.ndarray, np.ndarray], wavelength: float = KA1_WAVELENGTH, second: float = 0.0
) -> list[Tensor]:
    """The five tensors of the operator."""
    offset = torch.tensor([0, *(len(x) for x, _ in scans)]).cumsum(0)
    two_theta, intensity = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*scans, strict=True))
    both = torch.tensor([[wavelength, second]] * len(scans), dtype=torch.float64)
    return [offset, two_theta, intensity, both[:, 0].clone(), both[:, 1].clone()]


def settings(
    smooth: int = 1, width: float = 1.0, clip: float = 3.0, area: bool = True, grid: Grid = GRID
) -> list:
    """The other arguments of the operator."""
    return [smooth, width, clip, area, KA1_WAVELENGTH, grid.two_theta_min, grid.two_theta_step, grid.n_points]


@pytest.fixture(params=["cpu", "emu 0", "emu 1", "emu 7"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The operator on the CPU, and its device code in three thread orders."""
    if request.param == "cpu":
        assert _native.cpu() is not None
        return ops._preprocess_cpu
    module = request.getfixturevalue("emulated")
    monkeypatch.setenv("CUEMU_ORDER", request.param[-1])
    return lambda *arguments: ops._preprocess_on_device(module, *arguments)


def assert_as_the_reference(kernel, tensors: list[Tensor], rest: list) -> None:
    """style.md's rule: as near to float64 as twice the plain code in float32, and a count is never far."""
    exact = PreprocessedScans(*ops.preprocess_scans_reference(*tensors, *rest))
    single = [tensors[0], tensors[1], tensors[2].float(), *tensors[3:]]
    usual = PreprocessedScans(*ops.preprocess_scans_reference(*single, *rest))
    got = PreprocessedScans(*kernel(*tensors, *rest))
    assert torch.equal(got.measured, exact.measured)
    bound = 2.0 * (usual.intensity - exact.intensity).abs().max() + 16 * torch.finfo(torch.float32).eps * 100
    apart = (got.intensity - exact.intensity).abs()
    # a point whose height is its noise's threshold may fall on either side of it
    assert float((apart > bound).double().mean()) <= 1e-3
    again = PreprocessedScans(got.intensity, got.measured, *ops.active_patches(got.intensity))
    for mine, theirs in zip(got, again, strict=True):
        assert torch.equal(mine, theirs)
    assert set(got.intensity.amax(dim=1).tolist()) <= {0.0, 100.0}


@pytest.mark.parametrize(
    ("wavelength", "second", "rest"),
    [
        (KA1_WAVELENGTH, 0.0, settings()),
        (KA1_WAVELENGTH, 1.54439, settings(smooth=7, area=False)),
        (0.7093, 0.7136, settings(width=0.4)),
        (2.2897, 0.0, settings(smooth=5, width=0.0, clip=0.0, area=False)),
    ],
)
def test_kernels_equal_the_reference(kernel, wavelength: float, second: float, rest: list) -> None:
    scans = [
        measured(900),
        measured(431, 10.0, 80.0, 1),
        measured(2, 20.0, 30.0, 2),
        measured(333, 3.0, 150.0, 3),
    ]
    assert_as_the_reference(kernel, batch(*scans, wavelength=wavelength, second=second), rest)


@pytest.mark.parametrize("area", [True, False])
def test_steps_of_any_kind(kernel, area: bool) -> None:
    """A gap, points that snap to the same position, steps that widen: an angle does not tell which point is near."""
    counts = measured(900)[1]
    gap = np.linspace(10.0, 40.0, 900) + np.where(np.arange(900) < 450, 0.0, 40.0)
    twice = np.repeat(np.linspace(10.0, 60.0, 451)[:-1], 2) + np.tile([0.0, 1e-6], 450)
    widening = np.geomspace(6.0, 80.0, 900)
    scans = [(angle, counts) for angle in (gap, twice, widening)]
    assert_as_the_reference(kernel, batch(*scans), settings(width=0.0, area=area))
    assert_as_the_reference(kernel, batch(*scans, wavelength=1.0, second=1.3), settings(width=0.5, area=area))


def test_the_widest_windows(kernel) -> None:
    """1,000 points on either side of a scan of as many points as shared memory holds with them."""
    assert_as_the_reference(kernel, batch(measured(ops._SHARED_POINTS), measured(3)), settings(width=60.0))


def test_a_scan_beyond_shared_memory(kernel) -> None:
    scan = measured(9300)
    assert len(scan[0]) > ops._SHARED_POINTS
    assert_as_the_reference(kernel, batch(scan, measured(100)), settings(width=0.05))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 9, 63, 64, 65, 128, 129])
def test_short_scans(kernel, n: int) -> None:
    assert_as_the_reference(kernel, batch(measured(n, seed=n), measured(40)), settings(smooth=3))
    got = PreprocessedScans(*kernel(*batch(measured(n, seed=n)), *settings()))
    assert got.intensity.shape == (1, 1700)
    if n < 2:
        assert got.measured.tolist() == [[0, 0]]
        assert not bool(got.intensity.any())


def test_no_scan(kernel) -> None:
    nothing = [torch.zeros(1, dtype=torch.int64), *(torch.zeros(0, dtype=torch.float64) for _ in range(4))]
    got = PreprocessedScans(*kernel(*nothing, *settings()))
    assert [tuple(x.shape) for x in got] == [(0, 1700), (0, 2), (0,), (0, 170)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2e30])
def test_a_scan_with_a_number_that_is_none_is_blank_and_the_others_are_not(kernel, bad: float) -> None:
    spoilt, fine = measured(300), measured(300, seed=1)
    spoilt[1][150] = bad
    got = PreprocessedScans(*kernel(*batch(spoilt, fine), *settings()))
    alone = PreprocessedScans(*kernel(*batch(fine), *settings()))
    assert not bool(got.intensity[0].any())
    assert got.measured[0].tolist() == [0, 0]
    assert torch.equal(got.intensity[1], alone.intensity[0])


def test_a_flat_scan_is_measured_and_blank(kernel) -> None:
    flat = np.linspace(10.0, 60.0, 400), np.full(400, 7.0)
    got = PreprocessedScans(*kernel(*batch(flat), *settings()))
    assert not bool(got.intensity.any())
    assert got.measured.tolist() == [[100, 1101]]
    assert got.active_count.tolist() == [0]


@pytest.mark.parametrize("n_points", [8500, 8501, 1, 11])
def test_sizes_of_the_grid(kernel, n_points: int) -> None:
    grid = Grid(20.0, 20.0 + 0.01 * n_points, 0.01)
    assert grid.n_points == n_points
    assert_as_the_reference(kernel, batch(measured(400, 18.0, 40.0)), settings(grid=grid))


def test_background_is_snip_on_the_lls_scale() -> None:
    """Against pybaselines, away from the ends, where it continues a scan otherwise."""
    snip = pytest.importorskip("pybaselines.smooth", reason="the oracle is pybaselines").snip
    two_theta = 5.0 + 0.01 * np.arange(8500)
    counts = np.interp(two_theta, *measured(8500))
    level = np.log(np.log(np.sqrt(counts + 1.0) + 1.0) + 1.0)
    background, _ = snip(level, max_half_window=100, decreasing=True, filter_order=2)
    net = counts - ((np.exp(np.exp(background) - 1.0) - 1.0) ** 2 - 1.0)
    grid = Grid()
    got = preprocess_scans(
        *batch((two_theta, counts))[:4],
        grid=grid,
        model_wavelength=KA1_WAVELENGTH,
        background_width=1.0,
        clip_sigma=0.0,
        resample="height",
    ).intensity[0]
    want = np.clip(net, 0.0, None)
    inner = slice(200, -200)
    np.testing.assert_allclose(got.numpy()[inner], (100.0 * want / want.max())[inner], atol=5e-3)


def test_k_alpha_2_comes_off() -> None:
    """A doublet rendered with both lines becomes the first one alone."""
    first, second = scan_wavelengths("CuKa")
    two_theta = np.arange(20.0, 90.0, 0.01)

    def peaks(wavelength: float) -> np.ndarray:
        found = np.zeros_like(two_theta)
        for spacing in (3.2, 2.1, 1.4, 1.15):
            center = 2.0 * np.degrees(np.arcsin(wavelength / (2.0 * spacing)))
            found += 1000.0 / (1.0 + ((two_theta - center) / 0.04) ** 2) ** 2
        return found

    doublet = two_theta, peaks(first) + 0.5 * peaks(second)
    got = PreprocessedScans(
        *ops._preprocess_cpu(
            *batch(doublet, second=second), *settings(width=0.0, clip=0.0, area=False, grid=Grid())
        )
    )
    want = np.interp(5.0 + 0.01 * np.arange(8500), two_theta, peaks(first), left=0.0, right=0.0)
    np.testing.assert_allclose(got.intensity[0].numpy(), 100.0 * want / want.max(), atol=1.5)


def test_peaks_keep_their_area_or_their_height() -> None:
    """A coarse scan on the fine grid of another wavelength: ratios of two peaks."""
    theta_ratio = 0.7093 / KA1_WAVELENGTH
    two_theta = np.arange(5.0, 50.0, 0.01)
    centers = [2.0 * np.degrees(np.arcsin(theta_ratio * np.sin(np.radians(t / 2)))) for t in (25.0, 70.0)]
    counts = sum(np.exp(-(((two_theta - c) / 0.05) ** 2)) for c in centers)
    tensors = batch((two_theta, counts), wavelength=0.7093)
    found = {}
    for area in (True, False):
        rest = settings(width=0.0, clip=0.0, area=area, grid=Grid())
        found[area] = PreprocessedScans(*ops._preprocess_cpu(*tensors, *rest)).intensity[0].double().numpy()
    axis = 5.0 + 0.01 * np.arange(8500)

    def factor(two_theta: float) -> float:
        t = np.radians(two_theta / 2)
        return float((1 + np.cos(2 * t) ** 2) / (np.sin(t) ** 2 * np.cos(t)))

    wanted = [factor(t) / factor(c) for t, c in zip((25.0, 70.0), centers, strict=True)]
    windows = [np.abs(axis - t) < 2.0 for t in (25.0, 70.0)]
    heights = [found[False][w].max() for w in windows]
    areas = [found[True][w].sum() for w in windows]
    # The highest point of the grid lies up to half a step beside the peak.
    assert heights[1] / heights[0] == pytest.approx(wanted[1] / wanted[0], rel=6e-3)
    assert areas[1] / areas[0] == pytest.approx(wanted[1] / wanted[0], rel=2e-3)


def test_the_clip_leaves_a_noise_floor_blank() -> None:
    rng = np.random.default_rng(5)
    scan = 5.0 + 0.01 * np.arange(8500), rng.poisson(200.0, 8500).astype(np.float64)
    scan[1][4000:4020] += 4000.0
    got = PreprocessedScans(*ops._preprocess_cpu(*batch(scan), *settings(grid=Grid())))
    assert int(got.active_count) < 60
    assert 395 <= int(got.intensity[0].argmax()) // 10 <= 403


def test_opcheck_and_compile() -> None:
    arguments = (*batch(measured(200), measured(100, seed=1)), *settings(smooth=3))
    torch.library.opcheck(torch.ops.xrdfast.preprocess_scans.default, arguments)
    compiled = torch.compile(torch.ops.xrdfast.preprocess_scans, fullgraph=True)
    for mine, theirs in zip(compiled(*arguments), ops._preprocess_cpu(*arguments), strict=True):
        assert torch.equal(mine, theirs)


def test_numbers_do_not_depend_on_threads_or_strides() -> None:
    arguments = batch(*(measured(300, seed=seed) for seed in range(9)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = ops._preprocess_cpu(*arguments, *settings())
        torch.set_num_threads(3)
        got = ops._preprocess_cpu(*(torch.stack([x, x], dim=1)[:, 0] for x in arguments), *settings())
    finally:
        torch.set_num_threads(threads)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.tensor([0, 5])}, r"offset must be rising from 0 to 50"),
        ({1: torch.zeros(50)}, "two_theta must be .* torch.float64"),
        ({1: torch.full((50,), 7.0, dtype=torch.float64)}, "two_theta must be rising within each scan"),
        ({1: torch.linspace(-1.0, 5.0, 50, dtype=torch.float64)}, "two_theta must be between 0 and 180"),
        ({2: torch.zeros(49)}, "intensity must be"),
        ({2: torch.zeros(50, dtype=torch.int64)}, "intensity must be"),
        ({3: torch.zeros(1, dtype=torch.float64)}, "wavelength must be finite and > 0"),
        ({4: torch.ones(1, dtype=torch.float64)}, "second_wavelength must be 0 or finite and above"),
        ({5: 4}, "smooth_points must be odd and in 1..101, got 4"),
        ({6: -1.0}, "background_width must be finite and >= 0"),
        ({7: math.nan}, "clip_sigma must be finite and >= 0"),
        ({9: 0.0}, "model_wavelength must be finite and > 0"),
        ({12: 0}, "grid must be of a step > 0"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    arguments = [*batch(measured(50)), *settings()]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=f"preprocess_scans: {message}"):
        torch.ops.xrdfast.preprocess_scans(*arguments)


@pytest.mark.gpu
def test_on_a_gpu(gpu) -> None:
    arguments = batch(*(measured(1000 + 37 * seed, seed=seed) for seed in range(40)), measured(9300))
    there = [x.cuda() for x in arguments]
    # No graph: the host looks at the angles, and for the longest scan.
    run = torch.ops.xrdfast.preprocess_scans
    on_a_gpu(lambda: run(*there, *settings()), captures=False)
    assert_as_the_reference(
        lambda *given: [x.cpu() for x in run(*(t.cuda() if isinstance(t, Tensor) else t for t in given))],
        arguments,
        settings(),
    )
