"""From structures to a pattern store, and from a store to batches of strained, rendered patterns.

`generate_store` simulates once, in bounded memory; `PatternSource` renders on the fly what training and
evaluation see. Not for reading structures (`xrdfast.data.structures`) or for the store's format
(`xrdfast.data.store`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from xrdfast.bragg import Grid
from xrdfast.data.folds import assign_folds
from xrdfast.data.profiles import PROFILES, draw_profiles
from xrdfast.data.store import PatternStore, SimulationConfig, StoreWriter
from xrdfast.data.structures import PackedStructures, Rejected
from xrdfast.data.whole_scans import smoothing_points
from xrdfast.errors import InputError
from xrdfast.ops.line_profile import ProfileParameters, measured_ranges
from xrdfast.ops.preprocess import preprocess_scans
from xrdfast.ops.render import render_sticks
from xrdfast.ops.render_patterns import render_patterns
from xrdfast.ops.simulate import STATUS_REASONS, simulate_families

# Reflections of a chunk at most (one structure may exceed it alone): about 30 bytes each while they are
# simulated.
_CHUNK_REFLECTIONS = 1 << 23


@dataclass(frozen=True)
class AugmentConfig:
    """What is drawn anew for every pattern a model is trained on.

    Attributes:
        strain: standard deviation of the diagonal elements of the lattice strain, before it is projected onto
            the strains that keep the symmetry.
        b_max: overall displacement parameters B are drawn from U(0, b_max), Angstrom^2.
        profile: "sticks", or the name of a configuration in `xrdfast.data.profiles.PROFILES`: patterns as measured,
            with profiles, background and noise.
        preparation: of patterns as measured: "known" takes off the background that was put on, inside the kernel that
            renders; "measured" does to the counts what prediction does to a scan (smoothing, SNIP, clip), for some
            300 us a pattern on a core.
        smooth_width: degrees over which a scan is smoothed, by "measured" and by prediction. The weights that ship
            with 0.08, 0.12 and 0.16, on fold 0: 56.7, 57.2 and 57.0 % top-1.
    """

    strain: float = 0.01
    b_max: float = 2.0
    profile: str = "sticks"
    preparation: str = "known"
    smooth_width: float = 0.12


PREPARATIONS = ("known", "measured")


def generate_store(
    structures: PackedStructures,
    path: str | Path,
    *,
    simulation: SimulationConfig | None = None,
    source: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Rejected]:
    """Simulates the reflection families of structures and writes them to a store.

    Structures without a fold are given one by formula and family (`assign_folds`).

    Args:
        structures: N structures, with rotations and labels (`analyse_symmetry`).
        path: of the store to write; an existing one is replaced when the new one is complete.
        simulation: settings; None for the defaults.
        source: names of the files the structures came from, kept in the store's metadata.
        progress: called with (structures done, structures in all) after each chunk.

    Returns:
        The structures that could not be simulated, with the reason; they are not in the store.

    Raises:
        InputError: where the store cannot be written, or no structure can be simulated.
        ValueError: for settings outside the rules of `simulate_families`.
    """
    simulation = simulation or SimulationConfig()
    faults = structures.faults()
    rejected = [Rejected(structures.ids[row], reason) for row, reason in sorted(faults.items())]
    if faults:
        structures = structures[[row for row in range(len(structures)) if row not in faults]]
    fold = assign_folds(structures.formula, structures.family, structures.fold)
    structures = dataclasses.replace(structures, fold=fold)
    with StoreWriter(path, simulation, source) as writer:
        for begin, end in _chunks(structures.lattice, simulation):
            chunk = structures[begin:end]
            families = simulate_families(chunk, **dataclasses.asdict(simulation))
            status = families.status.tolist()
            rejected += [
                Rejected(chunk.ids[i], STATUS_REASONS[code]) for i, code in enumerate(status) if code
            ]
            if any(status):  # these have no families, so the others' rows stay as they are
                kept = torch.nonzero(families.status == 0).squeeze(1)
                chunk = chunk[kept]
                families = families._replace(
                    offset=torch.cat([families.offset[:1], families.offset[1:][kept]])
                )
            writer.append(chunk, families)
            if progress is not None:
                progress(end, len(structures))
        if len(writer) == 0:  # an earlier store is of more use than an empty one
            reason = f"; the first reason: {rejected[0].id}: {rejected[0].reason}" if rejected else ""
            raise InputError(
                f"{path}: structures: must be at least one that can be simulated, got none{reason}"
            )
    return rejected


class PatternSource:
    """Renders batches of patterns from a store.

    With a generator each pattern gets a lattice strain that keeps its symmetry, an overall B and, unless patterns are
    sticks, a measurement and counting noise of its own. Without one, sticks have B = 0 and a metric that is only made
    exactly symmetric; a pattern as measured gets the same, but drawn once and for all by its row of the store.

    Args:
        store: where the families come from.
        grid: the model's axis.
        augment: what is drawn per pattern.
        device: where patterns are rendered; only families and draws, made on the CPU, go there.

    Raises:
        InputError: for a store that was simulated for fewer angles than the axis has.
        ValueError: for an unknown profile or preparation.
    """

    def __init__(
        self,
        store: PatternStore,
        grid: Grid | None = None,
        augment: AugmentConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.store = store
        self.device = torch.device(device)
        self.grid = grid or Grid()
        self.augment = augment or AugmentConfig()
        simulated = store.simulation.two_theta_min, store.simulation.two_theta_max
        if self.grid.two_theta_min < simulated[0] or self.grid.two_theta_max > simulated[1]:
            needed = f"{self.grid.two_theta_min:g}..{self.grid.two_theta_max:g} degrees"
            raise InputError(
                f"{', '.join(map(str, store.paths))}: simulation: must hold the model's axis, {needed}, "
                f"got {simulated[0]:g}..{simulated[1]:g}"
            )
        if self.augment.profile not in ("sticks", *PROFILES):
            raise ValueError(
                f"PatternSource: augment.profile must be one of sticks, {', '.join(PROFILES)}, "
                f"got {self.augment.profile!r}"
            )
        if self.augment.preparation not in PREPARATIONS:
            raise ValueError(
                f"PatternSource: augment.preparation must be one of {', '.join(PREPARATIONS)}, "
                f"got {self.augment.preparation!r}"
            )

    def batch(self, indices: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Patterns and labels.

        Args:
            indices: (n_patterns,) int64 rows of the store.
            generator: source of strains, B and measurements, in this order, so that one seed gives one batch;
                None: what validation and evaluation see, the same in every batch.

        Returns:
            intensity (n_patterns, n_points) float32, maximum 100, on the device; space_group_number (n_patterns,)
            int64, on the CPU.
        """
        families = self.store.gather(indices)
        n_patterns, sticks = len(families), self.augment.profile == "sticks"
        if generator is not None:
            drawn = self._draw(n_patterns, generator)
            pattern_id, seed = torch.arange(n_patterns), 0
            if not sticks:
                seed = int(torch.randint(2**62, (), generator=generator))
        elif sticks:
            drawn = _Drawn(None, torch.zeros(n_patterns, dtype=torch.float64), None)
        else:
            own = [self._draw(1, Generator().manual_seed(row)) for row in indices.tolist()]
            own = own or [self._draw(0, Generator())]
            drawn = _Drawn(
                torch.cat([one.strain for one in own]),
                torch.cat([one.b_overall for one in own]),
                ProfileParameters(*map(torch.cat, zip(*(one.profile for one in own), strict=True))),
            )
            pattern_id, seed = indices.long(), 0
        metric = strained_reciprocal_metric(
            families.lattice, families.rotation_offset, families.rotations, drawn.strain
        )
        table = self._moved(families.hkl_multiplicity)  # whole: its columns would be copied apart first
        rest = (families.offset, families.f_squared, metric, drawn.b_overall)
        offset, *rest = (self._moved(tensor) for tensor in rest)
        rows = (offset, table[:, :3], table[:, 3], *rest)
        axis = {"wavelength": self.store.simulation.wavelength, "grid": self.grid}
        if sticks:
            return render_sticks(*rows, **axis), families.space_group_number
        turns = [self._moved(tensor) for tensor in (families.rotation_offset, families.rotations)]
        profile = ProfileParameters(*self._moved(drawn.profile.table()).unbind(1))  # one copy, not 29
        counted = self.augment.preparation == "measured"
        rendered = render_patterns(
            *rows,
            *turns,
            profile,
            self._moved(pattern_id),
            seed=seed,
            clip_sigma=None if counted else 3.0,
            **axis,
        )
        if not counted:
            return rendered.intensity, families.space_group_number
        return self._prepared(rendered.intensity, drawn.profile), families.space_group_number

    def _prepared(self, counts: Tensor, profile: ProfileParameters) -> Tensor:
        """What prediction makes of such scans: `xrdfast.data.whole_scans`, of which these have one axis."""
        grid, wavelength = self.grid, self.store.simulation.wavelength
        two_theta = grid.two_theta()
        first, last = measured_ranges(profile, (grid.two_theta_min, grid.two_theta_step, grid.n_points))
        point = torch.arange(grid.n_points, device=self.device)
        measured = (point >= self._moved(first)[:, None]) & (point < self._moved(last)[:, None])
        offset = torch.cat([first.new_zeros(1), (last - first).clamp(min=0).cumsum(0)])
        return preprocess_scans(
            self._moved(offset),
            self._moved(torch.from_numpy(two_theta)).expand_as(counts)[measured],
            counts[measured],
            torch.full((len(counts),), wavelength, dtype=torch.float64, device=self.device),
            grid=grid,
            model_wavelength=wavelength,
            smooth_points=smoothing_points(two_theta, self.augment.smooth_width),
        ).intensity

    def _draw(self, n_patterns: int, generator: Generator) -> _Drawn:
        augment = self.augment
        strain = draw_strain(n_patterns, augment.strain, generator)
        b_overall = augment.b_max * torch.rand(n_patterns, generator=generator, dtype=torch.float64)
        sticks = augment.profile == "sticks"
        profile = None if sticks else draw_profiles(n_patterns, PROFILES[augment.profile], generator)
        return _Drawn(strain, b_overall, profile)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


