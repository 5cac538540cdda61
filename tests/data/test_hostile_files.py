"""Hostile and broken files: refused in one line, within bounded memory and time, and nothing followed or run."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import re
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import pytest

import xrdfast
from tests.data import formats_written as written
from xrdfast.data.formats import bounded, bruker
from xrdfast.errors import InputError

PEAK = 600  # MB, of the whole process; the worst met is 310
TIME = 30.0  # seconds of processor time for one file; the worst met is 2.3
MB = 1 << 20

READ = r"""
import json, re, sys, time
from pathlib import Path
import xrdfast
answers = {}

def peak():
    # Of this program alone: ru_maxrss would begin with the peak of the process that started it.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

for path in sys.argv[1:]:
    start = time.process_time()
    try:
        xrdfast.read(path)
        answer = "read"
    except xrdfast.InputError as error:
        answer = str(error)
    used = time.process_time() - start
    answers[path] = answer, used, peak()
print(json.dumps(answers))
"""


def deflated(n_bytes: int, unit: bytes = bytes(MB)) -> bytes:
    """Gzip of many equal megabytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([packer.compress(unit) for _ in range(n_bytes // len(unit))]) + packer.flush()


def bomb(member: str, **others: str) -> bytes:
    """A small archive with a member of 200 MB."""
    return written.archive({**others, member: b"<a>" + bytes(200 * MB)})


LAUGHS = b"""<?xml version="1.0"?><!DOCTYPE xrdMeasurements [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]><xrdMeasurements>&c;</xrdMeasurements>"""
EXTERNAL = LAUGHS.replace(b'<!ENTITY a "ha">', b'<!ENTITY a SYSTEM "file:///etc/passwd">')
TABLE = "<D><RawDataReferenceList><string>RawData0.xml</string></RawDataReferenceList></D>"
CRYSTAL = f"_diffrn_radiation_monochromator 'Ge{' ' * 200_000}x'\n"
LONG_HEADER = b"_FILEVERSION=1\n" + b"".join(b"_K%d=%s\n" % (i, b"x" * 900) for i in range(240))
CASES = {
    "gzip.xy.gz": (lambda: deflated(1024 * MB), "size: must be at most 67108864 bytes"),
    "bzip.xy.bz2": (lambda: bz2.compress(bytes(100 * MB)), "size: must be at most 67108864 bytes"),
    "streams.gz": (lambda: gzip.compress(b"") * 100_000, "in 100 streams"),
    "twice.gz": (
        lambda: gzip.compress(gzip.compress(b"10 1\n20 2\n")),
        "format: must be known, got binary data",
    ),
    "bomb.brml": (lambda: bomb("RawData0.xml", **{"DataContainer.xml": TABLE}), "bytes unpacked, got more"),
    "bomb.rasx": (lambda: bomb("Data0/Profile0.txt", **{"root.xml": "<R/>"}), "bytes unpacked, got more"),
    "laughs.xrdml": (lambda: LAUGHS, "document: must have no document type, got a DOCTYPE"),
    "external.xrdml": (lambda: EXTERNAL, "document: must have no document type, got a DOCTYPE"),
    "deep.xrdml": (lambda: b"<xrdMeasurements>" + b"<a>" * 100_000, "must be nested at most 100 deep"),
    "tags.xrdml": (lambda: b"<xrdMeasurements>" + b"<a/>" * (15 * MB), "must have at most 1000000 elements"),
    "one-scan.xrdml": (
        lambda: written.xrdml().replace(b"3 5 4 9", b"1 " * (20 * MB)),
        "scan: must be at most 8388608 bytes",
    ),
    "line.xy": (lambda: b"1 " * (30 * MB), "points: must be at least 2 lines"),
    "short-lines.xy": (lambda: b"1 1\n" * (15 * MB), "lines: must be at most 1000000"),
    "empty-lines.xy": (lambda: b"\n" * (60 * MB), "lines: must be at most 1000000"),
    "comments.xy": (lambda: b"#\n" * 900_000, "points: must be at least 2 lines"),
    "header.raw": (lambda: b"RAW1.01" + b"\xff" * (20 * MB), "ranges: must be 1..4096"),
    "ranges.raw": (lambda: b"RAW " + bytes(20 * MB), "step: must be > 0 degrees"),
    "starts.ras": (lambda: b"*RAS_HEADER_START\n" * (3 * MB), "scans: must be at most 4096"),
    "blanks.ras": (
        lambda: b"*RAS_HEADER_START\n*KEY" + b" " * (7 * MB) + b"\n",
        "must end with .RAS_INT_END",
    ),
    "banks.gsas": (lambda: b"BANK 1 9 9 CONST 1 1 0 0 STD\n" * MB, "banks: must be 1..4096"),
    "counts.gsas": (
        lambda: b"t\nBANK 1 9 9 CONST 1 1 0 0 STD\n" + b"1 " * (3 * MB),
        "unexpected data beyond",
    ),
    "counts.uxd": (lambda: written.uxd() + b"1 1\n" * MB, "points: must be at most 262144"),
    "values.cif": (
        lambda: written.pdcif("range") + b"1\n" * (3 * MB),
        "_pd_meas_2theta_range: must be that of",
    ),
    "large.cif": (
        lambda: written.pdcif() + b"#" * (20 * MB),
        "size: must be at most 8388608 bytes for a CIF",
    ),
    "block.cif": (lambda: b"data_" + b" " * MB + b"'\n", "file: must follow the CIF grammar"),
    "name.cif": (
        lambda: b"data_a\n_space_group_name_Hall P" + b" " * MB + b"'\n",
        "file: must follow the CIF grammar",
    ),
    "crystal.cif": (
        lambda: written.pdcif(radiation=f"_diffrn_radiation_wavelength 1.5406\n{CRYSTAL}"),
        "^read$",
    ),
    "header.uxd": (
        lambda: LONG_HEADER + b"_COUNTS\n1 2\n3 4\n_A=1\n" * 4096,
        "scan: must be chosen in a file of 4096",
    ),
    "keys.uxd": (
        lambda: b"_FILEVERSION=1\n" + b"".join(b"_K%d=1\n" % i for i in range(300)),
        "header: must have at most 250 keys",
    ),
    "steps.dat": (
        lambda: b"1.0 0.000001 100.0\n" + b"1 " * (30 * MB),
        "must be two or three numbers|at least 2",
    ),
}


def test_memory_and_time_are_bounded(tmp_path: Path):
    for name, (write, _) in CASES.items():
        (tmp_path / name).write_bytes(write())
    sparse = tmp_path / "sparse.raw"
    with open(sparse, "wb") as file:
        file.write(b"RAW1.01")
        file.truncate(2 << 30)
    paths = [str(sparse), *(str(tmp_path / name) for name in CASES)]
    done = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout)
    expected = {"sparse.raw": "size: must be at most 67108864 bytes, got 2147483648"}
    expected |= {name: message for name, (_, message) in CASES.items()}
    for path, (answer, used, peak) in answers.items():
        name = Path(path).name
        assert re.search(expected[name], answer), (name, answer)
        assert "\n" not in answer and len(answer) < 1000
        assert used < TIME and peak < PEAK, (name, used, peak)


def test_a_member_listed_many_times_is_read_once():
    listed = "<string>RawData0.xml</string>" * 4000
    table = f"<D><RawDataReferenceList>{listed}</RawDataReferenceList></D>"
    raw = "<RawData>" + "<a/>" * 300_000 + "</RawData>"
    start = time.process_time()
    scans = bruker.read_brml(written.archive({"DataContainer.xml": table, "RawData0.xml": raw}))
    assert len(scans) == 1 and time.process_time() - start < TIME


def test_comments_are_passed_over_once():
    """Each could match in two ways: 40 would take hours if all of them were tried."""
    program = (
        "from xrdfast.data.formats import recognise; print(recognise(b'; comment\\r\\n' * 40 + b'1 1\\n')[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=TIME
    )
    assert done.stdout == "columns of text\n"


def test_a_directory_of_an_archive_is_bounded(tmp_path: Path):
    path = tmp_path / "scan.brml"
    path.write_bytes(
        written.archive({"DataContainer.xml": TABLE} | {chr(97 + i) * 60_000: "" for i in range(18)})
    )
    with pytest.raises(InputError, match="archive: must have a directory of at most 1048576 bytes, got"):
        xrdfast.read(path)
    plain = written.brml()
    end = plain.rindex(b"PK\x05\x06")
    size, start = struct.unpack_from("<II", plain, end + 12)
    for stated in (size, 1 << 40):
        numbers = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, stated, start)
        locator = b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1)
        path.write_bytes(plain[:end] + b"PK\x06\x06" + numbers + locator + plain[end:])
        if stated == size:
            assert len(xrdfast.read(path).two_theta) > 1
        else:
            with pytest.raises(InputError, match="archive: must"):
                xrdfast.read(path)


