"""Bruker and Siemens: RAW versions 1 to 4 (binary), UXD (text) and BRML (a ZIP archive of XML)."""

from __future__ import annotations

import functools
import re
import struct

import numpy as np

from xrdfast.data.formats.bounded import as_utf8, pack, unzip, xml_elements
from xrdfast.data.formats.geddes_reader import read_points
from xrdfast.data.formats.measured import (
    MAX_SCANS,
    Measured,
    Points,
    as_written,
    number_of,
    one_line,
    stated_radiation,
)
from xrdfast.errors import InputError

RAW_MAGICS = (b"RAW ", b"RAW2", b"RAW1.01", b"RAW4.00")
_MAX_UXD = 16 << 20  # bytes: as a list of lines it takes ten times that
_MAX_UXD_KEYS = 250  # of a header, which every range keeps
_UXD_MARKERS = (b"_COUNTS", b"_CPS", b"_2THETACOUNTS", b"_2THETACPS")
_BRML_MEMBER = re.compile(r"(?:[\w. -]{1,100}/)?(?:DataContainer|RawData\d+)\.xml")
_BRML_LINES = frozenset(("WaveLengthAlpha1", "WaveLengthAlpha2", "WaveLengthRatio"))


def read_raw(data: bytes) -> list[Measured]:
    """Ranges of a RAW file, all versions.

    Source:
        DIFFRAC plus XCH V5.0 user's manual (2002), appendix A: versions 1 to 3. xylib (Wojdyr), `bruker_raw.cpp`:
        where versions 1 and 2 differ from it, and version 4.
    """
    try:
        if data.startswith(b"RAW1.01"):
            return _read_version_3(data)
        if data.startswith(b"RAW4.00"):
            return _read_version_4(data)
        return _read_version_2(data) if data.startswith(b"RAW2") else _read_version_1(data)
    except struct.error as error:
        raise InputError(f"header: must be whole, got a RAW file cut short at {len(data)} bytes") from error


def _read_version_1(data: bytes) -> list[Measured]:
    scans: list[Measured] = []
    at, another = 4, True
    while another:
        if scans and data[at : at + 4] == b"RAW ":  # the oldest programs repeat it at every range
            at += 4
        n_points, _, step, _, _, start = struct.unpack_from("<IffIIf", data, at)
        title = one_line(data[at + 36 : at + 68])
        radiation = stated_radiation(*struct.unpack_from("<2f", data, at + 68))
        (another,) = struct.unpack_from("<I", data, at + 148)
        begin = at + 152
        scans.append(
            Measured(title, radiation, functools.partial(_counts, data, begin, n_points, start, step))
        )
        at = begin + 4 * n_points
        _limit(scans)
    return scans


def _read_version_2(data: bytes) -> list[Measured]:
    (n_ranges,) = struct.unpack_from("<H", data, 4)
    radiation = stated_radiation(*struct.unpack_from("<3f", data, 190))
    at, scans = 256, []
    for _ in range(n_ranges):
        n_header, n_points, _, _, step, start = struct.unpack_from("<HHIfff", data, at)
        if n_header < 48:
            raise InputError(f"range: must have a header of at least 48 bytes, got {n_header}")
        begin = at + n_header
        scans.append(Measured("", radiation, functools.partial(_counts, data, begin, n_points, start, step)))
        at = begin + 4 * n_points
        _limit(scans)
    return scans


def _read_version_3(data: bytes) -> list[Measured]:
    (n_ranges,) = struct.unpack_from("<I", data, 12)
    if not 0 < n_ranges <= MAX_SCANS:
        raise InputError(f"ranges: must be 1..{MAX_SCANS}, got {n_ranges}")
    title = one_line(data[326:386].partition(b"\0")[0])
    first, second, _, ratio = struct.unpack_from("<4d", data, 624)
    radiation = stated_radiation(first, second, ratio)
    before = data[:12] + struct.pack("<I", 1) + data[16:712]
    at, scans = 712, []
    for _ in range(n_ranges):
        n_header, n_points = struct.unpack_from("<II", data, at)
        stride, extra = struct.unpack_from("<II", data, at + 252)
        if n_header < 260:
            raise InputError(f"range: must have a header of at least 260 bytes, got {n_header}")
        end = at + n_header + extra + n_points * stride
        scans.append(Measured(title, radiation, functools.partial(_read_range, data, before, at, end)))
        at = end
    return scans


def _read_version_4(data: bytes) -> list[Measured]:
    title, radiation, at, ranges = "", None, 61, []
    while at < len(data) and len(ranges) <= MAX_SCANS:
        kind, length = struct.unpack_from("<II", data, at)
        if kind in (0, 160):
            (n_points,) = struct.unpack_from("<I", data, at + 88)
            stride, n_header = struct.unpack_from("<II", data, at + 136)
            length = 160 + n_header + n_points * stride
            ranges.append((at, at + length))
        elif length < 8:
            raise InputError(f"segment: must be at least 8 bytes, got {length} at {at}")
        elif kind == 30:
            first, second, _, ratio = struct.unpack_from("<4d", data, at + 80)
            radiation = stated_radiation(first, second, ratio)
        elif kind == 10 and data[at + 12 : at + 36].partition(b"\0")[0] == b"SAMPLEID":
            title = one_line(data[at + 36 : at + min(length, 1000)].partition(b"\0")[0])
        at += length
    if not 0 < len(ranges) <= MAX_SCANS:
        raise InputError(f"ranges: must be 1..{MAX_SCANS}, got {len(ranges)}")
    before = data[: ranges[0][0]]
    return [
        Measured(title, radiation, functools.partial(_read_range, data, before, begin, end))
        for begin, end in ranges
    ]


