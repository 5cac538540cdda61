"""The main job on structures that ship with pymatgen: an answer, then simulate, train, evaluate, answer again.

Shows, offline and within minutes, that every part works together on real structure types. Not a benchmark:
288 prototypes are far too few for a model that is of use elsewhere.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator

from xrdfast.bragg import wavelength_of
from xrdfast.data.files import write_atomically
from xrdfast.data.generate import draw_strain, generate_store, strained_reciprocal_metric
from xrdfast.data.store import PatternStore
from xrdfast.data.structures import PackedStructures, analyse_symmetry, from_arrays
from xrdfast.errors import InputError
from xrdfast.evaluation import evaluate_predictions, majority_baseline
from xrdfast.lines import simulate_structure_lines
from xrdfast.prediction import Prediction, SymmetryPredictor
from xrdfast.report import save_plot
from xrdfast.scattering import element_symbols, form_factor_table
from xrdfast.symmetry import TASKS
from xrdfast.terminal import print_table, progress_bar, training_bar
from xrdfast.training import checkpoint, run_log, trainer
from xrdfast.training.config import RunConfig, config_from_dict

_SCANNED = "Rutile"  # of the prototypes, in the scan that is answered first
_CALIBRATION_FOLD, _HELD_OUT_FOLD, _TRAINING_FOLD = 0, 1, 2
# Fold, its share of the structures, and the share of the types of each space group that is left after it.
_PARTS = ((_HELD_OUT_FOLD, 0.2, 2 / 3), (_CALIBRATION_FOLD, 0.1, 1 / 2))
CRYSTAL_SYSTEM_GAIN = 0.15  # over the majority class, that the demo must reach
_VARIANTS = 120  # of each training structure
_EPOCHS = 3  # over all of them: 71,000 patterns

# Relatives of a structure type. Those of rock salt, with a from 4.0 to 7.7 Angstrom, spread wider.
_SCALE = 0.15  # largest share by which all edges grow or shrink
_STRAIN = 0.05  # standard deviation of the strain that keeps the symmetry
_DISPLACEMENT = 0.3  # Angstrom, standard deviation before it is averaged over the symmetry
_STUFFED = 2  # one relative in so many gets an element on a general position
_HEAVIEST = 83  # Bi: what follows is radioactive
_NOBLE_GASES = (2, 10, 18, 36, 54)


def run_demo(folder: Path, minutes: float, show: Callable[[Prediction], None]) -> bool:
    """Runs everything and prints what happens.

    First the weights that ship answer for a simulated laboratory scan (`scan.xy`, `scan.png`), in seconds. Then a model
    of its own is trained. Leaves in the folder, too: the two stores, `model/` (the run), `metrics.json`, `pattern.xy`
    and `answer.png` of one held-out structure. What an earlier demo left there is replaced.

    Args:
        folder: created where missing.
        minutes: of training at most.
        show: prints one answer.

    Returns:
        Whether all four tasks beat the majority class on the held-out structures, crystal system by at least
        `CRYSTAL_SYSTEM_GAIN`.

    Raises:
        InputError: where pymatgen's prototypes are missing, the folder cannot be written, or for minutes that are no
            time.
        KeyboardInterrupt: where training was interrupted.
    """
    begun = time.monotonic()
    config = demo_config(folder, minutes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: folder: must be writable, got {error.strerror}") from error
    structures = load_prototypes()
    _first_answer(folder, structures, show)
    training, held_out = _prepare(folder, structures)
    _train(folder, config)
    predictor = SymmetryPredictor.load(folder / "model")
    passed = _evaluate(folder, predictor, training, held_out)
    _answer(folder, predictor, held_out, show)
    verdict = "passed" if passed else "NOT PASSED"
    click.echo(f"\n{verdict} after {time.monotonic() - begun:.0f} s; files in {folder}/")
    return passed


def _first_answer(folder: Path, structures: PackedStructures, show: Callable[[Prediction], None]) -> None:
    """What the weights that ship say of one scan."""
    (row,) = [i for i, name in enumerate(structures.ids) if _SCANNED in name]
    two_theta, counts = laboratory_scan(structures[row : row + 1], Generator().manual_seed(0))
    path = folder / "scan.xy"
    with write_atomically(path) as file:
        np.savetxt(file, np.column_stack([two_theta, counts]), fmt=("%.2f", "%d"), header="CuKa")
    prediction = SymmetryPredictor.load().predict_file(path, wavelength=wavelength_of("CuKa"))
    save_plot(prediction, folder / "scan.png", title=structures.ids[row])
    click.echo(f"the weights that ship, for a simulated laboratory scan of {structures.ids[row]} ({path}):")
    show(prediction)
    click.echo(f"plot: {folder / 'scan.png'}\n\nnow a model of its own, on 288 structure types:")


def laboratory_scan(
    structure: PackedStructures, generator: Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Counts of one structure under the copper doublet: Lorentzians of 0.1 degrees, 5,000 high, on 100 counts.

    Returns:
        two_theta (n_points,) degrees, 10 to 80 in steps of 0.02; counts (n_points,), with Poisson noise.
    """
    two_theta = np.arange(500, 4001) * 0.02
    mean = np.zeros(len(two_theta))
    for name, ratio in (("CuKa1", 1.0), ("CuKa2", 0.5)):
        lines = simulate_structure_lines(structure, wavelength=wavelength_of(name))
        for place, height in zip(lines.two_theta, lines.intensity, strict=True):
            mean += ratio * height / (1.0 + ((two_theta - place) / 0.05) ** 2)
    mean = 100.0 + 5000.0 * mean / mean.max()
    return two_theta, torch.poisson(torch.from_numpy(mean), generator=generator).numpy()


