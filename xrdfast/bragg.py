"""Bragg's law, radiations, the 2theta grid, and metrics of the reciprocal lattice.

    lambda = 2 d sin(theta),   q = 2 pi / d

Not for intensities (`xrdfast.ops.simulate`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

# K-alpha1, K-alpha2 in Angstrom. Copper: the values of the XRDecoupler grid (arXiv:2511.06976) and its
# doublet; the others: International Tables for Crystallography C (2004), table 4.2.2.4.
_DOUBLETS = {
    "Cu": (1.54056, 1.54439),
    "Mo": (0.70931715, 0.713607),
    "Co": (1.788996, 1.792835),
    "Fe": (1.936041, 1.939973),
    "Cr": (2.289726, 2.293651),
    "Ag": (0.55942178, 0.5638131),
}
KA1_WAVELENGTH = _DOUBLETS["Cu"][0]  # of every grid a model reads
# A stated wavelength this near a tabulated one is that one: tables differ by 5e-5 (1.54056, 1.540593, 1.540598),
# quoted means by 5e-5 (1.5418, 1.54184); K-alpha 1 and the mean are 8e-4 apart or more.
_SAME_WAVELENGTH = 2e-4


@functools.cache
def radiations() -> Mapping[str, float]:
    """Wavelengths by name, Angstrom: CuKa1, CuKa2 and CuKa, the mean weighted 2 to 1, to 5 decimals as quoted."""
    table: dict[str, float] = {}
    for anode, (first, second) in _DOUBLETS.items():
        table |= {
            f"{anode}Ka1": first,
            f"{anode}Ka2": second,
            f"{anode}Ka": round((2.0 * first + second) / 3.0, 5),
        }
    return MappingProxyType(table)


def wavelength_of(radiation: str | float) -> float:
    """Wavelength in Angstrom of a named radiation, or of a number given as such.

    Raises:
        ValueError: for an unknown name, or a number that is not finite and positive.

    Example:
        >>> wavelength_of("CuKa1")
        1.54056
        >>> wavelength_of("0.7")
        0.7
    """
    table = radiations()
    if radiation in table:
        return table[radiation]
    try:
        value = float(radiation)
    except (TypeError, ValueError):
        raise ValueError(
            f"wavelength_of: radiation must be a number in Angstrom or one of {', '.join(table)}, "
            f"got {radiation!r}"
        ) from None
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"wavelength_of: wavelength must be finite and > 0 Angstrom, got {radiation}")
    return value


def scan_wavelengths(radiation: str | float) -> tuple[float, float]:
    """K-alpha 1 and K-alpha 2 of a scan's stated radiation, in Angstrom; K-alpha 2 is 0 for a single wavelength.

    The weighted mean of a doublet means the doublet: its K-alpha 1 lines lie where K-alpha 1 puts them, up to 0.1
    degree from where the mean would. Any other wavelength is taken as it is.

    Raises:
        ValueError: as `wavelength_of`.

    Example:
        >>> scan_wavelengths(1.5418), scan_wavelengths("CuKa1"), scan_wavelengths(0.7)
        ((1.54056, 1.54439), (1.54056, 0.0), (0.7, 0.0))
    """
    stated = radiation_of(radiation)
    second = radiations()[f"{stated.name}2"] if stated.is_doublet else 0.0
    return stated.wavelength, second


def doublet_anode(wavelength: float) -> str | None:
    """The anode whose weighted K-alpha mean this is: such a number states the doublet, not one line.

    Example:
        >>> doublet_anode(1.5418), doublet_anode(1.5406)
        ('Cu', None)
    """
    return _anode_of(wavelength, "Ka")


@dataclass(frozen=True)
class Radiation:
    """What a pattern was measured with.

    Attributes:
        wavelength: Angstrom; of K-alpha 1 for a doublet.
        name: "CuKa" for both lines of a doublet, "CuKa1" for the first alone, "" for any other radiation.
    """

    wavelength: float
    name: str = ""

    @property
    def is_doublet(self) -> bool:
        """Whether K-alpha 2 satellites go with it."""
        return self.name.endswith("Ka")


@functools.lru_cache(maxsize=1024)  # screening asks for every scan
def radiation_of(stated: str | float) -> Radiation:
    """Radiation that a name or a single number states; a weighted K-alpha mean means the doublet.

    Raises:
        ValueError: for an unknown name, or a number that is not finite and positive.

    Example:
        >>> radiation_of(1.54184)
        Radiation(wavelength=1.54056, name='CuKa')
        >>> radiation_of("CoKa1").wavelength, radiation_of(0.7).name
        (1.788996, '')
    """
    wavelength = wavelength_of(stated)
    if anode := doublet_anode(wavelength):
        return Radiation(radiations()[f"{anode}Ka1"], f"{anode}Ka")
    anode = _anode_of(wavelength, "Ka1")
    return Radiation(wavelength, f"{anode}Ka1" if anode else "")


def radiation_of_lines(first: float, second: float) -> Radiation:
    """Radiation of two stated lines: a doublet where they are K-alpha 1 and 2 of an anode, else the first alone.

    Raises:
        ValueError: for a first wavelength that is not finite and positive.

    Example:
        >>> radiation_of_lines(1.540598, 1.544426)
        Radiation(wavelength=1.540598, name='CuKa')
        >>> radiation_of_lines(1.2079, 1.2084).name
        ''
    """
    alone = radiation_of(first)
    anode = _anode_of(alone.wavelength, "Ka1")
    if anode and anode == _anode_of(second, "Ka2"):
        return Radiation(alone.wavelength, f"{anode}Ka")
    return alone


def _anode_of(wavelength: float, line: str) -> str | None:
    """The anode with this line, "Ka1", "Ka2" or their mean "Ka"."""
    table = radiations()
    for anode in _DOUBLETS:
        if math.isclose(wavelength, table[anode + line], rel_tol=_SAME_WAVELENGTH):
            return anode
    return None


def d_spacing_of(two_theta: ArrayLike, wavelength: float) -> NDArray[np.float64]:
    """Spacing d in Angstrom at angles in degrees, 0 < 2theta <= 180; NaN elsewhere.

    Raises:
        ValueError: for a wavelength that is not finite and positive.

    Example:
        >>> round(float(d_spacing_of(60.0, 2.0)), 9)
        2.0
    """
    two_theta = np.asarray(two_theta, dtype=np.float64)
    inside = (two_theta > 0.0) & (two_theta <= 180.0)
    sine = np.sin(np.radians(np.where(inside, two_theta, 180.0) / 2.0))
    return np.where(inside, wavelength_of(wavelength) / (2.0 * sine), np.nan)


def two_theta_of(d_spacing: ArrayLike, wavelength: float) -> NDArray[np.float64]:
    """2theta in degrees of spacings in Angstrom; NaN where nothing diffracts: lambda / 2d > 1 or d <= 0.

    Raises:
        ValueError: for a wavelength that is not finite and positive.

    Example:
        >>> float(two_theta_of(1.0, 2.0))
        180.0
    """
    d_spacing = np.asarray(d_spacing, dtype=np.float64)
    wavelength = wavelength_of(wavelength)
    reachable = d_spacing >= wavelength / 2.0
    sine = wavelength / (2.0 * np.where(reachable, d_spacing, wavelength))
    return np.where(reachable, np.degrees(2.0 * np.arcsin(sine)), np.nan)


def q_of(d_spacing: ArrayLike) -> NDArray[np.float64]:
    """Scattering vector q = 2 pi / d in 1/Angstrom, or d from q by the same rule; NaN where that is <= 0.

    Example:
        >>> round(float(q_of(1.0)), 6)
        6.283185
    """
    d_spacing = np.asarray(d_spacing, dtype=np.float64)
    positive = d_spacing > 0.0
    return np.where(positive, 2.0 * np.pi / np.where(positive, d_spacing, 1.0), np.nan)


def convert_two_theta(two_theta: ArrayLike, wavelength: float, new_wavelength: float) -> NDArray[np.float64]:
    """Angles at another wavelength, through d; NaN where the reflection does not exist there."""
    return two_theta_of(d_spacing_of(two_theta, wavelength), new_wavelength)


def convert_lines(
    two_theta: NDArray[np.float64],  # (n_lines,)
    intensity: NDArray[np.float64],  # (n_lines,)
    wavelength: float,
    new_wavelength: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lines as another wavelength shows them, with its Lorentz-polarisation factor (no monochromator).

    Args:
        two_theta: degrees, > 0.
        intensity: any scale.
        wavelength, new_wavelength: Angstrom.

    Returns:
        Angles and intensities; NaN where the reflection does not exist there.
    """
    if wavelength == new_wavelength:
        return two_theta, intensity
    moved = convert_two_theta(two_theta, wavelength, new_wavelength)

    def factor(angle: NDArray[np.float64]) -> NDArray[np.float64]:
        theta = np.radians(angle / 2.0)
        return (1.0 + np.cos(2.0 * theta) ** 2) / (np.sin(theta) ** 2 * np.cos(theta))

    with np.errstate(invalid="ignore"):
        return moved, intensity * factor(moved) / factor(two_theta)


