"""Crystal structures to reflections: families under the Laue group, or lines merged as pymatgen merges them.

    I_line = sum over the reflections h of a line: |F(h)|^2 LP(theta),
    F(h) = sum_j occ_j (f_j(s) + f'_j + i f''_j) exp(-B_j s^2) exp(2 pi i h . x_j),   s = sin(theta) / lambda = 1 / 2d,
    LP(theta) = (1 + cos^2 2theta) / (sin^2 theta cos theta).

Not for profiles or grids: see `xrdfast.ops.render`.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from xrdfast import _native, scattering
from xrdfast.ops import LIBRARY, device_stream
from xrdfast.ops.reflections import (
    MAX_ROTATIONS,
    device_reflections,
    merge_families,
    merge_lines,
    name_families_reference,
    reflections_reference,
)

if TYPE_CHECKING:
    from xrdfast.data.structures import PackedStructures

_STRUCTURE_ARGUMENTS = (
    "Tensor atom_offset, Tensor lattice, Tensor atomic_number, Tensor fractional, Tensor occupancy, Tensor b_iso, "
    "Tensor form_factor, bool mott_bethe, Tensor? dispersion, float wavelength, float g_min, float g_max"
)
LIBRARY.define(
    f"simulate_lines({_STRUCTURE_ARGUMENTS})"
    " -> (Tensor offset, Tensor two_theta, Tensor intensity, Tensor d_spacing, Tensor hkl, Tensor status)"
)
LIBRARY.define(
    f"simulate_families({_STRUCTURE_ARGUMENTS}, Tensor rotation_offset, Tensor rotations, float relative_cutoff)"
    " -> (Tensor offset, Tensor hkl, Tensor multiplicity, Tensor f_squared, Tensor status)"
)

# Why a structure has no reflections, by the status the simulators return.
STATUS_REASONS = {
    1: "no reflection between the limits",
    2: "an element has no form factor in this table",
    3: "cell too large: a Miller index beyond 511, or more than 67 million reflections",
    4: "lattice is not finite or is singular",
    5: "every structure factor vanishes or is not finite",
}

# Reflections the device has room for: large sets go through in pieces of about 0.5 GB.
_ROWS_A_CALL = 1 << 21


class Lines(NamedTuple):
    """Merged diffraction lines of N structures, L lines in all, sorted by angle within a structure."""

    offset: Tensor  # (N + 1,) int64, first line of each structure
    two_theta: Tensor  # (L,) float64, degrees
    intensity: Tensor  # (L,) float64, strongest line of each structure = 100
    d_spacing: Tensor  # (L,) float64, Angstrom
    hkl: Tensor  # (L, 3) int16, the largest member in lexical order
    status: Tensor  # (N,) int32, 0 or a key of STATUS_REASONS (then no lines)


class Families(NamedTuple):
    """Reflection families of N structures, F families in all, sorted by angle within a structure."""

    offset: Tensor  # (N + 1,) int64
    hkl: Tensor  # (F, 3) int16, representative in the given cell
    multiplicity: Tensor  # (F,) int16, Friedel mates counted
    f_squared: Tensor  # (F,) float32, electrons^2, mean |F|^2 over the family; no LP
    status: Tensor  # (N,) int32


def simulate_lines(
    structures: PackedStructures,
    *,
    wavelength: float = 1.54184,
    two_theta_min: float = 5.0,
    two_theta_max: float = 90.0,
    form_factors: str = "pymatgen",
    dispersion: bool = False,
) -> Lines:
    """Diffraction lines with pymatgen's conventions.

    Reflections with equal round(2theta / 1e-5 degrees) become one line: intensities add, it has their smallest angle;
    lines of at most 1e-3 (of 100) are dropped.

    Args:
        structures: N packed structures.
        wavelength: Angstrom, > 0. The default is pymatgen's Cu K-alpha mean.
        two_theta_min, two_theta_max: degrees, 0 <= min < max <= 180.
        form_factors: "pymatgen" or "international" (International Tables C, table 6.1.1.4).
        dispersion: add f' + i f'' at this wavelength; intensities are means over Friedel mates.

    Returns:
        `Lines`. A structure that cannot be simulated has none, and says why in `status`.

    Raises:
        TypeError: for structures that are not packed.
        ValueError: for a wavelength, limit or table outside these rules.

    Note:
        Deterministic; float64; no gradients. Runs on the tensors' device.

    Source:
        pymatgen.analysis.diffraction.xrd, release 2026.10.
    """
    arguments = _arguments("simulate_lines", structures, wavelength, form_factors, dispersion)
    g_min = _limit("simulate_lines", "two_theta_min", two_theta_min, wavelength)
    g_max = _limit("simulate_lines", "two_theta_max", two_theta_max, wavelength)
    _require(
        g_min < g_max,
        "simulate_lines",
        "two_theta_max",
        f"above two_theta_min = {two_theta_min}",
        two_theta_max,
    )
    arguments = (*arguments, wavelength, g_min, g_max)
    # Outside a trace the kernel is called as it is: the dispatcher takes 14 us, as long as a small structure does.
    if type(structures.lattice) is Tensor and structures.lattice.is_cpu and not torch.compiler.is_compiling():
        return Lines(*_lines_cpu(*arguments))
    return Lines(*torch.ops.xrdfast.simulate_lines(*arguments))


def simulate_families(
    structures: PackedStructures,
    *,
    wavelength: float = 1.54056,
    two_theta_min: float = 5.0,
    two_theta_max: float = 90.0,
    margin: float = 0.05,
    relative_cutoff: float = 1e-6,
    form_factors: str = "pymatgen",
    dispersion: bool = False,
) -> Families:
    """Reflection families under the Laue group, ready to be strained, textured and rendered.

    A family is an orbit of the structure's rotations and inversion on hkl. Its |F|^2 is the mean over its members and
    carries no Lorentz-polarisation factor, so that multiplicity * f_squared * LP is the intensity of the family.

    Args:
        structures: N packed structures with their rotations; one without any is given its own (P1) families.
        wavelength: Angstrom, > 0; with the angles it fixes the range of d, and the dispersion correction.
        two_theta_min, two_theta_max: degrees.
        margin: share by which the range of 1/d is widened at both ends, so that a strained cell still has its lines.
        relative_cutoff: families weaker than this share of the strongest, LP included, are left out.
        form_factors, dispersion: as in `simulate_lines`.

    Returns:
        `Families`.

    Raises:
        TypeError: for structures that are not packed.
        ValueError: for a wavelength, limit, margin, cutoff or table outside these rules.

    Note:
        Deterministic; float64 inside; no gradients.
    """
    op = "simulate_families"
    _require(0.0 <= margin < 0.5, op, "margin", "in [0, 0.5)", margin)
    _require(0.0 <= relative_cutoff < 1.0, op, "relative_cutoff", "in [0, 1)", relative_cutoff)
    arguments = _arguments(op, structures, wavelength, form_factors, dispersion)
    g_min = _limit(op, "two_theta_min", two_theta_min, wavelength)
    g_max = _limit(op, "two_theta_max", two_theta_max, wavelength)
    _require(g_min < g_max, op, "two_theta_max", f"above two_theta_min = {two_theta_min}", two_theta_max)
    # Beyond 2 / lambda nothing diffracts at this wavelength, but strain may bring it in; LP stays finite below it.
    g_max = min(g_max * (1.0 + margin), 2.0 / wavelength * (1.0 - 1e-6))
    return Families(
        *torch.ops.xrdfast.simulate_families(
            *arguments,
            wavelength,
            g_min * (1.0 - margin),
            g_max,
            structures.rotation_offset,
            structures.rotations,
            relative_cutoff,
        )
    )


def _require(condition: bool, op: str, argument: str, rule: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{op}: {argument} must be {rule}, got {got}")


def _limit(op: str, argument: str, two_theta: float, wavelength: float) -> float:
    """1/d in 1/Angstrom at an angle in degrees."""
    _require(0.0 <= two_theta <= 180.0, op, argument, "in [0, 180] degrees", two_theta)
    return 2.0 * math.sin(math.radians(two_theta / 2.0)) / wavelength


@functools.lru_cache(maxsize=8)
def _form_factor_tensor(name: str) -> tuple[Tensor, bool]:
    table = scattering.form_factor_table(name)
    columns = [torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (table.a, table.b, table.c)]
    return torch.cat([columns[0], columns[1], columns[2][:, None]], dim=1).contiguous(), bool(
        table.mott_bethe
    )


@functools.lru_cache(maxsize=8)
def _dispersion_tensor(wavelength: float) -> Tensor:
    columns = [
        torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in scattering.dispersion_table(wavelength)
    ]
    return torch.stack(columns, dim=1)


def _arguments(
    op: str, structures: PackedStructures, wavelength: float, form_factors: str, dispersion: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, Tensor | None]:
    _require(
        math.isfinite(wavelength) and wavelength > 0.0,
        op,
        "wavelength",
        "finite and > 0 Angstrom",
        wavelength,
    )
    if not hasattr(structures, "b_iso"):
        raise TypeError(
            f"{op}: structures must be PackedStructures (xrdfast.load_structures, from_pymatgen, from_ase), "
            f"got {type(structures).__name__}"
        )
    table, mott_bethe = _form_factor_tensor(form_factors)
    corrections = _dispersion_tensor(wavelength) if dispersion else None
    device = structures.lattice.device
    if device.type != "cpu":
        table = table.to(device)
        corrections = None if corrections is None else corrections.to(device)
    return (
        structures.offset,
        structures.lattice,
        structures.atomic_number,
        structures.fractional,
        structures.occupancy,
        structures.b_iso,
        table,
        mott_bethe,
        corrections,
    )


# --- reference -------------------------------------------------------------------------------------------------------


def simulate_lines_reference(*arguments):
    """Plain PyTorch, arguments as in the schema; the yardstick of the kernels."""
    *structures, wavelength, g_min, g_max = arguments
    return merge_lines(reflections_reference(*structures, g_min, g_max), wavelength)


def simulate_families_reference(*arguments):
    """Plain PyTorch, arguments as in the schema."""
    *structures, wavelength, g_min, g_max, rotation_offset, rotations, relative_cutoff = arguments
    found = reflections_reference(*structures, g_min, g_max)
    code, multiplicity = name_families_reference(found, rotation_offset, rotations)
    return merge_families(found, code, multiplicity, wavelength, relative_cutoff)


# --- implementations -------------------------------------------------------------------------------------------------


def _checked(
    op: str,
    atom_offset: Tensor,
    lattice: Tensor,
    atomic_number: Tensor,
    fractional: Tensor,
    occupancy: Tensor,
    b_iso: Tensor,
) -> None:
    n_structures, device = lattice.shape[0], lattice.device
    if lattice.shape != (n_structures, 3, 3) or lattice.dtype != torch.float64:
        raise ValueError(
            f"{op}: lattice must be (n_structures, 3, 3) float64, got {tuple(lattice.shape)} {lattice.dtype}"
        )
    n_atoms = atomic_number.shape[0]
    for name, tensor, shape, dtype in (
        ("atom_offset", atom_offset, (n_structures + 1,), torch.int64),
        ("atomic_number", atomic_number, (n_atoms,), torch.uint8),
        ("fractional", fractional, (n_atoms, 3), torch.float64),
        ("occupancy", occupancy, (n_atoms,), torch.float64),
        ("b_iso", b_iso, (n_atoms,), torch.float64),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{op}: {name} must be {shape} {dtype} on {device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    _offsets_checked(op, "atom_offset", atom_offset, n_atoms)


def _offsets_checked(op: str, name: str, offset: Tensor, n_rows: int) -> None:
    """What memory safety needs: offsets that rise from 0 to the number of rows."""
    module = _native.cpu() if offset.device.type == "cpu" else None
    if module is not None:
        held = offset if offset.is_contiguous() else offset.contiguous()
        rising = module.offsets_rise(held.data_ptr(), held.shape[0], n_rows)
    else:
        rising = int(offset[0]) == 0 and int(offset[-1]) == n_rows and not bool((offset.diff() < 0).any())
    if not rising:
        raise ValueError(f"{op}: {name} must rise from 0 to {n_rows}, got {offset.tolist()[:5]} ...")


def _families_checked(arguments: tuple) -> None:
    op = "simulate_families"
    offset, lattice = arguments[:2]
    rotation_offset, rotations, _ = arguments[12:]
    _checked(op, *arguments[:6])
    if rotations.shape[1:] != (3, 3) or rotations.dtype != torch.int8:
        raise ValueError(
            f"{op}: rotations must be (n, 3, 3) int8, got {tuple(rotations.shape)} {rotations.dtype}"
        )
    if rotation_offset.shape != offset.shape or rotation_offset.dtype != torch.int64:
        raise ValueError(
            f"{op}: rotation_offset must be {tuple(offset.shape)} int64, got {rotation_offset.dtype}"
        )
    if not rotations.device == rotation_offset.device == lattice.device:
        raise ValueError(f"{op}: rotations must be on {lattice.device}, got {rotations.device}")
    _offsets_checked(op, "rotation_offset", rotation_offset, len(rotations))
    if len(rotations) > MAX_ROTATIONS and (most := int(rotation_offset.diff().max())) > MAX_ROTATIONS:
        raise ValueError(f"{op}: rotations must be at most {MAX_ROTATIONS} a structure, got {most}")


def _addresses(*arguments) -> tuple[list[Tensor], tuple[float, ...]]:
    """What a native simulator takes first, and the tensors that must live until it returns."""
    given, (mott_bethe, dispersion, *limits) = arguments[:7], arguments[7:]
    held = [x if x.is_contiguous() else x.contiguous() for x in given]
    pointers = [x.data_ptr() for x in held]
    if dispersion is None:
        pointers.append(0)
    else:
        held.append(dispersion.contiguous())
        pointers.append(held[-1].data_ptr())
    n_structures, n_elements = given[1].shape[0], given[6].shape[0]
    return held, (*pointers, n_structures, n_elements, mott_bethe, *limits)


def _lines_cpu(*arguments):
    _checked("simulate_lines", *arguments[:6])
    module = _native.cpu()
    if module is None:
        return simulate_lines_reference(*arguments)
    held, addresses = _addresses(*arguments)
    n_threads = torch.get_num_threads()
    found = module.simulate_lines(*addresses, n_threads)
    n = module.count_lines(found)
    offset, lattice = torch.empty_like(held[0]), held[1]
    two_theta, intensity, d_spacing = (lattice.new_empty(n) for _ in range(3))
    hkl = lattice.new_empty((n, 3), dtype=torch.int16)
    status = lattice.new_empty(len(lattice), dtype=torch.int32)
    module.write_lines(
        found,
        offset.data_ptr(),
        two_theta.data_ptr(),
        intensity.data_ptr(),
        d_spacing.data_ptr(),
        hkl.data_ptr(),
        status.data_ptr(),
        n_threads,
    )
    return offset, two_theta, intensity, d_spacing, hkl, status


def _families_cpu(*arguments):
    _families_checked(arguments)
    module = _native.cpu()
    if module is None:
        return simulate_families_reference(*arguments)
    rotation_offset, rotations, relative_cutoff = arguments[12:]
    rotation_offset, rotations = rotation_offset.contiguous(), rotations.contiguous()
    held, addresses = _addresses(*arguments[:12])
    n_threads = torch.get_num_threads()
    found = module.simulate_families(
        *addresses,
        rotation_offset.data_ptr(),
        rotations.data_ptr(),
        relative_cutoff,
        n_threads,
    )
    n = module.count_families(found)
    offset, lattice = torch.empty_like(held[0]), held[1]
    hkl, multiplicity = lattice.new_empty((n, 3), dtype=torch.int16), lattice.new_empty(n, dtype=torch.int16)
    f_squared = lattice.new_empty(n, dtype=torch.float32)
    status = lattice.new_empty(len(lattice), dtype=torch.int32)
    module.write_families(
        found,
        offset.data_ptr(),
        hkl.data_ptr(),
        multiplicity.data_ptr(),
        f_squared.data_ptr(),
        status.data_ptr(),
        n_threads,
    )
    return offset, hkl, multiplicity, f_squared, status


def _lines_cuda(*arguments):
    _checked("simulate_lines", *arguments[:6])
    module = _native.cuda()
    if module is None:
        return simulate_lines_reference(*arguments)
    return _lines_on_device(module, *arguments)


def _families_cuda(*arguments):
    _families_checked(arguments)
    module = _native.cuda()
    if module is None:
        return simulate_families_reference(*arguments)
    return _families_on_device(module, *arguments)


def _lines_on_device(module: ModuleType, *arguments):
    """The kernels of `_cuda`, or of `_emu` in the tests."""
    wavelength = arguments[9]
    pieces = device_reflections(module, _ROWS_A_CALL, *arguments)
    return _joined([merge_lines(found, wavelength) for _, found in pieces])


def _families_on_device(module: ModuleType, *arguments):
    wavelength = arguments[9]
    rotation_offset, rotations, relative_cutoff = arguments[12:]
    rotation_offset, rotations = rotation_offset.contiguous(), rotations.contiguous()
    pieces = []
    for begin, found in device_reflections(module, _ROWS_A_CALL, *arguments[:12]):
        n, structure = len(found.g2), found.structure()
        code, multiplicity = found.hkl.new_empty(n, dtype=torch.int32), found.hkl.new_empty(n)
        with device_stream(found.hkl) as stream:
            module.name_families(
                n,
                structure.data_ptr(),
                found.hkl.data_ptr(),
                rotation_offset.data_ptr() + 8 * begin,
                rotations.data_ptr(),
                code.data_ptr(),
                multiplicity.data_ptr(),
                stream,
            )
        pieces.append(merge_families(found, code, multiplicity, wavelength, relative_cutoff))
    return _joined(pieces)


def _joined(pieces: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Results of consecutive pieces as one: an offset, then columns."""
    if len(pieces) == 1:
        return pieces[0]
    offset, *columns = zip(*pieces, strict=True)
    counts = torch.cat([x.diff() for x in offset])
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)), *(torch.cat(x) for x in columns)