def _prepare(folder: Path, structures: PackedStructures) -> tuple[PackedStructures, PackedStructures]:
    """Writes both stores; returns the structures trained on (without variants) and those held out."""
    with progress_bar("symmetry", "structures") as progress:
        structures = analyse_symmetry(structures, progress=progress)
    clean = structures[structures.space_group_001 == structures.space_group_01]
    training, calibration, held_out = split_structures(clean)
    variants = vary_structures(training, _VARIANTS, Generator().manual_seed(0))
    n_groups = len(structures.space_group_01.unique())
    click.echo(
        f"{len(structures)} structure types of {n_groups} space groups; {len(structures) - len(clean)} left "
        f"out, whose group depends on the tolerance\n"
        f"{len(training)} to train on, each with {_VARIANTS} relatives of other elements, sites and cell; "
        f"{len(calibration)} to calibrate; {len(held_out)} held out by formula and type"
    )
    learnt = PackedStructures.concatenate([training, calibration, variants])
    for name, part in (("training", learnt), ("held-out", held_out)):
        with progress_bar(f"simulating {name}", "structures") as progress:
            generate_store(part, folder / f"{name}.store.safetensors", progress=progress)
    return training, held_out


def _train(folder: Path, config: RunConfig) -> None:
    run = folder / "model"
    for name in (checkpoint.MODEL_FILE, checkpoint.STATE_FILE, trainer.CONFIG_FILE, run_log.LOG_FILE):
        (run / name).unlink(missing_ok=True)  # of an earlier demo
    with training_bar("training") as progress:
        result = trainer.Trainer(config, run, progress=progress).run()
    if result.status == "interrupted":
        raise KeyboardInterrupt
    click.echo(f"trained {result.step} steps")


def demo_config(folder: Path, minutes: float) -> RunConfig:
    """The demo's training run: the small preset, all four tasks, strain and B drawn for every pattern."""
    return config_from_dict(
        {
            "model": {"preset": "small"},
            "data": {
                "stores": [str(folder / "training.store.safetensors")],
                "folds_validation": [_CALIBRATION_FOLD],
            },
            "train": {
                "epochs": _EPOCHS,
                "max_minutes": minutes,
                # Small: the run is short of steps, not of patterns. A core renders and learns 300 patterns a
                # second at 16 and 350 at 64, and after as many patterns the held-out crystal system is right in
                # 79 % against 54 %.
                "batch_size": 16,
                "learning_rate": 1.5e-3,
                "ema_decay": 0.99,
                "validate_epochs": 10**6,  # only at the end: too few structures to choose a model by
            },
        }
    )


