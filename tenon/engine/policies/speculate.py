"""Which drafted tokens a step verifies: one budget of rows for all sequences (AdaServe, arXiv 2501.12162, §4).

    Pays          ours: as many of the likeliest nodes of all trees as bring the most tokens a second, none where that
                  is less than without
    Throughput    the likeliest nodes of all trees up to a fixed budget (AdaServe's throughput phase)
    EqualSplit    the budget divided evenly over sequences, each the likeliest of its own
    FixedTree     the same number of nodes for each, whatever the load (EAGLE-2, arXiv 2406.16858)
    Chain         the k first tokens of each one's likeliest chain, as most engines do
    ByBatch       a chain whose k falls with the batch, by a table
    PerSecond     chains, as many of the likeliest tokens of all as bring the most tokens a second

A policy is pure: it sees what was drafted (:class:`Forest`, judged), how many sequences decode, and how long steps take
(:class:`Seconds`). Whatever it chooses, what is emitted stays the same.

Shapes: n sequences with a tree, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from tenon.engine.policies.forest import Bool, Forest

if TYPE_CHECKING:
    from tenon.engine.policies.slo import Claims

F64 = NDArray[np.float64]

BUDGET: Final = 256
"""Rows in all of a step, of those whose budget is fixed."""
MARGIN: Final = 0.2
"""By how much a step with guesses has to be better than one without: a prediction's error should not decide ..."""
BOLD: Final = 0.1
BOLD_TREES: Final = 64
"""... but at first, until so many trees have been seen at such temperatures, it may be this much worse, for what is
learned from it."""
TREE: Final = (6, 3)
"""Of rules that take the likeliest nodes of whatever trees there are (AdaServe's settings: 4 to 8 deep, 3 wide)."""
BATCHES: Final = ((1, 8), (4, 6), (8, 4), (16, 3), (32, 2), (64, 1))
"""Of ``ByBatch``: up to so many sequences, chains of so many tokens; none beyond."""


class Seconds(Protocol):
    """How long steps take, all that belongs to them included but for the levels of a draft model."""

    def plain(self, rows: int) -> float:
        """Of a step that computes the newest token of ``rows`` sequences."""
        ...

    def guessed(self, n: int, rows: NDArray[np.int64]) -> F64:
        """Of steps of ``n`` sequences with guesses that have so many rows in all; never falls, and is never less than
        without guesses."""
        ...

    def mixed(self, n: int, rows: NDArray[np.int64], prompt_rows: int) -> F64:
        """``guessed``, of steps that compute so many rows of prompts besides."""
        ...

    def prompts(self, rows: NDArray[np.int64], prompt_rows: int) -> F64:
        """What so many rows of prompts add to steps of so many others."""
        ...


def usual_s(seconds: Seconds, n: int, rows: int, prompt_rows: int) -> float:
    """Of a step of ``n`` sequences and so many rows of theirs, with guesses where these are more, and of prompts."""
    at = np.array([max(n, rows)])
    decodes_s = seconds.plain(n) if rows <= n else float(seconds.guessed(n, at)[0])
    return decodes_s + float(seconds.prompts(at, prompt_rows)[0])


@dataclass(frozen=True)
class Load:
    """``n`` sequences decode, with or without a tree; ``most`` nodes fit into the step."""

    n: int
    most: int
    seconds: Seconds
    margin: float = MARGIN
    """By how much a step with guesses has to be better than one without, for policies that weigh."""
    claims: Claims | None = None
    """What the forest's sequences are promised; None where nobody is promised anything."""
    prompt_rows: int = 0
    """That the step is going to compute besides."""
    spent_s: float = 0.0
    """What the step has taken already, whatever is chosen: a draft model's levels."""


def margin(n_trees: int) -> float:
    """``Load.margin``, when so many trees were seen that are like these."""
    return MARGIN - (MARGIN + BOLD) * max(0.0, 1 - n_trees / BOLD_TREES)


class Speculate(Protocol):
    """Decides what is verified."""

    @property
    def weighs(self) -> bool:
        """Whether it goes by how long steps take, and so has to see both kinds now and then."""
        ...

    def drafts(self, n: int) -> tuple[int, int] | None:
        """Depth and width of the trees that it wants of a draft model where ``n`` sequences decode; None for as much as
        pays, whatever their number."""
        ...

    def counts(self, load: Load, n: int) -> F64:
        """(n,) what a token of each sequence that is to have a tree counts."""
        ...

    def choose(self, forest: Forest, load: Load) -> Bool | None:
        """(n, C) the nodes to verify: of each its parent too, at most ``load.most``. None: none of them."""
        ...


