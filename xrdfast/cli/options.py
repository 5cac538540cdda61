"""Options that several verbs share, and what their values mean."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """A range of numbers that has no NaN and no infinity in it."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or click's refusal."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


def _wavelength(ctx: click.Context, option: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    from xrdfast.bragg import wavelength_of
    from xrdfast.errors import InputError

    try:
        return wavelength_of(value)
    except ValueError as error:
        raise InputError(f"--wavelength: {str(error).partition(': ')[2]}") from error


def _output_file(ctx: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
    from xrdfast.errors import InputError

    if value is None:
        return None
    # Files are replaced whole by a rename, which would put a plain file in the place of a device or folder.
    if value.exists() and not value.is_file():
        raise InputError(f"{value}: {option.opts[-1]}: must be a plain file, got a folder or device")
    if not value.parent.is_dir():  # known now, not after the work
        raise InputError(f"{value}: {option.opts[-1]}: must lie in a folder that exists, got none")
    return value


def refuse_input_as_output(output: Path, inputs: Iterable[Path]) -> None:
    """Refuses to write over what is read."""
    from xrdfast.errors import InputError

    if output.resolve() in [path.resolve() for path in inputs]:
        raise InputError(f"{output}: output: must not be an input, got the same file")


def parse_folds(ctx: click.Context, option: click.Parameter, value: str) -> tuple[int, ...] | None:
    """Numbers of "0,1"; None of "all"."""
    from xrdfast.errors import InputError

    if value == "all":
        return None
    parts = value.split(",")
    if not all(part.strip().isdigit() and int(part) <= 9 for part in parts):
        raise InputError(f"--folds: must be numbers in 0..9 with commas between, or all, got {value!r}")
    return tuple(sorted({int(part) for part in parts}))


def parse_groups(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Numbers of "89,195-199"."""
    from xrdfast.errors import InputError
    from xrdfast.symmetry import N_SPACE_GROUPS

    if value is None:
        return tuple(range(1, N_SPACE_GROUPS + 1))
    numbers: set[int] = set()
    for part in value.split(","):
        first, _, last = part.partition("-")
        ends = [text.strip() for text in (first, last or first)]
        if (
            not all(text.isdecimal() for text in ends)
            or not 1 <= int(ends[0]) <= int(ends[1]) <= N_SPACE_GROUPS
        ):
            raise InputError(f"--groups: must be numbers in 1..230 as 89,195-199, got {value!r}")
        numbers.update(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(numbers))


file_option = functools.partial(click.option, type=click.Path(path_type=Path), callback=_output_file)
wavelength_option = click.option(
    "--wavelength",
    "--radiation",
    callback=_wavelength,
    metavar="Å|NAME",
    help="Angstrom, or a name such as CuKa1, CuKa (the doublet), MoKa1, CoKa1.",
)


def model_option(default: str) -> Callable[[Any], Any]:
    """--model, and the weights that a command takes without it."""
    return click.option(
        "--model",
        type=click.Path(path_type=Path),
        help="Run folder, model file, or weights that ship: lab; lab-small, a quarter of its work; sticks, for "
        f"calculated lines of inorganic crystals. Without it, {default}.",
    )
