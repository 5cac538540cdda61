"""Processes that read and prepare chunks, so that a file that ends its reader takes nothing else with it. No torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from xrdfast.bragg import Radiation
from xrdfast.processes import hidden_main
from xrdfast.screening.preparation import Prepared, prepare_chunk
from xrdfast.screening.sources import Chunk, Failure, close_containers

Scans = list[Prepared | Failure]


class Readers:
    """Processes that prepare chunks; packed ones are left to whoever answers them, as they are arrays already.

    Args:
        n_readers: processes; 0 reads in this one.
        given: radiation for files that state none.
        whole: as `prepare_chunk` takes it.
    """

    def __init__(self, n_readers: int, given: Radiation | None, whole: bool) -> None:
        self._n_readers, self._given, self._whole = n_readers, given, whole
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        close_containers()

    def read(self, chunks: Iterable[tuple[int, Chunk]]) -> Iterator[tuple[int, Chunk, Scans | None]]:
        """Chunks with their prepared scans, in order, at most `n_readers` + 2 on their way; None: still to be read."""
        waiting: deque[tuple[int, Chunk, Future[Scans] | None, ProcessPoolExecutor | None]] = deque()
        for number, chunk in chunks:
            future = None if chunk.kind == "packed" else self._submit(chunk)
            waiting.append((number, chunk, future, self._pool))
            if len(waiting) > (self._n_readers and self._n_readers + 1):
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())

    def _submit(self, chunk: Chunk) -> Future[Scans]:
        if self._n_readers == 0:
            done: Future[Scans] = Future()
            done.set_result(prepare_chunk(chunk, self._given, self._whole))
            return done
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._n_readers,
                mp_context=multiprocessing.get_context("spawn"),  # a fork of torch's threads may hang
                initializer=_begin_reader,
            )
        try:
            with hidden_main():
                return self._pool.submit(prepare_chunk, chunk, self._given, self._whole)
        except BrokenProcessPool as error:
            broken: Future[Scans] = Future()
            broken.set_exception(error)
            return broken

    def _result(
        self, number: int, chunk: Chunk, future: Future[Scans] | None, pool: ProcessPoolExecutor | None
    ) -> tuple[int, Chunk, Scans | None]:
        try:
            return number, chunk, None if future is None else future.result()
        except (BrokenProcessPool, CancelledError):
            if pool is self._pool:  # else this one has a new pool already, and other chunks are in it
                self._stop()
            with Readers(1, self._given, self._whole) as apart:
                return number, chunk, [scan for piece in _singles(chunk) for scan in apart._alone(piece)]

    def _alone(self, chunk: Chunk) -> Scans:
        """A chunk, with no other beside it that could be to blame."""
        try:
            return self._submit(chunk).result()
        except BrokenProcessPool:
            self._stop()
            index = -1 if chunk.kind == "files" else chunk.begin
            reason = "reader: must survive the file, got the end of its process"
            return [Failure(chunk.paths[0], chunk.paths[0], "", index, reason)]

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _singles(chunk: Chunk) -> list[Chunk]:
    if chunk.kind == "files":
        return [Chunk("files", (path,)) for path in chunk.paths]
    return [Chunk(chunk.kind, chunk.paths, i, i + 1) for i in range(chunk.begin, chunk.end)]


def _begin_reader() -> None:
    """Leaves Ctrl-C to the parent, and ends with it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
