"""Files that instruments wrote: each is read right, checked by other means, or refused with the reason."""

from __future__ import annotations

import bz2
import io
import re
import struct
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import xrdfast
from xrdfast.data.scans import Scan, read_all
from xrdfast.errors import InputError

CU = (1.5406, "file", "CuKa")
CU_XRDML = (1.540598, "file", "CuKa")
CU_XRDML_1 = (1.540598, "file", "CuKa1")
CU_RIGAKU = (1.540593, "file", "CuKa")
CU_RIGAKU_1 = (1.540593, "file", "CuKa1")
CO = (1.78897, "file", "CoKa")
ASSUMED = (1.54056, "assumed", "CuKa")

# file, scans, index, points, sum of counts, first and last angle, (wavelength, where from, radiation)
READ = [
    ("brml/23-012-AG_2thomegascan_long.brml", 1, 0, 2001, 13287743.1, 44.0, 48.0, CU),
    ("bruker_raw/BT86.raw", 1, 0, 2374, 918372, 3.0, 40.0002906, CU),
    ("bruker_raw/D5000_1.RAW", 1, 0, 3651, 1069383, 2.0, 75.0, CO),
    ("bruker_raw/D5000_2.RAW", 1, 0, 3651, 1780024, 2.0, 75.0, CO),
    ("bruker_raw/Keokuk_kaolinite.RAW", 2, 0, 4001, 594156, 10.0, 90.0, CU),
    ("bruker_raw/Keokuk_kaolinite.RAW", 2, 1, 3501, 560448, 80.0, 150.0, CU),
    ("bruker_raw/LaB6_Jan2018.raw", 1, 0, 3040, 10491778, 10.0, 70.0044472, CU),
    ("bruker_raw/LiCoO2.RAW", 1, 0, 4001, 2321705, 15.985, 135.985, CU),  # version 1
    (
        "bruker_raw/TwoTheta_scan_scrambled.raw",
        1,
        0,
        7134,
        2379282.04765,
        10.0,
        85.0412992,
        (1.5406, "file", "CuKa1"),
    ),
    ("bruker_raw/bruker.raw", 1, 0, 4059, 32881728, 37.0001, 120.004643, CU),
    (
        "bruker_raw/bruker4_diffrac_eva.raw",
        1,
        0,
        7134,
        2379282.04765,
        10.0,
        85.0412992,
        (1.5406, "file", "CuKa1"),
    ),
    ("bruker_raw/bruker4_v5converter.raw", 1, 0, 4059, 32881728, 37.0001, 120.004643, CU),
    ("bruker_raw/format1.raw", 3, 0, 101, 873, 10.0, 20.0, CU),
    ("bruker_raw/format1.raw", 3, 1, 26, 169, 30.0, 35.0, CU),
    ("bruker_raw/format1.raw", 3, 2, 51, 390, 40.0, 45.0, CU),
    (
        "cif_with_pattern/br1322Isup2.rtv.combined.cif",
        1,
        0,
        9652,
        12479845,
        15.016,
        89.975,
        (1.54056, "file", "CuKa1"),
    ),
    (
        "cif_with_pattern/sh0123Xraysup5.rtv.combined.cif",
        1,
        0,
        2001,
        3085528,
        10.0,
        110.0,
        (1.540562, "file", "CuKa"),
    ),
    ("csv/dsmo.csv", 1, 0, 5501, 1792515, 10.0, 120.0, ASSUMED),
    ("dat/D1A5.dat", 1, 0, 1579, 342925.2, 0.1, 157.9, ASSUMED),
    ("dat/LiCoO2.dat", 1, 0, 4001, 2321705, 16.0, 136.0, ASSUMED),
    ("dat/PSI_DMC.dat", 1, 0, 3200, 26992221, 2.948, 162.898, (1.494, "file", "")),
    ("fxye/11bmb_6231.fxye", 1, 0, 49497, 13629449.94, 0.5, 49.996, (0.413529, "file", "")),
    ("gsas/NIST660CBI.gsas", 1, 0, 8378, 6749509, 15.0066, 124.9991231, ASSUMED),
    ("gsas/Quinoli.gda", 1, 0, 7361, 2281897.5, 7.5, 36.94, ASSUMED),
    ("gsas/gsas.raw", 1, 0, 4941, 6172227, 16.0, 99.98, ASSUMED),
    ("ras/Cr-Zn.ras", 1, 0, 3001, 103157, 10.0, 70.0, CU_RIGAKU),
    ("ras/HoB21.ras", 1, 0, 3001, 230099, 10.0, 70.0, CU_RIGAKU),
    ("ras/La1.75Sr0.25CuO4.ras", 1, 0, 4001, 301827, 5.0, 85.0, CU_RIGAKU),
    ("ras/inas_layer_radial_002_004.ras.bz2", 2, 0, 1501, 828530065.1, 26.5, 32.5, CU_RIGAKU_1),
    ("ras/inas_layer_radial_002_004.ras.bz2", 2, 1, 2501, 1889010130, 56.0, 66.0, CU_RIGAKU_1),
    ("rasx/Omega-2Theta_scan_high_temperature.rasx", 1, 0, 1042, 21844.99624, 44.0, 48.9968, CU_RIGAKU_1),
    ("rasx/TwoTheta_scan_powder.rasx", 1, 0, 2726, 149926.8534, 10.0, 119.0, CU_RIGAKU_1),
    ("rasx/sample.rasx", 1, 0, 2334, 2717013.664, 10.0, 79.99, CU_RIGAKU),
    ("rigaku_or_other_raw/Cu3Au-1.raw", 1, 0, 3901, 59299, 22.0, 100.0, CU),
    ("stoe_raw/stoe.raw", 1, 0, 5404, 12964626, 10.0, 91.045, (1.20793, "file", "")),
    ("uxd/BT86_.UXD", 1, 0, 2374, 918372, 3.0, 40.0, CU),
    ("uxd/LiCoO2.UXD", 1, 0, 4001, 2321705, 15.985, 135.985, CU),
    ("xrdml/CoO-WO3_900C_60min.xrdml", 1, 0, 8301, 7714779, 9.90343322, 100.09488522, CU_XRDML),
    ("xrdml/Cr2O3-2MnO_1100C_60min.xrdml", 1, 0, 8301, 20439239, 9.90343322, 100.09488522, CU_XRDML),
    ("xrdml/XRD-918-16_10.xrdml", 1, 0, 5027, 3643728, 4.00656514, 69.99936587, CU_XRDML),
    ("xrdml/empyrean.xrdml", 1, 0, 196, 1814, 30.05, 41.75, CU_XRDML),
    ("xrdml/m54313_om2th_10.xrdml", 1, 0, 1800, 416528, 26.025, 79.995, CU_XRDML_1),  # behind germanium
    ("xrdml/rsm_1.xrdml.bz2", 401, 0, 255, 481, 67.67550446, 69.5810955, CU_XRDML_1),
    ("xrdml/sample.xrdml", 1, 0, 5027, 3643728, 4.00656514, 69.99936587, CU_XRDML),
    ("xy/D5000_1.xy", 1, 0, 3651, 1069383, 2.0, 75.0, ASSUMED),
    ("xy/D5000_2.xy", 1, 0, 3651, 1780024, 2.0, 75.0, ASSUMED),
    ("xy/MnO.xy", 1, 0, 9001, 15756817, 10.0, 100.0, ASSUMED),
    ("xy/TiO2+MnO.xy", 1, 0, 9001, 11470923, 10.0, 100.0, ASSUMED),
    ("xy/quartz.xy", 1, 0, 1693, 109012, 4.00973, 69.85199, ASSUMED),
    ("xy/with_sigma.txt", 1, 0, 3, 119, 20.0, 20.04, ASSUMED),
    ("xy/xy_text.txt", 1, 0, 4001, 171142, 20.0, 100.0, ASSUMED),
    ("xye/LaB6_d500_si_psd.xye.bz2", 1, 0, 17381, 6527726.147, 4.57208, 150.5783, ASSUMED),
    ("xye/x3lactos.xye", 1, 0, 4776, 4930667, 3.0, 26.875, ASSUMED),
]
NO_PROFILE = (
    "profile: must be a measured powder profile, got a CIF without one.* .recognised as CIF; .*export it"
)
AS_COLUMNS = ".* .recognised as columns of text; .*export it as two columns"
REFUSED = {
    "cif/1550397.cif": NO_PROFILE,
    "cif/dsmo-raw.cif": NO_PROFILE,
    "cif_malformed/ABAVIJ_freeONLY.cif": NO_PROFILE,
    "cif_malformed/ABEXEM_freeONLY.cif": NO_PROFILE,
    "cif_malformed/ABEXIQ_freeONLY.cif": NO_PROFILE,
    "cif_malformed/ABEXOW_freeONLY.cif": NO_PROFILE,
    "cif_malformed/ABEXUC_freeONLY.cif": NO_PROFILE,
    "csv/single.csv": "point 1376: two_theta must be above that of the point before" + AS_COLUMNS,
    "csv/test1.csv": "point 1: two_theta must be between 0 and 180 degrees, got 610" + AS_COLUMNS,
    "csv/test2.csv": "points: must be at least 2 lines of two or three numbers" + AS_COLUMNS,
    "csv/test3.csv": "point 9: two_theta must be between 0 and 180 degrees, got -3" + AS_COLUMNS,
    "csv/test4.csv": "point 5: intensity must be >= 0 in a list of lines" + AS_COLUMNS,
    "csv/with_commas.txt": "points: must be at least 2 lines of two or three numbers" + AS_COLUMNS,
}


