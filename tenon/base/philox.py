"""Counter-based randomness: Philox4x32-10 (Salmon et al. 2011), and the one noise rule of Tenon.

A token is chosen by Gumbel-max: argmax over tokens of logit + g(seed, sample, position, token). The noise of a
token depends on nothing else, so a sequence's tokens do not depend on its batch, on speculation, on
preemption or on the executor. Every implementation (numpy here, C and CUDA elsewhere) agrees with
``TEST_VECTORS``. There is no global generator.

Layout: key = seed (64 bits); counter = (token >> 2, output position, sample index, 0); a token takes
lane ``token & 3`` of its counter's four words. A word r gives u = (r + 1/2) 2^-32 and g = -log(-log1p(-u)), in
fp64: in fp32 u would round to 1 about once in 2^24 and g to infinity.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_M0: Final = np.uint64(0xD2511F53)
_M1: Final = np.uint64(0xCD9E8D57)
_W0: Final = 0x9E3779B9
_W1: Final = 0xBB67AE85
_MASK: Final = np.uint64(0xFFFFFFFF)
_SHIFT: Final = np.uint64(32)

GUMBEL_MAX: Final = 22.88
"""No token's noise exceeds this (u = 2^-33) ..."""
GUMBEL_MIN: Final = -3.14
"""... nor falls below this (u = 1 - 2^-33): a token 26.02 below the best logit can never win."""

# (seed, sample, position, token) -> the 32-bit word.
TEST_VECTORS: Final = (
    (0, 0, 0, 0, 0x6627E8D5),
    (0, 0, 0, 1, 0xE169C58D),
    (0, 0, 0, 2, 0xBC57AC4C),
    (0, 0, 0, 3, 0x9B00DBD8),
    (1234, 2, 5, 7, 0x0C997AF2),
    (1234, 2, 5, 150_000, 0x0A576BC0),
)


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Ten rounds over counters (N, 4) with one key; returns words (N, 4)."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=1).astype(np.uint32)


def words(seed: int, sample: int, position: int, tokens: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The 32 bits of each token (N,), by the layout above."""
    group, where = np.unique(tokens >> 2, return_inverse=True)
    counter = np.empty((len(group), 4), np.uint32)
    counter[:, 0] = group
    counter[:, 1], counter[:, 2], counter[:, 3] = position, sample, 0
    drawn = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return np.asarray(drawn[where, tokens & 3])


def gumbel(word: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Standard Gumbel noise in fp64 from 32-bit words; finite for each of the 2^32 words."""
    u = (word.astype(np.float64) + 0.5) * 2.0**-32
    return np.asarray(-np.log(-np.log1p(-u)))


def noise(seed: int, sample: int, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Gumbel noise (N,) of the given tokens at one output position of one sequence."""
    return gumbel(words(seed, sample, position, tokens))


def derive(seed: int, *path: int) -> int:
    """A 64-bit seed for a part of something seeded: same seed and path, same result."""
    word = np.array([[0, 0, 0, 0]], np.uint32)
    key = seed
    for step in path:
        word[0] = (step & 0xFFFFFFFF, (step >> 32) & 0xFFFFFFFF, 0x7E0, 1)
        out = philox4x32(word, (key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF))[0]
        key = int(out[0]) | int(out[1]) << 32
    return key
