"""Bragg's law there and back, radiations, the grid and the reciprocal metric (against pymatgen)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.analysis.diffraction.xrd import WAVELENGTHS
from pymatgen.core import Lattice

from xrdfast.bragg import (
    KA1_WAVELENGTH,
    Grid,
    convert_two_theta,
    d_spacing_of,
    q_of,
    radiations,
    reciprocal_metric,
    two_theta_of,
    wavelength_of,
)

angles = st.floats(0.5, 179.0)
wavelengths = st.floats(0.1, 3.0)


@given(angles, wavelengths)
def test_an_angle_goes_there_and_back(two_theta: float, wavelength: float) -> None:
    d_spacing = d_spacing_of(two_theta, wavelength)
    assert 2.0 * d_spacing * math.sin(math.radians(two_theta / 2.0)) == pytest.approx(wavelength, rel=1e-12)
    assert two_theta_of(d_spacing, wavelength) == pytest.approx(two_theta, rel=1e-9)
    assert q_of(q_of(d_spacing)) == pytest.approx(d_spacing, rel=1e-12)


@given(angles, wavelengths, wavelengths)
def test_conversion_keeps_the_spacing_or_says_nan(two_theta: float, old: float, new: float) -> None:
    converted = float(convert_two_theta(two_theta, old, new))
    d_spacing = float(d_spacing_of(two_theta, old))
    if math.isnan(converted):
        assert new / (2.0 * d_spacing) > 1.0
    else:
        assert float(d_spacing_of(converted, new)) == pytest.approx(d_spacing, rel=1e-7)


def test_what_cannot_diffract_is_nan_without_a_warning() -> None:
    assert np.isnan(two_theta_of([0.7, 0.0, -1.0, np.nan], 1.5)).all()
    assert np.isnan(d_spacing_of([0.0, -5.0, 180.1, np.nan], 1.5)).all()
    assert np.isnan(q_of([0.0, -1.0, np.nan])).all()
    assert two_theta_of(0.75, 1.5) == 180.0
    assert d_spacing_of(180.0, 1.5) == pytest.approx(0.75)


def test_arrays_keep_their_shape() -> None:
    two_theta = np.array([[20.0, 40.0], [60.0, 80.0]])
    assert d_spacing_of(two_theta, 1.0).shape == (2, 2)
    assert (np.diff(d_spacing_of(two_theta.ravel(), 1.0)) < 0).all()


# Energies of K-alpha1 and K-alpha2 in eV, NIST X-ray Transition Energies Database (direct measurements).
ENERGIES = {
    "Cr": (5414.8045, 5405.5384),
    "Fe": (6404.0062, 6391.0264),
    "Co": (6930.3780, 6915.5380),
    "Mo": (17479.372, 17374.29),
    "Ag": (22162.917, 21990.30),
}
PLANCK_TIMES_LIGHT = 12398.41984  # eV Angstrom


@pytest.mark.parametrize("anode", ["Cu", *ENERGIES])
def test_radiations_are_those_of_the_tables(anode: str) -> None:
    lines = [radiations()[f"{anode}Ka{i}"] for i in (1, 2)]
    older = [WAVELENGTHS[f"{anode}Ka{i}"] for i in (1, 2)]
    assert lines == pytest.approx(older, abs=5e-5)  # pymatgen's digits, partly of 1967
    if anode in ENERGIES:
        assert lines == pytest.approx([PLANCK_TIMES_LIGHT / energy for energy in ENERGIES[anode]], rel=2e-6)
    mean = (2.0 * lines[0] + lines[1]) / 3.0
    assert wavelength_of(f"{anode}Ka") == round(mean, 5)  # as quoted, and as pymatgen has copper's
    assert lines[0] < mean < lines[1]


def test_copper_is_that_of_the_published_grid() -> None:
    assert wavelength_of("CuKa1") == KA1_WAVELENGTH == 1.54056
    assert wavelength_of("CuKa") == WAVELENGTHS["CuKa"] == 1.54184
    assert wavelength_of(0.7) == wavelength_of("0.7") == 0.7


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "0", "nan"])
def test_impossible_wavelengths_are_refused(value: str | float) -> None:
    with pytest.raises(ValueError, match="wavelength_of: wavelength must be finite and > 0 Angstrom, got"):
        wavelength_of(value)
    for function in (d_spacing_of, two_theta_of):
        with pytest.raises(ValueError, match="wavelength must be finite and > 0"):
            function(1.0, value)


def test_unknown_radiations_are_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"must be a number in Angstrom or one of CuKa1, .*, got 'CuKb'"):
        wavelength_of("CuKb")
    with pytest.raises(ValueError, match="got None"):
        wavelength_of(None)


def test_the_default_grid_is_the_published_one() -> None:
    grid = Grid()
    two_theta = grid.two_theta()
    assert grid.n_points == len(two_theta) == 8500
    assert two_theta[0] == 5.0
    assert two_theta[-1] == pytest.approx(89.99, abs=1e-9)
    assert (two_theta < 90.0).all()


@given(st.floats(0.0, 90.0), st.floats(1.0, 90.0), st.floats(0.005, 0.9))
def test_grids_are_half_open_and_leave_nothing_out(low: float, width: float, step: float) -> None:
    grid = Grid(low, low + width, step)
    two_theta = grid.two_theta()
    assert len(two_theta) == grid.n_points
    assert two_theta[-1] < grid.two_theta_max
    assert two_theta[-1] + step >= grid.two_theta_max - 1e-5 * step


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 90.0), (5.0, 181.0), (90.0, 5.0), (5.0, 5.0), (math.nan, 90.0)]
)
def test_impossible_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="Grid: two_theta_min, two_theta_max must be 0 <= min < max <= 180"):
        Grid(low, high)


@pytest.mark.parametrize("step", [0.0, -0.01, 86.0, math.nan])
def test_impossible_steps_are_refused(step: float) -> None:
    with pytest.raises(ValueError, match="Grid: two_theta_step must be > 0 and within the range, got"):
        Grid(two_theta_step=step)


@given(
    st.lists(st.floats(2.0, 30.0), min_size=3, max_size=3),
    st.lists(st.floats(75.0, 105.0), min_size=3, max_size=3),
    st.tuples(*[st.integers(-6, 6)] * 3).filter(any),
)
def test_reciprocal_metric_gives_the_spacings_of_pymatgen(
    lengths: list[float], cell_angles: list[float], hkl: tuple[int, int, int]
) -> None:
    lattice = Lattice.from_parameters(*lengths, *cell_angles)
    aa, bb, cc, bc, ac, ab = reciprocal_metric(lattice.matrix)
    h, k, l = hkl  # noqa: E741
    inverse_square = h * h * aa + k * k * bb + l * l * cc + 2 * (k * l * bc + h * l * ac + h * k * ab)
    assert inverse_square**-0.5 == pytest.approx(lattice.d_hkl(hkl), rel=1e-9)
    reciprocal = lattice.reciprocal_lattice_crystallographic.matrix
    full = reciprocal @ reciprocal.T
    expected = full[(0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)]
    np.testing.assert_allclose([aa, bb, cc, bc, ac, ab], expected, rtol=1e-9, atol=1e-12 * full.max())


def test_reciprocal_metric_takes_batches() -> None:
    lattice = np.random.default_rng(0).normal(size=(4, 2, 3, 3)) + 5.0 * np.eye(3)
    metric = reciprocal_metric(lattice)
    assert metric.shape == (4, 2, 6)
    np.testing.assert_allclose(metric[3, 1], reciprocal_metric(lattice[3, 1]), rtol=1e-12)
