"""The command line: one verb, one function. Everything beyond options and printing lives in the package.

Exit codes: 0; 1 where the demo does not pass, nothing can be built or some of many scans got no answer; 2 for bad
input, with one line on standard error; 130 for an interruption. Imports beyond click happen inside the verbs, so
that `--help` is there at once.
"""

from __future__ import annotations

import gc
import warnings

from xrdfast.cli import answers, machine, models, structures  # noqa: F401  (each adds its verbs)
from xrdfast.cli.group import cli

__all__ = ["cli", "main"]


def main() -> None:
    """The `xrdfast` command."""
    warnings.formatwarning = lambda message, *_, **__: f"xrdfast: warning: {message}\n"
    try:
        cli(prog_name="xrdfast")
    finally:
        gc.freeze()  # or Python searches all of torch for cycles before it ends: 0.4 s
