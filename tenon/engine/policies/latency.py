"""Published policies that weigh what a block costs to compute again."""

from __future__ import annotations

import math
import random
from collections import OrderedDict

from tenon.engine.policies.evict import Cached, Heap, Quiet, nothing_idle
from tenon.engine.policies.recency import Random


class Gdsf(Quiet):
    """Greedy-Dual-Size-Frequency (Cherkasova 1998) with the recompute cost: clock + uses x cost, where the clock is the
    score of the block evicted last, so that what is not used is overtaken."""

    def __init__(self) -> None:
        self._heap = Heap()
        self._scores: dict[int, float] = {}
        self._clock = 0.0

    def idle(self, entry: Cached, now_s: float) -> None:
        score = self._scores[entry.block] = self._clock + entry.n_uses * entry.cost
        self._heap.push(entry, score)

    def busy(self, entry: Cached) -> None:
        self._heap.discard(entry)
        del self._scores[entry.block]

    def victim(self, now_s: float) -> Cached:
        return self._heap.first()[1]

    def evicted(self, entry: Cached, now_s: float) -> None:
        self._clock = self._scores[entry.block]
        self.busy(entry)

    def score(self, entry: Cached, now_s: float) -> float:
        return self._scores[entry.block]

    def __len__(self) -> int:
        return len(self._heap)


class _Lists:
    """Idle entries in lists by a small key, each in the order of their coming: the head is its oldest. O(1)."""

    def __init__(self) -> None:
        self.lists: dict[int, OrderedDict[int, Cached]] = {}
        self._key_of: dict[int, int] = {}

    def add(self, key: int, entry: Cached) -> None:
        self._key_of[entry.block] = key
        self.lists.setdefault(key, OrderedDict())[entry.block] = entry

    def remove(self, entry: Cached) -> None:
        """Raises ``KeyError`` if it is not in."""
        key = self._key_of.pop(entry.block)
        held = self.lists[key]
        del held[entry.block]
        if not held:
            del self.lists[key]

    def heads(self) -> list[Cached]:
        """The oldest of each list."""
        return [next(iter(held.values())) for held in self.lists.values()]

    def __len__(self) -> int:
        return len(self._key_of)

    def __contains__(self, entry: Cached) -> bool:
        return entry.block in self._key_of


class Pensieve(Quiet):
    """Pensieve (arXiv 2312.05516): recompute cost over idle time, so that beginnings of contexts go first.

    Of blocks that cost the same the one idle for longest has the least score, so only the oldest of each cost has to be
    looked at. Costs within ``RATIO`` of each other share a list.
    """

    RATIO = 1.02

    def __init__(self) -> None:
        self._idle = _Lists()

    def idle(self, entry: Cached, now_s: float) -> None:
        self._idle.add(round(math.log(entry.cost) / math.log(self.RATIO)), entry)

    def busy(self, entry: Cached) -> None:
        self._idle.remove(entry)

    def victim(self, now_s: float) -> Cached:
        return min(self._idle.heads(), key=lambda entry: self.score(entry, now_s), default=None) or _none()

    def evicted(self, entry: Cached, now_s: float) -> None:
        self._idle.remove(entry)

    def score(self, entry: Cached, now_s: float) -> float:
        """Cost per second of idleness."""
        return entry.cost / max(now_s - entry.last_s, 1e-6)

    def __len__(self) -> int:
        return len(self._idle)


def _none() -> Cached:
    raise nothing_idle()


class MaxScore:
    """The workload-aware policy of KVCache in the wild (ATC 2025), which AsymCache calls Max-score: the probability
    that a block is used again within the time that blocks live here, its class's reuse times being exponential; of
    equals, the one deeper in its context goes first.

    A class is a turn of a conversation. Its rate and its share of blocks that come back are running means.
    """

    CLASSES = 8
    WEIGHT = 1 / 256
    """Of a new observation in the means."""

    def __init__(self) -> None:
        self._idle = _Lists()
        self._mean_s = [60.0] * self.CLASSES
        self._share = [0.5] * self.CLASSES
        self._life_s = 60.0

    @classmethod
    def _class(cls, turn: int) -> int:
        return min(turn, cls.CLASSES) - 1

    def _returned(self, kind: int, age_s: float) -> None:
        self._mean_s[kind] += self.WEIGHT * (age_s - self._mean_s[kind])
        self._share[kind] += self.WEIGHT * (1.0 - self._share[kind])

    def stored(self, entry: Cached, now_s: float) -> None:
        if entry.away_s >= 0.0:
            self._returned(self._class(entry.away_turn), entry.away_s)

    def used(self, entry: Cached, now_s: float) -> None:
        if entry in self._idle:
            self._returned(self._class(entry.turn), now_s - entry.last_s)

    def idle(self, entry: Cached, now_s: float) -> None:
        self._idle.add(self._class(entry.turn), entry)

    def busy(self, entry: Cached) -> None:
        self._idle.remove(entry)

    def victim(self, now_s: float) -> Cached:
        return min(self._idle.heads(), key=lambda entry: self.score(entry, now_s), default=None) or _none()

    def evicted(self, entry: Cached, now_s: float) -> None:
        self._idle.remove(entry)
        self._life_s += self.WEIGHT * (now_s - entry.last_s - self._life_s)
        kind = self._class(entry.turn)
        self._share[kind] += self.WEIGHT * (0.0 - self._share[kind])

    def score(self, entry: Cached, now_s: float) -> float:
        """Probability of another use within a lifetime."""
        kind = self._class(entry.turn)
        mean_s, age_s = max(self._mean_s[kind], 1e-3), now_s - entry.last_s
        return self._share[kind] * math.exp(-age_s / mean_s) * -math.expm1(-max(self._life_s, 1e-3) / mean_s)

    def __len__(self) -> int:
        return len(self._idle)


class RandomCompute(Random):
    """Partial-node RandomCompute (arXiv 2609.28870): a random block, cheap ones sooner, and from there on the rest of
    its context, block by block, until that ends or the demand does: few and long holes.
    """

    TRIES = 8
    """Draws at most; a draw stands with the ratio of the least cost ever seen to its own."""

    def __init__(self) -> None:
        super().__init__()
        self._least = math.inf
        self._next: Cached | None = None
        self._choice = random.Random(1)  # noqa: S311  nothing here is a secret

    def idle(self, entry: Cached, now_s: float) -> None:
        super().idle(entry, now_s)
        self._least = min(self._least, entry.cost)

    def victim(self, now_s: float) -> Cached:
        follower = self._next
        if follower is not None:
            place = self._place.get(follower.block)
            if place is not None and self._entries[place] is follower:
                return follower
        self._next = None
        if self._drawn is None and self._entries:
            for _ in range(self.TRIES):
                self._drawn = self._choice.choice(self._entries)
                if self._choice.random() < self._least / self._drawn.cost:
                    break
        return super().victim(now_s)

    def evicted(self, entry: Cached, now_s: float) -> None:
        super().evicted(entry, now_s)
        self._next = entry.child
