"""Speed of random batches from a pattern store, one core, files in the page cache."""

from __future__ import annotations

import time

import pytest
import torch

from xrdfast.data.generate import generate_store
from xrdfast.data.store import PatternStore
from xrdfast.data.structures import load_structures

_BATCH = 512


@pytest.mark.parametrize(("name", "n_structures"), [("inorganic_mp", 21_979), ("coremof", 3_000)])
def test_random_batches(benchmark, row, threads, shared_data, tmp_path, name: str, n_structures: int) -> None:
    threads(2)
    structures, _ = load_structures(shared_data / f"{name}.npz")
    path = tmp_path / "patterns.store.safetensors"
    generate_store(structures[:n_structures], path)
    threads(1)
    store = PatternStore.open(path)
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))
    batches = [part for part in order.split(_BATCH) if len(part) == _BATCH]
    for part in batches[:2]:
        store.gather(part)
    n_bytes = sum(store.gather(part).hkl.shape[0] * 12 for part in batches)
    start = time.perf_counter()
    for part in batches:
        store.gather(part)
    took = time.perf_counter() - start
    benchmark.pedantic(lambda: store.gather(batches[0]), rounds=20)
    speed, rate = len(batches) * _BATCH / took, n_bytes / took / 1e9
    met = speed >= 100_000 if name == "inorganic_mp" else rate >= 2.0
    row(
        f"store, random batches of {_BATCH} from {name}, one core",
        f"{speed:,.0f} patterns/s, {rate:.1f} GB/s",
        "≥ 100,000 patterns/s" if name == "inorganic_mp" else "≥ 2 GB/s",
        met,
    )
