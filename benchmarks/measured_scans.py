"""Space groups of measured scans: by a network, by retrieval among known structures, and by both.

    python -m benchmarks.measured_scans --library known.safetensors [--model RUN]

The library is made of amcsd.npz and inorganic_mp.npz where the file is not there yet. Rows are scored by pattern and by
copy group (the mean over groups of near copies of the mean in a group), then again with what was measured taken out of
the library: all structures that share mineral name or reduced formula with a structure of the right space group whose
likeness is 0.7 or more and that is among the ten nearest, and with the nearest of the right group in any case; in
exp_minerals_powdr, with the mineral that the file names. Evidence was fitted on simulated scans and on even copy groups
of exp_rruff (benchmarks/fit_retrieval.py), and the exponents of "both" are fitted on even groups, with the whole
library and without what was measured in equal parts, so odd groups have rows of their own. Training data of the network
are not touched here: its rows are the same with and without.

Of exp_rruff it also prints, by copy group, rows by crystal system, by how many structures of the group there are to
train on and by extinction group; calibration errors and sets on odd groups, with thresholds from even groups; and ten
wrong answers with what speaks for and against them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.measured_report import show_calibration, show_parts, show_wrong
from xrdfast.bragg import scan_wavelengths
from xrdfast.data.generate import generate_store
from xrdfast.data.store import PatternStore
from xrdfast.data.structures import analyse_symmetry, load_structures
from xrdfast.posterior import JointPosterior, conformal_threshold
from xrdfast.prediction import SymmetryPredictor
from xrdfast.retrieval import POOL_N_BEST, KnownStructures, Matches, fit_join, is_like, join
from xrdfast.symmetry import class_index

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LIBRARY_OF = ("amcsd.npz", "inorganic_mp.npz", "extra_structures.npz")
LIKE = 0.7  # likeness from which a structure of the right group counts as what was measured
N_BEST = POOL_N_BEST  # among them is what was measured; more would take its relatives out of the library too


class Measured(NamedTuple):
    """Scans of one file of shared data."""

    two_theta: list[np.ndarray]
    intensity: list[np.ndarray]
    wavelength: list[float]  # of K-alpha 1 for a doublet
    space_group_number: Tensor  # (n_scans,) int64
    copy_group: Tensor  # (n_scans,) int64, near copies share one
    name: list[str]  # "" where not told


def rruff(folder: Path) -> Measured:
    """exp_rruff: one grid, no names."""
    with np.load(folder / "exp_rruff.npz", allow_pickle=False) as d:
        n = len(d["sg"])
        two_theta = float(d["two_theta_start"]) + float(d["two_theta_step"]) * np.arange(
            d["intensity"].shape[1]
        )
        return Measured(
            [two_theta.round(6)] * n,
            list(d["intensity"].astype(np.float64)),
            [scan_wavelengths(round(float(d["wavelength"]), 6))[0]] * n,
            torch.from_numpy(d["sg"].astype(np.int64)),
            torch.from_numpy(d["copy_group"].astype(np.int64)),
            [""] * n,
        )


def ragged(folder: Path, name: str, *, names_are_minerals: bool) -> Measured:
    """exp_small and exp_minerals_powdr: axes of their own, every scan a group."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as d:
        spans = list(zip(d["offset"][:-1].tolist(), d["offset"][1:].tolist(), strict=True))
        texts = [text.decode().rpartition("/")[2].capitalize() for text in d["name"].tolist()]
        return Measured(
            [d["two_theta"][a:b].astype(np.float64) for a, b in spans],
            [d["intensity"][a:b].astype(np.float64) for a, b in spans],
            [scan_wavelengths(round(float(x), 6))[0] for x in d["wavelength"]],
            torch.from_numpy(d["sg"].astype(np.int64)),
            torch.arange(len(spans)),
            texts if names_are_minerals else [""] * len(spans),
        )


def make_library(path: Path, folder: Path) -> KnownStructures:
    """The library of a file, or of all minerals and Materials Project structures at hand, then kept in it."""
    if path.exists():
        return KnownStructures.load(path)
    structures, _ = load_structures([folder / name for name in LIBRARY_OF])
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "known.store.safetensors"
        generate_store(analyse_symmetry(structures), store)
        known = KnownStructures.build(PatternStore.open(store))
    known.save(path)
    return known


def what_was_measured(known: KnownStructures, scans: Measured, matches: Matches) -> Tensor:
    """(n_scans, N) bool: structures to leave out so that the measured phase is not in the library."""
    formula, family = np.array(known.formula), np.array([name.lower() for name in known.family])
    number = known.space_group_number.long()
    out = torch.zeros(len(scans.name), len(known), dtype=torch.bool)
    for scan, name in enumerate(scans.name):
        found = matches.structure[scan]
        right = (found >= 0) & (number[found.clamp(min=0)] == scans.space_group_number[scan])
        like = right & (matches.score[scan] >= LIKE)
        if bool(right.any()):
            like[int(right.nonzero()[0, 0])] = True
        rows = found[like].numpy()
        gone = np.isin(formula, formula[rows]) | (np.isin(family, family[rows]) & (family != ""))
        if name:
            own = family == name.lower()
            gone |= own | np.isin(formula, formula[own])
        out[scan] = torch.from_numpy(gone)
    return out


