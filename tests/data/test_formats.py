"""Every format from a small file written here: points, radiation, and what each reader refuses."""

from __future__ import annotations

import bz2
import gzip

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xrdfast
from tests.data import formats_written as written
from tests.data.formats_written import COUNTS, STEP, TWO_THETA, WRITTEN
from xrdfast.data.scans import Scan, read_all
from xrdfast.errors import InputError

GERMANIUM = '<monochromator name="Hybrid monochr. 2xGe(220) Cu asym."/>'


def read(tmp_path, content: bytes, name: str = "scan.any", **options) -> Scan:
    path = tmp_path / name
    path.write_bytes(content)
    return xrdfast.read(path, **options)


@pytest.mark.parametrize("key", WRITTEN)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_the_same_scan_comes_out_of_every_format(tmp_path, key, pack):
    name, write = WRITTEN[key]
    scan = read(tmp_path, pack(write()))  # the extension says nothing
    assert scan.format == name and (scan.scan, scan.n_scans) == (0, 1)
    np.testing.assert_allclose(scan.two_theta, TWO_THETA, atol=1e-9)
    np.testing.assert_array_equal(scan.intensity, COUNTS)
    expected = "assumed" if key in ("gsas", "start_step_stop", "columns") else "file"
    assert scan.wavelength_source == expected and scan.radiation == "CuKa" and scan.is_doublet
    assert 1.5405 < scan.wavelength < 1.5407
    assert scan.title == {"brml": "", "rasx": "", "raw2": "", "pdcif": "a", "start_step_stop": ""}.get(
        key, "a sample"
    )
    assert scan.notes == ()


@pytest.mark.parametrize(
    "content",
    [
        written.uxd("_CPS"),
        written.uxd("_2THETACOUNTS"),
        written.uxd("_2THETACPS"),
        written.gsas("ESD"),
        written.gsas("FXYE"),
        written.raw1(repeat=True),
        written.raw2(n_header=60),
        written.raw3(scan_type=2),
        written.raw4(b"Detector Scan"),
        written.stoe(width=2),
        written.pdcif("range"),
        written.pdcif(intensity="_pd_meas_intensity_total"),
        written.pdcif("range", "_pd_proc_intensity_net"),
        written.xrdml(counts="counts"),
        written.xrdml().decode().encode("utf-16"),
        b"\xef\xbb\xbf" + written.xrdml(),
        written.ras(axis="2-Theta/Omega"),
        written.start_step_stop("a title\nlambda= 1.54184\n"),
        written.columns(";", "2theta;counts\n"),
    ],
)
def test_variants(tmp_path, content):
    scan = read(tmp_path, content)
    np.testing.assert_allclose(scan.two_theta, TWO_THETA, atol=1e-9)
    np.testing.assert_array_equal(scan.intensity, COUNTS)
    assert scan.radiation == "CuKa"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (written.xrdml(GERMANIUM), (1.540598, "CuKa1")),
        (written.xrdml('<xRayMirror name="Inc. Beam Cu W/Si (parallel)"/>'), (1.540598, "CuKa")),
        (written.xrdml(intended="K-Beta"), (1.39225, "")),
        (written.brml(ratio=0.0), (1.5406, "CuKa1")),
        (written.rasx("Ka1"), (1.540593, "CuKa1")),
        (written.rasx("Kb"), (1.392246, "")),
        (written.raw3(ratio=0.0), (1.5406, "CuKa1")),
        (written.raw4(ratio=0.0), (1.5406, "CuKa1")),
        (written.uxd(extra="_WLRATIO=0\n"), (1.5406, "CuKa1")),
        (written.uxd(extra="_WL_UNIT='nm'\n_WL1=0.070931\n_WL2=0.071359\n"), (0.70931, "MoKa")),
        (written.gsas(title="# Calibrated wavelength = 0.413529"), (0.413529, "")),
        (written.pdcif(radiation="_diffrn_radiation_wavelength 1.5406\n"), (1.5406, "CuKa1")),
        (written.pdcif(radiation="_diffrn_radiation_wavelength 1.5418\n"), (1.54056, "CuKa")),
        (
            written.pdcif(
                radiation="_diffrn_radiation_monochromator 'primary Ge(111)'\n_diffrn_radiation_type 'Cu K\\a'\n"
                "_diffrn_radiation_wavelength 1.5406\n"
            ),
            (1.5406, "CuKa1"),
        ),
        (
            written.pdcif(
                radiation="loop_\n_diffrn_radiation_wavelength\n_diffrn_radiation_wavelength_wt\n"
                "1.78897 1.0\n1.79285 0.5\n"
            ),
            (1.78897, "CoKa"),
        ),
    ],
)
def test_radiation_of_the_file(tmp_path, content, expected):
    scan = read(tmp_path, content, wavelength="MoKa")
    assert (scan.wavelength, scan.radiation) == expected and scan.wavelength_source == "file"


def test_attenuation_is_undone(tmp_path):
    factors = "<beamAttenuationFactors>" + "1 " * 4 + "10 10 10 " + "1 " * 5 + "</beamAttenuationFactors>"
    expected = COUNTS * np.where((np.arange(12) >= 4) & (np.arange(12) < 7), 10, 1)
    np.testing.assert_array_equal(
        read(tmp_path, written.xrdml(counts="counts", factors=factors)).intensity, expected
    )
    # the others are corrected already
    np.testing.assert_array_equal(read(tmp_path, written.xrdml(factors=factors)).intensity, COUNTS)
    np.testing.assert_allclose(read(tmp_path, written.ras(2.5)).intensity, 2.5 * COUNTS)
    np.testing.assert_allclose(read(tmp_path, written.rasx(factor=2.5)).intensity, 2.5 * COUNTS)


