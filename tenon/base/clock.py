"""Time. The only module that reads the machine's clock; everything else is handed ``now_s``.

A ``Clock`` gives monotonic seconds for intervals and wall seconds for stamps. ``ManualClock`` is a clock
that a simulator or a test moves by hand; it ships because it is a real implementation, not a double.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now_s(self) -> float:
        """Monotonic seconds; only differences mean anything."""
        ...

    def wall_s(self) -> float:
        """Seconds since the epoch, for stamps that people read."""
        ...


class SystemClock:
    """The machine's clock."""

    def now_s(self) -> float:
        return time.perf_counter()

    def wall_s(self) -> float:
        return time.time()


class ManualClock:
    """A clock that stands still until it is moved. Both its times advance together."""

    def __init__(self, start_s: float = 0.0, *, epoch_s: float = 0.0) -> None:
        self._now_s = start_s
        self._offset_s = epoch_s - start_s

    def now_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._now_s + self._offset_s

    def advance(self, seconds: float) -> None:
        """Move forward; a negative step raises ``ValueError``, time never runs back."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back by {-seconds} s")
        self._now_s += seconds


SYSTEM = SystemClock()


def thread_cpu_s() -> float:
    """CPU seconds that this thread has used: work, whatever else runs on the machine."""
    return time.thread_time()


def sleep_s(seconds: float) -> None:
    """Block this thread."""
    time.sleep(seconds)
