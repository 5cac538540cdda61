"""One pattern in, a ranked symmetry answer out: lines, a scan, or a structure for a round trip.

Not for many patterns at once with known answers (`xrdfast.evaluation`) and not for plots (`xrdfast.report`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from xrdfast.bragg import (
    KA1_WAVELENGTH,
    Grid,
    convert_lines,
    convert_two_theta,
    doublet_anode,
    radiation_of,
    radiations,
    wavelength_of,
)
from xrdfast.data.generate import AugmentConfig, PatternSource
from xrdfast.data.peaks import find_peaks, second_satellites
from xrdfast.data.profiles import PROFILES
from xrdfast.data.scans import read
from xrdfast.data.store import PatternStore
from xrdfast.data.structures import PackedStructures, analyse_symmetry, load_structures
from xrdfast.data.whole_scans import preprocess_whole_scans, with_peak_shape
from xrdfast.errors import InputError, shown_path
from xrdfast.lines import simulate_structure_lines
from xrdfast.models import SymmetryModel, model_path
from xrdfast.ops.render import sticks_to_grid
from xrdfast.posterior import Calibration, JointPosterior, joint_posterior
from xrdfast.suspicion import check_phase_weights, doubts
from xrdfast.symmetry import SYMBOLS, class_index, class_names

KINDS = ("auto", "sticks", "scan")
STRUCTURE_SUFFIXES = (".cif", ".npz", ".safetensors")
SUPERCLASSES = (
    "crystal_system",
    "bravais_lattice",
    "lattice_centering",
    "laue_class",
    "point_group",
    "extinction_group",
)
_BATCH = 128


@dataclass(frozen=True)
class Candidate:
    """One space group of an answer, with the classes that follow from it."""

    space_group_number: int
    symbol: str
    probability: float
    superclasses: dict[str, str]  # by level of SUPERCLASSES; an extinction group is named by group numbers


@dataclass(frozen=True)
class Pattern:
    """What was given to the model, on its axis, and what it came from."""

    two_theta: NDArray[np.float64]  # (n_lines,) degrees
    intensity: NDArray[np.float64]  # (n_lines,), the strongest line inside the model's range = 100
    hkl: NDArray[np.int64] | None = None  # (n_lines, 3) in the standard setting, where a structure was given
    scan: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None  # degrees on that axis, intensity
    on_grid: NDArray[np.float32] | None = None  # (n_points,) of a whole scan, as a model of scans saw it
    wavelength: float = KA1_WAVELENGTH  # Angstrom, of that axis


@dataclass(frozen=True)
class Prediction:
    """A ranked answer for one pattern.

    Attributes:
        candidates: space groups, most probable first.
        superclasses: for each level of SUPERCLASSES, (class name, probability) of its classes, most probable
            first. They are sums over all 230 groups, so they agree with each other and with the candidates.
        kind: "sticks", "scan" or "structure".
        wavelength: Angstrom, that the angles were read with.
        wavelength_source: how that is known: "file", "given", "assumed" or "simulated".
        notes: what was done to the pattern, one sentence each.
        pattern: what the model saw.
        true_number: space group of the structure by spglib at 0.1 Angstrom, for a round trip; else 0.
        conformal_set: space group numbers, most probable first, that hold the true one in 95 % of patterns like those
            the model was calibrated on; () where it was not.
        out_of_distribution, several_phases: scores of `xrdfast.suspicion`; None where nothing is known.
    """

    candidates: tuple[Candidate, ...]
    superclasses: dict[str, tuple[tuple[str, float], ...]]
    kind: str
    wavelength: float
    wavelength_source: str
    notes: tuple[str, ...]
    pattern: Pattern
    true_number: int = 0
    conformal_set: tuple[int, ...] = ()
    out_of_distribution: float | None = None
    several_phases: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain dicts, lists and numbers for JSON, without the pattern."""
        return {
            "kind": self.kind,
            "wavelength": self.wavelength,
            "wavelength_source": self.wavelength_source,
            "n_lines": len(self.pattern.two_theta),
            "true_space_group_number": self.true_number or None,
            "conformal_set": list(self.conformal_set),
            "out_of_distribution": self.out_of_distribution,
            "several_phases": self.several_phases,
            "candidates": [vars(candidate) for candidate in self.candidates],
            "superclasses": {
                level: [{"name": name, "probability": share} for name, share in ranked]
                for level, ranked in self.superclasses.items()
            },
            "notes": list(self.notes),
        }

    def space_groups(self) -> Tensor:
        """(1, 230) probabilities, of an answer that lists all space groups."""
        shares = {candidate.space_group_number: candidate.probability for candidate in self.candidates}
        return torch.tensor([[shares[i + 1] for i in range(len(SYMBOLS))]], dtype=torch.float64)

    def with_posterior(
        self, posterior: JointPosterior, n_candidates: int, note: str, threshold: float | None = None
    ) -> Prediction:
        """The same pattern, answered by another posterior, with the threshold of its set where one is known."""
        return dataclasses.replace(
            self,
            candidates=_ranked_candidates(posterior, n_candidates),
            superclasses={level: _ranked_classes(posterior, level) for level in SUPERCLASSES},
            notes=(*self.notes, note),
            conformal_set=_conformal_set(posterior, threshold),
        )


