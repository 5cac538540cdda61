"""Small files of every format, written here byte by byte, for tests of the readers."""

from __future__ import annotations

import io
import struct
import zipfile

import numpy as np

START, STEP, N = 20.0, 0.02, 12
COUNTS = np.array([3, 5, 4, 9, 40, 120, 55, 11, 6, 4, 5, 3])
TWO_THETA = START + STEP * np.arange(N)
STOP = float(TWO_THETA[-1])


def archive(members: dict[str, bytes | str], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def xrdml(
    optics: str = "",
    intended: str = "K-Alpha 1",
    counts: str = "intensities",
    factors: str = "",
    n_scans: int = 1,
):
    values = " ".join(map(str, COUNTS))
    scan = f"""<scan scanAxis="Gonio"><dataPoints><positions axis="2Theta" unit="deg">
      <startPosition>{START}</startPosition><endPosition>{STOP}</endPosition></positions>{factors}
      <{counts} unit="counts">{values}</{counts}></dataPoints></scan>"""
    return f"""<?xml version="1.0"?><xrdMeasurements xmlns="http://www.xrdml.com/XRDMeasurement/1.6">
      <sample><id>a sample</id></sample><xrdMeasurement><usedWavelength intended="{intended}">
      <kAlpha1 unit="Angstrom">1.540598</kAlpha1><kAlpha2>1.544426</kAlpha2><kBeta>1.39225</kBeta>
      <ratioKAlpha2KAlpha1>0.5</ratioKAlpha2KAlpha1></usedWavelength><incidentBeamPath>{optics}</incidentBeamPath>
      {scan * n_scans}</xrdMeasurement></xrdMeasurements>""".encode()


def brml(axis: str = "TwoTheta", ratio: float = 0.5) -> bytes:
    datum = "".join(f"<Datum>1,1,{x:.3f},{y}</Datum>" for x, y in zip(TWO_THETA, COUNTS, strict=True))
    raw = f"""<RawData><WaveLengthAlpha1 Value="1.5406"/><WaveLengthAlpha2 Value="1.54439"/>
      <WaveLengthRatio Value="{ratio}"/><DataRoutes><DataRoute RouteFlag="Measured">{datum}<DataViews>
      <RawDataView type="VaryingRawDataView" Start="2" Length="1"><FieldDefinitions AxisId="{axis}"/></RawDataView>
      <RawDataView type="RecordedRawDataView" Start="3" Length="1"/></DataViews></DataRoute></DataRoutes></RawData>"""
    table = "<D><RawDataReferenceList><string>Experiment0/RawData0.xml</string></RawDataReferenceList></D>"
    return archive({"Experiment0/DataContainer.xml": table, "Experiment0/RawData0.xml": raw})


def rasx(kind: str = "Ka", factor: float = 1.0) -> bytes:
    rows = "".join(f"{x:.4f}\t{y}\t{factor}\r\n" for x, y in zip(TWO_THETA, COUNTS, strict=True))
    conditions = f"""<C><WaveType>{kind}</WaveType><WavelengthKbeta>1.392246</WavelengthKbeta>
      <WavelengthKalpha1>1.540593</WavelengthKalpha1><WavelengthKalpha2>1.544414</WavelengthKalpha2></C>"""
    names = '<ContentHashList Name="Profile0.txt"/><ContentHashList Name="MesurementConditions0.xml"/>'
    root = f'<Root><Data0 Type="Profile">{names}</Data0></Root>'
    profile = b"\xef\xbb\xbf" + rows.encode()
    return archive(
        {"root.xml": root, "Data0/Profile0.txt": profile, "Data0/MesurementConditions0.xml": conditions}
    )


def ras(factor: float = 1.0, count: str = f"{N}.0000000000", axis: str = "TwoThetaTheta") -> bytes:
    rows = "".join(f"{x:.4f} {y}.0 {factor:.4f}\r\n" for x, y in zip(TWO_THETA, COUNTS, strict=True))
    header = f"""*RAS_DATA_START\r\n*RAS_HEADER_START\r\n*FILE_SAMPLE "a sample"\r
*HW_XG_WAVE_LENGTH_ALPHA1 "1.540593"\r\n*HW_XG_WAVE_LENGTH_ALPHA2 "1.544414"\r\n*MEAS_COND_XG_WAVE_TYPE "Ka"\r
*MEAS_DATA_COUNT "{count}"\r\n*MEAS_SCAN_AXIS_X "{axis}"\r\n*RAS_HEADER_END\r\n*RAS_INT_START\r\n"""
    return (header + rows + "*RAS_INT_END\r\n*RAS_DATA_END\r\n").encode()


def uxd(marker: str = "_COUNTS", extra: str = "") -> bytes:
    if marker.startswith("_2THETA"):
        rows = "\n".join(f"{x:.3f} {y}" for x, y in zip(TWO_THETA, COUNTS, strict=True))
    else:
        rows = "\n".join(" ".join(map(str, COUNTS[i : i + 8])) for i in range(0, N, 8))
    header = f"; a comment\n_FILEVERSION=1\n_SAMPLE='a sample'\n_WL1=1.540600\n_WL2=1.544390\n_WLRATIO=0.5\n{extra}"
    return f"{header}_DRIVE='COUPLED'\n_STEPSIZE={STEP}\n_START={START}\n{marker}\n{rows}\n".encode()


def raw1(n_ranges: int = 1, repeat: bool = False) -> bytes:
    data = b"RAW "
    for left in range(n_ranges - 1, -1, -1):
        data += b"RAW " if repeat and left < n_ranges - 1 else b""
        data += struct.pack("<IffIIf", N, 1.0, STEP, 0, 0, START) + bytes(12)
        data += b"a sample".ljust(32) + struct.pack("<ff", 1.5406, 1.54439) + bytes(72)
        data += struct.pack("<I", left) + COUNTS.astype("<f4").tobytes()
    return data


def raw2(n_ranges: int = 1, n_header: int = 48) -> bytes:
    data = bytearray(256)
    data[:6] = b"RAW2" + struct.pack("<H", n_ranges)
    data[188:190] = b"Cu"
    struct.pack_into("<fff", data, 190, 1.5406, 1.54439, 0.5)
    one = struct.pack("<HHIfff", n_header, N, 0, 1.0, STEP, START).ljust(n_header, b"\0")
    return bytes(data) + (one + COUNTS.astype("<f4").tobytes()) * n_ranges


def raw3(scan_type: int = 0, ratio: float = 0.5, n_ranges: int = 1, step: float = STEP) -> bytes:
    head = bytearray(712)
    head[:7] = b"RAW1.01"
    struct.pack_into("<I", head, 12, n_ranges)
    head[326:334] = b"a sample"
    struct.pack_into("<5d", head, 616, 1.54184, 1.5406, 1.54439, 1.39222, ratio)
    one = bytearray(304)
    struct.pack_into("<II", one, 0, 304, N)
    struct.pack_into("<d", one, 16, START)
    struct.pack_into("<d", one, 176, step)
    struct.pack_into("<I", one, 196, scan_type)
    struct.pack_into("<III", one, 248, 0, 4, 0)
    return bytes(head) + (bytes(one) + COUNTS.astype("<f4").tobytes()) * n_ranges


def raw4(scan_type: bytes = b"Locked Coupled", ratio: float = 0.5) -> bytes:
    hardware = bytearray(120)
    struct.pack_into("<II", hardware, 0, 30, 120)
    struct.pack_into("<5d", hardware, 72, 1.5418, 1.5406, 1.54439, 1.39222, ratio)
    name = struct.pack("<II", 10, 60) + bytes(4) + b"SAMPLEID".ljust(24, b"\0") + b"a sample".ljust(24, b"\0")
    one = bytearray(160)
    one[32 : 32 + len(scan_type)] = scan_type
    struct.pack_into("<ddI", one, 72, START, STEP, N)
    struct.pack_into("<II", one, 136, 4, 0)
    return b"RAW4.00".ljust(61, b"\0") + name + bytes(hardware) + bytes(one) + COUNTS.astype("<f4").tobytes()


def stoe(version: bytes = b"RAW_1.06", width: int = 4, factor: float = 0.0) -> bytes:
    head, one = bytearray(512), bytearray(512)
    head[:14] = version + b"Powdat"
    head[0x20:0x28] = b"a sample"
    struct.pack_into("<2f", head, 0x142, 1.5406, 1.54439)
    struct.pack_into("<hh", head, 0x178, 1, 1)
    struct.pack_into("<h", head, 0x1E0, 2)
    struct.pack_into("<h", head, 0x1F0, 1)
    struct.pack_into("<H", one, 34, N)
    struct.pack_into("<f", one, 40, factor)
    struct.pack_into("<6f", one, 44, START, START / 2, STOP, STOP / 2, STEP, STEP / 2)
    struct.pack_into("<ii", one, 120, COUNTS.min(), COUNTS.max())
    return bytes(head) + bytes(one) + COUNTS.astype(f"<i{width}").tobytes().ljust(512, b"\0")


def gsas(kind: str = "STD", binning: str = "CONST", title: str = "a sample") -> bytes:
    bank = f"BANK 1 {N} 2 {binning} {100 * START} {100 * STEP} 0 0 {kind}".ljust(80)
    if kind == "FXYE":
        rows = [f"{100 * x:.4f} {y} 1.0" for x, y in zip(TWO_THETA, COUNTS, strict=True)]
    else:
        fields = [f"{y:8d}" for y in COUNTS] if kind == "STD" else [f"{y:8.1f}{y**0.5:8.1f}" for y in COUNTS]
        wide = 10 if kind == "STD" else 5
        rows = ["".join(fields[i : i + wide]).ljust(80) for i in range(0, N, wide)]
    return "\n".join([title.ljust(80), bank, *rows, ""]).encode()


def pdcif(angles: str = "list", intensity: str = "_pd_meas_counts_total", radiation: str = "") -> bytes:
    radiation = radiation or "_diffrn_radiation_type 'Cu K\\a'\n_diffrn_radiation_wavelength 1.5406\n"
    if angles == "list":
        rows = "\n".join(f"{x:.3f} {y}" for x, y in zip(TWO_THETA, COUNTS, strict=True))
        return f"data_a\n{radiation}loop_\n_pd_meas_2theta_scan\n{intensity}\n{rows}\n".encode()
    span = f"_pd_meas_2theta_range_min {START}\n_pd_meas_2theta_range_max {STOP}\n_pd_meas_2theta_range_inc {STEP}\n"
    rows = "\n".join(map(str, COUNTS))
    return f"# by hand\ndata_a\n{radiation}{span}loop_\n{intensity}\n{rows}\n".encode()


def start_step_stop(title: str = "") -> bytes:
    rows = "\n".join(" ".join(map(str, COUNTS[i : i + 8])) for i in range(0, N, 8))
    return f"{title}{START} {STEP} {STOP:.2f}\n{rows}\n".encode()


def columns(separator: str = " ", header: str = "# a sample\n") -> bytes:
    return (
        header + "".join(f"{x:.2f}{separator}{y}\n" for x, y in zip(TWO_THETA, COUNTS, strict=True))
    ).encode()


# format as `Scan.format` names it -> a file of it, by the defaults above
WRITTEN = {
    "xrdml": ("PANalytical XRDML", xrdml),
    "brml": ("Bruker BRML", brml),
    "rasx": ("Rigaku RASX", rasx),
    "ras": ("Rigaku RAS", ras),
    "uxd": ("Bruker UXD", uxd),
    "raw1": ("Bruker RAW", raw1),
    "raw2": ("Bruker RAW", raw2),
    "raw3": ("Bruker RAW", raw3),
    "raw4": ("Bruker RAW", raw4),
    "stoe": ("STOE RAW", stoe),
    "gsas": ("GSAS", gsas),
    "pdcif": ("CIF", pdcif),
    "start_step_stop": ("text of start, step, stop and counts", start_step_stop),
    "columns": ("columns of text", columns),
}
