"""Verbs that make and measure models: train, distill, evaluate, export, import-checkpoint, demo."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xrdfast.cli.answers import show_prediction
from xrdfast.cli.group import INTERRUPTED, cli
from xrdfast.cli.options import FiniteRange, file_option, parse_folds, refuse_input_as_output

if TYPE_CHECKING:
    from xrdfast.training.config import RunConfig


@cli.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Wins, as train.epochs=3.")
@click.option("--distill", is_flag=True, help="Self-distillation: distillation.drg and .dsr = true.")
@click.option("--resume", is_flag=True, help="Go on with the run in this folder.")
def train(config: Path, output: Path, overrides: tuple[str, ...], distill: bool, resume: bool) -> None:
    """Trains a model as a TOML file says; under torchrun on several GPUs."""
    from xrdfast.training.config import load_config

    if distill:
        overrides = ("distillation.drg=true", "distillation.dsr=true", *overrides)
    again = ["train", config, "-o", output]
    _run_training(load_config(config, overrides), output, resume, [*again, *_set_options(overrides)])


@cli.command()
@click.option(
    "--teacher",
    required=True,
    type=click.Path(path_type=Path),
    help="Run folder, model file or name of weights that ship, of the teacher.",
)
@click.option("--preset", default="small", show_default=True, help="Architecture of the student.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Settings of the student's run; default: the teacher's own.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Wins, as train.epochs=3.")
@click.option("--resume", is_flag=True, help="Go on with the run in this folder.")
def distill(
    teacher: Path, preset: str, output: Path, config: Path | None, overrides: tuple[str, ...], resume: bool
) -> None:
    """Trains a model on the answers of a larger one, beside the labels."""
    from xrdfast.models import model_path
    from xrdfast.training.checkpoint import load_model_card
    from xrdfast.training.config import load_config

    own = (f"model.preset={json.dumps(preset)}", f"distillation.teacher={json.dumps(str(teacher))}")
    base = {} if config is not None else load_model_card(model_path(teacher)).config
    base.get("train", {}).pop("cuda_graph", None)  # which distillation does not go with
    base.get("model", {}).pop("weights", None)  # of the teacher's preset
    settings = load_config(config, (*own, *overrides), base)
    again = ["distill", "--teacher", teacher, "--preset", preset, "-o", output]
    again += ["--config", config] if config is not None else []
    _run_training(settings, output, resume, [*again, *_set_options(overrides)])


def _set_options(overrides: Iterable[str]) -> list[str]:
    return [word for setting in overrides for word in ("--set", setting)]


def _run_training(config: RunConfig, output: Path, resume: bool, again: Iterable[str | Path]) -> None:
    """Trains and prints the metrics, or how to go on: with the command `again`."""
    from xrdfast.evaluation import format_table
    from xrdfast.terminal import training_bar
    from xrdfast.training.trainer import Trainer

    with training_bar("training") as progress:
        result = Trainer(config, output, resume=resume, progress=progress).run()
    if os.environ.get("RANK", "0") != "0":
        return
    if result.status == "interrupted":
        words = shlex.join(["xrdfast", *map(str, again), "--resume"])
        click.echo(f"interrupted after {result.step} steps; go on: {words}", err=True)
        click.get_current_context().exit(INTERRUPTED)
    ended = f"{result.status.replace('_', ' ')} after {result.step} steps"
    click.echo(f"{output}: {ended}; on the validation folds:\n\n{format_table(result.metrics)}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("stores", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--folds", default="0", show_default=True, callback=parse_folds, help="Folds to evaluate, as 0,1; or all."
)
@file_option("--json", "json_file", help="Also write all metrics to this file.")
def evaluate(
    run: Path, stores: tuple[Path, ...], folds: tuple[int, ...] | None, json_file: Path | None
) -> None:
    """Measures a trained model on folds of pattern stores."""
    import torch

    from xrdfast.data.files import write_atomically
    from xrdfast.data.store import PatternStore
    from xrdfast.errors import InputError
    from xrdfast.evaluation import evaluate_predictions, format_table, majority_baseline
    from xrdfast.prediction import SymmetryPredictor
    from xrdfast.terminal import progress_bar
    from xrdfast.training.processes import local_device

    if json_file is not None:
        refuse_input_as_output(json_file, [run, *stores])
    predictor = SymmetryPredictor.load(run, local_device("auto"))
    store = PatternStore.open(list(stores))
    store.verify()
    rows = store.select(folds)
    if len(rows) == 0:
        raise InputError(f"{stores[0]}: fold: must hold labelled patterns of folds {folds}, got none")
    with progress_bar("evaluating", "patterns") as progress:
        logits, number = predictor.store_logits(store, rows, progress)
    held_out = set(predictor.folds_held_out)
    asked = set(folds or range(10))
    # What was fitted on these very folds would flatter the calibration errors: None fits on halves instead.
    calibration = None if asked & held_out else predictor.calibration
    metrics = evaluate_predictions(logits, number, calibration)
    click.echo(format_table(metrics))
    others = store.select()
    others = others[~torch.isin(others, rows)]
    if len(others):
        metrics["majority"] = majority_baseline(store.space_group_01[others].long(), number)
        shares = ", ".join(
            f"{name.replace('_', ' ')} {100 * x:.2f}" for name, x in metrics["majority"].items()
        )
        click.echo(f"\nmajority class of the other folds: {shares}")
    if held_out and not asked <= held_out:
        click.echo(
            f"note: the run held out folds {sorted(held_out)} alone; of its own stores, it knows the others"
        )
    if json_file is not None:
        with write_atomically(json_file) as file:
            file.write(json.dumps(metrics, indent=2).encode())


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@file_option("-o", "--output", required=True, help="Model file (.safetensors, .onnx or .pt2).")
def export(model: Path, output: Path) -> None:
    """Writes a trained model for others: float16 weights, or for other programs ONNX or torch.export's archive."""
    from xrdfast.data.files import write_atomically
    from xrdfast.errors import InputError
    from xrdfast.models import model_path
    from xrdfast.models.export import SUFFIXES, encode_model
    from xrdfast.training.checkpoint import load_model, publish_model

    if output.suffix not in (".safetensors", *SUFFIXES):
        known = ", ".join((".safetensors", *SUFFIXES))
        raise InputError(
            f"{output}: --output: must end in one of {known}, got {output.suffix or 'no suffix'}"
        )
    model = model_path(model)
    refuse_input_as_output(output, [model])
    if output.suffix == ".safetensors":
        publish_model(model, output)
        click.echo(f"{output}: weights in float16 with their calibration, for --model")
        return
    loaded = load_model(model)
    try:
        content = encode_model(loaded, output.suffix)
    except InputError as error:
        raise InputError(f"{model}: {error}") from error
    with write_atomically(output) as file:
        file.write(content)
    click.echo(
        f"{output}: intensity (n_patterns, 8500), 0 to 100, to the logits of every task, not calibrated"
    )


@cli.command("import-checkpoint")
@click.argument("file", type=click.Path(path_type=Path))
@file_option("-o", "--output", required=True, help="Model file (.safetensors).")
def import_checkpoint(file: Path, output: Path) -> None:
    """Reads a checkpoint of the published XRDecoupler code; executes nothing from it."""
    import dataclasses

    from xrdfast.bragg import KA1_WAVELENGTH, Grid
    from xrdfast.models import import_published_checkpoint
    from xrdfast.training.checkpoint import ModelCard, save_model

    card = ModelCard(preset="paper", wavelength=KA1_WAVELENGTH, grid=dataclasses.asdict(Grid()))
    save_model(output, import_published_checkpoint(file), card)
    click.echo(f"{output}: paper preset, not calibrated")


@cli.command()
@click.option("-o", "--output", default="demo-run", show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--minutes",
    default=3.5,
    show_default=True,
    type=FiniteRange(0, min_open=True),
    help="Of training, at most.",
)
def demo(output: Path, minutes: float) -> None:
    """The main job in under five minutes: structures, simulation, training, evaluation, an answer."""
    from xrdfast.demo import run_demo

    passed = run_demo(output, minutes, show_prediction)
    click.get_current_context().exit(0 if passed else 1)
