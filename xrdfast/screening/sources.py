"""From paths to scans: which files there are, cut into chunks of work, and how a chunk is read. Needs no torch.

A chunk is what is answered, kept and resumed as one: some files, or a span of one container's scans. Containers:

    .tar, .tar.gz, .tgz, .tar.bz2   members that are regular files, each of any format `xrdfast.read` knows
    .h5, .hdf5                      datasets `intensity` (n_scans, n_points) and `two_theta`
    .npz                            arrays of the same names                            (both: `stacks.py`)
    .scans.safetensors              what `pack` writes                                  (`packed.py`)

Anything else is a file of one scan or several. Nothing is ever unpacked to disk, so a member's name leads nowhere.
"""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import hashlib
import itertools
import os
import re
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from xrdfast.bragg import Radiation
from xrdfast.data.formats.bounded import MAX_BYTES, content_size, read_bytes
from xrdfast.data.formats.measured import one_line
from xrdfast.data.scans import Scan, scans_of_content
from xrdfast.errors import InputError, shown_path
from xrdfast.screening.packed import SUFFIX, PackedScans
from xrdfast.screening.stacks import Hdf5Stack, NpzStack

CHUNK_FILES = 128
_CHUNK_BYTES = MAX_BYTES  # of content: all scans of a chunk are in memory at once
CHUNK_SCANS = 256  # of a container; a chunk is what a killed run does again
_MAX_SKIPPED = (
    1 << 30
)  # bytes that a compressed tar of any size may unpack to; what lies ahead is unpacked to skip it
_BOMB = 200  # to 1, beyond these bytes: no measured scans pack like that
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)
_PASSED_OVER = re.compile(
    r"^\.|\.parquet$|\.parquet\.parts$|\.errors\.jsonl$"
)  # hidden, and answers of a screening
_KINDS = {
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".tar.bz2": "tar",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".npz": "npz",
    SUFFIX: "packed",
}


@dataclass(frozen=True)
class Chunk:
    """A piece of work.

    Attributes:
        kind: "files", "tar", "hdf5", "npz" or "packed".
        paths: of the files, or the container's one.
        begin, end: span of the container's scans or members.
        n_scans: of the whole container.
    """

    kind: str
    paths: tuple[str, ...]
    begin: int = 0
    end: int = 0
    n_scans: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Chunk:
        """Reads what `to_dict` gave."""
        return cls(
            content["kind"], tuple(content["paths"]), content["begin"], content["end"], content["n_scans"]
        )

    @property
    def n_expected(self) -> int:
        """Scans as far as known before reading: a file counts as one."""
        return len(self.paths) if self.kind == "files" else self.end - self.begin


@dataclass(frozen=True)
class Found:
    """A scan with where it was found.

    Attributes:
        scan: as read.
        file, member: path, and name inside a container, "" where there is none.
        index: of the scan in the file or container.
        sha256: of the file's or member's bytes; of a scan of a stack or packed file, of its angles and intensities.
        seconds: that reading took.
    """

    scan: Scan
    file: str
    member: str
    index: int
    sha256: str
    seconds: float

    @property
    def scan_id(self) -> str:
        """Path, "::member" and "#index" where the scan is one of several."""
        several = self.scan.n_scans > 1
        return name_of(self.file, self.member, self.index if several else None)


@dataclass(frozen=True)
class Failure:
    """What could not be answered, and why in one line."""

    scan_id: str
    file: str
    member: str
    scan_index: int  # -1 for a whole file
    reason: str


def name_of(file: str, member: str = "", index: int | None = None) -> str:
    r"""The identifier of a scan, valid Unicode whatever bytes a path has.

    Example:
        >>> name_of("run.tar", "a/b.xy", 3)
        'run.tar::a/b.xy#3'
    """
    return (
        printable(file)
        + (f"::{printable(member)}" if member else "")
        + ("" if index is None else f"#{index}")
    )


