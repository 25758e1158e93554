"""The engine's reports as events, not more often than a reader can use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec

from tenon.base.clock import Clock
from tenon.engine.messages import Stats
from tenon.server.events import EventHub

STATS_EVERY_S: Final = 0.12


class Reports:
    """``n_in_flight`` says how many requests there are when one is published."""

    def __init__(self, events: EventHub, clock: Clock, n_in_flight: Callable[[], int]) -> None:
        self._events, self._clock, self._n_in_flight = events, clock, n_in_flight
        self._newest: Stats | None = None
        self._published_s = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def take(self, stats: Stats) -> None:
        """Publish it now, or, where the last one was a moment ago, the newest there is in a moment."""
        self._newest = stats
        wait_s = self._published_s + STATS_EVERY_S - self._clock.now_s()
        if wait_s <= 0:
            self._publish()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._publish)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _publish(self) -> None:
        self.close()
        if self._newest is not None:
            self._published_s = self._clock.now_s()
            guesses = self._newest.guesses
            told = msgspec.structs.asdict(self._newest)
            told["guesses"] = msgspec.structs.asdict(guesses) if guesses is not None else None
            self._events.publish("stats", in_flight=self._n_in_flight(), **told)
