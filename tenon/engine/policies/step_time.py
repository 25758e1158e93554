"""How long an engine's steps take by their rows: measured once at the start, corrected by every step that is run.

What is predicted is the time between two ticks: drafting, scheduling, computing, taking over. Steps that only decode and
steps with guesses are told apart, for the latter cost the scheduler more.

Shapes: K knots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

KNOTS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
"""Rows between which times are interpolated."""
RECENT: Final = 5
"""Steps whose median enters an average."""
RATE: Final = 0.2
EVERY: Final = 8
"""Steps after which what was seen enters the prediction."""


class StepTimes:
    """Until anything is measured a row costs as much as all of them: ``measured`` has seconds by rows, at least one."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        rows = np.array(sorted(measured), np.float64)
        seconds = np.maximum.accumulate(np.array([measured[int(r)] for r in rows]))
        self._log = np.log(np.array(KNOTS, np.float64))
        knots = np.array(KNOTS, np.float64)
        base = np.interp(knots, rows, seconds)
        if len(rows) > 1:  # beyond what was measured the last slope goes on
            slope = max(0.0, (seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2]))
            base = np.where(knots > rows[-1], seconds[-1] + slope * (knots - rows[-1]), base)
        self._knots, self._base = knots, base
        self._kinds = (_Kind(base), _Kind(base))
        self._n = 0

    def plain(self, rows: int) -> float:
        """See :class:`tenon.engine.policies.speculate.Seconds`."""
        return float(np.interp(rows, self._knots, self._kinds[0].seconds))

    def guessed(self, rows: I64) -> F64:
        return np.interp(rows, self._knots, self._kinds[1].seconds)

    def tell(self, rows: int, seconds: float, *, guessed: bool) -> None:
        """A step took so long."""
        if not 0 < seconds < float("inf") or not 0 < rows <= KNOTS[-1]:
            return
        k = int(np.searchsorted(self._knots, rows))
        kind = self._kinds[guessed]
        # The nearer knot hears of it, scaled to its own rows.
        if k and rows - self._knots[k - 1] < self._knots[k] - rows:
            k -= 1
        scale = self._base[k] / float(np.interp(rows, self._knots, self._base))
        kind.recent[k].append(seconds * scale)
        self._n += 1
        if self._n % EVERY == 0:
            for each in self._kinds:
                each.settle(self._log, self._base)
            self._borrow()

    def _borrow(self) -> None:
        """What was never run with guesses costs as much more as what was run without."""
        plain, guessed = self._kinds
        if not guessed.is_seen and plain.is_seen:
            guessed.seconds = plain.seconds.copy()
        elif not plain.is_seen and guessed.is_seen:
            plain.seconds = guessed.seconds.copy()

    def table(self) -> list[tuple[int, float, float, float]]:
        """Rows; seconds as measured at the start, and as they are now without and with guesses."""
        plain, guessed = (kind.seconds.tolist() for kind in self._kinds)
        return list(zip(KNOTS, self._base.tolist(), plain, guessed, strict=True))


class _Kind:
    """Of one kind of steps: what they take over what was measured at the start, at each knot that was seen."""

    def __init__(self, base: F64) -> None:
        self.seconds = base.copy()
        self.recent: list[deque[float]] = [deque(maxlen=RECENT) for _ in KNOTS]
        self._ratio = np.full(len(KNOTS), np.nan)

    @property
    def is_seen(self) -> bool:
        return not bool(np.isnan(self._ratio).all())

    def settle(self, log_K: F64, base_K: F64) -> None:
        for k, recent in enumerate(self.recent):
            if recent:
                ratio = float(np.median(recent)) / base_K[k]
                known = self._ratio[k]
                self._ratio[k] = ratio if np.isnan(known) else known + RATE * (ratio - known)
                recent.clear()
        seen = ~np.isnan(self._ratio)
        if seen.any():
            ratio_K = np.interp(log_K, log_K[seen], self._ratio[seen])
            self.seconds = np.maximum.accumulate(base_K * ratio_K)
