"""Files that instruments write, one module a maker or standard, and how a file's content tells which it is.

The extension decides nothing where the content can: four makers write `.raw`. A reader takes the whole content,
bounded already, and returns a list of `Measured` (`measured.py`). To add a format: a module with such a reader, a
line in `recognise`, a file in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from xrdfast.data.formats import (
    bruker,
    columns,
    gsas,
    panalytical,
    pdcif,
    rigaku,
    start_step_stop,
    stoe,
)
from xrdfast.data.formats.bounded import UTF16_MARKS, as_utf8
from xrdfast.data.formats.measured import Measured, one_line
from xrdfast.errors import InputError

COLUMNS = "columns of text"
_HEAD = 1 << 16  # bytes that tell a text's format
_EXPORT = "if it is a scan, export it as two columns, 2theta in degrees and intensity"
# Content that is known and not read, by its first bytes.
_NOT_READ = {
    b"\x89HDF\r\n\x1a\n": "HDF5 or NeXus data",
    b"V3RD": "a Philips RD file",
    b"V5RD": "a Philips RD file",
    b"HR-XRDRAW": "an X'Pert binary file",
    b"FI\0": "a Rigaku binary RAW file",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture",
    b"\xd0\xcf\x11\xe0": "an Excel or Word document",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
}
_XML_ROOT = re.compile(rb"<(?![?!])(?:[\w.-]+:)?([\w.-]+)")
_UXD = re.compile(
    rb"^(?:[ \t]*(?:;[^\n]*)?\r?\n)*+[ \t]*_(?:FILEVERSION|SAMPLE|DRIVE|STEPTIME|START)[ \t]*=", re.IGNORECASE
)
_CIF = re.compile(rb"(?:[ \t]*(?:#[^\n]*)?\r?\n)*+[ \t]*data_", re.IGNORECASE)
_RAS = b"*RAS_"
_PHILIPS_UDF = b"SampleIdent,"


def read_scans(data: bytes) -> tuple[str, list[Measured]]:
    """Name of the format and the scans of a file's content.

    Raises:
        InputError: for content that is not recognised, or recognised and not read, with what to export instead.
    """
    name, read = recognise(data)
    try:
        return name, read(data)
    except InputError as error:
        raise refusal(name, error) from error


def refusal(name: str, error: InputError) -> InputError:
    """The error of a reader, with what the file was taken for and what to do."""
    return InputError(f"{error} (recognised as {name}; {_EXPORT})")


def recognise(data: bytes) -> tuple[str, Callable[[bytes], list[Measured]]]:
    r"""Name of the format and its reader.

    Raises:
        InputError: for content that is not recognised, or recognised and not read.

    Example:
        >>> recognise(b"RAW4.00" + bytes(60))[0], recognise(b"10 1\n20 2\n")[0]
        ('Bruker RAW', 'columns of text')
    """
    for magic, what in _NOT_READ.items():
        if data.startswith(magic):
            raise InputError(f"format: must be a measured powder pattern, got {what}; {_EXPORT}")
    if data.startswith(b"PK\x03\x04"):
        if b"DataContainer.xml" in data:
            return "Bruker BRML", bruker.read_brml
        if b"root.xml" in data:
            return "Rigaku RASX", rigaku.read_rasx
        raise InputError(f"format: must be BRML or RASX, got another ZIP archive; {_EXPORT}")
    if data.startswith(bruker.RAW_MAGICS):
        return "Bruker RAW", bruker.read_raw
    if data.startswith(stoe.MAGIC):
        return "STOE RAW", stoe.read_stoe
    head = data[:_HEAD]
    if head.startswith(UTF16_MARKS):
        head = head[: len(head) // 2 * 2]
    elif b"\0" in head:
        raise InputError(
            f"format: must be known, got binary data that begin with {data[:8].hex(' ')}; {_EXPORT}"
        )
    return _recognise_text(as_utf8(head).lstrip())


def _recognise_text(head: bytes) -> tuple[str, Callable[[bytes], list[Measured]]]:
    if head.startswith(b"<"):
        root = _XML_ROOT.search(head)
        if root and root[1] == b"xrdMeasurements":
            return "PANalytical XRDML", panalytical.read_xrdml
        what = f"an XML document of {one_line(root[1])}" if root else "an XML document"
        raise InputError(f"format: must be XRDML, got {what}; {_EXPORT}")
    if head.startswith(_RAS):
        return "Rigaku RAS", rigaku.read_ras
    if head.startswith(_PHILIPS_UDF):
        raise InputError(f"format: must be a measured powder pattern, got a Philips UDF file; {_EXPORT}")
    if _UXD.match(head):
        return "Bruker UXD", bruker.read_uxd
    if _CIF.match(head):
        return "CIF", pdcif.read_pdcif
    if b"BANK" in head and gsas.BANK.search(head):
        return "GSAS", gsas.read_gsas
    if start_step_stop.starts_and_steps(_text(head)):
        return "text of start, step, stop and counts", lambda data: start_step_stop.read_start_step_stop(
            _text(data)
        )
    return COLUMNS, lambda data: columns.read_columns(_text(data))


def _text(data: bytes) -> str:
    """Text with newlines as one character."""
    data = as_utf8(data)
    if b"\0" in data:
        line = data[: data.index(0)].count(b"\n") + 1
        raise InputError(f"line {line}: must be text, got a NUL byte")
    text = data.decode("utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
