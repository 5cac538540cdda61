"""Scans from columns of text: layouts, rules, and where the wavelength comes from."""

from __future__ import annotations

import string
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xrdfast
from xrdfast.data.formats import bounded, columns
from xrdfast.data.scans import Scan, scan_of_points
from xrdfast.errors import InputError

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
RISING = st.lists(st.floats(0.001, 179.0), min_size=2, max_size=40, unique=True).map(sorted)


def read(tmp_path, content: str | bytes, name: str = "scan.xy") -> Scan:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return xrdfast.read(path)


@pytest.mark.parametrize(
    "content",
    [
        "10.5 1\n20.25 100\n30 7.5\n",
        "10.5\t1\n20.25\t100\n30\t7.5\n",
        "10.5,1\n20.25,100\n30,7.5\n",
        "10.5, 1,\n20.25, 100,\n30, 7.5,\n",
        "10.5;1\n20.25;100\n30;7.5\n",
        "10,5;1\n20,25;100\n30;7,5\n",
        "10,5\t1\n20,25\t100\n30\t7,5\n",
        '"10.5","1"\n"20.25","100"\n"30","7.5"\n',
        "10.5 1 0.1\n20.25 100 2\n30 7.5 .3\n",
        "20.25e-0 100 2\n".join(["1.05E+01 1\n", "30 7.5"]),
        "# of quartz\n'title\n\n; 2theta\n10.5 1\n! between\n20.25 100\n\n30 7.5\n\n",
        "angle,counts\ndegrees,1/s\n10.5,1\n20.25,100\n30,7.5\n",
        "quartz\n       3000\n10.5 1\n20.25 100\n30 7.5\n",
        "10.5 1\r\n20.25 100\r\n30 7.5",
        "10.5 1\r20.25 100\r30 7.5\r",
        "\ufeff10.5 1\n20.25 100\n30 7.5\n",
        "# 2θ (°)\n10.5 1\n20.25 100\n30 7.5\n".encode("utf-16"),
        b"2theta (\xb0)\n10.5 1\n20.25 100\n30 7.5\n",
        "20.0 49\t0.5\n".replace("20.0 49", "10.5 1") + "20.25 100\t3\n30 7.5\t1\n",
    ],
)
def test_layouts(tmp_path, content):
    scan = read(tmp_path, content)
    assert scan.two_theta.tolist() == [10.5, 20.25, 30.0]
    assert scan.intensity.tolist() == [1.0, 100.0, 7.5]
    assert scan.two_theta.dtype == scan.intensity.dtype == np.float64
    assert scan.path == str(tmp_path / "scan.xy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "points: must be at least 2 lines of two or three numbers, got 0"),
        ("10 1\n", "points: must be at least 2 .*, got 1"),
        ("10 1\n20 nan\n", "point 2: intensity must be finite, got nan"),
        ("10 1\n20 inf\n", "point 2: intensity must be finite, got inf"),
        ("nan 1\n20 1\n", "point 1: two_theta must be finite"),
        ("10 1\n20 -0.5\n", "point 2: intensity must be >= 0 in a list of lines, got -0.5"),
        ("10 1\n10 2\n", "point 2: two_theta must be above that of the point before, got 10"),
        ("# a\n10 1\n30 3\n20 2\n", "point 3: two_theta must be above that of the point before, got 20"),
        ("0 1\n10 2\n", "point 1: two_theta must be between 0 and 180 degrees, got 0"),
        ("10 1\n180 2\n", "point 2: two_theta must be between 0 and 180 degrees, got 180"),
        ("-1 1\n10 2\n", "point 1: two_theta must be between 0 and 180"),
        ("10 0\n20 0\n", "intensity: must be positive somewhere, got a maximum of 0"),
        ("10 1\n20 2\nend of scan\n", "line 3: must be two or three numbers, got 'end of scan'"),
        ("10 1\n20 2\n30\n", "line 3: must be two or three numbers, got 1 columns"),
        ("10 1\n20 2 3 4\n", "line 2: must be two or three numbers, got 4 columns"),
        (
            "16.0 0.03 136.0\n649 609 622 618\n",
            "points: must be the declared 4001, got 4 .recognised as text of start",
        ),
        ("10 1_000\n20 2_000\n", "points: must be at least 2"),
        ("10 1\n20 " + "0" * 1000 + "2\n30 1\n", "line 2: must be two or three numbers, got '20 000"),
        ("# \n" * 30_000 + "10 1\n20 2\x00\n", "line 30002: must be text, got a NUL byte"),
        ("1 " * 1_000_000, "points: must be at least 2"),
        ("20,02 49\n20,04 39\n", "points: must be at least 2"),
        ("10 1\n20 2\x00\n", "format: must be known, got binary data that begin with 31 30 20"),
        (b"10 1\n20 2 \xb0\n", "line 2: must be two or three numbers, got '20 2 °'"),
        (b"\x89PNG\r\n\x1a\n\x00\x01", "format: must be a measured powder pattern, got a picture"),
        (b"\x01\x02\x03\x00", "format: must be known, got binary data that begin with 01 02 03 00"),
        (
            "# time of flight\n10 1\n20 2\n",
            "axis: must be 2theta in degrees, got 'time of flight' in the header",
        ),
        ("q [1/nm], I\n10 1\n20 2\n", "axis: must be 2theta in degrees, got 'q \\[' in the header"),
        ("#  q_nm^-1   I\n10 1\n20 2\n", "axis: must be 2theta in degrees, got 'q_nm\\^-1' in the header"),
        ("#  q_A^-1   I\n1 1\n2 2\n", "axis: must be 2theta in degrees, got 'q_A\\^-1' in the header"),
        ("#  2th_rad   I\n1 1\n2 2\n", "axis: must be 2theta in degrees, got '2th_rad' in the header"),
        ("#  r_mm   I\n10 1\n20 2\n", "axis: must be 2theta in degrees, got 'r_mm' in the header"),
        ("#  d*2_nm^-2   I\n1 1\n2 2\n", "axis: must be 2theta in degrees, got 'd\\*2_' in the header"),
    ],
)
def test_refusals_name_file_line_and_rule(tmp_path, content, message):
    with pytest.raises(InputError, match=f"scan.xy: {message}") as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "_MAX_LINES", 2)
    for content in ("10 1\n20 2\n30 3\n", "10;1\n20;2\n30;3\n"):
        with pytest.raises(InputError, match="lines: must be at most 2, got 3"):
            read(tmp_path, content)
    two_theta = np.linspace(1.0, 100.0, (1 << 18) + 1)
    with pytest.raises(InputError, match="points: must be at most 262144, got 262145"):
        scan_of_points(two_theta, np.ones(len(two_theta)), path="scan.xy")
    monkeypatch.setattr(bounded, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="size: must be at most 10 bytes, got 12"):
        read(tmp_path, "10 1\n20 222\n")


