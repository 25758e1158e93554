"""What a prefix cache could reuse of a trace: previous accesses, reuse gaps, LRU hit ratios at every size at once.

Semantics: a request looks all its blocks up when it arrives and then touches them, the last one first, so that the
beginning of a prompt is what LRU keeps longest and what is cached of a prompt is always a beginning of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tenon.workloads.blocks import Blocks, Ints

# A beginning that a tenth of all requests share is no one's history: it says how prompts are built, not when people
# return.
COMMON_SHARE = 0.1
COMMON_AT_LEAST = 100


@dataclass(frozen=True)
class Reuse:
    """Of each access, in the order of :class:`Blocks`: the access before of the same block, -1 for the first."""

    blocks: Blocks
    before: Ints

    @property
    def ideal_hit_ratio(self) -> float:
        """Share of accesses to blocks that were there before: what an endless cache would hit."""
        return float(np.mean(self.before >= 0)) if len(self.before) else 0.0

    @cached_property
    def sorted_ranks(self) -> Ints:
        """:func:`lru_ranks`, ascending: what every hit ratio is read from."""
        return np.sort(lru_ranks(self))

    def uses(self) -> Ints:
        """Accesses of each distinct block."""
        return np.bincount(self.blocks.id, minlength=self.blocks.distinct).astype(np.int64)

    def once_share(self) -> float:
        """Share of distinct blocks that are used once."""
        uses = self.uses()
        return float(np.mean(uses == 1)) if len(uses) else 0.0

    def top_share(self, part: float = 0.1) -> float:
        """Share of all reuses that the most used ``part`` of the distinct blocks gets; 0 without reuse."""
        reuses = np.sort(self.uses() - 1)[::-1]
        total = int(reuses.sum())
        return float(reuses[: int(len(reuses) * part)].sum() / total) if total else 0.0

    def common(self) -> NDArray[np.bool_]:
        """Of each distinct block: do so many requests begin with it that it tells nothing about reuse times?"""
        n = len(self.blocks.start) - 1
        return self.uses() > max(COMMON_AT_LEAST, COMMON_SHARE * n)

    def parents(self) -> Ints:
        """Of each request: the last one before it that used its deepest block in reuse; -1 where only a common
        beginning is reused, or nothing.
        """
        n = len(self.blocks.start) - 1
        parent = np.full(n, -1, dtype=np.int64)
        if not len(self.before):
            return parent
        of = self.blocks.request_of()
        reused = np.flatnonzero((self.before >= 0) & ~self.common()[self.blocks.id])
        # Ascending accesses: a later one of the same request overwrites, so that the deepest stays.
        parent[of[reused]] = of[self.before[reused]]
        return parent

    def block_gaps(self, arrival_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds since the last use of each reused block that is not of a common beginning."""
        of = self.blocks.request_of()
        reused = (self.before >= 0) & ~self.common()[self.blocks.id]
        return arrival_s[of[reused]] - arrival_s[of[self.before[reused]]]


def find(blocks: Blocks) -> Reuse:
    """The previous access of each access."""
    order = np.argsort(blocks.id, kind="stable")
    before = np.full(len(order), -1, dtype=np.int64)
    same = blocks.id[order[1:]] == blocks.id[order[:-1]]
    before[order[1:][same]] = order[:-1][same]
    return Reuse(blocks, before)


def lru_ranks(reuse: Reuse) -> Ints:
    """Of each reuse: how many distinct blocks have been touched since the block was, when its request looks it up.

    A cache of C blocks under LRU holds exactly the blocks of rank < C (Mattson et al. 1970), so these ranks hold the
    hit ratio of every size.
    """
    start = reuse.blocks.start
    n = np.diff(start)
    of = reuse.blocks.request_of()
    # Touches in their order: within a request the last block first.
    place = 2 * start[of] + n[of] - 1 - np.arange(len(of))
    before = np.full(len(of), -1, dtype=np.int64)
    reused = np.flatnonzero(reuse.before >= 0)
    before[place[reused]] = place[reuse.before[reused]]
    # Distinct blocks in the touches (p, s) are those whose own previous touch is p or earlier. Among the touches below
    # s these are counted together with all p + 1 touches up to p.
    p, s = place[reuse.before[reused]], start[of[reused]]
    return _count_below(before, s, p) - (p + 1)


def lru_hit_ratios(reuse: Reuse, sizes: Sequence[int]) -> list[float]:
    """Share of accesses that LRU caches of so many *blocks* hit."""
    found = np.searchsorted(reuse.sorted_ranks, np.asarray(sizes), "left") / max(1, len(reuse.before))
    return [float(ratio) for ratio in found]


def _count_below(values: Ints, ends: Ints, at_most: Ints) -> Ints:
    """For each (end, x): how many of ``values[:end]`` are at most x. A tree of sorted runs, all queries at once."""
    out = np.zeros(len(ends), dtype=np.int64)
    level, width = 0, 1
    size = 1 << max(0, int(len(values) - 1).bit_length())
    big = len(values) + 2
    runs = np.concatenate([values, np.full(size - len(values), big - 2, dtype=np.int64)])
    while width <= len(values):
        rows = runs.reshape(-1, width)
        rows.sort(axis=1, kind="stable")
        flat = (rows + np.arange(len(rows))[:, None] * big).reshape(-1)
        asked = np.flatnonzero((ends >> level) & 1)
        run = (ends[asked] >> level) - 1
        out[asked] += np.searchsorted(flat, run * big + at_most[asked], "right") - run * width
        level, width = level + 1, width * 2
    return out
