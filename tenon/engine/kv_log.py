"""Which blocks came and went, in order, for whoever mirrors what is resident.

Replaying the log from its beginning, or from any ``cleared`` on, gives exactly the resident set: events are per block,
so holes need no mention, and what was applied may be applied again. The log is bounded. What falls out of it before it
was taken is counted, and makes the next take begin with ``cleared`` and everything that is resident; so does a log that
was stopped, for nobody was there to take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Final, NamedTuple

MAX_EVENTS: Final = 65_536
"""So many are taken at once; a log holds as many, and as many more as there are blocks."""

STORED: Final = "stored"
REMOVED: Final = "removed"
CLEARED: Final = "cleared"


class Logged(NamedTuple):
    """``key``, ``position`` and ``parent`` are the block's, empty for ``cleared``. ``reason``: "evicted" or "forgotten"
    for what was removed, "reset" or "resident" (all that is, follows) for ``cleared``."""

    kind: str
    key: bytes = b""
    position: int = 0
    parent: bytes = b""
    reason: str = ""


_logged = partial(tuple.__new__, Logged)
"""From a tuple of all fields: a third of the time that ``Logged`` takes, and there are two of them for each block."""


class KVLog:
    """Of one pool."""

    def __init__(self, n_blocks: int, max_events: int = MAX_EVENTS) -> None:
        self._events: deque[Logged] = deque(maxlen=n_blocks + max_events)
        self._n_logged = self._n_taken = 0
        self.is_kept = True
        """Whether somebody is going to take what comes."""

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Logged]:
        return iter(self._events)

    def add(self, kind: str, key: bytes = b"", position: int = 0, parent: bytes = b"", reason: str = "") -> None:
        """One event, see ``Logged``."""
        if not self.is_kept:
            return
        self._events.append(_logged((kind, key, position, parent, reason)))
        self._n_logged += 1

    @property
    def n_lost(self) -> int:
        """Events that fell out since the last take or restart."""
        return self._n_logged - self._n_taken - len(self._events)

    def restart(self, resident: Iterable[Logged]) -> None:
        """Drop what is there; ``cleared`` and what is resident come instead."""
        self.stop()
        self.is_kept = True
        self.add(CLEARED, reason="resident")
        for event in resident:
            self.add(*event)

    def stop(self) -> None:
        """Keep nothing: nobody takes any more."""
        self._events.clear()
        self._n_taken = self._n_logged
        self.is_kept = False

    def take(self, limit: int = MAX_EVENTS) -> list[Logged]:
        """The oldest events, at most ``limit``; they are in the log no longer."""
        taken = [self._events.popleft() for _ in range(min(limit, len(self._events)))]
        self._n_taken += len(taken)
        return taken