def _evaluate(
    folder: Path, predictor: SymmetryPredictor, training: PackedStructures, held_out: PackedStructures
) -> bool:
    store = PatternStore.open(folder / "held-out.store.safetensors")
    with progress_bar("evaluating", "patterns") as progress:
        logits, number = predictor.store_logits(store, torch.arange(len(store)), progress)
    metrics = evaluate_predictions(logits, number, predictor.calibration)
    majority = majority_baseline(training.space_group_01, number)
    with write_atomically(folder / "metrics.json") as file:
        file.write(json.dumps(metrics | {"majority": majority}, indent=2).encode())
    found = {task: metrics["joint"]["tasks"][task]["top1"] for task in TASKS}
    rows = [
        [task.replace("_", " "), *(f"{100 * x:.1f}" for x in (majority[task], share, share - majority[task]))]
        for task, share in found.items()
    ]
    click.echo(f"\n{len(number)} held-out structures, percent right (joint posterior)")
    print_table(("task", "majority class", "model", "gain"), rows, right=(1, 2, 3))
    gain = {task: share - majority[task] for task, share in found.items()}
    return min(gain.values()) > 0.0 and gain["crystal_system"] >= CRYSTAL_SYSTEM_GAIN


def _answer(
    folder: Path, predictor: SymmetryPredictor, held_out: PackedStructures, show: Callable[[Prediction], None]
) -> None:
    one = held_out[0]
    prediction = predictor.predict_structure(one)
    pattern = prediction.pattern
    with write_atomically(folder / "pattern.xy") as file:
        columns = np.column_stack([pattern.two_theta, pattern.intensity])
        np.savetxt(file, columns, fmt="%.5f", header=one.ids[0])
    save_plot(prediction, folder / "answer.png", title=one.ids[0])
    click.echo(f"the first held-out structure, {one.ids[0]} ({one.formula[0]}):")
    show(prediction)
    click.echo(f"plot: {folder / 'answer.png'}; its lines, to try predict with: {folder / 'pattern.xy'}")


def load_prototypes() -> PackedStructures:
    """The AFLOW prototypes inside pymatgen: real structure types, without labels.

    `family` is the AFLOW label (stoichiometry, Pearson symbol, space group, occupied sites), so that
    relatives share a fold.

    Raises:
        InputError: where pymatgen or its file is missing.

    Source:
        Mehl et al., Comput. Mater. Sci. 136, S1 (2017): the AFLOW library of crystallographic prototypes.
    """
    entries = json.loads(gzip.decompress(_prototype_file().read_bytes()))
    number = {symbol: z for z, symbol in enumerate(element_symbols())} | {"D": 1}
    lattices, atoms, ids, families = [], [], [], []
    for row, entry in enumerate(entries):
        structure = entry["snl"]
        sites = [(site["abc"], part) for site in structure["sites"] for part in site["species"]]
        z = np.array([number[part["element"]] for _, part in sites])
        occupancy = np.array([part["occu"] for _, part in sites])
        lattices.append(np.array(structure["lattice"]["matrix"]))
        atoms.append((z, np.array([place for place, _ in sites]), occupancy, np.zeros(len(z))))
        mineral = entry["tags"]["mineral"]
        ids.append(" ".join([f"{row:03d}", *([mineral] if mineral else []), entry["tags"]["aflow"]]))
        families.append(entry["tags"]["aflow"])
    return from_arrays(lattices, atoms, ids, family=families)


