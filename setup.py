"""Install script: csrc/ travels as package data and is compiled at first use (xrdfast/_native.py).

XRDFAST_AOT=1 pip install --no-build-isolation .   compiles the CPU kernels now; needs pybind11 or torch installed.
"""

import os
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent


def extensions() -> list[Extension]:
    """The CPU modules for any x86-64 (hot loops are cloned per instruction-set level), or nothing by default."""
    if os.environ.get("XRDFAST_AOT") != "1":
        return []
    from importlib.util import find_spec

    for package in ("pybind11", "torch"):
        spec = find_spec(package)
        include = Path(spec.origin).parent / "include" if spec and spec.origin else None
        if include and (include / "pybind11").is_dir():
            break
    else:
        raise SystemExit(
            "XRDFAST_AOT=1 needs pybind11's headers: pip install pybind11, then add --no-build-isolation"
        )
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    text = {"csrc/bind_text.cpp", "csrc/columns.cpp"}  # read without torch, so without its OpenMP library
    rest = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp")} - {"csrc/bind_cuda.cpp"} - text
    return [
        Extension(
            name,
            sorted(sources),
            include_dirs=["csrc", str(include)],
            define_macros=[("XRDFAST_AOT", "1")],
            extra_compile_args=[*flags, *openmp],
            extra_link_args=openmp,
        )
        for name, sources, openmp in (("xrdfast._text", text, []), ("xrdfast._cpu", rest, ["-fopenmp"]))
    ]


setup(
    packages=[*find_packages(include=["xrdfast", "xrdfast.*"]), "xrdfast.csrc"],
    package_dir={"xrdfast.csrc": "csrc"},
    package_data={
        "xrdfast": ["*.json", "weights/*.safetensors"],
        "xrdfast.screening": ["page.*"],
        "xrdfast.csrc": ["*.h", "*.cpp", "*.cu", "*.cuh"],
    },
    ext_modules=extensions(),
)