@pytest.fixture(scope="module")
def formats(shared_data: Path) -> Path:
    return shared_data / "raw_formats"


@pytest.mark.parametrize("row", READ, ids=lambda row: f"{row[0]}#{row[2]}")
def test_read_right(formats, row):
    name, n_scans, index, n_points, total, first, last, radiation = row
    scan = xrdfast.read(formats / name, scan=index)
    assert scan.n_scans == n_scans and scan.scan == index and scan.path == str(formats / name)
    assert len(scan.two_theta) == len(scan.intensity) == n_points
    np.testing.assert_allclose(scan.intensity.sum(), total, rtol=1e-9)
    np.testing.assert_allclose([scan.two_theta[0], scan.two_theta[-1]], [first, last], rtol=0, atol=6e-7)
    assert (scan.wavelength, scan.wavelength_source, scan.radiation) == radiation
    assert scan.two_theta.dtype == scan.intensity.dtype == np.float64
    assert (np.diff(scan.two_theta) > 0.0).all() and scan.intensity.min() >= 0.0


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_it_is_and_what_to_do(formats, name):
    with pytest.raises(InputError, match=REFUSED[name]) as caught:
        xrdfast.read(formats / name)
    assert str(caught.value).startswith(f"{formats / name}: ") and "\n" not in str(caught.value)


