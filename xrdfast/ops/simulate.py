"""Crystal structures to reflections: families under the Laue group, or lines merged as pymatgen merges them.

    I_line = sum over the reflections h of a line: |F(h)|^2 LP(theta),
    F(h) = sum_j occ_j (f_j(s) + f'_j + i f''_j) exp(-B_j s^2) exp(2 pi i h . x_j),   s = sin(theta) / lambda = 1 / 2d,
    LP(theta) = (1 + cos^2 2theta) / (sin^2 theta cos theta).

Not for profiles or grids: see `xrdfast.ops.preprocess`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from xrdfast import _native, scattering
from xrdfast.ops import LIBRARY

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

_MERGE_STEP = 1e-5  # degrees 2theta, pymatgen's TWO_THETA_TOL
_MIN_SCALED_INTENSITY = 1e-3  # of 100, pymatgen's SCALED_INTENSITY_TOL
_SHELL_TOLERANCE = 1e-8  # 1 / Angstrom, pymatgen's numerical_tol
_MOTT_BETHE = 41.78214  # Angstrom^2, De Graef & McHenry, Structure of Materials, eq. 11.42 as pymatgen has it
# Reflections a native call has room for, 30 bytes each: large sets go through in pieces that share one 60 MB buffer.
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
        ValueError: for a wavelength, limit or table outside these rules.

    Note:
        Deterministic; float64; no gradients. Runs on the tensors' device.

    Source:
        pymatgen.analysis.diffraction.xrd, release 2026.10.
    """
    arguments = _arguments("simulate_lines", structures, wavelength, form_factors, dispersion)
    g_min = _limit("simulate_lines", "two_theta_min", two_theta_min, wavelength)
    g_max = _limit("simulate_lines", "two_theta_max", two_theta_max, wavelength)
    _require(g_min < g_max, "simulate_lines", "two_theta_max", f"above two_theta_min = {two_theta_min}", two_theta_max)
    return Lines(*torch.ops.xrdfast.simulate_lines(*arguments, wavelength, g_min, g_max))


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
    columns = [torch.as_tensor(x, dtype=torch.float64) for x in (table.a, table.b, table.c)]
    return torch.cat([columns[0], columns[1], columns[2][:, None]], dim=1).contiguous(), bool(table.mott_bethe)


@functools.lru_cache(maxsize=8)
def _dispersion_tensor(wavelength: float) -> Tensor:
    f_prime, f_double_prime = scattering.dispersion_table(wavelength)
    return torch.stack([torch.as_tensor(f_prime), torch.as_tensor(f_double_prime)], dim=1).double().contiguous()


def _arguments(
    op: str, structures: PackedStructures, wavelength: float, form_factors: str, dispersion: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, Tensor | None]:
    _require(math.isfinite(wavelength) and wavelength > 0.0, op, "wavelength", "finite and > 0 Angstrom", wavelength)
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


def _structure_reflections(
    lattice: Tensor,  # (3, 3) float64
    atomic_number: Tensor,  # (n_atoms,)
    fractional: Tensor,  # (n_atoms, 3)
    occupancy: Tensor,
    b_iso: Tensor,
    form_factor: Tensor,
    mott_bethe: bool,
    dispersion: Tensor | None,
    g_min: float,
    g_max: float,
) -> tuple[int, Tensor, Tensor, Tensor]:
    """Status, hkl (n, 3) int64 of one Friedel half-space, g^2 (n,), Friedel mean of |F|^2 (n,) of one structure."""
    nothing = lattice.new_zeros((0, 3), dtype=torch.int64), lattice.new_zeros(0), lattice.new_zeros(0)
    lengths = lattice.norm(dim=1)
    volume = torch.linalg.det(lattice).abs()
    if not bool(torch.isfinite(volume)) or not bool(volume > 1e-6 * lengths.prod()):
        return 4, *nothing
    reciprocal = torch.linalg.inv(lattice)  # columns a*, b*, c*
    reach = g_max + 0.5 * float(reciprocal.norm())
    if float(lengths.max()) * g_max >= 511 or 2.0 / 3.0 * math.pi * reach**3 * float(volume) > 1 << 26:
        return 3, *nothing
    h_max, k_max, l_max = ((lengths * (g_max + _SHELL_TOLERANCE)).floor().long() + 1).tolist()
    device = lattice.device
    axes = [torch.arange(0, h_max + 1, device=device)]
    axes += [torch.arange(-n, n + 1, device=device) for n in (k_max, l_max)]
    hkl = torch.stack([x.reshape(-1) for x in torch.meshgrid(*axes, indexing="ij")], dim=1)
    h, k, ell = hkl.unbind(1)
    hkl = hkl[(h > 0) | ((h == 0) & (k > 0)) | ((h == 0) & (k == 0) & (ell > 0))]
    g2 = (hkl.to(lattice.dtype) @ reciprocal.T).square().sum(1)
    inside = (g2 >= g_min * g_min) & (g2 <= (g_max + _SHELL_TOLERANCE) ** 2)
    hkl, g2 = hkl[inside], g2[inside]
    if len(g2) == 0:
        return 1, *nothing
    known = atomic_number.long().clamp(max=len(form_factor) - 1)
    coefficients = form_factor[known]  # (n_atoms, 11)
    if bool(((atomic_number.long() != known) | torch.isnan(coefficients[:, 10])).any()):
        return 2, *nothing
    s2 = 0.25 * g2
    gaussians = (coefficients[:, None, :5] * torch.exp(-coefficients[:, None, 5:10] * s2[:, None])).sum(2)
    f = coefficients[:, 10:] + (-_MOTT_BETHE * s2 if mott_bethe else torch.ones_like(s2)) * gaussians
    damping = occupancy[:, None] * torch.exp(-b_iso[:, None] * s2)
    phase = 2.0 * math.pi * (fractional @ hkl.to(lattice.dtype).T)
    wave = damping * torch.complex(torch.cos(phase), torch.sin(phase))
    if dispersion is None:
        return 0, hkl, g2, (f * wave).sum(0).abs().square()
    correction = dispersion[atomic_number.long()]
    with_f_prime = ((f + correction[:, :1]) * wave).sum(0)
    with_f_double_prime = (correction[:, 1:] * wave).sum(0)
    return 0, hkl, g2, with_f_prime.abs().square() + with_f_double_prime.abs().square()


