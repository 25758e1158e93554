"""How many rows of prompts a step computes beside its decodes (AsymCache, arXiv 2606.02964, §5.1).

    Fixed        as many as the step has room for
    Threshold    the paper's rule: fewer as soon as more than a threshold of sequences decode, down to a floor
    Adaptive     ours: the most with which the predicted step ends within the target for the time between tokens
    Patient      ours: the most that leave those who are promised so many seconds a token in time

A policy knows neither clock nor scheduler: what a step holds is handed in as :class:`Load`, how long steps of a shape
take is a :class:`Model`, and whoever measures a step tells both. Cutting a prompt otherwise never changes what is
answered (AsymCache §4.1: chunks are taken in position order).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, Protocol

from tenon.cost.work import PIECE_ROWS, StepShape, with_run
from tenon.engine.policies.slo import Claims, patience

StepSeconds = Callable[[StepShape], float]
"""Predicted seconds of a step, the engine's own time included. Must not fall when a shape grows."""

MARGIN: Final = 0.05
"""Of the target, what is kept back: the error of a corrected prediction."""
CANDIDATES: Final = 64
"""Counts that are told apart at most: a bisection then asks for six predictions, and one for the largest."""
THRESHOLD: Final = 16
"""Decodes up to which ``Threshold`` reduces nothing. The paper gives no number; this is ours."""
RATE: Final = 0.2
"""Of an exponential average: how far it goes towards what is measured."""
RECENT: Final = 5
"""Measurements whose median enters an average: up to two that are far off change nothing."""
BOUND: Final = 4.0
"""A prediction is corrected by this factor at most, either way."""


