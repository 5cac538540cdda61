"""A pytest plugin: what needs a package that isn't installed is skipped, and the package named. For gpu_check only.

Elsewhere a missing package is an error: a suite that skips by itself tests less and less.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

_OWN = {"xrdfast", "benchmarks", "tests"}  # missing, these are faults of ours


@contextlib.contextmanager
def _skipped_where_missing() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _OWN or not package:
            raise
        pytest.skip(f"{package} is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Imports in fixtures."""
    with _skipped_where_missing():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Imports in the test itself."""
    with _skipped_where_missing():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[pytest.CollectReport]:
    """Imports at the head of a file, which pytest reports as text."""
    report = yield
    missing = re.search(r"No module named '(\w+)", str(report.longrepr)) if report.failed else None
    if missing and missing[1] not in _OWN:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")
    return report
