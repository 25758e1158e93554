"""Latencies summed up: percentiles and how sure they are.

A percentile p of n sorted values x[0..n-1] is the linear interpolation at h = (n - 1) p: x[k] + (h - k) (x[k+1] - x[k])
with k = floor(h), numpy's default. Its 95 % interval lies between order statistics and assumes no distribution: with
B ~ Binomial(n, p) values below the true percentile, it runs from the value of rank l to that of rank u, where B < l and
B >= u have a probability of at most 2.5 % each. That holds for values that do not depend on one another; neighbours in
a queue do, so that it is rather too narrow under overload.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

PERCENTILES: Final = (50.0, 90.0, 95.0, 99.0)
OUTSIDE: Final = 0.025
"""Probability that the true percentile lies below its interval, and the same above: 95 % are inside."""
CURVE_POINTS: Final = 101

F64 = NDArray[np.float64]


class Percentile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``value`` in seconds, and its 95 % interval; ``why`` says what a missing end of it lacks."""

    percent: float
    value: float
    low: float | None
    high: float | None
    why: str = ""


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A latency in seconds. ``curve``: the percentiles 0, 1, ... 100. Without values: nulls, and ``why``."""

    n: int
    mean: float | None
    max: float | None
    percentiles: tuple[Percentile, ...] = ()
    curve: tuple[float, ...] = ()
    why: str = ""

    def at(self, percent: float) -> float | None:
        """The value of one of ``PERCENTILES``; ``None`` where there are no values."""
        return next((one.value for one in self.percentiles if one.percent == percent), None)


def summarise(values: F64, why: str, *, no_interval: str = "") -> Summary:
    """``why`` is said where there are no values; ``no_interval`` says why percentiles get none, if they do not."""
    n = len(values)
    if n == 0:
        return Summary(0, None, None, why=why)
    ordered = np.sort(values)
    found = np.quantile(ordered, np.array(PERCENTILES) / 100)
    percentiles = []
    for percent, value in zip(PERCENTILES, found.tolist(), strict=True):
        low, high = (None, None) if no_interval else ranks(n, percent)
        reason = no_interval
        if not no_interval and (low is None or high is None):
            ends = " and ".join(end for end, rank in (("lower", low), ("upper", high)) if rank is None)
            reason = f"{n} values are too few for its {ends} end"
        bounds = [None if rank is None else float(ordered[rank - 1]) for rank in (low, high)]
        percentiles.append(Percentile(percent, value, bounds[0], bounds[1], reason))
    curve = np.quantile(ordered, np.linspace(0, 1, CURVE_POINTS)).tolist()
    mean = math.fsum(ordered.tolist()) / n
    least, most = float(ordered[0]), float(ordered[-1])
    # A mean of equal values may come out one rounding beside them.
    return Summary(n, min(max(mean, least), most), most, tuple(percentiles), tuple(curve))


@lru_cache(256)
def ranks(n: int, percent: float) -> tuple[int | None, int | None]:
    """Ranks, from 1, of the values between which the percentile lies with 95 % confidence; ``None``: too few values.

    How many of n values lie below the true percentile is Binomial(n, p). Exact for any distribution without atoms,
    safe for others.
    """
    p = percent / 100
    k = np.arange(1, n + 1)
    # log P(B = k) from P(B = 0) on, by ratios of neighbours: factorials of large n do not fit a float.
    steps = np.log((n - k + 1) / k) + math.log(p / (1 - p))
    log_pmf = n * math.log1p(-p) + np.concatenate(([0.0], np.cumsum(steps)))
    pmf = np.exp(log_pmf - log_pmf.max())
    below = np.cumsum(pmf) / pmf.sum()
    above = np.cumsum(pmf[::-1])[::-1] / pmf.sum()
    low = int((below <= OUTSIDE).sum())  # the largest l with P(B <= l - 1) at most OUTSIDE
    high = n + 1 - int((above <= OUTSIDE).sum())  # the smallest u with P(B >= u) at most OUTSIDE
    return (low or None), (high if high <= n else None)
