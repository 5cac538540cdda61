"""Measured patterns against known structures: the nearest ones, and what they say about the space group.

    known = KnownStructures.build(PatternStore.open("minerals.store.safetensors"))
    matches = known.match([two_theta], [intensity], [1.54056])

A library keeps the strongest lines of each structure and how they move with the strains that keep its symmetry. A scan
is compared with all of them coarsely, then with the best of these by `xrdfast.ops.retrieval`. Not for the network's
answer (`xrdfast.prediction`) or for joining the two (`xrdfast.posterior`).
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xrdfast.bragg import KA1_WAVELENGTH, convert_lines, scan_wavelengths
from xrdfast.data.files import load_checked, save_checked
from xrdfast.data.known_bins import (
    ANGLE_WEIGHT,
    GRID,
    LOG_Q_MAX,
    LOG_Q_MIN,
    POWER,
    STEP,
    CoarseLines,
    on_axis,
    without_weak,
)
from xrdfast.data.known_lines import strongest_lines
from xrdfast.data.scans import Scan
from xrdfast.data.store import PatternStore
from xrdfast.data.whole_scans import preprocess_whole_scans
from xrdfast.errors import InputError
from xrdfast.ops.render import check_offsets, sticks_to_grid
from xrdfast.ops.retrieval import match_structures
from xrdfast.posterior import JointPosterior, fit_pool, pool_posteriors
from xrdfast.symmetry import N_SPACE_GROUPS, class_index

FORMAT, VERSION = "xrdfast-library", "1"
SMOOTH_WIDTH = 0.14  # degrees, about a laboratory peak's width
_MARGIN = 0.5  # degrees beyond the axis, from which strain brings lines in
# Of the answer of `lab` joined with this one: from which likeness a known structure is taken for that of the scan, or
# its relative; exponents of `pool_posteriors` where none is and where one is; and the probabilities from which a group
# belongs to the set of 95 %, likewise. By benchmarks.measured_scans, on even copy groups of exp_rruff.
POOL_LIKENESS = 0.65
POOL_N_BEST = 10  # nearest structures that are looked at for it
POOL_EXPONENTS = (((0.35, -0.3), (0.62, 0.83)), ((0.62, 0.31), (0.43, 0.34)))
POOL_THRESHOLDS = (0.00074, 0.00513)
POOL_LEAST_KNOWN = 20_000  # structures from which that holds; it was found with 30,888
N_CANDIDATES = 100  # go on to the fine comparison
_SCANS_AT_ONCE = 32
_STRUCTURES_AT_ONCE = 4000
_PEAK_SIGMA = 0.04  # degrees, of the peaks that lines get

_TENSORS = {
    "line_offset": torch.int64,
    "hkl": torch.int16,
    "line_amplitude": torch.float32,
    "metric": torch.float64,
    "metric_change": torch.float64,
    "space_group_number": torch.int16,
}
_STRINGS = ("ids", "formula", "family")


@dataclass(frozen=True)
class Evidence:
    """What a comparison says about a structure: log weights, chosen by likelihood once for all libraries.

    A candidate's is linear in its score between `knots`, and falls with how unlikely its fit is. Besides, each
    structure has weights by coarse likeness alone, so that a scan of nothing known is judged by what resembles it.
    Weights add up in a space group, and what a library holds more of than nature does is put right by crystal system.

    Attributes:
        knots, slopes: of the score; slopes add up from knot to knot.
        strain, distortion: per 1 % of isotropic strain and of the norm of the others, up to 5 %.
        density: per square of the difference in log `spread` (how many bins of ln q hold lines), up to 4.
        copies: per unit of the log of how many structures share mineral (or formula) and group.
        computed: of structures of the Materials Project (ids mp-...): relaxed, not measured, and often an ordered
            variant of lower symmetry.
        likeness, likeness_density, likeness_copies: of the coarse weights, per unit of the coarse cosine below 1, per
            square of the difference in log `spread` and as `copies`.
        likeness_measured, likeness_computed: the coarse weights' own logs for structures of either kind.
        floor: log weight of every group.
        system: log factors of the groups of each crystal system, in the order of `CRYSTAL_SYSTEMS`.

    Note:
        Fitted by `python -m benchmarks.fit_retrieval` on simulated scans of structures left out of the library and on
        the measured scans of even copy groups in exp_rruff; `knots`, `likeness`, `likeness_density` and
        `likeness_copies` are set by hand.
    """

    knots: tuple[float, ...] = (0.0, 0.6, 0.75, 0.85, 0.93)
    slopes: tuple[float, ...] = (15.77, 7.29, -4.16, 13.45, 0.98)
    strain: float = -0.31
    distortion: float = -0.25
    density: float = -0.21
    copies: float = -0.29
    computed: float = -1.72
    likeness: tuple[float, ...] = (6.0, 6.0)
    likeness_density: tuple[float, ...] = (0.0, -3.125)
    likeness_copies: float = -0.7
    likeness_measured: tuple[float, ...] = (3.01, -0.93)
    likeness_computed: tuple[float, ...] = (-1.91, 2.59)
    floor: float = 2.58
    system: tuple[float, ...] = (0.03, 0.28, -0.12, 0.22, -0.34, -0.36, 0.29)


class Matches(NamedTuple):
    """The nearest known structures of each scan, best first, and what all of them say about the space group."""

    structure: Tensor  # (n_scans, n_best) int64, rows of the library; -1 where there are fewer
    score: Tensor  # (n_scans, n_best) float32, cosine 0..1
    strain: Tensor  # (n_scans, n_best) float32, mean linear strain of the cell against the library's
    distortion: Tensor  # (n_scans, n_best) float32, norm of the rest of the strain
    zero_shift: Tensor  # (n_scans, n_best) float32, degrees 2theta
    space_group: Tensor  # (n_scans, 230) float32, probabilities; a blank scan has equal ones


def join(
    network: Tensor, matches: Matches, exponents: Sequence[Sequence[Sequence[float]]] = POOL_EXPONENTS
) -> JointPosterior:
    """A network's answer pooled with what known structures say, more of the latter where one of them is like the scan.

    Args:
        network: (n_scans, 230), rows that sum to 1.
        matches: of the same scans, with `POOL_N_BEST` nearest structures each.
        exponents: of `pool_posteriors`, where no likeness reaches `POOL_LIKENESS` and where one does.

    Raises:
        ValueError: as `pool_posteriors`.
    """
    posteriors = [network, matches.space_group]
    unlike, like = (pool_posteriors(posteriors, some).space_group for some in exponents)
    return JointPosterior(torch.where(is_like(matches)[:, None], like, unlike))


def fit_join(
    network: Tensor, matches: Matches, space_group_number: Tensor
) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Exponents of `join` by `fit_pool`, for scans of both kinds; a kind without any keeps its `POOL_EXPONENTS`.

    Args:
        network, matches: as in `join`, of n_scans that neither was fitted on.
        space_group_number: (n_scans,) integers, 1..230.

    Raises:
        ValueError: as `fit_pool`.
    """
    like = is_like(matches)
    kinds = [kind.nonzero()[:, 0] for kind in (~like, like)]
    return tuple(
        fit_pool([network[rows], matches.space_group[rows]], space_group_number[rows])
        if len(rows)
        else shipped
        for rows, shipped in zip(kinds, POOL_EXPONENTS, strict=True)
    )


