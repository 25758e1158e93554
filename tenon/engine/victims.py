"""A log of what was evicted and of what would have been next, for whoever watches a policy decide."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tenon.engine.policies.evict import Cached, Evict

MAX_VICTIMS: Final = 1024


@dataclass(frozen=True, slots=True)
class Victim:
    """A block as it was when it was evicted, and the runner-up; ``next_key`` is empty where no other block was idle.
    Scores are in the policy's own unit, both at the eviction."""

    key: bytes
    position: int
    turn: int
    n_uses: int
    idle_s: float
    score: float
    next_key: bytes
    next_score: float | None


class Victims:
    """Of one pool, the newest by key. Empty, and at no cost, until ``watch`` is set.

    The runner-up is the policy's ``victim`` once the victim has left, so that a policy is asked earlier than it would
    be otherwise: one that draws lots, or moves its queues when it is asked, may then choose another next time.
    """

    def __init__(self) -> None:
        self.watch = False
        self._log: OrderedDict[bytes, Victim] = OrderedDict()

    def __len__(self) -> int:
        return len(self._log)

    def __iter__(self) -> Iterator[Victim]:
        return iter(self._log.values())

    def get(self, key: bytes) -> Victim | None:
        """The last eviction of this key, if it is among the newest."""
        return self._log.get(key)

    def leaves(self, entry: Cached, evict: Evict, now_s: float) -> None:
        """``evict.evicted`` for the policy's victim, written down."""
        score = evict.score(entry, now_s)
        evict.evicted(entry, now_s)
        after = evict.victim(now_s) if len(evict) else None
        next_key, next_score = (b"", None) if after is None else (after.key, evict.score(after, now_s))
        self._log[entry.key] = Victim(
            entry.key, entry.position, entry.turn, entry.n_uses, now_s - entry.last_s, score, next_key, next_score
        )
        self._log.move_to_end(entry.key)
        if len(self._log) > MAX_VICTIMS:
            self._log.popitem(last=False)

    def clear(self) -> None:
        self._log.clear()
