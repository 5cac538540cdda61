"""The command line: one verb, one function. Everything beyond options and printing lives in the package.

Exit codes: 0; 1 where the demo does not pass or nothing can be built; 2 for bad input, with one line on
standard error; 130 for an interruption. Imports beyond click happen inside the verbs, so that `--help` is
there at once.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xrdfast import __version__

if TYPE_CHECKING:
    from xrdfast.data.structures import PackedStructures, Rejected
    from xrdfast.prediction import Prediction
    from xrdfast.training.config import RunConfig

STORE_SUFFIX = ".store.safetensors"
DEMO_FOLDER = "demo-run"
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_SHOWN_REASONS = 5  # of rejected structures; the file has them all
_PACKAGES = (
    "numpy",
    "safetensors",
    "spglib",
    "gemmi",
    "pymatgen",
    "matplotlib",
    "rich",
    "ase",
    "tensorboard",
)


class _Commands(click.Group):
    """Turns what users can get wrong into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "xrdfast"
            self._end(ctx, error, 2, f"{error.format_message()} (see {command} --help)")
        except (ValueError, OSError) as error:
            self._end(ctx, error, 2, _one_line(error))
        except ImportError as error:
            self._end(ctx, error, 2, f"{error.name}: package: must be installed, got {error}")
        except KeyboardInterrupt as error:
            self._end(ctx, error, _INTERRUPTED, "interrupted; files that were finished before are whole")
        except RuntimeError as error:
            from xrdfast._native import BuildError

            if not isinstance(error, BuildError):
                raise
            self._end(ctx, error, 1, str(error))

    def _end(self, ctx: click.Context, error: BaseException, code: int, message: str) -> None:
        if ctx.params.get("debug"):
            raise error
        click.echo(f"xrdfast: error: {message}", err=True)
        ctx.exit(code)


def _one_line(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: file: must be accessible, got {error.strerror}"
    return " ".join(str(error).split())


def main() -> None:
    """The `xrdfast` command."""
    warnings.formatwarning = lambda message, *_, **__: f"xrdfast: warning: {message}\n"
    cli(prog_name="xrdfast")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, hidden=True, envvar="XRDFAST_DEBUG", help="Show tracebacks.")
@click.version_option(__version__, message="%(version)s")
def cli(debug: bool) -> None:
    """Crystal symmetry from powder X-ray diffraction patterns."""


