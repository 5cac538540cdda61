"""What `benchmarks.measured_scans` prints beside its table: parts of the scans, calibration, wrong answers explained.

Every share of a part is the mean over its copy groups of the mean in a group. Not for what is fitted
(`benchmarks.measured_scans`, `benchmarks.fit_retrieval`).
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import spglib
import torch
from torch import Tensor

from xrdfast.bragg import KA1_WAVELENGTH
from xrdfast.data.known_bins import GRID, without_weak
from xrdfast.data.known_lines import q_squared
from xrdfast.data.whole_scans import preprocess_whole_scans
from xrdfast.evaluation import expected_calibration_error
from xrdfast.posterior import JointPosterior
from xrdfast.retrieval import SMOOTH_WIDTH, KnownStructures
from xrdfast.symmetry import SYMBOLS, class_index, class_names

TRAINED_ON = ("inorganic_mp", "amcsd")
BANDS = {"head, 200 or more": 200, "middle, 50 to 199": 50, "tail, fewer than 50": 0}
MIN_EXTINCTION = 8  # scans of an extinction group that has a row
ALIKE, NEAR_TIE = (
    0.7,
    0.03,
)  # likeness of what may be the phase; difference of likenesses that decides nothing
DRAWS = 100  # of labels, for the calibration error by chance
_LINE_REACH = 0.2  # degrees, to which a line explains what is measured around it


class Part(NamedTuple):
    """Scans that a row is about."""

    kind: str
    name: str
    member: Tensor  # (n_scans,) bool


def group_share(group: Tensor) -> Tensor:
    """Weights (n_scans,) that sum to one, equal for every copy group."""
    _, place = group.unique(return_inverse=True)
    share = 1.0 / torch.bincount(place)[place].double()
    return share / share.sum()


def parts(number: Tensor, folder: Path) -> Iterator[Part]:
    """Crystal systems, frequency bands of the groups in the training's files, extinction groups of 8 scans or more."""
    index = number - 1
    for level in ("crystal_system", "extinction_group"):
        classes = torch.tensor(class_index(level))[index]
        for one, name in enumerate(class_names(level)):
            member = classes == one
            least = MIN_EXTINCTION if level == "extinction_group" else 1
            if int(member.sum()) >= least:
                yield Part(level.replace("_", " "), name, member)
        if level == "crystal_system":
            yield from _bands(number, folder)


