"""The package as a whole: import arrows, lightness, public names, installation, and a bare source tree."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import xrdfast
from xrdfast.data.structures import from_arrays

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "xrdfast"

# room -> rooms it may import from. A new arrow is a decision: change the table with the reason in the commit.
ARROWS = {
    "errors": set(),
    "processes": set(),
    "symmetry": set(),
    "bragg": set(),
    "scattering": set(),
    "_native": set(),
    "ops": {"_native", "scattering"},
    "data": {
        "symmetry",
        "bragg",
        "scattering",
        "ops",
        "errors",
        "processes",
        "_native",
    },  # text is parsed without torch, which ops need
    "models": {"ops", "symmetry", "bragg", "errors"},
    "posterior": {"symmetry"},
    "suspicion": {"posterior"},
    "evaluation": {"symmetry", "posterior"},
    "distillation": {"ops"},
    "training": {
        "models",
        "data",
        "ops",
        "symmetry",
        "bragg",
        "evaluation",
        "posterior",
        "suspicion",  # whose weights belong to a model, as its calibration does
        "distillation",
        "errors",
    },
    "retrieval": {
        "data",
        "ops",
        "symmetry",
        "bragg",
        "posterior",  # which joins its answer with a network's
        "errors",
    },
    "lines": {"data", "ops", "symmetry", "bragg", "errors"},
    "prediction": {
        "models",
        "data",
        "lines",
        "symmetry",
        "bragg",
        "ops",
        "posterior",
        "suspicion",
        "training",
        "errors",
    },
    "evidence": {"prediction", "bragg"},
    "report": {"data", "symmetry", "models", "posterior", "bragg", "errors"},
    "screening": {
        "data",
        "models",
        "ops",
        "symmetry",
        "bragg",
        "posterior",
        "suspicion",
        "prediction",
        "processes",
        "errors",
    },
    "terminal": set(),
    "demo": None,  # the main job: anything
    "cli": None,
    "__main__": {"cli"},
    "__init__": set(),
}


def room_of(path: Path) -> str:
    """First folder or module name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_room(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()


def imports_of(path: Path) -> set[str]:
    """Rooms of the package that a file imports when it runs, at whatever level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    rooms = set()
    for node in ast.walk(tree):
        if node in checked_only:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            if package == "xrdfast" and rest and is_room(rest[0]):
                rooms.add(rest[0])
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_arrows(path: Path) -> None:
    room = room_of(path)
    assert room in ARROWS, f"{room} is a new room: give it a line in ARROWS"
    allowed = ARROWS[room]
    if allowed is not None:
        assert imports_of(path) - allowed - {room} == set()


def test_every_room_of_the_table_is_there() -> None:
    assert set(ARROWS) == {room_of(path) for path in PACKAGE.rglob("*.py")}


def run(code: str, *arguments: object, **changes: str) -> str:
    """Standard output of a program run in the source tree."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | changes,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = ("torch", "numpy", "pymatgen", "matplotlib", "spglib", "gemmi", "click", "rich")
    loaded = run(f"import sys, xrdfast; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"


def test_help_is_there_at_once() -> None:
    """Under 0.3 s of processor time beyond what the interpreter takes to start, best of five."""

    def best(*arguments: str) -> float:
        times = []
        for _ in range(5):
            before = os.times()
            subprocess.run([sys.executable, *arguments], capture_output=True, cwd=ROOT, check=True)
            after = os.times()
            times.append(
                after.children_user + after.children_system - before.children_user - before.children_system
            )
        return min(times)

    assert best("-m", "xrdfast", "--help") < 0.3 + best("-c", "pass")


def test_public_names() -> None:
    assert set(xrdfast.__all__) <= set(dir(xrdfast))
    for name in xrdfast.__all__:
        assert getattr(xrdfast, name) is not None
    for name in xrdfast._PUBLIC:
        assert getattr(xrdfast, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = xrdfast.nothing


def sources() -> list[Path]:
    """Every source file of the project."""
    found = [p for f in ("xrdfast", "csrc", "tests", "benchmarks") for p in (ROOT / f).rglob("*")]
    return [ROOT / "setup.py", *sorted(p for p in found if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"))]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(('"""', 'r"""', "// ")), "the first lines say what the file is for"
    assert len(text.splitlines()) < 600
    names = {part.strip("_") for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & {"utils", "util", "common", "misc", "tools", "helpers", "core", "shared"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what an installation reads, so that building leaves nothing in the tree."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("xrdfast", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


# Hides packages: as sitecustomize.py it works in every Python process that has its folder on the path.
HIDE = """
import sys

class _Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, _Hidden())
"""


def hiding(folder: Path, *packages: str) -> str:
    """PYTHONPATH under which these packages seem not to be installed."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDE.replace("{HIDDEN}", repr(set(packages))))
    return str(folder)


def pip(*arguments: object, **changes: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_holds_sources_and_nothing_compiled(source: Path, tmp_path: Path) -> None:
    without = hiding(tmp_path / "hide", "torch", "pybind11")
    pip("wheel", source, "--no-deps", "--no-build-isolation", "-w", tmp_path, PYTHONPATH=without)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {f"xrdfast/csrc/{p.name}" for p in (ROOT / "csrc").iterdir() if p.suffix not in (".md", ".so")}
    wanted |= {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*") if p.suffix in (".py", ".json")}
    assert "xrdfast/form_factors.json" in wanted
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".a", ".pyc"))]


def test_ahead_of_time_build_needs_headers(source: Path, tmp_path: Path) -> None:
    for name in ("setuptools", "_distutils_hack"):  # and, with -S, nothing else that is installed
        (location,) = importlib.util.find_spec(name).submodule_search_locations
        (tmp_path / name).symlink_to(location)
    done = subprocess.run(
        [sys.executable, "-S", "setup.py", "--version"],
        env=os.environ | {"XRDFAST_AOT": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=source,
        check=False,
    )
    assert done.returncode == 1
    assert "needs pybind11's headers" in done.stderr
    assert "--no-build-isolation" in done.stderr


# Cells of every kind of shape; partial occupancy and displacement among the atoms.
SIMULATE = """
import sys
import numpy as np
from xrdfast import _native
from xrdfast.data.structures import from_arrays
from xrdfast.ops.simulate import simulate_families, simulate_lines

rng = np.random.default_rng(5)
cells = [rng.normal(size=(3, 3)) + np.diag(rng.uniform(4, 12, 3)) for _ in range(20)]
atoms = []
for n in rng.integers(1, 30, 20):
    number, place = rng.choice([6, 14, 26, 82], n), rng.uniform(-1, 1, (n, 3))
    atoms.append((number, place, rng.uniform(0.2, 1, n), rng.uniform(0, 2, n)))
structures = from_arrays(cells, atoms, [str(i) for i in range(20)])
found = {**simulate_lines(structures)._asdict()}
found |= {f"family_{k}": v for k, v in simulate_families(structures)._asdict().items()}
np.savez(sys.argv[1], **found)
print(_native.cpu().__file__)
"""


def test_ahead_of_time_build_gives_the_same_lines(source: Path, tmp_path: Path) -> None:
    """Installed, hot loops are there once an instruction-set level; the best is picked when loaded."""
    target = tmp_path / "installed"
    pip("install", "--no-build-isolation", "--no-deps", "--target", target, source, XRDFAST_AOT="1")
    (module,) = target.glob("xrdfast/_cpu*.so")
    jit = run(SIMULATE, tmp_path / "jit.npz", XRDFAST_BACKEND="native")
    assert not jit.startswith(str(target))
    done = subprocess.run(
        [sys.executable, "-c", SIMULATE, str(tmp_path / "aot.npz")],
        env=os.environ | {"PYTHONPATH": str(target), "XRDFAST_BACKEND": "native", "CXX": "nope"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(module)
    with np.load(tmp_path / "jit.npz") as one, np.load(tmp_path / "aot.npz") as other:
        for name in one.files:
            if one[name].dtype.kind == "f":
                # Two instruction sets: sums in another order, products fused or not.
                np.testing.assert_allclose(other[name], one[name], rtol=1e-6, atol=1e-9)
            else:
                np.testing.assert_array_equal(other[name], one[name])


# What training from packed structures may not need: everything but torch, numpy, safetensors and ninja.
OPTIONAL = ("gemmi", "spglib", "pymatgen", "matplotlib", "click", "rich", "scipy", "pyarrow", "ase")

TRAIN = """
import sys
from pathlib import Path
import torch
import xrdfast.ops.simulate
from xrdfast import PackedStructures, PatternStore, Trainer, generate_store, simulate_lines
from xrdfast.training.config import config_from_dict

torch.set_num_threads(1)
folder = Path(sys.argv[1])
structures = PackedStructures.load(folder / "structures.safetensors")
lines = simulate_lines(structures)
assert lines.status.tolist() == [0] * len(structures)
store = folder / "some.store.safetensors"
assert generate_store(structures, store) == []
assert len(PatternStore.open(store)) == len(structures)
train = {"epochs": 1, "batch_size": 2, "warmup_fraction": 0.0}
config = config_from_dict({"model": {"preset": "small"}, "data": {"stores": [str(store)]}, "train": train})
result = Trainer(config, folder / "run").run()
print(result.status, result.step)
"""


def test_a_bare_source_tree_simulates_and_trains(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    cells = [np.eye(3) * edge for edge in rng.uniform(3, 5, 8)]
    places = np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
    atoms = [(np.array([11 + i, 17]), places, np.ones(2), np.zeros(2)) for i in range(8)]
    structures = from_arrays(cells, atoms, [f"cubic {i}" for i in range(8)])
    structures = dataclasses.replace(
        structures,
        space_group_001=torch.full((8,), 221, dtype=torch.int16),
        space_group_01=torch.full((8,), 221, dtype=torch.int16),
        to_standard=torch.eye(3, dtype=torch.float64).repeat(8, 1, 1),
        fold=torch.tensor([0, 0, 1, 2, 3, 4, 5, 6], dtype=torch.int8),
    )
    structures.save(tmp_path / "structures.safetensors")
    without = hiding(tmp_path / "hide", *OPTIONAL)
    assert run(TRAIN, tmp_path, PYTHONPATH=without, XRDFAST_BACKEND="native") == "finished 3"
    # What does need a hidden package says which.
    done = subprocess.run(
        [sys.executable, "-m", "xrdfast", "--help"],
        env=os.environ | {"PYTHONPATH": without},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("xrdfast: error: click: package: must be installed for the command line")
    code = "from xrdfast.scattering import form_factor_table\nform_factor_table('international')"
    with pytest.raises(AssertionError, match="gemmi"):
        run(code, PYTHONPATH=without)
