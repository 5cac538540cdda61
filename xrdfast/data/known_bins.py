"""The axis on which scans and known structures are compared, and their coarse comparison in bins of it.

For `xrdfast.retrieval`; its lines are `xrdfast.data.known_lines`', its fine comparison `xrdfast.ops.retrieval`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xrdfast.bragg import KA1_WAVELENGTH, Grid
from xrdfast.data.known_lines import q_squared
from xrdfast.ops.reflections import rows_of

GRID = Grid()  # the axis that scans are brought to first

# The axis of comparison, ln q: 0.05 % steps over the angles of GRID.
STEP = 0.0005
LOG_Q_MIN, LOG_Q_MAX = (
    math.log(2.0 * math.sin(math.radians(0.5 * angle)) / KA1_WAVELENGTH)
    for angle in (GRID.two_theta_min, GRID.two_theta_max)
)
POWER = 0.35  # of intensities that are compared: places of weak lines count beside heights of strong ones
_WEAK = 1.0  # of 100: intensity that counts half, for what noise and background leave is weaker
_N_POINTS = int((LOG_Q_MAX - LOG_Q_MIN) / STEP) + 1
_THETA = torch.asin(
    0.5 * KA1_WAVELENGTH * torch.exp(LOG_Q_MIN + STEP * torch.arange(_N_POINTS, dtype=torch.float64))
)
# Place of the axis' points on GRID; their weights, so that sums are over 2theta: d 2theta = 2 tan theta d ln q.
_PLACE = (2.0 * torch.rad2deg(_THETA) - GRID.two_theta_min) / GRID.two_theta_step
ANGLE_WEIGHT = torch.tan(_THETA).float()

# The coarse comparison: 0.8 % bins, each structure tried at strains of up to 6 bins.
_BIN_POINTS = 16
_N_BINS = _N_POINTS // _BIN_POINTS + 1
_SPLIT_SIGMA, _BIN_SIGMA = 0.7, 0.8  # bins: of intensity before its power is taken, of the power after it
_MIN_SQUARE = 0.1  # of a structure's powers within what was measured: with less it has no line there
_SHIFTS = range(-6, 7)
_STRUCTURES_IN_CACHE = 512  # 0.7 MB of the coarse comparison, and as much of products


class CoarseLines:
    """Powers of intensity of all structures in bins of ln q, for one matrix product a strain."""

    def __init__(self, line_offset: Tensor, hkl: Tensor, line_amplitude: Tensor, metric: Tensor) -> None:
        structure = rows_of(line_offset, len(hkl))
        log_q = 0.5 * torch.log(q_squared(hkl, metric[structure]))
        place = ((log_q - LOG_Q_MIN) / (STEP * _BIN_POINTS)).floor().long()
        there = (place >= 0) & (place < _N_BINS)
        flat = torch.zeros(len(metric) * _N_BINS)
        flat.index_add_(0, (structure * _N_BINS + place)[there], without_weak(line_amplitude.square())[there])
        self.amplitude = _in_bins(flat.view(-1, _N_BINS))
        # Sums from the first bin on, (n_bins + 1, N): a range's is a difference of two rows.
        self._sum, self._square_sum = (
            torch.nn.functional.pad(x.T.double().cumsum(0), (0, 0, 1, 0)).float()
            for x in (self.amplitude, self.amplitude.square())
        )

    def compare(self, intensity: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
        """Largest cosine over all strains, and difference of log `spread`, scan against structure, (n_scans, N).

        Args:
            intensity: (n_scans, n_points) on the axis, `without_weak`.
            span: (n_scans, 2) measured points.
        """
        area = intensity * ANGLE_WEIGHT
        short = _N_BINS * _BIN_POINTS - _N_POINTS
        scans = _in_bins(torch.nn.functional.pad(area, (0, short)).view(-1, _N_BINS, _BIN_POINTS).sum(2))
        n_scans = len(scans)
        moved = torch.zeros(len(_SHIFTS), n_scans, _N_BINS)
        for row, shift in zip(moved, _SHIFTS, strict=True):
            row[:, max(shift, 0) : _N_BINS + min(shift, 0)] = scans[
                :, max(-shift, 0) : _N_BINS - max(shift, 0)
            ]
        best = torch.empty(n_scans, len(self.amplitude))
        begin = 0
        for block in self.amplitude.split(_STRUCTURES_IN_CACHE):
            products = (moved.view(-1, _N_BINS) @ block.T).view(len(_SHIFTS), n_scans, -1)
            torch.amax(products, dim=0, out=best[:, begin : begin + len(block)])
            begin += len(block)
        first, end = (span[:, 0] // _BIN_POINTS).long(), (-(-span[:, 1] // _BIN_POINTS)).long()
        total, square = ((sums[end] - sums[first]).clamp(min=1e-6) for sums in (self._sum, self._square_sum))
        own = scans.square().sum(1, keepdim=True).clamp(min=1e-12)
        cosine = torch.where(square > _MIN_SQUARE, best / (square.sqrt() * own.sqrt()), 0.0)
        spread = torch.log((scans.sum(1, keepdim=True).square() / own).clamp(min=1e-6))
        return cosine, spread - torch.log(total.square() / square)


def without_weak(intensity: Tensor) -> Tensor:
    """I^2 / (I + 1) of intensities of at most 100: hardly changed where strong, next to nothing where weak."""
    return intensity.square() / (intensity + _WEAK)


def on_axis(intensity: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    """Patterns of GRID on the axis of ln q, (n_scans, n_points), and which of its points were measured."""
    left = _PLACE.long().clamp(max=GRID.n_points - 2)
    share = (_PLACE - left).float()
    moved = torch.lerp(intensity[:, left], intensity[:, left + 1], share.expand(len(intensity), -1))
    first, end = measured.T.double().contiguous()
    ends = [torch.searchsorted(_PLACE, first), torch.searchsorted(_PLACE, end - 1.0, right=True)]
    span = torch.stack(ends, dim=1).int()
    span[measured[:, 0] >= measured[:, 1]] = 0
    return moved, span


def _in_bins(intensity: Tensor) -> Tensor:
    """Powers of intensities in bins, blurred so that lines near a bin's edge count in both."""
    return _blurred(_blurred(intensity, _SPLIT_SIGMA).clamp(min=0.0).pow(POWER), _BIN_SIGMA)


def _blurred(rows: Tensor, sigma: float) -> Tensor:
    reach = int(3.0 * sigma + 1.0)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    return torch.nn.functional.conv1d(rows[:, None], (kernel / kernel.sum())[None, None], padding=reach)[:, 0]
