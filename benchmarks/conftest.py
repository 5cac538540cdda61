"""Fixtures of the benchmarks: threads, real data, and the row each benchmark adds to README's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shared_data() -> Path:
    """Folder of real data beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not there")
    return folder


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's thread count for one benchmark."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def row(benchmark) -> Callable[..., None]:
    """Adds the row `what`, `measured`, `bar` to the table."""

    def add(what: str, measured: str, bar: str, met: bool) -> None:
        benchmark.extra_info.update(what=what, measured=measured, bar=bar, met=met)

    return add


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Runs a benchmark on the processor, and where there is one on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param
