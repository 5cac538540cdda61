"""Rigaku SmartLab: RAS (text) and RASX (a ZIP archive of text and XML)."""

from __future__ import annotations

import functools
import math
import re
from xml.sax.saxutils import quoteattr

import numpy as np

from xrdfast.bragg import Radiation
from xrdfast.data.formats.bounded import as_utf8, pack, unzip, xml_elements
from xrdfast.data.formats.geddes_reader import read_points
from xrdfast.data.formats.measured import (
    MAX_SCANS,
    Measured,
    Points,
    first_line_alone,
    number_of,
    one_line,
    stated_radiation,
)
from xrdfast.errors import InputError

_RAS_KEY = re.compile(rb"^\*([A-Z0-9_-]+)[ \t]([^\n]*)$", re.MULTILINE)
_RAS_COUNT = re.compile(rb"^\*MEAS_DATA_COUNT[^\n]*$", re.MULTILINE)
_RAS_HEADER, _RAS_BEGIN, _RAS_END = b"*RAS_HEADER_START\n", b"*RAS_INT_START\n", b"*RAS_INT_END"
_RASX_MEMBER = re.compile(r"root\.xml|Data\d+/[\w. ()+-]{1,100}\.(?:xml|txt)", re.IGNORECASE)
_RASX_CONDITIONS = frozenset(
    ("WaveType", "WavelengthKalpha1", "WavelengthKalpha2", "WavelengthKbeta", "SampleName")
)


def read_ras(data: bytes) -> list[Measured]:
    """Scans in the order of the file; intensities times the attenuator's factor, the third column."""
    data = as_utf8(data).replace(b"\r\n", b"\n")
    if (n_scans := data.count(_RAS_HEADER)) > MAX_SCANS:
        raise InputError(f"scans: must be at most {MAX_SCANS}, got {n_scans}")
    scans = []
    for block in data.split(_RAS_HEADER)[1:]:
        header, begun, rest = block.partition(_RAS_BEGIN)
        rows, ended, _ = rest.partition(_RAS_END)
        if not (begun and ended):
            raise InputError(f"scan {len(scans)}: must end with *RAS_INT_END, got a RAS file cut short")
        stated = {key.decode(): one_line(value.strip(b' \t"')) for key, value in _RAS_KEY.findall(header)}
        lines = [number_of(stated.get(f"HW_XG_WAVE_LENGTH_{name}")) for name in ("ALPHA1", "ALPHA2", "BETA")]
        radiation = _radiation(*lines, stated.get("MEAS_COND_XG_WAVE_TYPE", ""))
        read = functools.partial(_read_ras, header, rows)
        scans.append(Measured(stated.get("FILE_SAMPLE", ""), radiation, read))
    if not scans:
        raise InputError("scans: must be one or more, got a RAS file without")
    return scans


def read_rasx(data: bytes) -> list[Measured]:
    """Scans in the order of the archive's table of contents; intensities times the attenuator's factor."""
    members = unzip(data, lambda name: bool(_RASX_MEMBER.fullmatch(name)))
    groups: dict[str, list[str]] = {}
    for element in xml_elements(as_utf8(members.get("root.xml", b"")), frozenset(("ContentHashList",))):
        group = element.path.rpartition("/")[0].rpartition("/")[2]
        groups.setdefault(group, []).append(element.attributes.get("Name", ""))
    scans = []
    for group, names in groups.items():
        profile = next((name for name in names if name.lower().endswith(".txt")), "")
        conditions = next(
            (name for name in names if "conditions" in name.lower() and name.lower().endswith(".xml")), ""
        )
        if f"{group}/{profile}" not in members:
            continue
        wanted = {
            f"{group}/{name}": members.get(f"{group}/{name}", b"") for name in (profile, conditions) if name
        }
        stated = {}
        if conditions:
            found = xml_elements(as_utf8(wanted[f"{group}/{conditions}"]), _RASX_CONDITIONS)
            stated = {element.path.rpartition("/")[2]: element.text for element in found}
        lines = [number_of(stated.get(f"WavelengthK{name}")) for name in ("alpha1", "alpha2", "beta")]
        radiation = _radiation(*lines, stated.get("WaveType", ""))
        read = functools.partial(_read_rasx, group, wanted)
        scans.append(Measured(one_line(stated.get("SampleName", "")), radiation, read))
    if not 0 < len(scans) <= MAX_SCANS:
        raise InputError(f"scans: must be 1..{MAX_SCANS}, got a RASX archive with {len(scans)} profiles")
    return scans


def _radiation(first: float, second: float, beta: float, kind: str) -> Radiation | None:
    """Of the lines of the tube, and of which of them the optics let pass: Ka, Ka1 or Kb."""
    kind = kind.strip().lower()
    if kind == "kb":
        return stated_radiation(beta)
    radiation = stated_radiation(first, second)
    return first_line_alone(radiation) if kind == "ka1" else radiation


def _read_ras(header: bytes, rows: bytes) -> Points:
    # the count is written as 3001.0000, which geddes refuses: it is compared here
    whole = b"*RAS_DATA_START\n" + _RAS_HEADER + _RAS_COUNT.sub(b"", header) + _RAS_BEGIN + rows + _RAS_END
    two_theta, intensity = read_points(whole, ".ras")
    count = _RAS_COUNT.search(header)
    declared = number_of(count[0].partition(b" ")[2].strip(b' "')) if count else math.nan
    if math.isfinite(declared) and declared != len(two_theta):
        raise InputError(f"points: must be as many as declared, {declared:g}, got {len(two_theta)}")
    return two_theta, _times_attenuation(intensity, rows)


def _read_rasx(group: str, members: dict[str, bytes]) -> Points:
    names = "".join(f"<ContentHashList Name={quoteattr(name.partition('/')[2])}/>" for name in members)
    root = f'<Root><{group} Type="Profile">{names}</{group}></Root>'.encode()
    two_theta, intensity = read_points(pack({"root.xml": root, **members}), ".rasx")
    profile = next(content for name, content in members.items() if name.lower().endswith(".txt"))
    return two_theta, _times_attenuation(intensity, as_utf8(profile))


def _times_attenuation(intensity: np.ndarray, rows: bytes) -> np.ndarray:
    """(n_points,) counts the detector would have seen without the attenuator: third column, where there is one."""
    fields = rows.split()
    if len(fields) != 3 * len(intensity):
        return intensity
    factor = np.array([number_of(field) for field in fields[2::3]])
    if not (np.isfinite(factor) & (factor > 0.0)).all():
        raise InputError("attenuation: must be finite and > 0, got another value")
    return intensity * factor