def is_like(matches: Matches) -> Tensor:
    """(n_scans,) bool: a known structure's likeness reaches `POOL_LIKENESS`."""
    return (matches.score >= POOL_LIKENESS).any(dim=1)


class KnownStructures:
    """A library of N known structures with M lines in all.

    Attributes:
        ids, formula, family: (N) lists; `family` is the mineral's name, or another key of relatives, "" where none.
        space_group_number: (N,) int16, 0 where not known.
        line_offset, hkl, line_amplitude, metric, metric_change: as `xrdfast.ops.retrieval.match_structures` takes them.
        evidence: how scores become probabilities.
    """

    def __init__(
        self,
        *,
        ids: list[str],
        formula: list[str],
        family: list[str],
        line_offset: Tensor,
        hkl: Tensor,
        line_amplitude: Tensor,
        metric: Tensor,
        metric_change: Tensor,
        space_group_number: Tensor,
        evidence: Evidence | None = None,
    ) -> None:
        self.ids, self.formula, self.family = ids, formula, family
        self.line_offset, self.hkl, self.line_amplitude = line_offset, hkl, line_amplitude
        self.metric, self.metric_change = metric, metric_change
        self.space_group_number = space_group_number
        self.evidence = evidence or Evidence()

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def build(
        cls, store: PatternStore, progress: Callable[[int, int], None] | None = None
    ) -> KnownStructures:
        """A library of all structures of a store.

        Args:
            store: simulated for the angles of the default grid under Cu K-alpha 1 (`generate_store`'s settings).
            progress: called with (structures done, N).

        Raises:
            InputError: for a store of other angles.
        """
        simulated = store.simulation
        span = [
            math.sin(math.radians(0.5 * angle)) / simulated.wavelength
            for angle in (simulated.two_theta_min, simulated.two_theta_max)
        ]
        wanted = [0.5 * math.exp(end) for end in (LOG_Q_MIN, LOG_Q_MAX)]
        if span[0] > 1.001 * wanted[0] or span[1] < 0.999 * wanted[1]:
            raise InputError(
                f"{store.paths[0]}: simulation: must reach {GRID.two_theta_min:g}..{GRID.two_theta_max:g} degrees of "
                f"Cu K-alpha 1, got {simulated.two_theta_min:g}..{simulated.two_theta_max:g} at {simulated.wavelength}"
            )
        low, high = GRID.two_theta_min - _MARGIN, GRID.two_theta_max + _MARGIN
        pieces: list[tuple[Tensor, ...]] = []
        for rows in torch.arange(len(store)).split(_STRUCTURES_AT_ONCE):
            pieces.append(strongest_lines(store, rows, KA1_WAVELENGTH, low, high))
            if progress is not None:
                progress(int(rows[-1]) + 1, len(store))
        counts, *columns = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        hkl, line_amplitude, metric, metric_change = columns
        return cls(
            ids=store.ids,
            formula=store.formula,
            family=store.family,
            line_offset=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
            hkl=hkl,
            line_amplitude=line_amplitude,
            metric=metric,
            metric_change=metric_change,
            space_group_number=store.space_group_01.clone(),
        )

    def save(self, path: str | Path) -> None:
        """Writes the library to one safetensors file with checksums.

        Raises:
            InputError: where it cannot be written.
        """
        strings = json.dumps({name: getattr(self, name) for name in _STRINGS})
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors["strings"] = torch.frombuffer(bytearray(strings.encode()), dtype=torch.uint8)
        save_checked(Path(path), tensors, {"format": FORMAT, "version": VERSION})

    @classmethod
    def load(cls, path: str | Path) -> KnownStructures:
        """Reads what `save` wrote.

        Raises:
            InputError: for a file that is missing, damaged, of another kind or version, or inconsistent.
        """
        path = Path(path)
        tensors, metadata = load_checked(path, FORMAT)
        if metadata.get("version") != VERSION:
            raise InputError(f"{path}: version: must be {VERSION}, got {metadata.get('version')}")
        try:
            strings = json.loads(tensors.pop("strings").numpy().tobytes())
            columns = {name: [str(text) for text in strings[name]] for name in _STRINGS}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: strings: must be JSON lists of {', '.join(_STRINGS)}, got {error}"
            ) from error
        known = {name: tensors.get(name) for name in _TENSORS}
        _check_file(path, known, {name: len(texts) for name, texts in columns.items()})
        return cls(**columns, **known)

    def match(
        self,
        two_theta: Sequence[NDArray[np.float64]],  # each (n_points of the scan,)
        intensity: Sequence[NDArray[np.float64]],  # the same
        wavelength: Sequence[float],
        *,
        n_best: int = 10,
        exclude: Tensor | None = None,  # (n_scans, N)
    ) -> Matches:
        """Nearest structures of measured scans. Background and noise are taken off here.

        Args:
            two_theta: degrees, rising, in steps of some 0.01 to 0.03.
            intensity: any unit.
            wavelength: Angstrom; of K-alpha 1 for a doublet.
            n_best: structures to return of each.
            exclude: bool, structures that a scan may not be compared with.

        Raises:
            ValueError: as `preprocess_scans`, or for another shape of `exclude`.
        """
        pieces = []
        for begin in range(0, len(two_theta), _SCANS_AT_ONCE):
            part = slice(begin, begin + _SCANS_AT_ONCE)
            prepared, measured = preprocess_whole_scans(
                two_theta[part],
                intensity[part],
                wavelength[part],
                grid=GRID,
                model_wavelength=KA1_WAVELENGTH,
                smooth_width=SMOOTH_WIDTH,
            )
            left_out = None if exclude is None else exclude[part]
            pieces.append(self._match(prepared, measured, n_best, left_out))
        return _joined(pieces, n_best)

    def match_lines(
        self,
        offset: Tensor,  # (n_patterns + 1,)
        two_theta: Tensor,  # (n_lines,)
        intensity: Tensor,  # (n_lines,)
        *,
        n_best: int = 10,
    ) -> Matches:
        """Nearest structures of lists of lines under Cu K-alpha 1, which get the shape of a laboratory's peaks.

        From a degree before the first line to a degree after the last counts as measured.

        Args:
            offset: int64, first line of each pattern.
            two_theta: float64, degrees.
            intensity: float64, >= 0.
            n_best: structures to return of each.

        Raises:
            ValueError: for an offset outside these rules.
        """
        check_offsets("match_lines", "offset", offset, len(two_theta))
        reach = round(4.0 * _PEAK_SIGMA / GRID.two_theta_step)
        at = torch.arange(-reach, reach + 1) * (GRID.two_theta_step / _PEAK_SIGMA)
        shape = torch.exp(-0.5 * at.square())
        sticks = sticks_to_grid(offset, two_theta, intensity, GRID)
        there, index = sticks > 0.0, torch.arange(GRID.n_points)
        margin = round(1.0 / GRID.two_theta_step)
        first = torch.where(there, index, GRID.n_points).amin(1) - margin
        end = torch.where(there, index + 1, 0).amax(1) + margin
        measured = torch.stack([first.clamp(min=0), end.clamp(max=GRID.n_points)], dim=1)
        measured = torch.where(there.any(1, keepdim=True), measured, 0).int()
        pieces = []
        for rows in torch.arange(len(sticks)).split(_SCANS_AT_ONCE):
            peaks = torch.nn.functional.conv1d(sticks[rows, None], shape[None, None], padding=reach)[:, 0]
            pieces.append(self._match(peaks, measured[rows], n_best, None))
        return _joined(pieces, n_best)

    def match_scan(self, measured: Scan, *, kind: str = "auto", n_best: int = 10) -> Matches:
        """Nearest structures of a measured pattern (`xrdfast.read`).

        Args:
            measured: a scan or a list of lines.
            kind: "scan", "sticks", or "auto": what it is (`Scan.is_scan`).
            n_best: structures to return.
        """
        first = scan_wavelengths(measured.wavelength)[0] if measured.is_doublet else measured.wavelength
        if kind == "scan" or (kind == "auto" and measured.is_scan):
            return self.match([measured.two_theta], [measured.intensity], [first], n_best=n_best)
        two_theta, intensity = measured.two_theta, np.asarray(measured.intensity, dtype=np.float64)
        moved, heights = convert_lines(two_theta, intensity, first, KA1_WAVELENGTH)
        there = np.isfinite(moved)
        offset = torch.tensor([0, int(there.sum())])
        lines = torch.from_numpy(moved[there]), torch.from_numpy(heights[there])
        return self.match_lines(offset, *lines, n_best=n_best)

    def describe(self, matches: Matches) -> list[list[dict[str, Any]]]:
        """For each scan its nearest structures, best first: id, formula, name, group, and how they fit."""
        columns = zip(*(column.tolist() for column in matches[:-1]), strict=True)
        return [
            [
                {
                    "id": self.ids[row],
                    "formula": self.formula[row],
                    "name": self.family[row],
                    "space_group_number": int(self.space_group_number[row]),
                    **dict(zip(Matches._fields[1:-1], fit, strict=True)),
                }
                for row, *fit in zip(*scan, strict=True)
                if row >= 0
            ]
            for scan in columns
        ]

    # --- how it is done ---------------------------------------------------------------------------------------------

    def _match(self, intensity: Tensor, measured: Tensor, n_best: int, exclude: Tensor | None) -> Matches:
        """Of patterns on GRID without background, and the points of it that were measured."""
        candidate, score, fit, coarse, spread = self._compared(intensity, measured, exclude)
        weight = self._weights(score, fit, candidate, spread.gather(1, candidate.clamp(min=0)))
        probability = self._probabilities(weight, candidate, self._likeness(coarse, spread))
        probability = torch.where((intensity > 0.0).any(1, keepdim=True), probability, 1.0 / N_SPACE_GROUPS)
        order = weight.argsort(dim=1, descending=True, stable=True)[:, :n_best]
        short = (0, n_best - order.shape[1])
        fit = fit.gather(1, order[..., None].expand(-1, -1, fit.shape[2]))
        columns = {
            "structure": candidate.gather(1, order),
            "score": score.gather(1, order).clamp(min=0.0),
            "strain": torch.expm1(fit[..., 0] / math.sqrt(3.0)),
            "distortion": fit[..., 1:-1].norm(dim=2),
            "zero_shift": fit[..., -1],
        }
        padded = {
            name: torch.nn.functional.pad(column, short, value=-1 if name == "structure" else 0)
            for name, column in columns.items()
        }
        return Matches(**padded, space_group=probability)

    def _compared(
        self, intensity: Tensor, measured: Tensor, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Candidates with score and fit (n_scans, n_candidates); coarse cosine and spread (n_scans, N)."""
        heights, span = on_axis(without_weak(intensity), measured)
        coarse, spread = self._coarse.compare(heights, span)
        usable = torch.ones_like(coarse, dtype=torch.bool)
        if exclude is not None:
            if exclude.shape != usable.shape or exclude.dtype != torch.bool:
                got = f"{tuple(exclude.shape)} {exclude.dtype}"
                raise ValueError(f"match: exclude must be {tuple(usable.shape)} bool, got {got}")
            usable = ~exclude
        coarse = torch.where(usable, coarse, -1.0)
        height, candidate = coarse.topk(min(N_CANDIDATES, len(self)), dim=1)
        candidate = torch.where(height > 0.0, candidate, -1)
        score, fit = match_structures(
            heights.pow(POWER),
            span,
            ANGLE_WEIGHT,
            candidate,
            self.line_offset,
            self.hkl,
            self._line_power,
            self.metric,
            self.metric_change,
            log_q_min=LOG_Q_MIN,
            log_q_step=STEP,
            wavelength=KA1_WAVELENGTH,
        )
        return candidate, score, fit, coarse, spread

    def _weights(self, score: Tensor, fit: Tensor, candidate: Tensor, spread: Tensor) -> Tensor:
        """(n_scans, n_candidates): log weight of each comparison, whatever the structure; -inf for none."""
        evidence = self.evidence
        log = sum(
            slope * (score - knot).clamp(min=0.0)
            for knot, slope in zip(evidence.knots, evidence.slopes, strict=True)
        )
        log = log + evidence.strain * (fit[..., 0].abs() * (100.0 / math.sqrt(3.0))).clamp(max=5.0)
        log = log + evidence.distortion * (fit[..., 1:-1].norm(dim=2) * 100.0).clamp(max=5.0)
        log = log + evidence.density * spread.square().clamp(max=4.0)
        return torch.where(candidate >= 0, log, -math.inf)

    def _likeness(self, coarse: Tensor, spread: Tensor) -> Tensor:
        """Coarse weights added up by group, (kinds of weight, measured and computed, n_scans, 231)."""
        evidence, n_groups = self.evidence, N_SPACE_GROUPS + 1
        kind_and_group = self._group + n_groups * self._computed
        sums = []
        for exponent, density in zip(evidence.likeness, evidence.likeness_density, strict=True):
            log = (
                exponent * (coarse - 1.0)
                + density * spread.square()
                + evidence.likeness_copies * self._copies
            )
            weight = torch.where(coarse > -0.5, torch.exp(log), 0.0)
            empty = coarse.new_zeros(len(coarse), 2 * n_groups)
            sums.append(empty.index_add_(1, kind_and_group, weight).view(-1, 2, n_groups).transpose(0, 1))
        return torch.stack(sums)

    def _probabilities(self, weight: Tensor, candidate: Tensor, likeness: Tensor) -> Tensor:
        """(n_scans, 230): weights of candidates and of coarse likeness, added up by space group."""
        evidence, row = self.evidence, candidate.clamp(min=0)
        log = weight + evidence.copies * self._copies[row] + evidence.computed * self._computed[row]
        largest = log.detach().amax(dim=1, keepdim=True).clamp(min=-50.0)
        kinds = zip(evidence.likeness_measured, evidence.likeness_computed, strict=True)
        own = torch.stack([torch.as_tensor(log) for pair in kinds for log in pair])
        total = (torch.exp(own)[:, None, None] * likeness.flatten(0, 1)).sum(0)
        total = (total + torch.exp(torch.as_tensor(evidence.floor))) * torch.exp(-largest)
        total = total.scatter_add(1, self._group[row], torch.exp(log - largest))[
            :, 1:
        ]  # 0: of no known group
        factor = torch.stack([torch.as_tensor(log) for log in evidence.system]).exp()
        total = total * factor[torch.tensor(class_index("crystal_system"))]
        return total / total.sum(dim=1, keepdim=True)

    @functools.cached_property
    def _coarse(self) -> CoarseLines:
        return CoarseLines(self.line_offset, self.hkl, self.line_amplitude, self.metric)

    @functools.cached_property
    def _line_power(self) -> Tensor:
        """(M,) of each line what is compared with the power of a scan's intensity."""
        return without_weak(self.line_amplitude.square()).pow(POWER)

    @functools.cached_property
    def _group(self) -> Tensor:
        return self.space_group_number.long()

    @functools.cached_property
    def _computed(self) -> Tensor:
        return torch.tensor([name.startswith("mp-") for name in self.ids], dtype=torch.bool)

    @functools.cached_property
    def _copies(self) -> Tensor:
        """(N,) log of how many structures share mineral (or formula) and group."""
        keys = list(
            zip(
                (family or formula for family, formula in zip(self.family, self.formula, strict=True)),
                self._group.tolist(),
                strict=True,
            )
        )
        count = Counter(keys)
        return torch.tensor([math.log(count[key]) for key in keys])


def _joined(pieces: list[Matches], n_best: int) -> Matches:
    if pieces:
        return Matches(*(torch.cat(column) for column in zip(*pieces, strict=True)))
    none = torch.zeros(0, n_best)
    return Matches(none.long(), none, none, none, none, torch.zeros(0, N_SPACE_GROUPS))


def _check_file(path: Path, tensors: dict[str, Tensor | None], lengths: dict[str, int]) -> None:
    """Refuses tensors of a file that do not fit each other."""
    n = lengths["ids"]
    n_lines = 0 if tensors["hkl"] is None else len(tensors["hkl"])
    shapes = {
        "line_offset": (n + 1,),
        "hkl": (n_lines, 3),
        "line_amplitude": (n_lines,),
        "metric": (n, 6),
        "metric_change": (n, 6, 6),
        "space_group_number": (n,),
    }
    if n == 0:
        raise InputError(f"{path}: structures: must be one or more, got none")
    if set(lengths.values()) != {n}:
        raise InputError(f"{path}: strings: must be {n} of each, got {lengths}")
    for name, dtype in _TENSORS.items():
        tensor = tensors[name]
        got = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        if got != (shapes[name], dtype):
            raise InputError(f"{path}: {name}: must be {shapes[name]} {dtype}, got {got}")
    offset, number = tensors["line_offset"], tensors["space_group_number"]
    rising = [int(offset[0]), int(offset[-1])] == [0, n_lines] and not bool((offset.diff() < 0).any())
    if not rising:
        raise InputError(f"{path}: line_offset: must rise from 0 to {n_lines}, got {offset[:3].tolist()} ...")
    if bool(((number < 0) | (number > N_SPACE_GROUPS)).any()):
        raise InputError(f"{path}: space_group_number: must be in 0..{N_SPACE_GROUPS}, got other numbers")
    for name in ("metric", "metric_change", "line_amplitude"):
        if not bool(torch.isfinite(tensors[name]).all()):
            raise InputError(f"{path}: {name}: must be finite, got NaN or infinity")