def scan_text(lowest: float) -> str:
    two_theta = 5.0 + 0.02 * np.arange(2000)
    intensity = 100.0 * np.exp(-(((two_theta - 20.0) / 0.1) ** 2))
    intensity[1500] = lowest
    return "".join(f"{x:.3f} {y:.6f}\n" for x, y in zip(two_theta, intensity, strict=True))


def test_scans_may_dip_a_little_below_zero(tmp_path):
    scan = read(tmp_path, scan_text(-4.9))
    assert scan.intensity.min() == 0.0 and scan.intensity[1500] == 0.0
    with pytest.raises(InputError, match="point 1501: intensity must be at least -5 % of the maximum"):
        read(tmp_path, scan_text(-5.1))


@QUICK
@given(st.one_of(st.binary(max_size=300), st.text(string.digits + " .,;\t\n\r#-+eEnaif\"'x_", max_size=300)))
def test_any_content_is_read_or_refused(tmp_path, content):
    try:
        scan = read(tmp_path, content)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert len(scan.two_theta) >= 2 and (np.diff(scan.two_theta) > 0).all()
        assert np.isfinite(scan.intensity).all() and scan.intensity.min() >= 0.0


@QUICK
@given(RISING, st.data(), st.sampled_from([" ", "\t", ",", ";", "  ", " , "]))
def test_round_trip(tmp_path, two_theta, data, separator):
    sizes = st.floats(0.0, 1e9)
    intensity = [1.0, *data.draw(st.lists(sizes, min_size=len(two_theta) - 1, max_size=len(two_theta) - 1))]
    rows = zip(two_theta, intensity, strict=True)
    scan = read(tmp_path, "".join(f"{x!r}{separator}{y!r}\n" for x, y in rows))
    assert scan.two_theta.tolist() == two_theta and scan.intensity.tolist() == intensity


