"""Ours, with a net: the policy that would have saved most lately, among some, LRU always among them.

Each candidate runs a miniature of the cache (Waldspurger et al., ATC 2017): keys sampled by their hash, a pool as much
smaller, no keys or values. What a candidate saves there it would have saved here. ``worth`` begins. Another takes over
when it has saved more than the present one by a margin, several times in a row, so that noise does not make the cache
change its mind: the price of a change is that what the old policy kept for later goes to the new one's taste. LRU takes
over at once where it has saved more: that is the net.
"""

from __future__ import annotations

from collections.abc import Callable
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
        """Fading sum of what hits would have cost."""
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

    ``WINDOW``: sampled uses between two decisions. ``MARGIN``: by which factor another has to have saved more,
    ``TIMES`` windows in a row. ``FADE``: what is left of the sums after a window.
    """

    WINDOW = 512
    MARGIN = 1.03
    TIMES = 5
    FADE = 0.85

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
        self._better, self._n_better = "", 0
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
            for mini in self._mini.values():
                mini.use(entry, now_s)
            self._n_sampled += 1
            if self._n_sampled % self.WINDOW == 0:
                self._decide(now_s)

    def _is_sampled(self, entry: Cached) -> bool:
        return crc32(entry.key, SALT) % self.sample == 0

    def _decide(self, now_s: float) -> None:
        saved = {name: mini.saved for name, mini in self._mini.items()}
        for mini in self._mini.values():
            mini.saved *= self.FADE
        best = max(saved, key=lambda name: saved[name])
        if saved["lru"] > saved[self.present]:
            self._change("lru", now_s)
            return
        if saved[best] <= self.MARGIN * saved[self.present]:
            self._n_better = 0
            return
        self._n_better = self._n_better + 1 if best == self._better else 1
        self._better = best
        if self._n_better >= self.TIMES:
            self._change(best, now_s)

    def _change(self, name: str, now_s: float) -> None:
        """O(n log n): the new policy meets all idle blocks, those first that were let go first."""
        self.present, self._n_better = name, 0
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
