"""How measurements differ: ranges of instruments and samples, and random parameters drawn from them.

Not for rendering (`xrdfast.ops.render_patterns`) or for strain and displacement, which are drawn with the cell
(`xrdfast.data.generate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from xrdfast.ops.line_profile import ProfileParameters

# Planes that plates and needles of common habits grow along.
_MARCH_AXES = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
_GRAPHITE_TWO_THETA = 26.6  # degrees, 002 under Cu K-alpha, of the usual diffracted-beam monochromator

Range = tuple[float, float]


@dataclass(frozen=True)
class ProfileConfig:
    """Ranges of a Bragg-Brentano diffractometer with a copper tube; drawn evenly unless said otherwise.

    Attributes:
        fwhm: degrees, the instrument's width at low angles, sqrt(w).
        caglioti_u: degrees^2, what widens it at high angles.
        caglioti_v: -v / (2 sqrt(u w)), < 1: how deep the minimum between is; below 1 the width stays real.
        crystallite_size: Angstrom, evenly in its logarithm.
        microstrain: without unit.
        eta: Lorentzian share.
        asymmetry: times cot 2theta, from axial divergence.
        second_wavelength, second_ratio: Angstrom and ratio of K-alpha2, and
        doublet_share: share of patterns that have it; the others are monochromatic.
        zero_shift: degrees. sample_displacement, goniometer_radius: mm.
        texture_share: share of patterns with preferred orientation.
        march_r: evenly in its logarithm, about a low-index axis.
        monochromator_share: share of patterns measured behind a graphite monochromator.
        counts: at the highest peak, evenly in the logarithm.
        background: constant part over the highest peak, evenly in the logarithm; the cubic's other coefficients
        background_shape: are up to this share of it, either way.
        hump_share: share of patterns with an amorphous halo of
        hump_height, hump_center, hump_fwhm: relative, degrees, degrees.
        two_theta_first, two_theta_last: degrees, the range that was measured.
        impurity_count, impurity_strength: foreign lines, and the strongest one's area over the strongest own one's.
    """

    fwhm: Range = (0.04, 0.14)
    caglioti_u: Range = (0.0, 0.02)
    caglioti_v: Range = (0.0, 0.8)
    crystallite_size: Range = (200.0, 5000.0)
    microstrain: Range = (0.0, 0.001)
    eta: Range = (0.1, 0.9)
    asymmetry: Range = (0.0, 0.05)
    second_wavelength: float = 1.54439
    second_ratio: float = 0.5
    doublet_share: float = 0.8
    zero_shift: Range = (-0.05, 0.05)
    sample_displacement: Range = (-0.15, 0.15)
    goniometer_radius: Range = (150.0, 280.0)
    texture_share: float = 0.5
    march_r: Range = (0.5, 1.5)
    monochromator_share: float = 0.5
    counts: Range = (300.0, 50_000.0)
    background: Range = (0.003, 0.15)
    background_shape: float = 0.4
    hump_share: float = 0.3
    hump_height: Range = (0.0, 0.1)
    hump_center: Range = (18.0, 32.0)
    hump_fwhm: Range = (6.0, 14.0)
    two_theta_first: Range = (5.0, 20.0)
    two_theta_last: Range = (60.0, 90.0)
    impurity_count: Range = (0.0, 4.0)
    impurity_strength: Range = (0.0, 0.05)


# A high-resolution powder diffractometer at a synchrotron (capillary, analyser crystals, 0.4 to 0.8 Angstrom), on the
# model's axis: at equal d, width on the copper axis = (1.54 / wavelength) (cos theta_measured / cos theta) times the
# measured one, so 0.005 to 0.02 degrees become 0.01 to 0.08. The axis's step, 0.01, asks for 0.02 at least. The
# Lorentz-polarisation factor becomes the axis's own in the mapping, hence no monochromator here.
_SYNCHROTRON = ProfileConfig(
    fwhm=(0.02, 0.06),
    caglioti_u=(0.0, 0.004),
    crystallite_size=(500.0, 10_000.0),
    microstrain=(0.0, 0.0006),
    asymmetry=(0.0, 0.02),
    doublet_share=0.0,
    zero_shift=(-0.01, 0.01),
    sample_displacement=(0.0, 0.0),  # a capillary turns on the axis
    texture_share=0.15,
    march_r=(0.8, 1.25),
    monochromator_share=0.0,
    counts=(3_000.0, 500_000.0),
    background=(0.001, 0.1),
    hump_share=0.7,  # glass or polymer of the capillary
    hump_height=(0.0, 0.08),
    hump_center=(14.0, 28.0),
    two_theta_first=(5.0, 9.0),
    two_theta_last=(75.0, 90.0),
    impurity_strength=(0.0, 0.02),
)

# Configurations by the name that AugmentConfig.profile and a run's TOML give.
PROFILES = {"lab": ProfileConfig(), "synchrotron": _SYNCHROTRON}


def draw_profiles(n: int, config: ProfileConfig, generator: Generator) -> ProfileParameters:
    """Parameters of n measurements, one seed the same ones.

    Returns:
        `ProfileParameters` of (n,) float64 tensors.
    """
    draws = iter(torch.rand(_DRAWS, n, generator=generator, dtype=torch.float64))
    return _profiles(n, config, lambda: next(draws))


_DRAWS = 28  # uniform numbers that `_profiles` takes; a test counts them


def _profiles(n: int, config: ProfileConfig, uniform) -> ProfileParameters:
    """Parameters from uniform numbers, in a fixed order."""

    def even(bounds: Range) -> Tensor:
        return bounds[0] + (bounds[1] - bounds[0]) * uniform()

    def logarithmic(bounds: Range) -> Tensor:
        return bounds[0] * (bounds[1] / bounds[0]) ** uniform()

    def holds(share: float) -> Tensor:
        return uniform() < share

    def constant(value: float) -> Tensor:
        return torch.full((n,), value, dtype=torch.float64)

    caglioti_w, caglioti_u = even(config.fwhm).square(), even(config.caglioti_u)
    caglioti_v = -2.0 * even(config.caglioti_v) * torch.sqrt(caglioti_u * caglioti_w)
    axis = torch.tensor(_MARCH_AXES, dtype=torch.float64)[(uniform() * len(_MARCH_AXES)).long()]
    march_r = torch.where(holds(config.texture_share), logarithmic(config.march_r), 1.0)
    behind_graphite = math.cos(math.radians(_GRAPHITE_TWO_THETA)) ** 2
    background = logarithmic(config.background)
    shape = [background * config.background_shape * (2.0 * uniform() - 1.0) for _ in range(3)]
    return ProfileParameters(
        caglioti_u=caglioti_u,
        caglioti_v=caglioti_v,
        caglioti_w=caglioti_w,
        crystallite_size=logarithmic(config.crystallite_size),
        microstrain=even(config.microstrain),
        eta=even(config.eta),
        asymmetry=even(config.asymmetry),
        second_wavelength=constant(config.second_wavelength),
        second_ratio=torch.where(holds(config.doublet_share), constant(config.second_ratio), 0.0),
        zero_shift=even(config.zero_shift),
        sample_displacement=even(config.sample_displacement),
        goniometer_radius=even(config.goniometer_radius),
        march_r=march_r,
        march_h=axis[:, 0],
        march_k=axis[:, 1],
        march_l=axis[:, 2],
        polarisation=torch.where(holds(config.monochromator_share), behind_graphite, constant(1.0)),
        counts=logarithmic(config.counts),
        background_0=background,
        background_1=shape[0],
        background_2=shape[1],
        background_3=shape[2],
        hump_height=torch.where(holds(config.hump_share), even(config.hump_height), 0.0),
        hump_center=even(config.hump_center),
        hump_fwhm=even(config.hump_fwhm),
        two_theta_first=even(config.two_theta_first),
        two_theta_last=even(config.two_theta_last),
        impurity_count=even(config.impurity_count),
        impurity_strength=even(config.impurity_strength),
    )
