"""xrdfast: from a powder X-ray diffraction pattern to the symmetry of the crystal.

Importing this package loads nothing heavy and compiles nothing; names are looked up when they are first used.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "PackedStructures": "xrdfast.data.structures",
    "load_structures": "xrdfast.data.structures",
    "from_pymatgen": "xrdfast.data.structures",
    "from_ase": "xrdfast.data.structures",
    "to_pymatgen": "xrdfast.data.structures",
    "analyse_symmetry": "xrdfast.data.structures",
    "PatternStore": "xrdfast.data.store",
    "generate_store": "xrdfast.data.generate",
    "wavelength_of": "xrdfast.bragg",
    "simulate_lines": "xrdfast.ops.simulate",
    "simulate_families": "xrdfast.ops.simulate",
    "render_sticks": "xrdfast.ops.render",
    "render_patterns": "xrdfast.ops.render_patterns",
    "dsr_loss": "xrdfast.ops.dsr_loss",
    "SelfDistillation": "xrdfast.distillation",
    "build_model": "xrdfast.models.presets",
    "Trainer": "xrdfast.training.trainer",
    "joint_posterior": "xrdfast.posterior",
    "pool_posteriors": "xrdfast.posterior",
    "KnownStructures": "xrdfast.retrieval",
    "SymmetryPredictor": "xrdfast.prediction",
    "Screener": "xrdfast.screening.pipeline",
    "read": "xrdfast.data.scans",
    "InputError": "xrdfast.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'xrdfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
