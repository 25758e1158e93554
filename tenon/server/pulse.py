"""The engine process's pulse: a counter in memory that both processes see.

A thread of the engine counts on while the process runs, however long a step takes. It stands still when the process is
stopped, or hangs where no other thread gets a turn; no socket and no event loop has to work for that to be seen.
"""

from __future__ import annotations

import mmap
import os
import struct
from threading import Event, Thread
from typing import Final

BEAT_S: Final = 0.2
_COUNT = struct.Struct("<Q")


class Pulse:
    """One end of it. ``fd`` is inherited by the engine; both ends are closed."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("tenon-pulse")
            os.ftruncate(fd, _COUNT.size)
        self.fd = fd
        self._memory = mmap.mmap(fd, _COUNT.size)
        self._stop = Event()

    def count(self) -> int:
        """How often it has beaten."""
        beats: int = _COUNT.unpack_from(self._memory)[0]
        return beats

    def beat(self) -> None:
        """Count on, in a thread of its own, until the process ends or this end is closed."""
        Thread(target=self._beat, name="pulse", daemon=True).start()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            _COUNT.pack_into(self._memory, 0, self.count() + 1)

    def close(self) -> None:
        self._stop.set()
        self._memory.close()
        os.close(self.fd)
