"""How atoms scatter X-rays: form factors and dispersion by atomic number. Not for structure factors.

Two form-factor tables, neither a superset of the other:

* "pymatgen": f = Z - 41.78214 s^2 sum_k a_k exp(-b_k s^2), a Mott-Bethe fit (De Graef & McHenry, Structure
  of Materials, 2012), as pymatgen ships it (MIT licence); embedded, so that training needs neither pymatgen
  nor gemmi.
* "international": f = c + sum_k a_k exp(-b_k s^2) (International Tables C, 1992, table 6.1.1.4), from gemmi.

s = sin(theta) / lambda in 1/Angstrom.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

N_ELEMENTS = 119  # rows of every table: atomic numbers 0 (no element) to 118
FORM_FACTOR_TABLES = ("pymatgen", "international")
_GAUSSIANS = 5
_MOTT_BETHE = 41.78214  # Angstrom^2
# hc in eV Angstrom (CODATA 2018)
_HC = 12398.419843320026


@dataclass(frozen=True)
class FormFactors:
    """Coefficients of one table, by atomic number.

    Attributes:
        name: of the table.
        a: (N_ELEMENTS, 5) float64, zero-padded.
        b: (N_ELEMENTS, 5) float64, Angstrom^2.
        c: (N_ELEMENTS,) float64; NaN where the table has no such element.
        mott_bethe: which of the two formulas above the coefficients are for; c is Z in the first.
    """

    name: str
    a: NDArray[np.float64]
    b: NDArray[np.float64]
    c: NDArray[np.float64]
    mott_bethe: bool

    def evaluate(self, atomic_number: int, s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Electrons f at s = sin(theta) / lambda in 1/Angstrom.

        Raises:
            ValueError: for an element that the table lacks.

        Example:
            >>> float(form_factor_table("pymatgen").evaluate(26, np.zeros(1))[0])
            26.0
        """
        if not (0 < atomic_number < N_ELEMENTS) or np.isnan(self.c[atomic_number]):
            raise ValueError(f"evaluate: atomic_number must be in the {self.name} table, got {atomic_number}")
        s2 = np.square(np.asarray(s, dtype=np.float64))
        sum_ = (self.a[atomic_number] * np.exp(-np.multiply.outer(s2, self.b[atomic_number]))).sum(-1)
        return self.c[atomic_number] + (-_MOTT_BETHE * s2 if self.mott_bethe else 1.0) * sum_


@functools.lru_cache(maxsize=2)
def form_factor_table(name: str) -> FormFactors:
    """One of `FORM_FACTOR_TABLES`.

    Raises:
        ValueError: for another name.
        ImportError: for "international" without gemmi.
    """
    if name not in FORM_FACTOR_TABLES:
        tables = ", ".join(FORM_FACTOR_TABLES)
        raise ValueError(f"form_factor_table: name must be one of {tables}, got {name!r}")
    a, b = np.zeros((2, N_ELEMENTS, _GAUSSIANS))
    c = np.full(N_ELEMENTS, np.nan)
    if name == "pymatgen":
        for z, terms in _embedded().values():
            a[z, : len(terms)], b[z, : len(terms)] = np.transpose(terms)
            c[z] = z
    else:
        import gemmi

        for z in range(1, N_ELEMENTS):
            if (entry := gemmi.Element(z).it92) is not None:
                a[z, :4], b[z, :4], c[z] = entry.a, entry.b, entry.c
    return FormFactors(name, a, b, c, mott_bethe=name == "pymatgen")


@functools.lru_cache(maxsize=1)
def element_symbols() -> tuple[str, ...]:
    """Symbols by atomic number, from the embedded table; "X" where it has none.

    Example:
        >>> element_symbols()[26]
        'Fe'
    """
    symbols = ["X"] * N_ELEMENTS
    for symbol, (z, _) in _embedded().items():
        if symbol != "D":  # deuterium scatters X-rays as hydrogen does
            symbols[z] = symbol
    return tuple(symbols)


def _embedded() -> dict[str, tuple[int, list[list[float]]]]:
    return json.loads((Path(__file__).parent / "form_factors.json").read_text(encoding="ascii"))


def dispersion_table(wavelength: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Dispersion corrections f' and f'' of every element at a wavelength, in electrons.

    Args:
        wavelength: Angstrom, finite and > 0.

    Returns:
        Two arrays (N_ELEMENTS,); zero for row 0, NaN beyond Z = 92, where the source ends.

    Raises:
        ValueError: for a wavelength that is not finite and positive.
        ImportError: without gemmi.

    Source:
        Cromer & Liberman (1981), as gemmi computes it.
    """
    if not (np.isfinite(wavelength) and wavelength > 0.0):
        raise ValueError(f"dispersion_table: wavelength must be finite and > 0 Angstrom, got {wavelength}")
    import gemmi

    f_prime, f_double_prime = np.full((2, N_ELEMENTS), np.nan)
    f_prime[0] = f_double_prime[0] = 0.0
    for z in range(1, 93):  # gemmi answers 0 beyond, where f'' is above 10 electrons
        f_prime[z], f_double_prime[z] = gemmi.cromer_liberman(z=z, energy=_HC / wavelength)
    return f_prime, f_double_prime