def likeliest(f: NDArray[np.float32]) -> NDArray[np.int64]:
    """Places in the flat forest, the likeliest first, of equals the earlier: any beginning of it is closed under
    parents, for a node is never likelier than its parent, and stands after it."""
    flat = f.ravel()
    order = np.argsort(-flat, kind="stable")
    return order[: int(np.count_nonzero(flat > 0))]


def _mask(forest: Forest, places: NDArray[np.int64]) -> Bool:
    chosen = np.zeros(forest.shape, np.bool_)
    chosen.ravel()[places] = True
    return chosen


def _first(on: Bool, f: NDArray[np.float32], most: int) -> Bool:
    """At most ``most`` of the nodes that are ``on``, the likeliest."""
    if int(np.count_nonzero(on)) <= most:
        return on
    order = likeliest(np.where(on, f, 0))[:most]
    chosen = np.zeros(on.shape, np.bool_)
    chosen.ravel()[order] = True
    return chosen


class Alike:
    """A rule to which a token is a token."""

    def counts(self, load: Load, n: int) -> F64:
        return np.ones(n)


class _Fixed(Alike):
    """A rule that asks no clock."""

    @property
    def weighs(self) -> bool:
        return False

    def drafts(self, n: int) -> tuple[int, int] | None:
        return TREE


@dataclass(frozen=True)
class Throughput(_Fixed):
    """``budget`` rows in all, roots among them."""

    budget: int = BUDGET

    def choose(self, forest: Forest, load: Load) -> Bool:
        n_nodes = min(load.most, max(0, self.budget - load.n))
        return _mask(forest, likeliest(forest.f)[:n_nodes])


@dataclass(frozen=True)
class EqualSplit(_Fixed):
    budget: int = BUDGET

    def choose(self, forest: Forest, load: Load) -> Bool:
        each = max(0, self.budget // load.n - 1)
        return _first(_each(forest, each), forest.f, load.most)


@dataclass(frozen=True)
class FixedTree(_Fixed):
    nodes: int = 16

    def choose(self, forest: Forest, load: Load) -> Bool:
        return _first(_each(forest, self.nodes), forest.f, load.most)


def _each(forest: Forest, n_nodes: int) -> Bool:
    """Each row's likeliest nodes."""
    order = np.argsort(-forest.f, axis=1, kind="stable")[:, :n_nodes]
    chosen = np.zeros(forest.shape, np.bool_)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen & (forest.f > 0)


@dataclass(frozen=True)
class Chain(_Fixed):
    k: int

    def drafts(self, n: int) -> tuple[int, int] | None:
        return self.k, 1

    def choose(self, forest: Forest, load: Load) -> Bool:
        return _first(forest.spine() & (forest.depth <= self.k) & (forest.f > 0), forest.f, load.most)


class ByBatch(_Fixed):
    def drafts(self, n: int) -> tuple[int, int] | None:
        return BATCHES[0][1], 1

    def choose(self, forest: Forest, load: Load) -> Bool:
        k = next((k for n, k in BATCHES if load.n <= n), 0)
        return Chain(k).choose(forest, load)


class Pays(Alike):
    """Of all budgets the one with the most expected tokens a second; the nodes are the likeliest of all trees."""

    def __init__(self, *, chains: bool = False) -> None:
        self._chains = chains

    @property
    def weighs(self) -> bool:
        return True

    def drafts(self, n: int) -> tuple[int, int] | None:
        return None

    def choose(self, forest: Forest, load: Load) -> Bool | None:
        f = np.where(forest.spine(), forest.f, 0) if self._chains else forest.f
        order = likeliest(f)[: load.most]
        if not len(order):
            return None
        gained = load.n + np.cumsum(f.ravel()[order], dtype=np.float64)
        rate = gained / (load.spent_s + load.seconds.guessed(load.n, load.n + np.arange(1, len(order) + 1)))
        best = int(np.argmax(rate))
        if rate[best] * (load.spent_s + load.seconds.plain(load.n)) < load.n * (1 + load.margin):
            return None
        return _mask(forest, order[: best + 1])
