"""PANalytical XRDML: an XML document with any number of measurements, each with any number of scans."""

from __future__ import annotations

import functools
import math

from xrdfast.bragg import Radiation
from xrdfast.data.formats.bounded import Element, as_utf8, xml_elements
from xrdfast.data.formats.geddes_reader import read_points
from xrdfast.data.formats.measured import (
    Measured,
    Points,
    first_line_alone,
    number_of,
    one_line,
    splits_doublet,
    stated_radiation,
)
from xrdfast.errors import InputError

_LINES = ("kAlpha1", "kAlpha2", "kBeta", "ratioKAlpha2KAlpha1")
_OPTICS = ("monochromator", "xRayMirror")
_WANTED = frozenset(("xrdMeasurement", "scan", "id", "name", "usedWavelength", *_LINES, *_OPTICS))


def read_xrdml(data: bytes) -> list[Measured]:
    """Scans in the order of the document.

    The line a document says it intends for d-spacings ("K-Alpha 1") is not what the beam was: both lines reach
    the sample unless the incident beam path has a germanium or silicon monochromator. Only the K-beta line, where
    intended, is taken as such.
    """
    data = as_utf8(data)
    scans: list[Measured] = []
    stated: dict[str, float] = {}
    intended = title = ""
    alone = False
    for element in xml_elements(data, _WANTED):
        place, _, name = element.path.rpartition("/")
        parent = place.rpartition("/")[2]
        if name == "xrdMeasurement":
            stated, intended, alone = {}, "", False
        elif name in ("id", "name") and parent == "sample":
            title = title or one_line(element.text)
        elif name == "usedWavelength":
            intended = element.attributes.get("intended", "")
        elif parent == "usedWavelength":
            stated[name] = number_of(element.text)
        elif name in _OPTICS and parent == "incidentBeamPath":
            alone = alone or splits_doublet(element.attributes.get("name", ""))
        elif name == "scan" and parent == "xrdMeasurement":
            radiation = _radiation(stated, intended)
            read = functools.partial(_read_scan, data, element)
            scans.append(Measured(title, first_line_alone(radiation) if alone else radiation, read))
    if not scans:
        raise InputError("scans: must be one or more, got an XRDML document without")
    return scans


def _radiation(stated: dict[str, float], intended: str) -> Radiation | None:
    if intended.replace("-", "").replace(" ", "").lower() == "kbeta":
        return stated_radiation(stated.get("kBeta", math.nan))
    lines = stated.get("kAlpha1", math.nan), stated.get("kAlpha2", math.nan)
    return stated_radiation(*lines, stated.get("ratioKAlpha2KAlpha1", 0.5))


def _read_scan(data: bytes, scan: Element) -> Points:
    # alone, so that reading all scans of a file takes time in proportion to its size
    alone = data[scan.begin : scan.end]
    return read_points(
        b"<xrdMeasurements><xrdMeasurement>" + alone + b"</xrdMeasurement></xrdMeasurements>", ".xrdml"
    )
