"""Files that are whole or absent: atomic writes, safetensors with checksums. Knows no format's meaning."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from xrdfast.errors import InputError


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name whole or not at all; what stood there stays until then.

    Raises:
        InputError: where the file system refuses (no space, no permission, no such folder).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: file: must be writable, got {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checked(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whose metadata carry a CRC-32 a tensor.

    Raises:
        InputError: where it cannot be written.
    """
    # Copies: safetensors refuses two names for one memory.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    crc = json.dumps({name: _crc(tensor) for name, tensor in tensors.items()})
    with write_atomically(path) as file:
        file.write(save(tensors, {**metadata, "crc32": crc}))


@contextlib.contextmanager
def open_safetensors(path: Path, format_name: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """An open safetensors file of one format, and its metadata.

    Raises:
        InputError: for a file that cannot be read, is cut short, or is of another format.
    """
    try:
        with open(path, "rb"):  # safe_open has no words for what can be wrong here
            pass
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format_name:
                got = metadata.get("format", "another safetensors file")
                raise InputError(f"{path}: format: must be {format_name}, got {got}")
            yield file, metadata
    except OSError as error:
        raise InputError(f"{path}: file: must be readable, got {error.strerror or error}") from error
    except SafetensorError as error:
        raise InputError(f"{path}: file: must be a whole safetensors file, got {error}") from error


def load_checked(path: Path, format_name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of what `save_checked` wrote, every checksum verified.

    Raises:
        InputError: for a file that cannot be read, is cut short, of another format, or was changed.
    """
    with open_safetensors(path, format_name) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    try:
        expected = json.loads(metadata.pop("crc32"))
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: metadata: must hold checksums, got {error}") from error
    for name, tensor in tensors.items():
        if _crc(tensor) != expected.get(name):
            raise InputError(f"{path}: {name}: must match its checksum, got other bytes")
    return tensors, metadata


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
