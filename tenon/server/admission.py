"""Whether there is room for another request: in flight, in the queue, in memory.

Memory is short from ``memory_shed`` of its bound on. Between that and ``memory_reject`` the number of sequences that
may be in flight shrinks from all to none, lines of batches wait, files are not taken, and what is kept for later is
dropped; from there on no request's body is read. What is in flight goes on. Bodies on their way count by themselves,
for many large ones can come between two looks at the memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
from collections.abc import Callable, Sequence
from typing import Final

from starlette.requests import Request

from tenon.base.machine import MACHINE, MemoryBound, memory_bounds
from tenon.server.backlog import Backlog, retry_after_s
from tenon.server.failures import Refusal
from tenon.server.limits import Limits, read_body

LOOK_EVERY_S: Final = 0.25
SHORT_LOOK_EVERY_S: Final = 0.05
"""While memory is short."""
SMALL_BODY_BYTES: Final = 64 * 2**10
"""A body of no more is read however many others are on their way."""
BODY_COPIES: Final = 8
"""So many times its size a body may take until its request is on its way or refused."""
MEMORY_RETRY_S: Final = 2.0
CALM: Final = 0.98
"""Below this share of where it begins to be short, it is no longer: one warning, not one a second."""
DROP_EVERY_S: Final = 10.0
UNBOUNDED: Final = MemoryBound(2**60, 0)

_log = logging.getLogger("tenon.server")


class BodyRefused(Refusal):
    """A request whose body is not read, or not to its end, for lack of memory (HTTP 503)."""

    def __init__(self, said: str) -> None:
        super().__init__(said, status=503, code="overloaded", retry_after_s=MEMORY_RETRY_S)


class Admission:
    """Asked before a request is read and before it is handed to the engine. ``limits`` may be replaced at any time."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.backlog = Backlog()
        self.memory = UNBOUNDED
        """The bound that is the nearest, as last seen."""
        self.body_bytes = 0
        """Of bodies on their way."""

    @property
    def memory_share(self) -> float:
        """Of the nearest bound, in use."""
        return self.memory.used / self.memory.limit

    @property
    def pressure(self) -> float:
        """0 with memory to spare, 1 where nothing more is taken."""
        limits, most = self.limits, self.memory.limit
        shed, reject = int(limits.memory_shed * most), int(limits.memory_reject * most)
        return min(1.0, max(0.0, (self.memory.used - shed) / (reject - shed)))

    def use(self, bounds: Sequence[MemoryBound]) -> None:
        """The memory is so now; without any bound there is no pressure."""
        most = self.limits.machine_bytes
        counted = [
            MemoryBound(most, max(0, most - bound.left), bound.of)
            if bound.of == MACHINE and bound.limit > most
            else bound
            for bound in bounds
        ]
        self.memory = max(counted, key=lambda bound: bound.used / bound.limit, default=UNBOUNDED)

    def memory_is_short_because(self) -> str | None:
        """What to say where nothing is taken for lack of memory, or ``None``."""
        return None if self.pressure < 1 else f"memory is short: {self._memory_said()}"

    def require_spare_memory(self) -> None:
        """For what can wait. Raises ``BodyRefused`` where requests are already shed."""
        if self.pressure > 0:
            raise BodyRefused(f"memory is short: {self._memory_said()}")

    @property
    def _headroom(self) -> int:
        """Bytes until nothing is taken."""
        return max(0, int(self.limits.memory_reject * self.memory.limit) - self.memory.used)

    async def read(self, request: Request) -> bytes:
        """The whole body. Raises ``BodyTooLarge``, ``BodyRefused`` where memory lacks, and ``RequestError`` where the
        client leaves."""
        own = 0

        def grow(n_bytes: int) -> None:
            nonlocal own
            if said := self.memory_is_short_because():
                raise BodyRefused(said)
            bound = min(self.limits.all_bodies_bytes, self._headroom // BODY_COPIES)
            if own + n_bytes > SMALL_BODY_BYTES and self.body_bytes + n_bytes > bound:
                said = f"{(self.body_bytes + n_bytes) / 2**20:.0f} MiB of requests are coming in"
                raise BodyRefused(f"{said}, and there is memory for {bound / 2**20:.0f} MiB")
            own += n_bytes
            self.body_bytes += n_bytes

        length = request.headers.get("content-length")
        try:
            grow(0)
            return await read_body(request.receive, length, self.limits.body_bytes, grow)
        finally:
            self.body_bytes -= own

    def require_room(self, n_new: int, n_open: int, wait_s: float) -> None:
        """Room for ``n_new`` sequences beside ``n_open`` others where a request would wait ``wait_s`` for its turn.

        Raises ``Refusal``: 429 where it would be too many or too long, 503 where memory is what lacks.
        """
        most = round(self.limits.max_in_flight * (1 - self.pressure))
        said = ""
        if n_open + n_new > self.limits.max_in_flight:
            said = f"{n_open} sequences are in flight and the limit is {self.limits.max_in_flight}"
        elif n_open + n_new > most:
            said = f"memory is short: {self._memory_said()}, and {n_open} sequences are in flight"
            raise Refusal(said, status=503, code="overloaded", retry_after_s=MEMORY_RETRY_S)
        elif wait_s > self.limits.max_wait_s:
            said = f"a request would wait {wait_s:.1f} s for its turn and the limit is {self.limits.max_wait_s:g} s"
        if said:
            after_s = retry_after_s(wait_s)
            raise Refusal(f"{said}; try again later", status=429, code="rate_limit_exceeded", retry_after_s=after_s)

    def has_room(self, n_new: int, n_before: int, n_waiting: int) -> bool:
        """Whether ``n_new`` sequences would neither wait nor take what others may need soon; where there are no others,
        whether there is memory."""
        fits = n_before + n_new <= self.limits.max_in_flight // 2 or n_before == 0
        return self.pressure == 0 and n_waiting == 0 and fits

    def _memory_said(self) -> str:
        return f"{self.memory.left / 2**20:.0f} MiB are left"

    @property
    def is_calm(self) -> bool:
        """Whether it is not near to being short."""
        return self.memory_share < CALM * self.limits.memory_shed


class MemoryWatch:
    """Looks at the memory again and again, and has ``drop`` called while it is short, but not all the time."""

    def __init__(
        self, admission: Admission, drop: Callable[[], None], read: Callable[[], list[MemoryBound]] = memory_bounds
    ) -> None:
        self._admission, self._drop, self._read = admission, drop, read
        self._was_short = False
        self._n_looks = 0

    async def run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(SHORT_LOOK_EVERY_S if self._was_short else LOOK_EVERY_S)

    def look(self) -> None:
        admission = self._admission
        admission.use(self._read())
        is_short = admission.pressure > 0 or (self._was_short and not admission.is_calm)
        if is_short != self._was_short:
            self._n_looks = 0
            memory = admission.memory
            said = f"{memory.used >> 20} of {memory.limit >> 20} MiB of {memory.of} are in use"
            _log.warning("memory is %s: %s", "short" if is_short else "no longer short", said)
        if is_short and self._n_looks % int(DROP_EVERY_S / SHORT_LOOK_EVERY_S) == 0:
            self._drop()
            release_memory()
        self._was_short = is_short
        self._n_looks += 1


def release_memory() -> None:
    """Give what is free back to the system, as far as the C library can."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
