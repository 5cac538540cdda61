"""The CUDA sources, compiled against the emulator and called through the same Python as on a GPU.

They must agree with the float64 references in every thread order. The kernels on their own, under sanitizers,
are in tests/emulation; what a GPU adds is marked `gpu`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ops.gpu_runs import on_a_gpu
from xrdfast import _native
from xrdfast.bragg import Grid
from xrdfast.data.structures import PackedStructures, from_arrays
from xrdfast.ops import render, simulate
from xrdfast.ops.render import render_sticks
from xrdfast.ops.simulate import Families, Lines, simulate_families, simulate_lines

ROOT = Path(__file__).resolve().parent.parent.parent
TURN = torch.tensor([[-1, 0, 0], [0, -1, 0], [0, 0, 1]], dtype=torch.int8)  # two-fold axis along c


def structures() -> PackedStructures:
    """Cells of all shapes, refusals of every kind; partial occupancies, displacement, mixed elements."""
    rng = np.random.default_rng(11)
    cells = [rng.normal(size=(3, 3)) + np.diag(rng.uniform(3.0, 7.0, 3)) for _ in range(4)]
    cells += [np.eye(3) * 3.0, np.zeros((3, 3)), np.eye(3) * np.nan, np.eye(3) * 1e6, np.eye(3) * 0.5]
    cells += [np.eye(3) * 3.0, np.eye(3) * 3.0, np.diag([2.9, 2.9, 61.0])]
    atoms = []
    for n in (1, 2, 9, 40, 1, 1, 1, 1, 1, 1, 1, 50):  # the last fills shared memory twice
        number = rng.choice([1, 8, 26, 82], size=n)
        occupancy = rng.choice([1.0, 0.35], size=n)
        atoms.append((number, rng.uniform(-1, 1, (n, 3)), occupancy, rng.choice([0.0, 0.7, 1.3], size=n)))
    atoms[9] = (np.array([118]), *atoms[9][1:])  # no form factor
    atoms[10] = (*atoms[10][:2], np.zeros(1), atoms[10][3])  # nothing there
    packed = from_arrays(cells, atoms, [str(i) for i in range(len(cells))])
    # Rotations for some: the identity and a turn for the 5th (cubic cell), none for the others.
    counts = torch.tensor([2 if i == 4 else 0 for i in range(len(cells))])
    return dataclasses.replace(
        packed,
        rotation_offset=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        rotations=torch.stack([torch.eye(3, dtype=torch.int8), TURN]),
    )


def arguments_of(function: Callable, op: str, *given, monkeypatch: pytest.MonkeyPatch, **settings) -> tuple:
    """What the public function hands to its operator."""
    seen = []
    with monkeypatch.context() as patch:
        original = getattr(torch.ops.xrdfast, op)
        patch.setattr(torch.ops.xrdfast, op, lambda *x: seen.append(x) or original(*x))
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # so that it goes through the operator
        function(*given, **settings)
    return seen[0]


@pytest.mark.parametrize(("table", "dispersion"), [("pymatgen", False), ("international", True)])
def test_lines_equal_the_reference(emulated, order, table, dispersion, monkeypatch) -> None:
    settings = {"form_factors": table, "dispersion": dispersion}
    given = arguments_of(simulate_lines, "simulate_lines", structures(), monkeypatch=monkeypatch, **settings)
    want = Lines(*simulate.simulate_lines_reference(*given))
    got = Lines(*simulate._lines_on_device(emulated, *given))
    assert want.status.tolist() == [0, 0, 0, 0, 0, 4, 4, 3, 1, 2, 5, 0]
    for name in ("offset", "hkl", "status"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("two_theta", "d_spacing", "intensity"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-12, atol=1e-11)


def test_families_equal_the_reference(emulated, order, monkeypatch) -> None:
    given = arguments_of(simulate_families, "simulate_families", structures(), monkeypatch=monkeypatch)
    want = Families(*simulate.simulate_families_reference(*given))
    got = Families(*simulate._families_on_device(emulated, *given))
    for name in ("offset", "hkl", "multiplicity", "status"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(got.f_squared, want.f_squared, rtol=1e-6, atol=1e-9)
    assert set(got.multiplicity.tolist()) == {2, 4}


def test_pieces_and_strides_change_nothing(emulated, monkeypatch) -> None:
    everything = structures()
    given = arguments_of(simulate_families, "simulate_families", everything, monkeypatch=monkeypatch)
    whole = simulate._families_on_device(emulated, *given)
    spread = [torch.stack([x, x], dim=-1)[..., 0] if isinstance(x, torch.Tensor) else x for x in given]
    monkeypatch.setattr(simulate, "_ROWS_A_CALL", 300)
    for a, b in zip(whole, simulate._families_on_device(emulated, *spread), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [0, 1])
def test_small_sets(emulated, n: int, monkeypatch) -> None:
    """No structure, and one that is refused."""
    some = structures()[5 : 5 + n]
    given = arguments_of(simulate_lines, "simulate_lines", some, monkeypatch=monkeypatch)
    got = Lines(*simulate._lines_on_device(emulated, *given))
    assert got.offset.tolist() == [0] * (n + 1)
    assert got.status.tolist() == [4] * n
    assert got.hkl.shape == (0, 3)
    given = arguments_of(simulate_families, "simulate_families", some, monkeypatch=monkeypatch)
    assert Families(*simulate._families_on_device(emulated, *given)).offset.tolist() == [0] * (n + 1)


def stick_batch(n_patterns: int, seed: int = 3) -> tuple[torch.Tensor, ...]:
    """Random families, many of them coincident in the cubic cells, on rows of four as stores have them."""
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 700, (n_patterns,), generator=rng)
    if n_patterns:
        sizes[0] = 0
    offset = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    n = int(offset[-1])
    table = torch.randint(-9, 10, (n, 4), generator=rng).to(torch.int16)
    table[:, 3] = 2 + table[:, 3].abs()
    f_squared = torch.rand(n, generator=rng) ** 6 * 1e4
    edge = torch.rand(n_patterns, 1, generator=rng, dtype=torch.float64) * 4.0 + 4.0
    metric = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64) / edge**2
    metric[1::2, 1] *= 1.07
    metric[1::2, 4] += 0.003
    b_overall = torch.rand(n_patterns, generator=rng, dtype=torch.float64) * 2.0
    return offset, table[:, :3], table[:, 3], f_squared, metric, b_overall


@pytest.mark.parametrize("grid", [Grid(), Grid(two_theta_min=0.0, two_theta_max=180.0, two_theta_step=0.02)])
@pytest.mark.parametrize("n_patterns", [0, 1, 3, 8])
def test_sticks_equal_the_reference(emulated, order, n_patterns: int, grid: Grid) -> None:
    settings = (1.54056, grid.two_theta_min, grid.two_theta_step, grid.n_points)
    given = (*stick_batch(n_patterns), *settings)
    want = render.render_sticks_reference(*given)
    got = render._render_sticks_on_device(emulated, *given)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
    if n_patterns > 1:
        assert not bool(got[0].any())
        assert got[1:].amax(1).tolist() == [100.0] * (n_patterns - 1)


def test_sticks_with_a_nan_are_blank(emulated, order) -> None:
    """Wherever the NaN comes among the lines: here in a first one, which others follow."""
    offset, hkl, multiplicity, f_squared, *rest = stick_batch(8)
    norm = hkl.double().square().sum(1)
    for begin, end in itertools.pairwise(offset.tolist()[1:]):
        f_squared[begin + norm[begin:end].where(norm[begin:end] > 0, math.inf).argmin()] = torch.nan
    given = (offset, hkl, multiplicity, f_squared, *rest, 1.54056, 5.0, 0.01, 8500)
    assert not render.render_sticks_reference(*given).any()
    assert not render._render_sticks_cpu(*given).any()
    assert not render._render_sticks_on_device(emulated, *given).any()


@pytest.mark.parametrize("bin_edge", [10.0, 20.01, 77.77])
def test_a_line_on_the_edge_of_a_point_stays_one_line(emulated, bin_edge: float) -> None:
    """Two families a hair below and above the edge of a point add up, at the smaller angle."""
    g2 = (2.0 * np.sin(np.radians(np.array([bin_edge - 1e-6, bin_edge + 1e-6]) / 2.0)) / 1.54056) ** 2
    metric = torch.tensor([[g2[0], g2[1], 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    hkl = torch.tensor([[1, 0, 0], [0, 1, 0]], dtype=torch.int16)
    multiplicity, f_squared = torch.ones(2, dtype=torch.int16), torch.ones(2)
    offset, b_overall = torch.tensor([0, 2]), torch.zeros(1, dtype=torch.float64)
    given = (offset, hkl, multiplicity, f_squared, metric, b_overall, 1.54056, 5.0, 0.01, 8500)
    want = render.render_sticks_reference(*given)
    got = render._render_sticks_on_device(emulated, *given)
    assert torch.equal(got.nonzero(), want.nonzero())
    assert len(got.nonzero()) == 1


def test_every_kernel_compiles_for_gpus_without_spills(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    script = str(ROOT / "benchmarks" / "check_cuda.sh")
    done = subprocess.run([script, str(_native.CSRC)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    empty = subprocess.run([script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert empty.returncode == 1
    assert "no .cu found" in empty.stdout


def to_device(given: PackedStructures) -> PackedStructures:
    """The same with every tensor on the GPU."""
    tensors = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    moved = {k: v.cuda() for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(given, **moved)


@pytest.mark.gpu
@pytest.mark.parametrize("function", [simulate_lines, simulate_families])
def test_simulation_on_a_gpu(gpu, function) -> None:
    given = structures()
    there = to_device(given)
    # No graph: the host allocates what was counted.
    for got, want in zip(on_a_gpu(lambda: function(there), captures=False), function(given), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-5)


@pytest.mark.gpu
def test_sticks_on_a_gpu(gpu) -> None:
    settings = (1.54056, 5.0, 0.01, 8500)
    batch = stick_batch(8)
    there = [x.cuda() for x in batch]
    # The kernel alone can be captured; the operator checks the offsets on the host.
    (got,) = on_a_gpu(lambda: [render._render_sticks_on_device(_native.cuda(), *there, *settings)])
    want = render_sticks(*batch, wavelength=1.54056, grid=Grid())
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
    assert torch.equal(render_sticks(*there, wavelength=1.54056, grid=Grid()).cpu(), got)
