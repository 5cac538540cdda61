"""Paths to scans: containers agree with each other, and hostile ones are refused in one line each."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.data import formats_written as written
from tests.screening import scans_written
from tests.screening.scans_written import TWO_THETA, counts, write_folder, write_npz, write_tar
from xrdfast.bragg import Radiation
from xrdfast.data.formats.bounded import content_size
from xrdfast.data.scans import read, scan_of_points
from xrdfast.errors import InputError
from xrdfast.screening import preparation, sources
from xrdfast.screening.packed import PackedScans, pack
from xrdfast.screening.sources import Failure, Found, find_chunks, find_files, read_chunk


def read_paths(*paths: object) -> list[Found | Failure]:
    return [found for chunk in find_chunks(find_files(map(str, paths))) for found in read_chunk(chunk)]


def only_failure(*paths: object) -> str:
    (failure,) = read_paths(*paths)
    assert isinstance(failure, Failure) and "\n" not in failure.reason
    return failure.reason


def test_containers_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_SCANS", 2)
    h5py = pytest.importorskip("h5py")
    folder = write_folder(tmp_path / "folder", 3)
    write_tar(tmp_path / "plain.tar", 3)
    write_tar(tmp_path / "packed.tar.gz", 3)
    write_npz(tmp_path / "stack.npz", 3)
    with h5py.File(tmp_path / "stack.h5", "w") as file:
        file["intensity"] = np.stack([counts(seed) for seed in range(3)])
        file["two_theta"] = np.tile(TWO_THETA, (3, 1))
        file.attrs["wavelength"] = 1.54056
    pack(tmp_path / "all.scans.safetensors", (found.scan for found in read_paths(folder)))
    places = [folder, *(tmp_path / name for name in ("plain.tar", "packed.tar.gz", "stack.npz", "stack.h5"))]
    for place in [*places, tmp_path / "all.scans.safetensors"]:
        found = read_paths(place)
        assert len(found) == 3 and len({one.scan_id for one in found}) == 3, place
        for seed, one in enumerate(found):
            np.testing.assert_array_equal(one.scan.intensity, counts(seed))
            np.testing.assert_allclose(one.scan.two_theta, TWO_THETA, atol=2e-6)
            assert len(one.sha256) == 64
            assert one.scan.wavelength_source == ("file" if "stack" in str(place) else "assumed")
    assert read_paths(tmp_path / "plain.tar")[1].scan_id == f"{tmp_path}/plain.tar::run/0001.xy"
    assert read_paths(tmp_path / "stack.npz")[2].scan_id == f"{tmp_path}/stack.npz#2"


def test_packed_scans_keep_angles_wavelengths_and_names(tmp_path):
    lines = tmp_path / "lines.xy"
    lines.write_text("# wavelength 0.7\n10.1 5\n12.34567 100\n40 3\n")
    path = tmp_path / "some.scans.safetensors"
    assert pack(path, [read(lines), read(lines, wavelength="CoKa")]) == 2
    with PackedScans(path) as packed:
        scan = packed.scan(0)
        assert scan.two_theta.tolist() == [10.1, 12.34567, 40.0] and packed.name(1) == str(lines)
        assert (scan.wavelength, scan.wavelength_source) == (0.7, "file")
    with pytest.raises(InputError, match="must end in"):
        pack(tmp_path / "other.npz", [])


@pytest.mark.parametrize("cut", [0, 4, 40, 2000, -1])
def test_damaged_packed_scans(tmp_path, cut):
    path = tmp_path / "some.scans.safetensors"
    folder = write_folder(tmp_path / "folder", 1)
    pack(path, [read(folder / "0000.xy")])
    path.write_bytes(path.read_bytes()[:cut])
    assert "must be" in only_failure(path)


def test_chunks_end_where_there_is_enough_in_them(tmp_path, monkeypatch):
    """By what files hold unpacked: a chunk is in memory at once."""
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 100_000)
    text = (write_folder(tmp_path, 1) / "0000.xy").read_bytes()
    packed = {"a.xy": text, "b.brml": written.archive({"a": "0" * 90_000}), "c.gz": gzip.compress(text)}
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
    sizes = {path.name: content_size(path) for path in tmp_path.iterdir()}
    assert sizes["a.xy"] == len(text) and sizes["b.brml"] == 90_000
    assert len(packed["c.gz"]) < len(text) <= sizes["c.gz"]
    assert content_size(tmp_path / "none") == content_size(tmp_path) == 0
    names = [str(tmp_path / name) for name in ("0000.xy", "a.xy", "b.brml", "none", "0000.xy")]
    chunks = [[Path(path).name for path in chunk.paths] for chunk in find_chunks(names)]
    assert [name for part in chunks for name in part] == ["0000.xy", "a.xy", "b.brml", "none", "0000.xy"]
    assert len(chunks) > 1
    for part in chunks:
        assert len(part) == 1 or sum(sizes.get(name, 0) for name in part) <= 100_000


def test_points_of_a_chunk_are_bounded(tmp_path, monkeypatch):
    """Whatever files say about their sizes; those beyond are failures that say what to do."""
    folder = write_folder(tmp_path, 3)
    n_points = len(read(folder / "0000.xy").two_theta)
    monkeypatch.setattr(preparation, "_MAX_POINTS", 2 * n_points)
    (chunk,) = find_chunks(find_files([folder]))
    first, second, third = preparation.prepare_chunk(chunk, None, True)
    assert isinstance(first, preparation.Prepared) and isinstance(second, preparation.Prepared)
    assert isinstance(third, Failure) and "in files read together, got more; screen it alone" in third.reason


def test_intensities_beyond_single_precision(tmp_path):
    whole = read(write_folder(tmp_path, 1) / "0000.xy")
    usual = preparation.prepare_scan(whole, True)
    for factor in (1e-290, 1e290):
        scan = dataclasses.replace(whole, intensity=whole.intensity * factor)
        prepared = preparation.prepare_scan(scan, True)
        assert prepared.thumbnail == usual.thumbnail and prepared.notes == usual.notes
        assert prepared.intensity.max() == 1.0


def test_find_files(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "a", 2)
    (folder / ".hidden").write_text("")
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "new\nline.xy").write_text("10 1\n20 2\n")
    found = list(find_files([folder, str(folder / "*.xy"), folder / "none"]))
    assert sorted(map(os.path.basename, found)) == ["0000.xy", "0001.xy", "new\nline.xy", "none"]
    assert list(find_files([folder], lambda path: path == str(folder))) == []
    assert list(find_files(str(folder / "0000.xy"))) == [str(folder / "0000.xy")]  # not its letters
    assert "\\n" in read_paths(folder / "new\nline.xy" / "x")[0].reason


def test_folders_nested_deeper_than_calls(tmp_path):
    depth, folder = 1200, str(tmp_path)
    for _ in range(depth):
        os.mkdir(folder := f"{folder}/d")
    Path(folder, "a.xy").write_text("")
    (tmp_path / "z.xy").write_text("")
    assert list(map(os.path.basename, find_files([tmp_path]))) == ["a.xy", "z.xy"]
    os.remove(f"{folder}/a.xy")
    for _ in range(depth):  # pytest's own removal calls itself
        os.rmdir(folder)
        folder = os.path.dirname(folder)


def test_bytes_that_are_no_text_in_a_name(tmp_path):
    (tmp_path / "a\udcff.xy").write_text("10 1\n20 2\n30 1\n")
    (found,) = read_paths(tmp_path)
    assert found.scan_id.endswith("a\\xff.xy")
    found.scan_id.encode()


def test_hostile_tar(tmp_path):
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("/etc/absolute.xy", "../../up.xy", "good.xy"):
            content = scans_written.text(0).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    *bad, good = read_paths(path)
    assert [type(one) for one in bad] == [Failure] * 5 and isinstance(good, Found)
    assert not list(tmp_path.parent.glob("up.xy"))
    path.write_bytes(b"no tar at all" * 100)
    assert "archive: must be a whole tar file" in only_failure(path)
    assert "must be readable" in only_failure(tmp_path / "missing.tar")


def test_a_tar_header_that_asks_for_gigabytes(tmp_path):
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2 << 30
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf() + bytes(1 << 20)))
    assert "at most" in only_failure(path)


def test_a_truncated_tar_gives_what_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_SCANS", 2)
    for name in ("cut.tar", "cut.tar.gz"):
        path = write_tar(tmp_path / name, 4)
        path.write_bytes(path.read_bytes()[: 5 * path.stat().st_size // 8])
        *whole, _, last = read_paths(path)
        assert [type(one) for one in whole] == [Found] * 2 and isinstance(last, Failure)
        assert "archive: must be a whole tar file" in last.reason


def with_member(path: Path, name: str, data: bytes) -> None:
    """An NPZ stack, one of whose arrays is these bytes."""
    with zipfile.ZipFile(write_npz(path, 2)) as archive:
        members = {one: archive.read(one) for one in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for one, content in (members | {f"{name}.npy": data}).items():
            archive.writestr(one, content)


def with_header(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def changed(path: Path, where: bytes, by: bytes) -> None:
    data = path.read_bytes()
    assert data.count(where) == 1
    path.write_bytes(data.replace(where, by))


def npz_of_another_axis(path: Path) -> None:
    changed(write_npz(path, 2), TWO_THETA.tobytes(), (TWO_THETA + 1.0).tobytes())


def hdf5_of_a_damaged_axis(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file["intensity"] = np.stack([counts(seed) for seed in range(2)])
        options = {"chunks": TWO_THETA.shape, "compression": "gzip"}
        where = file.create_dataset("two_theta", data=TWO_THETA, **options).id.get_chunk_info(0).byte_offset
    data = path.read_bytes()
    path.write_bytes(data[:where] + bytes(50) + data[where + 50 :])


def packed_of_no_wavelength(path: Path) -> None:
    scan = scan_of_points(TWO_THETA, counts(0), path="a.xy", stated=Radiation(0.7123))
    pack(path, [scan])
    changed(path, np.float64(0.7123).tobytes(), np.float64(np.nan).tobytes())


def packed_of_a_long_name(path: Path) -> None:
    """Names as long as the file says: gigabytes of them take next to nothing on disk."""
    pack(path, [scan_of_points(TWO_THETA, counts(0), path="a" * 70_000, stated=Radiation(0.7123))])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("a.npz", npz_of_another_axis, "reader: must read the file, got BadZipFile"),
        (
            "a.npz",
            lambda path: with_member(path, "two_theta", with_header(b"{'descr': (\n")),
            "reader: must read the file, got TokenError",
        ),
        (
            "a.npz",
            lambda path: with_member(
                path,
                "intensity",
                with_header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 1701), }\n"),
            ),
            "intensity: must be (n_scans, n_points)",
        ),
        ("a.h5", hdf5_of_a_damaged_axis, "reader: must read the file, got OSError"),
        ("a.scans.safetensors", packed_of_no_wavelength, "wavelength: must be finite"),
        ("a.scans.safetensors", packed_of_a_long_name, "names: must be at most 65536 bytes each, got 70000"),
    ],
    ids=["axis.npz", "header.npz", "shape.npz", "axis.h5", "packed", "long name"],
)
def test_a_damaged_container_is_one_failure(tmp_path, name, damage, message):
    if name.endswith(".h5"):
        pytest.importorskip("h5py")
    damage(tmp_path / name)
    write_folder(tmp_path, 1)
    found = read_paths(tmp_path)
    (failure,) = (one for one in found if isinstance(one, Failure))
    assert len(found) == 2 and failure.file == str(tmp_path / name)
    assert message in failure.reason and "\n" not in failure.reason


def test_without_h5py_the_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (write_folder(tmp_path, 1) / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    failure, found = read_paths(tmp_path)
    assert isinstance(failure, Failure) and "got ModuleNotFoundError" in failure.reason
    assert isinstance(found, Found)


def test_a_compressed_tar_of_many_members_that_hold_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_SKIPPED", 1 << 20)
    path = tmp_path / "bomb.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("zeros.xy")
        info.size = 1 << 20
        for _ in range(30):
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    *before, last = read_paths(path)
    assert len(before) < 10 and "members: must end within" in last.reason


def test_an_npz_of_a_long_directory(tmp_path):
    path = write_npz(tmp_path / "long.npz", 1)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(18):
            archive.writestr(chr(ord("a") + i) * 60_000, "")
    assert "directory of at most" in only_failure(path)


def test_hostile_npz(tmp_path):
    path = tmp_path / "stack.npz"
    np.savez(path, intensity=np.array([[{}, 1]], dtype=object), two_theta=np.arange(2.0))
    assert "must be numbers" in only_failure(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("intensity.npy", bytes(70 << 20))
    assert "next to nothing" in only_failure(path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 1000)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("intensity.npy", header.getvalue())
    assert "must be whole" in only_failure(path)
    np.savez(path, other=np.arange(3))
    assert "intensity: must be there" in only_failure(path)
    path.write_bytes(b"PK\x03\x04 not an archive")
    assert "whole NumPy archive" in only_failure(path)


def test_hostile_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "stack.h5"

    def written(write) -> str:
        path.unlink(missing_ok=True)
        with h5py.File(path, "w") as file:
            file["two_theta"] = TWO_THETA
            write(file)
        return only_failure(path)

    def huge(file) -> None:
        file.create_dataset("intensity", (10**12, len(TWO_THETA)), "f4", chunks=(1, len(TWO_THETA)))

    def linked(file) -> None:
        file["intensity"] = h5py.ExternalLink("/etc/passwd", "x")

    def external(file) -> None:
        file.create_dataset("intensity", (1, 1701), "u1", external=[("/etc/passwd", 0, 1701)])

    assert "stored in full" in written(huge)
    assert "intensity: must be there" in written(linked)
    assert "stored elsewhere" in written(external)
    assert "must be of numbers" in written(lambda file: file.create_dataset("intensity", data=[[b"a", b"b"]]))
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert "whole HDF5 file" in only_failure(path)


def test_zip_bomb_and_pickle_among_files(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(80 << 20)))
    (tmp_path / "b.pickle").write_bytes(b"\x80\x04garbage")
    os.mkfifo(tmp_path / "c.xy")
    reasons = [failure.reason for failure in read_paths(tmp_path)]
    assert (
        len(reasons) == 3 and "at most" in reasons[0] and "pickle" in reasons[1] and "regular" in reasons[2]
    )


def test_names_of_files_are_paths(tmp_path):
    write_folder(tmp_path / "a", 1)
    (found,) = read_paths(Path(tmp_path))
    assert found.file == found.scan_id == f"{tmp_path}/a/0000.xy"
