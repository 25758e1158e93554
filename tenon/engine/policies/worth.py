"""Ours: what a block is expected to save per second that it is kept.

AsymCache weighs how likely a block is used again by what computing it once more takes. We keep that and learn the first
factor from the traffic, where the publication assumes a shape whose hazard grows with age; that of real traffic falls.

Reuse times are counted by class (turn of the conversation, number of uses) and age, from uses and from blocks that were
not used again yet, evicted ones too: a sample of keys is followed whether resident or not, so what a policy evicts does
not hide what it should have kept. From them follows, for each class and age, the Gittins index: the largest ratio,
over all times to wait, of the probability of a use within that time to the time that the block will have been kept. A
block that is worth little now and much in a minute, as one of a person who is typing, is thus not let go in between.
The score of a block is that index times its recompute cost.

Blocks of one class and age bucket differ only by cost: each such cell is a heap, and the victim is the best of their
heads. What moves from bucket to bucket, as it ages, are runs: blocks of a context and class that were let go together.

Shapes: C classes (U uses x T turns), B age buckets.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from tenon.engine.policies.evict import Cached, nothing_idle

Floats = NDArray[np.float64]

EDGES: Final = (0.0, *(2.0 ** (i / 2) for i in range(-2, 36)), float("inf"))
"""Of the age buckets, in seconds: half powers of two from half a second to two days."""
N_BUCKETS: Final = len(EDGES) - 1
LAST_S: Final = 2.0
"""Width of the last bucket over its start: it has no end."""

TURNS: Final = 4
USES: Final = 4
N_CLASSES: Final = TURNS * USES


_OF_USES: Final = tuple(TURNS * n - 1 for n in (0, 0, 1, 2, 2, 2, 3))


def class_of(entry: Cached) -> int:
    """Turn 1, 2, 3, 4 and more; used once, twice, three to five times, more often."""
    uses, turn = entry.n_uses, entry.turn
    return _OF_USES[uses if uses < 6 else 6] + (turn if turn < TURNS else TURNS)


def bucket_of(age_s: float) -> int:
    """The bucket that an age falls into."""
    return max(0, bisect_right(EDGES, age_s) - 1)


def gittins(returns_CB: Floats) -> Floats:
    """(C, B) from the probability, for each class, to be used within bucket b of who has come to its start: the largest
    ratio of the probability of a use to the expected seconds until it, or until one gives up, over all buckets to give
    up after."""
    widths_B = np.diff(EDGES)
    widths_B[-1] = EDGES[-2] * (LAST_S - 1)
    # Axis A: where one is now. What lies before it is as if it had no chance of a use and no width.
    is_ahead_AB = np.triu(np.ones((N_BUCKETS, N_BUCKETS), bool))
    p_CAB = np.where(is_ahead_AB, returns_CB[:, None, :], 0.0)
    alive_CAB = np.ones_like(p_CAB)
    np.cumprod(1.0 - p_CAB[..., :-1], axis=2, out=alive_CAB[..., 1:])
    waited_CAB = np.cumsum(alive_CAB * np.where(is_ahead_AB, widths_B, 0.0) * (1.0 - p_CAB / 2), axis=2)
    used_CAB = np.cumsum(alive_CAB * p_CAB, axis=2)
    ratio_CAB = np.divide(used_CAB, waited_CAB, out=np.zeros_like(p_CAB), where=is_ahead_AB)
    best_CA: Floats = ratio_CAB.max(axis=2)
    return best_CA


class ReuseTimes:
    """How long blocks of a class wait for their next use: counts of uses, and of those that still wait, by age.

    One key of ``sample`` is followed, at most ``MOST`` at a time, each for ``horizon_s`` at least. Old counts fade.
    ``index`` (C, B) holds the Gittins indices as of the last ``fit``.
    """

    MOST: Final = 16_384
    FADE: Final = 0.8
    """Of counts, per fit."""
    PRIOR: Final = 24.0
    """Observations that a class's neighbours, and all classes' guess, count as."""
    GUESS: Final = 0.1
    """Probability of a use in each bucket before anything is known: a hazard that falls as 1 / age."""

    def __init__(self) -> None:
        self._place: OrderedDict[bytes, int] = OrderedDict()
        """Of each key that is followed in the two arrays, the one seen longest ago first."""
        self._last_s = np.zeros(self.MOST + 1)
        self._kind = np.full(self.MOST + 1, -1)
        """The class when it was last seen; negative for a place that is free."""
        self._free = list(range(self.MOST + 1))
        self._used_CB = np.zeros((N_CLASSES, N_BUCKETS))
        self._gone_CB = np.zeros((N_CLASSES, N_BUCKETS))
        self.n_seen = 0
        self.sample = 1
        self.horizon_s = 3600.0
        self.index = gittins(np.full((N_CLASSES, N_BUCKETS), self.GUESS))

    def see(self, key: bytes, kind: int, now_s: float, *, waited: bool) -> None:
        """A use of a block that is of class ``kind`` from now on, or its end. ``waited``: whether nobody used it since
        it was last seen."""
        self.n_seen += waited
        if crc32(key) % self.sample:
            return
        place = self._place.pop(key, None)
        if place is None:
            place = self._free.pop()
        elif waited:
            self._used_CB[self._kind[place], bucket_of(now_s - self._last_s.item(place))] += 1.0
        self._place[key] = place
        self._last_s[place], self._kind[place] = now_s, kind
        if len(self._place) <= self.MOST:
            return
        age_s = now_s - self.oldest_s
        if age_s > self.horizon_s:
            key, place = next(iter(self._place.items()))
            self._gone_CB[self._kind[place], bucket_of(age_s)] += 1.0
            self._forget(key)
        else:  # fewer keys for longer
            self.sample *= 2
            for other in [other for other in self._place if crc32(other) % self.sample]:
                self._forget(other)

    @property
    def n_followed(self) -> int:
        """Keys."""
        return len(self._place)

    @property
    def oldest_s(self) -> float:
        """When the key that was seen longest ago was seen. Raises ``StopIteration`` where there is none."""
        return self._last_s.item(next(iter(self._place.values())))

    def _forget(self, key: bytes) -> None:
        place = self._place.pop(key)
        self._kind[place] = -1
        self._free.append(place)

    def fit(self, now_s: float) -> None:
        """Look at the counts anew."""
        followed = np.flatnonzero(self._kind >= 0)
        buckets = np.searchsorted(EDGES, now_s - self._last_s[followed], "right") - 1
        cells = self._kind[followed] * N_BUCKETS + np.maximum(buckets, 0)
        waiting_CB = self._gone_CB + np.bincount(cells, minlength=N_CLASSES * N_BUCKETS).reshape(N_CLASSES, N_BUCKETS)
        used_UTB, waiting_UTB = (n.reshape(USES, TURNS, N_BUCKETS) for n in (self._used_CB, waiting_CB))
        overall_1B = _returns(used_UTB.sum((0, 1))[None], waiting_UTB.sum((0, 1))[None], None, self.PRIOR)
        near_UB = _returns(used_UTB.sum(1), waiting_UTB.sum(1), overall_1B, self.PRIOR)
        prior_CB = np.repeat(near_UB, TURNS, axis=0)
        self.index = gittins(_returns(self._used_CB, waiting_CB, prior_CB, self.PRIOR))
        self._used_CB *= self.FADE
        self._gone_CB *= self.FADE


def _returns(used_CB: Floats, waiting_CB: Floats, prior_CB: Floats | None, weight: float) -> Floats:
    """(C, B) of who comes to a bucket's start, the share used within it (Kaplan and Meier 1958), who still waits in it
    counted half; drawn to the prior as if that were ``weight`` observations. Without one, to the share of the bucket
    before: where nothing was seen yet, the hazard falls as 1 / age."""
    beyond_CB = np.cumsum((used_CB + waiting_CB)[:, ::-1], axis=1)[:, ::-1]
    at_risk_CB = np.maximum(beyond_CB - waiting_CB / 2, used_CB) + weight
    if prior_CB is not None:
        return (used_CB + weight * prior_CB) / at_risk_CB
    found_CB = np.empty_like(used_CB)
    near_C = np.full(len(used_CB), ReuseTimes.GUESS)
    for b in range(used_CB.shape[1]):
        near_C = found_CB[:, b] = (used_CB[:, b] + weight * near_C) / at_risk_CB[:, b]
    return found_CB


@dataclass(slots=True, eq=False)
class _Run:
    """Blocks of one class that were let go together, the dearest first: they age alike. Some may have left since."""

    kind: int
    last_s: float
    entries: list[Cached]
    n_idle: int = 0
    cell: int = -1


class _Cell:
    """The runs of one class and age bucket: a heap by their cheapest block, and a queue by age. Whoever has left, or
    has lost its cheapest block, is put right when it comes up."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, _Run]] = []
        self.queue: deque[_Run] = deque()


