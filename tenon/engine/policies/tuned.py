"""Ours, with a net: the policy that would have saved most lately, among some, LRU always among them.

Each candidate runs a miniature of the cache (Waldspurger et al., ATC 2017): keys sampled by their hash, a pool as much
smaller, no keys or values. What a candidate saves there it would have saved here. ``worth`` begins. Another takes over
when its lead over the last windows is large enough and too steady for luck: the price of a change is that what the old
policy kept for later goes to the new one's taste. LRU takes over as soon as it leads at all: that is the net.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Final
from zlib import crc32

from tenon.engine.policies.evict import Cached, Evict
from tenon.engine.policies.latency import Gdsf
from tenon.engine.policies.recency import Lru, S3Fifo
from tenon.engine.policies.worth import ReuseTimes, Worth, class_of

SAMPLE: Final = 64
"""One key of so many is sampled where the pool is large enough."""
SMALLEST: Final = 1024
"""Blocks of a miniature at least, or all there are: fewer would tell luck."""
SALT: Final = 0x5EED
"""Other keys than those whose reuse times are followed."""


class _Miniature:
    """One candidate's cache of the sampled keys. What is held in the pool is held here, so that as little is left to
    evict; where nothing is, it grows."""

    def __init__(self, policy: Evict, n_blocks: int) -> None:
        self.policy = policy
        self.saved = 0.0
        """What hits would have cost, since it was last set to 0."""
        self._entries: dict[bytes, Cached] = {}
        self._held: set[bytes] = set()
        self._free: list[int] = []
        self._n_blocks = n_blocks

    def use(self, like: Cached, now_s: float) -> None:
        """A request has this block: found here or computed, and held until it is let go."""
        policy, key, entry = self.policy, like.key, self._entries.get(like.key)
        if entry is None:
            entry = Cached(
                self._block(now_s), key, like.position, like.cost, like.turn, like.n_uses, now_s, like.length
            )
            self._entries[key] = entry
            policy.stored(entry, now_s)
        else:
            self.saved += entry.cost
            policy.used(entry, now_s)
            if key not in self._held:
                policy.busy(entry)
            entry.n_uses += 1
            entry.turn = like.turn
        self._held.add(key)

    def let_go(self, like: Cached, now_s: float) -> None:
        """Its last holder has let go of it."""
        entry = self._entries[like.key]
        entry.last_s, entry.length = now_s, like.length
        self._held.discard(like.key)
        self.policy.idle(entry, now_s)
        if len(self._entries) > self._n_blocks:
            self._free.append(self._evict(now_s))

    def _block(self, now_s: float) -> int:
        if len(self._entries) >= self._n_blocks and len(self.policy):
            return self._evict(now_s)
        return self._free.pop() if self._free else len(self._entries)

    def _evict(self, now_s: float) -> int:
        victim = self.policy.victim(now_s)
        self.policy.evicted(victim, now_s)
        del self._entries[victim.key]
        return victim.block


class Tuned:
    """``worth``, ``gdsf``, ``s3fifo`` or ``lru``, whichever the miniatures say. ``n_blocks``: of the pool.

    A lead is the difference of two candidates' saved shares of the sampled uses' cost. ``WINDOW``: sampled uses between
    two decisions, ``WINDOWS``: how many are remembered. ``LEAD``, ``SURE``: by how much another's mean lead has to
    exceed how many of its standard errors. ``NET``, ``NET_WINDOWS``: LRU's mean lead, and over how many windows.
    """

    WINDOW = 512
    WINDOWS = 16
    LEAD, SURE, LEAST = 0.005, 1.5, 3
    NET, NET_WINDOWS, NET_LEAST = 0.002, 8, 2

    def __init__(self, n_blocks: int) -> None:
        self.times = ReuseTimes()
        make: dict[str, Callable[[int], Evict]] = {
            "worth": lambda n: Worth(self.times), "gdsf": lambda n: Gdsf(), "s3fifo": S3Fifo, "lru": lambda n: Lru()
        }  # fmt: skip
        self.sample = max(1, min(SAMPLE, n_blocks // SMALLEST))
        self._make, self._n_blocks = make, n_blocks
        n_small = max(2, n_blocks // self.sample)
        self._mini = {name: _Miniature(each(n_small), n_small) for name, each in make.items()}
        self.present = "worth"
        self.n_changes = 0
        self._policy = make[self.present](n_blocks)
        self._idle: dict[int, Cached] = {}
        self._n_sampled = 0
        self._asked = 0.0
        self._shares = {name: deque[float](maxlen=self.WINDOWS) for name in make}
        self._fit_at = 256

    def stored(self, entry: Cached, now_s: float) -> None:
        self._see(entry, now_s, waited=True)
        self._policy.stored(entry, now_s)

    def used(self, entry: Cached, now_s: float) -> None:
        self._see(entry, now_s, waited=entry.block in self._idle)
        self._policy.used(entry, now_s)

    def _see(self, entry: Cached, now_s: float, *, waited: bool) -> None:
        times = self.times
        times.see(entry.key, class_of(entry), now_s, waited=waited)
        if times.n_seen >= self._fit_at:
            times.fit(now_s)
            self._fit_at = times.n_seen + min(Worth.FIT_EVERY, times.n_seen)
        if self._is_sampled(entry):
            self._asked += entry.cost
            for mini in self._mini.values():
                mini.use(entry, now_s)
            self._n_sampled += 1
            if self._n_sampled % self.WINDOW == 0:
                self._decide(now_s)

    def _is_sampled(self, entry: Cached) -> bool:
        return crc32(entry.key, SALT) % self.sample == 0

    def _decide(self, now_s: float) -> None:
        for name, mini in self._mini.items():
            self._shares[name].append(mini.saved / self._asked)
            mini.saved = 0.0
        self._asked = 0.0
        leads = {name: self._lead(name) for name in self._mini if name != self.present}
        best = max(leads, key=lambda name: leads[name])
        if leads[best] > 0.0:
            self._change(best, now_s)

    def _lead(self, name: str) -> float:
        """The mean lead over the present policy; 0 where it is not enough for a change."""
        leads = [a - b for a, b in zip(self._shares[name], self._shares[self.present], strict=True)]
        if name == "lru":
            leads = leads[-self.NET_WINDOWS :]
            return mean if len(leads) >= self.NET_LEAST and (mean := fmean(leads)) > self.NET else 0.0
        if len(leads) < self.LEAST:
            return 0.0
        mean = fmean(leads)
        return mean if mean - self.SURE * stdev(leads) / len(leads) ** 0.5 > self.LEAD else 0.0

    def _change(self, name: str, now_s: float) -> None:
        """O(n log n): the new policy meets all idle blocks, those first that were let go first."""
        self.present = name
        self.n_changes += 1
        self._policy = self._make[name](self._n_blocks)
        for entry in sorted(self._idle.values(), key=lambda entry: entry.last_s):  # stable: as they were let go
            self._policy.idle(entry, now_s)

    def idle(self, entry: Cached, now_s: float) -> None:
        self._idle[entry.block] = entry
        self.times.see(entry.key, class_of(entry), now_s, waited=False)
        if self._is_sampled(entry):
            for mini in self._mini.values():
                mini.let_go(entry, now_s)
        self._policy.idle(entry, now_s)

    def busy(self, entry: Cached) -> None:
        del self._idle[entry.block]
        self._policy.busy(entry)

    def victim(self, now_s: float) -> Cached:
        return self._policy.victim(now_s)

    def evicted(self, entry: Cached, now_s: float) -> None:
        del self._idle[entry.block]
        self._policy.evicted(entry, now_s)

    def score(self, entry: Cached, now_s: float) -> float:
        """The present policy's."""
        return self._policy.score(entry, now_s)

    def __len__(self) -> int:
        return len(self._idle)
