"""Packed structures in NumPy archives: offset, lattice, z, frac, occ_pct, id and labels. Not for stores."""

from __future__ import annotations

import dataclasses
import itertools
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xrdfast.data.structures import PackedStructures, check_packed, reduced_formula
from xrdfast.errors import InputError

_MAX_UNPACKED = 8 << 30  # bytes of an archive after unpacking

# Arrays that must be there: shape after the rows, kinds of numbers or text.
_REQUIRED = {
    "offset": ((), "iu"),
    "lattice": ((3, 3), "f"),
    "z": ((), "iu"),
    "frac": ((3,), "f"),
    "occ_pct": ((), "iu"),
    "id": ((), "SU"),
}
# Arrays that may be there.
_OPTIONAL = dict.fromkeys(("fold", "sg_published", "sg_001", "sg_01"), ((), "iu"))
_OPTIONAL |= dict.fromkeys(("formula", "name"), ((), "SU"))
_NO_NAME = "<missing>"
# Values that fit the packed types.
_RANGES = {"z": (0, 255), "fold": (-1, 9), "sg_published": (0, 230), "sg_001": (0, 230), "sg_01": (0, 230)}


def read_npz(path: Path) -> PackedStructures:
    """Reads an archive of structures whose every atom is listed.

    N structures of M atoms: `offset` (N + 1,), `lattice` (N, 3, 3) rows in Angstrom, `z` (M,) atomic numbers,
    `frac` (M, 3), `occ_pct` (M,) per cent, `id` (N,) text; perhaps `formula`, `fold`, `name` (the mineral's:
    the family), and the space groups `sg_published`, `sg_001`, `sg_01` at tolerances of 0.01 and 0.1 Angstrom.

    Raises:
        InputError: for a file that cannot be read, or an array that is missing or not right.
    """
    arrays = _read_arrays(path)
    for name, (tail, kinds) in (_REQUIRED | _OPTIONAL).items():
        if name not in arrays:
            if name in _REQUIRED:
                got = ", ".join(sorted(arrays)) or "nothing"
                raise InputError(f"{path}: {name}: must be present, got {got}")
            continue
        array = arrays[name]
        if array.ndim != 1 + len(tail) or array.shape[1:] != tail or array.dtype.kind not in kinds:
            rule = f"{('rows', *tail)} of kind {' or '.join(kinds)}"
            raise InputError(f"{path}: {name}: must be {rule}, got {array.shape} {array.dtype}")
        low, high = _RANGES.get(name, (None, None))
        if low is not None and array.size and not low <= array.min() <= array.max() <= high:
            raise InputError(f"{path}: {name}: must be in {low}..{high}, got {array.min()}..{array.max()}")
    n = len(arrays["lattice"])
    for name, array in arrays.items():
        model = "z" if name in ("z", "frac", "occ_pct") else "lattice"
        if name != "offset" and len(array) != len(arrays[model]):
            rule = f"must have as many rows as {model}, {len(arrays[model])}"
            raise InputError(f"{path}: {name}: {rule}, got {len(array)}")

    def strings(name: str) -> list[str]:
        values = arrays[name].tolist() if name in arrays else [""] * n
        return [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]

    def per_structure(name: str, default: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor(arrays[name].tolist() if name in arrays else [default] * n, dtype=dtype)

    number, occupancy = arrays["z"].astype(np.uint8), arrays["occ_pct"] / 100.0
    structures = PackedStructures(
        offset=torch.from_numpy(arrays["offset"].astype(np.int64)),
        lattice=torch.from_numpy(arrays["lattice"].astype(np.float64)),
        atomic_number=torch.from_numpy(number),
        fractional=torch.from_numpy(arrays["frac"].astype(np.float64)),
        occupancy=torch.from_numpy(occupancy),
        b_iso=torch.zeros(len(number), dtype=torch.float64),
        ids=strings("id"),
        formula=strings("formula"),
        family=["" if name == _NO_NAME else name for name in strings("name")],
        fold=per_structure("fold", -1, torch.int8),
        space_group_published=per_structure("sg_published", 0, torch.int16),
        space_group_001=per_structure("sg_001", 0, torch.int16),
        space_group_01=per_structure("sg_01", 0, torch.int16),
        rotation_offset=torch.zeros(n + 1, dtype=torch.int64),
        rotations=torch.zeros((0, 3, 3), dtype=torch.int8),
        to_standard=torch.full((n, 3, 3), math.nan, dtype=torch.float64),
    )
    check_packed(path, structures)
    if "formula" not in arrays:
        spans = itertools.pairwise(structures.offset.tolist())
        formula = [reduced_formula(number[a:b], occupancy[a:b]) for a, b in spans]
        structures = dataclasses.replace(structures, formula=formula)
    return structures


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _MAX_UNPACKED:
            raise InputError(f"{path}: size: must be at most {_MAX_UNPACKED} bytes unpacked, got {size}")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in (*_REQUIRED, *_OPTIONAL) if name in archive.files}
    except InputError:
        raise
    except Exception as error:  # damage reaches any layer: zip, deflate, lzma, the array's header, memory
        got = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: file: must be a whole .npz without pickled arrays, got {got}") from error
