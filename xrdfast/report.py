"""The plot of one answer: the pattern, the ranked space groups, the crystal systems.

For print: text stays text in PDF and SVG, and colour-blind readers and grey copiers tell the colours apart
(Okabe & Ito, 2008). Not for tables (`xrdfast.cli`) or plots of many patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xrdfast.bragg import Grid
from xrdfast.data.files import write_atomically
from xrdfast.errors import InputError
from xrdfast.symmetry import CRYSTAL_SYSTEM_INDEX, CRYSTAL_SYSTEMS, SYMBOLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from xrdfast.prediction import Pattern, Prediction

FORMATS = ("png", "pdf", "svg")
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
_N_LABELS = 12  # strongest lines that get their hkl
_LABEL_GAP = 2.6  # degrees between two of them


def save_plot(prediction: Prediction, path: str | Path, *, title: str = "") -> None:
    """Draws an answer into a file, whole or not at all.

    Args:
        prediction: the answer; its whole list of candidates is drawn.
        path: ending in .png, .pdf or .svg.
        title: what the pattern is, plain text.

    Raises:
        InputError: for another ending, or where the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        got = path.suffix or "no suffix"
        raise InputError(f"{path}: plot: must end in .{', .'.join(FORMATS)}, got {got}")
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = plot_prediction(prediction, title=title)
        metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else None
        with write_atomically(path) as file:
            figure.savefig(file, format=kind, dpi=200, metadata=metadata)


def plot_prediction(prediction: Prediction, *, title: str = "") -> Figure:
    """The plot as a matplotlib figure: pattern above, space groups and crystal systems below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    panels = figure.subplot_mosaic([["pattern", "pattern"], ["groups", "systems"]], height_ratios=(1.25, 1.0))
    _draw_pattern(panels["pattern"], prediction)
    _draw_groups(panels["groups"], prediction)
    _draw_systems(panels["systems"], prediction)
    if title:
        panels["pattern"].set_title(title.replace("$", r"\$"), loc="left", fontsize=9.0, fontweight="bold")
    for letter, axes in zip("abc", panels.values(), strict=True):
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


def _draw_pattern(axes: Axes, prediction: Prediction) -> None:
    pattern = prediction.pattern
    if pattern.scan is not None:
        two_theta, counts = pattern.scan
        low = float(counts.min())
        share = (counts - low) / max(float(counts.max()) - low, 1e-300)
        axes.plot(two_theta, 100.0 * share, color=_GREY, lw=0.8)
        axes.vlines(pattern.two_theta, -7.0, -2.0, color=_BLUE, lw=0.7)
        axes.set_ylim(-10.0, 108.0)
    else:
        axes.vlines(pattern.two_theta, 0.0, pattern.intensity, color=_BLUE, lw=1.0)
        axes.set_ylim(0.0, 105.0 if pattern.hkl is None else 116.0)
        _label_lines(axes, pattern)
    grid = Grid()
    axes.set_xlim(grid.two_theta_min, grid.two_theta_max)
    axes.set_xlabel(r"$2\theta$ (degrees) at the model's wavelength")
    axes.set_ylabel("intensity, strongest = 100")
    source = f"{prediction.kind}, {prediction.wavelength:.5f} Å ({prediction.wavelength_source})"
    axes.set_title(source, loc="right", fontsize=7.5)


def _label_lines(axes: Axes, pattern: Pattern) -> None:
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
            (place, float(pattern.intensity[i])),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=6.0,
        )


def _draw_groups(axes: Axes, prediction: Prediction) -> None:
    candidates = prediction.candidates
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
