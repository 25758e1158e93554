"""When a request would have its first token, and how soon others would follow, before anything is computed.

Steps go on as they are now: those who decode have their rows and guesses, prompts what a chunk has room for, first come
first. A newcomer has its first token when a slot is free, what is before it is computed, and its own rows are; after
that it decodes among all that will have come in by then.

What of that is systematically off is learned: a forecast is corrected by the average of what came of those before it.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tenon.engine.policies.speculate import Seconds, usual_s

LENGTHS: Final = 512
"""Of outputs that have ended, the newest, from which it is told how long running ones will be."""
FIRST_LENGTH: Final = 128
"""Tokens of an output before any has ended."""
RATE, RATE_AT_FIRST = 0.03, 0.2
"""Of the averages of what came of forecasts, in logarithms; at first, the fewer they are, up to the second ..."""
BOUND: Final = 4.0
"""... each of which counts as off by this factor at most, as does their average."""
WITHIN: Final = 0.2
"""A forecast that is no more off than this was right."""
RECENT: Final = 100
"""Forecasts whose share of right ones is the confidence; fewer at first."""
LEAST_KNOWN: Final = 5


@dataclass(frozen=True)
class Outlook:
    """An engine as it is. ``left``: tokens that each of those who decode is expected to get yet; ``rows_ahead``: of
    prompts that are being computed or wait; ``n_ahead``: who waits; ``chunk``: rows of prompts that a step takes beside
    its decodes; ``prompt_rows``: how many it has lately had, in the mean; ``per_step``: tokens that a sequence gets of
    a step; ``rows_each``: rows that it has in one; ``mean_decodes``: how many have lately decoded, in the mean;
    ``drafting_s``: what a draft model takes before a step."""

    left: Sequence[float]
    rows_ahead: int
    n_ahead: int
    n_slots: int
    chunk: int
    prompt_rows: float
    per_step: float = 1.0
    rows_each: float = 1.0
    mean_decodes: float | None = None
    drafting_s: float = 0.0

    @property
    def n_decodes(self) -> int:
        return len(self.left)

    def step_s(self, seconds: Seconds, n: int, prompt_rows: float) -> float:
        """Of ``n`` decodes and so many rows of prompts."""
        drafting_s = self.drafting_s if n else 0.0
        return drafting_s + usual_s(seconds, max(1, n), round(n * self.rows_each), round(prompt_rows))


@dataclass(frozen=True)
class Expected:
    """``ttft_s`` from now on, ``tpot_s`` of each token after; ``wait_s``: of that, until it comes in."""

    ttft_s: float
    tpot_s: float
    wait_s: float


def forecast(outlook: Outlook, rows: int, seconds: Seconds) -> Expected:
    """Of a request with so many rows to compute."""
    n = outlook.n_decodes
    per_token_s = outlook.step_s(seconds, n, outlook.prompt_rows) / outlook.per_step
    lacking = outlook.n_ahead + 1 - outlook.n_slots
    wait_s = 0.0
    if lacking > 0:
        ends = sorted(outlook.left)
        whole, rest = divmod(lacking - 1, max(1, len(ends)))
        # Whoever comes in for one that ends takes its place, for about as long.
        wait_s = per_token_s * (whole * (ends[-1] if ends else 0.0) + (ends[rest] if ends else 0.0))
    # Rows of who comes in while it waits are computed meanwhile, as far as there is time.
    done_s = _prompts_s(outlook, outlook.rows_ahead, seconds)
    own_s = _prompts_s(outlook, rows, seconds)
    ttft_s = max(wait_s, done_s) + own_s
    later = min(n + min(outlook.n_ahead, outlook.n_slots) + 1, n + max(1, outlook.n_slots))
    if outlook.mean_decodes is not None:  # a crowd does not last, nor does a lull
        later = round((later + max(1.0, outlook.mean_decodes)) / 2)
    tpot_s = outlook.step_s(seconds, later, outlook.prompt_rows) / outlook.per_step
    return Expected(ttft_s, tpot_s, wait_s)


def _prompts_s(outlook: Outlook, rows: int, seconds: Seconds) -> float:
    """Steps that compute so many rows of prompts."""
    whole, rest = divmod(rows, outlook.chunk)
    n = outlook.n_decodes
    taken_s = outlook.step_s(seconds, n, rest) if rest else 0.0
    return taken_s + (whole * outlook.step_s(seconds, n, outlook.chunk) if whole else 0.0)


class Lengths:
    """Outputs that have ended, and what they say of those that have not."""

    def __init__(self) -> None:
        self._order: deque[int] = deque()
        self._sorted: list[int] = []

    def add(self, n_tokens: int) -> None:
        self._order.append(n_tokens)
        insort(self._sorted, n_tokens)
        if len(self._order) > LENGTHS:
            self._sorted.pop(bisect_right(self._sorted, self._order.popleft()) - 1)

    def left(self, n_tokens: int, most: int) -> float:
        """Tokens that an output of so many is expected to get yet, of ``most`` that it may have in all."""
        longer = self._sorted[bisect_right(self._sorted, n_tokens) :]
        mean = sum(longer) / len(longer) - n_tokens if longer else max(1.0, FIRST_LENGTH - n_tokens)
        return min(mean, most - n_tokens)


class Learned:
    """What came of forecasts of one kind."""

    def __init__(self) -> None:
        self._log, self._n = 0.0, 0
        self._right: deque[bool] = deque(maxlen=RECENT)

    @property
    def factor(self) -> float:
        """What to multiply a forecast with."""
        return math.exp(self._log)

    @property
    def confidence(self) -> float | None:
        """Share of forecasts that were right; None where too few have come true or not."""
        return sum(self._right) / len(self._right) if len(self._right) >= LEAST_KNOWN else None

    def hear(self, told_s: float, factor: float, came_s: float) -> None:
        """What was told, ``factor`` times what an engine's state said, and what came. It is long since it was told: so
        what is learned is the average of what would have been right, not a step from what is thought by now."""
        if not (0 < told_s < math.inf and 0 < came_s < math.inf):
            return
        self._right.append(abs(told_s / came_s - 1) <= WITHIN)
        most = math.log(BOUND)
        off = max(-most, min(most, math.log(came_s / (told_s / factor))))
        self._n += 1
        self._log += min(RATE_AT_FIRST, max(RATE, 1 / self._n)) * (off - self._log)
