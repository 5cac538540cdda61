"""How the lines of one pattern look, in plain PyTorch and float64: what csrc/line_profile.h computes.

Parameters of a measurement, and from them the lines' angles, widths, areas and their sum on the grid. Not for noise
and preprocessing (`xrdfast.ops.render_patterns`), and the parameters are drawn elsewhere (`xrdfast.data.profiles`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xrdfast.ops.random import IMPURITY_STREAM, philox, unit

CUTOFF = 1e-4  # of its height: a profile is evaluated out to here
LINE_BLOCK = 16  # points: a profile's window is widened to whole blocks, one vector of the CPU kernel
MAX_ASYMMETRY = 0.5
SCHERRER_K = 0.9


class ProfileParameters(NamedTuple):
    """How each of n patterns is measured; every field is (n_patterns,) float64. Order and names as in csrc.

    Attributes:
        caglioti_u, caglioti_v, caglioti_w: degrees^2, FWHM^2 = u tan^2 theta + v tan theta + w, > 0 on the grid.
        crystallite_size: Angstrom, > 0; infinity broadens nothing. FWHM = 0.9 wavelength / (size cos theta).
        microstrain: >= 0; FWHM = 4 microstrain tan theta. The three widths add in squares, to a step at least.
        eta: Lorentzian share of the pseudo-Voigt's area, 0..1.
        asymmetry: a = asymmetry cot 2theta, at most 0.5 either way, splits FWHM into halves of (1 + a) on the
            low-angle side and (1 - a) on the other.
        second_wavelength: Angstrom, > 0, K-alpha2.
        second_ratio: its intensity over K-alpha1's, >= 0; 0 for monochromatic.
        zero_shift: degrees, observed = true + shift.
        sample_displacement: mm; moves a line by -2 s cos theta / R.
        goniometer_radius: mm, > 0, R.
        march_r: March-Dollase parameter, > 0; 1 for no preferred orientation, < 1 for plates.
        march_h, march_k, march_l: normal of the textured planes, Miller indices, not all 0.
        polarisation: P in (1 + P cos^2 2theta) / (sin^2 theta cos theta), 0..1: 1 without monochromator,
            cos^2 of its 2theta with one, 0 at a synchrotron.
        counts: expected at the highest point of the peaks, 0..1e6; 0 leaves noise and clipping out.
        background_0 .. background_3: Chebyshev coefficients over the grid, relative to the highest point.
        hump_height, hump_center, hump_fwhm: an amorphous halo, Gaussian: relative, degrees, degrees > 0. Where the
            sum of background and hump is negative it counts as 0.
        two_theta_first, two_theta_last: degrees, what was measured; the rest of the grid is 0.
        impurity_count: foreign lines, 0..16, fractions cut off.
        impurity_strength: area of the strongest possible foreign line over that of the strongest own one, >= 0.
    """

    caglioti_u: Tensor
    caglioti_v: Tensor
    caglioti_w: Tensor
    crystallite_size: Tensor
    microstrain: Tensor
    eta: Tensor
    asymmetry: Tensor
    second_wavelength: Tensor
    second_ratio: Tensor
    zero_shift: Tensor
    sample_displacement: Tensor
    goniometer_radius: Tensor
    march_r: Tensor
    march_h: Tensor
    march_k: Tensor
    march_l: Tensor
    polarisation: Tensor
    counts: Tensor
    background_0: Tensor
    background_1: Tensor
    background_2: Tensor
    background_3: Tensor
    hump_height: Tensor
    hump_center: Tensor
    hump_fwhm: Tensor
    two_theta_first: Tensor
    two_theta_last: Tensor
    impurity_count: Tensor
    impurity_strength: Tensor

    def table(self) -> Tensor:
        """(n_patterns, n_fields) float64, what the kernels read."""
        return torch.stack([x.double() for x in self], dim=1)


class Lines(NamedTuple):
    """Lines of one pattern; angles observed, in degrees."""

    center: Tensor  # points
    fwhm: Tensor  # points
    split: Tensor  # (1 + split) / 2 of it on the low-angle side
    area: Tensor


def weigh_families(
    hkl: Tensor, metric: Tensor, rotations: Tensor, p: ProfileParameters
) -> tuple[Tensor, Tensor]:
    """1/d^2 and the March-Dollase weight of families.

    The mean over a family's members h W of a function of their angle with the axis is the mean over the axis' images
    of a function of their angle with h, as rotations keep the metric.
    """
    aa, bb, cc, bc, ac, ab = metric.double().unbind()
    dot = torch.stack([aa, ab, ac, ab, bb, bc, ac, bc, cc]).view(3, 3)
    h = hkl.double()
    g2 = ((h @ dot) * h).sum(1)
    if p.march_r == 1.0:
        return g2, torch.ones_like(g2)
    axis = torch.stack([p.march_h, p.march_k, p.march_l])
    images = axis @ rotations.double() if len(rotations) else axis[None]  # (n_rotations, 3)
    length2 = ((images @ dot) * images).sum(1)
    cos2 = (h @ dot @ images.T).square() / (g2[:, None] * length2)
    cos2 = cos2.clamp(max=1.0)
    return g2, (p.march_r**2 * cos2 + (1.0 - cos2) / p.march_r).pow(-1.5).mean(1)


def make_lines(
    g2: Tensor, weight: Tensor, p: ProfileParameters, wavelength: float, minimum: float, step: float
) -> tuple[Lines, Lines]:
    """Lines of the two wavelengths; what does not diffract or is too faint to be a number is left out."""
    made = []
    for length, ratio in ((wavelength, 1.0), (float(p.second_wavelength), float(p.second_ratio))):
        sin2 = 0.25 * length**2 * g2
        cos_two_theta = 1.0 - 2.0 * sin2
        lp = (1.0 + p.polarisation * cos_two_theta.square()) / (sin2 * torch.sqrt(1.0 - sin2))
        area = ratio * weight * lp
        keep = (sin2 > 0.0) & (sin2 < 1.0) & (area > 0.0) & (area < math.inf)
        made.append(_shape(sin2[keep], area[keep], p, length, minimum, step))
    return made[0], made[1]


def _shape(
    sin2: Tensor, area: Tensor, p: ProfileParameters, wavelength: float, minimum: float, step: float
) -> Lines:
    sine, cosine = torch.sqrt(sin2), torch.sqrt(1.0 - sin2)
    tangent = sine / cosine
    size = math.degrees(SCHERRER_K * wavelength) / (p.crystallite_size * cosine)
    strain = math.degrees(4.0) * p.microstrain * tangent
    caglioti = p.caglioti_u * tangent.square() + p.caglioti_v * tangent + p.caglioti_w
    fwhm = torch.sqrt(caglioti + size.square() + strain.square())
    split = p.asymmetry * (1.0 - 2.0 * sin2) / (2.0 * sine * cosine)
    angle = 2.0 * torch.rad2deg(torch.asin(sine)) + p.zero_shift
    angle = angle - math.degrees(2.0) * p.sample_displacement * cosine / p.goniometer_radius
    split = split.clamp(-MAX_ASYMMETRY, MAX_ASYMMETRY)
    lines = ((angle - minimum) / step, (fwhm / step).clamp(min=1.0), split, area)
    keep = (fwhm > 0.0) & (fwhm < 1e6)  # beyond the grid nothing vouches for Caglioti's formula
    return Lines(*(x[keep] for x in lines))


def measured_ranges(p: ProfileParameters, grid: tuple[float, float, int]) -> tuple[Tensor, Tensor]:
    """First and past-the-last point that each measured, int64; an angle a hair off a point means that point.

    Args:
        p: columns (n_patterns,), or numbers for one pattern.
        grid: lowest angle, step in degrees, points.

    Returns:
        Two tensors (n_patterns,), or () for numbers, 0..points.
    """
    minimum, step, n_points = grid
    first, last = (
        torch.ceil((torch.as_tensor(x) - minimum) / step - 1e-6).clamp(0, n_points).long()
        for x in (p.two_theta_first, p.two_theta_last)
    )
    return first, last


def impurities(
    strongest: Tensor,
    p: ProfileParameters,
    wavelength: float,
    grid: tuple[float, float, int],
    pattern_id: int,
    seed: int,
) -> tuple[Lines, Lines]:
    """Foreign lines at random angles of what was measured, with the K-alpha2 partners of their spacings."""
    minimum, step, _ = grid
    first, last = map(int, measured_ranges(p, grid))
    words = philox(torch.arange(int(p.impurity_count)), IMPURITY_STREAM, pattern_id, seed)
    angle = minimum + step * (first + (last - first) * unit(words[0]))
    area = strongest * p.impurity_strength * unit(words[1])
    sin2 = torch.sin(torch.deg2rad(0.5 * angle)).square()
    sin2_second = sin2 * (p.second_wavelength / wavelength) ** 2
    second = (sin2_second < 1.0) & (p.second_ratio > 0.0)
    return (
        _shape(sin2, area, p, wavelength, minimum, step),
        _shape(
            sin2_second[second], p.second_ratio * area[second], p, float(p.second_wavelength), minimum, step
        ),
    )


def sum_profiles(lines: Lines, eta: Tensor, n_points: int) -> Tensor:
    """Sum of split pseudo-Voigts on the grid."""
    lorentzian, gaussian = eta * 2.0 / math.pi, (1.0 - eta) * 2.0 * math.sqrt(math.log(2.0) / math.pi)
    reach = cutoff(float(lorentzian / (lorentzian + gaussian)))
    low, high = 0.5 * lines.fwhm * (1.0 + lines.split), 0.5 * lines.fwhm * (1.0 - lines.split)
    begin = torch.ceil(lines.center - reach * low)
    begin = torch.where(begin < n_points, begin.clamp(min=0.0) // LINE_BLOCK, math.inf)
    end = torch.floor(lines.center + reach * high).clamp(-1, n_points - 1) // LINE_BLOCK
    point = torch.arange(n_points, dtype=torch.float64)
    block = point // LINE_BLOCK
    total = torch.zeros(n_points, dtype=torch.float64)
    pieces = zip(
        *(x.split(64) for x in (lines.center, lines.fwhm, low, high, lines.area, begin, end)), strict=True
    )
    for center, fwhm, left, right, area, first, last in pieces:
        distance = point - center[:, None]
        u2 = (distance / torch.where(distance <= 0.0, left[:, None], right[:, None])).square()
        height = lorentzian / (1.0 + u2) + gaussian * torch.exp2(-u2)
        inside = (block >= first[:, None]) & (block <= last[:, None])
        total += torch.where(inside, (area / fwhm)[:, None] * height, 0.0).sum(0)
    return total


def cutoff(lorentzian: float) -> float:
    """Half widths from the middle at which a pseudo-Voigt falls to `CUTOFF` of its height.

    Args:
        lorentzian: share of its Lorentzian part in the height.
    """
    low, high = 1.0, 1.0 / math.sqrt(CUTOFF)
    for _ in range(60):
        u = 0.5 * (low + high)
        above = lorentzian / (1.0 + u * u) + (1.0 - lorentzian) * math.exp2(-u * u) > CUTOFF
        low, high = (u, high) if above else (low, u)
    return high
