"""The plot of an answer: what it shows, its formats, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest

from xrdfast.bragg import KA1_WAVELENGTH
from xrdfast.errors import InputError
from xrdfast.evidence import Evidence
from xrdfast.prediction import Candidate, Pattern, Prediction
from xrdfast.report import AXES, FORMATS, SCALES, plot_prediction, save_plot, symbol_text
from xrdfast.symmetry import CRYSTAL_SYSTEMS, SYMBOLS


def prediction(*, true_number: int = 0, hkl: bool = False, scan: bool = False) -> Prediction:
    two_theta = np.array([27.37, 31.70, 45.45, 46.0])
    pattern = Pattern(
        two_theta,
        np.array([8.0, 100.0, 65.0, 3.0]),
        np.array([[1, 1, 1], [2, 0, 0], [2, -2, 0], [11, 1, 0]]) if hkl else None,
        (np.linspace(5.0, 95.0, 2000), np.linspace(9.0, 3.0, 2000)) if scan else None,
    )
    candidates = [Candidate(number, SYMBOLS[number - 1], p, {}) for number, p in ((225, 0.7), (14, 0.2))]
    systems = [(name, 0.7 if name == "cubic" else 0.05) for name in reversed(CRYSTAL_SYSTEMS)]
    kind = "structure" if hkl else "scan" if scan else "sticks"
    superclasses = {"crystal_system": tuple(systems)}
    return Prediction(
        tuple(candidates), superclasses, kind, 1.54056, "given", (), pattern, true_number=true_number
    )


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("scale", SCALES)
def test_axes_and_scales(axis, scale):
    """Everything stays inside, in whatever unit; rows of ticks have their names."""
    evidence = [Evidence(31.7, 100.0, 2.0), Evidence(27.37, 8.0, -0.1)]
    for kind in ({"scan": True}, {"hkl": True}):
        figure = plot_prediction(
            prediction(**kind),
            axis=axis,
            scale=scale,
            evidence=evidence,
            ticks=("salt.cif", np.array([31.7])),
        )
        figure.canvas.draw()
        pattern, ticks = figure.axes[0], figure.axes[1]
        names = [label.get_text() for label in ticks.get_yticklabels()]
        assert names == ["peaks found"] * ("scan" in kind) + ["rests on", "salt.cif"]
        (place, _), _ = ticks.collections[-1].get_segments()[0]
        d = KA1_WAVELENGTH / (2.0 * np.sin(np.radians(31.7 / 2.0)))
        assert place == pytest.approx({"2theta": 31.7, "d": d, "q": 2.0 * np.pi / d}[axis])
        assert pattern.get_xlim() == ticks.get_xlim() and pattern.get_yscale() in (
            "linear",
            "log",
            "function",
        )
    with pytest.raises(ValueError, match="axis, scale"):
        plot_prediction(prediction(), axis="time")


def test_a_scan_has_its_background():
    figure = plot_prediction(prediction(scan=True))
    assert len(figure.axes[0].lines) == 2


def texts(figure, panel: int) -> list[str]:
    figure.canvas.draw()
    axes = figure.axes[panel]
    return [label.get_text() for label in (*axes.get_yticklabels(), *axes.texts)]


def test_shows_groups_and_systems():
    figure = plot_prediction(prediction(true_number=14))
    groups, systems = texts(figure, 1), texts(figure, 2)
    assert groups[:2] == [r"$Fm\overline{3}m$  (225)", "$P2_{1}/c$  (14)"]
    assert "70.0 %" in groups and "20.0 %, true" in groups
    assert tuple(systems[:7]) == CRYSTAL_SYSTEMS  # in their own order, whatever the ranking
    assert [text for text in systems if "true" in text] == ["5.0 %, true"]


def test_labels_lines_without_overlap():
    labels = texts(plot_prediction(prediction(hkl=True)), 0)
    assert "$111$" in labels and r"$2\overline{2}0$" in labels
    assert r"$11\,1\,0$" not in labels  # 0.55 degrees from a stronger line


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("scan", [False, True])
def test_formats(tmp_path, kind, scan):
    path = tmp_path / f"a.{kind}"
    save_plot(prediction(scan=scan), path, title="cost in $ & names_like_this")
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[kind]
    content = path.read_bytes()
    assert content.startswith(start)
    save_plot(prediction(scan=scan), path, title="cost in $ & names_like_this")
    if kind != "svg":  # an SVG carries random ids
        assert path.read_bytes() == content


def test_refuses_other_endings_and_folders(tmp_path):
    with pytest.raises(InputError, match=r"a.bmp: plot: must end in .png, .pdf, .svg, got .bmp"):
        save_plot(prediction(), tmp_path / "a.bmp")
    with pytest.raises(InputError, match="must be writable"):
        save_plot(prediction(), tmp_path / "none" / "a.png")


def test_every_symbol_can_be_typeset():
    from matplotlib.mathtext import MathTextParser

    parser = MathTextParser("path")
    for symbol in SYMBOLS:
        parser.parse(symbol_text(symbol))
    with pytest.raises(ValueError, match="symbol_text: symbol must be one of"):
        symbol_text("Q4")
