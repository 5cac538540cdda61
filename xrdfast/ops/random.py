"""Counter-based random numbers in plain PyTorch: what csrc/random.h computes, in float64.

The bits of point, pattern and seed are the same on every backend and in every order of evaluation. Not a general
generator: torch.Generator draws the parameters, this draws what the kernels need inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
CROSSOVER = 10.0  # mean from which on the Poisson law is drawn through the normal one
MAX_SMALL_COUNT = 32  # of the sum by inversion: at a mean of 10 it is passed once in 10^8 draws
FAINT_TERM = 3e-8  # ends that sum: in single precision nothing less can be added

# Which random numbers a counter is for.
NOISE_STREAM, IMPURITY_STREAM = 0, 1


def philox(index: Tensor, stream: int, pattern_id: int, seed: int) -> Tensor:
    """Philox4x32-10 of the counter (index, stream, high half of seed, high half of pattern_id).

    The key is the two low halves.

    Args:
        index: (n,) int64 in [0, 2^32).
        stream: one of the streams above.
        pattern_id, seed: 64-bit integers.

    Returns:
        (4, n) int64, each in [0, 2^32).

    Source:
        Salmon, Moraes, Dror & Shaw, SC11 (2011), doi:10.1145/2063384.2063405.
    """
    words = [
        index,
        torch.full_like(index, stream),
        torch.full_like(index, (seed >> 32) & MASK),
        torch.full_like(index, (pattern_id >> 32) & MASK),
    ]
    key = [seed & MASK, pattern_id & MASK]
    for _ in range(10):
        high_0, low_0 = _product(0xD2511F53, words[0])
        high_1, low_1 = _product(0xCD9E8D57, words[2])
        words = [high_1 ^ words[1] ^ key[0], low_1, high_0 ^ words[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return torch.stack(words)


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of the 64-bit product of two 32-bit numbers, without an unsigned type."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & MASK


def noise_words(n_points: int, pattern_id: int, seed: int) -> Tensor:
    """(n_points,) int64, the random word of every point of a pattern.

    Point k has word k / 16 mod 4 of counter 16 (k / 64) + k mod 16, so that 16 neighbours are one vector.
    """
    n_blocks = -(-n_points // 64)
    words = philox(torch.arange(16 * n_blocks), NOISE_STREAM, pattern_id, seed)
    return words.view(4, n_blocks, 16).transpose(0, 1).reshape(-1)[:n_points]


def unit(word: Tensor) -> Tensor:
    """Uniform in (0, 1), float64."""
    return (word.double() + 0.5) / 2.0**32


def poisson(mean: Tensor, word: Tensor) -> Tensor:
    """Poisson counts of float64 means, one 32-bit word each.

    Below `CROSSOVER` by inversion: the number of k < 32 with F(k) < u, u of 23 bits, ended by a term of 3e-8 or less.
    Above, with z the normal quantile of the word, floor of

        mean + sqrt(mean) z + 1/3 + z^2/6 - (z/36 + z^3/72) / sqrt(mean) + (-8/405 + 7 z^2/810 + z^4/270) / mean,

    the Cornish-Fisher expansion of the inverse Poisson distribution function with its continuity correction.

    Source:
        Giles, ACM Trans. Math. Softw. 42, 7 (2016), Algorithm 955, eq. 8 for the expansion.
    """
    small = mean.clamp(max=CROSSOVER)
    u = ((word >> 9).double() + 0.5) / 2.0**23
    probability = torch.exp(-small)
    below, count = probability.clone(), torch.zeros_like(mean)
    for k in range(1, MAX_SMALL_COUNT + 1):
        count += (u > below) & (probability > FAINT_TERM)
        probability = probability * small / k
        below += probability
    large = mean.clamp(min=CROSSOVER)
    tail = torch.minimum(word, MASK - word)
    z = torch.special.ndtri(unit(tail)) * torch.where(tail == word, 1.0, -1.0)
    root = torch.sqrt(large)
    quantile = large + root * z + 1.0 / 3.0 + z**2 / 6.0 - (z / 36.0 + z**3 / 72.0) / root
    quantile = quantile + (-8.0 / 405.0 + 7.0 / 810.0 * z**2 + z**4 / 270.0) / large
    return torch.where(mean < CROSSOVER, count, torch.floor(quantile).clamp(min=0.0))