def _bands(number: Tensor, folder: Path) -> Iterator[Part]:
    with (folder / "class_balance.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    count = torch.tensor([sum(int(row[name]) for name in TRAINED_ON) for row in rows])[number - 1]
    above = torch.full_like(count, 1 << 30)
    for name, least in BANDS.items():
        yield Part("structures of the group to train on", name, (count >= least) & (count < above))
        above = torch.full_like(count, least)


def right_shares(probability: Tensor, number: Tensor, group: Tensor) -> list[float]:
    """Per cent right by copy group: crystal system, extinction group, space group, and among the first five."""
    order, share = probability.argsort(dim=1, descending=True, stable=True), group_share(group)
    right = []
    for level in ("crystal_system", "extinction_group"):
        said = JointPosterior(probability).marginal(level).argmax(1)
        right.append(said == torch.tensor(class_index(level))[number - 1])
    right += [order[:, 0] == number - 1, (order[:, :5] == (number - 1)[:, None]).any(1)]
    return [100.0 * float((one.double() * share).sum()) for one in right]


def show_parts(answers: Mapping[str, Tensor], number: Tensor, group: Tensor, folder: Path) -> None:
    """Prints a row a part and answer."""
    print(
        f"\nby copy group, per cent right\n{'part':<58}{'scans':>6}  {'answer':<10}{'system':>7}{'ext.':>7}",
        end="",
    )
    print(f"{'top-1':>7}{'top-5':>7}")
    everything = Part("all", "", torch.ones_like(number, dtype=torch.bool))
    for part in (everything, *parts(number, folder)):
        label = f"{part.kind}: {part.name}" if part.name else part.kind
        label = label if len(label) <= 56 else label[:55] + "…"
        for who, probability in answers.items():
            found = right_shares(probability[part.member], number[part.member], group[part.member])
            columns = "".join(f"{x:7.1f}" for x in found)
            print(f"{label:<58}{int(part.member.sum()):>6}  {who:<10}{columns}")


def show_calibration(
    answers: Mapping[str, Tensor], thresholds: Mapping[str, Tensor], number: Tensor, tested: Tensor
) -> None:
    """Ends a heading's line, then prints calibration errors and what sets of a threshold hold.

    Args:
        answers: (n_scans, 230) of each.
        thresholds: (n_scans,) of each, from which probability a group belongs to its set.
        number: (n_scans,).
        tested: (n_scans,) bool, scans to print it of.
    """
    print(
        ", per cent; ECE: expected calibration error, by chance: the mean of labels drawn from the answer itself"
    )
    columns = ("ECE", "by chance", "ECE system", "held by sets", "median size", "mean size")
    print(f"{'answer':<19}" + "".join(f"{name:>13}" for name in columns))
    for who, probability in answers.items():
        answer, index = JointPosterior(probability[tested]), number[tested] - 1
        system = torch.tensor(class_index("crystal_system"))[index]
        sets = answer.conformal_sets(thresholds[who][tested, None])
        size = sets.sum(1).double()
        cells = [
            100.0 * expected_calibration_error(answer.space_group, index),
            100.0 * _error_by_chance(answer.space_group),
            100.0 * expected_calibration_error(answer.marginal("crystal_system"), system),
            100.0 * float(sets[torch.arange(len(index)), index].double().mean()),
            float(size.quantile(0.5)),
            float(size.mean()),
        ]
        print(f"{who:<19}" + "".join(f"{x:13.1f}" for x in cells))


def _error_by_chance(probability: Tensor) -> float:
    """Expected calibration error of an answer that is right about itself, from as few patterns."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(probability, DRAWS, replacement=True, generator=generator)
    return float(np.mean([expected_calibration_error(probability, labels) for labels in drawn.T]))


# --- wrong answers --------------------------------------------------------------------------------------------------


class Fitted(NamedTuple):
    """The best structure of a space group for a scan."""

    row: int
    likeness: float
    explained: float  # share of the amplitude (weak points damped) within 0.2 degrees of its strongest lines


def best_of_groups(
    known: KnownStructures, pattern: Tensor, measured: Tensor, numbers: tuple[int, ...]
) -> dict[int, Fitted]:
    """Of those that a scan was compared with in detail; a group without one is left out.

    Args:
        known: the library.
        pattern: (1, n_points) on the library's grid.
        measured: (1, 2).
        numbers: space groups.
    """
    candidate, score, fit, *_ = known._compared(pattern, measured, None)
    group = known.space_group_number[candidate[0].clamp(min=0)]
    found = {}
    for number in numbers:
        likeness = torch.where((group == number) & (candidate[0] >= 0), score[0], -1.0)
        place = int(likeness.argmax())
        if float(likeness[place]) >= 0.0:
            row = int(candidate[0, place])
            share = _explained(known, row, fit[0, place].double(), pattern[0])
            found[number] = Fitted(row, float(likeness[place]), share)
    return found


def _explained(known: KnownStructures, row: int, fit: Tensor, pattern: Tensor) -> float:
    lines = known.hkl[known.line_offset[row] : known.line_offset[row + 1]]
    n = len(lines)
    q2 = q_squared(lines, known.metric[row].expand(n, -1))
    moved = torch.stack(
        [q_squared(lines, change.expand(n, -1)) for change in known.metric_change[row]], dim=1
    )
    q = q2.sqrt() * torch.exp(0.5 * (moved / q2[:, None]) @ fit[:6])
    two_theta = torch.rad2deg(2.0 * torch.asin((0.5 * KA1_WAVELENGTH * q).clamp(max=1.0))) + fit[6]
    place = (two_theta - GRID.two_theta_min) / GRID.two_theta_step
    reach = _LINE_REACH / GRID.two_theta_step
    covered = ((torch.arange(GRID.n_points) - place[:, None]).abs() <= reach).any(0)
    height = without_weak(pattern).sqrt()
    return float((height * covered).sum() / height.sum().clamp(min=1e-30))


@functools.cache
def _operations(number: int) -> tuple[int, frozenset[tuple[int, ...]]]:
    """Rotations of a group in its standard setting, and how many operations a cell has."""
    hall = next(h for h in range(1, 531) if spglib.get_spacegroup_type(h).number == number)
    found = spglib.get_symmetry_from_database(hall)["rotations"]
    return len(found), frozenset(tuple(np.ravel(turn).tolist()) for turn in found)


def relation(true: int, said: int) -> str:
    """How two space groups are related, as far as powder patterns tell.

    Example:
        >>> relation(19, 62)
        'point group 222 is part of mmm: pseudo-symmetry, or a lowered structure'
    """
    levels = {
        name: class_index(name)
        for name in ("extinction_group", "point_group", "bravais_lattice", "crystal_system")
    }
    same = {name: index[true - 1] == index[said - 1] for name, index in levels.items()}
    points = [class_names("point_group")[levels["point_group"][one - 1]] for one in (true, said)]
    if same["extinction_group"]:
        return "same extinction group: no absence in a powder tells the two apart"
    if same["point_group"] and same["bravais_lattice"]:
        alike = f"same point group {points[0]} and lattice"
        return f"{alike}: glide planes or screw axes alone differ, a few weak lines decide"
    turns = [_operations(one)[1] for one in (true, said)]
    if turns[0] < turns[1]:
        return f"point group {points[0]} is part of {points[1]}: pseudo-symmetry, or a lowered structure"
    if turns[1] < turns[0]:
        return f"point group {points[1]} is part of {points[0]}: symmetry taken too low"
    if same["crystal_system"]:
        return "same crystal system, another lattice or class"
    return "another crystal system"


def _name(known: KnownStructures, fitted: Fitted) -> str:
    row = fitted.row
    return f"{known.family[row] or known.formula[row]} ({known.ids[row]}), likeness {fitted.likeness:.2f}"


def explain(
    known: KnownStructures, found: Mapping[int, Fitted], true: int, said: int, network: int | None
) -> list[str]:
    """What a crystallographer would say of a wrong answer, from the structures that fit best."""
    facts = [relation(true, said)]
    right, wrong = found.get(true), found.get(said)
    if wrong is not None:
        facts.append(
            f"said for {_name(known, wrong)}, whose lines explain {100.0 * wrong.explained:.0f} % of the scan"
        )
        if wrong.likeness < ALIKE:
            facts.append(
                "nothing known of the answer's group is really alike: a guess from resemblance, not a match"
            )
    if right is None:
        facts.append("no structure of the right group came near: not in the library")
    elif right.likeness < ALIKE:
        facts.append(f"right group at best {_name(known, right)}: the phase is not in the library")
    else:
        facts.append(f"right group has {_name(known, right)}, {100.0 * right.explained:.0f} % explained")
        if wrong is not None and abs(wrong.likeness - right.likeness) < NEAR_TIE:
            mine, its = (known.family[one.row] or known.formula[one.row] for one in (right, wrong))
            facts.append(
                f"{mine} is listed under both groups: the label, not the pattern, decides"
                if mine == its
                else "a near tie: intensities of a few lines decide"
            )
    if max((one.explained for one in found.values()), default=0.0) < 0.6:
        facts.append("much of the scan is explained by neither: another phase, or noise taken for peaks")
    if network is not None:
        facts.append(f"the network alone said {SYMBOLS[network - 1]} ({network})")
    return facts


def show_wrong(
    known: KnownStructures,
    answers: Mapping[str, Tensor],
    scans: tuple[list[np.ndarray], list[np.ndarray], list[float]],
    number: Tensor,
    group: Tensor,
    tested: Tensor,
    n: int = 10,
) -> None:
    """Prints the most confident wrong answers of the last of `answers`, at most one of a copy group."""
    who, probability = list(answers.items())[-1]
    share, said = probability.max(1)
    wrong = ((said != number - 1) & tested).nonzero().flatten()
    wrong = wrong[share[wrong].argsort(descending=True)].tolist()
    chosen = {int(group[scan]): scan for scan in reversed(wrong)}
    order = sorted(chosen.values(), key=lambda scan: -float(share[scan]))[:n]
    print(
        f"\n{len(order)} wrong answers of {who}, the most confident first, of scans that no calibration saw"
    )
    for scan in order:
        true, mine = int(number[scan]), int(said[scan]) + 1
        pattern, measured = preprocess_whole_scans(
            *([column[scan]] for column in scans),
            grid=GRID,
            model_wavelength=KA1_WAVELENGTH,
            smooth_width=SMOOTH_WIDTH,
        )
        network = int(answers["network"][scan].argmax()) + 1 if "network" in answers else None
        print(
            f"scan {scan}: {SYMBOLS[true - 1]} ({true}), {100.0 * float(probability[scan, true - 1]):.0f} %; "
            f"said {SYMBOLS[mine - 1]} ({mine}), {100.0 * float(share[scan]):.0f} %"
        )
        for fact in explain(
            known, best_of_groups(known, pattern, measured, (true, mine)), true, mine, network
        ):
            print(f"    {fact}")