class SymmetryPredictor:
    """A trained model with all that its answers need.

    Args:
        model: in evaluation mode.
        grid: the axis it was trained on.
        wavelength: Angstrom, of the patterns it was trained on.
        calibration: of its probabilities; None for none.
        folds_held_out: validation folds of its run; () where not known.
        augment: how its patterns were drawn; None: sticks. A model trained on measured profiles gets whole scans
            (`preprocess_scans`), and lines with a peak's shape; one trained on sticks gets lines, of scans the peaks.
    """

    def __init__(
        self,
        model: SymmetryModel,
        grid: Grid | None = None,
        wavelength: float = KA1_WAVELENGTH,
        calibration: Calibration | None = None,
        folds_held_out: tuple[int, ...] = (),
        augment: AugmentConfig | None = None,
    ) -> None:
        check_phase_weights(calibration, model.encoder.n_features)
        self.model = model
        self.grid = grid or Grid()
        self.wavelength = wavelength
        self.calibration = calibration
        self.folds_held_out = folds_held_out
        self.augment = augment or AugmentConfig()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def reads_scans(self) -> bool:
        """Whether the model was trained on whole patterns as measured, not on sticks."""
        return self.augment.profile != "sticks"

    @classmethod
    def load(cls, path: str | Path | None = None, device: str | torch.device = "cpu") -> SymmetryPredictor:
        """Reads a run folder, a model file, or weights that ship, by name (`pretrained_path`); None: "lab".

        Raises:
            InputError: for a file that is missing, damaged, of another kind, or that does not fit its preset.
        """
        from xrdfast.training.checkpoint import load_model, load_model_card

        path = model_path(path)
        card, model = load_model_card(path), load_model(path, device)
        try:
            calibration = Calibration.from_dict(card.calibration) if card.calibration else None
            wavelength = wavelength_of(card.wavelength)
            folds = tuple(card.config.get("data", {}).get("folds_validation", ()))
            augment = AugmentConfig(**card.config.get("augment", {}))
            if augment.profile not in ("sticks", *PROFILES):
                raise ValueError(f"a profile of {', '.join(PROFILES)} or sticks, not {augment.profile!r}")
            return cls(model, Grid(**card.grid), wavelength, calibration, folds, augment)
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{path}: card: must describe the model and its axis, got {error}") from error

    def posterior(self, intensity: Tensor) -> JointPosterior:
        """Probabilities of patterns on the model's grid.

        Args:
            intensity: (n_patterns, n_points) float32, 0 to 100.
        """
        return joint_posterior(self.logits(intensity), self.calibration)

    def logits(self, intensity: Tensor) -> dict[str, Tensor]:
        """Logits on the CPU, by task, of patterns as `posterior` takes them."""
        return self.outputs(intensity)[0]

    def outputs(self, intensity: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """As `logits`, and the encoder's features (n_patterns, n_features) that they come from."""
        with torch.inference_mode():
            features = self.model.encode(intensity.to(self.device))
            logits = self.model.classify(features)._asdict()
        return {
            task: rows.float().cpu() for task, rows in logits.items() if rows is not None
        }, features.float().cpu()

    def store_logits(
        self, store: PatternStore, rows: Tensor, progress: Callable[[int, int], None] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Logits and labels of patterns of a store: sticks as they are, scans as training draws them, once for all.

        Args:
            store: simulated at the model's wavelength.
            rows: (n_patterns,) int64.
            progress: called with (patterns done, n_patterns).

        Returns:
            For each task of the model (n_patterns, n_classes) on the CPU; space group numbers (n_patterns,).

        Raises:
            InputError: for a store of another wavelength.
        """
        if not math.isclose(store.simulation.wavelength, self.wavelength, rel_tol=1e-6):
            names = ", ".join(str(path) for path in store.paths)
            raise InputError(
                f"{names}: simulation.wavelength: must be the model's {self.wavelength}, "
                f"got {store.simulation.wavelength}"
            )
        source = PatternSource(store, self.grid, self.augment, self.device)
        pieces, labels, done = [], [], 0
        for batch in rows.split(_BATCH):
            intensity, number = source.batch(batch)
            pieces.append(self.logits(intensity))
            labels.append(number)
            done += len(batch)
            if progress is not None:
                progress(done, len(rows))
        return {task: torch.cat([piece[task] for piece in pieces]) for task in pieces[0]}, torch.cat(labels)

    def predict_file(
        self,
        path: str | Path,
        *,
        kind: str = "auto",
        wavelength: float | None = None,
        scan: int | None = None,
        n_candidates: int = 5,
    ) -> Prediction:
        """Answers for a file: a measured pattern of any format (lines or a scan), or one structure.

        Args:
            path: of the file; .cif, .npz and .safetensors are structures.
            kind: "sticks", "scan", or "auto": as `Scan.is_scan` has it. Other than "auto", of a CIF the measured
                pattern that it carries.
            wavelength: Angstrom, for a file that states none; None where it is not known.
            scan: index in a file of several scans.
            n_candidates: length of the ranked list.

        Raises:
            InputError: for a file that breaks a rule or gives the model no line.
            ValueError: for an unknown kind, a wavelength or a number outside the rules.
        """
        if kind not in KINDS:
            raise ValueError(f"predict_file: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if is_structure_file(path, kind):
            asked = {"kind": None if kind == "auto" else kind, "wavelength": wavelength, "scan": scan}
            if given := [name for name, value in asked.items() if value is not None]:
                raise InputError(f"{shown_path(path)}: {given[0]}: must be left out for a structure, got one")
            return self._predict_structure_file(path, n_candidates)
        measured = read(path, wavelength=wavelength, scan=scan)
        points, source = (measured.two_theta, measured.intensity), measured.wavelength_source
        try:
            if kind == "scan" or (kind == "auto" and measured.is_scan):
                how = measured.wavelength, measured.is_doublet, source
                answer = self._predict_scan(*points, *how, n_candidates)
            else:
                known = None if source == "assumed" else measured.wavelength
                answer = self.predict_sticks(*points, wavelength=known, n_candidates=n_candidates)
        except ValueError as error:
            raise InputError(f"{shown_path(path)}: {error}") from error
        return dataclasses.replace(answer, wavelength_source=source, notes=(*measured.notes, *answer.notes))

    def predict_sticks(
        self,
        two_theta: ArrayLike,  # (n_lines,)
        intensity: ArrayLike,  # (n_lines,)
        *,
        wavelength: float | None = None,
        n_candidates: int = 5,
    ) -> Prediction:
        """Answers for a list of lines.

        Args:
            two_theta: degrees.
            intensity: any scale, >= 0, without Lorentz-polarisation correction.
            wavelength: Angstrom, used as it is; None assumes the model's own.
            n_candidates: length of the ranked list.

        Raises:
            ValueError: for values outside these rules, or no line inside the model's range.
        """
        two_theta, intensity = _checked_lines("predict_sticks", two_theta, intensity)
        source = "assumed" if wavelength is None else "given"
        wavelength = self.wavelength if wavelength is None else wavelength_of(wavelength)
        pattern, notes = self.lines_on_axis(two_theta, intensity, wavelength)
        notes = [f"read as a list of {len(two_theta)} lines", *notes]
        return self._answer(pattern, "sticks", wavelength, source, notes, n_candidates)

    def predict_scan(
        self,
        two_theta: ArrayLike,  # (n_points,)
        intensity: ArrayLike,  # (n_points,)
        *,
        wavelength: float | None = None,
        n_candidates: int = 5,
    ) -> Prediction:
        """Answers for a scan: as a whole, or through its peaks where the model was trained on lines.

        The weighted mean of a K-alpha doublet means the doublet: angles are read with K-alpha 1, and among peaks
        satellites where K-alpha 2 must be are left out.

        Args:
            two_theta: degrees, rising, equally spaced.
            intensity: any scale.
            wavelength: Angstrom; None assumes the copper doublet.
            n_candidates: length of the ranked list.

        Raises:
            ValueError: for values outside these rules, or no peak inside the model's range.
        """
        two_theta, intensity = np.asarray(two_theta, np.float64), np.asarray(intensity, np.float64)
        source = "assumed" if wavelength is None else "given"
        wavelength = radiations()["CuKa"] if wavelength is None else wavelength_of(wavelength)
        anode = doublet_anode(wavelength)
        first = radiations()[f"{anode}Ka1"] if anode else wavelength
        return self._predict_scan(two_theta, intensity, first, anode is not None, source, n_candidates)

    def _predict_scan(
        self,
        two_theta: NDArray[np.float64],
        intensity: NDArray[np.float64],
        wavelength: float,  # of K-alpha 1 for a doublet
        is_doublet: bool,
        source: str,
        n_candidates: int,
    ) -> Prediction:
        place, height = find_peaks(two_theta, intensity)
        notes = [f"read as a scan of {len(two_theta)} points"]
        if not self.reads_scans:
            notes[0] += f"; the model was trained on lines, so it gets the {len(place)} peaks"
        if len(place) == 0:
            raise ValueError("peaks: must stand out of the noise, got none")
        pattern, more = self.lines_on_axis(place, height, wavelength, is_doublet=is_doublet)
        moved = convert_two_theta(two_theta, wavelength, self.wavelength)
        there = np.isfinite(moved)
        pattern = Pattern(pattern.two_theta, pattern.intensity, scan=(moved[there], intensity[there]))
        given = None
        if self.reads_scans:
            given = self.prepare_scans([two_theta], [intensity], [wavelength])
            if not bool(given.any()):
                raise ValueError("intensity: must rise above background and noise within the model's range")
            more = ["smoothed, background taken off, what does not rise above the noise left blank"]
            more += self._mapping(wavelength)
        return self._answer(pattern, "scan", wavelength, source, [*notes, *more], n_candidates, given=given)

    def prepare_scans(
        self,
        two_theta: Sequence[NDArray[np.float64]],  # each (n_points of the scan,)
        intensity: Sequence[NDArray[np.float64]],  # the same
        wavelength: Sequence[float],
    ) -> Tensor:
        """Whole scans on the model's axis, for a model that reads scans.

        Args:
            two_theta: degrees, rising.
            intensity: any unit.
            wavelength: Angstrom; of K-alpha 1 for a doublet.

        Returns:
            (n_scans, n_points) float32, 0 to 100; a row of zeros where nothing rises above background and noise
            inside the model's range.
        """
        return preprocess_whole_scans(
            two_theta,
            intensity,
            wavelength,
            grid=self.grid,
            model_wavelength=self.wavelength,
            smooth_width=self.augment.smooth_width,
            device=self.device,
        )[0]

    def prepare_lines(self, patterns: Sequence[Pattern]) -> Tensor:
        """Lines of `lines_on_axis` on the model's axis: as sticks, or with the shape of a peak.

        Returns:
            (n_patterns, n_points) float32, 0 to 100.
        """
        offset = torch.tensor([0, *(len(pattern.two_theta) for pattern in patterns)]).cumsum(0)
        two_theta, intensity = (
            torch.from_numpy(np.concatenate([getattr(pattern, name) for pattern in patterns]))
            for name in ("two_theta", "intensity")
        )
        sticks = sticks_to_grid(offset, two_theta, intensity, self.grid)
        return with_peak_shape(sticks, self.grid) if self.reads_scans else sticks

    def predict_structure(self, structure: PackedStructures, n_candidates: int = 5) -> Prediction:
        """Answers for the pattern simulated from one structure: a round trip.

        Raises:
            ValueError: for another number of structures, or one that cannot be simulated.
        """
        structure = analyse_symmetry(structure, n_workers=1)
        grid = self.grid
        lines = simulate_structure_lines(
            structure,
            wavelength=self.wavelength,
            two_theta_min=grid.two_theta_min,
            two_theta_max=grid.two_theta_min + grid.n_points * grid.two_theta_step,
        )
        pattern = Pattern(lines.two_theta, lines.intensity, lines.hkl)
        notes = [f"simulated from the structure: {len(lines.two_theta)} lines"]
        number = int(structure.space_group_01[0])
        return self._answer(pattern, "structure", self.wavelength, "simulated", notes, n_candidates, number)

    def _predict_structure_file(self, path: str | Path, n_candidates: int) -> Prediction:
        structures, rejected = load_structures(path)
        if len(structures) != 1 or rejected:
            got = f"{len(structures)} and {len(rejected)} that cannot be read"
            raise InputError(f"{path}: structures: must be one to predict, got {got}")
        try:
            return self.predict_structure(structures, n_candidates)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error

    def lines_on_axis(
        self,
        two_theta: NDArray[np.float64],  # (n_lines,)
        intensity: NDArray[np.float64],  # (n_lines,)
        wavelength: float,
        *,
        is_doublet: bool = False,
    ) -> tuple[Pattern, list[str]]:
        """Lines at the model's wavelength, inside its range, strongest = 100; and what was done.

        Args:
            two_theta: degrees, rising.
            intensity: any scale.
            wavelength: Angstrom; of K-alpha 1 for a doublet.
            is_doublet: whether these are peaks with K-alpha 2 satellites among them, to be left out.

        Raises:
            ValueError: for no line inside the range.
        """
        notes = []
        # The strongest line is 1 from here: intensities of any scale must not leave the range of numbers.
        intensity = intensity / (intensity.max(initial=0.0) or 1.0)
        if is_doublet and (anode := _anode(wavelength)):
            keep = ~second_satellites(two_theta, intensity, wavelength, radiations()[f"{anode}Ka2"])
            notes.append(f"{anode} K-alpha doublet: {int((~keep).sum())} K-alpha 2 satellites left out")
            two_theta, intensity = two_theta[keep], intensity[keep]
        moved, intensity = convert_lines(two_theta, intensity, wavelength, self.wavelength)
        notes += self._mapping(wavelength)
        low, high = self.grid.two_theta_min, self.grid.two_theta_max
        inside = (moved >= low) & (moved < high)
        if not (inside.any() and intensity[inside].max() > 0.0):
            raise ValueError(
                f"two_theta: must have a line within {low:g}..{high:g} degrees at {self.wavelength:.5f} "
                "Angstrom, got none"
            )
        if not inside.all():
            notes.append(f"{int((~inside).sum())} lines outside {low:g}..{high:g} degrees left out")
        intensity = intensity[inside]
        return Pattern(moved[inside], 100.0 * (intensity / intensity.max())), notes

    def _mapping(self, wavelength: float) -> list[str]:
        same = abs(wavelength - self.wavelength) < 1e-4  # tables differ by as much
        note = f"mapped from {wavelength:.5f} to {self.wavelength:.5f} Angstrom through d-spacings"
        return [] if same else [note]

    def _answer(
        self,
        pattern: Pattern,
        kind: str,
        wavelength: float,
        wavelength_source: str,
        notes: list[str],
        n_candidates: int,
        true_number: int = 0,
        given: Tensor | None = None,  # (1, n_points) on the grid; None: the pattern's lines
    ) -> Prediction:
        if not 1 <= n_candidates <= len(SYMBOLS):
            raise ValueError(f"predict: n_candidates must be in 1..{len(SYMBOLS)}, got {n_candidates}")
        intensity = self.prepare_lines([pattern]) if given is None else given
        seen = None if given is None else given[0].numpy()
        pattern = dataclasses.replace(pattern, on_grid=seen, wavelength=self.wavelength)
        logits, features = self.outputs(intensity)
        posterior = joint_posterior(logits, self.calibration)
        whole = torch.tensor([given is not None])
        unlike, several = doubts(logits, features, posterior, self.calibration, intensity, whole)
        if self.calibration is None:
            notes = [*notes, "the model is not calibrated: read its probabilities as a ranking"]
        return Prediction(
            candidates=_ranked_candidates(posterior, n_candidates),
            superclasses={level: _ranked_classes(posterior, level) for level in SUPERCLASSES},
            kind=kind,
            wavelength=wavelength,
            wavelength_source=wavelength_source,
            notes=tuple(notes),
            pattern=pattern,
            true_number=true_number,
            conformal_set=_conformal_set(posterior, self.calibration and self.calibration.threshold),
            out_of_distribution=unlike[0],
            several_phases=several[0],
        )


def is_structure_file(path: str | Path, kind: str = "auto") -> bool:
    """Whether a file is answered for as a structure: by its name, unless it is the pattern of a CIF that is asked for.

    Example:
        >>> is_structure_file("quartz.cif"), is_structure_file("quartz.cif", "scan")
        (True, False)
    """
    suffix = Path(path).suffix.lower()
    return suffix in STRUCTURE_SUFFIXES and (suffix != ".cif" or kind == "auto")


def _checked_lines(
    op: str, two_theta: ArrayLike, intensity: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    two_theta, intensity = np.asarray(two_theta, np.float64), np.asarray(intensity, np.float64)
    if two_theta.ndim != 1 or two_theta.shape != intensity.shape or len(two_theta) == 0:
        raise ValueError(
            f"{op}: two_theta, intensity must be (n_lines,) and not empty, "
            f"got {two_theta.shape}, {intensity.shape}"
        )
    if not ((two_theta > 0.0) & (two_theta < 180.0)).all():
        raise ValueError(f"{op}: two_theta must be between 0 and 180 degrees, got other values")
    if not (np.isfinite(intensity) & (intensity >= 0.0)).all():
        raise ValueError(f"{op}: intensity must be finite and >= 0, got other values")
    return two_theta, intensity


def _anode(first: float) -> str | None:
    """The anode of a K-alpha 1 line."""
    name = radiation_of(first).name
    return name.removesuffix("Ka1") if name.endswith("Ka1") else None


def _ranked_candidates(posterior: JointPosterior, n_candidates: int) -> tuple[Candidate, ...]:
    share, index = posterior.space_group[0].double().cpu().sort(descending=True, stable=True)
    return tuple(
        Candidate(
            space_group_number=i + 1,
            symbol=SYMBOLS[i],
            probability=p,
            superclasses={level: class_names(level)[class_index(level)[i]] for level in SUPERCLASSES},
        )
        for i, p in zip(index[:n_candidates].tolist(), share[:n_candidates].tolist(), strict=True)
    )


def _conformal_set(posterior: JointPosterior, threshold: float | None) -> tuple[int, ...]:
    if threshold is None:
        return ()
    member = posterior.conformal_sets(threshold)[0]
    order = posterior.space_group[0].sort(descending=True, stable=True).indices
    return tuple((order[member[order]] + 1).tolist())


def _ranked_classes(posterior: JointPosterior, level: str) -> tuple[tuple[str, float], ...]:
    share, index = posterior.marginal(level)[0].double().cpu().sort(descending=True, stable=True)
    names = class_names(level)
    return tuple((names[i], p) for i, p in zip(index.tolist(), share.tolist(), strict=True))
