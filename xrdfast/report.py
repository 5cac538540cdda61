"""The plot of one answer: the pattern, the ranked space groups, the crystal systems.

For print: text stays text in PDF and SVG, and colour-blind readers and grey copiers tell the colours apart
(Okabe & Ito, 2008). Not for tables (`xrdfast.cli`) or plots of many patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xrdfast.bragg import Grid, d_spacing_of
from xrdfast.data.files import write_atomically
from xrdfast.data.peaks import background_of
from xrdfast.errors import InputError
from xrdfast.symmetry import CRYSTAL_SYSTEM_INDEX, CRYSTAL_SYSTEMS, SYMBOLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from xrdfast.evidence import Evidence
    from xrdfast.prediction import Pattern, Prediction

FORMATS = ("png", "pdf", "svg")
AXES = {
    "2theta": r"$2\theta$ (degrees) at the model's wavelength",
    "d": r"$d$ (Å), logarithmic",
    "q": r"$Q$ (1/Å)",
}
SCALES = ("linear", "sqrt", "log")
_BLUE, _ORANGE, _GREY, _INK = "#0072B2", "#D55E00", "#868E96", "#22272B"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 8.0,
    "axes.linewidth": 0.6,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
_N_GROUPS = 10  # best candidates that are drawn
_N_LABELS = 12  # strongest lines that get their hkl
_LABEL_GAP = 2.6  # degrees between two of them


def save_plot(
    prediction: Prediction,
    path: str | Path,
    *,
    title: str = "",
    axis: str = "2theta",
    scale: str = "linear",
    evidence: Sequence[Evidence] = (),
    ticks: tuple[str, NDArray[np.float64]] | None = None,
) -> None:
    """Draws an answer into a file, whole or not at all.

    Args:
        prediction: the answer; its whole list of candidates is drawn.
        path: ending in .png, .pdf or .svg.
        title: what the pattern is, plain text.
        axis, scale, evidence, ticks: as of `plot_prediction`.

    Raises:
        InputError: for another ending, or where the file cannot be written.
        ValueError: as `plot_prediction`.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        got = path.suffix or "no suffix"
        raise InputError(f"{path}: plot: must end in .{', .'.join(FORMATS)}, got {got}")
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = plot_prediction(
            prediction, title=title, axis=axis, scale=scale, evidence=evidence, ticks=ticks
        )
        metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else None
        with write_atomically(path) as file:
            figure.savefig(file, format=kind, dpi=200, metadata=metadata)