def test_members_may_lie_about_their_size_or_use_other_methods(tmp_path: Path):
    path = tmp_path / "scan.brml"
    data = written.archive({"DataContainer.xml": TABLE, "RawData0.xml": "<a/>"}, zipfile.ZIP_LZMA)
    path.write_bytes(data)
    with pytest.raises(InputError, match="archive: must be stored or deflated"):
        xrdfast.read(path)
    data = bytearray(written.brml())
    for at in (data.index(b"PK\x03\x04") + 14, data.index(b"PK\x01\x02") + 16):  # its checksum
        data[at] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match="archive: must be a whole ZIP file, got Bad CRC-32"):
        xrdfast.read(path)


def test_names_and_links(tmp_path: Path):
    loop = tmp_path / "loop.xy"
    loop.symlink_to(loop)
    with pytest.raises(InputError, match="file: must be readable, got Too many levels"):
        xrdfast.read(loop)
    pipe = tmp_path / "pipe.xy"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="file: must be a regular file"):
            xrdfast.read(path)
    with pytest.raises(InputError, match="file: must be readable, got embedded null"):
        xrdfast.read("a\0b.xy")
    for name in ("new\nline.xy", "esc\x1b[31m.xy"):
        path = tmp_path / name
        path.write_text("10 1\n10 2\n")
        with pytest.raises(InputError) as caught:
            xrdfast.read(path)
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
        path.write_text("10 1\n20 2\n")
        assert xrdfast.read(path).path == str(path)


