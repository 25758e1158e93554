"""What the page and other tools watch: versioned events, to every subscriber through a bounded queue of its own.

An event is one JSON object with ``v``, ``kind`` and ``at_s`` (wall seconds) and the fields of its kind:

    state     state, reason, model, max_model_len            whenever the server's state changes
    phase     name, fraction, detail                         while starting
    stats     the engine's Stats, and the HTTP side's        4 to 10 times a second while anything changes
    started   request_id, n_prompt, n                        a request was accepted
    first     request_id, ttft_s, cache
    finished  request_id, reason, n_output, e2e_s, cache, slo, ledger
    ledger    request_id, ledger                             what ``finished`` lacked: it ended here before the engine

Of these a reader has to ask for, by ``/events?kv=1`` and so on; they are in no record:

    kv         events, dropped              blocks that came and went (``messages.KVEvents``), ``cleared`` at first
    residency  ``messages.Residency``       at most once a second while anything changes
    victims    nothing of its own: scores in ``misses`` are known while somebody asks for it
    trees      trees, texts, dropped        guesses and what came of them (``messages.Trees``), with their tokens' texts
                                            by id: the newest there are, then all; of the reader's own tenant alone

``cache`` is what the cache had for the prompt, null if the engine never took the request up: ``cached_tokens``,
``holes``, ``n_misses`` and ``misses``, at most eight runs of positions with their reason (``messages.Miss``).
``slo`` is what a request was promised and what came of it, null without a promise; ``ledger`` is where its time went,
null where the engine has not said (:mod:`tenon.server.outcome`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from tenon.base.clock import Clock
from tenon.base.errors import ResourceError
from tenon.base.records import RecordWriter
from tenon.engine.messages import KVEvents

_log = logging.getLogger("tenon.server")

VERSION: Final = 1
HEARTBEAT_S: Final = 15.0
KV_EVENTS_AT_ONCE: Final = 1024
EXTRAS: Final = frozenset({"kv", "residency", "victims", "trees"})
"""What is sent only to those who ask for it."""


class Subscription:
    """One reader's queue. A reader that falls behind is closed: it reconnects and gets the present state."""

    def __init__(self, bound: int, extras: frozenset[str] = frozenset(), tenant: str = "") -> None:
        self._bound = bound
        self.extras, self.tenant = extras, tenant
        self._queue: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self.closed = False

    def put(self, event: bytes) -> None:
        if len(self._queue) >= self._bound:
            self.close()
        if not self.closed:
            self._queue.append(event)
            self._wake.set()

    def close(self) -> None:
        self.closed = True
        self._wake.set()

    async def frames(self) -> AsyncIterator[bytes]:
        """Server-sent events until closed; a comment now and then, so that proxies and clients see life."""
        while True:
            while self._queue:
                yield b"data: " + self._queue.popleft() + b"\n\n"
            if self.closed:
                return
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), HEARTBEAT_S)
            except TimeoutError:
                yield b": alive\n\n"


class EventHub:
    """Publishes to all subscriptions and, where a recorder is given, to a run's ``events.jsonl``."""

    def __init__(self, clock: Clock, *, bound: int, record_folder: Path | None = None) -> None:
        self._clock = clock
        self.bound = bound
        """Events that may wait for a reader that comes from now on."""
        self._subscriptions: set[Subscription] = set()
        self._latest: dict[str, bytes] = {}
        self.on_extras: Callable[[], None] = lambda: None
        """Called when somebody comes who reads extras, also if others read them already, and when fewer are read."""
        self._recorder = RecordWriter(record_folder, clock=clock) if record_folder is not None else None

    def publish(self, kind: str, **fields: Any) -> None:
        event = {"v": VERSION, "kind": kind, "at_s": round(self._clock.wall_s(), 3), **fields}
        encoded = msgspec.json.encode(event)
        if kind in ("state", "stats"):
            self._latest[kind] = encoded
        elif kind == "phase":
            self._latest[f"phase {fields['name']}"] = encoded
        for subscription in self._subscriptions:
            subscription.put(encoded)
        if self._recorder is not None:
            self._record(self._recorder, kind, fields)

    def publish_extra(self, kind: str, tenant: str | None = None, /, **fields: Any) -> None:
        """To those who asked for it alone; of them, where it is a ``tenant``'s, to that one's."""
        encoded = msgspec.json.encode({"v": VERSION, "kind": kind, "at_s": round(self._clock.wall_s(), 3), **fields})
        for subscription in self._subscriptions:
            if kind in subscription.extras and tenant in (None, subscription.tenant):
                subscription.put(encoded)

    def publish_kv(self, message: KVEvents) -> None:
        """In pieces, so that no event is huge."""
        for start in range(0, len(message.events), KV_EVENTS_AT_ONCE):
            events = [msgspec.structs.asdict(event) for event in message.events[start : start + KV_EVENTS_AT_ONCE]]
            self.publish_extra("kv", events=events, dropped=message.dropped)

    def _record(self, recorder: RecordWriter, kind: str, fields: dict[str, Any]) -> None:
        """A full disk ends the recording, not the service; the reason goes to the log."""
        try:
            recorder.write(kind, **fields)
        except ResourceError as error:
            _log.error("recording stops: %s", error)
            recorder.close()
            self._recorder = None

    @property
    def wanted(self) -> frozenset[str]:
        """Extras that somebody reads."""
        return frozenset().union(*(subscription.extras for subscription in self._subscriptions))

    def subscribe(self, extras: frozenset[str] = frozenset(), tenant: str = "") -> Subscription:
        """A queue that begins with the latest of each kind of state, so that a new reader knows where things stand."""
        subscription = Subscription(self.bound, extras, tenant)
        for encoded in self._latest.values():
            subscription.put(encoded)
        self._subscriptions.add(subscription)
        if extras:
            self.on_extras()
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        before = self.wanted
        self._subscriptions.discard(subscription)
        if self.wanted != before:
            self.on_extras()

    def close(self) -> None:
        for subscription in self._subscriptions:
            subscription.close()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
