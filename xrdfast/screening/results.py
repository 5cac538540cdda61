"""The table of answers: its columns, parts of it, and the whole. Parts and wholes appear by a rename or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xrdfast.data.files import write_atomically
from xrdfast.errors import InputError, shown_path
from xrdfast.prediction import SUPERCLASSES
from xrdfast.screening.sources import Failure

# One row a scan. What a model cannot say is null.
SCHEMA = pa.schema(
    [
        ("scan_id", pa.string()),  # path, "::member", "#index"
        ("file", pa.string()),
        ("member", pa.string()),
        ("scan_index", pa.int32()),
        ("sha256", pa.string()),
        ("kind", pa.string()),  # "scan" or "sticks"
        ("wavelength", pa.float64()),
        ("wavelength_source", pa.string()),  # "file", "given" or "assumed"
        ("n_points", pa.int32()),
        ("two_theta_first", pa.float64()),
        ("two_theta_last", pa.float64()),
        ("space_group", pa.list_(pa.int16())),  # numbers of the most probable, best first
        ("probability", pa.list_(pa.float32())),
        ("confidence", pa.float32()),  # calibrated probability of the best; null without a calibration
        ("conformal_set", pa.list_(pa.int16())),  # holds the true group in 95 %; null where not calibrated
        *((name, kind) for level in SUPERCLASSES for name, kind in (
            (level, pa.string()), (f"{level}_probability", pa.float32())
        )),
        ("out_of_distribution", pa.float32()),  # `xrdfast.suspicion`; null for lines and a model of one head
        ("several_phases", pa.float32()),  # the same; null for all but whole scans
        ("notes", pa.list_(pa.string())),
        ("seconds", pa.float32()),
        ("thumbnail", pa.binary(200)),
    ]
)  # fmt: skip
_NUMBERS = {
    pa.int16(): np.int16,
    pa.int32(): np.int32,
    pa.float32(): np.float32,
    pa.float64(): np.float64,
}
_ROWS_A_GROUP = 4096


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A Parquet file of rows.

    Raises:
        InputError: where it cannot be written.
    """
    columns = [_array([row[field.name] for row in rows], field.type) for field in SCHEMA]
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    with write_atomically(path) as file:
        pq.write_table(table, file, compression="zstd")


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """`pyarrow.array`, which imports pandas first: a quarter of a second at the start of every run."""
    known = np.array([value is not None for value in values], bool)
    buffers = [None if known.all() else pa.py_buffer(np.packbits(known, bitorder="little"))]
    if pa.types.is_list(kind) or pa.types.is_string(kind):
        if pa.types.is_string(kind):
            values = [None if value is None else value.encode() for value in values]
        lengths = [0, *(0 if value is None else len(value) for value in values)]
        buffers.append(pa.py_buffer(np.cumsum(lengths, dtype=np.int32)))
    filled = [value for value in values if value is not None]
    if pa.types.is_list(kind):
        children = [_array([one for value in filled for one in value], kind.value_type)]
        return pa.Array.from_buffers(kind, len(values), buffers, children=children)
    if pa.types.is_string(kind):
        buffers.append(pa.py_buffer(b"".join(filled)))
    elif pa.types.is_fixed_size_binary(kind):
        buffers.append(pa.py_buffer(b"".join(bytes(kind.byte_width) if v is None else v for v in values)))
    else:
        buffers.append(pa.py_buffer(np.array([0 if v is None else v for v in values], _NUMBERS[kind])))
    return pa.Array.from_buffers(kind, len(values), buffers)


def write_failures(path: Path, failures: Iterable[tuple[int, Failure]]) -> int:
    """A file of one JSON object a line: the failures, each with the number of its chunk.

    Raises:
        InputError: where it cannot be written.
    """
    count = 0
    with write_atomically(path) as file:
        for chunk, failure in failures:
            file.write(json.dumps({**vars(failure), "chunk": chunk}).encode() + b"\n")
            count += 1
    return count


def read_failures(path: Path) -> Iterator[tuple[int, Failure]]:
    """What `write_failures` wrote; nothing where there is no file."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            content = json.loads(line)
            yield content.pop("chunk"), Failure(**content)


def join_tables(path: Path, parts: Sequence[Path], metadata: Mapping[str, str]) -> int:
    """One Parquet file of the rows of several, in their order; memory holds one group of rows.

    Args:
        path: of the result; may be among the parts.
        parts: Parquet files of `SCHEMA`.
        metadata: of the result.

    Returns:
        Rows.

    Raises:
        InputError: where it cannot be written.
    """
    count = 0
    with (
        write_atomically(path) as file,
        pq.ParquetWriter(file, SCHEMA.with_metadata(dict(metadata)), compression="zstd") as writer,
    ):
        waiting: list[pa.RecordBatch] = []
        rows = 0
        for part in parts:
            with pq.ParquetFile(part) as source:
                for batch in source.iter_batches(_ROWS_A_GROUP):
                    waiting.append(batch)
                    rows += len(batch)
                    if rows >= _ROWS_A_GROUP:
                        writer.write_table(pa.Table.from_batches(waiting).cast(SCHEMA))
                        count, rows, waiting = count + rows, 0, []
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting).cast(SCHEMA))
    return count + rows


def table_metadata(path: Path) -> dict[str, str]:
    """What `join_tables` was told.

    Raises:
        InputError: for a file that is no Parquet file.
    """
    try:
        found = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{shown_path(path)}: file: must be a table of answers, got {error}") from error
    return {key.decode(): value.decode("utf-8", "replace") for key, value in found.items()}


def count_rows(path: Path) -> int:
    """Rows of a table."""
    return int(pq.read_metadata(path).num_rows)


def errors_path(output: Path) -> Path:
    """Where the failures of a table of answers are."""
    return output.with_name(f"{output.stem}.errors.jsonl")


def fsync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