def _wavelength(ctx: click.Context, option: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    from xrdfast.bragg import wavelength_of
    from xrdfast.errors import InputError

    try:
        return wavelength_of(value)
    except ValueError as error:
        raise InputError(f"--wavelength: {str(error).partition(': ')[2]}") from error


def _output_file(ctx: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
    from xrdfast.errors import InputError

    # Files are replaced whole by a rename, which would put a plain file in the place of a device or folder.
    if value is not None and value.exists() and not value.is_file():
        raise InputError(f"{value}: {option.opts[-1]}: must be a plain file, got a folder or device")
    return value


def _folds(ctx: click.Context, option: click.Parameter, value: str) -> tuple[int, ...] | None:
    from xrdfast.errors import InputError

    if value == "all":
        return None
    parts = value.split(",")
    if not all(part.strip().isdigit() and int(part) <= 9 for part in parts):
        raise InputError(f"--folds: must be numbers in 0..9 with commas between, or all, got {value!r}")
    return tuple(sorted({int(part) for part in parts}))


_file_option = functools.partial(click.option, type=click.Path(path_type=Path), callback=_output_file)
_wavelength_option = click.option(
    "--wavelength",
    "--radiation",
    callback=_wavelength,
    metavar="Å|NAME",
    help="Angstrom, or a name such as CuKa1, CuKa (the doublet), MoKa1, CoKa1.",
)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """What is found on this machine, what is used, and why."""
    from importlib.metadata import PackageNotFoundError, version

    from xrdfast import _native
    from xrdfast.terminal import print_table

    found = {"xrdfast": __version__} | {name: str(value) for name, value in _native.status().items()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        print_table(("what", "found"), list(found.items()))


@cli.command()
def build() -> None:
    """Compiles the native code now instead of at first use."""
    from xrdfast import _native

    for path in _native.build():
        click.echo(str(path))


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@_file_option("-o", "--output", help="Store; with --lines a .csv file.")
@_wavelength_option
@click.option("--two-theta-max", default=90.0, show_default=True, help="Degrees, at this wavelength.")
@click.option(
    "--form-factors", type=click.Choice(["pymatgen", "international"]), default="pymatgen", show_default=True
)
@click.option("--dispersion", is_flag=True, help="Add f' + i f'' at this wavelength.")
@click.option("--workers", type=click.IntRange(1), help="Processes that find symmetry; default one a core.")
@click.option("--lines", is_flag=True, help="Print the lines of one structure instead of writing a store.")
def simulate(
    paths: tuple[Path, ...],
    output: Path | None,
    wavelength: float | None,
    two_theta_max: float,
    form_factors: str,
    dispersion: bool,
    workers: int | None,
    lines: bool,
) -> None:
    """Simulates structures (.cif, folders of them, packed .npz or .safetensors) into a pattern store."""
    from xrdfast.bragg import KA1_WAVELENGTH
    from xrdfast.data.generate import generate_store
    from xrdfast.data.store import SimulationConfig
    from xrdfast.data.structures import analyse_symmetry, load_structures
    from xrdfast.errors import InputError
    from xrdfast.terminal import progress_bar

    config = SimulationConfig(
        wavelength=wavelength or KA1_WAVELENGTH,
        two_theta_max=two_theta_max,
        form_factors=form_factors,
        dispersion=dispersion,
    )
    if not config.two_theta_min < two_theta_max <= 180.0:
        low = config.two_theta_min
        raise InputError(f"--two-theta-max: must be above {low:g}, up to 180 degrees, got {two_theta_max:g}")
    store = _store_path(output or Path(paths[0].resolve().name)) if not lines else None
    if store is not None and store.resolve() in [path.resolve() for path in paths]:
        raise InputError(f"{store}: output: must not be an input, got the same file")
    with progress_bar("reading", "files") as progress:
        structures, rejected = load_structures(list(paths), progress=progress)
    if not _is_analysed(structures):
        with progress_bar("symmetry", "structures") as progress:
            structures = analyse_symmetry(structures, n_workers=workers, progress=progress)
    if store is None:
        _write_lines(structures, config, output, paths[0])
        return
    with progress_bar("simulating", "structures") as progress:
        source = [path.name for path in paths]
        rejected += generate_store(structures, store, simulation=config, source=source, progress=progress)
    _report_simulation(store, structures, rejected)


def _store_path(path: Path) -> Path:
    if path.name.endswith(".safetensors") and path.name != ".safetensors":
        return path
    return path.with_name(path.name.removesuffix(".npz").removesuffix(".cif") + STORE_SUFFIX)


def _is_analysed(structures: PackedStructures) -> bool:
    labelled = (structures.space_group_01 > 0).all() and (structures.space_group_001 > 0).all()
    return bool(labelled and (structures.rotation_offset.diff() > 0).all())


def _write_lines(structures: PackedStructures, config: Any, output: Path | None, path: Path) -> None:
    from xrdfast.data.files import write_atomically
    from xrdfast.errors import InputError
    from xrdfast.lines import simulate_structure_lines

    try:
        found = simulate_structure_lines(
            structures,
            wavelength=config.wavelength,
            two_theta_min=config.two_theta_min,
            two_theta_max=config.two_theta_max,
            form_factors=config.form_factors,
            dispersion=config.dispersion,
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    columns = zip(found.two_theta, found.d_spacing, found.intensity, found.hkl.tolist(), strict=True)
    text = "two_theta,d_spacing,intensity,h,k,l\n" + "".join(
        f"{two_theta:.6f},{d:.6f},{intensity:.4f},{h},{k},{ell}\n"
        for two_theta, d, intensity, (h, k, ell) in columns
    )
    if output is None:
        click.echo(text, nl=False)
        return
    with write_atomically(output) as file:
        file.write(text.encode())
    click.echo(f"{output}: {len(found.two_theta)} lines")


def _report_simulation(store: Path, structures: PackedStructures, rejected: list[Rejected]) -> None:
    """Prints what came of it and lists what a person should look at, in two files beside the store."""
    from collections import Counter

    from xrdfast.errors import InputError

    name = store.name.removesuffix(".safetensors").removesuffix(".store")
    left_out = {row.id for row in rejected}
    disagreements = [
        {"id": name, "stated": stated, "symprec_0.01": tight, "symprec_0.1": loose}
        for name, stated, tight, loose in zip(
            structures.ids,
            structures.space_group_published.tolist(),
            structures.space_group_001.tolist(),
            structures.space_group_01.tolist(),
            strict=True,
        )
        # 1 is what files of P1 cells say, whatever the symmetry
        if stated > 1 and loose > 0 and stated != loose and name not in left_out
    ]
    lists = {"rejected": [row._asdict() for row in rejected], "disagreements": disagreements}
    for kind, rows in lists.items():
        _write_list(store.with_name(f"{name}.{kind}.jsonl"), rows)
    n_simulated = len(structures) - len(left_out & set(structures.ids))
    click.echo(f"{store}: {n_simulated} patterns, {len(rejected)} structures rejected")
    if disagreements:
        file = store.with_name(f"{name}.disagreements.jsonl")
        click.echo(
            f"{len(disagreements)} state another space group than spglib finds at 0.1 Angstrom: {file}"
        )
    unlabelled = int((structures.space_group_01 == 0).sum())
    if unlabelled:
        click.echo(f"{unlabelled} have no space group by spglib: stored, not trained on")
    reasons = Counter(row.reason for row in rejected).most_common()
    for reason, count in reasons[:_SHOWN_REASONS]:
        click.echo(f"rejected {count}: {reason}")
    if rejected:
        click.echo(f"all of them: {store.with_name(f'{name}.rejected.jsonl')}")
    if n_simulated == 0:
        raise InputError(f"{store}: structures: must be at least one that can be simulated, got none")


def _write_list(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    from xrdfast.data.files import write_atomically

    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not text:
        path.unlink(missing_ok=True)  # of an earlier run
        return
    with write_atomically(path) as file:
        file.write(text.encode())


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
    again = " ".join([f"train {config} -o {output}", *(f"--set {x}" for x in overrides)])
    _run_training(load_config(config, overrides), output, resume, again)


@cli.command()
@click.option(
    "--teacher",
    required=True,
    type=click.Path(path_type=Path),
    help="Run folder or model file of the teacher.",
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
    from xrdfast.training.checkpoint import load_model_card
    from xrdfast.training.config import load_config

    own = (f"model.preset={json.dumps(preset)}", f"distillation.teacher={json.dumps(str(teacher))}")
    base = {} if config is not None else load_model_card(teacher).config
    settings = load_config(config, (*own, *overrides), base)
    words = [f"distill --teacher {teacher} --preset {preset} -o {output}"]
    words += [f"--config {config}"] if config is not None else []
    _run_training(settings, output, resume, " ".join([*words, *(f"--set {x}" for x in overrides)]))


def _run_training(config: RunConfig, output: Path, resume: bool, again: str) -> None:
    """Trains and prints the metrics, or how to go on."""
    from xrdfast.evaluation import format_table
    from xrdfast.terminal import training_bar
    from xrdfast.training.trainer import Trainer

    with training_bar("training") as progress:
        result = Trainer(config, output, resume=resume, progress=progress).run()
    if os.environ.get("RANK", "0") != "0":
        return
    if result.status == "interrupted":
        click.echo(f"interrupted after {result.step} steps; go on: xrdfast {again} --resume", err=True)
        click.get_current_context().exit(_INTERRUPTED)
    ended = f"{result.status.replace('_', ' ')} after {result.step} steps"
    click.echo(f"{output}: {ended}; on the validation folds:\n\n{format_table(result.metrics)}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("stores", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--folds", default="0", show_default=True, callback=_folds, help="Folds to evaluate, as 0,1; or all."
)
@_file_option("--json", "json_file", help="Also write all metrics to this file.")
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

    predictor = SymmetryPredictor.load(run)
    store = PatternStore.open(list(stores))
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
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--model",
    default=f"{DEMO_FOLDER}/model",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Run folder or model file; the default is what `xrdfast demo` trains.",
)
@click.option("--kind", type=click.Choice(["auto", "sticks", "scan"]), default="auto", show_default=True)
@_wavelength_option
@click.option(
    "--scan", type=click.IntRange(0), help="Which one, in a file of several; without it they are listed."
)
@click.option(
    "--top", default=5, show_default=True, type=click.IntRange(1, 230), help="Space groups to list."
)
@_file_option("--plot", help="Save a plot (.png, .pdf, .svg).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def predict(
    file: Path,
    model: Path,
    kind: str,
    wavelength: float | None,
    scan: int | None,
    top: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Answers for one pattern (an instrument's file, or two columns of text) or one structure (a round trip)."""
    from xrdfast.errors import InputError
    from xrdfast.prediction import SymmetryPredictor

    if not model.exists():
        raise InputError(
            f"{model}: model: must be a run folder or model file (`xrdfast demo` trains one), got none"
        )
    predictor = SymmetryPredictor.load(model)
    prediction = predictor.predict_file(file, kind=kind, wavelength=wavelength, scan=scan, n_candidates=top)
    if plot is not None:
        from xrdfast.report import save_plot

        save_plot(prediction, plot, title=file.name)
    if as_json:
        click.echo(json.dumps({"file": str(file)} | prediction.to_dict(), indent=2))
        return
    click.echo(f"{file}")
    show_prediction(prediction)
    if plot is not None:
        click.echo(f"plot: {plot}")


def show_prediction(prediction: Prediction) -> None:
    """Prints an answer: how the pattern was read, the ranked space groups, the superclasses."""
    from xrdfast.prediction import spoken_classes
    from xrdfast.terminal import print_table

    source = prediction.wavelength_source
    click.echo(f"  kind {prediction.kind}, wavelength {prediction.wavelength:.5f} Å ({source})")
    for note in prediction.notes:
        click.echo(f"  {note}")
    rows = [
        (
            str(rank),
            candidate.symbol,
            str(candidate.space_group_number),
            _percent(candidate.probability),
            candidate.superclasses["crystal_system"],
            candidate.superclasses["point_group"],
            spoken_classes("extinction_group", candidate.superclasses["extinction_group"]),
        )
        for rank, candidate in enumerate(prediction.candidates, 1)
    ]
    headers = ("#", "space group", "No.", "probability", "crystal system", "point group", "extinction class")
    print_table(headers, rows, right=(0, 2, 3))
    rows = [
        (
            level.replace("_", " "),
            ",  ".join(f"{spoken_classes(level, name)} {_percent(share)}" for name, share in ranked[:3]),
        )
        for level, ranked in prediction.superclasses.items()
    ]
    print_table(("level", "most probable"), rows)
    if prediction.true_number:
        from xrdfast.symmetry import SYMBOLS

        number = prediction.true_number
        click.echo(f"the structure's own space group (spglib, 0.1 Å): {SYMBOLS[number - 1]}, {number}")


def _percent(share: float) -> str:
    return f"{100.0 * share:.1f} %"


@cli.command("import-checkpoint")
@click.argument("file", type=click.Path(path_type=Path))
@_file_option("-o", "--output", required=True, help="Model file (.safetensors).")
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
@click.option("-o", "--output", default=DEMO_FOLDER, show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--minutes",
    default=3.5,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Of training, at most.",
)
def demo(output: Path, minutes: float) -> None:
    """The main job in under five minutes: structures, simulation, training, evaluation, an answer."""
    from xrdfast.demo import run_demo

    passed = run_demo(output, minutes, show_prediction)
    click.get_current_context().exit(0 if passed else 1)