@dataclass(frozen=True)
class Grid:
    """A 2theta axis, half-open: point k stands for two_theta_min + k * two_theta_step, degrees.

    The default is the grid of XRDecoupler: 8,500 points from 5 to, not including, 90 degrees.

    Raises:
        ValueError: for limits outside 0..180, an empty range or a step that is not positive.
    """

    two_theta_min: float = 5.0
    two_theta_max: float = 90.0
    two_theta_step: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 <= self.two_theta_min < self.two_theta_max <= 180.0:
            raise ValueError(
                f"Grid: two_theta_min, two_theta_max must be 0 <= min < max <= 180 degrees, "
                f"got {self.two_theta_min}, {self.two_theta_max}"
            )
        if not 0.0 < self.two_theta_step <= self.two_theta_max - self.two_theta_min:
            raise ValueError(
                f"Grid: two_theta_step must be > 0 and within the range, got {self.two_theta_step}"
            )

    @property
    def n_points(self) -> int:
        """Number of points, two_theta_max never among them."""
        steps = (self.two_theta_max - self.two_theta_min) / self.two_theta_step
        return math.ceil(steps - 1e-6)  # 85 / 0.01 must be 8500 however it rounds

    def two_theta(self) -> NDArray[np.float64]:
        """(n_points,) angles of the points, degrees."""
        return self.two_theta_min + self.two_theta_step * np.arange(self.n_points)


def reciprocal_metric(lattice: ArrayLike) -> NDArray[np.float64]:
    """a*.a*, b*.b*, c*.c*, b*.c*, a*.c*, a*.b* of cells, so that 1/d^2 = h^T G* h.

    Args:
        lattice: (..., 3, 3), rows a, b, c in Angstrom.

    Returns:
        (..., 6) float64, 1/Angstrom^2.

    Example:
        >>> reciprocal_metric(2.0 * np.eye(3)).tolist()
        [0.25, 0.25, 0.25, 0.0, 0.0, 0.0]
    """
    lattice = np.asarray(lattice, dtype=np.float64)
    inverse = np.linalg.inv(lattice @ np.swapaxes(lattice, -1, -2))
    return inverse[..., (0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)]
