"""Diffraction lines of one structure as people read them: hkl in the standard setting.

Not for many structures at once (`xrdfast.ops.simulate`) and not for families that are to be strained.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xrdfast.bragg import two_theta_of
from xrdfast.data.structures import PackedStructures
from xrdfast.ops.simulate import STATUS_REASONS, Families, simulate_families, simulate_lines

_SAME_LINE = 1.5e-5  # degrees: what simulate_lines merges


@dataclass(frozen=True)
class StructureLines:
    """Diffraction lines of one structure as people read them: hkl in the standard setting."""

    two_theta: NDArray[np.float64]  # (n_lines,) degrees
    d_spacing: NDArray[np.float64]  # (n_lines,) Angstrom
    intensity: NDArray[np.float64]  # (n_lines,), strongest = 100
    hkl: NDArray[np.int64]  # (n_lines, 3); R groups in hexagonal axes


def simulate_structure_lines(
    structure: PackedStructures,
    *,
    wavelength: float,
    two_theta_min: float = 5.0,
    two_theta_max: float = 90.0,
    form_factors: str = "pymatgen",
    dispersion: bool = False,
) -> StructureLines:
    """Merged lines of one structure with hkl in spglib's standard setting.

    The strongest family of a line names it, by the member with fewest minus signs, of these by the last in
    lexical order: 111 rather than -11-1.

    Args:
        structure: one, with rotations and `to_standard` (`analyse_symmetry`); without them hkl stay those of
            the given cell.
        wavelength, two_theta_min, two_theta_max, form_factors, dispersion: as in
            `xrdfast.ops.simulate.simulate_lines`.

    Raises:
        ValueError: for another number of structures, or one that cannot be simulated.
    """
    if len(structure) != 1:
        raise ValueError(f"structure: must be one, got {len(structure)}")
    limits = {"wavelength": wavelength, "two_theta_min": two_theta_min, "two_theta_max": two_theta_max}
    table = {"form_factors": form_factors, "dispersion": dispersion}
    lines = simulate_lines(structure, **limits, **table)
    status = int(lines.status[0])
    if status:
        raise ValueError(f"structure: must diffract, got: {STATUS_REASONS[status]}")
    families = simulate_families(structure, margin=0.0, **limits, **table)
    two_theta = lines.two_theta.numpy()
    hkl = lines.hkl.numpy().copy()  # the name of a line may be an absent reflection of equal d
    strongest = _strongest_families(structure, families, two_theta, wavelength)
    hkl[strongest >= 0] = families.hkl.numpy()[strongest[strongest >= 0]]
    return StructureLines(
        two_theta, lines.d_spacing.numpy(), lines.intensity.numpy(), _standard_hkl(structure, hkl)
    )


def _strongest_families(
    structure: PackedStructures, families: Families, two_theta: NDArray[np.float64], wavelength: float
) -> NDArray[np.int64]:
    """(n_lines,) the strongest family at the angle of each line, -1 where none is."""
    strongest = np.full(len(two_theta), -1)
    reciprocal = np.linalg.inv(structure.lattice[0].numpy())  # columns a*, b*, c*
    d_spacing = 1.0 / np.linalg.norm(families.hkl.numpy() @ reciprocal.T, axis=1)
    place = two_theta_of(d_spacing, wavelength)
    right = np.searchsorted(two_theta, place).clip(0, len(two_theta) - 1)
    left = (right - 1).clip(0)
    line = np.where(np.abs(two_theta[left] - place) < np.abs(two_theta[right] - place), left, right)
    strength = (families.multiplicity * families.f_squared).numpy()
    for family in np.argsort(strength, kind="stable").tolist():
        if abs(two_theta[line[family]] - place[family]) < _SAME_LINE:
            strongest[line[family]] = family
    return strongest


def _standard_hkl(structure: PackedStructures, hkl: NDArray[np.int16]) -> NDArray[np.int64]:
    """(n, 3) of the equivalent that names a line, in the standard setting: hkl_standard = hkl P^-1."""
    to_standard = structure.to_standard[0].numpy()
    if not np.isfinite(to_standard).all():
        return hkl.astype(np.int64)
    images = np.einsum("ni,rij->nrj", hkl.astype(np.float64), structure.rotations.numpy().astype(np.float64))
    images = np.concatenate([images, -images], axis=1) @ np.linalg.inv(to_standard)
    whole = np.rint(images).astype(np.int64)
    # digits of base 2^12: Miller indices of a standard cell stay far below 2^11
    code = (whole[..., 0] << 24) + (whole[..., 1] << 12) + whole[..., 2] - ((whole < 0).sum(-1) << 40)
    return whole[np.arange(len(hkl)), code.argmax(axis=1)]
