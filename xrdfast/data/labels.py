"""Space-group numbers and operations of structures, found by spglib in parallel processes.

Works on numpy arrays and imports neither torch nor the package's heavy parts, so that a worker starts in a
moment. Not for tables of space groups (`xrdfast.symmetry`).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xrdfast.processes import hidden_main, n_cores

# Atoms a task hands to a worker at once: small enough to share the load evenly.
_ATOMS_A_TASK = 4000
# Rows of one mixed site carry equal coordinates; rounding may differ in the last digit of a float32.
_SAME_PLACE = 1e-5


class Cell(NamedTuple):
    """What spglib needs to know of one structure."""

    lattice: NDArray[np.float64]  # (3, 3), rows
    fractional: NDArray[np.float64]  # (n, 3)
    atomic_number: NDArray[np.int64]  # (n,)
    occupancy: NDArray[np.float64]  # (n,)


class Symmetry(NamedTuple):
    """What spglib finds; number 0 and no rotations where it finds nothing."""

    numbers: tuple[int, ...]  # one for each symprec
    rotations: NDArray[np.int8]  # (n, 3, 3) distinct W at the last symprec, on fractional columns
    to_standard: NDArray[np.float64]  # (3, 3) P at the last symprec, x_standard = P x + p; NaN where unknown


def merge_sites(cell: Cell) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Places and their kinds: rows at one place are one site, its kind their elements and occupancies.

    Args:
        cell: rows may repeat a place (mixed occupancy).

    Returns:
        (n_sites, 3) fractional coordinates and (n_sites,) kinds from 1.
    """
    keys = np.round((cell.fractional % 1.0) / _SAME_PLACE).astype(np.int64) % round(1.0 / _SAME_PLACE)
    content: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    first: dict[tuple[int, ...], int] = {}
    occupancy = np.round(cell.occupancy * 1000.0).astype(np.int64)
    rows = zip(map(tuple, keys.tolist()), cell.atomic_number.tolist(), occupancy.tolist(), strict=True)
    for row, (key, z, share) in enumerate(rows):
        content.setdefault(key, []).append((z, share))
        first.setdefault(key, row)
    kinds: dict[tuple[tuple[int, int], ...], int] = {}
    kind = [kinds.setdefault(tuple(sorted(parts)), len(kinds) + 1) for parts in content.values()]
    return cell.fractional[list(first.values())], np.array(kind, dtype=np.int64)


def find_symmetry(cell: Cell, symprec: Sequence[float]) -> Symmetry:
    """Space-group number at each tolerance, rotations and standardising transformation at the last one.

    Args:
        cell: the structure.
        symprec: tolerances in Angstrom.

    Returns:
        `Symmetry`; zeros where spglib fails.

    Source:
        Togo, Shinohara & Tanaka, Sci. Technol. Adv. Mater., Meth. 4, 2384822 (2024): spglib.
    """
    os.environ.setdefault("SPGLIB_WARNING", "OFF")  # its C code writes to standard error what `Symmetry` says
    import spglib

    places, kinds = merge_sites(cell)
    numbers, dataset = [], None
    for tolerance in symprec:
        try:
            dataset = spglib.get_symmetry_dataset((cell.lattice, places, kinds), symprec=tolerance)
        except spglib.SpglibError:
            dataset = None
        numbers.append(int(dataset.number) if dataset is not None else 0)
    if dataset is None:
        return _nothing(tuple(numbers))
    rotations = np.unique(np.asarray(dataset.rotations, dtype=np.int8).reshape(-1, 9), axis=0)
    return Symmetry(
        tuple(numbers),
        rotations.reshape(-1, 3, 3),
        np.asarray(dataset.transformation_matrix, dtype=np.float64),
    )


def find_symmetries(
    cells: Sequence[Cell],
    symprec: Sequence[float],
    *,
    n_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Symmetry]:
    """`find_symmetry` of many structures, in their order, over processes.

    A structure whose process dies (spglib is C, and memory can run out) has no symmetry; the others go on.

    Args:
        cells: N structures.
        symprec: tolerances in Angstrom.
        n_workers: processes; None for one a core, 1 for none beside this one.
        progress: called with (structures done, N).
    """
    tasks = list(_tasks(cells))
    n_workers = min(n_workers or n_cores(), len(tasks))
    found: list[Symmetry] = []
    if n_workers <= 1:
        for task in tasks:
            found += _run(task, tuple(symprec))
            if progress:
                progress(len(found), len(cells))
        return found
    pool, running = _start(tasks, tuple(symprec), n_workers)
    try:
        for task, future in zip(tasks, running, strict=True):
            try:
                found += future.result()
            except BrokenProcessPool:
                found += _run_apart(task, tuple(symprec))
            if progress:
                progress(len(found), len(cells))
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _tasks(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    task: list[Cell] = []
    n_atoms = 0
    for cell in cells:
        task.append(cell)
        n_atoms += len(cell.atomic_number) + 20  # a small cell costs time too
        if n_atoms >= _ATOMS_A_TASK:
            yield task
            task, n_atoms = [], 0
    if task:
        yield task


def _start(
    tasks: list[list[Cell]], symprec: tuple[float, ...], n_workers: int
) -> tuple[ProcessPoolExecutor, list[Future[list[Symmetry]]]]:
    # forkserver: a fork of a process with OpenMP threads can hang, and a fresh interpreter is light here.
    pool = ProcessPoolExecutor(n_workers, mp_context=multiprocessing.get_context("forkserver"))
    with hidden_main():
        return pool, [pool.submit(_run, task, symprec) for task in tasks]


def _run_apart(cells: list[Cell], symprec: tuple[float, ...]) -> list[Symmetry]:
    """In a process of its own; where that dies, in halves, down to the structure that ends it."""
    pool, running = _start([cells], symprec, 1)
    try:
        return running[0].result()
    except BrokenProcessPool:
        if len(cells) == 1:
            return [_nothing((0,) * len(symprec))]
        half = len(cells) // 2
        return [*_run_apart(cells[:half], symprec), *_run_apart(cells[half:], symprec)]
    finally:
        pool.shutdown()


def _nothing(numbers: tuple[int, ...]) -> Symmetry:
    return Symmetry(numbers, np.zeros((0, 3, 3), np.int8), np.full((3, 3), np.nan))


def _run(cells: list[Cell], symprec: tuple[float, ...]) -> list[Symmetry]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spglib announces its future error handling at every failure
        return [find_symmetry(cell, symprec) for cell in cells]
