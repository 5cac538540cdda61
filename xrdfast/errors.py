"""The one exception that means: a file or value a user gave is not right. Not for programming errors."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """Bad input in one line: "<file>: <field>: <rule>, got <what>". The command line prints it and exits with 2."""


def shown_path(path: str | Path) -> str:
    r"""A path for a message of one line, whatever characters its name has.

    Example:
        >>> shown_path("new\nline.xy"), shown_path("Größe.xy")
        ('new\\nline.xy', 'Größe.xy')
    """
    text = str(path)
    return text if text.isprintable() else ascii(text)[1:-1]
