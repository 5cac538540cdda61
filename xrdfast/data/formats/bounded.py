"""Content of files, archives and XML documents, never more than a limit; hostile ones are refused, not followed.

Knows no format's meaning.
"""

from __future__ import annotations

import bz2
import contextlib
import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple
from xml.parsers import expat

from xrdfast.errors import InputError

MAX_BYTES = 64 << 20  # of a file, and of what is unpacked from it
_USUAL_RATIO = 20  # of measured counts in text, packed, at most
_MAX_STREAMS = 100  # parallel compressors write one every 900 kB
_MAX_DIRECTORY = 1 << 20  # bytes of an archive's directory, about 10,000 members
_MAX_TAGS = 1_000_000  # of an XML document; one point a tag at most
_MAX_DEPTH = 100
_MAX_TEXT = 1000  # characters kept of an element's text
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# of zipfile on damaged content; NotImplementedError is a RuntimeError
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError, struct.error)


def read_bytes(path: Path) -> bytes:
    """Content of a regular file of at most 64 MB.

    Raises:
        InputError: for what cannot be read, is larger, or is no file: a pipe or a device has no end.
    """
    with _opened(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:  # it has grown
        raise InputError(f"size: must be at most {MAX_BYTES} bytes, got more")
    return data


def content_size(path: Path) -> int:
    """Bytes that a file holds, unpacked, at most 64 MB: as archives state it, for other packed files a guess.

    0 for what `read_bytes` refuses.
    """
    try:
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            magic = file.read(4)
            if magic == b"PK\3\4":
                with open_zip(file) as archive:
                    size = sum(info.file_size for info in archive.infolist())
            elif magic.startswith((b"\x1f\x8b", b"BZh")):
                size *= _USUAL_RATIO
            return min(size, MAX_BYTES)
    except (InputError, *_ZIP_ERRORS):
        return 0


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file of at most 64 MB."""
    try:
        # without O_NONBLOCK, opening a pipe waits for a writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise InputError(
            f"file: must be readable, got {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError("file: must be a regular file, got a folder, pipe or device")
        if status.st_size > MAX_BYTES:
            raise InputError(f"size: must be at most {MAX_BYTES} bytes, got {status.st_size}")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    except OSError as error:
        raise InputError(f"file: must be readable, got {error.strerror or error}") from error
    finally:
        os.close(descriptor)


def decompress(data: bytes) -> bytes:
    """What a .gz or .bz2 holds, one layer; other content as it is.

    Raises:
        InputError: for a damaged file, or one that holds more than 64 MB.
    """
    if data.startswith(b"BZh"):
        name, new = "bzip2", bz2.BZ2Decompressor
    elif data.startswith(b"\x1f\x8b"):
        name, new = "gzip", lambda: zlib.decompressobj(31)
    else:
        return data
    pieces, size = [], 0
    for _ in range(_MAX_STREAMS):
        stream = new()
        try:
            pieces.append(stream.decompress(data, MAX_BYTES + 1 - size))
        except (OSError, ValueError, zlib.error) as error:
            raise InputError(f"file: must be whole {name} data, got {error}") from error
        size += len(pieces[-1])
        if size > MAX_BYTES:
            break
        if not stream.eof:
            raise InputError(f"file: must be whole {name} data, got its beginning")
        data = stream.unused_data
        if not data.strip(b"\0"):  # padding
            return b"".join(pieces)
    raise InputError(f"size: must be at most {MAX_BYTES} bytes in {_MAX_STREAMS} streams, got more in {name}")


class _InPieces:
    """A binary file that gives no more than a directory may have at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, or what is left."""
        if size > _MAX_DIRECTORY:
            raise InputError(f"archive: must have a directory of at most {_MAX_DIRECTORY} bytes, got {size}")
        return self._file.read(size)


def open_zip(file: IO[bytes]) -> zipfile.ZipFile:
    """A ZIP archive whose directory is not too long: zipfile reads the whole of it, whatever it has.

    Raises:
        InputError: for a directory of more than 1 MB.
        BadZipFile: and what else zipfile raises, for a damaged archive.
    """
    zipfile.ZipFile(_InPieces(file))  # type: ignore[call-overload]
    return zipfile.ZipFile(file)


def unzip(data: bytes, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Members of a ZIP archive by name, those wanted.

    Raises:
        InputError: for a damaged or encrypted archive, more than 64 MB in all, or a method other than deflate.
    """
    members, left = {}, MAX_BYTES
    try:
        with open_zip(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                if not wanted(info.filename) or info.filename in members:
                    continue
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                    raise InputError(
                        "archive: must be stored or deflated without a password, got another method"
                    )
                with archive.open(info) as member:
                    content = member.read(left + 1)
                if len(content) > left:
                    raise InputError(f"size: must be at most {MAX_BYTES} bytes unpacked, got more")
                left -= len(content)
                members[info.filename] = content
    except InputError:
        raise
    except _ZIP_ERRORS as error:
        raise InputError(
            f"archive: must be a whole ZIP file, got {str(error)[:100] or 'a damaged one'}"
        ) from error
    return members


def pack(members: dict[str, bytes]) -> bytes:
    """A ZIP archive of these members, not compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def as_utf8(data: bytes) -> bytes:
    """Text as UTF-8 without a byte-order mark: UTF-16 needs one, and what is not UTF-8 is read as Latin-1."""
    if data.startswith(UTF16_MARKS):
        return data.decode("utf-16", "replace").encode("utf-8", "replace")
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1").encode()
    return data


class Element(NamedTuple):
    """An element of an XML document, without its children."""

    path: str  # names from the root, joined by "/", without namespaces
    attributes: dict[str, str]
    text: str  # up to 1,000 characters, without that of its children
    begin: int  # of its bytes in the document
    end: int


def xml_elements(data: bytes, wanted: frozenset[str]) -> list[Element]:
    """Elements with these names, in the order of their beginnings.

    Args:
        data: UTF-8.
        wanted: names without namespaces.

    Raises:
        InputError: for a document that is not well formed, has a document type (no entity is ever expanded), more
            than a million tags, or elements nested deeper than 100.
    """
    if (tags := data.count(b"<")) > 2 * _MAX_TAGS:
        raise InputError(f"document: must have at most {_MAX_TAGS} elements, got {tags} tags")
    found: list[Element] = []
    open_elements: list[tuple[str, dict[str, str], list[str], int]] = []
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True

    def refuse_doctype(*_: object) -> None:
        raise InputError("document: must have no document type, got a DOCTYPE")

    def start(name: str, attributes: dict[str, str]) -> None:
        if len(open_elements) >= _MAX_DEPTH:
            raise InputError(f"document: must be nested at most {_MAX_DEPTH} deep, got more")
        open_elements.append((name.rpartition(":")[2], attributes, [], parser.CurrentByteIndex))

    def text(content: str) -> None:
        name, _, pieces, _ = open_elements[-1]
        if name in wanted and len(pieces) < 10:
            pieces.append(content[:_MAX_TEXT])

    def end(_: str) -> None:
        name, attributes, pieces, begin = open_elements[-1]
        if name in wanted:
            path = "/".join(element[0] for element in open_elements)
            stop = data.find(b">", parser.CurrentByteIndex) + 1
            found.append(Element(path, attributes, "".join(pieces)[:_MAX_TEXT].strip(), begin, stop))
        open_elements.pop()

    parser.StartDoctypeDeclHandler = refuse_doctype
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise InputError(f"document: must be well-formed XML, got {error}") from error
    return sorted(found, key=lambda element: element.begin)