def test_no_file_is_left_out(formats):
    files = {path.relative_to(formats).as_posix() for path in formats.glob("*/*")}
    assert files == {row[0] for row in READ} | set(REFUSED)


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ("bruker_raw/LiCoO2.RAW", "uxd/LiCoO2.UXD", 0.0),
        ("bruker_raw/LiCoO2.RAW", "dat/LiCoO2.dat", 0.015),  # half a step: the .dat was rounded to 16.000
        ("bruker_raw/BT86.raw", "uxd/BT86_.UXD", 0.0051),  # two decimals above 10 degrees
        ("bruker_raw/D5000_1.RAW", "xy/D5000_1.xy", 0.0),
        ("bruker_raw/D5000_2.RAW", "xy/D5000_2.xy", 0.0),
    ],
)
def test_the_same_scan_in_two_formats_agrees(formats, one, other, apart):
    one, other = xrdfast.read(formats / one), xrdfast.read(formats / other)
    np.testing.assert_array_equal(one.intensity, other.intensity)
    np.testing.assert_allclose(one.two_theta, other.two_theta, rtol=0, atol=apart + 1e-6)
    if other.wavelength_source == "file":
        assert one.wavelength == other.wavelength and one.radiation == other.radiation


def test_several_scans_are_listed_and_one_is_chosen(formats):
    path = formats / "bruker_raw/format1.raw"
    with pytest.raises(
        InputError, match=r"scan: must be chosen in a file of 3: 0 \(.*101 points from 10 to 20 "
    ) as e:
        xrdfast.read(path)
    assert "2 (" in str(e.value) and "51 points from 40 to 45 degrees" in str(e.value)
    with pytest.raises(InputError, match=r"scan: must be in 0..2, got 3"):
        xrdfast.read(path, scan=3)
    assert [len(scan.two_theta) for scan in read_all(path)] == [101, 26, 51]
    with pytest.raises(InputError, match=r"file of 401: 0 .*; and 393 more$"):
        xrdfast.read(formats / "xrdml/rsm_1.xrdml.bz2")