def printable(path: str) -> str:
    r"""A path without the lone surrogates that undecodable bytes become.

    Example:
        >>> printable("a\udcff.xy")
        'a\\xff.xy'
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace") if not path.isascii() else path


def find_files(
    paths: str | Path | Iterable[str | Path], skip: Callable[[str], bool] = lambda path: False
) -> Iterator[str]:
    """Files below paths, each once; folders in the order of names, links followed; hidden names and answers left out.

    A folder is entered once, so loops of links end. A path that is neither there nor a pattern is given as it is:
    reading it will say what is wrong.

    Args:
        paths: files, folders, and patterns with `*`, `?`, `[` and `**`; or one of them.
        skip: says which files and folders to leave out, by absolute path.
    """
    entered: set[tuple[int, int]] = set()
    given: set[str] = set()

    def walk(path: str) -> Iterator[str]:
        waiting = [path]  # the next one last; folders may be nested deeper than calls
        while waiting:
            path = waiting.pop()
            whole = os.path.abspath(path)
            if skip(whole):
                continue
            if not os.path.isdir(path):
                if whole not in given:
                    given.add(whole)
                    yield path
                continue
            try:
                status = os.stat(path)
                names = sorted(os.listdir(path), reverse=True)
            except OSError:
                yield path  # reading it says why
                continue
            if (key := (status.st_dev, status.st_ino)) not in entered:
                entered.add(key)
                waiting += [os.path.join(path, name) for name in names if not _PASSED_OVER.search(name)]

    for path in map(os.fspath, [paths] if isinstance(paths, (str, Path)) else paths):
        if not os.path.lexists(path) and glob.has_magic(path):
            for match in sorted(glob.glob(path, recursive=True)):
                yield from walk(match)
        else:
            yield from walk(path)


def find_chunks(files: Iterable[str]) -> Iterator[Chunk]:
    """Chunks of files, in their order but that plain files wait until there is enough in them for a chunk."""
    waiting: list[str] = []
    n_bytes = 0
    for path in files:
        kind = _kind_of(path)
        if kind is None:
            size = content_size(Path(path))
            if waiting and (len(waiting) == CHUNK_FILES or n_bytes + size > _CHUNK_BYTES):
                yield Chunk("files", tuple(waiting))
                waiting, n_bytes = [], 0
            waiting.append(path)
            n_bytes += size
            continue
        n_scans = _count(kind, path)
        for begin in range(0, max(n_scans, 1), CHUNK_SCANS):
            yield Chunk(kind, (path,), begin, min(begin + CHUNK_SCANS, n_scans), n_scans)
    if waiting:
        yield Chunk("files", tuple(waiting))


def read_chunk(chunk: Chunk, given: Radiation | None = None) -> Iterator[Found | Failure]:
    """Every scan of a chunk in its order, and in the place of what cannot be read, why.

    Args:
        chunk: of `find_chunks`.
        given: radiation for files that state none.
    """
    if chunk.kind == "files":
        for path in chunk.paths:
            start = time.perf_counter()
            try:
                data = read_bytes(Path(path))
            except InputError as error:
                yield _failure(path, "", -1, f"{shown_path(path)}: {error}")
                continue
            yield from _read_content(data, path, "", given, start)
        return
    (path,) = chunk.paths
    try:
        yield from _READERS[chunk.kind](chunk, given)
        if chunk.begin == chunk.end:
            yield _failure(path, "", -1, f"{shown_path(path)}: scans: must be at least one, got none")
    except InputError as error:
        yield _failure(path, "", -1, str(error))
    except Exception as error:
        yield _reader_failure(path, "", error)


def find_again(file: str, member: str, index: int, sha256: str) -> Scan | None:
    """A scan that was answered, from where it was found; None where it is no longer there as it was.

    Args:
        file, member, index, sha256: as `Found` had them.
    """
    kind = _kind_of(file)
    if kind is None:
        found: Iterable[Found | Failure] = read_chunk(Chunk("files", (file,)))
    elif kind == "tar":
        found = _read_member(file, member)
    else:
        found = read_chunk(Chunk(kind, (file,), index, index + 1))
    for one in found:
        if isinstance(one, Found) and one.index == index:
            return one.scan if one.sha256 == sha256 else None
    return None


def _read_member(file: str, name: str) -> Iterator[Found | Failure]:
    with contextlib.suppress(InputError), contextlib.closing(_Tar(file)) as tar:
        for member in tar.members(0):
            if printable(member.name) == name:
                yield from _read_content(tar.content(member), file, name, None, time.perf_counter())
                return


def _kind_of(path: str) -> str | None:
    """The kind of a container, by its name; None for a plain file."""
    name = os.path.basename(path).lower()
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), None)


def _count(kind: str, path: str) -> int:
    """Scans or members of a container; 0 where it cannot be opened, which reading will explain."""
    try:
        with contextlib.closing(_CONTAINERS[kind](path)) as container:
            return len(container)
    except Exception:
        return 0


@contextlib.contextmanager
def _opened(chunk: Chunk) -> Iterator[Any]:
    """The chunk's container; it stays open for the next chunk, which then goes on where this one ended.

    Without that, archives that can only be read forwards would be read from their beginning for every chunk.
    """
    (path,) = chunk.paths
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"{shown_path(path)}: file: must be readable, got {error.strerror}") from error
    key = (chunk.kind, path, status.st_ino, status.st_size, status.st_mtime_ns)
    container = _take_kept(key)
    if container is None:
        container = _CONTAINERS[chunk.kind](path)
    try:
        yield container
    except BaseException:
        container.close()
        raise
    if chunk.end < chunk.n_scans:
        with _lock:
            _kept.append((key, container))
    else:
        container.close()


def _take_kept(key: tuple[object, ...]) -> Any | None:
    """A container that no thread is reading; those of other files are closed."""
    with _lock:
        mine = [container for of, container in _kept if of == key]
        for of, container in _kept:
            if of != key:
                container.close()
        _kept[:] = [(key, container) for container in mine[1:]]
    return mine[0] if mine else None


def close_containers() -> None:
    """Closes what is kept open for chunks that will not come."""
    _take_kept(())


_kept: list[tuple[tuple[object, ...], Any]] = []  # one a thread at most
_lock = threading.Lock()


def _failure(file: str, member: str, index: int, reason: str) -> Failure:
    scan_id = name_of(file, member, None if index < 0 else index)
    return Failure(scan_id, printable(file), printable(member), index, reason)


def _reader_failure(file: str, member: str, error: Exception) -> Failure:
    """Of an error that no reader should raise: the batch goes on and the table says so."""
    name = shown_path(f"{file}::{member}" if member else file)
    return _failure(file, member, -1, f"{name}: reader: must read the file, got {one_line(repr(error))}")


def _read_content(
    data: bytes, file: str, member: str, given: Radiation | None, start: float
) -> Iterator[Found | Failure]:
    name = f"{file}::{member}" if member else file
    digest = hashlib.sha256(data).hexdigest()
    index = 0
    try:
        scans = scans_of_content(data, name, given)
        first = list(itertools.islice(scans, 2))
        for scan in itertools.chain(first, scans):
            seconds = time.perf_counter() - start
            if isinstance(scan, InputError):
                yield _failure(file, member, index if len(first) > 1 else -1, str(scan))
            else:
                yield Found(scan, printable(file), printable(member), index, digest, seconds)
            index += 1
            start = time.perf_counter()
    except InputError as error:
        yield _failure(file, member, -1, str(error))
    except Exception as error:
        yield _reader_failure(file, member, error)


def _read_tar(chunk: Chunk, given: Radiation | None) -> Iterator[Found | Failure]:
    (path,) = chunk.paths
    with _opened(chunk) as tar:
        for member in itertools.islice(tar.members(chunk.begin), chunk.end - chunk.begin):
            start = time.perf_counter()
            try:
                data = tar.content(member)
            except InputError as error:
                yield _failure(path, member.name, -1, f"{shown_path(name_of(path, member.name))}: {error}")
                continue
            yield from _read_content(data, path, member.name, given, start)


def _read_container(chunk: Chunk, given: Radiation | None) -> Iterator[Found | Failure]:
    (path,) = chunk.paths
    axis, of_axis = None, hashlib.sha256()
    with _opened(chunk) as container:
        for index in range(chunk.begin, chunk.end):
            start = time.perf_counter()
            try:
                scan = container.scan(index, given)
                member = container.name(index)
            except InputError as error:
                yield _failure(path, "", index, f"{shown_path(path)}: scan {index}: {error}")
                continue
            if scan.two_theta is not axis:  # many scans share one array
                axis, of_axis = scan.two_theta, hashlib.sha256(scan.two_theta)
            digest = of_axis.copy()
            digest.update(scan.intensity)
            seconds = time.perf_counter() - start
            yield Found(scan, printable(path), member, index, digest.hexdigest(), seconds)


class _Tar:
    """Members of a tar archive in their order, in bounded memory, whatever it says about itself.

    Raises:
        InputError: for a file that is missing or no tar archive.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = _Bounded(_open_archive(path))
        self._longest = _MAX_SKIPPED + _BOMB * os.path.getsize(path)
        try:
            self._rewind()
        except InputError:
            self.close()
            raise

    def __len__(self) -> int:
        count = 0
        try:
            for _ in self.members(0):
                count += 1
        except InputError:
            count += 1  # the place where reading says why it ends
        return count

    def close(self) -> None:
        """Closes the archive."""
        self._file.close()

    def members(self, begin: int) -> Iterator[tarfile.TarInfo]:
        """All but folders, from the one with this number."""
        if begin < self._position:
            self._rewind()
        try:
            while (member := self._tar.next()) is not None:
                self._tar.members = []  # else tarfile keeps every one
                if (end := member.offset_data + member.size) > self._longest and self._file.compressed:
                    rule = f"members: must end within {self._longest} bytes, unpacked, of an archive of this size"
                    raise InputError(f"{shown_path(self._path)}: {rule}, got {end}")
                if member.isdir():
                    continue
                self._position += 1
                if self._position > begin:
                    yield member
        except _TAR_ERRORS as error:
            raise self._refusal(error) from error

    def _rewind(self) -> None:
        self._position = 0
        try:
            self._file.seek(0)
            self._tar = tarfile.open(fileobj=self._file, mode="r:")  # type: ignore[call-overload]  # noqa: SIM115 (closed by `close`)
        except _TAR_ERRORS as error:
            raise self._refusal(error) from error

    def content(self, member: tarfile.TarInfo) -> bytes:
        """Bytes of a member.

        Raises:
            InputError: for a link or device, a name that leads out of the archive, or more than 64 MB.
        """
        if not member.isreg() or member.issparse():
            raise InputError("member: must be a regular file, got a link, device or sparse file")
        if member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
            raise InputError("member: must have a name inside the archive, got one that leads out of it")
        if member.size > MAX_BYTES:
            raise InputError(f"size: must be at most {MAX_BYTES} bytes, got {member.size}")
        try:
            self._file.seek(member.offset_data)
            data = self._file.read(member.size)
        except _TAR_ERRORS as error:
            raise InputError(f"member: must be whole, got {error}") from error
        if len(data) != member.size:
            raise InputError("member: must be whole, got its beginning")
        return data

    def _refusal(self, error: Exception) -> InputError:
        return InputError(f"{shown_path(self._path)}: archive: must be a whole tar file, got {error}")


class _Bounded:
    """A binary file that reads at most 64 MB at once: tarfile believes the size of a header."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.compressed = isinstance(file, gzip.GzipFile | bz2.BZ2File)
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int) -> bytes:
        """`size` bytes, or what is left."""
        if size > MAX_BYTES:
            raise InputError(f"header: must be at most {MAX_BYTES} bytes, got {size}")
        return self._file.read(size)


def _open_archive(path: str) -> IO[bytes]:
    if not os.path.isfile(path):
        raise InputError(f"{shown_path(path)}: file: must be a regular file that is there, got none")
    name = path.lower()
    if name.endswith((".gz", ".tgz")):
        return gzip.open(path)  # type: ignore[return-value]
    return bz2.open(path) if name.endswith(".bz2") else open(path, "rb")


_CONTAINERS: dict[str, Callable[[str], Any]] = {
    "tar": _Tar,
    "hdf5": Hdf5Stack,
    "npz": NpzStack,
    "packed": PackedScans,
}
_READERS: dict[str, Callable[[Chunk, Radiation | None], Iterator[Found | Failure]]] = {
    **dict.fromkeys(_CONTAINERS, _read_container),
    "tar": _read_tar,
}
