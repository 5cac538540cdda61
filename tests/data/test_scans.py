"""Scans from columns of text: layouts, rules, and where the wavelength comes from."""

from __future__ import annotations

import string

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xrdfast
from xrdfast.data.formats import bounded, columns
from xrdfast.data.scans import Scan, read_all
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
        ("10 1\n10 2\n", "point 2: two_theta must be above that of the line before, got 10"),
        ("# a\n10 1\n30 3\n20 2\n", "point 4: two_theta must be above that of the line before, got 20"),
        ("0 1\n10 2\n", "point 1: two_theta must be between 0 and 180 degrees, got 0"),
        ("10 1\n180 2\n", "point 2: two_theta must be between 0 and 180 degrees, got 180"),
        ("-1 1\n10 2\n", "point 1: two_theta must be between 0 and 180"),
        ("10 0\n20 0\n", "intensity: must be positive somewhere, got a maximum of 0"),
        ("10 1\n20 2\nend of scan\n", "line 3: must be two or three numbers, got 'end of scan'"),
        ("10 1\n20 2\n30\n", "line 3: must be two or three numbers, got 1 columns"),
        ("10 1\n20 2 3 4\n", "line 2: must be two or three numbers, got 4 columns"),
        ("16.0 0.03 136.0\n649 609 622 618\n", "line 2: must be two or three numbers, got 4 columns"),
        ("10 1_000\n20 2_000\n", "points: must be at least 2"),
        ("10 1\n20 " + "0" * 1000 + "2\n30 1\n", "line 2: must be two or three numbers, got '20 000"),
        ("1 " * 1_000_000, "points: must be at least 2"),
        ("20,02 49\n20,04 39\n", "points: must be at least 2"),
        ("10 1\n20 2\x00\n", "line 2: must be text, got a NUL byte"),
        (b"10 1\n20 2 \xb0\n", "file: must be UTF-8 text, got byte 0xb0"),
        (b"\x89PNG\r\n\x1a\n\x00\x01", "file: must be UTF-8 text"),
        ("10 1\n20 2\n".encode("utf-16"), "file: must be UTF-8 text"),
    ],
)
def test_refusals_name_file_line_and_rule(tmp_path, content, message):
    with pytest.raises(InputError, match=f"scan.xy: {message}") as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.xy"):
        with pytest.raises(InputError, match="file: must be readable, got"):
            xrdfast.read(path)


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(scans, "_MAX_BYTES", 10)
    with pytest.raises(InputError, match="size: must be at most 10 bytes, got 12"):
        read(tmp_path, "10 1\n20 222\n")
    monkeypatch.setattr(scans, "_MAX_BYTES", 100)
    monkeypatch.setattr(scans, "_MAX_POINTS", 2)
    with pytest.raises(InputError, match="points: must be at most 2, got more"):
        read(tmp_path, "10 1\n20 2\n30 3\n")


def scan_text(lowest: float) -> str:
    two_theta = 5.0 + 0.02 * np.arange(2000)
    intensity = 100.0 * np.exp(-(((two_theta - 20.0) / 0.1) ** 2))
    intensity[1500] = lowest
    return "".join(f"{x:.3f} {y:.6f}\n" for x, y in zip(two_theta, intensity, strict=True))


def test_scans_may_dip_a_little_below_zero(tmp_path):
    scan = read(tmp_path, scan_text(-4.9))
    assert scan.intensity.min() == 0.0 and scan.intensity[1500] == 0.0
    with pytest.raises(InputError, match="line 1501: intensity must be at least -5 % of the maximum"):
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
