"""Fits the log weights of `xrdfast.retrieval.Evidence` by likelihood, and prints them.

    python -m benchmarks.fit_retrieval --store amcsd.store.safetensors --library known.safetensors

Half of the likelihood are 1,600 simulated laboratory scans of minerals, one structure a mineral (or formula): cell
strained by 0.6 %, every |F|^2 times a lognormal factor of 0.5, all of `xrdfast.data.profiles.PROFILES["lab"]`. The
structure itself is left out of the library, and for 45 % of the scans all of its mineral and formula. The other half
are the measured scans of even copy groups in exp_rruff, each group with one weight. Knots, kernels and their exponents
are given; the rest is fitted, with a weak ridge.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.measured_scans import DATA, rruff
from xrdfast.bragg import KA1_WAVELENGTH, Grid
from xrdfast.data.generate import AugmentConfig
from xrdfast.data.mixtures import count_scans, peaks_alone
from xrdfast.data.profiles import PROFILES, draw_profiles
from xrdfast.data.store import PatternStore
from xrdfast.data.whole_scans import preprocess_whole_scans
from xrdfast.retrieval import GRID, SMOOTH_WIDTH, Evidence, KnownStructures

N_SCANS, UNKNOWN_SHARE, F_SIGMA = 1600, 0.45, 0.5
AUGMENT = AugmentConfig(strain=0.006, b_max=2.0, profile="lab")
RIDGE = 1e-4
FITTED = ("slopes", "strain", "distortion", "density", "copies", "computed")
FITTED += ("likeness_measured", "likeness_computed", "floor", "system")
AT_ONCE = 50


def simulated_scans(
    store: PatternStore, rows: Tensor, seed: int
) -> tuple[Sequence[NDArray], Sequence[NDArray]]:
    """Angles and counts of laboratory scans, background and noise and all."""
    generator = torch.Generator().manual_seed(seed)
    families = store.gather(rows)
    spread = torch.exp(F_SIGMA * torch.randn(len(families.f_squared), generator=generator))
    families = dataclasses.replace(families, f_squared=families.f_squared * spread)
    profile = draw_profiles(len(rows), PROFILES["lab"], generator)
    peaks = peaks_alone(families, profile, AUGMENT, Grid(), KA1_WAVELENGTH, generator)
    return count_scans(peaks.double(), profile, Grid(), generator)


def prepared(scans: tuple[Sequence[NDArray], Sequence[NDArray]], wavelength: float) -> tuple[Tensor, Tensor]:
    """What `KnownStructures.match` makes of scans."""
    return preprocess_whole_scans(
        *scans,
        [wavelength] * len(scans[0]),
        grid=GRID,
        model_wavelength=KA1_WAVELENGTH,
        smooth_width=SMOOTH_WIDTH,
    )


def compared(known: KnownStructures, intensity: Tensor, measured: Tensor, exclude: Tensor | None):
    """Candidates, scores, fits, spread of the candidates, and coarse weights by group."""
    candidate, score, fit, coarse, spread = known._compared(intensity, measured, exclude)
    return candidate, score, fit, spread.gather(1, candidate.clamp(min=0)), known._likeness(coarse, spread)


def one_a_mineral(store: PatternStore, seed: int) -> Tensor:
    """Labelled rows of a store, one a mineral, or a formula where there is no name."""
    keys = np.array([family or formula for family, formula in zip(store.family, store.formula, strict=True)])
    rng = np.random.default_rng(seed)
    labelled = np.flatnonzero(store.space_group_01.numpy() > 0)
    shuffled = rng.permutation(labelled)
    _, first = np.unique(keys[shuffled], return_index=True)
    return torch.from_numpy(rng.permutation(shuffled[first])[:N_SCANS].astype(np.int64))


def log_likelihood(known: KnownStructures, evidence: Evidence, scans: tuple, number: Tensor) -> Tensor:
    """(n_scans,) log probability of the true groups."""
    candidate, score, fit, spread, likeness = scans
    known.evidence = evidence
    weight = known._weights(score, fit, candidate, spread)
    return known._probabilities(weight, candidate, likeness)[torch.arange(len(number)), number - 1].log()


def main() -> None:
    """Prints the fitted fields."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    store, known = PatternStore.open(options.store), KnownStructures.load(options.library)
    place = {name: row for row, name in enumerate(known.ids)}
    formula, family = np.array(known.formula), np.array(known.family)
    rows = one_a_mineral(store, seed=0)
    unknown = torch.rand(len(rows), generator=torch.Generator().manual_seed(1)) < UNKNOWN_SHARE
    pieces = []
    for part, (some, novel) in enumerate(zip(rows.split(AT_ONCE), unknown.split(AT_ONCE), strict=True)):
        exclude = torch.zeros(len(some), len(known), dtype=torch.bool)
        for scan, row in enumerate(some.tolist()):
            own = place[store.ids[row]]
            exclude[scan, own] = True
            if bool(novel[scan]):
                same = (formula == formula[own]) | ((family == family[own]) & (family != ""))
                exclude[scan] |= torch.from_numpy(same)
        pieces.append(compared(known, *prepared(simulated_scans(store, some, part), KA1_WAVELENGTH), exclude))
    simulated = tuple(torch.cat(x, dim=2 if x[0].ndim == 4 else 0) for x in zip(*pieces, strict=True))
    measured = rruff(options.data)
    even = (measured.copy_group % 2 == 0).nonzero().flatten().tolist()
    pieces = []
    for begin in range(0, len(even), AT_ONCE):
        some = even[begin : begin + AT_ONCE]
        scans = [measured.two_theta[i] for i in some], [measured.intensity[i] for i in some]
        pieces.append(compared(known, *prepared(scans, measured.wavelength[0]), None))
    real = tuple(torch.cat(x, dim=2 if x[0].ndim == 4 else 0) for x in zip(*pieces, strict=True))
    _, group = measured.copy_group[even].unique(return_inverse=True)
    share = 1.0 / torch.bincount(group)[group].float()
    share = share / share.sum()

    start = known.evidence
    shapes = {name: np.shape(getattr(start, name)) for name in FITTED}
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    values = torch.cat(
        [torch.tensor(getattr(start, name)).flatten().float() for name in FITTED]
    ).requires_grad_()

    def evidence() -> Evidence:
        parts = values.split(sizes)
        fields = {
            name: tuple(part) if shapes[name] else part[0] for name, part in zip(FITTED, parts, strict=True)
        }
        return dataclasses.replace(start, **fields)

    optimiser = torch.optim.LBFGS([values], max_iter=200, line_search_fn="strong_wolfe")

    def cost() -> Tensor:
        optimiser.zero_grad()
        now = evidence()
        likely = log_likelihood(known, now, simulated, store.space_group_01[rows].long()).mean()
        likely = likely + (share * log_likelihood(known, now, real, measured.space_group_number[even])).sum()
        loss = -0.5 * likely + RIDGE * (values / 5.0).square().sum()
        loss.backward()
        return loss

    optimiser.step(cost)
    print(f"half the negative log-likelihoods' sum: {float(cost().detach()):.4f}")
    for name, part in zip(FITTED, values.detach().split(sizes), strict=True):
        print(f"    {name} = {[round(x, 2) for x in part.tolist()]}")


if __name__ == "__main__":
    main()