@dataclass(frozen=True)
class Limits:
    """Rows between ``least`` (C_min) and ``most`` (C_max), counted in tiles; seconds between tokens that are aimed at.

    Where there are more than ``CANDIDATES`` tiles of ``PIECE_ROWS`` rows, a tile is several of them.
    """

    least: int
    most: int
    target_s: float = inf

    @property
    def tile(self) -> int:
        return PIECE_ROWS * -(-self.most // (PIECE_ROWS * CANDIDATES))


@dataclass(frozen=True)
class Promised:
    """``claims`` of those who decode, tokens that the step brings each of them, and what it takes with so many rows of
    prompts besides; of prompts, (seconds until the first token is due, rows to compute)."""

    claims: Claims | None
    brought: float
    seconds_of: Callable[[int], float]
    due: Sequence[tuple[float, int]] = ()


Run = tuple[int, int, int]
"""(start, n, outputs): positions [start, start + n) to compute, and how many tokens are sampled from the last one."""


class Load:
    """What the next step holds: its decodes as sums, and the runs that prompts have to compute, in the step's order."""

    def __init__(
        self,
        decodes: StepShape,
        runs: Iterable[Run],
        windows: Sequence[int | None],
        promised: Promised | None = None,
    ) -> None:
        self.decodes = decodes
        self.promised = promised
        self._runs, self._windows = list(runs), windows
        self._shapes = [decodes]
        self._ends = [0]

    @property
    def n_decodes(self) -> int:
        return self.decodes.spans

    def shape(self, rows: int) -> StepShape:
        """Of the step with the first ``rows`` of the runs, or with all where they have fewer. Sums over whole runs are
        kept, so a further question costs one run."""
        while self._ends[-1] < rows and len(self._shapes) <= len(self._runs):
            start, n, outputs = self._runs[len(self._shapes) - 1]
            self._shapes.append(with_run(self._shapes[-1], start, n, self._windows, outputs))
            self._ends.append(self._ends[-1] + n)
        i = bisect_left(self._ends, rows)
        if i == len(self._ends):
            return self._shapes[-1]
        if self._ends[i] == rows:
            return self._shapes[i]
        start, _, _ = self._runs[i - 1]
        return with_run(self._shapes[i - 1], start, rows - self._ends[i - 1], self._windows)


class Model(Protocol):
    """Predicts steps, and learns from how long they took."""

    every_step: bool
    """Whether it is to be told of steps without rows of prompts, too."""

    def __call__(self, shape: StepShape) -> float:
        """Seconds of a step; infinite where that cannot be said yet."""
        ...

    def tell(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took so long."""
        ...


class Corrected:
    """A predictor times what steps lately took over what it said: the average of medians, within ``BOUND``.

    Only steps with rows of prompts count: they are the ones that are decided about, and a simulation that counts
    through its decodes without an engine comes to the same correction.
    """

    every_step = False

    def __init__(self, step_s: StepSeconds) -> None:
        self._step_s = step_s
        self._recent: deque[float] = deque(maxlen=RECENT)
        self.ratio = 1.0

    def __call__(self, shape: StepShape) -> float:
        return self.ratio * self._step_s(shape)

    def tell(self, shape: StepShape, seconds: float) -> None:
        predicted = self._step_s(shape)
        if not (0 < predicted < inf and 0 < seconds < inf):
            return
        self._recent.append(seconds / predicted)
        if len(self._recent) > RECENT // 2:  # of two, nobody can say which is the outlier
            seen = min(max(_median(self._recent), 1 / BOUND), BOUND)
            self.ratio *= (seen / self.ratio) ** RATE


class Learned:
    """A line through measured steps, for a machine that nobody calibrated: seconds = a + b (rows - r).

    (r, a) is the average step of decodes alone, b the average slope from there to steps with rows of prompts; of both,
    medians enter. Nothing is said before the first slopes are known, nor of more than twice the rows that were
    measured, so chunks begin at their floor and at most double. Contexts do not enter: the line follows them as
    they grow.
    """

    every_step = True

    def __init__(self) -> None:
        self._rows, self._anchor, self._slope = _Average(), _Average(), _Average()
        self._most = 0

    def __call__(self, shape: StepShape) -> float:
        slope = self._slope.value
        if slope is None or shape.rows > 2 * self._most:
            return inf
        rows, seconds = self._rows.value or 0.0, self._anchor.value or 0.0
        return seconds + slope * max(0.0, shape.rows - rows)

    def tell(self, shape: StepShape, seconds: float) -> None:
        if not 0 < seconds < inf:
            return
        if shape.rows == shape.spans:
            self._rows.tell(float(shape.rows))
            self._anchor.tell(seconds)
            return
        rows, anchor = self._rows.value or 0.0, self._anchor.value or 0.0
        if shape.rows > rows:
            self._slope.tell(max(0.0, seconds - anchor) / (shape.rows - rows))
            self._most = max(self._most, shape.rows)


class _Average:
    """An exponential average of the median of recent values; None before there are enough for a median."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self.value: float | None = None

    def tell(self, value: float) -> None:
        self._recent.append(value)
        if len(self._recent) > RECENT // 2:
            seen = _median(self._recent)
            self.value = seen if self.value is None else self.value + RATE * (seen - self.value)


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


class Chunk(Protocol):
    """Decides how many rows of prompts a step has."""

    @property
    def model(self) -> Model | None:
        """What has to be told of measured steps, if anything."""
        ...

    def choose(self, load: Load) -> int:
        """At least one. How many of them there are to compute, and room in the step, is the caller's to see."""
        ...


class Fixed:
    """As many as there is room for: what engines without a rule do."""

    model = None

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def choose(self, load: Load) -> int:
        return self._limits.most


class Threshold:
    """AsymCache §5.1 as far as it is given: with more decodes than a threshold a chunk is reduced, down to a floor.

    By how much is not said. Here it is C_max times the threshold over the decodes, in whole tiles.
    """

    model = None

    def __init__(self, limits: Limits, threshold: int = THRESHOLD) -> None:
        self._limits, self._threshold = limits, threshold

    def choose(self, load: Load) -> int:
        limits = self._limits
        if load.n_decodes <= self._threshold:
            return limits.most
        reduced = limits.most * self._threshold // load.n_decodes
        return max(limits.least, reduced - reduced % limits.tile)


class Adaptive:
    """The largest count in whole tiles with which the step is predicted to end within the target less ``margin``.

    Never under the limits' least, whatever it takes, and the most where nothing decodes: nobody waits for a token then.
    """

    def __init__(self, limits: Limits, model: Model, margin: float = MARGIN) -> None:
        self.model = model
        self._limits, self._within_s = limits, limits.target_s * (1 - margin)

    def choose(self, load: Load) -> int:
        limits, tile = self._limits, self._limits.tile
        if load.n_decodes == 0 or self._fits(load, limits.most):
            return limits.most
        # Between tiles: ``low`` fits or is the floor, all above ``high`` do not fit.
        low, high = limits.least // tile, -(-limits.most // tile) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits(load, middle * tile):
                low = middle
            else:
                high = middle - 1
        return min(max(limits.least, low * tile), limits.most)

    def _fits(self, load: Load, rows: int) -> bool:
        return self.model(load.shape(rows)) <= self._within_s


class Patient:
    """As many as leave those who decode in time (:func:`tenon.engine.policies.slo.patience`), but no fewer than bring
    prompts to their first tokens when these are due (earliest deadline first)."""

    model = None

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def choose(self, load: Load) -> int:
        limits, promised = self._limits, load.promised
        if promised is None or load.n_decodes == 0:
            return limits.most
        step_s, rows, pace = promised.seconds_of(0), 0, 0.0
        for due_s, n in sorted(promised.due):
            rows += n
            pace = max(pace, rows / max(due_s, step_s))
        least = min(max(limits.least, math.ceil(pace * step_s)), limits.most)
        return patience(promised.claims, promised.brought, promised.seconds_of, least, limits.most)


CHUNKS: Final[dict[str, Callable[[Limits, Model], Chunk]]] = {
    "fixed": lambda limits, model: Fixed(limits),
    "threshold": lambda limits, model: Threshold(limits),
    "adaptive": Adaptive,
    "patient": lambda limits, model: Patient(limits),
}
"""By the word that a config names them with."""
