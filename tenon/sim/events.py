"""What is going to happen: a heap of events over one virtual clock.

Arrivals, tools that return, transfers that end, steps that are done: whoever simulates pushes them with their time and
takes them in order. Events of the same time come in the order in which they were pushed, so that a simulation is a
function of its inputs alone.
"""

from __future__ import annotations

import heapq
import math
from typing import Generic, TypeVar

from tenon.sim.clock import VirtualClock

T = TypeVar("T")


class EventHeap(Generic[T]):
    """Pending events. ``push`` and ``pop`` are O(log n), ``cancel`` and ``next_s`` O(1) amortised."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self._heap: list[tuple[float, int]] = []
        self._items: dict[int, T] = {}
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def next_s(self) -> float:
        """When the next event happens; infinity when none is pending."""
        while self._heap and self._heap[0][1] not in self._items:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def push(self, at_s: float, item: T) -> int:
        """Have ``item`` happen at ``at_s``; returns a ticket for :meth:`cancel`.

        Raises ``ValueError`` for a time that is past or no finite number: an effect never comes before its cause.
        """
        if not (math.isfinite(at_s) and at_s >= self.clock.now_s()):
            raise ValueError(f"it is {self.clock.now_s()} s; nothing can happen at {at_s} s")
        self._pushed += 1
        self._items[self._pushed] = item
        heapq.heappush(self._heap, (at_s, self._pushed))
        return self._pushed

    def cancel(self, ticket: int) -> T:
        """Take a pending event back. Raises ``KeyError`` if it has happened or was cancelled before."""
        return self._items.pop(ticket)

    def pop(self) -> T:
        """Move the clock to the next event, unless it is later already, and take it. Raises ``LookupError`` without
        one.

        A clock that is later stood still for nobody: the event was due while something else, a step say, ran.
        """
        at_s = self.next_s
        if not self._items:
            raise LookupError("no event is pending")
        if at_s > self.clock.now_s():
            self.clock.advance_to(at_s)
        return self._items.pop(heapq.heappop(self._heap)[1])

    def due(self) -> list[T]:
        """Take all events that are due by now, in order."""
        taken: list[T] = []
        while self.next_s <= self.clock.now_s():
            taken.append(self.pop())
        return taken
