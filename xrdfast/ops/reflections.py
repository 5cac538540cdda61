"""Reflections of structures, by plain PyTorch or the CUDA kernels, and their merging into lines or families.

The merging is sorting and segment sums over all structures at once, and shared: the reference and the kernels
differ only in how they come by their reflections. Not the CPU kernels, which merge too, and not the public
functions: see `xrdfast.ops.simulate` for both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from xrdfast.ops import device_stream

MERGE_STEP = 1e-5  # degrees 2theta, pymatgen's TWO_THETA_TOL
MIN_SCALED_INTENSITY = 1e-3  # of 100, pymatgen's SCALED_INTENSITY_TOL
MAX_ROTATIONS = 192  # of a structure: the operations of Fm-3m in its cubic cell
_SHELL_TOLERANCE = 1e-8  # 1 / Angstrom, pymatgen's numerical_tol
_MOTT_BETHE = 41.78214  # Angstrom^2, De Graef & McHenry, Structure of Materials, eq. 11.42 as pymatgen has it
_KEY_BITS = 25  # 180 degrees / MERGE_STEP < 2^25
_CODE_BITS = 30  # three packed Miller indices

# Why a structure has no reflections.
NO_REFLECTION, UNKNOWN_ELEMENT, CELL_TOO_LARGE, BAD_LATTICE, NO_INTENSITY = 1, 2, 3, 4, 5


class Reflections(NamedTuple):
    """Reflections of N structures inside the limits, one a Friedel pair; refused structures have none."""

    offset: Tensor  # (N + 1,) int64
    hkl: Tensor  # (n, 3) int16, first non-zero index positive
    g2: Tensor  # (n,) float64, 1 / d^2
    f_squared: Tensor  # (n,) float64, |F|^2, Friedel mean
    status: Tensor  # (N,) int32

    def structure(self) -> Tensor:
        """(n,) int64, the structure each reflection belongs to."""
        return rows_of(self.offset, len(self.g2))


def rows_of(offset: Tensor, n: int) -> Tensor:
    """(n,) int64, the row of each of the n elements that `offset` delimits; needs no synchronisation."""
    rows = torch.arange(len(offset) - 1, device=offset.device)
    return torch.repeat_interleave(rows, offset.diff(), output_size=n)


def lorentz_polarisation(sin2: Tensor) -> Tensor:
    """(1 + cos^2 2theta) / (sin^2 theta cos theta) from sin^2(theta)."""
    return (1.0 + (1.0 - 2.0 * sin2).square()) / (sin2 * torch.sqrt(1.0 - sin2))


# --- reference ----------------------------------------------------------------------------------------------


def reflections_reference(
    atom_offset: Tensor,
    lattice: Tensor,
    atomic_number: Tensor,
    fractional: Tensor,
    occupancy: Tensor,
    b_iso: Tensor,
    form_factor: Tensor,
    mott_bethe: bool,
    dispersion: Tensor | None,
    g_min: float,
    g_max: float,
) -> Reflections:
    """Structure by structure, every reflection on its own."""
    bounds = atom_offset.tolist()
    pieces = [(0, *_no_reflections(lattice))]  # so that there is something to join
    for i, cell in enumerate(lattice):
        atoms = (x[bounds[i] : bounds[i + 1]] for x in (atomic_number, fractional, occupancy, b_iso))
        pieces.append(_structure_reflections(cell, *atoms, form_factor, mott_bethe, dispersion, g_min, g_max))
    status, hkl, g2, f_squared = zip(*pieces, strict=True)
    counts = torch.tensor([len(x) for x in g2], device=lattice.device)
    return Reflections(
        counts.cumsum(0),
        torch.cat(hkl).to(torch.int16),
        torch.cat(g2),
        torch.cat(f_squared),
        torch.tensor(status[1:], dtype=torch.int32, device=lattice.device),
    )


def _no_reflections(lattice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return lattice.new_zeros((0, 3), dtype=torch.int64), lattice.new_zeros(0), lattice.new_zeros(0)


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
    """Of one structure: status, hkl (n, 3) int64 of a half-space, g^2 (n,), Friedel mean of |F|^2 (n,)."""
    nothing = _no_reflections(lattice)
    lengths = lattice.norm(dim=1)
    volume = torch.linalg.det(lattice).abs()
    if not bool(torch.isfinite(volume)) or not bool(volume > 1e-6 * lengths.prod()):
        return BAD_LATTICE, *nothing
    reciprocal = torch.linalg.inv(lattice)  # columns a*, b*, c*
    reach = g_max + 0.5 * float(reciprocal.norm())
    if float(lengths.max()) * g_max >= 511 or 2.0 / 3.0 * math.pi * reach**3 * float(volume) > 1 << 26:
        return CELL_TOO_LARGE, *nothing
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
        return NO_REFLECTION, *nothing
    known = atomic_number.long().clamp(max=len(form_factor) - 1)
    coefficients = form_factor[known]  # (n_atoms, 11)
    if bool(((atomic_number.long() != known) | torch.isnan(coefficients[:, 10])).any()):
        return UNKNOWN_ELEMENT, *nothing
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


def name_families_reference(
    found: Reflections, rotation_offset: Tensor, rotations: Tensor
) -> tuple[Tensor, Tensor]:
    """(n,) largest image of each reflection under its group and inversion, packed; (n,) how many images."""
    bounds, rows = rotation_offset.tolist(), found.offset.tolist()
    identity = torch.eye(3, dtype=torch.int64, device=rotations.device)[None]
    codes, multiplicities = [found.offset.new_zeros(0)], [found.offset.new_zeros(0)]
    for i in range(len(rows) - 1):
        hkl = found.hkl[rows[i] : rows[i + 1]].long()
        group = rotations[bounds[i] : bounds[i + 1]].long()
        images = torch.einsum("ni,rij->nrj", hkl, group if len(group) else identity)
        packed = _pack_hkl(torch.cat([images, -images], dim=1))  # (n, 2 n_rotations)
        codes.append(packed.max(dim=1).values)
        multiplicities.append(packed.shape[1] // (packed == codes[-1][:, None]).sum(1))
    return torch.cat(codes), torch.cat(multiplicities)


# --- kernels ------------------------------------------------------------------------------------------------


def cuts_of(offset: Tensor, rows_a_piece: int) -> list[int]:
    """Where to cut a set of structures so that a piece has at most so many rows, or is one structure."""
    n_structures = len(offset) - 1
    if int(offset[-1]) <= rows_a_piece:
        return [0, n_structures]
    cuts = [0]
    while cuts[-1] < n_structures:
        limit = int(offset[cuts[-1]]) + rows_a_piece
        cuts.append(max(cuts[-1] + 1, int(torch.searchsorted(offset, limit, right=True)) - 1))
    return cuts


def device_reflections(
    module: ModuleType,
    rows_a_piece: int,
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
) -> Iterator[tuple[int, Reflections]]:
    """First structure and reflections of each piece, by the kernels of `_cuda` (or of `_emu`, in the tests).

    Only sizes leave the device, once.
    """
    n_structures, n_atoms, n_elements = len(lattice), len(atomic_number), len(form_factor)
    structure = rows_of(atom_offset, n_atoms)
    # Atoms of one element and one B next to each other: the kernel evaluates one form factor for all of them.
    order = torch.argsort(b_iso, stable=True)
    order = order[torch.argsort((structure * 256 + atomic_number)[order], stable=True)]
    number, fractional, occupancy, b_iso = (x[order] for x in (atomic_number, fractional, occupancy, b_iso))
    element = number.long().clamp(max=n_elements - 1)
    unknown = (number != element) | torch.isnan(form_factor[element, -1])
    has_unknown = torch.zeros(n_structures, dtype=torch.int32, device=lattice.device)
    has_unknown = has_unknown.index_add_(0, structure, unknown.int()) > 0

    held = [x.contiguous() for x in (atom_offset, lattice, number, fractional, occupancy, b_iso, form_factor)]
    dispersion = None if dispersion is None else dispersion.contiguous()
    pointers = [0 if x is None else x.data_ptr() for x in (*held, dispersion)]
    count = torch.empty(n_structures, dtype=torch.int64, device=lattice.device)
    status = torch.empty(n_structures, dtype=torch.int32, device=lattice.device)
    with device_stream(lattice) as stream:
        module.count_reflections(
            pointers[1], n_structures, g_min, g_max, count.data_ptr(), status.data_ptr(), stream
        )
    status = torch.where((status == 0) & has_unknown, UNKNOWN_ELEMENT, status)
    offset = torch.nn.functional.pad(torch.where(status == 0, count, 0).cumsum(0), (1, 0))
    sizes = offset.cpu()
    for begin, end in itertools.pairwise(cuts_of(sizes, rows_a_piece)):
        n = int(sizes[end] - sizes[begin])
        found = Reflections(
            offset[begin : end + 1] - offset[begin],
            torch.empty((n, 3), dtype=torch.int16, device=lattice.device),
            lattice.new_empty(n),
            lattice.new_empty(n),
            status[begin:end],
        )
        window = (pointers[0] + 8 * begin, pointers[1] + 72 * begin)
        with device_stream(lattice) as stream:
            module.list_reflections(
                window[1],
                end - begin,
                g_min,
                g_max,
                found.offset.data_ptr(),
                n,
                found.hkl.data_ptr(),
                found.g2.data_ptr(),
                stream,
            )
            module.structure_factors(
                *window,
                *pointers[2:],
                end - begin,
                n_elements,
                mott_bethe,
                wavelength,
                g_min,
                g_max,
                found.offset.data_ptr(),
                n,
                found.hkl.data_ptr(),
                found.g2.data_ptr(),
                found.f_squared.data_ptr(),
                stream,
            )
        yield begin, found


# --- merging ------------------------------------------------------------------------------------------------


def merge_lines(found: Reflections, wavelength: float) -> tuple[Tensor, ...]:
    """The fields of `simulate.Lines`."""
    sin2, two_theta = _angles(found.g2, wavelength)
    key, order = torch.sort((found.structure() << _KEY_BITS) | _merge_key(two_theta), stable=True)
    line, size = torch.unique_consecutive(key, return_counts=True)
    structure = line >> _KEY_BITS
    strength = _segments((found.f_squared * lorentz_polarisation(sin2))[order], size, "sum")
    strongest = _strongest(structure, strength, len(found.status))
    intensity = strength / strongest[structure] * 100.0
    keep = _has_intensity(strongest)[structure] & (intensity > MIN_SCALED_INTENSITY)
    g2 = _segments(found.g2[order], size, "min")[keep]
    # Packed indices stay below 2^30, which a float64 holds exactly.
    name = _segments(_pack_hkl(found.hkl.long()).double()[order], size, "max")[keep].long()
    return (
        _offsets(structure[keep], len(found.status)),
        _angles(g2, wavelength)[1],
        intensity[keep],
        1.0 / g2.sqrt(),
        _unpack_hkl(name).to(torch.int16),
        _final_status(found.status, strongest),
    )


def merge_families(
    found: Reflections, code: Tensor, multiplicity: Tensor, wavelength: float, relative_cutoff: float
) -> tuple[Tensor, ...]:
    """The fields of `simulate.Families`."""
    key, order = torch.sort((found.structure() << _CODE_BITS) | code, stable=True)
    family, size = torch.unique_consecutive(key, return_counts=True)
    structure = family >> _CODE_BITS
    mean = _segments(found.f_squared[order], size, "sum") / size
    first = order[size.cumsum(0) - size]
    sin2, two_theta = _angles(found.g2[first], wavelength)
    strength = mean * multiplicity[first] * lorentz_polarisation(sin2)
    strongest = _strongest(structure, strength, len(found.status))
    by_angle = torch.argsort((structure << _KEY_BITS) | _merge_key(two_theta), stable=True)
    keep = _has_intensity(strongest)[structure] & (strength > relative_cutoff * strongest[structure])
    by_angle = by_angle[keep[by_angle]]
    return (
        _offsets(structure[by_angle], len(found.status)),
        _unpack_hkl(family[by_angle] & ((1 << _CODE_BITS) - 1)).to(torch.int16),
        multiplicity[first[by_angle]].to(torch.int16),
        mean[by_angle].float(),
        _final_status(found.status, strongest),
    )


def _angles(g2: Tensor, wavelength: float) -> tuple[Tensor, Tensor]:
    """sin^2(theta), and 2theta in degrees."""
    sin2 = (0.25 * wavelength**2 * g2).clamp(max=1.0)
    return sin2, 2.0 * torch.rad2deg(torch.asin(torch.sqrt(sin2)))


def _merge_key(two_theta: Tensor) -> Tensor:
    return (two_theta / MERGE_STEP + 0.5).long()


def _segments(values: Tensor, size: Tensor, reduce: str) -> Tensor:
    """Reduction over consecutive segments; unlike index_add_ on a GPU, in one fixed order."""
    if len(values) == 0:  # segment_reduce refuses it
        return values
    return torch.segment_reduce(values, reduce, lengths=size, unsafe=True)


def _strongest(structure: Tensor, strength: Tensor, n_structures: int) -> Tensor:
    return strength.new_zeros(n_structures).scatter_reduce_(0, structure, strength, "amax")


def _has_intensity(strongest: Tensor) -> Tensor:
    return torch.isfinite(strongest) & (strongest > 0)


def _final_status(status: Tensor, strongest: Tensor) -> Tensor:
    return torch.where((status == 0) & ~_has_intensity(strongest), NO_INTENSITY, status)


def _offsets(structure: Tensor, n_structures: int) -> Tensor:
    """(n_structures + 1,) int64 from the ascending structure of each row."""
    return torch.searchsorted(structure, torch.arange(n_structures + 1, device=structure.device))


def _pack_hkl(hkl: Tensor) -> Tensor:
    h, k, ell = (hkl + 512).unbind(-1)
    return (h << 20) + (k << 10) + ell


def _unpack_hkl(code: Tensor) -> Tensor:
    return torch.stack([code >> 20, (code >> 10) & 1023, code & 1023], dim=-1) - 512
