"""A clock that a simulation moves: it stands still while code runs and never goes back."""

from __future__ import annotations

import math

from tenon.base.clock import ManualClock


class VirtualClock(ManualClock):
    """Seconds of virtual time. Everything that is handed this clock lives in the same simulation.

    Times that were computed once are set by ``advance_to``: adding their differences would round, and two events meant
    for the same moment would fall apart.
    """

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds``. Raises ``ValueError`` unless that is a finite number of at least 0."""
        if not math.isfinite(seconds):
            raise ValueError(f"a clock cannot move by {seconds} s")
        super().advance(seconds)

    def advance_to(self, at_s: float) -> None:
        """Move forward to ``at_s``. Raises ``ValueError`` where that is past or no finite number."""
        if not (math.isfinite(at_s) and at_s >= self._now_s):
            raise ValueError(f"a clock at {self._now_s} s cannot move to {at_s} s")
        self._now_s = at_s