def test_points_at_and_below_zero_are_left_out(tmp_path):
    rows = " ".join(["7"] * 31)
    scan = read(tmp_path, f"-10.0 1.0 20.0\n1 1 1 1\n{rows}\n".encode())
    assert scan.two_theta.tolist() == list(range(1, 21)) and scan.notes == (
        "11 points at or below 0 degrees left out",
    )


@pytest.mark.parametrize(
    "content",
    [
        written.xrdml(n_scans=3),
        written.raw1(3),
        written.raw1(3, repeat=True),
        written.raw2(3),
        written.raw3(n_ranges=3),
        written.ras() * 3,
        written.uxd() * 3,
        written.gsas() + 2 * written.gsas()[81:],
    ],
)
def test_several_scans(tmp_path, content):
    with pytest.raises(
        InputError, match=r"scan: must be chosen in a file of 3: 0 .*12 points from 20 to 20.22 degrees"
    ):
        read(tmp_path, content)
    scan = read(tmp_path, content, scan=2)
    assert (scan.scan, scan.n_scans) == (2, 3)
    np.testing.assert_array_equal(scan.intensity, COUNTS)
    found = list(read_all(tmp_path / "scan.any", wavelength="CuKa"))
    assert [one.scan for one in found] == [0, 1, 2]
    assert all(np.array_equal(one.intensity, COUNTS) for one in found)


def test_a_damaged_scan_does_not_hide_the_others(tmp_path):
    (tmp_path / "scan.raw").write_bytes(written.raw3(n_ranges=3)[:-4])
    *good, bad = read_all(tmp_path / "scan.raw")
    assert [len(scan.two_theta) for scan in good] == [12, 12]
    assert isinstance(bad, InputError) and "scan.raw: scan 2: range: must be whole" in str(bad)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (written.gsas(binning="SLOG"), "time-of-flight data .SLOG binning"),
        (written.gsas(binning="RALF"), "time-of-flight data .RALF binning"),
        (written.gsas(binning="COND"), r"2theta in constant steps \(CONST\), got COND"),
        (b"data_a\nloop_\n_pd_meas_time_of_flight\n_pd_meas_counts_total\n1000 5\n1010 7\n", "time-of-flight data"),
        (written.xrdml().replace(b"Gonio", b"Omega"), "axis"),
        (written.brml("Theta"), "TwoTheta"),
        (written.ras(axis="Omega"), "2theta"),
        (written.raw3(scan_type=4), "2theta axis"),
        (written.raw4(b"Rocking Curve"), "2theta axis"),
        (written.ras(count="13.0"), "points: must be as many as declared, 13, got 12"),
        (written.ras(factor=0.0), "attenuation: must be finite and > 0"),
        (written.stoe(b"RAW_1.05"), "version: must be RAW_1.06, got STOE RAW_1.05; export .xy or .xye from WinXPOW"),
        (written.pdcif("none").replace(b"range_inc", b"range_two"), "angles: must be one for each of 12"),
        (written.pdcif("range").replace(b"range_max 20", b"range_max 30"), "_pd_meas_2theta_range: must be that of 12"),
        (b"data_a\n_cell_length_a 4.0\n", "profile: must be a measured powder profile"),
        (b"<svg><path/></svg>", "format: must be XRDML, got an XML document of svg"),
        (b"<xrdMeasurements/>", "scans: must be one or more, got an XRDML document without"),
        (written.archive({"a.txt": "1"}), "format: must be BRML or RASX, got another ZIP archive"),
        (written.archive({"root.xml": "<Root/>"}), "scans: must be .* RASX archive with 0 profiles"),
        (written.uxd("_2THETACOUNTSTIME"), "data: must be one of _COUNTS, .* got _2THETACOUNTSTIME"),
        (b"_FILEVERSION=1\n", "UXD file without data"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "got HDF5 or NeXus data; if it is a scan, export"),
        (b"\x80\x04\x95" + bytes(100), "got a Python pickle"),
        (b"SampleIdent,a,/\n", "got a Philips UDF file"),
        (written.start_step_stop()[:-6], "points: must be the declared 12, got 9"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'scan.any'}: ") and "\n" not in str(caught.value)


def test_steps_down_are_turned_round(tmp_path):
    scan = read(tmp_path, written.raw3(step=-STEP))
    np.testing.assert_array_equal(scan.intensity, COUNTS[::-1])
    assert scan.two_theta[0] == pytest.approx(20.0 - 11 * STEP) and (np.diff(scan.two_theta) > 0).all()


SAMPLES = [write() for _, write in WRITTEN.values()]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, data):
    content = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.one_of(st.integers(0, 255), st.just(content[at] ^ 0x80)))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(1, len(content))))]
    path = tmp_path / "scan.any"
    path.write_bytes(bytes(content))
    try:
        for scan in read_all(path):
            if isinstance(scan, InputError):
                raise scan
            assert len(scan.two_theta) == len(scan.intensity) >= 2
            assert np.isfinite(scan.two_theta).all() and (np.diff(scan.two_theta) > 0.0).all()
            assert np.isfinite(scan.intensity).all() and scan.intensity.min() >= 0.0
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path)), error
