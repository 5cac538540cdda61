"""Folds for validation: structures that are related never lie on both sides of a split.

Not for choosing which folds to hold out (`PatternStore.split`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

N_FOLDS = 10


def assign_folds(formula: Sequence[str], family: Sequence[str], fold: Tensor | None = None) -> Tensor:
    """Folds that keep relatives together: connected components over equal formula and equal family key.

    A component's fold is the hash of its smallest name modulo 10, so it does not depend on the order of the
    rows. Rows that have a fold already keep it, and pass it on to their component.

    Args:
        formula: (N) reduced formulas.
        family: (N) family keys, "" where none; upper and lower case are the same.
        fold: (N,) folds given from outside, -1 where none; None for none at all.

    Returns:
        (N,) int8 in 0..9.

    Raises:
        ValueError: for lengths that differ, or a new row related to given rows of two different folds.
    """
    if len(formula) != len(family) or (fold is not None and len(fold) != len(formula)):
        raise ValueError(f"assign_folds: family and fold must have {len(formula)} rows, got {len(family)}")
    given = [-1] * len(formula) if fold is None else fold.tolist()
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    names = [f"formula {text}" for text in formula]
    for name, key in zip(names, family, strict=True):
        ends = root(name), root(f"family {key.casefold()}" if key else name)
        parent[max(ends)] = min(ends)  # so that a component's root is its smallest name
    roots = [root(name) for name in names]
    inherited: dict[str, set[int]] = {}
    for component, number in zip(roots, given, strict=True):
        if number >= 0:
            inherited.setdefault(component, set()).add(number)
    folds = []
    for row, (component, number) in enumerate(zip(roots, given, strict=True)):
        if number < 0:
            known = inherited.get(component)
            if known is not None and len(known) > 1:
                raise ValueError(
                    f"assign_folds: fold must be one for the relatives of {formula[row]}, got {sorted(known)}"
                )
            digest = hashlib.blake2b(component.encode(), digest_size=8).digest()
            number = min(known) if known else int.from_bytes(digest, "little") % N_FOLDS
        folds.append(number)
    return torch.tensor(folds, dtype=torch.int8)
