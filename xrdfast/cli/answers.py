"""Verbs that answer for measured patterns: predict, match, screen, report, pack."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xrdfast.cli.group import cli
from xrdfast.cli.options import (
    FiniteRange,
    file_option,
    model_option,
    refuse_input_as_output,
    wavelength_option,
)

if TYPE_CHECKING:
    from xrdfast.prediction import Prediction, SymmetryPredictor

_SHOWN_PEAKS = 5
_SHOWN_NEAREST = 5  # known structures
_SHOWN_SET = 20  # space groups of a set that is meant to hold the true one


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@model_option("lab")
@click.option(
    "--kind",
    type=click.Choice(["auto", "sticks", "scan"]),
    default="auto",
    show_default=True,
    help="auto: instruments write scans, and so are columns of more than 1,000 points in equal steps; a CIF is a "
    "structure.",
)
@wavelength_option
@click.option(
    "--library",
    type=click.Path(path_type=Path),
    help="Known structures (`xrdfast library`): names the nearest, and joins what they say with the model's answer.",
)
@click.option(
    "--scan", type=click.IntRange(0), help="Which one, in a file of several; without it they are listed."
)
@click.option(
    "--top", default=5, show_default=True, type=click.IntRange(1, 230), help="Space groups to list."
)
@file_option("--plot", help="Save a plot (.png, .pdf, .svg).")
@click.option(
    "--axis", type=click.Choice(["2theta", "d", "q"]), default="2theta", show_default=True, help="Of --plot."
)
@click.option(
    "--scale",
    type=click.Choice(["linear", "sqrt", "log"]),
    default="linear",
    show_default=True,
    help="Of the intensity in --plot.",
)
@click.option(
    "--structure",
    type=click.Path(path_type=Path),
    help="A structure whose lines --plot draws below the pattern, to compare.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def predict(
    file: Path,
    model: Path | None,
    kind: str,
    wavelength: float | None,
    library: Path | None,
    scan: int | None,
    top: int,
    plot: Path | None,
    axis: str,
    scale: str,
    structure: Path | None,
    as_json: bool,
) -> None:
    """Answers for one pattern (an instrument's file, or two columns of text) or one structure (a round trip)."""
    from xrdfast.bragg import convert_two_theta
    from xrdfast.errors import InputError, shown_path
    from xrdfast.evidence import find_evidence
    from xrdfast.models import model_path, pretrained_path
    from xrdfast.prediction import STRUCTURE_SUFFIXES, SymmetryPredictor, is_structure_file

    if library is not None and is_structure_file(file, kind):
        raise InputError(f"{file}: --library: must come with a measured pattern, got a structure")
    if structure is not None and (plot is None or structure.suffix.lower() not in STRUCTURE_SUFFIXES):
        raise click.UsageError(f"--structure goes with --plot and ends in {', '.join(STRUCTURE_SUFFIXES)}")
    predictor = SymmetryPredictor.load(model)
    asked = {"kind": kind, "wavelength": wavelength, "scan": scan}
    nearest: list[dict[str, Any]] = []
    if library is None:
        prediction = predictor.predict_file(file, **asked, n_candidates=top)
    else:
        ships = model_path(model).resolve() == pretrained_path()
        prediction, nearest = _second_opinion(predictor, file, library, asked, top, ships=ships)
    evidence = find_evidence(predictor, prediction)
    places = [one.two_theta for one in evidence]
    measured = convert_two_theta(places, predictor.wavelength, prediction.wavelength).tolist()
    if plot is not None:
        from xrdfast.report import save_plot

        ticks = None
        if structure is not None:
            ticks = structure.name, predictor.predict_file(structure, n_candidates=1).pattern.two_theta
        save_plot(
            prediction,
            plot,
            title=shown_path(file.name),
            axis=axis,
            scale=scale,
            evidence=evidence,
            ticks=ticks,
        )
    if as_json:
        peaks = zip(evidence, measured, strict=True)
        more = {"rests_on": [vars(one) | {"two_theta": angle} for one, angle in peaks]}
        more |= {} if library is None else {"nearest": nearest}
        click.echo(json.dumps({"file": str(file)} | prediction.to_dict() | more, indent=2))
        return
    click.echo(shown_path(file))
    show_prediction(prediction)
    strongest = zip(evidence[:_SHOWN_PEAKS], measured, strict=False)
    telling = [f"{angle:.2f}° ({one.drop:.2f})" for one, angle in strongest if one.drop > 0.0]
    if telling:
        peaks = ", ".join(telling)
        whose = "" if library is None else "the model's share in this "
        click.echo(f"{whose}rests most on the peaks at (fall of ln p without it): {peaks}")
    if library is not None:
        _show_nearest(nearest)
    if plot is not None:
        click.echo(f"plot: {plot}")


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("library", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(["auto", "sticks", "scan"]), default="auto", show_default=True)
@wavelength_option
@click.option("--scan", type=click.IntRange(0), help="Which one, in a file of several.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1, 100), help="Structures to list.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def match(
    file: Path,
    library: Path,
    kind: str,
    wavelength: float | None,
    scan: int | None,
    top: int,
    as_json: bool,
) -> None:
    """Names the known structures of LIBRARY nearest to a measured pattern, and their space groups. Needs no model."""
    from xrdfast.data.scans import read
    from xrdfast.errors import shown_path
    from xrdfast.retrieval import KnownStructures
    from xrdfast.symmetry import SYMBOLS

    known = KnownStructures.load(library)
    measured = read(file, wavelength=wavelength, scan=scan)
    matches = known.match_scan(measured, kind=kind, n_best=top)
    nearest = known.describe(matches)[0]
    share, index = matches.space_group[0].sort(descending=True, stable=True)
    groups = [
        {"space_group_number": i + 1, "symbol": SYMBOLS[i], "probability": p}
        for i, p in zip(index[:_SHOWN_NEAREST].tolist(), share[:_SHOWN_NEAREST].tolist(), strict=True)
    ]
    if as_json:
        how = {name: getattr(measured, name) for name in ("wavelength", "wavelength_source", "notes")}
        answer = {"file": str(file), **how, "nearest": nearest, "candidates": groups}
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(shown_path(file))
    click.echo(f"  wavelength {measured.wavelength:.5f} Å ({measured.wavelength_source})")
    for note in measured.notes:
        click.echo(f"  {note}")
    _show_nearest(nearest)
    spoken = ",  ".join(f"{group['symbol']} {_percent(group['probability'])}" for group in groups)
    click.echo(f"space groups, by {len(known)} known structures: {spoken}")


def _second_opinion(
    predictor: SymmetryPredictor, file: Path, library: Path, asked: dict[str, Any], top: int, *, ships: bool
) -> tuple[Prediction, list[dict[str, Any]]]:
    """The model's answer joined with that of known structures, and the nearest of these.

    The set of the joined answer was calibrated with the weights `lab` and a large library: other models and
    small libraries, which make the same answer surer than it is, get none.
    """
    from xrdfast.data.scans import read
    from xrdfast.retrieval import (
        POOL_LEAST_KNOWN,
        POOL_N_BEST,
        POOL_THRESHOLDS,
        KnownStructures,
        is_like,
        join,
    )
    from xrdfast.symmetry import N_SPACE_GROUPS

    known = KnownStructures.load(library)
    prediction = predictor.predict_file(file, **asked, n_candidates=N_SPACE_GROUPS)
    measured = read(file, wavelength=asked["wavelength"], scan=asked["scan"])
    matches = known.match_scan(measured, kind=asked["kind"], n_best=POOL_N_BEST)
    pooled = join(prediction.space_groups(), matches)
    note = f"joined with the answer of {len(known)} known structures"
    calibrated = ships and prediction.kind == "scan" and len(known) >= POOL_LEAST_KNOWN
    threshold = POOL_THRESHOLDS[int(is_like(matches)[0])] if calibrated else None
    joined = prediction.with_posterior(pooled, top, note, threshold)
    return joined, known.describe(matches)[0][:_SHOWN_NEAREST]


def _show_nearest(nearest: list[dict[str, Any]]) -> None:
    from xrdfast.symmetry import SYMBOLS
    from xrdfast.terminal import print_table

    rows = [
        (
            match["name"] or match["formula"],
            match["id"],
            SYMBOLS[match["space_group_number"] - 1] if match["space_group_number"] else "?",
            f"{match['score']:.3f}",
            f"{100.0 * match['strain']:+.2f} %",
        )
        for match in nearest
    ]
    print_table(("nearest known", "id", "space group", "likeness", "cell"), rows, right=(3, 4))


def show_prediction(prediction: Prediction) -> None:
    """Prints an answer: how the pattern was read, the ranked space groups, the superclasses."""
    from xrdfast.symmetry import spoken_classes
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
    if prediction.conformal_set:
        numbers = ", ".join(map(str, prediction.conformal_set[:_SHOWN_SET]))
        more = len(prediction.conformal_set) - _SHOWN_SET
        click.echo(f"95 % set of space groups: {numbers}{f' and {more} more' if more > 0 else ''}")
    doubts = (
        ("unlike the training's patterns", prediction.out_of_distribution),
        ("several phases", prediction.several_phases),
    )
    said = ", ".join(f"{what} {score:.2f}" for what, score in doubts if score is not None)
    if said:
        click.echo(f"suspicions (0 to 1, no probabilities): {said}")
    if prediction.true_number:
        from xrdfast.symmetry import SYMBOLS

        number = prediction.true_number
        click.echo(f"the structure's own space group (spglib, 0.1 Å): {SYMBOLS[number - 1]}, {number}")


def _percent(share: float) -> str:
    return f"{100.0 * share:.1f} %"


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@file_option("-o", "--output", required=True, help="Table of answers (.parquet).")
@model_option("lab-small")
@wavelength_option
@click.option(
    "--top", default=5, show_default=True, type=click.IntRange(1, 230), help="Space groups in a row."
)
@click.option("--readers", type=click.IntRange(0, 1024), help="Processes that read; default one a core.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Where the model answers; auto takes a GPU where there is one. With --engine ray, cpu.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 65536),
    help="Scans that the model takes at once; default 32 on a CPU, 512 on a GPU.",
)
@click.option("--watch", is_flag=True, help="Go on with files that appear, until Ctrl-C.")
@click.option(
    "--interval", default=2.0, show_default=True, type=FiniteRange(0.0), help="Seconds, of --watch."
)
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Progress as lines of JSON on standard error.")
def screen(
    paths: tuple[Path, ...],
    output: Path,
    model: Path | None,
    wavelength: float | None,
    top: int,
    readers: int | None,
    device: str,
    batch: int | None,
    watch: bool,
    interval: float,
    engine: str,
    as_json: bool,
) -> None:
    """Answers for many scans: files, folders, patterns, .tar, HDF5 and NPZ stacks, packed scans.

    Killed at any point, the same command goes on where it was. What cannot be answered is in
    <stem>.errors.jsonl. Under torchrun or srun, processes share the work, and the one that ends last says how it went.
    Exit code 0: all answered, 1: some not, 2: nothing done.
    """
    from xrdfast.errors import InputError
    from xrdfast.models import model_path
    from xrdfast.prediction import SymmetryPredictor
    from xrdfast.processes import n_cores
    from xrdfast.screening.pipeline import Screener, rank_of_environment
    from xrdfast.screening.results import errors_path
    from xrdfast.screening.watching import Watch
    from xrdfast.terminal import screening_progress
    from xrdfast.training.processes import local_device

    if output.suffix != ".parquet":
        raise InputError(f"{output}: --output: must end in .parquet, got another name")
    if watch and engine == "ray":
        raise click.UsageError("--watch goes with --engine local")
    if device == "cuda" and engine == "ray":
        raise click.UsageError("--device cuda goes with --engine local")
    n_readers = n_cores() if readers is None else readers
    place = local_device("cpu" if engine == "ray" else device, "--device")
    predictor = SymmetryPredictor.load(model_path(model, "lab-small"), place)
    screener = Screener(predictor, wavelength=wavelength, top_k=top, batch_size=batch, n_readers=n_readers)
    done = (0, 0)

    with screening_progress(as_json) as show:

        def follow(answered: int, failed: int, known: int) -> None:
            nonlocal done
            done = answered, failed
            show(answered, failed, known)

        try:
            if engine == "ray":
                from xrdfast.screening.ray_engine import screen_with_ray

                done = screen_with_ray(screener, paths, output, progress=follow)
            elif watch:
                with Watch(interval) as watching:
                    done = screener.screen(paths, output, progress=follow, watch=watching)
            else:
                rank, n_ranks = rank_of_environment()
                done = screener.screen(paths, output, progress=follow, rank=rank, n_ranks=n_ranks)
        except InputError as error:
            if not done[0]:
                raise
            click.echo(f"xrdfast: error: {error}; what was answered is kept: run again to go on", err=True)
            click.get_current_context().exit(1)
    totals = screener.totals(output)
    if totals is None:
        click.echo(
            f"{output}: {done[0]} answered by this process; other processes are still at work", err=True
        )
        return  # with 0: torchrun ends every process where one exits with another code
    if totals == (0, 0):
        raise InputError(f"{paths[0]}: paths: must hold a file, got none")
    reasons = f"; why: {errors_path(output)}" if totals[1] else ""
    click.echo(
        f"{output}: {totals[0]} answered, {totals[1]} failed; of these now {done[0]} and {done[1]}{reasons}"
    )
    click.get_current_context().exit(0 if totals[0] and not totals[1] else 1 if totals[0] else 2)


@cli.command()
@click.argument("results", type=click.Path(path_type=Path))
@file_option("-o", "--output", required=True, help="The page (.html).")
@click.option(
    "--rows",
    default=10_000,
    show_default=True,
    type=click.IntRange(1),
    help="Scans to list, the most unusual ones.",
)
@click.option(
    "--patterns",
    default=40,
    show_default=True,
    type=click.IntRange(0),
    help="Of the first rows, scans to read again and draw with background and peaks.",
)
def report(results: Path, output: Path, rows: int, patterns: int) -> None:
    """Turns the answers of `screen` into one HTML page that works offline."""
    from xrdfast.errors import InputError
    from xrdfast.screening.page import write_page

    if output.suffix not in (".html", ".htm"):
        raise InputError(f"{output}: --output: must end in .html, got another name")
    answered, listed, failed = write_page(results, output, n_rows=rows, n_patterns=patterns)
    megabytes = output.stat().st_size / 1e6
    click.echo(f"{output}: {answered} answered ({listed} listed), {failed} failed, {megabytes:.1f} MB")


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@file_option("-o", "--output", required=True, help="Packed scans (.scans.safetensors).")
@wavelength_option
def pack(paths: tuple[Path, ...], output: Path, wavelength: float | None) -> None:
    """Puts many scans into one file, which `screen` reads fastest."""
    from xrdfast.bragg import radiation_of
    from xrdfast.screening.packed import pack as pack_scans
    from xrdfast.screening.sources import Failure, find_chunks, find_files, read_chunk

    refuse_input_as_output(output, paths)
    given = None if wavelength is None else radiation_of(wavelength)
    failed = 0

    def scans() -> Iterable[Any]:
        nonlocal failed
        for chunk in find_chunks(
            find_files(paths, lambda path: os.path.realpath(path) == os.path.realpath(output))
        ):
            for found in read_chunk(chunk, given):
                if isinstance(found, Failure):
                    failed += 1
                    click.echo(f"xrdfast: warning: {found.reason}", err=True)
                else:
                    yield found.scan

    packed = pack_scans(output, scans())
    click.echo(f"{output}: {packed} scans, {failed} failed")
    click.get_current_context().exit(0 if packed and not failed else 1 if packed else 2)
