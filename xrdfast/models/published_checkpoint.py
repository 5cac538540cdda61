"""Imports checkpoints of the published XRDecoupler code into the `paper` preset.

For the authors' layout: a dict of five modules, `rep` (encoder), `sp`, `lt`, `cs`, `pg` (heads), saved whole,
each possibly wrapped in DataParallel; or the same as state dicts. Not for this package's own checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from xrdfast.errors import InputError
from xrdfast.models.presets import build_model
from xrdfast.models.torch_archive import InertObject, read_torch_archive
from xrdfast.models.xrdecoupler import SymmetryModel

PARTS = ("rep", "sp", "lt", "cs", "pg")
MAX_MODULE_DEPTH = 32
MAX_MODULES = 4096
MAX_NAME = 1000  # characters, of a tensor with all modules that it is in

# Places of the thirteen blocks in the published sequence of blocks, pools and dropouts; the linear map is the
# 31st.
_BLOCK_PLACES = (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 21, 24, 27)
_BLOCK_NAMES = {"widen": "pre", "conv1": "conv.0", "norm1": "conv.1", "conv2": "conv.3", "norm2": "conv.4"}
_LAYER_NAMES = {
    "query": "mha.WQ",
    "key": "mha.WK",
    "value": "mha.WV",
    "output": "mha.linear",
    "attention_norm": "layernorm1",
    "expand": "ffn.linear1",
    "contract": "ffn.linear2",
    "feed_forward_norm": "layernorm2",
}
_HEAD_PARTS = {"space_group": "sp", "lattice_centering": "lt", "crystal_system": "cs", "point_group": "pg"}
_PATCH_INDEX = "rep.att.index"  # 0 to 849, which patch takes which learned position


def import_published_checkpoint(path: str | Path) -> SymmetryModel:
    """Builds the `paper` preset with the weights of a published checkpoint; executes nothing from the file.

    Args:
        path: file that the published training loop saved (zip format of torch 1.6 or newer), or the five
            state dicts saved with torch.save: nested, {"rep": {...}, "sp": {...}, ...}, or flat,
            {"rep.conv_module...": ...}.

    Returns:
        The model in train mode, in float32.

    Raises:
        InputError: unreadable or unsafe file, or the weights of another architecture (the wider variant
            included).
    """
    published = _published_tensors(path, read_torch_archive(path))
    index = published.pop(_PATCH_INDEX, None)
    if index is not None and not torch.equal(index.flatten(), torch.arange(index.numel())):
        raise InputError(f"{path}: {_PATCH_INDEX}: must count the patches from 0, got another order")
    model = build_model("paper")
    state = {}
    for name, own in model.state_dict().items():
        theirs = published_name(name)
        tensor = published.pop(theirs, None)
        if tensor is None:
            raise InputError(f"{path}: {theirs}: must be in the checkpoint, got none")
        if (
            tensor.ndim == own.ndim + 1 and tensor.shape[2] == 1
        ):  # the patch convolutions are two-dimensional there
            tensor = tensor.squeeze(2)
        if tensor.shape != own.shape:
            raise InputError(f"{path}: {theirs}: must be {tuple(own.shape)}, got {tuple(tensor.shape)}")
        if tensor.is_floating_point() != own.is_floating_point():
            raise InputError(f"{path}: {theirs}: must be {own.dtype}, got {tensor.dtype}")
        tensor = tensor.to(own.dtype)
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {theirs}: must be finite {own.dtype}, got NaN or infinity")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise InputError(f"{path}: {theirs}: must be >= 0, got {float(tensor.min()):g}")
        state[name] = tensor
    if published:
        raise InputError(
            f"{path}: {min(published)}: must be a part of the published architecture, got an unknown one"
        )
    model.load_state_dict(state)
    return model


def _published_tensors(path: str | Path, tree: object) -> dict[str, Tensor]:
    """Tensors by published name, `rep.…`, `sp.…`, without the prefix of DataParallel."""
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: content: must be a dict with {', '.join(PARTS)}, got {type(tree).__name__}"
        )
    if not any(part in tree for part in PARTS):
        nested: dict[str, object] = {}
        for name, value in tree.items():
            part, _, rest = str(name).partition(".")
            nested.setdefault(part, {})[rest] = value
        tree = nested
    missing = [part for part in PARTS if part not in tree]
    if missing:
        raise InputError(
            f"{path}: content: must be a dict with {', '.join(PARTS)}, got no {', '.join(missing)}"
        )
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        value = tree[part]
        named = value if isinstance(value, dict) else _module_tensors(path, part, value)
        for name, tensor in named.items():
            if not isinstance(tensor, Tensor):
                raise InputError(f"{path}: {part}.{name}: must be a tensor, got {type(tensor).__name__}")
            tensors[f"{part}.{str(name).removeprefix('module.')}"] = tensor
    return tensors


def _module_tensors(path: str | Path, part: str, module: object) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled module, by dotted name."""
    tensors: dict[str, Tensor] = {}
    waiting = [("", module, 0)]
    n_modules = 1
    while waiting:
        prefix, module, depth = waiting.pop()
        field = part + ("." + prefix if prefix else "").rstrip(".")
        if not isinstance(module, InertObject):
            raise InputError(f"{path}: {field}: must be a module, got {type(module).__name__}")
        for kind in ("_parameters", "_buffers", "_modules"):
            entries = module.state.get(kind, {})
            if not isinstance(entries, dict):
                raise InputError(f"{path}: {field}.{kind}: must be a dict, got {type(entries).__name__}")
            n_modules += len(entries) if kind == "_modules" else 0
            if depth > MAX_MODULE_DEPTH or n_modules > MAX_MODULES:
                raise InputError(
                    f"{path}: {field[:80]}: must be one of at most {MAX_MODULES} modules, got more, or too deep"
                )
            for name, entry in entries.items():
                # Before names are joined: a long one, copied to thousands of children, would fill the memory.
                if not isinstance(name, str) or len(prefix) + len(name) > MAX_NAME:
                    raise InputError(
                        f"{path}: {field[:80]}.{kind}: must have names of at most {MAX_NAME} characters, got another"
                    )
                if entry is None:
                    continue
                if kind == "_modules":
                    waiting.append((f"{prefix}{name}.", entry, depth + 1))
                else:
                    tensors[f"{prefix}{name}"] = entry
    return tensors


def published_name(name: str) -> str:
    """Published name of a tensor of our `paper` preset."""
    match name.split("."):
        case ["heads", task, place, leaf]:
            return f"{_HEAD_PARTS[task]}.cls.{place}.{leaf}"
        case ["encoder", "local_branch", "intensity_norm", leaf]:
            return f"rep.conv_module.intensity_norm.{leaf}"
        case ["encoder", "local_branch", "blocks", block, module, leaf]:
            return f"rep.conv_module.TCN.{_BLOCK_PLACES[int(block)]}.{_BLOCK_NAMES[module]}.{leaf}"
        case ["encoder", "local_branch", "project", leaf]:
            return f"rep.conv_module.TCN.30.{leaf}"
        case ["encoder", "global_branch", "patch_embedding", "convolutions", place, leaf]:
            return f"rep.att.patch_conv.conv.{2 * int(place)}.{leaf}"
        case ["encoder", "global_branch", "learned_position"]:
            return "rep.att.embed.weight"
        case ["encoder", "global_branch", "fixed_position"]:
            return "rep.att.att.positionEnbeding.position_embedding"  # sic
        case ["encoder", "global_branch", "layers", layer, module, leaf]:
            return f"rep.att.att.encoder_layers.{layer}.{_LAYER_NAMES[module]}.{leaf}"
    raise KeyError(name)
