"""Measured patterns against known structures whose cells may strain: the fit and the score of given candidates.

Not for choosing the candidates or for what follows from the scores (`xrdfast.retrieval`). On the CPU only: what is
fitted is a few hundred ragged candidates a scan, after a matrix product that any device does well.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xrdfast import _native
from xrdfast.ops import LIBRARY
from xrdfast.ops.render import check_offsets, check_tensors

FIT_PARAMETERS = 7  # six strains, the first isotropic, and the zero shift
ISOTROPIC_SLOPE = -1.0 / math.sqrt(3.0)  # of ln q with the first strain
_BLUR = (0.006, 0.003, 0.0015)  # standard deviations in ln q
_STEPS = (0, 0, 1, 1, 2, 2, 2)  # blur of each step of the fit
_TRUNCATION = 3.0  # standard deviations that a blur reaches
_STRAINS, _STRAIN_STEP = 25, 0.002  # of the isotropic search, on either side of none
_ISOTROPIC_STRAIN, _OTHER_STRAIN, _ZERO_SHIFT = 0.02, 0.006, 0.05  # expected of a fit; the last in degrees
_EVIDENCE = 8.0  # lines' worth of it that stand against what is expected
_LINE_WIDTH = 0.06  # degrees 2theta, standard deviation of a line's amplitude
_HALF_DEGREE = math.pi / 360.0
_MIN_SIN2, _MAX_SIN2 = 1e-4, 0.999
_REACH = 4.0  # standard deviations that a line reaches

LIBRARY.define(
    "match_structures(Tensor amplitude, Tensor measured, Tensor weight, Tensor candidate, Tensor line_offset, "
    "Tensor hkl, Tensor line_amplitude, Tensor metric, Tensor metric_change, float log_q_min, float log_q_step, "
    "float wavelength) -> (Tensor, Tensor)"
)


class StructureMatches(NamedTuple):
    """How well candidates explain scans, and with what cell."""

    score: Tensor  # (n_scans, n_candidates) float32, 0..1; -1 where there is no candidate
    fit: Tensor  # (n_scans, n_candidates, 7) float32: strains, the first isotropic; zero shift in degrees 2theta


def match_structures(
    amplitude: Tensor,  # (n_scans, n_points)
    measured: Tensor,  # (n_scans, 2)
    weight: Tensor,  # (n_points,)
    candidate: Tensor,  # (n_scans, n_candidates)
    line_offset: Tensor,  # (n_structures + 1,)
    hkl: Tensor,  # (n_lines, 3)
    line_amplitude: Tensor,  # (n_lines,)
    metric: Tensor,  # (n_structures, 6)
    metric_change: Tensor,  # (n_structures, 6, 6)
    *,
    log_q_min: float,
    log_q_step: float,
    wavelength: float,
) -> StructureMatches:
    """Fits the cells of candidates to measured patterns and compares them, on an even axis of ln q, q = 1 / d.

    1. The amplitudes are blurred by Gaussians Y of 0.6, 0.3 and 0.15 % in q.
    2. Of 51 isotropic strains to +-5 %, the one with the largest sum over lines of amplitude times Y.
    3. Two, two and three steps of mean shift at the three blurs, in all free strains and the zero shift x. At Y, a
       line of slopes j is drawn by v Y' / Y, v the variance of blur and line, and with W = amplitude times Y

           x = argmin  8 / sum(W) sum W (v Y'/Y + j.x_before - j.x)^2 / v  +  sum (x / expected)^2.

       Expected are 2 % of isotropic and 0.6 % of other strain, and 0.05 degrees of zero shift.
    4. The score is the cosine, under the weight and within what was measured, of the last Y with the lines where x
       puts them, Gaussians of 0.06 degrees 2theta and the blur, whose squares add up where they overlap. So lines
       that are missing and measured peaks that have no line both cost.

    Args:
        amplitude: float32, >= 0, of the intensity above the background; a square root or a lower power of it.
        measured: int32, first measured point and the one after the last.
        weight: float32, >= 0.
        candidate: int64, structures to try; negative for none.
        line_offset: int64, first line of each structure.
        hkl: int16.
        line_amplitude: float32, >= 0, the same power of intensity, any scale.
        metric: float64, a*.a*, b*.b*, c*.c*, b*.c*, a*.c*, a*.b* in 1 / Angstrom^2.
        metric_change: float64, change of the metric with each of the orthonormal strains that keep the symmetry, rows,
            and zeros for the rest; the first is isotropic, 1 / sqrt(3) along every axis.
        log_q_min, log_q_step: of the axis.
        wavelength: Angstrom, at which the zero shift is a shift of 2theta.

    Returns:
        `StructureMatches`.

    Raises:
        ValueError: for a shape, dtype, candidate, range or axis outside these rules.

    Note:
        Deterministic; no gradients.

    Source:
        Cheng, IEEE Trans. Pattern Anal. 17, 790 (1995): mean shift.
    """
    return StructureMatches(
        *torch.ops.xrdfast.match_structures(
            amplitude,
            measured,
            weight,
            candidate,
            line_offset,
            hkl,
            line_amplitude,
            metric,
            metric_change,
            log_q_min,
            log_q_step,
            wavelength,
        )
    )


# --- reference ------------------------------------------------------------------------------------------------------


def match_structures_reference(
    amplitude: Tensor,
    measured: Tensor,
    weight: Tensor,
    candidate: Tensor,
    line_offset: Tensor,
    hkl: Tensor,
    line_amplitude: Tensor,
    metric: Tensor,
    metric_change: Tensor,
    log_q_min: float,
    log_q_step: float,
    wavelength: float,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, in the precision of the amplitudes; the yardstick of the kernel."""
    score = torch.full(candidate.shape, -1.0, dtype=amplitude.dtype)
    fit = amplitude.new_zeros(*candidate.shape, FIT_PARAMETERS)
    bounds = line_offset.tolist()
    for scan, row in enumerate(candidate.tolist()):
        levels = [_blurred(amplitude[scan], sigma / log_q_step) for sigma in _BLUR]
        window = slice(*measured[scan].tolist())
        for place, structure in enumerate(row):
            if structure < 0:
                continue
            of = slice(bounds[structure], bounds[structure + 1])
            lines = _lines(hkl[of], metric[structure], metric_change[structure], wavelength)
            position = ((lines.log_q - log_q_min) / log_q_step).to(amplitude.dtype)
            width, slope = lines.width.to(amplitude.dtype), lines.slope.to(amplitude.dtype)
            height = torch.where(lines.there, line_amplitude[of].to(amplitude.dtype), 0.0)
            x = amplitude.new_zeros(slope.shape[1])
            x[0] = _search(height, position, levels[0], log_q_step) / ISOTROPIC_SLOPE
            for level in _STEPS:
                x = _refined(x, height, position, width, slope, levels[level], _BLUR[level], log_q_step)
            position = position + slope @ x / log_q_step
            score[scan, place] = _cosine(height, position, width, levels[-1], weight, window, log_q_step)
            fit[scan, place, : len(x) - 1], fit[scan, place, -1] = x[:-1], x[-1]
    return score.float(), fit.float()


class _Lines(NamedTuple):
    there: Tensor  # (n,) bool
    log_q: Tensor  # (n,)
    width: Tensor  # (n,) in ln q
    slope: Tensor  # (n, n_parameters) of ln q with each strain and the zero shift


def _lines(hkl: Tensor, metric: Tensor, change: Tensor, wavelength: float) -> _Lines:
    h, k, ell = hkl.double().unbind(1)
    products = torch.stack([h * h, k * k, ell * ell, 2 * k * ell, 2 * h * ell, 2 * h * k], dim=1)
    zero = (change == 0.0).all(dim=1).tolist()
    n_strains = zero.index(True) if True in zero else len(zero)
    q2 = products @ metric
    there = (q2 > 0.0) & torch.isfinite(q2)
    q2 = torch.where(there, q2, 1.0)
    strains = 0.5 * (products @ change[:n_strains].T) / q2[:, None]
    sin2 = (0.25 * wavelength**2 * q2).clamp(_MIN_SIN2, _MAX_SIN2)
    shifted = _HALF_DEGREE * torch.sqrt(1.0 / sin2 - 1.0)
    return _Lines(there, 0.5 * q2.log(), _LINE_WIDTH * shifted, torch.cat([strains, shifted[:, None]], dim=1))


def _blurred(amplitude: Tensor, sigma: float) -> Tensor:
    """(n_points + 1,), a zero after the last point."""
    reach = math.ceil(_TRUNCATION * sigma)
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (at / sigma).square())
    kernel = (kernel / kernel.sum()).to(amplitude.dtype)
    padded = torch.nn.functional.pad(amplitude, (reach, reach))
    return torch.nn.functional.pad(padded.unfold(0, len(kernel), 1) @ kernel, (0, 1))