def scores(probability: Tensor, number: Tensor, group: Tensor) -> list[float]:
    """Crystal system, space group, top five: by pattern, then by group; per cent."""
    order = probability.argsort(dim=1, descending=True, stable=True)
    system = JointPosterior(probability).marginal("crystal_system").argmax(1)
    right = torch.stack(
        [
            system == torch.tensor(class_index("crystal_system"))[number - 1],
            order[:, 0] == number - 1,
            (order[:, :5] == (number - 1)[:, None]).any(1),
        ]
    ).double()
    _, place = group.unique(return_inverse=True)
    share = 1.0 / torch.bincount(place)[place].double()
    return [100.0 * float(x) for x in (*right.mean(1), *((right * share).sum(1) / share.sum()))]


def network_posterior(predictor: SymmetryPredictor, scans: Measured) -> Tensor:
    """(n_scans, 230); equal probabilities where the model finds nothing to answer for."""
    rows = []
    for angles, counts, wavelength in zip(scans.two_theta, scans.intensity, scans.wavelength, strict=True):
        try:
            answer = predictor.predict_scan(angles, counts, wavelength=wavelength, n_candidates=230)
            rows.append(answer.space_groups())
        except ValueError:
            rows.append(torch.full((1, 230), 1.0 / 230.0, dtype=torch.float64))
    return torch.cat(rows)


def matched(known: KnownStructures, scans: Measured) -> dict[str, Matches]:
    """With the whole library, and with what was measured taken out of it."""
    given = scans.two_theta, scans.intensity, scans.wavelength
    whole = known.match(*given, n_best=N_BEST)
    gone = what_was_measured(known, scans, whole)
    return {"whole": whole, "without it": known.match(*given, n_best=N_BEST, exclude=gone)}


def answers(
    found_in: dict[str, Matches], network: Tensor | None, exponents: Sequence[Sequence[Sequence[float]]]
) -> Iterator[tuple[str, str, Tensor]]:
    """(library, who answers, (n_scans, 230) probabilities), row by row of the table."""
    for library, found in found_in.items():
        retrieval = found.space_group.double()
        if network is not None:
            yield library, "network", network
        yield library, "retrieval", retrieval
        if network is not None:
            yield library, "both", join(network, found, exponents).space_group


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    known = make_library(options.library, options.data)
    predictor = SymmetryPredictor.load(options.model) if options.model else None
    files = {
        "exp_rruff": rruff(options.data),
        "exp_small": ragged(options.data, "exp_small", names_are_minerals=False),
        "exp_minerals_powdr": ragged(options.data, "exp_minerals_powdr", names_are_minerals=True),
    }
    exponents: Sequence[Sequence[Sequence[float]]] = ()
    print(f"{len(known)} known structures; per cent right by pattern | by copy group")
    columns = f"{'system':>7}{'top-1':>7}{'top-5':>7}"
    print(f"{'scans':<34}{'library':<12}{'answer':<11}{columns} |{columns}")
    kept: dict[str, Tensor] = {}
    for name, scans in files.items():
        network = None if predictor is None else network_posterior(predictor, scans)
        even = scans.copy_group % 2 == 0
        found_in = matched(known, scans)
        if network is not None and not exponents:  # of the first file, for all
            both = Matches(
                *(torch.cat([x[even] for x in pair]) for pair in zip(*found_in.values(), strict=True))
            )
            exponents = fit_join(network[even].repeat(2, 1), both, scans.space_group_number[even].repeat(2))
        parts = {"all": torch.ones_like(even)} | ({"odd groups": ~even} if name == "exp_rruff" else {})
        for library, who, probability in answers(found_in, network, exponents):
            if (name, library) == ("exp_rruff", "whole"):
                kept[who], like = probability, is_like(found_in[library])
            for part, keep in parts.items():
                found = scores(probability[keep], scans.space_group_number[keep], scans.copy_group[keep])
                first, second = ("".join(f"{x:7.1f}" for x in half) for half in (found[:3], found[3:]))
                label = f"{name}, {part} ({int(keep.sum())})"
                print(f"{label:<34}{library:<12}{who:<11}{first} |{second}", flush=True)
    scans = files["exp_rruff"]
    number, odd = scans.space_group_number, scans.copy_group % 2 == 1
    even = ~odd
    thresholds = {
        who: torch.full((len(number),), conformal_threshold(rows[even], number[even]))
        for who, rows in kept.items()
    }
    if exponents:
        print("\nfitted on even copy groups of exp_rruff, for xrdfast.retrieval:")
        rounded = tuple(tuple(tuple(round(x, 2) for x in pair) for pair in some) for some in exponents)
        print(f"POOL_EXPONENTS = {rounded}")
        of_kinds = [conformal_threshold(kept["both"][even & k], number[even & k]) for k in (~like, like)]
        thresholds["both"] = torch.where(like, of_kinds[1], of_kinds[0])
        print(f"POOL_THRESHOLDS = {tuple(round(x, 5) for x in of_kinds)}")
    if predictor is not None and predictor.calibration is not None and predictor.calibration.threshold:
        kept = {"network as shipped": kept["network"], **kept}
        thresholds["network as shipped"] = torch.full((len(number),), predictor.calibration.threshold)
    for part, keep in {
        "odd copy groups, unseen": odd,
        "all, half of them fitted on": torch.ones_like(odd),
    }.items():
        print(f"\nexp_rruff, {part}: {int(keep.sum())} scans", end="")
        show_calibration(kept, thresholds, number, keep)
    kept.pop("network as shipped", None)
    show_parts(kept, number, scans.copy_group, options.data)
    show_wrong(known, kept, scans[:3], number, scans.copy_group, odd)


if __name__ == "__main__":
    main()
