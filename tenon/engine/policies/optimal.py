"""What a policy could save that knows the future: bounds to hold the others to, offline only.

``Belady`` evicts what is used again last, which is optimal for the number of hits where all blocks cost the same.
``BeladyCost`` weighs in what a block costs; it is a heuristic. ``optimum`` is exact, by dynamic programming over all
contents of a cache, for instances that are small enough to look at by hand.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

from tenon.engine.policies.evict import Cached, Heap, Quiet
from tenon.engine.policies.recency import Random

Future = Mapping[bytes, Sequence[float]]
"""Of each key the times of its uses, ascending."""
NEVER = float("inf")


class _Seer(Quiet):
    """Knows when a key is used next."""

    def __init__(self, future: Future) -> None:
        self._future = future
        self._at: dict[bytes, int] = {}

    def next_s(self, key: bytes, now_s: float) -> float:
        """The next use after now."""
        times, at = self._future.get(key, ()), self._at.get(key, 0)
        while at < len(times) and times[at] <= now_s:
            at += 1
        self._at[key] = at
        return times[at] if at < len(times) else NEVER


class Belady(_Seer):
    """The block whose next use is furthest away; of equals the one idle for longest (Belady 1966)."""

    def __init__(self, future: Future) -> None:
        super().__init__(future)
        self._heap = Heap()
        self._next: dict[int, float] = {}

    def idle(self, entry: Cached, now_s: float) -> None:
        self._next[entry.block] = self.next_s(entry.key, now_s)
        self._heap.push(entry, -self._next[entry.block])

    def busy(self, entry: Cached) -> None:
        self._heap.discard(entry)

    def victim(self, now_s: float) -> Cached:
        return self._heap.first()[1]

    def evicted(self, entry: Cached, now_s: float) -> None:
        self._heap.discard(entry)

    def score(self, entry: Cached, now_s: float) -> float:
        """Less the time of its next use."""
        return -self._next[entry.block]

    def __len__(self) -> int:
        return len(self._heap)


class BeladyCost(Random):
    """The least cost per second until the next use, among ``SAMPLE`` idle blocks drawn at random: the order changes
    with time, so no heap holds it."""

    SAMPLE = 64

    def __init__(self, future: Future) -> None:
        super().__init__()
        self._seer = _Seer(future)
        self._next: dict[int, float] = {}
        self._draw = random.Random(2)  # noqa: S311  nothing here is a secret

    def idle(self, entry: Cached, now_s: float) -> None:
        super().idle(entry, now_s)
        self._next[entry.block] = self._seer.next_s(entry.key, now_s)

    def victim(self, now_s: float) -> Cached:
        if self._drawn is None and self._entries:
            entries = self._entries
            drawn = [entries[int(self._draw.random() * len(entries))] for _ in range(self.SAMPLE)]
            self._drawn = min(drawn, key=lambda entry: self.score(entry, now_s))
        return super().victim(now_s)

    def score(self, entry: Cached, now_s: float) -> float:
        """Cost over the time until it is saved; nothing for what is never used again."""
        return entry.cost / max(self._next[entry.block] - now_s, 1e-9)


def optimum(requests: Sequence[Sequence[Hashable]], costs: Mapping[Hashable, float], n_blocks: int) -> float:
    """The most that any policy can save: of each request's blocks those in the cache need not be computed; after it,
    the cache holds its blocks (all of them at once, at most ``n_blocks``) and any choice of what it held before.

    Exact, exponential in the number of distinct blocks. Raises ``ValueError`` for a request that is larger than the
    cache.
    """
    best: dict[frozenset[Hashable], float] = {frozenset(): 0.0}
    for request in requests:
        asked = frozenset(request)
        if len(asked) > n_blocks:
            raise ValueError(f"a request has {len(asked)} blocks and the cache {n_blocks}")
        after: dict[frozenset[Hashable], float] = {}
        for held, saved in best.items():
            gained = saved + sum(costs[block] for block in held & asked)
            rest = sorted(held - asked, key=repr)
            for kept in combinations(rest, min(len(rest), n_blocks - len(asked))):
                content = asked.union(kept)
                after[content] = max(after.get(content, 0.0), gained)
        best = after
    return max(best.values())
