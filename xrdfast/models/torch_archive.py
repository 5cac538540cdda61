"""Reads tensors out of a `torch.save` file without executing anything from it.

For files of unknown origin that hold whole pickled modules. Such a file is a program for Python's pickle
machine, and unpickling runs it; here its opcodes are only parsed (`pickletools.genops`) and carried out by a
small machine that can build containers, tensors and inert records of objects, and nothing else: it imports no
name and calls no function that the file states. Not for writing files, and not for what the tensors mean
(`published_checkpoint.py`).

Source: the pickle opcodes as documented in CPython's `pickletools`; the archive layout (`data.pkl`,
`data/<key>`, `byteorder`) of `torch.serialization`.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from xrdfast.errors import InputError

MAX_PICKLE_BYTES = 2**20  # the pickle holds names and shapes only; the published one has some 60 kB
MAX_DIMENSIONS = 8

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LITERALS = frozenset(
    [
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINBYTES",
        "SHORT_BINBYTES",
    ]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class NamedGlobal:
    """A class or function that the file names; it is never looked up."""

    module: str
    name: str


@dataclass(eq=False)
class InertObject:
    """What the file states about an object: the name of its class and its attributes. It has no behaviour."""

    kind: NamedGlobal
    state: dict[str, object] = field(default_factory=dict)


def read_torch_archive(path: str | Path) -> object:
    """Reads the object that `torch.save` wrote.

    Args:
        path: file in torch's zip format (the default since torch 1.6).

    Returns:
        Dicts (also for ordered ones), lists (also for sets), tuples, numbers, strings, tensors on the CPU,
        and `InertObject` for everything else. Tensors may share memory, as they did when they were saved.

    Raises:
        InputError: the file is missing, cut short or in another format, or it asks for anything that is not a
            tensor, a container or an object without behaviour.
    """
    path = Path(path)
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise InputError(
                    f"{path}: format: must be a whole file of torch.save in zip format (torch 1.6 or newer), "
                    f"got {'an empty file' if file_size == 0 else 'another format, or a file cut short'}"
                )
            with zipfile.ZipFile(file) as archive:
                return _Machine(path, _Archive(path, archive, file_size)).run()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: file: must be readable, got {error.strerror or error}") from error
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise InputError(
            f"{path}: archive: must be undamaged, got {type(error).__name__} ({error})"
        ) from error


class _Archive:
    """The members of the zip file, each read at most once, never more bytes than the file has."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, file_size: int) -> None:
        self.path = path
        self.archive = archive
        self.bytes_left = file_size
        self.members = {info.filename: info for info in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in self.members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InputError(f"{path}: data.pkl: must be there once, got {len(roots)}")
        self.root = roots[0]
        if f"{self.root}byteorder" in self.members and self.read("byteorder", 16) != b"little":
            raise InputError(f"{path}: byteorder: must be little, got another")
        self.storages: dict[str, Tensor] = {}

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Bytes of one uncompressed member."""
        info = self.members.get(self.root + name)
        if info is None:
            raise InputError(f"{self.path}: {name}: must be in the archive, got none")
        if info.compress_type != zipfile.ZIP_STORED:
            raise InputError(
                f"{self.path}: {name}: must be stored uncompressed, as torch does, got it compressed"
            )
        limit = self.bytes_left if limit is None else min(limit, self.bytes_left)
        if info.file_size > limit:
            raise InputError(f"{self.path}: {name}: must have at most {limit} bytes, got {info.file_size}")
        self.bytes_left -= info.file_size
        return self.archive.read(info)

    def storage(self, key: str, dtype: torch.dtype, n_elements: int) -> Tensor:
        """(n_elements,) tensor of one storage."""
        known = self.storages.get(key)
        if known is None:
            data = self.read(f"data/{key}")
            whole = len(data) // dtype.itemsize * dtype.itemsize
            known = (
                torch.frombuffer(bytearray(data[:whole]), dtype=dtype)
                if whole
                else torch.empty(0, dtype=dtype)
            )
            self.storages[key] = known
        if known.dtype != dtype or len(known) != n_elements:
            raise InputError(
                f"{self.path}: data/{key}: must hold {n_elements} numbers of {dtype} as stated in data.pkl, "
                f"got {len(known)} of {known.dtype}"
            )
        return known


class _Machine:
    """The part of the pickle machine that builds data; every other opcode and every other call is refused."""

    def __init__(self, path: Path, archive: _Archive) -> None:
        self.path = path
        self.archive = archive
        self.stack: list = []
        self.marked: list[list] = []  # stacks set aside by MARK
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        program = self.archive.read("data.pkl", MAX_PICKLE_BYTES)
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument)
        except InputError:
            raise
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = f"{type(error).__name__} ({str(error)[:80]})"
            raise InputError(f"{self.path}: data.pkl: must be a valid pickle, got {reason}") from error
        raise InputError(f"{self.path}: data.pkl: must end with STOP, got its end before")

    def step(self, name: str, argument: object) -> None:
        """Carries out one opcode."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("EMPTY_LIST", "EMPTY_SET"):
            stack.append([])
        elif name == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _TUPLE_SIZES:
            items = tuple(stack.pop() for _ in range(_TUPLE_SIZES[name]))
            stack.append(items[::-1])
        elif name in ("TUPLE", "FROZENSET"):
            items = self.pop_mark()
            self.stack.append(tuple(items))
        elif name == "APPEND":
            item = stack.pop()
            self.expect(stack[-1], list).append(item)
        elif name in ("APPENDS", "ADDITEMS"):
            items = self.pop_mark()
            self.expect(self.stack[-1], list).extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self.set_items(stack[-1], [key, value])
        elif name == "SETITEMS":
            items = self.pop_mark()
            self.set_items(self.stack[-1], items)
        elif name == "GLOBAL":
            stack.append(NamedGlobal(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            qualified, module = self.expect(stack.pop(), str), self.expect(stack.pop(), str)
            stack.append(NamedGlobal(module, qualified))
        elif name == "BINPERSID":
            stack.append(self.storage(self.expect(stack.pop(), tuple)))
        elif name == "REDUCE":
            arguments, function = self.expect(stack.pop(), tuple), stack.pop()
            stack.append(self.call(self.expect(function, NamedGlobal), arguments))
        elif name == "NEWOBJ":
            arguments, kind = self.expect(stack.pop(), tuple), self.expect(stack.pop(), NamedGlobal)
            if arguments:
                raise self.refused(kind)
            stack.append(InertObject(kind))
        elif name == "BUILD":
            state = self.expect(stack.pop(), dict)
            if not isinstance(stack[-1], dict):  # attributes of an ordered dict: versions, of no use here
                self.expect(stack[-1], InertObject).state.update(state)
        else:
            raise InputError(f"{self.path}: data.pkl: must only build data, got opcode {name}")

    def call(self, function: NamedGlobal, arguments: tuple) -> object:
        """Stands in for the few functions that torch.save writes calls of."""
        match (function.module, function.name, *arguments):
            case ("collections", "OrderedDict"):
                return {}
            case ("builtins" | "__builtin__", "set", list() as items):
                return items
            case ("torch", "Size", tuple() as size):
                return size
            case ("torch", "device", str()) | ("torch", "device", str(), int()):
                return InertObject(function)
            case ("torch._utils", "_rebuild_parameter", Tensor() as tensor, bool(), dict()):
                return tensor
            case (
                "torch._utils",
                "_rebuild_tensor_v2",
                Tensor() as storage,
                int() as offset,
                tuple() as size,
                tuple() as stride,
                bool(),
                dict(),
                *_,
            ):
                return self.tensor(storage, offset, size, stride)
        raise self.refused(function)

    def storage(self, identity: tuple) -> Tensor:
        """The storage that a persistent id ('storage', type, key, device, number of elements) names."""
        match identity:
            case ("storage", NamedGlobal("torch", kind), str() as key, str(), int() as n_elements) if (
                kind in _STORAGE_DTYPES
            ):
                return self.archive.storage(key, _STORAGE_DTYPES[kind], n_elements)
        raise InputError(f"{self.path}: data.pkl: must name storages of a known type, got another reference")

    def tensor(self, storage: Tensor, offset: int, size: tuple, stride: tuple) -> Tensor:
        """View of a storage; refused unless it lies inside and has no more elements than the storage."""
        numbers = (offset, *size, *stride)
        ok = len(size) == len(stride) <= MAX_DIMENSIONS and all(
            isinstance(n, int) and n >= 0 for n in numbers
        )
        if ok and math.prod(size) > 0:
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            ok = last < len(storage) and math.prod(size) <= len(storage)
        elif ok:
            offset = 0
        if not ok:
            raise InputError(
                f"{self.path}: data.pkl: tensors must lie inside their storage of {len(storage)} numbers, "
                "got one that does not"
            )
        return storage.as_strided(size, stride, offset)

    def pop_mark(self) -> list:
        """Items above the last mark."""
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def set_items(self, target: object, items: list) -> None:
        """Puts alternating keys and values into a dict."""
        target = self.expect(target, dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.expect(key, str | int)] = value

    def expect(self, value: object, kind: type) -> object:
        if not isinstance(value, kind):
            raise InputError(
                f"{self.path}: data.pkl: must be a pickle as torch.save writes it, "
                f"got {type(value).__name__} where {getattr(kind, '__name__', kind)} belongs"
            )
        return value

    def refused(self, function: NamedGlobal) -> InputError:
        name = f"{function.module}.{function.name}"[:80]
        return InputError(
            f"{self.path}: data.pkl: must only build tensors, containers and modules, got a call of {name}"
        )