class _Drawn(NamedTuple):
    """What a batch was drawn, a row a pattern."""

    strain: Tensor | None  # (n_patterns, 3, 3)
    b_overall: Tensor  # (n_patterns,)
    profile: ProfileParameters | None


def draw_strain(n_patterns: int, sigma: float, generator: Generator) -> Tensor:
    """Random symmetric strains with the same distribution in every Cartesian frame.

    eps = sigma (N + N^T) / 2 with N standard normal: the diagonal varies by sigma, the rest by
    sigma / sqrt(2).

    Returns:
        (n_patterns, 3, 3) float64.
    """
    normal = torch.randn(n_patterns, 3, 3, generator=generator, dtype=torch.float64)
    return (0.5 * sigma) * (normal + normal.transpose(1, 2))


def strained_reciprocal_metric(
    lattice: Tensor,  # (n_patterns, 3, 3)
    rotation_offset: Tensor,  # (n_patterns + 1,)
    rotations: Tensor,  # (n_rotations, 3, 3)
    strain: Tensor | None = None,  # (n_patterns, 3, 3)
) -> Tensor:
    """Reciprocal metrics of cells that are strained without losing symmetry.

    With A the lattice as rows, A' = A (1 + eps) has the metric G' = A' A'^T. A rotation W (x' = W x on
    fractional columns) keeps lengths if W^T G W = G, so the mean of W^T G' W over the group is the nearest
    metric that all of
    them keep: only the free parameters of the crystal system are left to vary, in whatever cell is given.

    Args:
        lattice: float64, rows a, b, c, Angstrom.
        rotation_offset, rotations: int64 and int8, W of each pattern's group; none means the identity alone.
        strain: symmetric, Cartesian; None for none.

    Returns:
        (n_patterns, 6) float64: a*.a*, b*.b*, c*.c*, b*.c*, a*.c*, a*.b*, 1 / Angstrom^2.
    """
    # numpy: dozens of operations on a few kilobytes, where the cost of a call decides (80 us for 64
    # patterns).
    cell = lattice.numpy()
    if strain is not None:
        cell = cell + cell @ strain.numpy()
    metric = _group_mean(cell @ cell.swapaxes(1, 2), rotation_offset.numpy(), rotations.numpy())
    reciprocal = np.linalg.inv(metric)
    rows, columns = [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]
    return torch.from_numpy(reciprocal[:, rows, columns])