def content(path: Path) -> bytes:
    data = path.read_bytes()
    return bz2.decompress(data) if path.suffix == ".bz2" else data


def parsed_otherwise(path: Path, index: int) -> np.ndarray:
    """Intensities by the shortest other way: struct, ElementTree, or splitting text."""
    data, suffix = content(path), path.name.removesuffix(".bz2").rpartition(".")[2].lower()
    if data.startswith(b"RAW1.01"):
        at = 712
        for _ in range(index + 1):
            header, n_points = struct.unpack_from("<II", data, at)
            begin = at + header + struct.unpack_from("<I", data, at + 256)[0]
            at = begin + 4 * n_points
        return np.frombuffer(data, "<f4", n_points, begin)
    if data.startswith(b"RAW4.00"):  # one range, to the end of the file
        n_points, stride = (4059, 1) if len(data) < 30_000 else (7134, 2)
        return np.frombuffer(data[len(data) - 4 * n_points * stride :], "<f4")[::stride]
    if suffix == "xrdml":
        found = list(ElementTree.fromstring(data).iter())
        counts = [e for e in found if e.tag.endswith(("}intensities", "}counts"))]
        factors = [e for e in found if e.tag.endswith("}beamAttenuationFactors")]
        factor = np.array(factors[index].text.split(), float) if factors else 1.0
        return factor * np.array(counts[index].text.split(), float)
    if suffix == "brml":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            root = ElementTree.fromstring(archive.read("Experiment0/RawData0.xml"))
        return np.array([float(datum.text.split(",")[-1]) for datum in root.iter("Datum")])
    if suffix == "rasx":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            rows = archive.read("Data0/Profile0.txt").decode("utf-8-sig").split()
        return np.array(rows[1::3], float) * np.array(rows[2::3], float)
    if suffix == "ras":
        block = data.split(b"*RAS_INT_START")[1 + index].split(b"*RAS_INT_END")[0].split()
        return np.array(block[1::3], float) * np.array(block[2::3], float)
    if suffix == "uxd":
        rows = re.split(rb"_(?:2THETA)?COUNTS\r?\n", data)[1].split()
        return np.array(rows[1::2] if b"_2THETACOUNTS" in data else rows, float)
    if suffix in ("gsas", "gda", "fxye") or path.name == "gsas.raw":
        _, body = re.split(rb"BANK[^\n]*\n", data)
        width = {"gda": 2, "fxye": 3}.get(suffix, 1)
        rows = np.array(body.split(), float)
        return rows[1::3] if width == 3 else rows[::width]
    if path.name == "stoe.raw":
        return np.frombuffer(data, "<i4", 5404, 6 * 512 - 512)
    pytest.skip("no second way is written for it")


@pytest.mark.parametrize("row", READ, ids=lambda row: f"{row[0]}#{row[2]}")
def test_intensities_by_other_means(formats, row):
    expected = parsed_otherwise(formats / row[0], row[2])
    scan: Scan = xrdfast.read(formats / row[0], scan=row[2])
    np.testing.assert_array_equal(scan.intensity, np.maximum(expected, 0.0))


@pytest.mark.parametrize("name", ["xrdml/CoO-WO3_900C_60min.xrdml", "rasx/sample.rasx", "uxd/BT86_.UXD"])
def test_title_and_format(formats, name):
    scan = xrdfast.read(formats / name)
    known = {
        "xrdml": ("PANalytical XRDML", "PG_0849_1"),
        "rasx": ("Rigaku RASX", ""),
        "uxd": ("Bruker UXD", "BT86"),
    }
    expected, title = known[name.partition("/")[0]]
    assert scan.format == expected and scan.title.startswith(title)