def split_structures(
    structures: PackedStructures,
) -> tuple[PackedStructures, PackedStructures, PackedStructures]:
    """Structures to train on, to calibrate with, and held out; equal formulas or AFLOW labels stay together.

    Relatives leave the training set in the order of a hash, as long as it keeps its share of the types of
    each of their space groups: so all parts are alike, and no group is asked for that was never seen.

    Returns:
        The three parts, with their folds.
    """
    parent = list(range(len(structures)))

    def root(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

    first: dict[str, int] = {}
    for row, keys in enumerate(zip(structures.formula, structures.family, strict=True)):
        for key in keys:
            parent[root(row)] = root(first.setdefault(key, row))
    relatives: dict[int, list[int]] = {}
    for row in range(len(structures)):
        relatives.setdefault(root(row), []).append(row)
    ordered = sorted(
        relatives.values(), key=lambda rows: hashlib.sha256(structures.formula[rows[0]].encode()).digest()
    )
    number = structures.space_group_01.tolist()
    types = Counter(group for rows in ordered for group in {number[row] for row in rows})
    left = types.copy()
    parts = {}
    for fold, share, kept in _PARTS:
        taken: list[int] = []
        for rows in list(ordered):
            groups = {number[row] for row in rows}
            allowed = all(left[group] - 1 >= kept * types[group] for group in groups)
            if allowed and len(taken) < share * len(structures):
                taken += rows
                left.subtract(groups)
                ordered.remove(rows)
        parts[fold] = _with_fold(structures[sorted(taken)], fold)
    training = sorted(row for rows in ordered for row in rows)
    return _with_fold(structures[training], _TRAINING_FOLD), parts[_CALIBRATION_FOLD], parts[_HELD_OUT_FOLD]


def _with_fold(structures: PackedStructures, fold: int) -> PackedStructures:
    return dataclasses.replace(structures, fold=torch.full_like(structures.fold, fold))


def vary_structures(structures: PackedStructures, n_variants: int, generator: Generator) -> PackedStructures:
    """Made-up relatives of structures: other elements on moved sites, in cells of other size and shape.

    Different elements stay different, atoms and cell move only as the symmetry allows, and every second
    relative gets one more element on a general position: labels, rotations and folds stay right (at 0.01
    Angstrom spglib finds another group for 5 of 576).

    Args:
        structures: N structures with rotations.
        n_variants: of each structure, >= 1.
        generator: source of elements, sites, sizes and strains.

    Returns:
        N * n_variants structures.
    """
    base = structures[torch.arange(len(structures)).repeat_interleave(n_variants)]
    strain = draw_strain(len(base), _STRAIN, generator)
    scale = 1.0 + _SCALE * (2.0 * torch.rand(len(base), generator=generator, dtype=torch.float64) - 1.0)
    reciprocal = strained_reciprocal_metric(base.lattice, base.rotation_offset, base.rotations, strain)
    rows = torch.tensor([[0, 5, 4], [5, 1, 3], [4, 3, 2]])
    # G = A A^T with A lower triangular is a cell of that metric: a along x, b in the xy plane.
    lattice = torch.linalg.cholesky(torch.linalg.inv(reciprocal[:, rows])) * scale[:, None, None]
    random = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    atoms = [part for one in structures for part in _varied_atoms(one, n_variants, random)]
    number = torch.from_numpy(np.concatenate([z for z, _ in atoms]).astype(np.uint8))
    return dataclasses.replace(
        base,
        offset=torch.tensor(np.cumsum([0, *(len(z) for z, _ in atoms)])),
        lattice=lattice,
        atomic_number=number,
        fractional=torch.from_numpy(np.concatenate([places for _, places in atoms])),
        occupancy=torch.ones(len(number), dtype=torch.float64),
        b_iso=torch.zeros(len(number), dtype=torch.float64),
        ids=[f"{name} #{i % n_variants + 1}" for i, name in enumerate(base.ids)],
    )


def _varied_atoms(
    structure: PackedStructures, n_variants: int, random: np.random.Generator
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Atomic numbers (n,) and fractional coordinates (n, 3) of the relatives of one structure.

    Displacements are averaged over the space group: an operation that carries atom i onto j demands
    u_j = W u_i.
    """
    import spglib

    lattice, places = structure.lattice[0].numpy(), structure.fractional.numpy()
    own, which = np.unique(structure.atomic_number.numpy(), return_inverse=True)
    found = spglib.get_symmetry_dataset((lattice, places, which), symprec=0.1)
    drawn = _DISPLACEMENT * random.standard_normal((n_variants, len(places), 3)) @ np.linalg.inv(lattice)
    moves = np.zeros_like(drawn)
    for turn, shift in zip(found.rotations, found.translations, strict=True):
        apart = (places @ turn.T + shift)[:, None] - places
        onto = np.linalg.norm((apart - np.rint(apart)) @ lattice, axis=2).argmin(axis=1)
        moves[:, onto] += drawn @ turn.T / len(found.rotations)
    known = ~np.isnan(form_factor_table("pymatgen").c)
    elements = np.array([z for z in range(1, _HEAVIEST + 1) if known[z] and z not in _NOBLE_GASES])
    for variant in range(n_variants):
        chosen = random.permutation(elements)
        number, moved = chosen[which], places + moves[variant]
        if variant % _STUFFED == 1:
            orbit = found.rotations @ random.random(3) + found.translations
            number = np.concatenate([number, np.full(len(orbit), chosen[len(own)])])
            moved = np.concatenate([moved, orbit])
        yield number, moved


def _prototype_file() -> Path:
    for module in ("pymatgen.analysis.prototypes", "pymatgen.analysis"):
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder) / "aflow_prototypes.json.gz"
            if path.exists():
                return path
    raise InputError("pymatgen: aflow_prototypes.json.gz: must come with the package, got none")