def free_metric_changes(
    lattice: Tensor,  # (n, 3, 3)
    rotation_offset: Tensor,  # (n + 1,)
    rotations: Tensor,  # (n_rotations, 3, 3)
) -> Tensor:
    """Changes of the reciprocal metric with each of the orthonormal strains that keep the symmetry.

    Symmetric tensors are vectors of six (off-diagonal elements times sqrt(2), so that lengths agree). A rotation
    acts on them as a matrix; its mean over the group projects on the strains that all rotations keep, the
    eigenvectors of eigenvalue 1: the isotropic one, and up to five without a change of volume. With each, E, the
    metric G = B^T B, B = A^-1, changes by -2 B^T E B.

    Args:
        lattice, rotation_offset, rotations: as in `strained_reciprocal_metric`.

    Returns:
        (n, 6, 6) float64, a row a strain in the order of elements of `strained_reciprocal_metric`: first the isotropic
        one, 1 / sqrt(3) along every axis, then the others, then zeros. 1 / Angstrom^2.
    """
    cell, turns, offset = lattice.numpy(), rotations.numpy().astype(np.float64), rotation_offset.numpy()
    n, half = len(cell), math.sqrt(0.5)
    tensors = np.zeros((6, 3, 3))
    for k, (i, j) in enumerate(((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))):
        tensors[k, i, j] = tensors[k, j, i] = 1.0 if i == j else half
    counts = np.diff(offset)
    owner = np.repeat(np.arange(n), counts)
    inverse = np.linalg.inv(cell)
    cartesian = cell[owner].swapaxes(1, 2) @ turns @ inverse[owner].swapaxes(1, 2)
    turned = cartesian[:, None] @ tensors @ cartesian[:, None].swapaxes(2, 3)
    acting = tensors.reshape(6, 9) @ turned.reshape(-1, 6, 9).swapaxes(1, 2)
    projector = np.tile(np.eye(6), (n, 1, 1))
    some = counts > 0
    projector[some] = np.add.reduceat(acting, offset[:-1][some], axis=0) / counts[some, None, None]
    isotropic = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]) / math.sqrt(3.0)
    rest = 0.5 * (projector + projector.swapaxes(1, 2)) - np.outer(isotropic, isotropic)
    share, vector = np.linalg.eigh(rest)
    strains = np.zeros((n, 6, 6))
    strains[:, 0] = isotropic
    for k in range(1, 6):
        strains[:, k] = np.where(share[:, -k, None] > 0.5, vector[:, :, -k], 0.0)
    strained = (strains.reshape(-1, 6) @ tensors.reshape(6, 9)).reshape(n, 6, 3, 3)
    change = -2.0 * (inverse.swapaxes(1, 2)[:, None] @ strained @ inverse[:, None])
    rows, columns = [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]
    return torch.from_numpy(np.ascontiguousarray(change[:, :, rows, columns]))


