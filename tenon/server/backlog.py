"""How long a new request would wait for its turn, told from how fast the queue moves.

The pace is counted in sequences that begin, not in tokens: how many tokens a request will really use nobody knows, and
as long as an engine has room for one more, no tokens of others are in its way. It is learnt only while the engine says
that some wait, for only then does it give all that it can.
"""

from __future__ import annotations

from collections import deque
from typing import Final

STARTS: Final = 64
"""The pace is that of so many last starts."""
LEAST_STARTS: Final = 8
"""Fewer tell nothing yet."""
LEAST_RETRY_S: Final = 1.0
MOST_RETRY_S: Final = 60.0


def predicted_wait_s(n_waiting: int, n_started: int, within_s: float) -> float:
    """Until ``n_waiting`` have begun, where ``n_started`` did within ``within_s``; 0 where too few did to tell."""
    if n_started < LEAST_STARTS:
        return 0.0
    return n_waiting * within_s / n_started


def retry_after_s(wait_s: float) -> float:
    """What a refused client is told: when those who wait now will have begun."""
    return min(MOST_RETRY_S, max(LEAST_RETRY_S, wait_s))


class Backlog:
    """Hears what the queue does; times are one clock's seconds and never fall."""

    def __init__(self) -> None:
        self._starts: deque[float] = deque(maxlen=STARTS)
        """In seconds in which somebody waited."""
        self._queued_s = 0.0
        self._since_s: float | None = None
        """Since when somebody has waited, as far as it is not in ``_queued_s`` yet; None while nobody does."""

    def queue(self, n_waiting: int, now_s: float) -> None:
        """The engine says how many sequences wait."""
        self._queued_s = self._at(now_s)
        self._since_s = now_s if n_waiting else None

    def started(self, n: int, now_s: float) -> None:
        """So many sequences have got their first token."""
        if self._since_s is not None:
            self._starts.extend([self._at(now_s)] * n)

    def wait_s(self, n_waiting: int, now_s: float) -> float:
        """How long a request behind ``n_waiting`` others would wait; 0 while the engine has room, and at first, while
        the pace is not known."""
        if self._since_s is None or not self._starts:
            return 0.0
        return predicted_wait_s(n_waiting, len(self._starts), self._at(now_s) - self._starts[0])

    def _at(self, now_s: float) -> float:
        return self._queued_s + (now_s - self._since_s if self._since_s is not None else 0.0)