@pytest.mark.parametrize(
    ("header", "given", "expected"),
    [
        ("", None, (1.54056, "assumed", "CuKa")),
        ("", "CoKa", (1.788996, "given", "CoKa")),
        ("", 1.54184, (1.54056, "given", "CuKa")),
        ("", 1.5406, (1.5406, "given", "CuKa1")),
        ("", "0.7", (0.7, "given", "")),
        ("# Wavelength: 1.5418 A\n", None, (1.54056, "file", "CuKa")),
        ("# lambda = 0.154056 nm\n", None, (1.54056, "file", "CuKa1")),
        ("# Wavelength: 4.13529e-11 m\n", "CuKa", (0.413529, "file", "")),
        ('# "wavelength": 1e-10,\n', None, (1.0, "file", "")),
        ("Wavelength (nm): 0.15406\n", None, (1.5406, "file", "CuKa1")),
        ("Wavelength [m] = 4.13529e-11\n", None, (0.413529, "file", "")),
        ("# lambda 0.7 mirror\n", None, (0.7, "file", "")),
        ("# wavelength 70.93\n", None, (1.54056, "assumed", "CuKa")),  # no diffraction is done with that
        ("wavelength 0.413529\n", "CuKa", (0.413529, "file", "")),
    ],
)
def test_wavelength_of_the_file_then_given_then_assumed(tmp_path, header, given, expected):
    path = tmp_path / "scan.xy"
    path.write_text(f"{header}10 1\n20 2\n")
    scan = xrdfast.read(path, wavelength=given)
    assert (scan.wavelength, scan.wavelength_source, scan.radiation) == expected
    assert scan.is_doublet == expected[2].endswith("Ka")
    kept = [note for note in scan.notes if "which was kept" in note]
    assert len(kept) == (given is not None and expected[1] == "file")


@pytest.mark.parametrize("wavelength", ["CuKb", 0.0, float("nan")])
def test_a_wavelength_that_is_none_is_refused(tmp_path, wavelength):
    with pytest.raises(ValueError, match="wavelength"):
        xrdfast.read(tmp_path / "scan.xy", wavelength=wavelength)


def test_reading_needs_no_torch(tmp_path):
    (tmp_path / "scan.xy").write_text("10 1\n20 2\n")
    code = "import sys, xrdfast; xrdfast.read(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "scan.xy")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


NUMBER = st.from_regex(r"-?[0-9]{0,12}(\.[0-9]{0,6})?", fullmatch=True)
GAP = st.sampled_from([" ", "  ", "\t", "\n", " \n", "\n\n", "\r", "e", ",", "-"])


@QUICK
@given(st.lists(st.tuples(NUMBER, st.one_of(st.just(" "), st.just("\n"), GAP)), max_size=12))
def test_native_parser_reads_what_arrays_do(pieces):
    """Bit by bit the same numbers, and a refusal of the same texts."""
    content = np.frombuffer("".join(number + gap for number, gap in pieces).encode(), np.uint8)
    native, arrays = columns._native_decimals(content), columns._decimals(content)
    if arrays is None:
        assert native is None or len(native) < 2  # a single number is no rows
    else:
        assert native.tobytes() == arrays.tobytes() and native.shape == arrays.shape


def test_native_parser_reads_a_scan():
    """Of files as instruments write them; a line that is too long is left to the others."""
    rows = "".join(f"  {5 + 0.02 * i:.4f}\t{(i * 7919) % 100_003}  {i / 7:.9f}\n" for i in range(3000))
    content = np.frombuffer(rows.encode(), np.uint8)
    assert columns._native_decimals(content).tobytes() == np.loadtxt(rows.splitlines()).tobytes()
    assert columns._native_decimals(np.frombuffer(b"1 2\n3" + b" " * 2000 + b"4\n", np.uint8)) is None


@pytest.mark.parametrize("line", ["20,02 49", "20.02° 49", "1.0D+01 5", "20.02"])
def test_lines_that_are_no_points_are_shown(tmp_path, line):
    (tmp_path / "odd.xy").write_text(f"angle counts\n{line}\n{line}\n")
    with pytest.raises(InputError, match="got 0, and lines such as") as caught:
        xrdfast.read(tmp_path / "odd.xy")
    assert repr(line) in str(caught.value)


def test_short_scans_of_instruments_may_dip_below_zero():
    two_theta, intensity = np.arange(10.0, 20.0, 0.1), np.r_[-1.0, np.full(99, 100.0)]
    found = scan_of_points(two_theta, intensity, path="a", format="GSAS")
    assert found.is_scan and found.intensity[0] == 0.0
    with pytest.raises(InputError, match="point 1: intensity must be >= 0 in a list of lines"):
        scan_of_points(two_theta, intensity, path="a")
