"""The lines of one batch, asked so many at a time until each has its answer.

Who asks (a server of its own lines, or ``tenon batch`` over HTTP) hands in a function; here is what both share: which
lines are left, when a refusal is no answer yet, and that whatever is an answer is in the journal at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import msgspec

from tenon.server.batch_lines import Journal, Line, Output, answered

ROOM_EVERY_S: Final = 0.05
"""How often it is looked whether there is room again."""
RETRY_S: Final = 1.0
"""Where a refusal does not say how long to wait."""
LONGEST_RETRY_S: Final = 60.0
MAX_TRIES: Final = 2
"""Of a line that an engine died under: by chance once, but hardly twice."""
LEFT: Final = 499
"""A request that was cut off has this status, and no answer."""


@dataclass(frozen=True)
class Answer:
    """What came for one line; ``retry_after_s`` as the server says it."""

    status: int
    request_id: str
    body: bytes
    retry_after_s: float | None = None


Ask = Callable[[Line], Awaitable[Answer]]


class _Error(msgspec.Struct, frozen=True):
    message: str = ""
    code: str | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Error = _Error()


def wait_s(answer: Answer, n_tries: int) -> float | None:
    """How long to wait before the line is asked again; None where this is its answer."""
    if answer.status not in (429, 503, LEFT):
        return None
    if answer.status == 503 and _error(answer).code == "engine_dead" and n_tries >= MAX_TRIES:
        return None
    return min(answer.retry_after_s or RETRY_S, LONGEST_RETRY_S)


def _error(answer: Answer) -> _Error:
    try:
        return msgspec.json.decode(answer.body, type=_ErrorBody).error
    except msgspec.DecodeError:
        return _Error()


@asynccontextmanager
async def _always() -> AsyncIterator[None]:
    yield


class BatchRun:
    """One batch under way. ``stop`` ends it between two answers; cancelling :meth:`run` at once. Either way the journal
    has whatever was answered, and the next run goes on from there."""

    def __init__(
        self,
        lines: Iterator[Line],
        ask: Ask,
        journal: Journal,
        *,
        n_at_once: int,
        room: Callable[[Line], bool] = lambda line: True,
        slot: Callable[[], AbstractAsyncContextManager[None]] = _always,
        on_output: Callable[[Output, int], None] = lambda output, n_bytes: None,
    ) -> None:
        """``room``: whether that line may be asked now. ``slot``: held while one is. ``on_output``: each new line of
        the journal, with its bytes; what it raises ends the run."""
        self._lines = (line for line in lines if line.custom_id not in journal.done)
        self._ask, self._journal = ask, journal
        self._n_at_once, self._room, self._slot = n_at_once, room, slot
        self._on_output = on_output
        self._stopping = asyncio.Event()
        self._door = asyncio.Lock()
        """One at a time looks for room, however many wait for it."""
        self.n_running = 0
        self.waiting_because = ""
        """What the server says it lacks, while lines wait for it."""

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def stop(self) -> None:
        """Ask nothing more; what has been asked is waited for."""
        self._stopping.set()

    async def run(self) -> None:
        """Until every line has its answer, or it is stopped. Raises what asking or writing raises first."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._n_at_once):
                    group.create_task(self._work())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _work(self) -> None:
        while not self._stopping.is_set():
            line = next(self._lines, None)
            if line is None or not await self._settle(line):
                return

    async def _settle(self, line: Line) -> bool:
        """Ask until there is an answer, and write it; false where the run was stopped before."""
        n_tries = 0
        while (answer := await self._answer(line)) is not None:
            n_tries += 1
            pause_s = wait_s(answer, n_tries)
            if pause_s is None:
                self.waiting_because = ""
                output = answered(line.custom_id, answer.status, answer.request_id, answer.body)
                self._on_output(output, self._journal.append(output))
                return True
            self.waiting_because = _error(answer).message or f"status {answer.status}"
            if await self._stopped_within(pause_s):
                return False
        return False

    async def _answer(self, line: Line) -> Answer | None:
        """What comes when there is room for the line; None where the run was stopped before."""
        while not self._stopping.is_set():
            async with self._door:
                while not self._room(line):
                    if await self._stopped_within(ROOM_EVERY_S):
                        return None
            async with self._slot():
                if self._stopping.is_set() or not self._room(line):  # it may have been long until the slot was free
                    continue
                self.n_running += 1
                try:
                    return await self._ask(line)
                finally:
                    self.n_running -= 1
        return None

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return False
        return True
