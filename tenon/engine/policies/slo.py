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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tenon.engine.policies.forest import F32, Bool, Forest
from tenon.engine.policies.speculate import BUDGET, F64, Alike, Load, likeliest

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


def patience(claims: Claims | None, brought: float, seconds_of: Callable[[int], float], least: int, most: int) -> int:
    """Rows of prompts that a step may compute beside decodes: as many as leave those who are in time in time, when the
    step brings each of them so many tokens; ``least`` where somebody is late who might still make up for it, and never
    fewer; but all where ``MANY`` are late. ``seconds_of`` a step with so many rows of prompts.

    A prompt's rows take about what they take in whichever step, so more steps cost little but the prompt's own wait,
    while a long step cannot be made up for by a sequence that has few tokens left. Where there is too much to do little
    is too much.
    """
    if claims is None or least >= most:
        return most
    due_s = claims.tpot_s * (claims.tokens + brought)
    at_s, promised = claims.since_s + seconds_of(0), np.isfinite(due_s)
    could_be = promised & (at_s <= LOST * due_s)
    if not could_be.any() or np.count_nonzero(promised & (at_s > due_s)) > MANY * np.count_nonzero(promised):
        return most
    most_s = float((due_s - claims.since_s)[could_be].min())
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        if seconds_of(middle) <= most_s:
            low = middle
        else:
            high = middle - 1
    return low


def optimal(f: F32, need: F64, budget: int) -> Bool | None:
    """AdaServe's algorithm 1: of all sets of nodes that hold each one's parent, are at most ``budget`` - n (roots are
    rows too), and bring everybody what he needs, the one with most expected tokens. None where there is none."""
    n, left = len(f), budget - len(f)
    if left < 0:
        return None
    order = likeliest(f)
    mask, short = _first_needs(f, order, need, left, f.shape[1], np.arange(n))
    return None if short.any() else _fill(mask, order, left)


def _first_needs(
    f: F32, order: I64, need: F64, left: int, largest: int, turns: NDArray[np.integer]
) -> tuple[Bool, Bool]:
    """Of each row, in ``turns``, its likeliest nodes until it has what it needs or ``largest`` of them, ``left`` in
    all. Also (n,) who has too little. ``order``: all nodes, the likeliest first."""
    n, C = f.shape
    by_row = order[np.argsort((order // C).astype(np.uint16), kind="stable")]
    row = by_row // C
    counts = np.bincount(row, minlength=n)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    ordered = np.zeros((n, C))
    ordered[row, place] = f.ravel()[by_row]
    before = 1 + np.cumsum(ordered, axis=1) - ordered
    wanted = (before < need[:, None]) & (ordered > 0)
    k = wanted[:, :largest].sum(axis=1)
    ends = np.cumsum(k[turns])
    granted = np.empty_like(k)
    granted[turns] = np.clip(left - (ends - k[turns]), 0, k[turns])
    mask = np.zeros(f.shape, np.bool_)
    mask.ravel()[by_row[place < granted[row]]] = True
    return mask, 1 + (ordered * (np.arange(C) < granted[:, None])).sum(axis=1) < need


def _fill(mask: Bool, order: I64, most: int) -> Bool:
    """``mask`` and the likeliest of the others, ``most`` in all."""
    left = most - int(np.count_nonzero(mask))
    others = order[~mask.ravel()[order]]
    mask.ravel()[others[: max(0, left)]] = True
    return mask


@dataclass(frozen=True)
class Paper(Alike):
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
        f, claims, order = forest.f, load.claims, likeliest(forest.f)
        if claims is None or not len(order):
            return _fill(np.zeros(forest.shape, np.bool_), order, most)
        step_s = load.spent_s + float(load.seconds.mixed(load.n, np.array([load.n + most]), load.prompt_rows)[0])
        need = np.minimum(claims.need(step_s), forest.depth.max(axis=1) + 1)
        turns = np.argsort(need if self.ascending else -need, kind="stable")
        mask, _ = _first_needs(f, order, need, most, int(LARGEST * self.budget / load.n), turns)
        return _fill(mask, order, most)


STEEP: Final = 3.0
"""What a token counts for its sequence is how late that is, to this power: lateness is the time since its first token
over what it was promised for as many, at the end of the step."""
LEAST: Final = 0.1
"""What it counts at least, however early that is."""
LOST: Final = 1.15
"""Who is later than this will not make up for it: its tokens count 1, as of who is just in time."""
MANY: Final = 0.1
"""Of those who are promised something."""
FEW: Final = 4
"""Tokens after the first; who has fewer is judged as if it had so many."""
RATE: Final = 0.05
"""Of the averages of what steps bring and take."""


class Slack:
    """Ours: each node's f times what a token counts for its sequence, the best of all first, and of these as many as
    are worth their rows' time.

    With a penalty that grows with lateness, what a step of T seconds does to all penalties is, in the first order, sum
    over sequences of weight x (T / tpot - tokens): a node is worth weight x f, and time costs what it usually brings,
    weighted tokens a second in the average of steps. (By its own best rate a step with good guesses would stop sooner,
    one with bad ones later.) Prompts' rows are left out of that: they are computed in one step or another.
    """

    def __init__(self) -> None:
        self._brought = self._taken_s = 0.0
        """By steps, in the average."""
        self._last_s = 0.0
        """What the last step was thought to take."""

    @property
    def weighs(self) -> bool:
        return True

    def drafts(self, n: int) -> None:
        """As much as pays."""

    def counts(self, load: Load, n: int) -> F64:
        prompts_s = float(load.seconds.prompts(np.array([load.n]), load.prompt_rows)[0])
        return _weights(load, n, max(self._last_s, load.spent_s + load.seconds.plain(load.n) + prompts_s))

    def choose(self, forest: Forest, load: Load) -> Bool | None:
        f, n, seconds = forest.f, load.n, load.seconds
        plain_s = load.spent_s + seconds.plain(n)
        prompts_s = float(seconds.prompts(np.array([n]), load.prompt_rows)[0])
        weight_n = self.counts(load, len(f))
        worth = (f * weight_n[:, None]).astype(np.float32)
        order = likeliest(worth)[: load.most]
        if not len(order):
            return None
        roots = float(weight_n.sum()) + load.n - len(weight_n)
        brought = roots + np.cumsum(worth.ravel()[order], dtype=np.float64)
        taken_s = load.spent_s + seconds.guessed(n, n + np.arange(1, len(order) + 1))
        price = self._brought / self._taken_s if self._taken_s else float((brought / taken_s).max())
        best = int(np.argmax(brought - price * taken_s))
        is_none = brought[best] * plain_s < roots * (1 + load.margin) * taken_s[best]
        self._learn(*((roots, plain_s) if is_none else (float(brought[best]), float(taken_s[best]))))
        self._last_s = prompts_s + (plain_s if is_none else float(taken_s[best]))
        if is_none:
            return None
        mask = np.zeros(forest.shape, np.bool_)
        mask.ravel()[order[: best + 1]] = True
        return mask

    def _learn(self, brought: float, taken_s: float) -> None:
        rate = RATE if self._taken_s else 1.0
        self._brought += rate * (brought - self._brought)
        self._taken_s += rate * (taken_s - self._taken_s)


def _weights(load: Load, n: int, step_s: float) -> F64:
    """(n,) what a token of each counts, if the step takes so long."""
    claims = load.claims
    if claims is None:
        return np.ones(n)
    late = (claims.since_s + step_s) / (np.maximum(claims.tokens, FEW) * claims.tpot_s)
    return claims.weight * np.where(late > LOST, 1.0, np.maximum(late**STEEP, LEAST))