def _lorentz_polarisation(sin2: Tensor) -> Tensor:
    return (1.0 + (1.0 - 2.0 * sin2).square()) / (sin2 * torch.sqrt(1.0 - sin2))


def _merge_key(two_theta: Tensor) -> Tensor:
    return (two_theta / _MERGE_STEP + 0.5).long()


def _each_structure(atom_offset: Tensor, lattice: Tensor, atoms: tuple[Tensor, ...]):
    bounds = atom_offset.tolist()
    for i in range(len(bounds) - 1):
        yield lattice[i], *(x[bounds[i] : bounds[i + 1]] for x in atoms)


def simulate_lines_reference(
    atom_offset: Tensor,
    lattice: Tensor,
    atomic_number: Tensor,
    fractional: Tensor,
    occupancy: Tensor,
    b_iso: Tensor,
    form_factor: Tensor,
    mott_bethe: bool,
    dispersion: Tensor | None,
    wavelength: float,
    g_min: float,
    g_max: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch, every reflection on its own; the yardstick of the kernels."""
    counts, statuses, pieces = [0], [], []
    for structure in _each_structure(atom_offset, lattice, (atomic_number, fractional, occupancy, b_iso)):
        status, hkl, g2, f_squared = _structure_reflections(
            *structure, form_factor, mott_bethe, dispersion, g_min, g_max
        )
        if status == 0:
            sin2 = (0.25 * wavelength**2 * g2).clamp(max=1.0)
            two_theta = 2.0 * torch.rad2deg(torch.asin(torch.sqrt(sin2)))
            order = torch.argsort(g2, stable=True)
            _, line, size = torch.unique_consecutive(
                _merge_key(two_theta[order]), return_inverse=True, return_counts=True
            )
            intensity = g2.new_zeros(len(size)).index_add_(0, line, (f_squared * _lorentz_polarisation(sin2))[order])
            strongest = intensity.max()
            if bool(torch.isfinite(strongest)) and bool(strongest > 0):
                first = order[torch.cumsum(size, 0) - size]
                code = torch.zeros_like(size).scatter_reduce_(0, line, _pack_hkl(hkl)[order], "amax")
                intensity = intensity / strongest * 100.0
                keep = intensity > _MIN_SCALED_INTENSITY
                first = first[keep]
                name = _unpack_hkl(code[keep]).to(torch.int16)
                pieces.append((two_theta[first], intensity[keep], 1.0 / g2[first].sqrt(), name))
            else:
                status = 5
        statuses.append(status)
        counts.append(counts[-1] + (len(pieces[-1][0]) if status == 0 else 0))
    empty = lattice.new_zeros(0)
    pieces.append((empty, empty, empty, empty.new_zeros((0, 3), dtype=torch.int16)))
    device = lattice.device
    return (
        torch.tensor(counts, dtype=torch.int64, device=device),
        *(torch.cat(column) for column in zip(*pieces, strict=True)),
        torch.tensor(statuses, dtype=torch.int32, device=device),
    )


def simulate_families_reference(
    atom_offset: Tensor,
    lattice: Tensor,
    atomic_number: Tensor,
    fractional: Tensor,
    occupancy: Tensor,
    b_iso: Tensor,
    form_factor: Tensor,
    mott_bethe: bool,
    dispersion: Tensor | None,
    wavelength: float,
    g_min: float,
    g_max: float,
    rotation_offset: Tensor,
    rotations: Tensor,
    relative_cutoff: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch families, orbit by orbit."""
    device = lattice.device
    bounds = rotation_offset.tolist()
    counts, statuses = [0], []
    pieces = [
        (
            torch.zeros((0, 3), dtype=torch.int16, device=device),
            torch.zeros(0, dtype=torch.int16, device=device),
            torch.zeros(0, dtype=torch.float32, device=device),
        )
    ]
    for i, structure in enumerate(
        _each_structure(atom_offset, lattice, (atomic_number, fractional, occupancy, b_iso))
    ):
        status, hkl, g2, f_squared = _structure_reflections(
            *structure, form_factor, mott_bethe, dispersion, g_min, g_max
        )
        rows = 0
        if status == 0:
            group = rotations[bounds[i] : bounds[i + 1]].to(hkl.dtype)
            if len(group) == 0:
                group = torch.eye(3, dtype=hkl.dtype, device=device)[None]
            images = torch.einsum("ni,rij->nrj", hkl, group)
            codes = _pack_hkl(torch.cat([images, -images], dim=1))  # (n, 2 n_rotations)
            code = codes.max(dim=1).values
            multiplicity = codes.shape[1] // (codes == code[:, None]).sum(1)
            unique, family, size = torch.unique(code, return_inverse=True, return_counts=True)
            mean = g2.new_zeros(len(unique)).index_add_(0, family, f_squared) / size
            first = torch.full_like(unique, len(g2)).scatter_reduce_(
                0, family, torch.arange(len(g2), device=device), "amin"
            )
            sin2 = 0.25 * wavelength**2 * g2[first]
            strength = mean * multiplicity[first] * _lorentz_polarisation(sin2)
            strongest = strength.max()
            if bool(torch.isfinite(strongest)) and bool(strongest > 0):
                key = _merge_key(2.0 * torch.rad2deg(torch.asin(torch.sqrt(sin2))))
                order = torch.argsort(key, stable=True)
                order = order[strength[order] > relative_cutoff * strongest]
                pieces.append(
                    (
                        _unpack_hkl(unique[order]).to(torch.int16),
                        multiplicity[first[order]].to(torch.int16),
                        mean[order].float(),
                    )
                )
                rows = len(order)
            else:
                status = 5
        statuses.append(status)
        counts.append(counts[-1] + rows)
    return (
        torch.tensor(counts, dtype=torch.int64, device=device),
        *(torch.cat(column) for column in zip(*pieces, strict=True)),
        torch.tensor(statuses, dtype=torch.int32, device=device),
    )


def _pack_hkl(hkl: Tensor) -> Tensor:
    h, k, ell = (hkl + 512).unbind(-1)
    return (h << 20) + (k << 10) + ell


def _unpack_hkl(code: Tensor) -> Tensor:
    return torch.stack([code >> 20, (code >> 10) & 1023, code & 1023], dim=-1) - 512


# --- implementations -------------------------------------------------------------------------------------------------


def _checked(op: str, atom_offset: Tensor, lattice: Tensor, **atoms: Tensor) -> None:
    n_structures = lattice.shape[0]
    if lattice.dim() != 3 or lattice.shape[1:] != (3, 3) or lattice.dtype != torch.float64:
        raise ValueError(
            f"{op}: lattice must be (n_structures, 3, 3) float64, got {tuple(lattice.shape)} {lattice.dtype}"
        )
    if atom_offset.shape != (n_structures + 1,) or atom_offset.dtype != torch.int64:
        raise ValueError(f"{op}: atom_offset must be ({n_structures + 1},) int64, got {tuple(atom_offset.shape)}")
    n_atoms = atoms["atomic_number"].shape[0]
    for name, tensor in atoms.items():
        shape = (n_atoms, 3) if name == "fractional" else (n_atoms,)
        dtype = torch.uint8 if name == "atomic_number" else torch.float64
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != lattice.device:
            raise ValueError(
                f"{op}: {name} must be {shape} {dtype} on {lattice.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def _offsets_checked(op: str, name: str, offset: Tensor, n_rows: int) -> None:
    """What memory safety needs: offsets that rise from 0 to the number of rows."""
    module = _native.cpu()
    if module is not None:
        rising = module.offsets_rise(offset.data_ptr(), offset.shape[0], n_rows)
    else:
        rising = int(offset[0]) == 0 and int(offset[-1]) == n_rows and not bool((offset.diff() < 0).any())
    if not rising:
        raise ValueError(f"{op}: {name} must rise from 0 to {n_rows}, got {offset.tolist()[:5]} ...")


def _native_simulate(op: str, outputs: list[tuple[tuple[int, ...], torch.dtype]], arguments: tuple, extra: tuple):
    """Runs a native simulator over pieces of at most _ROWS_A_CALL reflections; returns offset, columns..., status."""
    module = _native.cpu()
    offset, lattice, number, fractional, occupancy, b_iso, table, mott_bethe, dispersion, wavelength, g_min, g_max = (
        arguments
    )
    atoms = (number, fractional, occupancy, b_iso, table)
    held = [x if x.is_contiguous() else x.contiguous() for x in (offset, lattice, *atoms)]
    pointers = [x.data_ptr() for x in held]
    dispersion = None if dispersion is None else dispersion.contiguous()
    n_structures = lattice.shape[0]
    capacity = torch.empty(n_structures + 1, dtype=torch.int64)
    total = module.reflection_capacity(pointers[1], n_structures, g_max, capacity.data_ptr())
    cuts, room = [0, n_structures], total
    if total > _ROWS_A_CALL:
        cuts = [0]
        while cuts[-1] < n_structures:
            limit = int(capacity[cuts[-1]]) + _ROWS_A_CALL
            cuts.append(max(cuts[-1] + 1, int(torch.searchsorted(capacity, limit, right=True)) - 1))
        room = int(capacity[cuts].diff().max())
    columns = [torch.empty((room, *shape), dtype=dtype) for shape, dtype in outputs]
    status = torch.empty(n_structures, dtype=torch.int32)
    rows = torch.empty(n_structures + 1, dtype=torch.int64)
    pieces, found, base = [], 0, 0
    for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
        # A piece is a window on the same arrays: its offsets count from the whole array's start.
        found = getattr(module, op)(
            pointers[0] + 8 * begin,
            pointers[1] + 72 * begin,
            *pointers[2:],
            0 if dispersion is None else dispersion.data_ptr(),
            end - begin,
            table.shape[0],
            mott_bethe,
            wavelength,
            g_min,
            g_max,
            capacity.data_ptr() + 8 * begin,
            *(x.data_ptr() + (8 * begin if x.dtype == torch.int64 else 0) for x in extra if isinstance(x, Tensor)),
            *(x for x in extra if not isinstance(x, Tensor)),
            rows.data_ptr() + 8 * begin,
            *(x.data_ptr() for x in columns),
            status.data_ptr() + 4 * begin,
            torch.get_num_threads(),
        )
        if total > _ROWS_A_CALL:
            pieces.append([x[:found].clone() for x in columns])
            rows[begin : end + 1] += base
            base += found
    if pieces:
        columns = [torch.cat(x) for x in zip(*pieces, strict=True)]
    elif found < room:
        columns = [x[:found] for x in columns]
    return rows, *columns, status


def _lines_cpu(*arguments):
    op = "simulate_lines"
    offset, lattice, number, fractional, occupancy, b_iso = arguments[:6]
    _checked(op, offset, lattice, atomic_number=number, fractional=fractional, occupancy=occupancy, b_iso=b_iso)
    _offsets_checked(op, "atom_offset", offset, len(number))
    if _native.cpu() is None:
        return simulate_lines_reference(*arguments)
    double, short = torch.float64, torch.int16
    return _native_simulate(op, [((), double), ((), double), ((), double), ((3,), short)], arguments, ())


def _families_cpu(*arguments):
    op = "simulate_families"
    offset, lattice, number, fractional, occupancy, b_iso = arguments[:6]
    rotation_offset, rotations, relative_cutoff = arguments[12:]
    _checked(op, offset, lattice, atomic_number=number, fractional=fractional, occupancy=occupancy, b_iso=b_iso)
    _offsets_checked(op, "atom_offset", offset, len(number))
    if rotations.shape[1:] != (3, 3) or rotations.dtype != torch.int8:
        raise ValueError(f"{op}: rotations must be (n, 3, 3) int8, got {tuple(rotations.shape)} {rotations.dtype}")
    if rotation_offset.shape != offset.shape or rotation_offset.dtype != torch.int64:
        raise ValueError(f"{op}: rotation_offset must be {tuple(offset.shape)} int64, got {rotation_offset.dtype}")
    _offsets_checked(op, "rotation_offset", rotation_offset, len(rotations))
    if _native.cpu() is None:
        return simulate_families_reference(*arguments)
    outputs = [((3,), torch.int16), ((), torch.int16), ((), torch.float32)]
    extra = (rotation_offset.contiguous(), rotations.contiguous(), relative_cutoff)
    return _native_simulate(op, outputs, arguments[:12], extra)


LIBRARY.impl("simulate_lines", _lines_cpu, "CPU")
LIBRARY.impl("simulate_families", _families_cpu, "CPU")
LIBRARY.impl("simulate_lines", simulate_lines_reference, "CUDA")
LIBRARY.impl("simulate_families", simulate_families_reference, "CUDA")


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
