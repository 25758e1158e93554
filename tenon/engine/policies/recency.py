"""Policies that look at when and how often a block was used, and at nothing else; and one that looks at nothing.

What most engines do (LRU), what their users asked for (LFU, ARC, S3-FIFO), and what our own have to beat.
"""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque

from tenon.engine.policies.evict import Cached, Heap, Quiet, nothing_idle


class Lru(Quiet):
    """The block idle for longest. A sequence lets go of its last block first, so prefixes outlive suffixes (vLLM)."""

    def __init__(self) -> None:
        self._idle: OrderedDict[int, Cached] = OrderedDict()

    def idle(self, entry: Cached, now_s: float) -> None:
        self._idle[entry.block] = entry

    def busy(self, entry: Cached) -> None:
        del self._idle[entry.block]

    def victim(self, now_s: float) -> Cached:
        if not self._idle:
            raise nothing_idle()
        return next(iter(self._idle.values()))

    def evicted(self, entry: Cached, now_s: float) -> None:
        self.busy(entry)

    def score(self, entry: Cached, now_s: float) -> float:
        """Its last use."""
        return entry.last_s

    def __len__(self) -> int:
        return len(self._idle)

    def __contains__(self, entry: Cached) -> bool:
        return entry.block in self._idle


class TailLru(Quiet):
    """T-LRU (arXiv 2510.15152): first the tails that a next turn can compute anew within its TTFT budget, then LRU.

    ``budget_tokens``: what a prefill may compute within the budget; a block is in the tail if it begins so few tokens
    or fewer before the end of its context.
    """

    def __init__(self, budget_tokens: int = 1024) -> None:
        self.budget_tokens = budget_tokens
        self._tails, self._rest = Lru(), Lru()

    def _list(self, entry: Cached) -> Lru:
        return self._tails if entry.length - entry.position <= self.budget_tokens else self._rest

    def idle(self, entry: Cached, now_s: float) -> None:
        self._list(entry).idle(entry, now_s)

    def busy(self, entry: Cached) -> None:
        self._list(entry).busy(entry)

    def victim(self, now_s: float) -> Cached:
        return (self._tails if len(self._tails) else self._rest).victim(now_s)

    def evicted(self, entry: Cached, now_s: float) -> None:
        self.busy(entry)

    def score(self, entry: Cached, now_s: float) -> float:
        """Its last use; tails come before all others."""
        return entry.last_s - (1e12 if self._list(entry) is self._tails else 0.0)

    def __len__(self) -> int:
        return len(self._tails) + len(self._rest)


class Lfu(Quiet):
    """The block used least often, of those the one idle for longest."""

    def __init__(self) -> None:
        self._heap = Heap()

    def idle(self, entry: Cached, now_s: float) -> None:
        self._heap.push(entry, float(entry.n_uses))

    def busy(self, entry: Cached) -> None:
        self._heap.discard(entry)

    def victim(self, now_s: float) -> Cached:
        return self._heap.first()[1]

    def evicted(self, entry: Cached, now_s: float) -> None:
        self._heap.discard(entry)

    def score(self, entry: Cached, now_s: float) -> float:
        """Its uses."""
        return float(entry.n_uses)

    def __len__(self) -> int:
        return len(self._heap)


