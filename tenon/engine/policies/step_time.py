"""How long an engine's steps take by their rows: measured once at the start, corrected by every step that is run.

What is predicted is the time between two ticks: drafting, scheduling, computing, taking over. Of a step that only
decodes it is what was measured of so many rows, as observed since; of one with guesses that of the same sequences
without them, and

    extra = fixed + slope (measured(all rows) - measured(sequences))

whose two numbers are fitted to what was observed: trees cost the scheduler something however small they are. What all
steps have in common, a machine that is slower for a while, is followed quickly; what a number of rows costs over others
slowly. A step with guesses is never thought to take less than the one without.

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


PROMPT_BOUND: Final = 4.0
"""What a prompt's rows add is thought to be so much, at most, of what others do; or so much less."""


class StepTimes:
    """``measured`` has seconds by rows, at least of one number of them: then a row costs as much as many."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        rows = np.array(sorted(measured), np.float64)
        seconds = np.maximum.accumulate(np.array([measured[int(r)] for r in rows]))
        self._knots = np.array(KNOTS, np.float64)
        base = np.interp(self._knots, rows, seconds)
        if len(rows) > 1:  # beyond what was measured the last slope goes on
            slope = max(0.0, (seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2]))
            base = np.where(self._knots > rows[-1], seconds[-1] + slope * (self._knots - rows[-1]), base)
        self._base = base
        self._plain = _Plain(base)
        self._extra = _Extra(base)
        self._speed = 1.0
        """What steps take now over what they took when they were measured."""
        self._after_s = 0.0
        """What a step with guesses makes the next one take longer."""
        self._after: deque[float] = deque(maxlen=RECENT)
        self._told: list[tuple[int, float]] = []
        self._drifts: list[float] = []
        self._was_guessed = False
        self._prompt = 1.0
        """What a prompt's rows add over what as many others do."""
        self._prompts: deque[float] = deque(maxlen=RECENT)

    def plain(self, rows: int) -> float:
        """See :class:`tenon.engine.policies.speculate.Seconds`."""
        return _at(rows, self._plain.seconds)

    def plain_of(self, rows: I64) -> F64:
        """``plain`` of several."""
        return np.interp(rows, self._knots, self._plain.seconds)

    def known(self, n: int) -> bool:
        """Whether steps of about so many sequences were seen without guesses: what these add cannot be told before."""
        return self._plain.known(_nearest(n))

    def guessed(self, n: int, rows: I64) -> F64:
        fixed, slope = self._extra.now.tolist()
        grown = np.interp(rows, self._knots, self._base) - _at(n, self._base)
        return np.asarray(self.plain(n) + fixed + slope * grown)

    def mixed(self, n: int, rows: I64, prompt_rows: int) -> F64:
        """``guessed``, of steps that compute so many rows of prompts besides."""
        return self.guessed(n, rows) + self.prompts(rows, prompt_rows) if prompt_rows else self.guessed(n, rows)

    def prompts(self, rows: I64, prompt_rows: int) -> F64:
        """What so many rows of prompts add to steps of so many others."""
        grown = np.interp(rows + prompt_rows, self._knots, self._base) - np.interp(rows, self._knots, self._base)
        return np.asarray(self._speed * self._prompt * grown)

    def tell_mixed(self, n: int, all_rows: int, prompt_rows: int, seconds: float) -> None:
        """A step of ``n`` sequences that decode, ``prompt_rows`` of whose rows were of prompts, took so long."""
        self._was_guessed = False
        rows = all_rows - prompt_rows
        if not (0 < seconds < float("inf") and 0 < n <= rows < all_rows <= KNOTS[-1]):
            return
        grown = self._speed * (_at(all_rows, self._base) - _at(rows, self._base))
        without_s = float(self.guessed(n, np.array([rows]))[0])
        if grown > 0:
            self._prompts.append(min(max((seconds - without_s) / grown, 1 / PROMPT_BOUND), PROMPT_BOUND))
            if len(self._prompts) > RECENT // 2:
                self._prompt += RATE * (float(np.median(self._prompts)) - self._prompt)

    @property
    def arrays(self) -> tuple[F64, F64, F64, F64]:
        """Knots, seconds without guesses, as measured at the start, and the two numbers of ``extra``: the same arrays
        as long as it lives."""
        return self._knots, self._plain.seconds, self._base, self._extra.now

    def tell(self, n: int, rows: int, seconds: float) -> None:
        """A step of ``n`` sequences and so many rows took so long. What one without guesses takes longer after one with
        them is the latter's cost."""
        was_guessed, self._was_guessed = self._was_guessed, rows > n
        if not (0 < seconds < float("inf") and 0 < n <= rows <= KNOTS[-1]):
            return
        plain_s = self.plain(n)
        if rows > n:
            if not was_guessed:
                seconds += self._after_s  # one that follows its like has the other's cost in it
            grown = _at(rows, self._base) - _at(n, self._base)
            fixed, slope = self._extra.now.tolist()
            predicted_s = plain_s + fixed + slope * grown
            near_s = min(max(seconds, predicted_s / 2), 2 * predicted_s)
            if self.known(n):
                self._extra.hear(grown, (near_s - plain_s) / self._speed)
                self._extra.settle(self._speed)
                self._drifts.append(seconds / predicted_s)
        elif was_guessed:
            self._after.append(seconds - plain_s)
            return
        else:
            self._told.append((rows, seconds))
            self._drifts.append(seconds / plain_s)
        if len(self._drifts) >= EVERY or (len(self._told) > RECENT // 2 and not self.known(n)):
            self._settle()

    def _settle(self) -> None:
        self._speed *= float(np.median(self._drifts)) ** RATE
        self._extra.forget(len(self._drifts))
        self._drifts.clear()
        for rows, seconds in self._told:
            # The nearer knot hears of it, scaled to its own rows.
            self._plain.hear(_nearest(rows), seconds / (self._speed * _at(rows, self._base)))
        self._told.clear()
        if self._after:
            self._after_s += RATE * (max(0.0, float(np.median(self._after))) - self._after_s)
        self._speed *= self._plain.in_common()
        self._plain.settle(self._speed)
        self._extra.settle(self._speed)


def _at(rows: int, seconds_K: F64) -> float:
    """Linear between knots: numpy's interp of one number, in a third of the time."""
    k = bisect_left(KNOTS, rows)
    if k == len(KNOTS) or KNOTS[k] == rows or k == 0:
        return seconds_K.item(min(k, len(KNOTS) - 1))
    low, high = seconds_K.item(k - 1), seconds_K.item(k)
    return low + (high - low) * (rows - KNOTS[k - 1]) / (KNOTS[k] - KNOTS[k - 1])


def _nearest(rows: int) -> int:
    """The number of the knot."""
    k = bisect_left(KNOTS, rows)
    return k - 1 if k and rows - KNOTS[k - 1] < KNOTS[k] - rows else k


class _Plain:
    """Steps without guesses: what they take over what is expected of so many rows, at each knot that was seen."""

    def __init__(self, base: F64) -> None:
        self.seconds = base.copy()
        self._base, self._log = base, np.log(np.array(KNOTS, np.float64))
        self._recent: list[deque[float]] = [deque(maxlen=RECENT) for _ in KNOTS]
        self._ratio = np.full(len(KNOTS), np.nan)
        self._new: set[int] = set()

    def hear(self, k: int, ratio: float) -> None:
        self._recent[k].append(ratio)
        self._new.add(k)

    def known(self, k: int) -> bool:
        """Whether it was seen, or the next smaller or larger one."""
        return not np.isnan(self._ratio[max(0, k - 1) : k + 2]).all()

    def in_common(self) -> float:
        """Take over what was heard. Returns what all ratios have in common, which they are without from now on: it is
        the machine's, and so holds of what was not seen too."""
        for k in self._new:
            if len(self._recent[k]) <= RECENT // 2:  # of two, nobody can say which is the outlier
                continue
            ratio, known = float(np.median(self._recent[k])), self._ratio[k]
            self._ratio[k] = ratio if np.isnan(known) else known + RATE * (ratio - known)
        self._new.clear()
        seen = ~np.isnan(self._ratio)
        if not seen.any():
            return 1.0
        common = float(np.exp(np.log(self._ratio[seen]).mean()))
        if abs(common - 1) < 0.02:
            return 1.0
        self._ratio /= common
        for recent in self._recent:
            for _ in range(len(recent)):
                recent.append(recent.popleft() / common)
        return common

    def settle(self, speed: float) -> None:
        """Predict from now on by what was taken over, at this speed."""
        seen = ~np.isnan(self._ratio)
        ratio_K = np.interp(self._log, self._log[seen], self._ratio[seen]) if seen.any() else 1.0
        np.maximum.accumulate(speed * self._base * ratio_K, out=self.seconds)


class _Extra:
    """What guesses add to a step, fitted by least squares over what was observed, the older the less."""

    MEMORY: Final = 0.99
    """What is left of an observation's weight after one more step of any kind: where guesses are not worth it for long,
    it is forgotten how dear they were, and they are tried again."""
    FIRST: Final = 0.4
    MOST_FIRST_S: Final = 0.5e-3
    """Before anything is observed the fixed part is so much of the shortest step, and at most so long."""
    PRIOR: Final = 8.0
    """Observations that what is thought at first weighs as much as: the first ones are seldom typical."""
    LEAST_SLOPE: Final = 0.1

    def __init__(self, base: F64) -> None:
        self._first_s = min(self.FIRST * float(base[0]), self.MOST_FIRST_S)
        self._unit_s = max(float(base[5] - base[0]), 0.01 * float(base[0]))
        """What rows are counted in: seven more than one."""
        self._sums = [0.0] * 5
        """Of weights: 1, x, x x, y, x y."""
        self.now = np.array([self._first_s, 1.0])
        """The fixed part, in seconds, and the slope."""

    def hear(self, grown_s: float, extra_s: float) -> None:
        """Both in seconds at the speed of the start."""
        x = grown_s / self._unit_s
        for i, term in enumerate((1.0, x, x * x, extra_s, x * extra_s)):
            self._sums[i] += term

    def forget(self, n_steps: int) -> None:
        """So many steps have passed."""
        left = self.MEMORY**n_steps
        self._sums = [left * term for term in self._sums]

    def settle(self, speed: float) -> None:
        n, x, xx, y, xy = self._sums
        n, xx = n + self.PRIOR, xx + self.PRIOR
        y, xy = y + self.PRIOR * self._first_s, xy + self.PRIOR * self._unit_s
        slope = max((n * xy - x * y) / (n * xx - x * x), self.LEAST_SLOPE * self._unit_s)
        fixed = (y - slope * x) / n
        if fixed < 0:
            fixed, slope = 0.0, max(xy / xx, self.LEAST_SLOPE * self._unit_s)
        self.now[:] = speed * fixed, speed * slope / self._unit_s
