"""Two-column files read, refused and searched for peaks."""

from __future__ import annotations

import string

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xrdfast.data import scans
from xrdfast.data.scans import Scan, find_peaks, is_scan, read_two_column
from xrdfast.errors import InputError

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
RISING = st.lists(st.floats(0.001, 179.0), min_size=2, max_size=40, unique=True).map(sorted)


def read(tmp_path, content: str | bytes, name: str = "scan.xy") -> Scan:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_two_column(path)


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
        ("10 1\n20 nan\n", "line 2: intensity must be finite, got nan"),
        ("10 1\n20 inf\n", "line 2: intensity must be finite, got inf"),
        ("nan 1\n20 1\n", "line 1: two_theta must be finite"),
        ("10 1\n20 -0.5\n", "line 2: intensity must be >= 0 in a list of lines, got -0.5"),
        ("10 1\n10 2\n", "line 2: two_theta must be above that of the line before, got 10"),
        ("# a\n10 1\n30 3\n20 2\n", "line 4: two_theta must be above that of the line before, got 20"),
        ("0 1\n10 2\n", "line 1: two_theta must be between 0 and 180 degrees, got 0"),
        ("10 1\n180 2\n", "line 2: two_theta must be between 0 and 180 degrees, got 180"),
        ("-1 1\n10 2\n", "line 1: two_theta must be between 0 and 180"),
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
            read_two_column(path)


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


def test_is_scan():
    even = 5.0 + 0.0167 * np.arange(1001)
    assert is_scan(even) and is_scan(np.round(even, 2))
    assert not is_scan(even[:1000])
    assert not is_scan(np.sort(np.random.default_rng(0).uniform(5, 90, 5000)))
    assert not is_scan(np.r_[even, even[-1] + 0.1 * np.arange(1, 500)])


def simulated(seed: int, step: float, counts: float, broad: float = 0.08) -> tuple[np.ndarray, ...]:
    """A scan of 15 peaks on a falling background, with Poisson noise; their places and heights."""
    rng = np.random.default_rng(seed)
    two_theta = np.arange(5.0, 90.0, step)
    place = np.linspace(10.0, 85.0, 15) + rng.uniform(-1.5, 1.5, 15)
    height = np.exp(rng.uniform(np.log(3.0), np.log(100.0), 15))
    x = (two_theta[:, None] - place) / (0.5 * broad)
    profile = 0.5 * np.exp(-np.log(2.0) * x**2) + 0.5 / (1.0 + x**2)
    clean = profile @ height + 20.0 * np.exp(-two_theta / 20.0) + 4.0
    noisy = rng.poisson(clean * counts) if np.isfinite(counts) else clean
    return two_theta, noisy.astype(float), place, 100.0 * height / height.max()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("step", "counts"), [(0.01, 50.0), (0.02, 200.0), (0.005, np.inf), (0.02, 5.0)])
def test_known_peaks_are_found_between_points(seed, step, counts):
    two_theta, intensity, place, height = simulated(seed, step, counts)
    found, relative = find_peaks(two_theta, intensity)
    nearest = np.abs(found[:, None] - place).argmin(0)
    error = np.abs(found[nearest] - place)
    # of a peak h counts high on a background b; what stands 10 sigma out is to be found
    sure = height > (10.0 if counts == 5.0 else 4.0)
    assert (error[sure] < 0.02).all()
    assert np.median(error[sure]) < step / 2
    assert np.abs(relative[nearest] - height)[sure].max() < (12.0 if counts == 5.0 else 8.0)
    spurious = [p for p in found if np.abs(p - place).min() > 0.06]
    assert len(spurious) <= 2
    assert (np.diff(found) > 0).all() and relative.max() == 100.0


def test_noise_alone_has_no_peaks():
    rng = np.random.default_rng(3)
    two_theta = np.arange(5.0, 90.0, 0.01)
    n_found = [
        len(find_peaks(two_theta, rng.poisson(200.0, len(two_theta)).astype(float))[0]) for _ in range(5)
    ]
    assert sum(n_found) <= 5


def test_threshold_decides():
    two_theta, intensity, *_ = simulated(1, 0.02, 5.0)
    counts = [len(find_peaks(two_theta, intensity, threshold=k)[0]) for k in (2.0, 5.0, 20.0)]
    assert counts[0] > counts[1] > counts[2] > 0


def test_scale_and_offset_do_not_matter():
    two_theta, intensity, *_ = simulated(2, 0.02, 200.0)
    place, height = find_peaks(two_theta, intensity)
    other, same = find_peaks(two_theta, 2.0 * intensity)
    np.testing.assert_allclose(other[:5], place[:5], atol=0.01)
    np.testing.assert_allclose(same[height > 10], height[height > 10], rtol=0.1)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 1.0], [3.0] * 50, [0.0] * 50])
def test_short_and_flat_scans_have_none(values):
    place, height = find_peaks(10.0 + 0.01 * np.arange(len(values)), np.array(values))
    assert place.shape == height.shape == (0,)


@pytest.mark.parametrize(
    ("two_theta", "intensity", "threshold", "message"),
    [
        (np.arange(5.0), np.ones(4), 5.0, "intensity must be of the shape"),
        (np.ones((5, 5)), np.ones((5, 5)), 5.0, "intensity must be of the shape"),
        (np.zeros(5), np.arange(5.0), 5.0, "two_theta must be finite and rising"),
        (np.arange(5.0), np.array([0, 1, np.nan, 1, 0]), 5.0, "intensity must be finite"),
        (np.arange(5.0), np.arange(5.0), 0.0, "threshold must be > 0, got 0"),
    ],
)
def test_find_peaks_refuses(two_theta, intensity, threshold, message):
    with pytest.raises(ValueError, match=f"find_peaks: {message}"):
        find_peaks(two_theta, intensity, threshold=threshold)


@QUICK
@given(st.lists(st.floats(-1e6, 1e12), min_size=0, max_size=80))
def test_peaks_of_anything_finite_are_finite(values):
    place, height = find_peaks(10.0 + 0.02 * np.arange(len(values)), np.array(values, dtype=float))
    assert np.isfinite(place).all() and np.isfinite(height).all() and len(place) == len(height)


def test_strongest_lines_of_measured_patterns(shared_data):
    small = np.load(shared_data / "exp_small.npz")
    spans = zip(small["offset"][:-1], small["offset"][1:], strict=True)
    patterns = [(small["two_theta"][a:b], small["intensity"][a:b]) for a, b in spans]
    rruff = np.load(shared_data / "exp_rruff.npz")["intensity"][::15]
    patterns += [(5.0 + 0.01 * np.arange(8500), row) for row in rruff]
    for two_theta, intensity in patterns:
        two_theta, intensity = two_theta.astype(float), intensity.astype(float)
        found, height = find_peaks(two_theta, intensity)
        assert len(found) >= 3
        # the highest point is on one of the strong lines (the top two of one pattern differ by 0.3 %)
        strongest = two_theta[intensity.argmax()]
        assert np.abs(found[height > 50.0] - strongest).min() < 0.1


def test_shared_files(shared_data):
    formats = shared_data / "raw_formats"
    expected = {"xy/D5000_1.xy": 3651, "xy/MnO.xy": 9001, "xy/quartz.xy": 1693, "xye/x3lactos.xye": 4776}
    for name, n_points in (expected | {"csv/dsmo.csv": 5501, "xy/xy_text.txt": 4001}).items():
        scan = read_two_column(formats / name)
        assert len(scan.two_theta) == n_points and is_scan(scan.two_theta)
    for path in sorted(formats.glob("*/*")):
        try:
            read_two_column(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
