"""The eviction policy that AsymCache published, as published."""

from __future__ import annotations

import math
from collections import deque

from tenon.engine.policies.evict import Cached, Heap


class _Recent:
    """The newest ``n`` of a stream of numbers."""

    def __init__(self, n: int) -> None:
        self.values: deque[float] = deque(maxlen=n)
        self.total = 0.0
        self.n_seen = 0

    def add(self, value: float) -> None:
        values = self.values
        if len(values) == values.maxlen:
            self.total -= values[0]
        values.append(value)
        self.total += value
        self.n_seen += 1

    @property
    def mean(self) -> float:
        return self.total / len(self.values)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class AsymCache:
    """AsymCache as published (arXiv 2606.02964, section 4): reuse weight x recompute latency, in two ordered sets.

    A block's weight ``tau`` seconds after its use is min(exp(-tau / alpha), exp(-(tau - tau0) / beta)) (Eq. 9), with
    alpha = -L / ln p, beta = alpha / r, tau0 = L (1 - 1 / r). Logarithms of both, times the cost, minus their common
    change with time, do not change: each set is a heap, and the victim is the lesser of the two heads, the second
    shifted by ln lambda (Algorithm 1). Lambda follows the mean of recent reuse times (Eq. 10); the lifespan L is their
    99th percentile and is looked at anew every ``REFIT`` of them. Without ``adapts`` lambda stays 1, without ``learns``
    L stays ``lifespan_s``.
    """

    RATIO = 40.0
    P = 0.5
    REFIT = 512
    CHANGE = 1.25
    """A lifespan off by less than this factor is kept: to change it makes both heaps anew."""

    def __init__(
        self, lifespan_s: float = 600.0, learns: bool = True, adapts: bool = True, likelihood: float = P
    ) -> None:
        """``likelihood``: p, of a reuse where the lifespan ends; the paper recommends 0.3 to 0.7. Raises ``ValueError``
        where it is not between 0 and 1."""
        if not 0 < likelihood < 1:
            raise ValueError(f"likelihood must lie between 0 and 1, got {likelihood}")
        self.learns, self.adapts, self.likelihood = learns, adapts, likelihood
        self._recent = _Recent(2048)
        self._idle: dict[int, Cached] = {}
        self._slow, self._steep = Heap(), Heap()
        self._learn(lifespan_s)

    def _learn(self, lifespan_s: float) -> None:
        self.lifespan_s = lifespan_s
        self.alpha = -lifespan_s / math.log(self.likelihood)
        self.beta = self.alpha / self.RATIO
        self.tau0 = lifespan_s * (1.0 - 1.0 / self.RATIO)
        self.log_lambda = 0.0
        keys = [(entry, *self._keys(entry)) for entry in self._idle.values()]
        self._slow.refill((entry, slow) for entry, slow, _ in keys)
        self._steep.refill((entry, steep) for entry, _, steep in keys)

    def _keys(self, entry: Cached) -> tuple[float, float]:
        """In the slow heap and in the steep one."""
        log_cost = math.log(entry.cost)
        return log_cost + entry.last_s / self.alpha, log_cost + (entry.last_s + self.tau0) / self.beta

    def _reuse(self, age_s: float) -> None:
        recent = self._recent
        recent.add(age_s)
        if recent.n_seen % self.REFIT:
            return
        longest = max(recent.percentile(0.99), 1.0)
        if self.learns and not 1 / self.CHANGE < longest / self.lifespan_s < self.CHANGE:
            self._learn(longest)
        if self.adapts:
            self.log_lambda = (recent.mean - self.tau0) / self.beta - recent.mean / self.alpha

    def stored(self, entry: Cached, now_s: float) -> None:
        if entry.away_s >= 0.0:
            self._reuse(entry.away_s)

    def used(self, entry: Cached, now_s: float) -> None:
        if entry.block in self._idle:
            self._reuse(now_s - entry.last_s)

    def idle(self, entry: Cached, now_s: float) -> None:
        self._idle[entry.block] = entry
        slow, steep = self._keys(entry)
        self._slow.push(entry, slow)
        self._steep.push(entry, steep)

    def busy(self, entry: Cached) -> None:
        del self._idle[entry.block]
        self._slow.discard(entry)
        self._steep.discard(entry)

    def victim(self, now_s: float) -> Cached:
        slow_key, slow = self._slow.first()
        steep_key, steep = self._steep.first()
        is_slow = slow_key - now_s / self.alpha <= steep_key - now_s / self.beta + self.log_lambda
        return slow if is_slow else steep

    def evicted(self, entry: Cached, now_s: float) -> None:
        self.busy(entry)

    def score(self, entry: Cached, now_s: float) -> float:
        """ln min(w1, lambda w2)."""
        age_s, log_cost = now_s - entry.last_s, math.log(entry.cost)
        steep = log_cost - (age_s - self.tau0) / self.beta + self.log_lambda
        return min(log_cost - age_s / self.alpha, steep)

    def __len__(self) -> int:
        return len(self._idle)