LIBRARY.impl("simulate_lines", _lines_cpu, "CPU")
LIBRARY.impl("simulate_families", _families_cpu, "CPU")
LIBRARY.impl("simulate_lines", _lines_cuda, "CUDA")
LIBRARY.impl("simulate_families", _families_cuda, "CUDA")


@torch.library.register_fake("xrdfast::simulate_lines")
def _lines_fake(atom_offset, lattice, *_):
    n = torch.library.get_ctx().new_dynamic_size()
    row = lattice.new_empty((n,))
    return (
        torch.empty_like(atom_offset),
        row,
        torch.empty_like(row),
        torch.empty_like(row),
        row.new_empty((n, 3), dtype=torch.int16),
        lattice.new_empty((lattice.shape[0],), dtype=torch.int32),
    )


@torch.library.register_fake("xrdfast::simulate_families")
def _families_fake(atom_offset, lattice, *_):
    n = torch.library.get_ctx().new_dynamic_size()
    return (
        torch.empty_like(atom_offset),
        lattice.new_empty((n, 3), dtype=torch.int16),
        lattice.new_empty((n,), dtype=torch.int16),
        lattice.new_empty((n,), dtype=torch.float32),
        lattice.new_empty((lattice.shape[0],), dtype=torch.int32),
    )