class Worth:
    """Score: Gittins index of the block's class and age x recompute cost. See the module.

    ``RUN``: the victim's neighbour goes next as long as its score is not above the least by more than this factor, so
    that what is missing of a context lies in few holes.
    """

    FIT_EVERY = 2048
    """Uses seen between two fits, once there have been as many."""
    RUN = 1.1
    LOOK_S = 0.25
    """Ages are looked at so often at most."""

    def __init__(self, times: ReuseTimes | None = None) -> None:
        """``times``: those of another, who learns for both."""
        self._learns = times is None
        self.times = times or ReuseTimes()
        self.n_moves = 0
        """Runs and blocks put into a heap or taken out, or looked at."""
        self._index = self.times.index.ravel().tolist()
        """Of each cell."""
        self._fit_at = 256
        self._cells: dict[int, _Cell] = {}
        self._place: dict[int, tuple[Cached, _Run]] = {}
        """Of each idle block's number."""
        self._open: _Run | None = None
        """The run that is being let go; in no cell yet."""
        self._order = 0
        self._next_s = float("inf")
        """When the first run comes to its next bucket."""
        self._low, self._bar, self._floor = -1, float("inf"), 0.0
        """The cell of the least score when all were looked at; what the second least was, and the least."""
        self._latest: _Run | None = None

    def stored(self, entry: Cached, now_s: float) -> None:
        self._see(entry, now_s, waited=True)

    def used(self, entry: Cached, now_s: float) -> None:
        self._see(entry, now_s, waited=entry.block in self._place)

    def _see(self, entry: Cached, now_s: float, *, waited: bool) -> None:
        times = self.times
        if self._learns:
            times.see(entry.key, class_of(entry), now_s, waited=waited)
        if times.n_seen >= self._fit_at:
            if self._learns:
                times.fit(now_s)
            self._fit_at = times.n_seen + min(self.FIT_EVERY, times.n_seen)
            self._index = times.index.ravel().tolist()
            self._low, self._floor = -1, 0.0

    def idle(self, entry: Cached, now_s: float) -> None:
        kind, run = class_of(entry), self._open
        if self._learns:
            self.times.see(entry.key, kind, now_s, waited=False)
        if run is None or run.last_s != entry.last_s or run.kind != kind or run.entries[-1].cost < entry.cost:
            self._close()
            run = self._open = _Run(kind, entry.last_s, [])
        run.entries.append(entry)
        run.n_idle += 1
        self._place[entry.block] = entry, run

    def _close(self) -> None:
        run = self._open
        if run is not None:
            self._open = None
            if run.n_idle:
                self._put(run, 0)  # whatever its age: queues stay in the order of last uses

    def _put(self, run: _Run, bucket: int) -> None:
        cell = run.cell = run.kind * N_BUCKETS + bucket
        at = self._cells.get(cell)
        if at is None:
            at = self._cells[cell] = _Cell()
        at.queue.append(run)
        self._push(at, run)
        self._next_s = min(self._next_s, run.last_s + EDGES[bucket + 1])

    def _push(self, at: _Cell, run: _Run) -> None:
        """Into its cell's heap, by the cheapest block that is still there."""
        self._order += 1
        cost = self._cheapest(run).cost
        heapq.heappush(at.heap, (cost, self._order, run))
        self.n_moves += len(at.heap).bit_length()
        if len(at.heap) > 2 * len(at.queue) + 64:  # most have moved on, too dear to come up
            at.heap = [item for item in at.heap if item[2].cell == run.cell and item[2].n_idle]
            heapq.heapify(at.heap)
            self.n_moves += len(at.heap)
        score = cost * self._index[run.cell]
        if score < self._bar and run.cell != self._low:
            self._bar = score
        if score < self._floor:
            self._floor = score

    def _head(self, cell: int) -> tuple[float, _Run] | None:
        """The least cost of a cell and the run that it ends."""
        at = self._cells[cell]
        while at.heap:
            cost, _, run = at.heap[0]
            is_here = run.cell == cell and run.n_idle > 0
            if is_here and self._cheapest(run).cost == cost:
                return cost, run
            heapq.heappop(at.heap)
            self.n_moves += len(at.heap).bit_length()
            if is_here:
                self._push(at, run)
        return None

    def _age(self, now_s: float) -> None:
        """Move runs that have come to their next bucket."""
        self._next_s = float("inf")
        # Oldest first: who leaves several buckets behind at once must not stand before who is older.
        for cell in sorted(self._cells, key=lambda cell: -(cell % N_BUCKETS)):
            at, edge = self._cells[cell], EDGES[cell % N_BUCKETS + 1]
            queue = at.queue
            while queue:
                run = queue[0]
                is_here = run.cell == cell and run.n_idle > 0
                if is_here and now_s - run.last_s < edge:
                    self._next_s = min(self._next_s, run.last_s + edge)
                    break
                queue.popleft()
                self.n_moves += 1
                if is_here:
                    self._put(run, bucket_of(now_s - run.last_s))
            if not queue:
                del self._cells[cell]
        self._next_s = max(self._next_s, now_s + self.LOOK_S)

    def busy(self, entry: Cached) -> None:
        self._place.pop(entry.block)[1].n_idle -= 1

    def victim(self, now_s: float) -> Cached:
        self._close()
        if now_s >= self._next_s:
            self._age(now_s)
        run = self._latest
        if run is not None and run.n_idle:
            entry = self._cheapest(run)
            score = entry.cost * self._index[run.cell]
            # No score has fallen below the floor since all were looked at.
            if score <= self.RUN * self._floor or score <= self.RUN * self._lowest()[0]:
                return entry
        return self._cheapest(self._lowest()[1])

    def _cheapest(self, run: _Run) -> Cached:
        while self._place.get(run.entries[-1].block) != (run.entries[-1], run):
            run.entries.pop()
        return run.entries[-1]

    def _lowest(self) -> tuple[float, _Run]:
        """The least score and whose it is. All cells are looked at only when the lowest one's head has come to what was
        then the second lowest score: others can but rise, save by who comes in, which ``_push`` looks at."""
        if self._low in self._cells:
            head = self._head(self._low)
            if head is not None and head[0] * self._index[self._low] <= self._bar:
                return head[0] * self._index[self._low], head[1]
        self._low = -1
        scores = []
        for cell in self._cells:
            head = self._head(cell)
            self.n_moves += 1
            if head is not None:
                scores.append((head[0] * self._index[cell], cell, head[1]))
        if not scores:
            raise nothing_idle()
        low = min(scores, key=lambda found: found[:2])
        self._low, self._floor = low[1], low[0]
        self._bar = min((score for score, cell, _ in scores if cell != self._low), default=float("inf"))
        return low[0], low[2]

    def evicted(self, entry: Cached, now_s: float) -> None:
        self._latest = self._place[entry.block][1]
        self.busy(entry)

    def score(self, entry: Cached, now_s: float) -> float:
        """What it is expected to save per second: in the cost's unit."""
        self._close()
        return entry.cost * self._index[self._place[entry.block][1].cell]

    def __len__(self) -> int:
        return len(self._place)
