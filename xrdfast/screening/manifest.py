"""What a run has to do and what of it is done, on disk, so that a run killed anywhere goes on without loss.

`<output>.parts/` holds `manifest.jsonl`, one chunk a line in the order of discovery and only ever added to, and for
each answered chunk a part: `<number>-<digest of its line>.parquet`, written whole after its failures (`.errors.jsonl`
beside it). A chunk is done exactly if its part is there. When all are (of a folder that is watched, when they are
many, and at the end), the parts are joined into the output, whose own metadata say how many chunks it holds; so the
rename that puts it in place is also what counts its chunks as kept, and no scan is there twice or left out.

Several processes share one manifest: each looks for files itself, under a lock, and answers the chunks whose number
falls to its rank.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from xrdfast.errors import InputError, shown_path
from xrdfast.screening.results import (
    errors_path,
    fsync_folder,
    join_tables,
    read_failures,
    table_metadata,
    write_failures,
)
from xrdfast.screening.sources import Chunk, Failure, find_chunks, printable

_RUN_KEY, _CHUNKS_KEY = "xrdfast.run", "xrdfast.chunks"
_WORTH = 0.1  # of the output: more of it that waits is worth writing the output anew


class Manifest:
    """The manifest of an output.

    Args:
        output: the Parquet file.
        run: digest of everything but the paths that answers depend on.

    Attributes:
        parts: folder of the parts.
        n_kept: chunks that the output holds.

    Raises:
        InputError: where output or parts belong to another run, or cannot be written.
    """

    def __init__(self, output: Path, run: str) -> None:
        self.output, self.run = output, run
        self.parts = output.with_name(f"{output.name}.parts")
        self._path = self.parts / "manifest.jsonl"
        try:
            self.parts.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{shown_path(self.parts)}: folder: must be writable, got {error.strerror}"
            ) from error
        with self._locked():
            self._begin()

    @property
    def n_kept(self) -> int:
        """Chunks that the output holds."""
        if not self.output.exists():
            return 0
        found = table_metadata(self.output)
        if found.get(_RUN_KEY) != self.run or not found.get(_CHUNKS_KEY, "").isdigit():
            raise self._another_run(self.output)
        return int(found[_CHUNKS_KEY])

    def chunks(self) -> Iterator[tuple[int, Chunk]]:
        """Every chunk with its number, known ones alone."""
        for number, line in enumerate(self._lines()):
            yield number, Chunk.from_dict(json.loads(line))

    def extend(self, files: Iterable[str]) -> Iterator[tuple[int, Chunk]]:
        """Adds chunks of files that are in none yet, and gives each when it is safely noted.

        A file, not a container, that could not be read at all and has changed since goes into a chunk once more.
        Their paths are noted from the root, so that a run may go on from another working directory.
        Closing the iterator half way is fine: what was not given will be found again.
        """
        with self._locked():
            known: set[str] = set()
            kept, changed = self.n_kept, self._changed_failures()
            begun: dict[str, int] = {}  # containers of which not every chunk is noted, and how far they are
            count = 0
            for number, chunk in self.chunks():
                count = number + 1
                whole = [os.path.abspath(path) for path in chunk.paths]
                if chunk.end < chunk.n_scans:
                    begun[whole[0]] = chunk.end
                else:
                    known.update(whole)
                if number >= kept or chunk.kind != "files":  # on its way, or some of it may be answered
                    changed.difference_update(whole)
            known -= changed
            new = (path for path in map(os.path.abspath, files) if path not in known)
            with self._writing() as file:
                for chunk in find_chunks(new):
                    if chunk.kind != "files" and chunk.begin < begun.get(chunk.paths[0], 0):
                        continue
                    file.write(json.dumps(chunk.to_dict()).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                    yield count, chunk
                    count += 1

    def _changed_failures(self) -> set[str]:
        """Files whose failures the output has, and which are younger than it."""
        changed: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            noted = errors_path(self.output).stat().st_mtime_ns
            for _, failure in read_failures(errors_path(self.output)):
                with contextlib.suppress(OSError):
                    if failure.scan_index < 0 and os.stat(failure.file).st_ctime_ns > noted:
                        changed.add(failure.file)
        return changed

    def part(self, number: int, chunk: Chunk) -> Path:
        """Where the answers of a chunk are or will be."""
        digest = hashlib.sha256(json.dumps(chunk.to_dict()).encode()).hexdigest()[:16]
        return self.parts / f"{number:08d}-{digest}.parquet"

    def join(self, lazily: bool = False) -> bool:
        """Puts the parts of all chunks into the output, if they are all there; says whether it holds them now.

        Args:
            lazily: not while they hold less than a tenth of what the output does. Each time the whole of it is
                written anew: for every few scans of a growing folder, that would take the square of their number.

        Raises:
            InputError: where the file system refuses; the parts are all still there then.
        """
        with self._locked():
            kept = self.n_kept
            parts, count = [], 0
            n_joined = n_waiting = 0
            for number, chunk in self.chunks():
                count = number + 1
                if number < kept:
                    n_joined += chunk.n_expected
                else:
                    parts.append(self.part(number, chunk))
                    n_waiting += chunk.n_expected
            if (lazily and n_waiting < _WORTH * n_joined) or not all(part.exists() for part in parts):
                return False
            if parts or not self.output.exists():
                self._join(kept, count, parts)
            for left in (*self.parts.glob("*-*"), *self.output.parent.glob(f".{self.output.name}.*.tmp")):
                left.unlink(missing_ok=True)  # parts, and what killed processes were writing
            return True

    def _join(self, kept: int, count: int, parts: list[Path]) -> None:
        chunks = ((number, chunk) for number, chunk in self.chunks() if chunk.kind == "files")
        last = {printable(path): number for number, chunk in chunks for path in chunk.paths}

        def failures() -> Iterator[tuple[int, Failure]]:
            # Those beyond `kept` were left by a run that was killed just before its output was in place; files that
            # were tried again say their last.
            for number, failure in read_failures(errors_path(self.output)):
                tried_again = failure.scan_index < 0 and last.get(failure.file, number) > number
                if number < kept and not tried_again:
                    yield number, failure
            for part in parts:
                yield from read_failures(part_errors(part))

        if not write_failures(errors_path(self.output), failures()):
            errors_path(self.output).unlink(missing_ok=True)
        before = [self.output] if kept else []
        join_tables(self.output, before + parts, {_RUN_KEY: self.run, _CHUNKS_KEY: str(count)})
        fsync_folder(self.parts.parent)

    def _begin(self) -> None:
        """Writes the first line, or checks it, and cuts off a line that a killed run left half written."""
        if not self._path.exists() or self._path.stat().st_size == 0:
            if self.output.exists():
                raise self._another_run(self.output)
            with self._writing() as file:
                file.write(json.dumps({"format": "xrdfast-screen", "run": self.run}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            fsync_folder(self.parts)
            return
        with open(self._path, "rb+") as file:
            size = 0
            for line in file:
                if line.endswith(b"\n"):
                    size += len(line)
            file.truncate(size)
        if size == 0:
            self._begin()
            return
        with open(self._path, "rb") as file:
            try:
                run = json.loads(file.readline())["run"]
            except (ValueError, KeyError, TypeError):
                run = None
        if run != self.run:
            raise self._another_run(self.parts)
        _ = self.n_kept

    def _another_run(self, path: Path) -> InputError:
        return InputError(
            f"{shown_path(path)}: run: must be of this model, wavelength and number of groups, got another; "
            "name another output, or remove the old one and its .parts folder"
        )

    def _lines(self) -> Iterator[bytes]:
        with open(self._path, "rb") as file:
            file.readline()
            for line in file:
                if line.endswith(b"\n"):  # else another process is writing it
                    yield line

    @contextlib.contextmanager
    def _writing(self) -> Iterator[IO[bytes]]:
        try:
            with open(self._path, "ab") as file:
                yield file
        except OSError as error:
            raise InputError(
                f"{shown_path(self._path)}: file: must be writable, got {error.strerror}"
            ) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time; the lock ends with the process that holds it."""
        with open(self.parts / ".lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def part_errors(part: Path) -> Path:
    """Where the failures of a part's chunk are."""
    return part.with_suffix(".errors.jsonl")
