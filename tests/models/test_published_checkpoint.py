"""Import of the authors' checkpoints: every layout gives the published answers, every other file one line."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models import published_reference
from tests.models.conftest import settle
from tests.models.published_reference import published_logits, published_models
from xrdfast.errors import InputError
from xrdfast.models import import_published_checkpoint


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(4)
    models = published_models()
    settle(models, seed=6)
    return {name: module.eval() for name, module in models.items()}


@pytest.fixture
def authors_tree(monkeypatch):
    """The transcription under the module names of the authors' repository."""
    for name in ("models", "models.XRDecouplerEncoder", "models.XRDecouplerCls"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for cls in vars(published_reference).values():
        if (
            isinstance(cls, type)
            and issubclass(cls, nn.Module)
            and cls.__module__ == published_reference.__name__
        ):
            home = "models.XRDecouplerCls" if cls.__name__.startswith("Cls") else "models.XRDecouplerEncoder"
            monkeypatch.setattr(cls, "__module__", home)
            setattr(sys.modules[home], cls.__name__, cls)


def flat(models: dict[str, nn.Module], prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{part}.{prefix}{name}": t for part, m in models.items() for name, t in m.state_dict().items()}


def check_answers(path: Path, models: dict[str, nn.Module]) -> None:
    own = import_published_checkpoint(path)
    assert own.preset == "paper" and own.training
    own.eval()
    intensity = torch.zeros(2, 8500)
    intensity[0, ::97] = 100 * torch.rand(88, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = published_logits(models, intensity), own(intensity)._asdict()
    for task in want:
        torch.testing.assert_close(got[task], want[task], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_whole_modules(tmp_path, models, authors_tree, monkeypatch, wrapped):
    path = tmp_path / "published.pth"
    saved = {name: nn.DataParallel(module) for name, module in models.items()} if wrapped else models
    torch.save(saved, path)
    monkeypatch.undo()  # the classes are gone when the file is read, as on every other machine
    assert b"models.XRDecouplerEncoder" in path.read_bytes()
    check_answers(path, models)


@pytest.mark.parametrize("layout", ["nested", "flat", "flat wrapped"])
def test_state_dicts(tmp_path, models, layout):
    path = tmp_path / "published.pth"
    if layout == "nested":
        torch.save({name: module.state_dict() for name, module in models.items()}, path)
    else:
        torch.save(flat(models, "module." if layout == "flat wrapped" else ""), path)
    check_answers(path, models)


def small(path: Path, tree: object) -> Path:
    torch.save(tree, path)
    return path


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda s: s.pop("sp.cls.2.bias"), "sp.cls.2.bias: must be in the checkpoint, got none"),
        (lambda s: s.update({"sp.cls.3.weight": torch.ones(1)}), "sp.cls.3.weight: must be a part"),
        (
            lambda s: s.update({"sp.cls.0.weight": torch.ones(128, 1056)}),
            r"must be \(128, 64\), got \(128, 1056\)",
        ),
        (lambda s: s.update({"cs.cls.2.bias": torch.full((7,), torch.nan)}), "cs.cls.2.bias: must be finite"),
        (
            lambda s: s.update({"cs.cls.2.bias": torch.full((7,), 1e300, dtype=torch.float64)}),
            "cs.cls.2.bias: must be finite",
        ),
        (
            lambda s: s.update({"cs.cls.2.bias": torch.ones(7, dtype=torch.int64)}),
            r"cs.cls.2.bias: must be torch.float32, got torch.int64",
        ),
        (
            lambda s: s.update({name: -s[name] for name in s if name.endswith("running_var")}),
            r"running_var: must be >= 0, got -",
        ),
        (lambda s: s.update({"cs.cls.2.bias": 3}), "cs.cls.2.bias: must be a tensor, got int"),
        (lambda s: s.update({"rep.att.index": torch.arange(850).flip(0)}), "rep.att.index: must count"),
        (lambda s: [s.pop(name) for name in list(s) if name.startswith("lt.")], "got no lt"),
    ],
)
def test_another_architecture_is_refused(tmp_path, models, change, pattern):
    state = flat(models)
    change(state)
    with pytest.raises(InputError, match=pattern) as caught:
        import_published_checkpoint(small(tmp_path / "file.pth", state))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "pattern"),
    [
        ([1, 2], "content: must be a dict"),
        ({}, "content: must be a dict"),
        ({"weights": torch.ones(2)}, "got no rep, sp, lt, cs, pg"),
        (dict.fromkeys(("rep", "sp", "lt", "cs", "pg"), 1), "rep: must be a module, got int"),
    ],
)
def test_other_content_is_refused(tmp_path, tree, pattern):
    with pytest.raises(InputError, match=pattern):
        import_published_checkpoint(small(tmp_path / "file.pth", tree))


def test_long_names_are_not_multiplied(tmp_path):
    """40 kB of file would become 40 MB of names, and the product of both counts at the limit of its size."""
    module = nn.Module()
    module._modules["x" * 20_000] = parent = nn.Module()
    parent._modules.update({f"child{i}": nn.Module() for i in range(2000)})
    tree = {"rep": module, **{name: nn.Module() for name in ("sp", "lt", "cs", "pg")}}
    with pytest.raises(InputError, match="must have names of at most 1000 characters") as caught:
        import_published_checkpoint(small(tmp_path / "file.pth", tree))
    assert len(str(caught.value)) < 1000


def test_modules_that_hold_each_other_end(tmp_path):
    """A module that is its own child, and a ladder of shared children, would be walked for ever."""
    cycle = nn.Module()
    cycle._modules["self"] = cycle
    ladder = nn.Module()
    for _ in range(30):
        step = nn.Module()
        step._modules.update(left=ladder, right=ladder)
        ladder = step
    for module in (cycle, ladder):
        tree = {"rep": module, **{name: nn.Module() for name in ("sp", "lt", "cs", "pg")}}
        with pytest.raises(InputError, match="must be one of at most"):
            import_published_checkpoint(small(tmp_path / "file.pth", tree))
