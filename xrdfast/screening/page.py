"""The answers of a screening as one HTML page that needs nothing else: no server, no network, no other file.

Rows and thumbnails travel inside it, compressed; the page's own script (`page.js`) draws what is looked at. Texts that
come from files reach the page as data and as text nodes alone, and its policy runs no other script than this one.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xrdfast.data.files import write_atomically
from xrdfast.data.peaks import background_of, find_peaks
from xrdfast.data.scans import Scan
from xrdfast.errors import InputError, shown_path
from xrdfast.prediction import SUPERCLASSES
from xrdfast.screening.results import SCHEMA, errors_path, read_failures
from xrdfast.screening.sources import find_again
from xrdfast.symmetry import CRYSTAL_SYSTEMS, SYMBOLS

N_ROWS = 10_000  # of a page: 5 MB and less
N_PATTERNS = 40  # of the first rows, drawn from the files themselves
_N_FAILURES = 5_000
_PATTERN_BINS = 1_500  # a screen has no more
_HISTOGRAM_BINS = 20
_DIGEST = 12  # characters of a SHA-256 that are shown
_SHARE = 1000  # probabilities are kept as thousandths


def write_page(
    results: str | Path, output: str | Path, *, n_rows: int = N_ROWS, n_patterns: int = N_PATTERNS
) -> tuple[int, int, int]:
    """Writes the page of a table of answers.

    Args:
        results: the Parquet file of `xrdfast screen`; failures are read from beside it.
        output: the HTML file.
        n_rows: at most so many rows are listed, the most unusual ones; counts and charts are of all.
        n_patterns: of the first rows, whose files are read again for the pattern, its background and its peaks, where
            they are there and have not changed.

    Returns:
        Rows in the table, rows on the page, failures.

    Raises:
        InputError: for a table that is not one of answers, or a page that cannot be written.
    """
    results = Path(results)
    columns = _read(results, ["out_of_distribution", "probability", "confidence", "crystal_system", "notes"])
    order = _unusual_first(columns)[:n_rows]
    table = _rows(results, order)
    failures = [
        {"id": failure.scan_id, "reason": failure.reason}
        for _, failure in read_failures(errors_path(results))
    ]
    summary = _summary(columns) | {"n_failures": len(failures)}
    content = {
        "summary": summary,
        "symbols": SYMBOLS,
        "systems": CRYSTAL_SYSTEMS,
        "rows": _compact(table) | {"at": order.tolist()},
        "patterns": dict(_patterns(table, n_patterns)),
        "failures": failures[:_N_FAILURES],
    }
    thumbnails = b"".join(table["thumbnail"].to_pylist())
    page = _render(results.name, summary, len(order), content, thumbnails)
    with write_atomically(Path(output)) as file:
        file.write(page.encode())
    return len(columns), len(order), len(failures)


def _read(results: Path, names: list[str]) -> pa.Table:
    try:
        missing = set(SCHEMA.names) - set(pq.read_schema(results).names)
        table = None if missing else pq.read_table(results, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{shown_path(results)}: file: must be a table of answers, got {error}") from error
    if table is None:
        raise InputError(f"{shown_path(results)}: columns: must be those of answers, got no {min(missing)}")
    return table


def _best(table: pa.Table) -> np.ndarray:
    """(n_rows,) probability of the best space group."""
    if not len(table):
        return np.zeros(0)
    return pc.list_element(table["probability"].combine_chunks(), 0).to_numpy(zero_copy_only=False)


def _unusual_first(table: pa.Table) -> np.ndarray:
    """Row numbers, most unlike the training first; of equals, and without such a score, the least sure first."""
    unlike = table["out_of_distribution"].to_numpy()
    return np.lexsort((_best(table), -np.nan_to_num(unlike.astype(np.float64), nan=-1.0)))


def _rows(results: Path, order: np.ndarray) -> pa.Table:
    """These rows in this order; memory holds them and one group of rows."""
    wanted = np.sort(order)
    pieces, begin = [], 0
    with pq.ParquetFile(results) as file:
        for batch in file.iter_batches():
            here = wanted[np.searchsorted(wanted, begin) : np.searchsorted(wanted, begin + len(batch))]
            pieces.append(batch.take(pa.array(here - begin)))
            begin += len(batch)
    table = pa.Table.from_batches(pieces, schema=SCHEMA) if pieces else SCHEMA.empty_table()
    return table.take(pa.array(np.searchsorted(wanted, order)))


def _summary(table: pa.Table) -> dict[str, Any]:
    """Of all rows: how many, the histogram of probabilities, counts of crystal systems and of notes."""
    best = _best(table)
    counts = np.histogram(best, bins=_HISTOGRAM_BINS, range=(0.0, 1.0))[0]
    names, number = np.unique(
        table["crystal_system"].to_numpy(zero_copy_only=False).astype(str), return_counts=True
    )
    by_system = dict(zip(names.tolist(), number.tolist(), strict=True))
    calibrated = len(table) > 0 and table["confidence"].null_count < len(table)
    return {
        "n": len(table),
        "calibrated": calibrated,
        "histogram": counts.tolist(),
        "by_system": [by_system.get(name, 0) for name in CRYSTAL_SYSTEMS],
        "n_noted": int(pc.sum(pc.greater(pc.list_value_length(table["notes"]), 0)).as_py() or 0),
        "median": float(np.median(best)) if len(best) else None,
    }


def _compact(table: pa.Table) -> dict[str, Any]:
    """Columns as short lists: repeated texts once, shares in thousandths, -1 for null."""
    lists = table.drop_columns(["thumbnail"]).to_pydict()
    n = len(table)
    found: dict[str, Any] = {
        name: lists[name] for name in ("scan_id", "n_points", "space_group", "kind", "wavelength_source")
    }
    found["wavelength"] = [round(value, 6) for value in lists["wavelength"]]
    for name in ("two_theta_first", "two_theta_last"):
        found[name] = [round(value, 4) for value in lists[name]]
    found["sha256"] = [text[:_DIGEST] for text in lists["sha256"]]
    found["probability"] = [[_thousandths(share) for share in row] for row in lists["probability"]]
    found["set_size"] = [-1 if row is None else len(row) for row in lists["conformal_set"]]
    for name in ("out_of_distribution", "several_phases"):
        found[name] = [_thousandths(value) for value in lists[name]]
    found["ms"] = [round(1000.0 * seconds, 2) for seconds in lists["seconds"]]
    for level in SUPERCLASSES:
        found[level] = _indexed(lists[level])
        found[f"{level}_probability"] = [_thousandths(share) for share in lists[f"{level}_probability"]]
    texts = _indexed([note for row in lists["notes"] for note in row])
    places = iter(texts["at"])
    found["notes"] = {"texts": texts["texts"], "at": [[next(places) for _ in row] for row in lists["notes"]]}
    for name in ("kind", "wavelength_source"):
        found[name] = _indexed(found[name])
    return found | {"n": n}


def _thousandths(share: float | None) -> int:
    return -1 if share is None else round(_SHARE * share)


def _indexed(values: list[str]) -> dict[str, list[Any]]:
    """Distinct texts, and for each value which one."""
    texts = dict.fromkeys(values)
    place = {text: i for i, text in enumerate(texts)}
    return {"texts": list(texts), "at": [place[value] for value in values]}


def _patterns(table: pa.Table, n_patterns: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """By row, the patterns of the first ones, as far as their files are there as they were."""
    names = ("file", "member", "scan_index", "sha256", "kind")
    for i, row in enumerate(table.slice(0, n_patterns).select(names).to_pylist()):
        scan = find_again(row["file"], row["member"], row["scan_index"], row["sha256"])
        if scan is not None and row["kind"] == "scan":
            yield str(i), drawn_scan(scan)


def drawn_scan(scan: Scan) -> dict[str, Any]:
    """A scan as a page draws it: the highest and the lowest counts of equal bins, the background there, its peaks."""
    two_theta, counts = scan.two_theta, scan.intensity
    n_bins = min(_PATTERN_BINS, len(counts))
    begin = np.arange(n_bins) * len(counts) // n_bins
    background = background_of(two_theta, counts)
    place, height = find_peaks(two_theta, counts)
    return {
        "first": round(float(two_theta[0]), 5),
        "last": round(float(two_theta[-1]), 5),
        "high": _short(np.maximum.reduceat(counts, begin)),
        "low": _short(np.minimum.reduceat(counts, begin)),
        "background": _short(background[begin]),
        "peaks": [round(value, 3) for value in place.tolist()],
        "heights": [round(value, 1) for value in height.tolist()],
    }


def _short(values: np.ndarray) -> list[float]:
    """Four digits of each."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def _render(
    name: str, summary: Mapping[str, Any], n_listed: int, content: Mapping[str, Any], thumbnails: bytes
) -> str:
    import jinja2

    folder = resources.files("xrdfast.screening")
    script, style = (folder.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        folder.joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        name=name,
        summary=summary,
        n_listed=n_listed,
        script=script,
        style=style,
        script_hash=_policy_hash(script),
        style_hash=_policy_hash(style),
        content=_packed(json.dumps(content, separators=(",", ":")).encode()),
        thumbnails=_packed(thumbnails),
    )


def _policy_hash(text: str) -> str:
    """Of a content security policy: what this text is, nothing else may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()
