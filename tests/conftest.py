"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

try:
    from hypothesis import settings
except ModuleNotFoundError:  # the tests that benchmarks/gpu_check.py runs do without
    pass
else:
    # The same examples in every run, however slow the machine is at that moment: a failure comes from a change.
    settings.register_profile("xrdfast", deadline=None, derandomize=True)
    settings.load_profile("xrdfast")


@pytest.fixture(autouse=True)
def processor_state() -> Iterator[None]:
    """Training flushes subnormal numbers for the whole process; tests that follow get them back."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the repository; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not there")
    return folder


@pytest.fixture
def gpu() -> None:
    """Skips where there is no CUDA device; what asks for it is marked `gpu` too, for benchmarks/gpu_check.py."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
