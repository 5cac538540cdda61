"""Space groups of lists of lines: how much an answer owes to weak lines, which measured lists leave out.

    python -m benchmarks.line_lists inorganic_mp.store.safetensors amcsd.store.safetensors

asks the weights that ship (`lab`, `sticks`) for the calculated lines of every fourth structure of fold 0, whole, and
without those below 1 and 3 % of the strongest. Per cent right, joint posterior; half a minute on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from xrdfast.data.generate import AugmentConfig, PatternSource
from xrdfast.data.store import PatternStore
from xrdfast.data.whole_scans import with_peak_shape
from xrdfast.prediction import SymmetryPredictor

LEAST = (0.0, 1.0, 3.0)  # of 100
EVERY = 4
BATCH = 64


def top_shares(predictor: SymmetryPredictor, sticks: Tensor, number: Tensor) -> tuple[float, float]:
    """Shares of right answers: the most probable space group, and the five most probable ones."""
    given = with_peak_shape(sticks, predictor.grid) if predictor.reads_scans else sticks
    probability = torch.cat([predictor.posterior(batch).space_group for batch in given.split(BATCH)])
    right = probability.topk(5, dim=1).indices == (number - 1)[:, None]
    return float(right[:, 0].double().mean()), float(right.any(dim=1).double().mean())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--models", nargs="+", default=["lab", "sticks"])
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    store = PatternStore.open(options.stores)
    _, rows = store.split((0,), clean=True)
    rows = rows[::EVERY]
    whole = PatternSource(store, augment=AugmentConfig(strain=0.0)).batch(rows)[0]
    number = store.space_group_01[rows].long()
    print(f"{len(rows)} structures; per cent right\n{'lines':<36}{'weights':<12}{'top-1':>7}{'top-5':>7}")
    for least in LEAST:
        sticks = torch.where(whole >= least, whole, 0.0)
        what = f"of at least {least:g} % of the strongest" if least else "all"
        for name in options.models:
            shares = top_shares(SymmetryPredictor.load(name), sticks, number)
            print(f"{what:<36}{name:<12}" + "".join(f"{100.0 * share:7.1f}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
