"""Whole scans, each with its own points, smoothed over one width in degrees and brought to a model's axis; and lines as
such a scan would show them.

Not for their peaks (`xrdfast.data.peaks`); every step is `xrdfast.ops.preprocess`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from xrdfast.bragg import Grid
from xrdfast.ops.preprocess import MAX_SMOOTH_POINTS, preprocess_scans

_PEAK_FWHM, _PEAK_REACH = 0.1, 1.0  # degrees, of the peaks that lines get


def smoothing_points(two_theta: NDArray[np.float64], smooth_width: float) -> int:
    """Odd number of points whose ends lie about `smooth_width` degrees apart; 1 for no smoothing, at most 101.

    Args:
        two_theta: (n_points,) degrees, rising.
        smooth_width: degrees, >= 0.

    Example:
        >>> smoothing_points(np.arange(5.0, 90.0, 0.02), 0.08)
        5
    """
    if len(two_theta) < 2:
        return 1
    step = float(two_theta[-1] - two_theta[0]) / (len(two_theta) - 1)
    if not step > 0.0:
        return 1
    return 2 * min(round(0.5 * smooth_width / step), MAX_SMOOTH_POINTS // 2) + 1


def preprocess_whole_scans(
    two_theta: Sequence[NDArray[np.float64]],  # each (n_points of the scan,)
    intensity: Sequence[NDArray[np.floating]],  # the same
    wavelength: Sequence[float],
    *,
    grid: Grid,
    model_wavelength: float,
    smooth_width: float,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Scans without background and noise on the axis of a model: `preprocess_scans`, smoothed by width, not points.

    Args:
        two_theta: degrees, rising.
        intensity: any unit.
        wavelength: Angstrom; of K-alpha 1 for a doublet.
        grid: of the model.
        model_wavelength: Angstrom, of that axis.
        smooth_width: degrees; 0 for none.
        device: where it is done; results come back to the CPU.

    Returns:
        Patterns (n_scans, n_points) float32, 0 to 100; measured points (n_scans, 2) int32, the first and the one after
        the last.

    Raises:
        ValueError: as `preprocess_scans`.
    """
    by_points: dict[int, list[int]] = {}
    for scan, angles in enumerate(two_theta):
        by_points.setdefault(smoothing_points(angles, smooth_width), []).append(scan)
    pieces = [
        preprocess_scans(
            torch.tensor([0, *(len(two_theta[scan]) for scan in scans)]).cumsum(0).to(device),
            torch.from_numpy(np.concatenate([two_theta[scan] for scan in scans])).to(device),
            torch.from_numpy(np.concatenate([intensity[scan] for scan in scans])).to(device),
            torch.tensor([wavelength[scan] for scan in scans], dtype=torch.float64, device=device),
            grid=grid,
            model_wavelength=model_wavelength,
            smooth_points=n_points,
        )
        for n_points, scans in by_points.items()
    ]
    if len(pieces) == 1:
        return pieces[0].intensity.cpu(), pieces[0].measured.cpu()
    patterns = torch.zeros(len(two_theta), grid.n_points)
    measured = torch.zeros(len(two_theta), 2, dtype=torch.int32)
    for scans, piece in zip(by_points.values(), pieces, strict=True):
        patterns[scans], measured[scans] = piece.intensity.cpu(), piece.measured.cpu()
    return patterns, measured


def with_peak_shape(sticks: Tensor, grid: Grid) -> Tensor:
    """Sticks as a scan without background would show them, for a model of scans.

    Every one is an even mixture of a Gaussian and a Lorentzian, as wide as a usual laboratory's.

    Args:
        sticks: (n_patterns, n_points) on the grid.
        grid: of the patterns.

    Returns:
        (n_patterns, n_points), strongest point 100.
    """
    reach = round(_PEAK_REACH / grid.two_theta_step)
    u = torch.arange(-reach, reach + 1, dtype=torch.float64) * (2.0 * grid.two_theta_step / _PEAK_FWHM)
    shape = 0.5 * torch.exp2(-u.square()) + 0.5 / (1.0 + u.square())
    peaks = F.conv1d(sticks[:, None], shape.float()[None, None], padding=reach)[:, 0]
    return peaks * (100.0 / peaks.amax(dim=1, keepdim=True).clamp_min(1e-30))
