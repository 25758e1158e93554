"""How long an engine's steps take by their rows: measured once at the start, corrected by every step that is run.

What is predicted is the time between two ticks: drafting, scheduling, computing, taking over. Steps that only decode
and steps with guesses are told apart, for the latter cost the scheduler more. What all steps have in common, a machine
that is slower for a while, is followed quickly; what a number of rows costs over others slowly.

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
"""Steps of a kind and of so many rows whose median enters an average."""
RATE: Final = 0.2
EVERY: Final = 16
"""Steps looked at after which what was seen enters the prediction."""


class StepTimes:
    """``measured`` has seconds by rows, at least of one number of them: then a row costs as much as many."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        rows = np.array(sorted(measured), np.float64)
        seconds = np.maximum.accumulate(np.array([measured[int(r)] for r in rows]))
        self._knots = np.array(KNOTS, np.float64)
        self._log = np.log(self._knots)
        base = np.interp(self._knots, rows, seconds)
        if len(rows) > 1:  # beyond what was measured the last slope goes on
            slope = max(0.0, (seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2]))
            base = np.where(self._knots > rows[-1], seconds[-1] + slope * (self._knots - rows[-1]), base)
        self._base = base
        self._kinds = (_Kind(base), _Kind(base))
        """Of steps without and with guesses."""
        self._speed = 1.0
        """What steps take now over what they took when they were measured."""
        self._extra_s = 0.0
        """What a step with guesses makes the next one take longer."""
        self._after: deque[float] = deque(maxlen=RECENT)
        self._told: list[tuple[int, float, bool]] = []
        self._was_guessed = False

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
        was_guessed, self._was_guessed = self._was_guessed, guessed
        if was_guessed and not guessed:
            self._after.append(seconds - self.plain(rows))
            return
        if guessed and not was_guessed:
            seconds += self._extra_s  # one that follows its like has the other's cost in it
        self._told.append((rows, seconds, guessed))
        if len(self._told) >= EVERY:
            self._settle()

    def _settle(self) -> None:
        told = [(r, s, g) for r, s, g in self._told if 0 < s < float("inf") and 0 < r <= KNOTS[-1]]
        self._told.clear()
        if not told:
            return
        predicted = [float(np.interp(r, self._knots, self._kinds[g].seconds)) for r, _, g in told]
        drift = float(np.median([s / p for (_, s, _), p in zip(told, predicted, strict=True)]))
        self._speed *= drift**RATE
        for rows, seconds, guessed in told:
            # The nearer knot hears of it, scaled to its own rows.
            k = bisect_left(KNOTS, rows)
            if k and rows - KNOTS[k - 1] < KNOTS[k] - rows:
                k -= 1
            own = seconds - self._extra_s * guessed
            self._kinds[guessed].hear(k, own / (self._speed * float(np.interp(rows, self._knots, self._base))))
        if self._after:
            self._extra_s += RATE * (max(0.0, float(np.median(self._after))) - self._extra_s)
        ratios = [kind.ratios(self._log) for kind in self._kinds]
        for i, kind in enumerate(self._kinds):
            ratio_K = ratios[i] if ratios[i] is not None else ratios[1 - i]
            if ratio_K is not None:
                np.maximum.accumulate(self._speed * self._base * ratio_K, out=kind.seconds)
        self._kinds[1].seconds += self._extra_s

    def table(self) -> list[tuple[int, float, float, float]]:
        """Rows; seconds as measured at the start, and as they are now without and with guesses."""
        plain, guessed = (kind.seconds.tolist() for kind in self._kinds)
        return list(zip(KNOTS, self._base.tolist(), plain, guessed, strict=True))


class _Kind:
    """Of one kind of steps: what they take over what is expected of so many rows, at each knot that was seen."""

    def __init__(self, base: F64) -> None:
        self.seconds = base.copy()
        self._recent: list[deque[float]] = [deque(maxlen=RECENT) for _ in KNOTS]
        self._ratio = np.full(len(KNOTS), np.nan)
        self._new: set[int] = set()

    def hear(self, k: int, ratio: float) -> None:
        self._recent[k].append(ratio)
        self._new.add(k)

    def ratios(self, log_K: F64) -> F64 | None:
        """Of all knots, between those that were seen; None where none was."""
        for k in self._new:
            if len(self._recent[k]) <= RECENT // 2:  # of two, nobody can say which is the outlier
                continue
            ratio, known = float(np.median(self._recent[k])), self._ratio[k]
            self._ratio[k] = ratio if np.isnan(known) else known + RATE * (ratio - known)
        self._new.clear()
        seen = ~np.isnan(self._ratio)
        return np.interp(log_K, log_K[seen], self._ratio[seen]) if seen.any() else None
