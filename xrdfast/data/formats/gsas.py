"""GSAS powder data: BANK records of constant step, with or without standard deviations, and FXYE."""

from __future__ import annotations

import functools
import re

from xrdfast.data.formats.bounded import as_utf8
from xrdfast.data.formats.geddes_reader import read_points
from xrdfast.data.formats.measured import MAX_SCANS, Measured, Points, one_line, radiation_in_text
from xrdfast.errors import InputError

BANK = re.compile(rb"^BANK[ \t]+\d+[ \t]+\d+[ \t]+\d+[ \t]+([A-Za-z_]+)", re.MULTILINE)
_CONSTANT = ("CONS", "CONST")  # steps in centidegrees
_TIMES = ("SLOG", "RALF", "TIME_MAP", "LOG6", "LPSD")  # binnings of time of flight


def read_gsas(data: bytes) -> list[Measured]:
    """Banks in the order of the file. The wavelength is in the instrument's file, and here only in some comments."""
    data = as_utf8(data)
    banks = list(BANK.finditer(data))
    if not 0 < len(banks) <= MAX_SCANS:
        raise InputError(f"banks: must be 1..{MAX_SCANS}, got {len(banks)}")
    header = data[: banks[0].start()]
    radiation = radiation_in_text(header.decode("utf-8", "replace"))
    title = one_line(header.partition(b"\n")[0])
    ends = [bank.start() for bank in banks[1:]] + [len(data)]
    return [
        Measured(title, radiation, functools.partial(_read_bank, data[bank.start() : end], bank[1].decode()))
        for bank, end in zip(banks, ends, strict=True)
    ]


def _read_bank(bank: bytes, binning: str) -> Points:
    if binning.upper() in _TIMES:
        raise InputError(
            f"axis: must be 2theta at one wavelength, got time-of-flight data ({binning} binning)"
        )
    if binning.upper() not in _CONSTANT:
        raise InputError(f"axis: must be 2theta in constant steps (CONST), got {binning} binning")
    return read_points(b"title\n" + bank, ".gsas")
