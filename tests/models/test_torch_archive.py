"""The restricted reader: what torch.save wrote comes back, and nothing in a hostile file is ever executed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xrdfast.errors import InputError
from xrdfast.models.torch_archive import InertObject, read_torch_archive


def write_archive(path: Path, program: bytes, storages: dict[str, bytes] | None = None, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def refused(path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        read_torch_archive(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < len(str(path)) + 400


class Reference:
    """Writes a persistent id, as torch.save does for a storage."""

    def __init__(self, *identity: object) -> None:
        self.identity = identity


def program_with_references(value: object) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            return item.identity if isinstance(item, Reference) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def rebuilt(*arguments: object) -> object:
    """Something whose pickle calls torch._utils._rebuild_tensor_v2 with these arguments."""

    class Call:
        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor_v2, arguments

    return Call()


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_round_trip(tmp_path, protocol):
    base = torch.arange(24.0).view(4, 6)
    saved = {
        "numbers": [1, -2, 300, 70000, 2**40, 1.5, True, None, "text", (1, 2, 3, 4)],
        "views": OrderedDict(rows=base[1:3], transposed=base.T, last=base[3, 5]),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "set": {3},
        "size": torch.Size([2, 3]),
        "bool": torch.tensor([True, False]),
        "bytes": torch.tensor([1, 2], dtype=torch.uint8),
        **{str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES},
    }
    torch.save(saved, tmp_path / "file.pt", pickle_protocol=protocol)
    got = read_torch_archive(tmp_path / "file.pt")
    assert got["numbers"] == saved["numbers"]
    assert got["set"] == [3] and got["size"] == (2, 3)
    assert got["empty"].shape == (0, 3)
    for name in ("rows", "transposed", "last"):
        assert torch.equal(got["views"][name], saved["views"][name])
    for name in ("parameter", "bool", "bytes", *map(str, DTYPES)):
        assert torch.equal(got[name], saved[name].detach()) and got[name].dtype == saved[name].dtype


def test_modules_become_inert(tmp_path):
    torch.save(torch.nn.Linear(2, 3), tmp_path / "file.pt")
    got = read_torch_archive(tmp_path / "file.pt")
    assert isinstance(got, InertObject) and got.kind.name == "Linear"
    assert got.state["_parameters"]["weight"].shape == (3, 2)


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize(
    ("function", "arguments"), [(os.system, ("touch {}",)), (eval, ("open('{}', 'w')",)), (open, ("{}", "w"))]
)
def test_calls_are_refused_and_not_executed(tmp_path, protocol, function, arguments):
    trace = tmp_path / "trace"
    call = Calls(function, *(a.format(trace) for a in arguments))
    for number, value in enumerate([call, {"rep": call}, [torch.zeros(2), call]]):
        path = tmp_path / f"file{number}.pt"
        if number < 2:
            write_archive(path, pickle.dumps(value, protocol))
        elif protocol >= 2:
            torch.save(value, path, pickle_protocol=protocol)
        else:
            continue
        refused(path, "data.pkl: must only build")
    assert not trace.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"(S'touch /nowhere'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch /nowhere'\no.",  # OBJ
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85\x81.",  # NEWOBJ with arguments
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x05\x97.",  # NEXT_BUFFER
        b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\nX\x01\x00\x00\x00a\x86R.",
    ],
)
def test_other_ways_to_call_are_refused(tmp_path, program):
    refused(write_archive(tmp_path / "file.pt", program), "data.pkl: must only build")


def test_setstate_of_a_named_class_does_nothing(tmp_path):
    program = b"\x80\x02csubprocess\nPopen\n)\x81}X\x04\x00\x00\x00argsX\x04\x00\x00\x00trues" + b"b."
    got = read_torch_archive(write_archive(tmp_path / "file.pt", program))
    assert type(got) is InertObject and got.state == {"args": "true"}


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02}",
        b"garbage",
        b"\x80\x02h\x07.",  # reads a memo entry that is not there
        b"\x80\x02e.",  # a list's end without its mark
        b"\x80\x02](K\x01u.",  # items of a dict into a list
        b"\x80\x02}(K\x01u.",  # a key without its value
        b"\x80\x02}(]K\x01u.",  # a key that cannot be hashed
        b"\x80\x02K\x01K\x02b.",
        b"\x80\x02cname_without_line_end",
        b"\x80\x02Q.",
        b"\x80\x02X\xff\xff\xff\x7fshort.",
        b"\x80\x02K\x01r\xff\xff\xff\xff0.",  # POP is not among the opcodes that torch.save writes
    ],
)
def test_damaged_programs_are_refused(tmp_path, program):
    refused(write_archive(tmp_path / "file.pt", program), "data.pkl: must")


def test_huge_memo_index_takes_no_memory(tmp_path):
    assert read_torch_archive(write_archive(tmp_path / "file.pt", b"\x80\x02K\x01r\xff\xff\xff\xff.")) == 1


@pytest.mark.parametrize("opening", [b"](", b"(", b"}X\x01\x00\x00\x00a"])
def test_deep_nesting_does_not_overflow(tmp_path, opening):
    closing = {b"](": b"e", b"(": b"t", b"}X\x01\x00\x00\x00a": b"s"}[opening]
    depth = 100_000
    program = b"\x80\x02" + opening * depth + b"K\x01" + closing * depth + b"."
    try:
        read_torch_archive(write_archive(tmp_path / "file.pt", program))
    except InputError as error:
        assert "data.pkl" in str(error)


def test_long_programs_are_refused(tmp_path):
    refused(
        write_archive(tmp_path / "file.pt", b"\x80\x02" + b"]" * 2**21 + b"."), "data.pkl: must have at most"
    )


FOUR = struct.pack("<4f", 1, 2, 3, 4)
STORAGE = ("storage", torch.FloatStorage, "0", "cpu", 4)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (3, (2,), (-1,)),
        (0, (10**12,), (0,)),
        (0, (2, 2), (1,)),
        (0, (2, 2), (2**62, 1)),
        (2**70, (1,), (1,)),
        (0, (1,) * 65, (1,) * 65),
        (0, ("2",), (1,)),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, offset, size, stride):
    program = program_with_references(
        rebuilt(Reference(*STORAGE), offset, size, stride, False, OrderedDict())
    )
    refused(write_archive(tmp_path / "file.pt", program, {"0": FOUR}), "data.pkl: tensors must lie inside")


@pytest.mark.parametrize(
    ("storage", "pattern"),
    [
        (("storage", torch.FloatStorage, "0", "cpu", 10**15), "data/0: must hold"),
        (("storage", torch.FloatStorage, "0", "cpu", -1), "data/0: must hold"),
        (("storage", torch.DoubleStorage, "0", "cpu", 4), "data/0: must hold"),
        (("storage", torch.FloatStorage, "1", "cpu", 4), "data/1: must be in the archive"),
        (("storage", torch.FloatStorage, "../../etc/passwd", "cpu", 4), "must be in the archive"),
        (("storage", torch.ComplexFloatStorage, "0", "cpu", 4), "known type"),
        (("module", torch.FloatStorage, "0", "cpu", 4), "known type"),
        (("storage",), "known type"),
        ("storage", "a pickle as torch.save writes it"),
    ],
)
def test_false_storages_are_refused(tmp_path, storage, pattern):
    reference = Reference(*storage)
    if isinstance(storage, str):
        reference.identity = storage
    program = program_with_references(rebuilt(reference, 0, (4,), (1,), False, OrderedDict()))
    refused(write_archive(tmp_path / "file.pt", program, {"0": FOUR}), pattern)


def test_compressed_members_are_refused(tmp_path):
    path = write_archive(tmp_path / "file.pt", b"\x80\x02}" + b"0" * 1000, compression=zipfile.ZIP_DEFLATED)
    refused(path, "stored uncompressed")


def test_other_byte_order_and_second_pickle_are_refused(tmp_path):
    path = write_archive(tmp_path / "big.pt", b"\x80\x02}.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    refused(path, "byteorder: must be little")
    path = write_archive(tmp_path / "two.pt", b"\x80\x02}.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02}.")
    refused(path, "data.pkl: must be there once")


def test_missing_empty_legacy_and_foreign_files(tmp_path):
    refused(tmp_path / "none.pt", "file: must be readable")
    refused(tmp_path, "file: must be readable")
    for name, content in {
        "empty": b"",
        "text": b"not a checkpoint",
        "pickle": pickle.dumps({"rep": 1}),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        refused(path, "format: must be")
    torch.save({"a": torch.ones(2)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "legacy.pt", "format: must be")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_never_raise_anything_else(tmp_path, data):
    buffer = io.BytesIO()
    torch.save({"rep": torch.nn.Linear(2, 3), "list": [torch.arange(4), "text", 1.5]}, buffer)
    content = bytearray(buffer.getvalue())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    try:
        read_torch_archive(path)
    except InputError as error:
        assert str(error).startswith(str(path))
