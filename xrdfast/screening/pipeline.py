"""Scans to rows of answers: readers ahead of the model, a bounded number of chunks between them, parts behind it.

Readers are processes (`n_readers`), which take no torch with them, or the calling one; packed scans are read where they
are answered. Threads answer batches, one a core. At most `n_readers` + 2 chunks are being read or wait, and one batch
more than there are threads is being answered, so memory does not depend on how many scans there are, and readers rest
where the model is slower.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from xrdfast.bragg import radiation_of
from xrdfast.data.scans import Scan
from xrdfast.errors import InputError, shown_path
from xrdfast.models import SymmetryModel, model_path
from xrdfast.posterior import joint_posterior
from xrdfast.prediction import SUPERCLASSES, SymmetryPredictor
from xrdfast.screening.manifest import Manifest, part_errors
from xrdfast.screening.preparation import Prepared, prepare_chunk, prepare_scan
from xrdfast.screening.readers import Readers
from xrdfast.screening.results import (
    SCHEMA,
    count_rows,
    errors_path,
    read_failures,
    write_failures,
    write_table,
)
from xrdfast.screening.sources import Chunk, Failure, find_chunks, find_files
from xrdfast.suspicion import doubts
from xrdfast.symmetry import class_names

_KEPT_BYTES = 31 << 20  # the most that glibc takes for a threshold is 32 MB
_SHORT = 0.5  # of the model's range: less of it measured is noted
_In, _Out = TypeVar("_In"), TypeVar("_Out")
_Piece = (
    Sequence[Prepared | Failure] | Chunk
)  # a batch of scans, or the part of a packed file that holds them
Progress = Callable[[int, int, int], None]  # scans answered, failures, scans known so far


class Screener:
    r"""Symmetry answers for many scans.

    Args:
        model: a predictor, a run folder or model file, the name of weights that ship, or a bare model with the usual
            axis and no calibration; None: the weights "lab-small".
        wavelength: Angstrom or a name, for scans whose file states none; None assumes copper K-alpha.
        top_k: space groups in a row, 1..230.
        batch_size: patterns that the model takes at once; None: 32 on a CPU, few enough for a core's caches, and 512
            on a GPU.
        n_readers: processes that read; 0 reads in this one.

    Raises:
        ValueError: for numbers outside their ranges, or no wavelength.
        InputError: for a model file that is not right.

    Example:
        >>> from xrdfast.models import build_model
        >>> path = getfixture("tmp_path") / "salt.xy"
        >>> _ = path.write_text("27.37 8\n31.70 100\n45.45 65\n56.47 21\n75.30 25\n")
        >>> (row,) = Screener(build_model("small").eval(), top_k=3).run([path])
        >>> row["kind"], row["n_points"], len(row["space_group"]), row["confidence"] is None
        ('sticks', 5, 3, True)
    """

    def __init__(
        self,
        model: SymmetryPredictor | SymmetryModel | str | Path | None = None,
        *,
        wavelength: str | float | None = None,
        top_k: int = 5,
        batch_size: int | None = None,
        n_readers: int = 0,
    ) -> None:
        for name, value, low, high in (
            ("top_k", top_k, 1, 230),
            ("batch_size", 1 if batch_size is None else batch_size, 1, 65536),
            ("n_readers", n_readers, 0, 1024),
        ):
            if not low <= value <= high:
                raise ValueError(f"Screener: {name} must be in {low}..{high}, got {value}")
        if model is None or isinstance(model, (str, Path)):
            model = SymmetryPredictor.load(model_path(model, "lab-small"))
        self.predictor = model if isinstance(model, SymmetryPredictor) else SymmetryPredictor(model)
        self.given = None if wavelength is None else radiation_of(wavelength)
        if batch_size is None:
            batch_size = 32 if self.predictor.device.type == "cpu" else 512
        self.top_k, self.batch_size, self.n_readers = top_k, batch_size, n_readers

    def run(
        self,
        items: str | Path | Scan | Iterable[str | Path | Scan],
        on_failure: Callable[[Failure], None] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Rows of answers, as dicts with the columns of `results.SCHEMA`, in the order of the scans.

        Args:
            items: paths (of files, folders, containers; patterns), or scans, not both; or one of them.
            on_failure: is told what cannot be answered; None warns of it.
        """
        tell = _warn if on_failure is None else on_failure
        items = iter([items] if isinstance(items, (str, Path, Scan)) else items)
        first = next(items, None)
        if first is None:
            return
        everything = chain((first,), items)
        whole = self.predictor.reads_scans
        with self._readers() as readers, self._threads() as threads:
            pieces: Iterable[_Piece]
            if isinstance(first, Scan):
                pieces = _batched((prepare_scan(scan, whole) for scan in everything), self.batch_size)
            else:
                chunks = enumerate(find_chunks(find_files(everything)))
                pieces = (piece for *_, piece in self._pieces(readers.read(chunks)))
            for rows, failures in threads.each(self._answer_piece, pieces):
                for failure in failures:
                    tell(failure)
                yield from rows

    def screen(
        self,
        paths: Sequence[str | Path],
        output: str | Path,
        *,
        progress: Progress | None = None,
        rank: int = 0,
        n_ranks: int = 1,
        watch: Callable[[], bool] | None = None,
    ) -> tuple[int, int]:
        """Answers into a Parquet file, going on where an earlier run with this output stopped.

        Args:
            paths: as `run`.
            output: the Parquet file; failures go to `<stem>.errors.jsonl` beside it.
            progress: called after each chunk.
            rank, n_ranks: this process among several that share the work and the file system.
            watch: called when everything found is answered; waits and says whether to look again. Until it says no,
                output is written anew when a tenth of it waits in parts.

        Returns:
            Scans answered and failures, of this call and this process.

        Raises:
            InputError: where output or its parts belong to another run or cannot be written. What was answered
                until then is kept.
        """
        output = Path(output)
        manifest = Manifest(output, self.digest())
        own = {os.path.realpath(path) for path in (output, manifest.parts, errors_path(output))}
        settled = _settled() if watch is not None else lambda path: True
        answered = failed = known = 0

        def mine(chunks: Iterable[tuple[int, Chunk]]) -> Iterator[tuple[int, Chunk]]:
            nonlocal known
            kept = manifest.n_kept
            for number, chunk in chunks:
                if number % n_ranks != rank or number < kept or manifest.part(number, chunk).exists():
                    continue
                known += chunk.n_expected
                yield number, chunk

        def work(chunks: Iterable[tuple[int, Chunk]]) -> None:
            nonlocal answered, failed
            rows: list[dict[str, Any]] = []
            failures: list[Failure] = []
            with self._readers() as readers, self._threads() as threads:
                pieces = self._pieces(readers.read(mine(chunks)))
                for (number, chunk, is_last, _), found in threads.each(
                    lambda one: (one, self._answer_piece(one[3])), pieces
                ):
                    rows += found[0]
                    failures += found[1]
                    if not is_last:
                        continue
                    failures = list(dict.fromkeys(failures))  # what ails a whole file, its pieces all say
                    write_part(manifest, number, chunk, rows, failures)
                    answered, failed = answered + len(rows), failed + len(failures)
                    rows, failures = [], []
                    if progress is not None:
                        progress(answered, failed, max(known, answered + failed))

        while True:
            work(list(manifest.chunks()))
            files = filter(settled, find_files(paths, lambda path: os.path.realpath(path) in own))
            with contextlib.closing(manifest.extend(files)) as found:
                if n_ranks == 1:
                    work(found)
                else:  # note everything first, so that none waits for another's work
                    deque(found, maxlen=0)
            if n_ranks > 1:
                work(list(manifest.chunks()))  # this process's share of what any of them noted
            manifest.join(lazily=watch is not None)
            if watch is None or not watch():
                break
        manifest.join()
        return answered, failed

    def totals(self, output: str | Path) -> tuple[int, int] | None:
        """Rows and failures of all that an output holds; None while some of its chunks are not answered."""
        output = Path(output)
        manifest = Manifest(output, self.digest())
        if manifest.n_kept != sum(1 for _ in manifest.chunks()):
            return None
        return count_rows(output), sum(1 for _ in read_failures(errors_path(output)))

    def answer(self, prepared: Sequence[Prepared | Failure]) -> tuple[list[dict[str, Any]], list[Failure]]:
        """Rows and failures of prepared scans, in their order."""
        rows: list[dict[str, Any]] = []
        failures: list[Failure] = []
        for batch in _batched(prepared, self.batch_size):
            start = time.perf_counter()
            failures += [scan for scan in batch if isinstance(scan, Failure)]
            scans = [scan for scan in batch if isinstance(scan, Prepared)]
            ready, intensity, refused = self._on_axis(scans)
            failures += refused
            if ready:
                answers = self._rows(ready, intensity, *self.predictor.outputs(intensity))
                seconds = (time.perf_counter() - start) / len(ready)
                rows += [row | {"seconds": row["seconds"] + seconds} for row in answers]
        return rows, failures

    def _on_axis(
        self, scans: Sequence[Prepared]
    ) -> tuple[list[tuple[Prepared, list[str]]], Tensor, list[Failure]]:
        """Scans that the model can answer, with what was done to them; their patterns; the others, with the reason."""
        predictor, failures = self.predictor, []
        is_whole = [predictor.reads_scans and scan.kind == "scan" for scan in scans]
        whole = [scan for scan, is_one in zip(scans, is_whole, strict=True) if is_one]
        of_whole = torch.empty(0, predictor.grid.n_points)
        if whole:
            of_whole = predictor.prepare_scans(
                [s.two_theta for s in whole], [s.intensity for s in whole], [s.wavelength for s in whole]
            )
        rises = iter((of_whole.amax(dim=1) > 0.0).tolist())
        ready, lines, of_lines = [], [], []  # of_lines: places in `ready`
        for scan, is_one in zip(scans, is_whole, strict=True):
            notes: list[str] = []
            try:
                if not is_one:
                    doublet = scan.is_doublet and scan.kind == "scan"
                    found, notes = predictor.lines_on_axis(
                        scan.two_theta, scan.intensity, scan.wavelength, is_doublet=doublet
                    )
                    of_lines.append(len(ready))
                    lines.append(found)
                elif not next(rises):
                    raise ValueError(
                        "intensity: must rise above background and noise within the model's range"
                    )
            except ValueError as error:
                reason = f"{shown_path(scan.scan_id)}: {error}"
                failures.append(Failure(scan.scan_id, scan.file, scan.member, scan.scan_index, reason))
                continue
            ready.append((scan, notes))
        if not lines and len(ready) == len(scans):
            return ready, of_whole, failures
        intensity = torch.empty(len(ready), predictor.grid.n_points)
        is_line = torch.zeros(len(ready), dtype=torch.bool)
        is_line[of_lines] = True
        intensity[~is_line] = of_whole[of_whole.amax(dim=1) > 0.0]
        if lines:
            intensity[is_line] = predictor.prepare_lines(lines)
        return ready, intensity, failures

    def digest(self) -> str:
        """Names everything but the scans that answers depend on."""
        found = hashlib.sha256()
        for name, tensor in self.predictor.model.state_dict().items():
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        calibration = self.predictor.calibration
        settings = {
            "grid": vars(self.predictor.grid),
            "wavelength": self.predictor.wavelength,
            "profile": self.predictor.augment.profile,
            "smooth_width": self.predictor.augment.smooth_width,
            "calibration": calibration.to_dict() if calibration else None,
            "given": vars(self.given) if self.given else None,
            "top_k": self.top_k,
            "columns": SCHEMA.names,
        }
        found.update(json.dumps(settings, sort_keys=True).encode())
        return found.hexdigest()

    def _rows(
        self,
        scans: Sequence[tuple[Prepared, list[str]]],
        intensity: Tensor,
        logits: dict[str, Tensor],
        features: Tensor,
    ) -> list[dict[str, Any]]:
        calibration = self.predictor.calibration
        posterior = joint_posterior(logits, calibration)
        share, index = posterior.space_group.sort(dim=1, descending=True, stable=True)
        number = (index + 1).tolist()
        probability = share[:, : self.top_k].tolist()
        threshold = calibration and calibration.threshold
        calibrated = threshold is not None
        in_set = (
            posterior.conformal_sets(threshold).sum(1).tolist() if calibrated else []
        )  # the first so many
        levels = {}
        for level in SUPERCLASSES:
            best, at = posterior.marginal(level).max(dim=1)
            names = class_names(level)
            levels[level] = [names[i] for i in at.tolist()], best.tolist()
        is_whole = [self.predictor.reads_scans and scan.kind == "scan" for scan, _ in scans]
        known = torch.tensor(is_whole)
        unlike, several = doubts(logits, features, posterior, calibration, intensity, known)
        rows = []
        for i, (scan, notes) in enumerate(scans):
            row: dict[str, Any] = {name: getattr(scan, name) for name in _COPIED}
            row["space_group"], row["probability"] = number[i][: self.top_k], probability[i]
            row["confidence"] = probability[i][0] if calibration else None
            row["conformal_set"] = number[i][: in_set[i]] if calibrated else None
            for level, (names, best) in levels.items():
                row[level], row[f"{level}_probability"] = names[i], best[i]
            row["out_of_distribution"], row["several_phases"] = unlike[i], several[i]
            row["notes"] = [*scan.notes, *notes, *self._range_notes(scan)]
            row["seconds"] = scan.seconds
            rows.append(row)
        return rows

    def _range_notes(self, scan: Prepared) -> list[str]:
        if scan.kind != "scan":
            return []
        grid, ratio = self.predictor.grid, self.predictor.wavelength / scan.wavelength

        def moved(angle: float) -> float:
            sine = ratio * math.sin(math.radians(angle / 2.0))
            return 2.0 * math.degrees(math.asin(sine)) if sine < 1.0 else 180.0

        first, last = moved(scan.two_theta_first), moved(scan.two_theta_last)
        covered = min(last, grid.two_theta_max) - max(first, grid.two_theta_min)
        whole = grid.two_theta_max - grid.two_theta_min
        if covered >= _SHORT * whole:
            return []
        return [f"range too short: {max(covered, 0.0):.0f} of the model's {whole:.0f} degrees are measured"]

    def _pieces(
        self, read: Iterable[tuple[int, Chunk, list[Prepared | Failure] | None]]
    ) -> Iterator[tuple[int, Chunk, bool, _Piece]]:
        """Chunks cut into batches, each with whether it is the chunk's last."""
        for number, chunk, prepared in read:
            n_scans = chunk.end - chunk.begin if prepared is None else len(prepared)
            for at in range(0, max(n_scans, 1), self.batch_size):
                end = min(at + self.batch_size, n_scans)
                piece: _Piece = (
                    replace(chunk, begin=chunk.begin + at, end=chunk.begin + end)
                    if prepared is None
                    else prepared[at:end]
                )
                yield number, chunk, end == n_scans, piece

    def _answer_piece(self, piece: _Piece) -> tuple[list[dict[str, Any]], list[Failure]]:
        if isinstance(piece, Chunk):
            piece = prepare_chunk(piece, self.given, self.predictor.reads_scans)
        return self.answer(piece)

    def _readers(self) -> Readers:
        return Readers(self.n_readers, self.given, self.predictor.reads_scans)

    def _threads(self) -> _Threads:
        return _Threads(torch.get_num_threads(), self.predictor.device)


