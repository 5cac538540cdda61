"""The one exception that means: a file or value a user gave is not right. Not for programming errors."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input in one line: "<file>: <field>: <rule>, got <what>". The command line prints it and exits with 2."""