class S3Fifo:
    """S3-FIFO (SOSP 2023): a small queue for newcomers, a main one for those used again, a ghost queue of keys.

    Blocks keep their place in a queue while they are held; a queue's head that is held leaves it and comes back at the
    tail of the main one. Uses of held blocks count too. ``capacity``: blocks of the pool. A block whose storing it was
    not told of, since another policy ruled then, is a newcomer.
    """

    SMALL_SHARE = 0.1
    MOST = 3
    """Uses beyond these are not counted."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._small: deque[Cached] = deque()
        self._main: deque[Cached] = deque()
        self._queue_of: dict[int, deque[Cached]] = {}
        self._uses: defaultdict[int, int] = defaultdict(int)
        self._proven: set[int] = set()
        """Held, and out of their queue since its head came to them."""
        self._idle: set[int] = set()
        self._n_small = 0
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def stored(self, entry: Cached, now_s: float) -> None:
        self._uses[entry.block] = 0

    def used(self, entry: Cached, now_s: float) -> None:
        self._uses[entry.block] = min(self.MOST, self._uses[entry.block] + 1)

    def idle(self, entry: Cached, now_s: float) -> None:
        block = entry.block
        self._idle.add(block)
        if block in self._queue_of:
            return
        is_back = self._ghosts.pop(entry.key, 1) is None
        self._append(self._main if is_back or block in self._proven else self._small, entry)
        self._proven.discard(block)

    def _append(self, queue: deque[Cached], entry: Cached) -> None:
        queue.append(entry)
        self._queue_of[entry.block] = queue
        self._n_small += queue is self._small

    def _pop(self, queue: deque[Cached]) -> Cached:
        entry = queue.popleft()
        del self._queue_of[entry.block]
        self._n_small -= queue is self._small
        return entry

    def busy(self, entry: Cached) -> None:
        self._idle.remove(entry.block)

    def victim(self, now_s: float) -> Cached:
        if not self._idle:
            raise nothing_idle()
        while True:
            is_small = self._small and (self._n_small > self.SMALL_SHARE * self._capacity or not self._main)
            queue = self._small if is_small else self._main
            entry = queue[0]
            if entry.block not in self._idle:
                self._proven.add(self._pop(queue).block)
            elif self._uses[entry.block] > (1 if is_small else 0):
                self._pop(queue)
                self._uses[entry.block] = 0 if is_small else self._uses[entry.block] - 1
                self._append(self._main, entry)
            else:
                return entry

    def evicted(self, entry: Cached, now_s: float) -> None:
        queue = self._queue_of[entry.block]
        if queue[0] is not entry:
            raise KeyError(entry.block)
        self._pop(queue)
        self._idle.remove(entry.block)
        self._uses.pop(entry.block, None)
        if queue is self._small:
            self._ghosts[entry.key] = None
            if len(self._ghosts) > self._capacity:
                self._ghosts.popitem(last=False)

    def score(self, entry: Cached, now_s: float) -> float:
        """Its counted uses."""
        return float(self._uses[entry.block])

    def __len__(self) -> int:
        return len(self._idle)


class Arc:
    """ARC (FAST 2003): used once and used again in two LRU lists, whose sizes follow the hits in their ghosts.

    ``capacity``: blocks of the pool. Held blocks stand in neither list. As in the paper's Case IV, blocks used once and
    their ghosts are no more than ``capacity`` together, and all four lists no more than twice that.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._once, self._again = Lru(), Lru()
        self._ghosts_once: OrderedDict[bytes, None] = OrderedDict()
        self._ghosts_again: OrderedDict[bytes, None] = OrderedDict()
        self._target = 0.0
        """Of the blocks used once."""
        self._again_blocks: set[int] = set()

    def stored(self, entry: Cached, now_s: float) -> None:
        once, again = len(self._ghosts_once), len(self._ghosts_again)
        if entry.key in self._ghosts_once:
            self._target = min(self._capacity, self._target + max(1.0, again / once))
            del self._ghosts_once[entry.key]
        elif entry.key in self._ghosts_again:
            self._target = max(0.0, self._target - max(1.0, once / again))
            del self._ghosts_again[entry.key]
        else:
            return
        self._again_blocks.add(entry.block)

    def used(self, entry: Cached, now_s: float) -> None:
        if entry not in self._once:  # those in the list move when they leave it
            self._again_blocks.add(entry.block)

    def idle(self, entry: Cached, now_s: float) -> None:
        self._list(entry).idle(entry, now_s)

    def _list(self, entry: Cached) -> Lru:
        return self._again if entry.block in self._again_blocks else self._once

    def busy(self, entry: Cached) -> None:
        self._list(entry).busy(entry)
        self._again_blocks.add(entry.block)

    def victim(self, now_s: float) -> Cached:
        n_once, n_again = len(self._once), len(self._again)
        from_once = n_once > 0 and (n_once > self._target or n_again == 0)
        return (self._once if from_once else self._again).victim(now_s)

    def evicted(self, entry: Cached, now_s: float) -> None:
        was = self._list(entry)
        was.busy(entry)
        self._again_blocks.discard(entry.block)
        ghosts_once, ghosts_again = self._ghosts_once, self._ghosts_again
        (ghosts_once if was is self._once else ghosts_again)[entry.key] = None
        if len(self._once) + len(ghosts_once) > self._capacity:
            ghosts_once.popitem(last=False)
        if len(self) + len(ghosts_once) + len(ghosts_again) > 2 * self._capacity:
            ghosts_again.popitem(last=False)

    def score(self, entry: Cached, now_s: float) -> float:
        """Its last use."""
        return entry.last_s

    def __len__(self) -> int:
        return len(self._once) + len(self._again)


class Random(Quiet):
    """Any idle block, each as likely: what a policy has to beat, and the quickest way to holes. Seeded, O(1)."""

    def __init__(self) -> None:
        self._random = random.Random(0)  # noqa: S311  nothing here is a secret
        self._entries: list[Cached] = []
        self._place: dict[int, int] = {}
        self._drawn: Cached | None = None

    def idle(self, entry: Cached, now_s: float) -> None:
        self._place[entry.block] = len(self._entries)
        self._entries.append(entry)

    def busy(self, entry: Cached) -> None:
        place, last = self._place.pop(entry.block), self._entries.pop()
        if last is not entry:
            self._entries[place] = last
            self._place[last.block] = place
        if self._drawn is entry:
            self._drawn = None

    def victim(self, now_s: float) -> Cached:
        if self._drawn is None:
            if not self._entries:
                raise nothing_idle()
            self._drawn = self._random.choice(self._entries)
        return self._drawn

    def evicted(self, entry: Cached, now_s: float) -> None:
        self.busy(entry)

    def score(self, entry: Cached, now_s: float) -> float:
        """All alike."""
        return 0.0

    def __len__(self) -> int:
        return len(self._entries)