def _read_range(data: bytes, before: bytes, begin: int, end: int) -> Points:
    if end > len(data):
        raise InputError(f"range: must be whole, got {len(data) - begin} of {end - begin} bytes")
    return read_points(before + data[begin:end], ".raw")


def _limit(scans: list[Measured]) -> None:
    if len(scans) > MAX_SCANS:
        raise InputError(f"ranges: must be at most {MAX_SCANS}, got more")


def _counts(data: bytes, begin: int, n_points: int, start: float, step: float) -> Points:
    """Points of the versions that geddes does not read, 1 and 2."""
    if begin + 4 * n_points > len(data):
        raise InputError(f"points: must be the declared {n_points}, got {max(0, len(data) - begin) // 4}")
    if not step > 0.0:
        raise InputError(f"step: must be > 0 degrees, got {step:g}")
    two_theta = as_written(start) + as_written(step) * np.arange(n_points)
    return two_theta, np.frombuffer(data, "<f4", n_points, begin).astype(np.float64)


def read_uxd(data: bytes) -> list[Measured]:
    """Ranges of a UXD file; a later range keeps what the ones before it stated and it does not."""
    if len(data) > _MAX_UXD:
        raise InputError(f"size: must be at most {_MAX_UXD} bytes for a UXD file, got {len(data)}")
    scans: list[Measured] = []
    header: dict[bytes, bytes] = {}
    block: list[bytes] = []

    def finish() -> None:
        if block:
            stated = {key: value.strip(b" '\"") for key, value in header_of_block.items()}
            lines = [number_of(stated.get(key)) for key in (b"WL1", b"WL2", b"WLRATIO")]
            unit = {b"NM": 10.0, b"PM": 0.01}.get(stated.get(b"WL_UNIT", b"A").upper(), 1.0)
            ratio = lines[2] if lines[2] == lines[2] else 0.5
            radiation = stated_radiation(unit * lines[0], unit * lines[1], ratio)
            title = one_line(stated.get(b"SAMPLE", b""))
            read = functools.partial(_read_uxd, header_of_block, b"\n".join(block))
            scans.append(Measured(title, radiation, read))
            _limit(scans)

    header_of_block: dict[bytes, bytes] = {}
    for line in as_utf8(data).splitlines():
        line = line.strip()
        if not line or line.startswith(b";"):
            continue
        key, equals, value = line[1:].partition(b"=")
        if line.startswith(b"_") and equals:
            if header is header_of_block:  # of a range that keeps what it was told
                header = dict(header)
            header[key.strip().upper()[:100]] = value.strip()[:1000]
            if len(header) > _MAX_UXD_KEYS:
                raise InputError(f"header: must have at most {_MAX_UXD_KEYS} keys, got more")
        elif line.startswith(b"_"):
            finish()
            if line not in _UXD_MARKERS:
                expected = ", ".join(marker.decode() for marker in _UXD_MARKERS)
                raise InputError(f"data: must be one of {expected}, got {one_line(line)}")
            block, header_of_block = [line], header
        elif block:
            block.append(line)
    finish()
    if not scans:
        raise InputError("scans: must be one or more, got a UXD file without data")
    return scans


def _read_uxd(header: dict[bytes, bytes], block: bytes) -> Points:
    return read_points(b"".join(b"_%s=%s\n" % item for item in header.items()) + block + b"\n", ".uxd")


def read_brml(data: bytes) -> list[Measured]:
    """Scans in the order of the first data container."""
    members = unzip(data, lambda name: bool(_BRML_MEMBER.fullmatch(name)))
    containers = [name for name in members if name.endswith("DataContainer.xml")]
    if len(containers) != 1:
        raise InputError(f"experiments: must be one, got {len(containers)}; export each as .xy or .uxd")
    strings = xml_elements(as_utf8(members[containers[0]]), frozenset(("string",)))
    listed = (element.text for element in strings if "RawDataReferenceList/" in element.path)
    names = list(dict.fromkeys(name for name in listed if name in members))  # each once
    if not 0 < len(names) <= MAX_SCANS:
        raise InputError(f"scans: must be 1..{MAX_SCANS}, got a BRML archive with {len(names)}")
    scans = []
    for name in names:
        stated: dict[str, float] = {}
        for element in xml_elements(as_utf8(members[name]), _BRML_LINES):
            key = element.path.rpartition("/")[2]
            stated.setdefault(key, number_of(element.attributes.get("Value") or element.text))
        lines = (stated.get("WaveLengthAlpha1", np.nan), stated.get("WaveLengthAlpha2", np.nan))
        radiation = stated_radiation(*lines, stated.get("WaveLengthRatio", 0.5))
        contents = f"<Data><RawDataReferenceList><string>{name}</string></RawDataReferenceList></Data>"
        read = functools.partial(_read_brml, {containers[0]: contents.encode(), name: members[name]})
        scans.append(Measured("", radiation, read))
    return scans


def _read_brml(members: dict[str, bytes]) -> Points:
    return read_points(pack(members), ".brml")
