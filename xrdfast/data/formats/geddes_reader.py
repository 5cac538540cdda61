"""Points of the formats that the library geddes reads. The one module that knows geddes.

Geddes is a parser in safe Rust: a damaged file is an error or a caught panic, never a crash. What it may need is
memory, 30 times a document of nothing but tags: so it is handed one scan at a time, and none above 8 MB.
"""

from __future__ import annotations

import numpy as np

from xrdfast.data.formats.measured import Points, one_line
from xrdfast.errors import InputError

_MAX_BYTES = 8 << 20  # 240,000 points of the widest text


def read_points(data: bytes, suffix: str) -> Points:
    """2theta in degrees and intensity of the first scan.

    Args:
        data: a file's content.
        suffix: that names its format, such as ".xrdml".

    Raises:
        InputError: for content that geddes refuses, with its reason.
    """
    if len(data) > _MAX_BYTES:
        raise InputError(f"scan: must be at most {_MAX_BYTES} bytes, got {len(data)}")
    import geddes

    try:
        pattern = geddes.read_bytes(data, f"scan{suffix}")
    except (ValueError, OSError) as error:
        what = one_line(str(error)).removeprefix("Parse error: ")
        raise InputError(f"points: must be a 2theta scan that can be read, got: {what}") from error
    except BaseException as error:  # a panic in Rust is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise InputError("points: must be a 2theta scan that can be read, got damaged data") from error
    return np.asarray(pattern.x, np.float64), np.asarray(pattern.y, np.float64)
