"""Fixtures of the operators' tests: the CUDA sources compiled against the emulator, and its thread orders."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from xrdfast import _native

EMULATOR = Path(__file__).resolve().parent.parent / "emulation"


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The module _emu: every kernel and its binding."""
    return _native._load("_emu", _native.build_module("_emu", emulator=EMULATOR))


@pytest.fixture(params=["0", "1", "7"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Threads run forward, backward, or shuffled between barriers."""
    monkeypatch.setenv("CUEMU_ORDER", request.param)
    return request.param


@pytest.fixture(params=["cpu", "emu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> str:
    """The native code that one test body runs on: the processor's, the device's on the emulator, the device's."""
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    return request.param
