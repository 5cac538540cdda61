"""CIF as blocks of tags and values, whatever they mean: `xrdfast.data.cif` reads structures from them,
`xrdfast.data.formats.pdcif` powder patterns. Needs no torch.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xrdfast.errors import InputError

if TYPE_CHECKING:
    from gemmi.cif import Block

_MAX_BLOCKS = 1000

# An unquoted symbol of several words, and a block name that is no single word: programs write them, the
# grammar has neither. Blanks are taken once and for all (`++`): a line of nothing else costs its length, not the
# square of it.
_UNQUOTED_NAME = re.compile(
    rb"^([ \t]*+_(?:symmetry_)?space_group_name_(?:H-M(?:_alt|_full)?|Hall)[ \t]++)"
    rb"([^\s'\"#;_](?:[^\r\n'\"#_]*[^\s'\"#_])?)[ \t]*+$",
    re.MULTILINE | re.IGNORECASE,
)
_SPACED_BLOCK = re.compile(
    rb"^([ \t]*+data_)[ \t]++((?:[^\s_'\"](?:[^\r\n_'\"]*[^\s_'\"])?)?)[ \t]*+$",
    re.MULTILINE | re.IGNORECASE,
)


def parse_blocks(data: bytes) -> list[Block]:
    """Data blocks of a CIF, two common faults of its grammar repaired.

    Raises:
        InputError: for other than 1 to 1,000 blocks in CIF grammar.
    """
    from gemmi import cif

    data = data.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in data:
        raise InputError(f"file: must be text, got a NUL byte at {data.index(0)}")
    text = data.decode("utf-8", "replace").encode()
    try:
        document = cif.read_string(text, check_level=0)
    except (ValueError, RuntimeError):
        text = _UNQUOTED_NAME.sub(rb"\1'\2'", text)
        text = _SPACED_BLOCK.sub(lambda match: match[1] + b"_".join(match[2].split()), text)
        try:
            document = cif.read_string(text, check_level=0)
        except (ValueError, RuntimeError) as error:
            what = " ".join(str(error).split())[:200]
            raise InputError(f"file: must follow the CIF grammar, got {what}") from error
    if not 0 < len(document) <= _MAX_BLOCKS:
        raise InputError(f"blocks: must be 1..{_MAX_BLOCKS}, got {len(document)}")
    return list(document)


def column_of(block: Block, tag: str) -> list[str]:
    """Values of a tag, in a loop or alone, unquoted, `?` and `.` empty; none where the tag is not there."""
    from gemmi import cif

    return [cif.as_string(value).strip() for value in block.find_values(tag)]


def text_of(block: Block, *tags: str) -> str:
    """The first value of the first of these tags that has one, else an empty string."""
    return next((column[0] for tag in tags if (column := column_of(block, tag)) and column[0]), "")


def numbers_of(column: list[str], default: float = math.nan) -> NDArray[np.float64]:
    """(n,) values without their uncertainties in brackets; the default where empty, NaN for no number."""
    from gemmi import cif

    return np.array([cif.as_number(text) if text else default for text in column], dtype=np.float64)
