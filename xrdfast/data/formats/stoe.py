"""STOE WinXPOW raw files, version 1.06 ("Powdat"): binary, blocks of 512 bytes, up to 8 ranges."""

from __future__ import annotations

import functools
import struct

import numpy as np

from xrdfast.data.formats.measured import Measured, Points, as_written, one_line, stated_radiation
from xrdfast.errors import InputError

MAGIC = b"RAW_1."
_VERSION = b"RAW_1.06"
_BLOCK = 512
_MAX_RANGES = 8


def read_stoe(data: bytes) -> list[Measured]:
    """Ranges in the order of the header.

    Source:
        The vendor's record definitions as DASH reads them (CCDC, `Load_rawSTOE_File`): RAW_HEADER106, RANGE_INFO.
    """
    if not data.startswith(_VERSION):
        what = one_line(data[:8])
        raise InputError(f"version: must be RAW_1.06, got STOE {what}; export .xy or .xye from WinXPOW")
    if len(data) < _BLOCK:
        raise InputError(f"header: must be {_BLOCK} bytes, got {len(data)}")
    n_ranges = struct.unpack_from("<h", data, 0x17A)[0]
    blocks = struct.unpack_from(f"<{2 * _MAX_RANGES}h", data, 0x1E0)
    if not 1 <= n_ranges <= _MAX_RANGES:
        raise InputError(f"ranges: must be 1..{_MAX_RANGES} measured ones, got {n_ranges}")
    radiation = stated_radiation(*struct.unpack_from("<2f", data, 0x142))
    title = one_line(data[0x20:0x70].partition(b"\0")[0])
    places = zip(blocks[:n_ranges], blocks[_MAX_RANGES : _MAX_RANGES + n_ranges], strict=True)
    return [Measured(title, radiation, functools.partial(_read_range, data, *place)) for place in places]


def _read_range(data: bytes, header_block: int, n_blocks: int) -> Points:
    header = (header_block - 1) * _BLOCK  # blocks are counted from 1
    begin = header + _BLOCK
    if header_block < 2 or n_blocks < 1 or begin + n_blocks * _BLOCK > len(data):
        raise InputError(f"range: must lie inside the file, got block {header_block} and {n_blocks} of data")
    n_points = struct.unpack_from("<H", data, header + 34)[0]
    (factor,) = struct.unpack_from("<f", data, header + 40)
    start, _, stop, _, step = map(as_written, struct.unpack_from("<5f", data, header + 44))
    lowest, highest = struct.unpack_from("<2i", data, header + 120)
    if not (n_points > 1 and step > 0.0 and abs(start + step * (n_points - 1) - stop) < 0.5 * step):
        raise InputError(
            f"range: must have points from start to end, got {n_points} from {start:g} to {stop:g} by {step:g}"
        )
    # 16 or 32 bits: the code for it is not documented, the declared range of the counts is
    for width in (4, 2):
        if width * n_points > n_blocks * _BLOCK:
            continue
        counts = np.frombuffer(data, f"<i{width}", n_points, begin)
        if highest <= 0 or (counts.min(), counts.max()) == (lowest, highest):
            return start + step * np.arange(n_points), counts / max(factor, 1.0)
    raise InputError(
        f"counts: must be {n_points} in {n_blocks} blocks, from {lowest} to {highest}, got others"
    )
