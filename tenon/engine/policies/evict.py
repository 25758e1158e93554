"""Which resident block to give up when the pool is full: what a policy sees, and what it has to answer.

A policy sees published blocks as :class:`Cached`: stored, taken over, idle, busy. Only idle ones, held by nobody, may
be evicted. It knows neither clock nor pool: whoever drives it says what time it is. The policies themselves stand in
``recency``, ``latency``, ``asymcache``, ``worth`` and ``tuned``; ``POLICIES`` in ``table`` names them for a config.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True, eq=False)
class Cached:
    """A published block, as policies know it. Times are seconds of the engine's clock, positions are tokens."""

    block: int
    """Its number in the pool."""
    key: bytes
    position: int
    """Where it begins in its context."""
    cost: float
    """What computing it once more takes: seconds, or FLOPs where no device is known. Grows with the position."""
    turn: int = 1
    """Of its conversation when it was last used: 1 for a context that continues none."""
    n_uses: int = 1
    """Requests that computed it or took it over, before its last eviction too as long as a shadow remembers."""
    last_s: float = 0.0
    """When its last holder let go of it; when it was stored, until then."""
    length: int = 0
    """Tokens of the context in which it was last used."""
    away_s: float = -1.0
    """Of a block stored anew: how long it had not been used then; negative for what nobody remembers."""
    away_turn: int = 1
    """Of a block stored anew: the turn of its use before that."""
    evicted_s: float = -1.0
    """Of a shadow: when it was evicted."""
    parent: Cached | None = None
    child: Cached | None = None
    """The resident blocks before and after it; of several that follow it the one stored last."""


class Evict(Protocol):
    """Lower ``score`` goes first. Methods are O(log n) unless they say otherwise."""

    def stored(self, entry: Cached, now_s: float) -> None:
        """Published, for the first time or anew; held still."""
        ...

    def used(self, entry: Cached, now_s: float) -> None:
        """A request takes it over, idle or held by others. If it was idle, ``busy`` follows and ``last_s`` is still
        that of the use before; if it was held, ``last_s`` is older than its last use."""
        ...

    def idle(self, entry: Cached, now_s: float) -> None:
        """The last holder let go of it; it may be evicted from now on."""
        ...

    def busy(self, entry: Cached) -> None:
        """An idle block is held again. Raises ``KeyError`` if it was not idle."""
        ...

    def victim(self, now_s: float) -> Cached:
        """The idle block to evict next; it stays idle. Raises ``LookupError`` if there is none."""
        ...

    def evicted(self, entry: Cached, now_s: float) -> None:
        """The pool gives the victim's place away: it is idle no longer."""
        ...

    def score(self, entry: Cached, now_s: float) -> float:
        """How much an idle block is worth keeping, in the policy's own unit."""
        ...

    def __len__(self) -> int:
        """Number of idle blocks."""
        ...


class Quiet:
    """What policies that learn nothing from uses have in common."""

    def stored(self, entry: Cached, now_s: float) -> None:
        """Nothing to learn."""

    def used(self, entry: Cached, now_s: float) -> None:
        """Nothing to learn."""


def nothing_idle() -> LookupError:
    """For ``victim`` to raise."""
    return LookupError("no idle block")


class Heap:
    """Entries by key, least first. Whoever is removed stays in the array until it comes up, or until most of it is
    such: then it is made anew, so that an operation is O(log n) on average. ``n_moves`` counts array entries touched.
    """

    def __init__(self) -> None:
        self._items: list[tuple[float, int, Cached]] = []
        self._live: dict[int, int] = {}
        self._order = 0
        self.n_moves = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, entry: Cached) -> bool:
        return entry.block in self._live

    def push(self, entry: Cached, key: float) -> None:
        """Put in, or under another key. Equal keys come out in the order of their pushes."""
        self._order += 1
        self._live[entry.block] = self._order
        heapq.heappush(self._items, (key, self._order, entry))
        self.n_moves += len(self._items).bit_length()
        if len(self._items) > 2 * len(self._live) + 64:
            self._items = [item for item in self._items if self._live.get(item[2].block) == item[1]]
            heapq.heapify(self._items)
            self.n_moves += len(self._items)

    def refill(self, entries: Iterable[tuple[Cached, float]]) -> None:
        """Hold these under these keys and nothing else; of equal keys the first comes out first. O(n)."""
        self._items = [(key, order, entry) for order, (entry, key) in enumerate(entries, self._order + 1)]
        self._order += len(self._items)
        self._live = {entry.block: order for _, order, entry in self._items}
        heapq.heapify(self._items)
        self.n_moves += len(self._items)

    def discard(self, entry: Cached) -> None:
        """Take out. Raises ``KeyError`` if it is not in."""
        del self._live[entry.block]

    def first(self) -> tuple[float, Cached]:
        """The least key and its entry, which stays. Raises ``LookupError``."""
        items, live = self._items, self._live
        while items:
            key, order, entry = items[0]
            if live.get(entry.block) == order:
                return key, entry
            heapq.heappop(items)
            self.n_moves += len(items).bit_length()
        raise nothing_idle()

    def entries(self) -> list[Cached]:
        """All that are in, in no order. O(n)."""
        return [entry for _, order, entry in self._items if self._live.get(entry.block) == order]
