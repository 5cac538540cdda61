"""Screening on a Ray cluster: chunks through Ray Data, the same parts and the same join. Needs the extra `ray`.

Workers read and prepare chunks; actors hold the model, answer, and write the parts, so the output's folder must be one
that every machine sees. What is done is known by the parts, as ever: a run goes on after any end, here or without Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xrdfast.screening.manifest import Manifest
from xrdfast.screening.pipeline import Progress, Screener, write_part
from xrdfast.screening.preparation import prepare_chunk
from xrdfast.screening.results import errors_path
from xrdfast.screening.sources import find_files


def screen_with_ray(
    screener: Screener,
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    progress: Progress | None = None,
    n_models: int = 1,
) -> tuple[int, int]:
    """As `Screener.screen`, on the Ray cluster at hand, or a local one that is started.

    Args:
        screener: what answers.
        paths: seen by every machine.
        output: the Parquet file.
        progress: called after each chunk.
        n_models: actors that hold the model.

    Returns:
        Scans answered and failures, of this call.

    Raises:
        InputError: as `Screener.screen`.
        ImportError: where Ray is not installed.
    """
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    output = Path(os.path.abspath(output))
    run = screener.digest()
    manifest = Manifest(output, run)
    own = {os.path.realpath(path) for path in (output, manifest.parts, errors_path(output))}
    everything = [*manifest.chunks()]
    everything += manifest.extend(find_files(paths, lambda path: os.path.realpath(path) in own))
    kept = manifest.n_kept
    todo = [
        {"number": number, "chunk": chunk}
        for number, chunk in everything
        if number >= kept and not manifest.part(number, chunk).exists()
    ]
    answered = failed = 0
    if todo:
        known = sum(one["chunk"].n_expected for one in todo)
        done = (
            ray.data.from_items(todo, override_num_blocks=len(todo))
            .map(_prepare, fn_args=(screener.given, screener.predictor.reads_scans))
            .map_batches(
                _Answer,
                batch_size=1,
                concurrency=n_models,
                fn_constructor_args=(ray.put(screener), str(output), run),
            )
        )
        for row in done.iter_rows():
            answered, failed = answered + int(row["answered"]), failed + int(row["failed"])
            if progress is not None:
                progress(answered, failed, max(known, answered + failed))
    manifest.join()
    return answered, failed


def _prepare(row: dict[str, Any], given: Any, whole: bool) -> dict[str, Any]:
    return {**row, "prepared": prepare_chunk(row["chunk"], given, whole)}


class _Answer:
    """An actor with the model."""

    def __init__(self, screener: Any, output: str, run: str) -> None:
        import ray

        self._screener: Screener = ray.get(screener)
        self._manifest = Manifest(Path(output), run)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        answered, failed = [], []
        for number, chunk, prepared in zip(batch["number"], batch["chunk"], batch["prepared"], strict=True):
            rows, failures = self._screener.answer(prepared)
            write_part(self._manifest, int(number), chunk, rows, failures)
            answered.append(len(rows))
            failed.append(len(failures))
        return {"answered": answered, "failed": failed}
