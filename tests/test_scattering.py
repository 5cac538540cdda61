"""Form factors and dispersion against the libraries they come from."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
from pymatgen.analysis.diffraction.xrd import ATOMIC_SCATTERING_PARAMS
from pymatgen.core import Element

from xrdfast.scattering import (
    FORM_FACTOR_TABLES,
    N_ELEMENTS,
    dispersion_table,
    element_symbols,
    form_factor_table,
)

S = np.linspace(0.0, 0.65, 14)


def test_pymatgen_table_equals_pymatgens():
    table = form_factor_table("pymatgen")
    assert set(np.flatnonzero(~np.isnan(table.c))) == {Element(s).Z for s in ATOMIC_SCATTERING_PARAMS}
    for symbol, terms in ATOMIC_SCATTERING_PARAMS.items():
        z = Element(symbol).Z
        np.testing.assert_array_equal(table.a[z], [*(a for a, _ in terms), 0.0])
        np.testing.assert_array_equal(table.b[z], [*(b for _, b in terms), 0.0])
        fit = sum(a * np.exp(-b * S**2) for a, b in terms)
        np.testing.assert_allclose(table.evaluate(z, S), z - 41.78214 * S**2 * fit, rtol=1e-12)


def test_international_table_equals_gemmis():
    table = form_factor_table("international")
    for z in range(1, 99):
        expected = [gemmi.Element(z).it92.calculate_sf(stol2=float(s * s)) for s in S]
        # gemmi evaluates the exponentials in single precision
        np.testing.assert_allclose(table.evaluate(z, S), expected, rtol=3e-6, atol=2e-6)


@pytest.mark.parametrize("name", FORM_FACTOR_TABLES)
def test_forward_scattering_is_the_number_of_electrons_and_falls(name):
    table = form_factor_table(name)
    for z in range(1, 93):
        f = table.evaluate(z, S)
        assert f[0] == pytest.approx(z, abs=0.08)
        assert (np.diff(f) < 0.0).all()


def test_the_two_tables_agree_to_their_fits():
    one, other = map(form_factor_table, FORM_FACTOR_TABLES)
    for z in (6, 8, 14, 26, 56, 82):
        assert np.abs(one.evaluate(z, S) - other.evaluate(z, S)).max() < 0.015 * z + 0.05


@pytest.mark.parametrize("z", [-1, 0, 110, N_ELEMENTS])
def test_missing_elements_are_refused(z):
    with pytest.raises(ValueError, match="evaluate: atomic_number must be in the pymatgen table"):
        form_factor_table("pymatgen").evaluate(z, S)


def test_unknown_table_is_refused():
    with pytest.raises(ValueError, match=r"form_factor_table: name must be one of .*, got 'waasmaier'"):
        form_factor_table("waasmaier")


def test_symbols_equal_pymatgens():
    symbols = element_symbols()
    assert len(symbols) == N_ELEMENTS
    for z in range(1, 99):
        assert symbols[z] == Element.from_Z(z).symbol


def test_dispersion_of_iron_at_copper_radiation():
    f_prime, f_double_prime = dispersion_table(1.54056)
    # International Tables C, table 4.2.6.8: -1.1336 and 3.1974
    assert f_prime[26] == pytest.approx(-1.13, abs=0.03)
    assert f_double_prime[26] == pytest.approx(3.20, abs=0.03)
    assert f_prime[0] == 0.0 and (f_double_prime[1:93] >= 0.0).all()
    assert np.isnan(f_prime[93:]).all() and np.isnan(f_double_prime[93:]).all()  # no zeros in disguise


@pytest.mark.parametrize("wavelength", [0.0, -1.0, float("nan"), float("inf")])
def test_dispersion_refuses_wavelengths(wavelength):
    with pytest.raises(ValueError, match="dispersion_table: wavelength must be finite and > 0"):
        dispersion_table(wavelength)