class _Threads:
    """Threads that answer beside each other, each with one thread of torch's.

    Two threads that share every product wait for each other at its end, and for readers that took their core; threads
    with batches of their own wait for nothing.

    Args:
        n_threads: of them, one a core: they prepare scans and write down answers wherever the model is.
        device: of the model.
    """

    def __init__(self, n_threads: int, device: torch.device) -> None:
        self._n_threads, self._device = n_threads, device

    def __enter__(self) -> _Threads:
        self._before = torch.get_num_threads()
        # Freed at once. glibc then keeps as much memory and gives batch after batch what the last one had: else new
        # pages, each cleared, take 7 % of the time.
        torch.empty(_KEPT_BYTES, dtype=torch.uint8)
        self._pool = ThreadPoolExecutor(self._n_threads, "answer", self._begin)
        return self

    def _begin(self) -> None:
        torch.set_num_threads(1)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has a current device of its own

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)  # what new threads get is set with it

    def each(self, work: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
        """Results in the order of the items, of which one a thread and one more are on their way."""
        waiting: deque[Future[_Out]] = deque()
        for item in items:
            waiting.append(self._pool.submit(work, item))
            if len(waiting) > self._n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def rank_of_environment() -> tuple[int, int]:
    """Rank and number of processes, by the variables of torchrun or SLURM.

    Raises:
        InputError: for variables that are no rank below a count.
    """
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and count in os.environ:
            values = os.environ[rank], os.environ[count]
            if not all(value.isdigit() for value in values) or int(values[0]) >= int(values[1]):
                raise InputError(f"{rank}, {count}: environment: must be a rank below a count, got {values}")
            return int(values[0]), int(values[1])
    return 0, 1


def write_part(
    manifest: Manifest, number: int, chunk: Chunk, rows: Sequence[dict[str, Any]], failures: Sequence[Failure]
) -> None:
    """Keeps the answers of a chunk; the part comes last, because it says that the chunk is done."""
    part = manifest.part(number, chunk)
    if failures:
        write_failures(part_errors(part), ((number, failure) for failure in failures))
    else:  # those of an attempt that was killed before its part was there
        part_errors(part).unlink(missing_ok=True)
    write_table(part, rows)


_COPIED = (
    "scan_id",
    "file",
    "member",
    "scan_index",
    "sha256",
    "kind",
    "wavelength",
    "wavelength_source",
    "n_points",
    "two_theta_first",
    "two_theta_last",
    "thumbnail",
)


def _settled() -> Callable[[str], bool]:
    """Says of a file whether it is as it was when last asked about: nobody is writing it."""
    seen: dict[str, tuple[int, int]] = {}

    def settled(path: str) -> bool:
        try:
            status = os.stat(path)
        except OSError:
            return False
        now = status.st_size, status.st_mtime_ns
        before, seen[path] = seen.get(path), now
        return before == now

    return settled


def _warn(failure: Failure) -> None:
    warnings.warn(failure.reason, stacklevel=3)


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """itertools.batched, which Python 3.11 has not."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
