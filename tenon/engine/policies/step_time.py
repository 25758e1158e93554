"""How long an engine's steps take by their rows: measured once at the start, corrected by every step that is run.

What is predicted is the time between two ticks: drafting, scheduling, computing, taking over. Steps that only decode and
steps with guesses are told apart, for the latter cost the scheduler more.

Shapes: K knots.
"""

from __future__ import annotations

from bisect import bisect_left
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
EVERY: Final = 16
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
        self._told: list[tuple[int, float, bool]] = []
        self._was_guessed, self._extra_s = False, 0.0
        self._after: deque[float] = deque(maxlen=RECENT)

    def plain(self, rows: int) -> float:
        """See :class:`tenon.engine.policies.speculate.Seconds`."""
        return float(np.interp(rows, self._knots, self._kinds[0].seconds))

    def guessed(self, rows: I64) -> F64:
        return np.interp(rows, self._knots, self._kinds[1].seconds)

    @property
    def arrays(self) -> tuple[F64, F64, F64]:
        """Knots, and seconds without and with guesses: the same arrays as long as it lives."""
        return self._knots, self._kinds[0].seconds, self._kinds[1].seconds

    def tell(self, rows: int, seconds: float, *, guessed: bool) -> None:
        """A step took so long. What one without guesses takes longer after one with them is the latter's cost."""
        if not guessed and self._was_guessed:
            self._after.append(seconds - self.plain(rows))
        else:
            self._told.append((rows, seconds, guessed))
        self._was_guessed = guessed
        if len(self._told) >= EVERY:
            for told in self._told:
                self._hear(*told)
            self._told.clear()
            for each in self._kinds:
                each.settle(self._log, self._base)
            self._borrow()
            if self._after:
                self._extra_s += RATE * (max(0.0, float(np.median(self._after))) - self._extra_s)
            self._kinds[1].seconds += self._extra_s

    def _hear(self, rows: int, seconds: float, guessed: bool) -> None:
        if not 0 < seconds < float("inf") or not 0 < rows <= KNOTS[-1]:
            return
        # The nearer knot hears of it, scaled to its own rows.
        k = bisect_left(KNOTS, rows)
        if k and rows - KNOTS[k - 1] < KNOTS[k] - rows:
            k -= 1
        scale = self._base[k] / float(np.interp(rows, self._knots, self._base))
        self._kinds[guessed].hear(k, seconds * scale)

    def _borrow(self) -> None:
        """What was never run with guesses costs as much more as what was run without."""
        plain, guessed = self._kinds
        if not guessed.is_seen and plain.is_seen:
            guessed.seconds[:] = plain.seconds
        elif not plain.is_seen and guessed.is_seen:
            plain.seconds[:] = guessed.seconds

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
        self._new: set[int] = set()

    @property
    def is_seen(self) -> bool:
        return not bool(np.isnan(self._ratio).all())

    def hear(self, k: int, seconds: float) -> None:
        self.recent[k].append(seconds)
        self._new.add(k)

    def settle(self, log_K: F64, base_K: F64) -> None:
        for k in self._new:
            ratio = float(np.median(self.recent[k])) / base_K[k]
            known = self._ratio[k]
            self._ratio[k] = ratio if np.isnan(known) else known + RATE * (ratio - known)
        self._new.clear()
        seen = ~np.isnan(self._ratio)
        if seen.any():
            ratio_K = np.interp(log_K, log_K[seen], self._ratio[seen])
            np.maximum.accumulate(base_K * ratio_K, out=self.seconds)
