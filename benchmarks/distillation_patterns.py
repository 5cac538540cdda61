r"""What self-distillation does for the `small` preset on real structures: baseline, DRG, DSR, both; sum and MGDA.

    python -m benchmarks.distillation_patterns inorganic_mp.store.safetensors amcsd.store.safetensors \
        -o benchmarks/results/distillation_patterns.json --runs distillation

Every run has as many epochs, seeds pair (same initial weights, batches and augmentation), fold 0 validates. Runs
already in the results file are not repeated, stopped ones go on. Not a test of speed: see bench_training.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

from xrdfast.training.balance import METHODS
from xrdfast.training.checkpoint import MODEL_FILE, load_model_card
from xrdfast.training.config import load_config
from xrdfast.training.distill import OBJECTIVES
from xrdfast.training.trainer import Trainer

EPOCHS = 4
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "sticks-small.toml"
VARIANTS: dict[str, dict[str, bool]] = {
    "baseline": {},
    "drg": {"drg": True},
    "dsr": {"dsr": True},
    "both": {"drg": True, "dsr": True},
    "both + joint": {"drg": True, "dsr": True, "joint": True},
}


def run(
    folder: Path, stores: list[str], variant: str, balance: str, objective: str, seed: int, epochs: int
) -> dict[str, float]:
    """Trains one run to its end, or goes on with it; what was measured of it."""
    settings: dict[str, Any] = {
        "train.epochs": epochs,
        "train.max_minutes": 0.0,
        "train.validate_epochs": epochs,
        "train.balance": balance,
        "train.seed": seed,
        "distillation.objective": objective,
        "data.stores": stores,
    }
    settings |= {f"distillation.{name}": value for name, value in VARIANTS[variant].items()}
    config = load_config(RECIPE, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    result = Trainer(config, folder, resume=True).run()
    if result.status == "interrupted":
        raise SystemExit(f"interrupted; the same command goes on with {folder}")
    return measured(folder)


def measured(folder: Path) -> dict[str, float]:
    """Metrics of the single heads in percent."""
    card = load_model_card(folder / MODEL_FILE)
    group, system = (card.metrics["tasks"][task] for task in ("space_group", "crystal_system"))
    shares = {
        "top-1": group["top1"],
        "top-5": group["top5"],
        "macro F1": group["macro_f1"],
        "ECE": group["ece_after"],
        "SPC system": card.metrics["spc"]["crystal_system"],
        "crystal system": system["top1"],
    }
    return {name: 100.0 * x for name, x in shares.items()}


def table(runs: dict[str, dict[str, float]]) -> str:
    """Means over seeds; for top-1, the paired difference from the baseline of the same balance and its error.

    Args:
        runs: what was measured, by "balance/variant/seed". A variant's seeds are those its baseline has too.
    """
    names = list(next(iter(runs.values())))
    lines = [
        f"| balance | variant | seeds | {' | '.join(names)} | top-1 above the baseline |",
        "|---" * (len(names) + 4) + "|",
    ]
    for balance, variant in dict.fromkeys(tuple(key.split("/")[:2]) for key in sorted(runs)):
        seeds = [key.split("/")[2] for key in runs if key.startswith(f"{balance}/{variant}/")]
        found = {seed: runs[f"{balance}/{variant}/{seed}"] for seed in seeds}
        means = " | ".join(f"{statistics.mean(run[name] for run in found.values()):.2f}" for name in names)
        base = {seed: runs[key] for seed in seeds if (key := f"{balance}/baseline/{seed}") in runs}
        pairs = [found[seed]["top-1"] - run["top-1"] for seed, run in base.items()]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        gain = "" if variant == "baseline" or not pairs else f"{statistics.mean(pairs):+.2f} ± {error:.2f}"
        lines.append(f"| {balance} | {variant} | {len(found)} | {means} | {gain} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", nargs="+")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="JSON of all runs; continued where it exists"
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs in work")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--balances", nargs="+", choices=METHODS, default=["sum", "mgda"])
    parser.add_argument("--objective", choices=OBJECTIVES, default="tasks")
    given = parser.parse_args()
    runs = json.loads(given.output.read_text()) if given.output.exists() else {}
    for seed, balance, variant in itertools.product(range(given.seeds), given.balances, given.variants):
        name = variant if given.objective == "tasks" else f"{variant}, {given.objective} objective"
        name += "" if given.epochs == EPOCHS else f", {given.epochs} epochs"
        key = f"{balance}/{name}/{seed}"
        if key in runs:
            continue
        folder = given.runs / key.replace("/", "-").replace(" ", "")
        runs[key] = run(folder, given.stores, variant, balance, given.objective, seed, given.epochs)
        given.output.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
