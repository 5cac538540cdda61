"""Fixtures of the training tests: the tiny presets and a tiny store."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import tiny
from xrdfast.models import PRESETS


@pytest.fixture
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds the tiny presets for one test."""
    for name, config in tiny.presets().items():
        monkeypatch.setitem(PRESETS, name, config)


@pytest.fixture(scope="session")
def cubic_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty patterns of three cubic groups."""
    path = tmp_path_factory.mktemp("stores") / "cubic.store.safetensors"
    tiny.write_cubic_store(path)
    return path
