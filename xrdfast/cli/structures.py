"""Verbs that make structures, simulate their patterns and keep them: simulate, generate, library."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xrdfast.cli.group import cli
from xrdfast.cli.options import file_option, parse_groups, refuse_input_as_output, wavelength_option

if TYPE_CHECKING:
    from xrdfast.data.structures import PackedStructures, Rejected

STORE_SUFFIX = ".store.safetensors"
_SHOWN_REASONS = 5  # of rejected structures; the file has them all


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@file_option("-o", "--output", help="Store; with --lines a .csv file.")
@wavelength_option
@click.option("--two-theta-max", default=90.0, show_default=True, help="Degrees, at this wavelength.")
@click.option(
    "--form-factors", type=click.Choice(["pymatgen", "international"]), default="pymatgen", show_default=True
)
@click.option("--dispersion", is_flag=True, help="Add f' + i f'' at this wavelength.")
@click.option("--workers", type=click.IntRange(1), help="Processes that find symmetry; default one a core.")
@click.option(
    "--variants",
    default=0,
    type=click.IntRange(0),
    help="Also copies of each structure outside fold 0, sites moved along their free coordinates.",
)
@click.option("--lines", is_flag=True, help="Print the lines of one structure instead of writing a store.")
def simulate(
    paths: tuple[Path, ...],
    output: Path | None,
    wavelength: float | None,
    two_theta_max: float,
    form_factors: str,
    dispersion: bool,
    workers: int | None,
    variants: int,
    lines: bool,
) -> None:
    """Simulates structures (.cif, folders of them, packed .npz or .safetensors) into a pattern store."""
    from xrdfast.bragg import KA1_WAVELENGTH
    from xrdfast.data.generate import generate_store
    from xrdfast.data.store import SimulationConfig
    from xrdfast.data.structures import PackedStructures, analyse_symmetry, load_structures
    from xrdfast.errors import InputError
    from xrdfast.terminal import progress_bar

    config = SimulationConfig(
        wavelength=wavelength or KA1_WAVELENGTH,
        two_theta_max=two_theta_max,
        form_factors=form_factors,
        dispersion=dispersion,
    )
    if lines and variants:
        raise click.UsageError("--variants goes with a store, not with --lines")
    if not config.two_theta_min < two_theta_max <= 180.0:
        low = config.two_theta_min
        raise InputError(f"--two-theta-max: must be above {low:g}, up to 180 degrees, got {two_theta_max:g}")
    store = _store_path(output or Path(paths[0].resolve().name)) if not lines else None
    if target := store or output:
        refuse_input_as_output(target, paths)
    with progress_bar("reading", "files") as progress:
        structures, rejected = load_structures(list(paths), progress=progress)
    if not _is_analysed(structures):
        with progress_bar("symmetry", "structures") as progress:
            structures = analyse_symmetry(structures, n_workers=workers, progress=progress)
    if store is None:
        _write_lines(structures, config, output, paths[0])
        return
    if variants:
        from xrdfast.data.variants import move_sites

        with progress_bar("moving sites", "structures") as progress:
            moved = move_sites(structures, variants, n_workers=workers, progress=progress)
        structures = PackedStructures.concatenate([structures, moved])
    with progress_bar("simulating", "structures") as progress:
        source = [path.name for path in paths]
        rejected += generate_store(structures, store, simulation=config, source=source, progress=progress)
    _report_simulation(store, rejected)


@cli.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@file_option(
    "-o", "--output", required=True, help="Packed structures (.safetensors), for `xrdfast simulate`."
)
@click.option("--groups", callback=parse_groups, help="Space groups, as 89,195-199; default all.")
@click.option("--fewer-than", type=click.IntRange(1), help="Only groups with fewer structures in PATHS.")
@click.option(
    "--count", default=30, show_default=True, type=click.IntRange(1), help="Crystals of each group."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option(
    "--workers", type=click.IntRange(1), help="Processes that find the symmetry of PATHS; default one a core."
)
def generate(
    paths: tuple[Path, ...],
    output: Path,
    groups: tuple[int, ...],
    fewer_than: int | None,
    count: int,
    seed: int,
    workers: int | None,
) -> None:
    """Makes synthetic crystals of space groups, of density, shapes and elements as in PATHS (or in minerals)."""
    import torch

    from xrdfast.data.crystals import CrystalStatistics, generate_crystals
    from xrdfast.data.structures import analyse_symmetry, load_structures
    from xrdfast.errors import InputError
    from xrdfast.symmetry import N_SPACE_GROUPS
    from xrdfast.terminal import progress_bar

    if output.suffix != ".safetensors":
        raise InputError(f"{output}: output: must end in .safetensors, got {output.suffix or 'no suffix'}")
    refuse_input_as_output(output, paths)
    if fewer_than is not None and not paths:
        raise InputError("--fewer-than: must come with files of structures to count, got none")
    statistics = None
    if paths:
        with progress_bar("reading", "files") as progress:
            structures, _ = load_structures(list(paths), progress=progress)
        if not _is_analysed(structures):
            with progress_bar("symmetry", "structures") as progress:
                structures = analyse_symmetry(structures, n_workers=workers, progress=progress)
        try:
            statistics = CrystalStatistics.of(structures)
        except ValueError as error:
            raise InputError(f"{paths[0]}: {error}") from error
        if fewer_than is not None:
            found = torch.bincount(structures.space_group_01.long(), minlength=N_SPACE_GROUPS + 1).tolist()
            groups = tuple(number for number in groups if found[number] < fewer_than)
            if not groups:
                raise InputError(f"--fewer-than: must leave a group, got {fewer_than}: all have as many")
    with progress_bar("generating", "space groups") as progress:
        crystals, short = generate_crystals(
            groups, count, seed=seed, statistics=statistics, progress=progress
        )
    crystals.save(output)
    click.echo(f"{output}: {len(crystals)} crystals of {len(groups)} space groups")
    if short:
        click.echo(f"fewer than {count} of groups {', '.join(map(str, short))}: most tries had more symmetry")


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@file_option("-o", "--output", required=True, help="Library (.safetensors).")
@click.option("--workers", type=click.IntRange(1), help="Processes that find symmetry; default one a core.")
def library(paths: tuple[Path, ...], output: Path, workers: int | None) -> None:
    """Makes a library of known structures, which `predict --library` compares scans with.

    PATHS are structures (.cif, folders of them, packed .npz or .safetensors) or stores of `simulate`.
    """
    import tempfile

    from xrdfast.data.generate import generate_store
    from xrdfast.data.store import PatternStore
    from xrdfast.data.structures import analyse_symmetry, load_structures
    from xrdfast.errors import InputError
    from xrdfast.retrieval import KnownStructures
    from xrdfast.terminal import progress_bar

    if output.suffix != ".safetensors":
        raise InputError(f"{output}: output: must end in .safetensors, got {output.suffix or 'no suffix'}")
    refuse_input_as_output(output, paths)
    stores = [path for path in paths if path.name.endswith(STORE_SUFFIX)]
    if stores and len(stores) < len(paths):
        raise InputError(f"{stores[0]}: paths: must be all stores or all structures, got both")
    n_rejected = 0
    with tempfile.TemporaryDirectory() as folder:
        if not stores:
            with progress_bar("reading", "files") as progress:
                structures, rejected = load_structures(list(paths), progress=progress)
            if not _is_analysed(structures):
                with progress_bar("symmetry", "structures") as progress:
                    structures = analyse_symmetry(structures, n_workers=workers, progress=progress)
            stores = [Path(folder) / f"known{STORE_SUFFIX}"]
            with progress_bar("simulating", "structures") as progress:
                rejected += generate_store(structures, stores[0], progress=progress)
            n_rejected = len(rejected)
        store = PatternStore.open(stores)
        store.verify()
        with progress_bar("lines", "structures") as progress:
            known = KnownStructures.build(store, progress)
    known.save(output)
    click.echo(f"{output}: {len(known)} structures, {n_rejected} rejected")


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


def _report_simulation(store: Path, rejected: list[Rejected]) -> None:
    """Prints what came of it and lists what a person should look at, in two files beside the store."""
    from collections import Counter

    from xrdfast.data.store import PatternStore

    name = store.name.removesuffix(".safetensors").removesuffix(".store")
    written = PatternStore.open(store)
    disagreements = [
        {"id": identity, "stated": stated, "symprec_0.01": tight, "symprec_0.1": loose}
        for identity, stated, tight, loose in zip(
            written.ids,
            written.space_group_published.tolist(),
            written.space_group_001.tolist(),
            written.space_group_01.tolist(),
            strict=True,
        )
        # 1 is what files of P1 cells say, whatever the symmetry
        if stated > 1 and loose > 0 and stated != loose
    ]
    lists = {"rejected": [row._asdict() for row in rejected], "disagreements": disagreements}
    for kind, rows in lists.items():
        _write_list(store.with_name(f"{name}.{kind}.jsonl"), rows)
    click.echo(f"{store}: {len(written)} patterns, {len(rejected)} structures rejected")
    if disagreements:
        file = store.with_name(f"{name}.disagreements.jsonl")
        click.echo(
            f"{len(disagreements)} state another space group than spglib finds at 0.1 Angstrom: {file}"
        )
    unlabelled = int((written.space_group_01 == 0).sum())
    if unlabelled:
        click.echo(f"{unlabelled} have no space group by spglib: stored, not trained on")
    reasons = Counter(row.reason for row in rejected).most_common()
    for reason, count in reasons[:_SHOWN_REASONS]:
        click.echo(f"rejected {count}: {reason}")
    if rejected:
        click.echo(f"all of them: {store.with_name(f'{name}.rejected.jsonl')}")


def _write_list(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    from xrdfast.data.files import write_atomically

    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not text:
        path.unlink(missing_ok=True)  # of an earlier run
        return
    with write_atomically(path) as file:
        file.write(text.encode())
