"""Finds or builds the native modules: the only place that knows compilers, folders, locks and environment variables.

Order: a prebuilt module in the package (XRDFAST_AOT=1), else one built just in time from csrc/ into a cache folder
named by everything that decides its content, else none, and the operators run on their PyTorch references with one
warning. Nothing here runs when xrdfast is imported, only at the first native call.

XRDFAST_BACKEND  auto (default): as above; native: a missing module is an error; reference: never load one.
XRDFAST_CACHE    cache folder; default $XDG_CACHE_HOME/xrdfast or ~/.cache/xrdfast.
CXX, NVCC        compilers; default c++ and nvcc. CXX may have a launcher in front: "ccache g++".
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parent
# An installed package carries csrc/ inside; in a source tree it lies beside the package.
CSRC = _PACKAGE / "csrc" if (_PACKAGE / "csrc").is_dir() else _PACKAGE.parent / "csrc"
EXTENSION_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

TEXT_SOURCES = ("bind_text.cpp", "columns.cpp")  # of _text; every other .cpp but one is _cpu's
_CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    "-march=native",
]
_EMULATOR_FLAGS = ["-O1", "-g", "-Wno-unknown-pragmas"]
_NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
_LOCK_TIMEOUT = 300.0  # seconds; a whole build takes about 14 on two cores
_MAX_JOBS = 4

_lock = threading.RLock()
_modules: dict[str, ModuleType | BuildError] = {}
_warned = False


class BuildError(RuntimeError):
    """The native code could not be built or loaded; the message says why and what to do."""


def cpu() -> ModuleType | None:
    """The CPU kernels, or None where the references must do. Builds them at the first call."""
    return _module("_cpu")


def cuda() -> ModuleType | None:
    """The CUDA kernels, or None."""
    return _module("_cuda")


def text() -> ModuleType | None:
    """The parser of text, or None. It has no threads and needs no torch, so that readers of files do without."""
    return _module("_text")


def backend() -> str:
    """The value of XRDFAST_BACKEND.

    Raises:
        ValueError: where it is none of auto, native, reference.
    """
    value = os.environ.get("XRDFAST_BACKEND", "auto")
    if value not in ("auto", "native", "reference"):
        raise ValueError(f"XRDFAST_BACKEND must be auto, native or reference, got {value!r}")
    return value


def build() -> list[Path]:
    """Builds and loads every native module this machine can use, now; returns their files.

    Raises:
        BuildError: where the CPU module cannot be built.
    """
    files = []
    with _lock:
        for name in ["_text", "_cpu", "_cuda"] if _has_cuda() else ["_text", "_cpu"]:
            _modules[name] = _load_or_build(name)
            files.append(Path(_modules[name].__file__))
    return files


def status() -> dict[str, object]:
    """What was found and what is used, for `xrdfast doctor`. Loads the modules."""
    report: dict[str, object] = {
        "python": sys.version.split()[0],
        "backend": backend(),
        "sources": str(CSRC),
        "compiler": _version([*_cxx(), "--version"]).partition("\n")[0],
        "ninja": _ninja() or "not found",
    }
    try:
        report["cache"] = str(_cache_root())
    except BuildError as error:
        report["cache"] = str(error)
    with contextlib.suppress(ImportError):
        import torch

        report["torch"] = torch.__version__
        report["threads"] = torch.get_num_threads()
    for name in ("_text", "_cpu", "_cuda"):
        if name == "_cuda" and not _has_cuda():
            report[name] = "not used: torch sees no CUDA device"
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module = _module(name)
            except BuildError:
                module = None
        failure = _modules.get(name)
        report[name] = (
            str(module.__file__) if module else f"reference: {failure or 'asked for by XRDFAST_BACKEND'}"
        )
    return report


def _module(name: str) -> ModuleType | None:
    found = _modules.get(name)
    if isinstance(found, ModuleType):
        return found
    mode = backend()
    if mode == "reference":
        return None
    with _lock:
        if name not in _modules:
            try:
                _modules[name] = _load_or_build(name)
            except BuildError as error:
                _modules[name] = error  # remembered: a missing compiler is not searched for at every call
        found = _modules[name]
    if isinstance(found, ModuleType):
        return found
    if mode == "native":
        raise found.with_traceback(None)  # or it would grow with every call
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"{found}\nxrdfast goes on with the slow PyTorch references.", RuntimeWarning, stacklevel=3
        )
    return None


def _load_or_build(name: str) -> ModuleType:
    if name != "_text":  # torch first: it brings the OpenMP library whose thread pool the kernels share
        import torch  # noqa: F401

    try:
        return importlib.import_module(f"xrdfast.{name}")
    except ImportError as error:
        prebuilt = str(error)
    try:
        path = build_module(name)
        return _load(name, path)
    except (BuildError, ImportError, OSError) as error:
        raise BuildError(
            f"xrdfast has no native {name}: no prebuilt module ({prebuilt}); building it failed: {error}"
        ) from error


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_module(name: str, *, emulator: Path | None = None) -> Path:
    """Compiles a module unless the cache has it.

    Args:
        name: "_text", "_cpu", "_cuda", or "_emu": the CUDA sources compiled by the C++ compiler against an emulator.
        emulator: folder of the emulator's headers, for "_emu".

    Returns:
        Path of the shared library.

    Raises:
        BuildError: where there is no compiler, it fails, or another process holds the lock for too long.
    """
    plan = _plan(name, emulator)
    folder = _cache_root() / f"{name}-{_key(plan)}"
    target = folder / f"{name}{EXTENSION_SUFFIX}"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _file_lock(folder / "lock"):
            if not target.exists():
                _compile(plan, folder, target)
    except OSError as error:
        raise BuildError(
            f"{folder}: cannot be written ({error.strerror}); set XRDFAST_CACHE to a folder that can"
        ) from error
    return target


# A plan: what is compiled with which command, and the folders whose sources decide the result.
_Plan = dict[str, object]


def _plan(name: str, emulator: Path | None) -> _Plan:
    cxx = _cxx()
    for program in cxx:
        if shutil.which(program) is None:
            raise BuildError(
                f"no C++ compiler ({program!r} is not on PATH). Install one (Debian, Ubuntu: apt-get install g++) "
                "or set CXX"
            )
    include = [f"-I{CSRC}", f"-I{_pybind11_include()}", f"-I{sysconfig.get_paths()['include']}"]
    kernels, folders = sorted(CSRC.glob("*.cu")), [CSRC]
    if name == "_cpu":
        others = ("bind_cuda.cpp", *TEXT_SOURCES)
        paths = [p for p in CSRC.glob("*.cpp") if p.name not in others]
        # Long compiles first, so that no core waits for the last.
        paths.sort(key=lambda path: (not path.name.startswith("bind_"), -path.stat().st_size))
        sources = {p: [*cxx, *_CXX_FLAGS, *_binding_flags(p, name), *include] for p in paths}
        link = [*cxx, "-shared", "-fopenmp"]
    elif name == "_text":
        sources = {CSRC / source: [*cxx, *_CXX_FLAGS, *include] for source in TEXT_SOURCES}
        link = [*cxx, "-shared"]
    elif name == "_emu":
        flags = [
            *(f for f in _CXX_FLAGS if f not in ("-O3", "-march=native")),
            *_EMULATOR_FLAGS,
            f"-I{emulator}",
        ]
        bindings = [CSRC / "bind_module.cpp", CSRC / "bind_cuda.cpp"]
        sources = {
            p: [*cxx, *flags, *_binding_flags(p, name), *include, "-x", "c++"] for p in [*bindings, *kernels]
        }
        link = [*cxx, "-shared"]
        folders.append(emulator)
    else:
        import torch

        nvcc = _nvcc()
        # The least of all devices: the others run its code, or compile the PTX that goes with it.
        devices = range(torch.cuda.device_count())
        major, minor = min(torch.cuda.get_device_capability(i) for i in devices)
        flags = [*_NVCC_FLAGS, "-ccbin", cxx[-1], f"-arch=sm_{major}{minor}", f"-I{CSRC}"]
        sources = {p: [nvcc, *flags] for p in kernels}
        for path in (CSRC / "bind_module.cpp", CSRC / "bind_cuda.cpp"):
            sources[path] = [*cxx, *_CXX_FLAGS, *_binding_flags(path, name), *include]
        # The shared CUDA runtime: torch has loaded the same one, a static copy would be a second.
        link = [nvcc, "-ccbin", cxx[-1], "-shared", "-cudart=shared"]
    versions = [_version([*cxx, "--version"])]
    if name == "_cuda":
        versions.append(_version([nvcc, "--version"]))
    return {"sources": sources, "link": link, "versions": versions, "folders": folders}


def _binding_flags(source: Path, module: str) -> list[str]:
    """Flags for a source of that module beside those of all: what only hands addresses on is not worth optimising."""
    flags = ["-Og"] if source.name.startswith("bind_") else []
    return [*flags, f"-DXRDFAST_MODULE={module}"] if source.name == "bind_module.cpp" else flags


def _key(plan: _Plan) -> str:
    """Hash of all that decides what the binary is. torch's version is not part of it: no torch header is used."""
    digest = hashlib.sha256()

    def add(text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        digest.update(len(data).to_bytes(8, "little") + data)

    for folder in plan["folders"]:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
                add(path.name)
                add(path.read_bytes())
    for path, command in plan["sources"].items():
        add(" ".join([path.name, *command]))
    add(" ".join(plan["link"]))
    for version in plan["versions"]:
        add(version)
    add(EXTENSION_SUFFIX)
    add(_cpu_flags())  # -march=native: a home folder shared by two machines must not mix their builds
    return digest.hexdigest()[:16]


def _compile(plan: _Plan, folder: Path, target: Path) -> None:
    ninja = _ninja()
    if ninja is None:
        raise BuildError("no ninja to run the build. Install it: pip install ninja")
    for orphan in folder.glob(
        "build-*"
    ):  # of a builder that was killed: the lock is ours, so nobody works there
        shutil.rmtree(orphan, ignore_errors=True)
    takes = "" if target.name.startswith("_text") else " (about 15 s)"
    print(f"xrdfast: building {target.name}, once{takes} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as temporary:
        rules, objects = ["rule run", "  command = $command", "  description = $out"], []
        for path, command in plan["sources"].items():
            rules.append(f"build {path.name}.o: run")
            rules.append("  command = " + _ninja_command([*command, "-c", str(path), "-o", f"{path.name}.o"]))
            objects.append(f"{path.name}.o")
        rules.append(f"build module.so: run {' '.join(objects)}")
        rules.append("  command = " + _ninja_command([*plan["link"], *objects, "-o", "module.so"]))
        (Path(temporary) / "build.ninja").write_text("\n".join(rules) + "\n")
        jobs = min(os.cpu_count() or 1, _MAX_JOBS)
        done = subprocess.run(
            [ninja, "-C", temporary, "-j", str(jobs)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).strip().splitlines()
            told = [line for line in lines if "error" in line][:5] or lines[-15:]
            raise BuildError("the compiler failed:\n" + "\n".join(told))
        os.replace(Path(temporary) / "module.so", target)  # others see all of it or nothing


def _ninja_command(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """An operating-system lock: it goes when its holder dies, so a killed build never hangs the next one."""
    with open(path, "w") as handle:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"{path}: held by another build for over {_LOCK_TIMEOUT:.0f} s"
                    ) from None
                time.sleep(0.1)
        yield


def _cache_root() -> Path:
    folder = os.environ.get("XRDFAST_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "xrdfast")
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError as error:  # a container's user need not have a home
        raise BuildError(f"{folder}: {error}; set XRDFAST_CACHE to a folder that can be written") from error


def _cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def _nvcc() -> str:
    nvcc = shutil.which(os.environ.get("NVCC") or "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise BuildError("no nvcc on PATH. Install the CUDA toolkit of torch's CUDA version, or set NVCC")
    return nvcc


def _ninja() -> str | None:
    """Ninja of the running environment, which need not be activated, else of PATH."""
    with contextlib.suppress(ImportError):
        import ninja

        if found := shutil.which("ninja", path=ninja.BIN_DIR):
            return found
    return shutil.which("ninja")


def _pybind11_include() -> Path:
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin and (Path(spec.origin).parent / folder / "pybind11").is_dir():
            return Path(spec.origin).parent / folder
    raise BuildError("no pybind11 headers: neither torch nor pybind11 is installed")


def _has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _version(command: list[str]) -> str:
    """All that a program says of itself: the number of nvcc is not on its first line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    return (done.stdout or done.stderr).strip() or command[0]


def _cpu_flags() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith(("flags", "Features")):
                return line
    return sysconfig.get_platform()