def _search(height: Tensor, position: Tensor, level: Tensor, step: float) -> float:
    """The isotropic strain of ln q, of those on the grid, at which most of the measured lies on lines."""
    strains = torch.arange(-_STRAINS, _STRAINS + 1, dtype=torch.float64) * _STRAIN_STEP
    at = position + (strains / step).to(position.dtype)[:, None] + 0.5
    inside = (at >= 0.0) & (at < len(level) - 1)
    sums = (height * level[torch.where(inside, at, len(level) - 1.0).long()]).sum(1)
    return float(strains[sums.argmax()])


def _refined(
    x: Tensor,
    height: Tensor,
    position: Tensor,
    width: Tensor,
    slope: Tensor,
    level: Tensor,
    sigma: float,
    step: float,
) -> Tensor:
    moved = slope @ x
    at = position + moved / step
    inside = (at >= 0.0) & (at < len(level) - 2)
    left = torch.where(inside, at, 0.0).long()
    rise = level[left + 1] - level[left]
    present = torch.where(inside, height, 0.0)
    weight = present * torch.where(inside, level[left] + (at - left) * rise, 0.0)
    stiffness = weight / (sigma**2 + width.square())
    pull = present * rise / step + stiffness * moved
    if not weight.sum() > 0.0:
        return x
    scale = _EVIDENCE / weight.sum()
    expected = torch.full_like(x, _OTHER_STRAIN)
    expected[0], expected[-1] = _ISOTROPIC_STRAIN, _ZERO_SHIFT
    matrix = scale * (slope.T @ (stiffness[:, None] * slope)) + torch.diag(expected.square().reciprocal())
    return torch.linalg.solve(matrix, scale * (slope.T @ pull))


