"""What is printed beside the table of measured scans: parts, calibration, relations, facts on wrong answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.measured_report import (
    Fitted,
    best_of_groups,
    explain,
    group_share,
    parts,
    relation,
    right_shares,
    show_calibration,
    show_wrong,
)
from tests.test_measured_scans import library, measured
from xrdfast.data.whole_scans import preprocess_whole_scans
from xrdfast.retrieval import GRID, SMOOTH_WIDTH


def test_copy_groups_weigh_the_same() -> None:
    assert group_share(torch.tensor([7, 7, 9])).tolist() == [0.25, 0.25, 0.5]


def test_shares_right_at_every_level() -> None:
    """One right, one right in the extinction group alone (225 for 216), one in the crystal system alone (221)."""
    probability = torch.zeros(3, 230)
    probability[0, 224] = probability[1, 224] = probability[2, 220] = 1.0
    found = right_shares(probability, torch.tensor([225, 216, 225]), torch.tensor([0, 1, 2]))
    third = 100.0 / 3.0
    assert found == pytest.approx([3 * third, 2 * third, third, third])


def test_parts_cover_every_scan_once(tmp_path: Path) -> None:
    rows = ["space_group,inorganic_mp,amcsd"]
    rows += [f"{n},{150 if n == 225 else 0},{60 if n in (225, 14) else 3}" for n in range(1, 231)]
    (tmp_path / "class_balance.csv").write_text("\n".join(rows))
    number = torch.tensor([225, 14, 100] + [221] * 8)
    found = list(parts(number, tmp_path))
    for kind in ("crystal system", "structures of the group to train on"):
        members = torch.stack([part.member for part in found if part.kind == kind])
        assert members.sum(0).tolist() == [1] * len(number)
    bands = {part.name.split(",")[0]: part.member for part in found if part.kind.startswith("structures")}
    assert [name for scan in range(3) for name, member in bands.items() if member[scan]] == [
        "head",
        "middle",
        "tail",
    ]
    assert [int(part.member.sum()) for part in found if part.kind == "extinction group"] == [8]


@pytest.mark.parametrize(
    ("true", "said", "text"),
    [
        (173, 176, "same extinction group"),
        (53, 54, "same point group mmm and lattice"),
        (28, 53, "point group mm2 is part of mmm"),
        (55, 28, "point group mm2 is part of mmm: symmetry taken too low"),
        (14, 15, "same crystal system"),
        (12, 167, "another crystal system"),
    ],
)
def test_relations_of_space_groups(true: int, said: int, text: str) -> None:
    assert text in relation(true, said)


def test_facts_on_a_wrong_answer() -> None:
    known = library(["AB", "CD", "AB"], ["salt", "", "salt"], [225, 221, 216])
    near = {225: Fitted(0, 0.9, 0.8), 216: Fitted(2, 0.91, 0.8)}
    facts = " | ".join(explain(known, near, 225, 216, 12))
    assert "salt is listed under both groups" in facts and "C2/m (12)" in facts
    facts = " | ".join(explain(known, {221: Fitted(1, 0.5, 0.4)}, 225, 221, None))
    assert (
        "not in the library" in facts
        and "a guess from resemblance" in facts
        and "explained by neither" in facts
    )
    facts = " | ".join(explain(known, {225: Fitted(0, 0.4, 0.7), 221: Fitted(1, 0.8, 0.7)}, 225, 221, None))
    assert "the phase is not in the library" in facts and "neither" not in facts


def test_best_structures_explain_their_own_scan() -> None:
    known = library(["AB", "CD"], ["", ""], [225, 221])
    scans = measured([4.0], [225])
    pattern, span = preprocess_whole_scans(
        *scans[:3], grid=GRID, model_wavelength=1.54056, smooth_width=SMOOTH_WIDTH
    )
    found = best_of_groups(known, pattern, span, (225, 221, 14))
    assert set(found) == {225, 221}
    assert found[225].row == 0 and found[225].likeness > 0.9
    assert found[225].explained > 0.8 > 0.7 > found[221].explained


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    known = library(["AB", "CD"], ["", ""], [225, 221])
    scans = measured([4.0, 4.0, 4.9], [225, 225, 225])
    probability = torch.full((3, 230), 0.1 / 229.0, dtype=torch.float64)
    probability[:2, 220] = probability[2, 224] = 0.9
    odd, group = torch.tensor([True, True, True]), torch.tensor([1, 1, 3])
    show_calibration(
        {"both": probability}, {"both": torch.full((len(odd),), 0.5)}, scans.space_group_number, odd
    )
    held = capsys.readouterr().out.splitlines()[-1].split()
    # 0.9 sure and right in one of three; labels drawn from the answer itself are right in nine of ten.
    assert held[0] == "both" and float(held[1]) == pytest.approx(56.7)
    assert 0.0 < float(held[2]) < 20.0
    assert float(held[4]) == pytest.approx(33.3) and float(held[5]) == 1.0
    show_wrong(known, {"both": probability}, scans[:3], scans.space_group_number, group, odd)
    shown = capsys.readouterr().out
    assert shown.count("said Pm-3m (221)") == 1 and "1 wrong answers" in shown
