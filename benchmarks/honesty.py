"""How well a model of whole scans knows what it cannot answer: amorphous halos and mixtures of two phases.

    python -m benchmarks.honesty --model RUN STORE ... [--folds 0] [--patterns 2912] [--seed 0] [--json FILE]

Simulates scans of one phase, of two (10 to 50 % of the area from the second), and of amorphous halos, counted and then
preprocessed as measured scans are (`xrdfast.data.mixtures`). Prints the area under the ROC curve (AUROC) of both
scores, and of what they are made of.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xrdfast.data.mixtures import draw_one_and_two
from xrdfast.data.store import PatternStore
from xrdfast.posterior import joint_posterior
from xrdfast.prediction import SymmetryPredictor
from xrdfast.suspicion import disagreement, doubts, pattern_shape, phase_features

BATCH = 128
SHARES = ((0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5))
BARS = {"halos": 0.95, "mixtures": 0.8}


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Chance that a positive scores above a negative, ties half.

    Example:
        >>> auroc(torch.tensor([0.5, 0.9]), torch.tensor([0.5, 0.1]))
        0.875
    """
    low, high = (torch.searchsorted(negative.sort().values, positive, right=right) for right in (False, True))
    return float((low + high).double().mean() / (2 * len(negative)))


def halos(predictor: SymmetryPredictor, n: int, rng: np.random.Generator) -> Tensor:
    """Amorphous scans: one to three humps 3 to 12 degrees wide on a falling background, counted, then preprocessed."""
    two_theta = predictor.grid.two_theta()
    counts = np.empty((n, len(two_theta)))
    for row in counts:
        row[:] = rng.uniform(0.02, 0.3) * np.exp(-two_theta / rng.uniform(10.0, 40.0)) + rng.uniform(
            0.005, 0.1
        )
        for _ in range(rng.integers(1, 4)):
            centre, width = rng.uniform(15.0, 50.0), rng.uniform(3.0, 12.0) / 2.355
            row += rng.uniform(0.2, 1.0) * np.exp(-0.5 * ((two_theta - centre) / width) ** 2)
        row[:] = rng.poisson(row / row.max() * 10.0 ** rng.uniform(2.3, 4.7))
    return predictor.prepare_scans([two_theta] * n, list(counts), [predictor.wavelength] * n)


def judge(predictor: SymmetryPredictor, patterns: Tensor) -> dict[str, Tensor]:
    """Both scores and what they are made of."""
    pieces = []
    for batch in patterns.split(BATCH):
        logits, encoded = predictor.outputs(batch)
        posterior = joint_posterior(logits, predictor.calibration)
        whole = torch.ones(len(batch), dtype=torch.bool)
        shape = pattern_shape(batch)
        unusual, several = doubts(logits, encoded, posterior, predictor.calibration, batch, whole)
        unlike = disagreement(logits, posterior, predictor.calibration)
        pieces.append(
            {
                "out_of_distribution": torch.tensor(unusual),
                "several_phases": torch.tensor([math.nan if score is None else score for score in several]),
                "disagreement of heads": torch.zeros(len(batch)) if unlike is None else unlike,
                "crest": shape.crest,
                "active share": shape.active_share,
                "entropy": phase_features(encoded, posterior, shape)[:, 1],
            }
        )
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def measure(
    predictor: SymmetryPredictor, store: PatternStore, folds: set[int], n: int, seed: int
) -> dict[str, object]:
    """The table."""
    generator = torch.Generator().manual_seed(seed)
    rows = store.select(folds)
    rows = rows[torch.randperm(len(rows), generator=generator)[:n]]
    one, two, shares = [], [], []
    for scans in draw_one_and_two(store, rows, predictor.augment, predictor.grid, generator):
        one.append(judge(predictor, scans.one))
        two.append(judge(predictor, scans.two))
        shares.append(scans.share)
    single, mixed = ({name: torch.cat([x[name] for x in some]) for name in some[0]} for some in (one, two))
    share = torch.cat(shares)
    amorphous = judge(predictor, halos(predictor, len(rows), np.random.default_rng(seed)))
    table: dict[str, object] = {
        "patterns": len(share),
        "halos": auroc(amorphous["out_of_distribution"], single["out_of_distribution"]),
        "mixtures": auroc(mixed["several_phases"], single["several_phases"]),
    }
    for low, high in SHARES:
        here = (share >= low) & (share < high)
        table[f"mixtures {low:.0%} to {high:.0%}"] = auroc(
            mixed["several_phases"][here], single["several_phases"]
        )
    for name in ("disagreement of heads", "crest", "active share", "entropy"):
        table[f"{name} alone, halos"] = auroc(amorphous[name], single[name])
        table[f"{name} alone, mixtures"] = auroc(mixed[name], single[name])
    table["crest of 99 % of single phases"] = float(single["crest"].quantile(0.99))
    table["crest of 99 % of halos"] = float(amorphous["crest"].quantile(0.01))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--folds", default="0", help="of held-out structures, with commas between")
    parser.add_argument("--patterns", default=2912, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    predictor = SymmetryPredictor.load(options.model)
    if not predictor.reads_scans:
        parser.error(f"{options.model}: must be a model of whole scans, got one of sticks")
    folds = {int(text) for text in options.folds.split(",")}
    store = PatternStore.open(options.stores)
    table = measure(predictor, store, folds, options.patterns, options.seed)
    for name, value in table.items():
        bar = f"   bar {BARS[name]}" if name in BARS else ""
        print(f"{name:34} {value if isinstance(value, int) else format(value, '.3f')}{bar}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
