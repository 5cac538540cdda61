"""Verbs about this machine: doctor, build."""

from __future__ import annotations

import json

import click

from xrdfast import __version__
from xrdfast.cli.group import cli

_PACKAGES = (
    "numpy",
    "safetensors",
    "spglib",
    "gemmi",
    "pymatgen",
    "matplotlib",
    "click",
    "rich",
    "pyarrow",
    "jinja2",
    "geddes",
    "ase",
    "tensorboard",
    "h5py",
    "ray",
    "onnx",
    "onnxscript",
    "onnxruntime",
)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """What is found on this machine, what is used, and why."""
    from importlib.metadata import PackageNotFoundError, version

    from xrdfast import _native
    from xrdfast.terminal import print_table

    found = {"xrdfast": __version__} | {name: str(value) for name, value in _native.status().items()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        print_table(("what", "found"), list(found.items()))


@cli.command()
def build() -> None:
    """Compiles the native code now instead of at first use."""
    from xrdfast import _native

    for path in _native.build():
        click.echo(str(path))
