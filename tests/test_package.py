"""The package as a whole: import arrows, lightness, public names, names of modules."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import xrdfast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "xrdfast"

# room -> rooms it may import from. A new arrow is a decision: change the table with the reason in the commit.
ARROWS = {
    "errors": set(),
    "symmetry": set(),
    "bragg": set(),
    "scattering": set(),
    "_native": set(),
    "ops": {"_native", "scattering", "bragg"},
    "data": {"symmetry", "bragg", "scattering", "ops", "errors"},
    "models": {"ops", "symmetry", "bragg", "errors"},
    "posterior": {"symmetry"},
    "evaluation": {"symmetry", "posterior"},
    "training": {"models", "data", "ops", "symmetry", "bragg", "evaluation", "posterior", "errors"},
    "lines": {"data", "ops", "symmetry", "bragg", "errors"},
    "prediction": {"models", "data", "lines", "symmetry", "bragg", "ops", "posterior", "training", "errors"},
    "report": {"data", "symmetry", "models", "posterior", "bragg", "prediction", "errors"},
    "terminal": {"prediction", "symmetry"},
    "demo": None,  # the main job: anything
    "cli": None,
    "__main__": {"cli"},
    "__init__": set(),
}


def room_of(path: Path) -> str:
    """First folder or module name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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
            parts = name.split(".")
            if parts[0] == "xrdfast" and len(parts) > 1 and (PACKAGE / parts[1]).with_suffix(".py").exists():
                rooms.add(parts[1])
            elif parts[0] == "xrdfast" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_arrows(path: Path) -> None:
    room = room_of(path)
    assert room in ARROWS, f"{room} is a new room: give it a line in ARROWS"
    allowed = ARROWS[room]
    if allowed is not None:
        assert imports_of(path) - allowed - {room} == set()


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = ("torch", "numpy", "pymatgen", "matplotlib", "spglib", "gemmi", "click", "rich")
    loaded = run(f"import sys, xrdfast; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"


def test_help_is_there_at_once() -> None:
    """Under 0.3 s beyond what the interpreter takes to start, best of five."""

    def best(*arguments: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, cwd=ROOT, check=True)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best("-m", "xrdfast", "--help") < 0.3 + best("-c", "pass")


def test_public_names() -> None:
    for name in xrdfast.__all__:
        assert getattr(xrdfast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = xrdfast.nothing


def sources() -> list[Path]:
    """Every source file of the project."""
    folders = ("xrdfast", "csrc", "tests", "benchmarks")
    return sorted(
        p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
    )


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8").lstrip()
    assert not text or text.startswith(('"""', "//", "#!")), "the first lines say what the file is for"
    assert path.stem not in ("utils", "common", "misc", "tools", "helpers")
    assert len(text.splitlines()) <= 600
