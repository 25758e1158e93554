"""Which drafted tokens a step verifies where sequences have objectives for the time between their tokens (AdaServe,
EuroSys'26, arXiv 2501.12162, §4).

A sequence that has run for l seconds since its first token, has o tokens after it and is promised t seconds a token is
in time at the end of a step of s seconds if the step brings it

    A = (l + s) / t - o        tokens (need)

A tree brings 1 + sum of f over its nodes in expectation: the root's row always gives a token.

    optimal   the paper's algorithm 1: everybody's need first, with as few nodes as it takes, then the likeliest of all
    Paper     its algorithm 2: needs capped by what is possible, of sequences in the order of their need
    Slack     ours: the likeliest of all by weight: a token counts less for who is in time without it

Shapes: n sequences with a tree, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tenon.engine.policies.forest import F32, Bool, Forest
from tenon.engine.policies.speculate import BUDGET, F64, Load, likeliest

I64 = NDArray[np.int64]

LARGEST: Final = 1.2
"""Of one sequence's tree in the first phase, over an even share of the budget (the paper's artifact)."""
DEEPEST, SHALLOWEST, WIDEST, DRAFT_ROWS = 8, 4, 3, 96
"""Of the paper's trees, and rows of a step of its draft model (its artifact's settings for Llama)."""


@dataclass(frozen=True)
class Claims:
    """What the forest's sequences are promised, and where they stand. All (n,).

    ``since_s``: since their first tokens; ``tokens``: after these; ``tpot_s``: what a token may take in the mean,
    infinite where nothing is promised; ``weight``: of their classes.
    """

    since_s: F64
    tokens: F64
    tpot_s: F64
    weight: F64

    def need(self, step_s: float) -> F64:
        """Tokens that a step of so many seconds has to bring each: none or fewer where somebody is ahead."""
        return (self.since_s + step_s) / self.tpot_s - self.tokens


def optimal(f: F32, need: F64, budget: int) -> Bool | None:
    """AdaServe's algorithm 1: of all sets of nodes that hold each one's parent, are at most ``budget`` - n (roots are
    rows too), and bring everybody what he needs, the one with most expected tokens. None where there is none."""
    n = len(f)
    found = _first_needs(f, need, budget - n, f.shape[1], np.arange(n))
    if found is None:
        return None
    mask, short = found
    return None if short.any() else _fill(mask, f, budget - n)


def _first_needs(f: F32, need: F64, left: int, largest: int, order: NDArray[np.integer]) -> tuple[Bool, Bool] | None:
    """Of each row, in ``order``, its likeliest nodes until it has what it needs or ``largest`` of them, ``left`` in
    all. Also (n,) who has too little. None where ``left`` is below 0."""
    if left < 0:
        return None
    by_f = np.argsort(-f, axis=1, kind="stable")
    ordered = np.take_along_axis(f, by_f, axis=1).astype(np.float64)
    before = 1 + np.cumsum(ordered, axis=1) - ordered
    wanted = (before < need[:, None]) & (ordered > 0)
    wanted[:, largest:] = False
    k = wanted.sum(axis=1)
    ends = np.cumsum(k[order])
    granted = np.empty_like(k)
    granted[order] = np.clip(left - (ends - k[order]), 0, k[order])
    taken = np.arange(f.shape[1]) < granted[:, None]
    mask = np.zeros(f.shape, np.bool_)
    np.put_along_axis(mask, by_f, taken, axis=1)
    return mask, 1 + (ordered * taken).sum(axis=1) < need


def _fill(mask: Bool, f: F32, most: int) -> Bool:
    """``mask`` and the likeliest of the others, ``most`` in all."""
    left = most - int(np.count_nonzero(mask))
    mask.ravel()[likeliest(np.where(mask, 0, f))[: max(0, left)]] = True
    return mask


@dataclass(frozen=True)
class Paper:
    """Algorithm 2: ``budget`` rows in all, roots among them. The first phase follows sequences by descending need
    (``ascending``: its engine's order), caps each need by the depth of the trees, and gives none more than ``LARGEST``
    times an even share, which the paper leaves open and without which one late sequence takes everything."""

    budget: int = BUDGET
    ascending: bool = False

    @property
    def weighs(self) -> bool:
        return False

    def drafts(self, n: int) -> tuple[int, int]:
        """The paper's equations 8 and 9, with both constants 0."""
        depth = min(max(self.budget // n - 1, SHALLOWEST), DEEPEST)
        return depth, min(max(DRAFT_ROWS // n, 1), WIDEST)

    def choose(self, forest: Forest, load: Load) -> Bool:
        most = min(load.most, max(0, self.budget - load.n))
        f, n = forest.f, len(forest.f)
        mask = np.zeros(forest.shape, np.bool_)
        if load.claims is not None:
            step_s = float(load.seconds.mixed(load.n, np.array([load.n + most]), load.prompt_rows)[0])
            need = np.minimum(load.claims.need(step_s), forest.depth.max(axis=1, initial=0) + 1)
            order = np.argsort(need if self.ascending else -need, kind="stable")
            largest = int(LARGEST * self.budget / load.n)
            found = _first_needs(f, need, most, largest, order)
            mask = found[0] if found is not None and n else mask
        return _fill(mask, f, most)


EARLY: Final = 0.3
"""What a token counts of one that is in time without any in this step, over one for who is not."""
SMOOTH: Final = 0.5
"""Tokens of need over which the one becomes the other."""
HORIZON: Final = 48
"""Tokens within which somebody late could still make up for it; who could not is a lost cause, and counts as early."""
LIKELY_ROWS: Final = 4
"""Of ``Slack``: no tree has more nodes than so many even shares of what the step has room for."""
STAY: Final = 0.03
"""By how much another budget has to be better than the last one."""


class Slack:
    """Ours: each node's f times what a token counts for its sequence, the best of all first, and as many of them as
    bring the most of that a second.

    With s the slack of a sequence, in tokens, and a penalty that falls with it, a step's gain in penalty per second is
    sum over sequences of weight x (tokens / step's seconds - 1 / tpot), whose last term no choice changes: so what is
    promised decides how tokens are weighed, and the rest is the most weighted tokens a second.
    """

    def __init__(self) -> None:
        self._last_s = 0.0
        """What the last step was thought to take."""

    @property
    def weighs(self) -> bool:
        return True

    def drafts(self, n: int) -> None:
        """As much as pays."""

    def choose(self, forest: Forest, load: Load) -> Bool | None:
        f, n = forest.f, load.n
        seconds = load.seconds
        plain_s = float(seconds.mixed(n, np.array([n]), load.prompt_rows)[0])
        weight_n = self._weights(load, len(f), plain_s)
        worth = (f * weight_n[:, None]).astype(np.float32)
        order = likeliest(worth)[: load.most]
        if not len(order):
            return None
        rest = (load.n - len(weight_n)) * 1.0 + float(weight_n.sum())
        gained = rest + np.cumsum(worth.ravel()[order], dtype=np.float64)
        taken_s = seconds.mixed(n, n + np.arange(1, len(order) + 1), load.prompt_rows)
        rate = gained / taken_s
        best = int(np.argmax(rate))
        if rate[best] * plain_s < rest * (1 + load.margin):
            self._last_s = plain_s
            return None
        self._last_s = float(taken_s[best])
        mask = np.zeros(forest.shape, np.bool_)
        mask.ravel()[order[: best + 1]] = True
        return mask

    def _weights(self, load: Load, n: int, plain_s: float) -> F64:
        """(n,) what a token of each counts."""
        claims = load.claims
        if claims is None:
            return np.ones(n)
        step_s = max(self._last_s, plain_s)
        need = claims.need(step_s)
        late = 1 / (1 + np.exp(-np.clip(need / SMOOTH, -30, 30)))
        return claims.weight * (EARLY + (1 - EARLY) * late)