def _group_mean(metric: np.ndarray, offset: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Mean of W^T G W over each pattern's rotations, (n_patterns, 3, 3)."""
    counts = np.diff(offset)
    some = counts > 0
    if not some.any():
        return metric
    # Components first and rotations last, so that each of the few vector operations runs over all rotations
    # at once.
    w = np.ascontiguousarray(rotations.reshape(-1, 9).T, dtype=np.float64).reshape(3, 3, -1)
    g = np.repeat(metric.reshape(-1, 9).T, counts, axis=1).reshape(3, 3, -1)
    turned = np.einsum("kir,kjr->ijr", w, np.einsum("klr,ljr->kjr", g, w))
    mean = metric.copy()
    mean[some] = (np.add.reduceat(turned, offset[:-1][some], axis=2) / counts[some]).transpose(2, 0, 1)
    return mean


def _chunks(lattice: Tensor, simulation: SimulationConfig) -> list[tuple[int, int]]:
    """Consecutive runs of structures with at most `_CHUNK_REFLECTIONS` reflections, or one structure."""
    g_max = 2.0 * math.sin(math.radians(simulation.two_theta_max / 2.0)) / simulation.wavelength
    g_max *= 1.0 + simulation.margin
    volume = torch.linalg.det(lattice).abs().nan_to_num(0.0, posinf=0.0)
    # Friedel-unique lattice points of a sphere, by its volume; what bounds memory needs no exact count.
    total = torch.cumsum(2.0 / 3.0 * math.pi * g_max**3 * volume, 0).numpy()
    cuts = [0]
    while cuts[-1] < len(total):
        done = total[cuts[-1] - 1] if cuts[-1] else 0.0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(total, done + _CHUNK_REFLECTIONS, side="right"))))
    return list(itertools.pairwise(cuts))