def plot_prediction(
    prediction: Prediction,
    *,
    title: str = "",
    axis: str = "2theta",
    scale: str = "linear",
    evidence: Sequence[Evidence] = (),
    ticks: tuple[str, NDArray[np.float64]] | None = None,
) -> Figure:
    """The plot as a matplotlib figure: pattern above, space groups and crystal systems below.

    Of a scan the pattern has its background, and under it the peaks found, darker the more the answer rests on them.

    Args:
        prediction: the answer.
        title: what the pattern is, plain text.
        axis: "2theta", "d" or "q", at the model's wavelength.
        scale: of the intensity, "linear", "sqrt" or "log".
        evidence: of `xrdfast.evidence.find_evidence`; () for none.
        ticks: name and 2theta, degrees on the model's axis, of the lines of a structure to compare with.

    Raises:
        ValueError: for another axis or scale.
    """
    if axis not in AXES or scale not in SCALES:
        raise ValueError(
            f"plot_prediction: axis, scale must be of {', '.join(AXES)} and {', '.join(SCALES)}, "
            f"got {axis!r}, {scale!r}"
        )
    from matplotlib.figure import Figure

    rows = _tick_rows(prediction, evidence, ticks)
    figure = Figure(figsize=(7.2, 4.6 + 0.22 * len(rows)), layout="constrained")
    mosaic = [["pattern", "pattern"], ["groups", "systems"]]
    heights = [1.25, 1.0]
    if rows:
        mosaic.insert(1, ["ticks", "ticks"])
        heights.insert(1, 0.09 * len(rows))
    panels = figure.subplot_mosaic(mosaic, height_ratios=heights)
    _draw_pattern(panels["pattern"], prediction, axis, scale)
    _draw_groups(panels["groups"], prediction)
    _draw_systems(panels["systems"], prediction)
    if rows:
        _draw_ticks(panels["ticks"], panels["pattern"], prediction.pattern, rows, axis)
    if title:
        panels["pattern"].set_title(title.replace("$", r"\$"), loc="left", fontsize=9.0, fontweight="bold")
    lettered = [panels[name] for name in ("pattern", "groups", "systems")]
    for letter, axes in zip("abc", lettered, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.annotate(
            letter,
            (0, 1),
            xycoords="axes fraction",
            xytext=(-28, 6),
            textcoords="offset points",
            fontsize=9.0,
            fontweight="bold",
        )
    return figure


def _draw_pattern(axes: Axes, prediction: Prediction, axis: str, scale: str) -> None:
    pattern = prediction.pattern
    low, high = 0.0, 105.0 if pattern.hkl is None else 116.0
    if pattern.scan is not None:
        two_theta, counts = pattern.scan
        share = 100.0 / max(float(counts.max()), 1e-300)
        axes.plot(_along(two_theta, pattern, axis), share * counts, color=_GREY, lw=0.8)
        background = background_of(two_theta, counts)
        axes.plot(_along(two_theta, pattern, axis), share * background, color=_ORANGE, lw=0.9)
        shown = counts[counts > 0.0]
        low = max(0.7 * share * float(shown.min()), 1e-3) if scale == "log" and len(shown) else 0.0
    else:
        low = 0.5 * float(pattern.intensity[pattern.intensity > 0.0].min()) if scale == "log" else 0.0
        axes.vlines(_along(pattern.two_theta, pattern, axis), low, pattern.intensity, color=_BLUE, lw=1.0)
        _label_lines(axes, pattern, axis)
    if scale == "log":
        axes.set_yscale("log")
    elif scale == "sqrt":
        axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0.0)), np.square))
    axes.set_ylim(low, high)
    _set_axis(axes, pattern, axis)
    shown_scale = "" if scale == "linear" else f" ({scale})"
    axes.set_ylabel(f"intensity, strongest = 100{shown_scale}")
    source = f"{prediction.kind}, {prediction.wavelength:.5f} Å ({prediction.wavelength_source})"
    axes.set_title(source, loc="right", fontsize=7.5)


def _along(two_theta: ArrayLike, pattern: Pattern, axis: str) -> NDArray[np.float64]:
    """Angles of the model's axis on the axis that is drawn."""
    two_theta = np.asarray(two_theta, np.float64)
    if axis == "2theta":
        return two_theta
    d = d_spacing_of(two_theta, pattern.wavelength)
    return d if axis == "d" else 2.0 * np.pi / d


def _set_axis(axes: Axes, pattern: Pattern, axis: str) -> None:
    grid = Grid()
    ends = _along([grid.two_theta_min, grid.two_theta_max], pattern, axis)
    if axis == "d":
        axes.set_xscale("log")
        marks = [1.1, 1.5, 2, 3, 5, 10]
        axes.set_xticks([mark for mark in marks if ends.min() <= mark <= ends.max()])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.set_xlim(ends.min(), ends.max())
    axes.set_xlabel(AXES[axis])


_Ticks = tuple[str, "NDArray[np.float64]", "Sequence[float]"]  # name, degrees, darkness 0..1


def _tick_rows(
    prediction: Prediction, evidence: Sequence[Evidence], ticks: tuple[str, NDArray[np.float64]] | None
) -> list[_Ticks]:
    """Rows of ticks under the pattern."""
    rows: list[_Ticks] = []
    if prediction.pattern.scan is not None:
        place = prediction.pattern.two_theta
        rows.append(("peaks found", place, [1.0] * len(place)))
    if evidence:
        most = max(max(one.drop for one in evidence), 1e-12)
        darkness = [max(one.drop, 0.0) / most for one in evidence]
        rows.append(("rests on", np.array([one.two_theta for one in evidence]), darkness))
    if ticks is not None:
        rows.append((ticks[0], ticks[1], [1.0] * len(ticks[1])))
    return rows


