"""Where a generator's numbers come from: one stream of randomness per purpose, and numbers for contents.

A stream depends on the seed, the generator's name and the purpose alone, so that a new feature, which draws from a
stream of its own, moves nothing that was there before.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

# 28 bits of the seed's digest over 24 bits of count: below 2**52, which JSON readers with doubles keep exactly.
COUNT_BITS = 24
BASE_BITS = 28


class Streams:
    """Random generators by purpose."""

    def __init__(self, seed: int, name: str) -> None:
        self._seed, self._name = seed, name

    def of(self, purpose: str) -> np.random.Generator:
        """A generator of its own for ``purpose``; asking twice gives two that draw the same."""
        key = hashlib.blake2b(f"{self._name}/{purpose}".encode(), digest_size=16).digest()
        sequence = np.random.SeedSequence(self._seed, spawn_key=tuple(np.frombuffer(key, "<u4").tolist()))
        return np.random.Generator(np.random.Philox(sequence))


class Contents:
    """Numbers for new contents: no two alike in a trace, and none shared by accident with another seed's trace."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{name}/{seed}".encode(), digest_size=8).digest()
        self._next = 1 + ((int.from_bytes(digest, "little") & ((1 << BASE_BITS) - 1)) << COUNT_BITS)

    def new(self) -> int:
        self._next += 1
        return self._next - 1


class LogNormal:
    """Lengths and pauses with a given median and spread (sigma of the logarithm), drawn one by one."""

    def __init__(self, stream: np.random.Generator, median: float, sigma: float, high: float = math.inf) -> None:
        self._stream, self._mu, self._sigma, self._high = stream, math.log(median), sigma, high

    @classmethod
    def of_mean(cls, stream: np.random.Generator, mean: float, sigma: float, high: float = math.inf) -> LogNormal:
        """With a given mean (of the distribution that ``high`` does not yet cut)."""
        return cls(stream, mean / math.exp(sigma * sigma / 2), sigma, high)

    def draw(self) -> float:
        return min(self._high, math.exp(self._mu + self._sigma * float(self._stream.standard_normal())))

    def tokens(self) -> int:
        """A draw as a length: at least one."""
        return max(1, round(self.draw()))


def turns(stream: np.random.Generator, mean: float) -> int:
    """Geometric on 1, 2, ... with the given mean (at least 1)."""
    return int(stream.geometric(1.0 / max(1.0, mean)))


def pick(stream: np.random.Generator, weights: list[float]) -> int:
    """An index, as likely as its weight's share."""
    u, total = float(stream.random()) * sum(weights), 0.0
    for i, weight in enumerate(weights):
        total += weight
        if u < total:
            return i
    return len(weights) - 1