def _cosine(
    height: Tensor, position: Tensor, width: Tensor, level: Tensor, weight: Tensor, window: slice, step: float
) -> Tensor:
    at = torch.arange(len(level) - 1, dtype=position.dtype)
    wide = torch.sqrt(_BLUR[-1] ** 2 + width.square())
    t = (at - position[:, None]) / (_REACH * wide[:, None] / step)
    shape = (1.0 - t.square()).clamp(min=0.0) ** 16  # near exp(-16 t^2): a Gaussian's square
    model = ((height * width / wide).square()[:, None] * shape).sum(0)[window]
    y, g = level[:-1][window], weight.to(level.dtype)[window]
    product = (g * y.square()).sum() * (g * model).sum()
    return (g * y * model.sqrt()).sum() / product.sqrt() if product > 0.0 else product.new_zeros(())


# --- implementation -------------------------------------------------------------------------------------------------


def _match_cpu(*arguments):
    _check(*arguments)
    module = _native.cpu()
    if module is None:
        return match_structures_reference(*arguments)
    *tensors, log_q_min, log_q_step, wavelength = arguments
    held = [tensor.contiguous() for tensor in tensors]
    amplitude, _, _, candidate, *_ = held
    outputs = _empty_outputs(amplitude, candidate)
    sizes = (*amplitude.shape, candidate.shape[1], log_q_min, log_q_step, wavelength)
    module.match_structures(*(x.data_ptr() for x in (*held, *outputs)), *sizes, torch.get_num_threads())
    return outputs


def _empty_outputs(amplitude: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    shape = candidate.shape
    return amplitude.new_empty(shape), amplitude.new_empty((*shape, FIT_PARAMETERS))


def _check(
    amplitude: Tensor,
    measured: Tensor,
    weight: Tensor,
    candidate: Tensor,
    line_offset: Tensor,
    hkl: Tensor,
    line_amplitude: Tensor,
    metric: Tensor,
    metric_change: Tensor,
    log_q_min: float,
    log_q_step: float,
    wavelength: float,
) -> None:
    op = "match_structures"
    if amplitude.ndim != 2 or candidate.ndim != 2:
        got = f"{tuple(amplitude.shape)}, {tuple(candidate.shape)}"
        raise ValueError(f"{op}: amplitude, candidate must have a row a scan, got {got}")
    (n_scans, n_points), n_lines, n_structures = amplitude.shape, len(hkl), len(metric)
    rules = {
        "amplitude": (amplitude, (n_scans, n_points), torch.float32),
        "measured": (measured, (n_scans, 2), torch.int32),
        "weight": (weight, (n_points,), torch.float32),
        "candidate": (candidate, (n_scans, candidate.shape[1]), torch.int64),
        "line_offset": (line_offset, (n_structures + 1,), torch.int64),
        "hkl": (hkl, (n_lines, 3), torch.int16),
        "line_amplitude": (line_amplitude, (n_lines,), torch.float32),
        "metric": (metric, (n_structures, 6), torch.float64),
        "metric_change": (metric_change, (n_structures, 6, 6), torch.float64),
    }
    check_tensors(op, rules, amplitude.device)
    check_offsets(op, "line_offset", line_offset, n_lines)
    if candidate.numel() and int(candidate.max()) >= n_structures:
        raise ValueError(f"{op}: candidate must be below {n_structures}, got {int(candidate.max())}")
    first, end = measured.unbind(1)
    if bool(((first < 0) | (first > end) | (end > n_points)).any()):
        raise ValueError(f"{op}: measured must rise within 0..{n_points}, got {measured.tolist()[:5]} ...")
    axis = (log_q_min, log_q_step, wavelength)
    if not (all(map(math.isfinite, axis)) and log_q_step > 1e-6 and wavelength > 0.0 and n_points >= 2):
        raise ValueError(f"{op}: axis must be finite, of two points and steps > 1e-6, got {axis}, {n_points}")


LIBRARY.impl("match_structures", _match_cpu, "CPU")


@torch.library.register_fake("xrdfast::match_structures")
def _match_structures_fake(amplitude, measured, weight, candidate, *rest):
    return _empty_outputs(amplitude, candidate)
