"""How likely guesses are to come true, learned from those that were verified.

    P(node is true | its parent is) = sigmoid(a[depth] + b logit(q) + c [rank > 0])

for each kind of guess and each range of temperatures; siblings together no more than one alone may be. A path's
probability is the product along it, so a node is never likelier than its parent. Only nodes whose parents came true
teach anything. ``a`` is a sum of what all guesses at such temperatures have in common, all of a kind, and those at one
depth, so that what was seldom seen is judged like what is like it. Weights move by gradient steps whose sizes fall with
what was seen, down to a floor, so that a change of text is followed.

Shapes: n sequences, C columns, K kinds of guesses, N observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tenon.engine.policies.forest import F32, Forest

F64 = NDArray[np.float64]
Ints = NDArray[np.integer]

WARM: Final = (0.0, 0.5, 0.9)
"""Temperatures up to which a range goes; the last one has no end."""
DEPTHS: Final = 16
"""Depths that are told apart; deeper ones count as the last."""
DOUBT: Final = -0.35
"""What each range of temperatures takes off, in logits, before anything is learned."""
BELIEF: Final = 8
"""Observations that what is known beforehand weighs as much as."""
BATCH: Final = 32
"""Observations that are learned from together."""
LEAST: Final = 0.02
"""Of the step towards an observation, the least."""
LOW: Final = 1e-3
HIGH: Final = 0.99
"""What a probability is held between: nothing is sure."""


def warmth(temperature: float) -> int:
    """The range of a temperature."""
    return next((i for i, bound in enumerate(WARM) if temperature <= bound), len(WARM))


Observation = tuple[int, int, int, float, int, bool]
"""Kind of guess, warmth, depth, q, rank, whether it came true."""


class Calibrator:
    """Of ``n_kinds`` kinds of guesses. Begins by believing ``q``, the less the warmer, and ``beliefs``, each kind's
    addition to its logits."""

    def __init__(self, n_kinds: int, beliefs: Sequence[float] = ()) -> None:
        n_warm = len(WARM) + 1
        shape = n_kinds, n_warm
        self._b, self._c = np.ones(shape), np.zeros(shape)
        self._parts = DOUBT * np.arange(n_warm), np.zeros(shape), np.zeros((*shape, DEPTHS))
        """Of ``a``: what all have in common, all of a kind, those at one depth."""
        self._seen_by = tuple(np.zeros(part.shape) for part in self._parts)
        if beliefs:
            self._parts[1][:] = np.array(beliefs)[:, None]
            self._seen_by[1][:] = BELIEF * (self._parts[1] != 0)
        self._a = np.zeros((*shape, DEPTHS))
        self._add()
        self._seen: list[Observation] = []

    @property
    def weights(self) -> tuple[F64, F64, F64]:
        """a (kinds, warmths, depths), b and c (kinds, warmths): the same arrays as long as it lives."""
        return self._a, self._b, self._c

    def probabilities(self, kind: Ints, warm: Ints, depth: Ints, q: NDArray[np.floating], rank: Ints) -> F64:
        """Of nodes whose parents are true; all arrays of one shape."""
        x = np.clip(q, LOW, HIGH).astype(np.float64)
        z = self._a[kind, warm, np.minimum(depth, DEPTHS) - 1]
        z = z + self._b[kind, warm] * np.log(x / (1 - x)) + self._c[kind, warm] * (rank > 0)
        return np.asarray(np.clip(1 / (1 + np.exp(-z)), LOW, HIGH))

    def judge(self, forest: Forest, warm_n: Ints) -> None:
        """Fill in ``forest.f``; ``warm_n`` is each row's."""
        n, C = forest.shape
        wide = np.broadcast_to(warm_n[:, None], (n, C))
        p: F32 = self.probabilities(forest.source, wide, forest.depth, forest.q, forest.rank).astype(np.float32)
        if forest.rank.any():
            _share(forest, p)
        forest.multiply(p)

    def observe(self, seen: Sequence[Observation]) -> None:
        """What came of nodes whose parents were true."""
        self._seen.extend(seen)
        if len(self._seen) >= BATCH:
            self._learn()

    def _learn(self) -> None:
        kinds, warms, depths, qs, ranks, trues = (np.array(column) for column in zip(*self._seen, strict=True))
        self._seen.clear()
        error = self.probabilities(kinds, warms, depths, qs, ranks) - trues
        x = np.clip(qs, LOW, HIGH)
        places = (warms,), (kinds, warms), (kinds, warms, np.minimum(depths, DEPTHS) - 1)
        for part, seen, at in zip(self._parts, self._seen_by, places, strict=True):
            np.add.at(seen, at, 1)
            # A step of 4 error / n is that of the mean where p is about a half; the parts share it.
            np.subtract.at(part, at, error * np.maximum(LEAST, 1 / (1 + seen[at])))
        at = kinds, warms
        step = np.maximum(LEAST / 2, 0.5 / (2 + self._seen_by[1][at]))
        np.subtract.at(self._b, at, error * np.log(x / (1 - x)) * step)
        np.subtract.at(self._c, at, error * (ranks > 0) * step)
        np.clip(self._b, 0.05, 4.0, out=self._b)
        self._add()

    def _add(self) -> None:
        """``a`` of its parts."""
        common, own, deep = self._parts
        np.add(common[:, None] + own[:, :, None], deep, out=self._a)


def _share(forest: Forest, p: F32) -> None:
    """Siblings' probabilities so that they are together no more than one alone may be."""
    n, C = forest.shape
    family = forest.parent + np.int64(1) + np.arange(n, dtype=np.int64)[:, None] * (C + 1)
    used = forest.depth > 0
    total = np.bincount(family[used], p[used], minlength=n * (C + 1))
    np.multiply(p, HIGH / np.maximum(total[family], HIGH), out=p, casting="same_kind")