def test_nothing_is_left_open(tmp_path: Path):
    (tmp_path / "scan.xy").write_text("10 1\n20 2\n")
    before = len(os.listdir("/dev/fd"))
    for path in (tmp_path / "scan.xy", tmp_path, tmp_path / "absent"):
        for _ in range(3):
            try:
                xrdfast.read(path)
            except InputError:
                continue
    assert len(os.listdir("/dev/fd")) == before


def test_a_panic_of_the_library_is_an_error(monkeypatch):
    """Rust's panics come as exceptions that are no Exception; other such exceptions pass."""
    import geddes

    from xrdfast.data.formats.geddes_reader import read_points

    class PanicException(BaseException):
        pass

    for error, expected in ((PanicException, InputError), (KeyboardInterrupt, KeyboardInterrupt)):

        def fail(*_: object, error: type[BaseException] = error, **__: object) -> None:
            raise error("index out of bounds")

        monkeypatch.setattr(geddes, "read_bytes", fail)
        with pytest.raises(expected):
            read_points(b"", ".raw")


def test_truncated_streams(tmp_path: Path):
    path = tmp_path / "scan.gz"
    for packed in (gzip.compress(written.columns()), bz2.compress(written.columns())):
        path.write_bytes(packed[:-5])
        with pytest.raises(InputError, match=r"file: must be whole (gzip|bzip2) data"):
            xrdfast.read(path)
        path.write_bytes(packed[:20] + bytes(len(packed)))
        with pytest.raises(InputError, match=r"file: must be whole (gzip|bzip2) data"):
            xrdfast.read(path)


def test_unzip_keeps_the_first_of_equal_names():
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = written.archive({"a": b"1"})
        import io

        buffer = io.BytesIO(data)
        with zipfile.ZipFile(buffer, "a") as file:
            file.writestr("a", b"2")
    assert bounded.unzip(buffer.getvalue(), lambda name: True) == {"a": b"1"}