def _draw_ticks(axes: Axes, above: Axes, pattern: Pattern, rows: Sequence[_Ticks], axis: str) -> None:
    """Rows of ticks with one axis for them and the pattern above."""
    from matplotlib.colors import to_rgb

    for row, (name, two_theta, darkness) in enumerate(rows):
        color = to_rgb(_ORANGE if name == "rests on" else _BLUE)
        colors = [(*color, 0.12 + 0.88 * dark) for dark in darkness]
        axes.vlines(_along(two_theta, pattern, axis), row + 0.12, row + 0.88, colors=colors, lw=0.9)
    axes.set_yticks([row + 0.5 for row in range(len(rows))], [name for name, _, _ in rows], fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows), 0.0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _set_axis(axes, pattern, axis)
    above.set_xlabel("")
    above.tick_params(labelbottom=False)


def _label_lines(axes: Axes, pattern: Pattern, axis: str) -> None:
    """Writes hkl above the strongest lines that have room."""
    if pattern.hkl is None:
        return
    taken: list[float] = []
    for i in np.argsort(-pattern.intensity, kind="stable")[: 3 * _N_LABELS].tolist():
        place = float(pattern.two_theta[i])
        if len(taken) == _N_LABELS or any(abs(place - other) < _LABEL_GAP for other in taken):
            continue
        taken.append(place)
        gap = r"\," if np.abs(pattern.hkl[i]).max() > 9 else ""  # 1 10 0 must not read as 110 0
        text = gap.join(rf"\overline{{{-n}}}" if n < 0 else str(n) for n in pattern.hkl[i].tolist())
        axes.annotate(
            f"${text}$",
            (float(_along(place, pattern, axis)), float(pattern.intensity[i])),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=6.0,
        )


def _draw_groups(axes: Axes, prediction: Prediction) -> None:
    candidates = prediction.candidates[:_N_GROUPS]
    names = [f"{symbol_text(c.symbol)}  ({c.space_group_number})" for c in candidates]
    marked = [c.space_group_number == prediction.true_number for c in candidates]
    _draw_bars(axes, names, [c.probability for c in candidates], marked)
    axes.set_title("space group", loc="left", fontsize=8.0)


def _draw_systems(axes: Axes, prediction: Prediction) -> None:
    shares = dict(prediction.superclasses["crystal_system"])
    number = prediction.true_number
    system = CRYSTAL_SYSTEMS[CRYSTAL_SYSTEM_INDEX[number - 1]] if number else None
    marked = [name == system for name in CRYSTAL_SYSTEMS]
    _draw_bars(axes, CRYSTAL_SYSTEMS, [shares[name] for name in CRYSTAL_SYSTEMS], marked)
    axes.set_title("crystal system", loc="left", fontsize=8.0)


def _draw_bars(axes: Axes, names: Sequence[str], shares: list[float], marked: list[bool]) -> None:
    """Horizontal bars of probabilities with their numbers; the marked one is the known truth."""
    places = np.arange(len(names))
    axes.barh(places, shares, height=0.62, color=[_ORANGE if m else _BLUE for m in marked])
    for place, share, mark in zip(places.tolist(), shares, marked, strict=True):
        text = f"{100.0 * share:.1f} %" + (", true" if mark else "")
        axes.annotate(
            text,
            (share, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=7.0,
        )
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.22)  # room for the number beside a full bar
    axes.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "0.5", "0.75", "1"])
    axes.spines["bottom"].set_bounds(0.0, 1.0)
    axes.set_xlabel("probability")


def symbol_text(symbol: str) -> str:
    r"""A Hermann-Mauguin symbol as matplotlib's mathtext, with bars and screw axes.

    Example:
        >>> symbol_text("P2_1/c"), symbol_text("Fm-3m")
        ('$P2_{1}/c$', '$Fm\\overline{3}m$')
    """
    if symbol not in SYMBOLS:
        raise ValueError(f"symbol_text: symbol must be one of `xrdfast.symmetry.SYMBOLS`, got {symbol!r}")
    out, rest = "", symbol
    while rest:
        mark, rest = rest[0], rest[1:]
        if mark == "-":
            out, rest = out + rf"\overline{{{rest[0]}}}", rest[1:]
        elif mark == "_":
            out, rest = out + f"_{{{rest[0]}}}", rest[1:]
        else:
            out += mark
    return f"${out}$"
