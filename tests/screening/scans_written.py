"""Scans written for the tests of screening: small patterns with a few peaks, in every container."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

N_POINTS = 1701  # 5 to 90 degrees in steps of 0.05
TWO_THETA = 5.0 + 0.05 * np.arange(N_POINTS)


def counts(seed: int) -> NDArray[np.float64]:
    """Whole counts of a scan of its own."""
    rng = np.random.default_rng(seed)
    places, heights = rng.uniform(15.0, 80.0, 8), rng.uniform(500.0, 5000.0, 8)
    clean = 40.0 + (heights * np.exp(-(((TWO_THETA[:, None] - places) / 0.15) ** 2))).sum(1)
    return rng.poisson(clean).astype(np.float64)


def text(seed: int) -> str:
    """The scan as two columns."""
    return "".join(f"{x:.3f} {y:.0f}\n" for x, y in zip(TWO_THETA, counts(seed), strict=True))


def write_folder(folder: Path, n_scans: int, first: int = 0) -> Path:
    """A folder of .xy files."""
    folder.mkdir(exist_ok=True)
    for seed in range(first, first + n_scans):
        (folder / f"{seed:04d}.xy").write_text(text(seed))
    return folder


def write_tar(path: Path, n_scans: int) -> Path:
    """A tar archive of .xy files, compressed as its name says."""
    mode = "w:gz" if path.suffix == ".gz" else "w"
    with tarfile.open(path, mode) as tar:
        for seed in range(n_scans):
            content = text(seed).encode()
            info = tarfile.TarInfo(f"run/{seed:04d}.xy")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_npz(path: Path, n_scans: int) -> Path:
    """A NumPy stack."""
    intensity = np.stack([counts(seed) for seed in range(n_scans)])
    np.savez(path, intensity=intensity, two_theta=TWO_THETA, wavelength=1.54056)
    return path
