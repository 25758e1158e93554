"""Arrival processes: when requests, or sessions, come. Times are seconds from 0, never falling.

Each process is endless and drawn in order: the first thousand times of a stream are the same however many are taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import NormalDist

import numpy as np

from tenon.base.errors import ConfigError
from tenon.workloads.parameters import Quantiles

# Empty batches are walked through one by one; fewer arrivals than this would look like a hang.
LEAST_PER_BATCH = 1e-3


def renewal(stream: np.random.Generator, rate: float, cv: float = 1.0) -> Iterator[float]:
    """Independent Gamma gaps with mean ``1 / rate`` and coefficient of variation ``cv``; 1 is a Poisson process."""
    _positive("rate", rate)
    _positive("cv", cv)
    shape = 1.0 / (cv * cv)
    now_s = 0.0
    while True:
        now_s += float(stream.standard_exponential() if cv == 1.0 else stream.standard_gamma(shape) / shape) / rate
        yield now_s


def poisson(stream: np.random.Generator, rate: float) -> Iterator[float]:
    """``rate`` per second, without memory."""
    return renewal(stream, rate)


def measured(
    stream: np.random.Generator, gaps: Quantiles, rate: float, *, memory: float = 0.0, run: float = 1.0
) -> Iterator[float]:
    """Gaps after a table of quantiles, scaled to ``rate``.

    With ``memory`` a part of a gap's place in the table is common to a run of ``run`` requests on average, so that
    short gaps stand together: the gaps' ranks then correlate by about ``memory`` within a run.
    """
    _positive("rate", rate)
    scale = 1.0 / (rate * gaps.mean())
    normal = NormalDist()
    common, own = math.sqrt(memory), math.sqrt(1 - memory)
    now_s, level, left = 0.0, 0.0, 0
    while True:
        if left == 0:
            level, left = float(stream.standard_normal()), int(stream.geometric(1 / max(1.0, run)))
        left -= 1
        u = normal.cdf(common * level + own * float(stream.standard_normal()))
        now_s += gaps.at(u) * scale
        yield now_s


def batches(stream: np.random.Generator, rate: float, every_s: float) -> Iterator[tuple[float, int]]:
    """(time, how many): each ``every_s`` seconds a Poisson number, as where a log stamps whole intervals."""
    _positive("rate", rate)
    _positive("every_s", every_s)
    if rate * every_s < LEAST_PER_BATCH:
        right = f"at least {LEAST_PER_BATCH / every_s:g}, or every_s longer: nearly all batches would be empty"
        raise ConfigError(f"rate must be {right}, got {rate!r}", subject="rate")
    for tick in itertools.count():
        yield tick * every_s, int(stream.poisson(rate * every_s))


def batched(stream: np.random.Generator, rate: float, every_s: float) -> Iterator[float]:
    """The times of :func:`batches`, one by one."""
    for now_s, n in batches(stream, rate, every_s):
        yield from itertools.repeat(now_s, n)


class RateCurve:
    """A rate over time: (time, rate) points joined by straight lines, repeated every ``period_s``.

    The last point joins the first of the next period. Raises ``ConfigError`` unless times rise within the period, rates
    are at least 0 and one is more.
    """

    def __init__(self, points: Sequence[Sequence[float]], period_s: float) -> None:
        times, rates = [p[0] for p in points], [p[1] for p in points]
        if not points or any(a >= b for a, b in itertools.pairwise(times)) or times[0] < 0 or times[-1] >= period_s:
            raise ConfigError(
                f"a rate curve's times must rise within 0 .. {period_s:g} s, got {times}", subject="curve"
            )
        if min(rates) < 0 or not max(rates) > 0 or not math.isfinite(max(rates)):
            raise ConfigError(f"a rate curve needs rates of at least 0, one more than 0, got {rates}", subject="curve")
        if times[0] > 0:
            at_zero = rates[-1] + (rates[0] - rates[-1]) * (period_s - times[-1]) / (period_s - times[-1] + times[0])
            times, rates = [0.0, *times], [at_zero, *rates]
        self.period_s = period_s
        self._time = np.array([*times, period_s])
        self._rate = np.array([*rates, rates[0]], dtype=np.float64)
        area = np.diff(self._time) * (self._rate[1:] + self._rate[:-1]) / 2
        self._sum = np.concatenate([[0.0], np.cumsum(area)])

    @property
    def mean(self) -> float:
        """Of the rate over a period."""
        return float(self._sum[-1] / self.period_s)

    def rate(self, time_s: float) -> float:
        return float(np.interp(time_s % self.period_s, self._time, self._rate))

    def time_of(self, count: float) -> float:
        """When ``count`` arrivals are expected since time 0: the inverse of the rate's integral."""
        periods, rest = divmod(count, float(self._sum[-1]))
        i = min(int(np.searchsorted(self._sum, rest, "right")) - 1, len(self._sum) - 2)
        low, high = self._rate[i], self._rate[i + 1]
        width = self._time[i + 1] - self._time[i]
        slope, left = (high - low) / width, rest - self._sum[i]
        # left = low * t + slope * t**2 / 2, solved in the form that has no cancellation and no division by a zero
        # slope.
        root = math.sqrt(max(0.0, low * low + 2 * slope * left))
        step = 2 * left / (low + root) if low + root > 0 else 0.0
        return periods * self.period_s + float(self._time[i]) + min(float(step), float(width))


def varying(stream: np.random.Generator, curve: RateCurve, rate: float, cv: float = 1.0) -> Iterator[float]:
    """Arrivals whose rate follows ``curve``, scaled to the mean ``rate``.

    A process of rate 1 runs on a clock that ticks once per expected arrival. With ``cv`` 1 that is the same law as
    thinning a Poisson process, and nothing is thrown away; with another ``cv`` the bursts stay as they are while the
    rate varies.
    """
    _positive("rate", rate)
    scale = curve.mean / rate
    for count in renewal(stream, 1.0, cv):
        yield curve.time_of(count * scale)


def rescaled(times: Iterable[float], rate: float) -> list[float]:
    """A real trace's times, begun at 0 and stretched so that (n - 1) / (last - first) is ``rate``. All shapes stay.

    Raises ``ConfigError`` when there are fewer than two times or they all are one.
    """
    _positive("rate", rate)
    given = sorted(times)
    if len(given) < 2 or given[0] == given[-1]:
        raise ConfigError("a trace needs requests at two times or more to be stretched to a rate", subject="rate")
    factor = (len(given) - 1) / rate / (given[-1] - given[0])
    return [(one - given[0]) * factor for one in given]


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} must be more than 0, got {value!r}", subject=name)
