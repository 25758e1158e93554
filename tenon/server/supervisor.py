"""Keeps an engine there: starts it, notices when it is gone or hangs, starts the next.

    starting --> serving --+
       ^  |                |  dead, or without a pulse: killed
       |  +--> backoff <---+
       +----------+

An engine that never came to serve is a server that cannot start: ``on_failure``. After that there is always another
one, sooner or later; requests in flight wait for it in the :class:`Service`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Final

from tenon.base.clock import Clock
from tenon.engine import messages as m
from tenon.engine.config import EngineConfig
from tenon.server.engine_link import EngineLink
from tenon.server.failures import Refusal
from tenon.server.logs import told
from tenon.server.service import Service

FIRST_WAIT_S: Final = 0.5
LONGEST_WAIT_S: Final = 30.0
LOOK_EVERY_S: Final = 0.5
SHORT_LIFE_S: Final = 10.0

_log = logging.getLogger("tenon.server")


def backoff_s(n_failures: int) -> float:
    """How long to wait after so many engines in a row that ended before they served."""
    return 0.0 if n_failures == 0 else min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** (n_failures - 1))


class Backoff:
    """What the ends of past engines say about the next start.

    One that served is followed at once, for requests wait. Those that end again and again though nobody asks for
    anything are followed as slowly as those that do not start: nobody waits, and each start takes a core.
    """

    def __init__(self) -> None:
        self.n_failures = 0
        """Engines in a row that ended before they served."""
        self._n_flaps = 0

    def ended(self, served_s: float | None, *, was_idle: bool) -> float:
        """How long to wait with the next one. ``served_s``: how long the last one served; None: it never did."""
        self.n_failures = self.n_failures + 1 if served_s is None else 0
        if served_s is not None:
            self._n_flaps = self._n_flaps + 1 if was_idle and served_s < SHORT_LIFE_S else 0
        return backoff_s(max(self.n_failures, self._n_flaps - 1))


class Supervisor:
    """The engines of one server, one after another, each with an epoch of its own."""

    def __init__(
        self,
        config: EngineConfig,
        service: Service,
        *,
        clock: Clock,
        on_message: Callable[[m.FromEngine], None],
        on_failure: Callable[[str, str], None],
    ) -> None:
        self._config, self._service, self._clock = config, service, clock
        self._on_message, self._on_failure = on_message, on_failure
        self._link: EngineLink | None = None
        self._epoch = 0
        self._has_served = False
        """Whether any engine has."""
        self._backoff = Backoff()
        self._serves_since_s: float | None = None
        """Since when the present one does."""
        self._closing = False
        self._asked = False
        """Whether the present engine's end was asked for."""
        self._next: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._beats, self._beat_s = 0, 0.0

    async def start(self) -> None:
        """Start an engine; it says by its messages when it serves."""
        self._epoch += 1
        self._serves_since_s = None
        self._asked = False
        link = EngineLink(
            self._config, epoch=self._epoch, on_message=self._receive, on_death=self._on_death
        )  # fmt: skip
        self._link = link
        self._service.attach(link.send)
        self._beats, self._beat_s = 0, self._clock.now_s()
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        await link.start()

    def kill(self) -> None:
        """End the present engine now, and have no other. For a server that leaves at once."""
        self._closing = True
        if self._link is not None:
            self._link.kill()

    @property
    def is_watching(self) -> bool:
        """Whether an engine that hangs would be noticed; read by any thread."""
        return self._watching is None or not self._watching.done()

    def engine(self) -> dict[str, Any]:
        """The present engine: its process, epoch, and for how long it has served, null where it does not yet."""
        since_s = self._serves_since_s
        return {
            "pid": self._link.pid if self._link is not None else None,
            "epoch": self._epoch,
            "served_s": round(self._clock.now_s() - since_s, 3) if since_s is not None else None,
        }

    def restart(self) -> dict[str, Any]:
        """End the present engine, which no request is blamed for, and have the next one; returns what ``engine`` said.
        Raises ``Refusal`` (409) where none serves."""
        link, ended = self._serving(), self.engine()
        self._asked = True
        link.kill("the engine was ended as an administrator asked")
        return ended

    def forget(self) -> None:
        """Have the engine forget what is cached and held by no request. Raises ``Refusal`` (409) where none serves."""
        self._serving().send(m.Forget())

    def _serving(self) -> EngineLink:
        if self._link is None or self._serves_since_s is None or self._asked or self._closing:
            reason = self._service.reason or "it is being restarted"
            raise Refusal(f"no engine serves now: {reason}", status=409, code="no_engine")
        return self._link

    async def close(self) -> None:
        """End the present engine, and have no other."""
        self._closing = True
        for task in (self._next, self._watching):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._link is not None:
            await self._link.close()

    def _receive(self, message: m.FromEngine) -> None:
        if isinstance(message, m.Ready):
            self._has_served, self._serves_since_s = True, self._clock.now_s()
        self._on_message(message)

    def _on_death(self, message: str, trace: str) -> None:
        if self._closing:
            return
        if not self._has_served:
            self._on_failure(message, trace)
            return
        since_s, self._serves_since_s = self._serves_since_s, None
        served_s = None if since_s is None else self._clock.now_s() - since_s
        wait_s = self._backoff.ended(served_s, was_idle=self._service.n_running == 0)
        _log.error(message, extra=told(trace=trace) if trace else None)
        self._service.engine_lost(message, self._backoff.n_failures, blameless=self._asked)
        self._next = asyncio.create_task(self._start_after(wait_s))

    async def _start_after(self, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        try:
            await self.start()
        except OSError as error:  # no process, no memory: what was short may be there later
            self._on_death(f"no engine could be started: {error.strerror or error}", "")

    async def _watch(self) -> None:
        """Kill an engine whose pulse stands still; its death does the rest."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            link, now_s = self._link, self._clock.now_s()
            beats = link.beats if link is not None else 0
            if link is None or beats != self._beats or beats == 0:
                self._beats, self._beat_s = beats, now_s
            elif now_s - self._beat_s > self._service.limits.stall_s:
                link.kill(f"the engine hung: no sign of life for {now_s - self._beat_s:.0f} s")
                self._beats, self._beat_s = 0, now_s
