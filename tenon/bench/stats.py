"""Medians, their bootstrap intervals, and paired ratios."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from tenon.base.result import Ratio, Series

RESAMPLES = 4000
CONFIDENCE = 0.95


def interval(samples: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the median, widened to contain it. One sample gives a point.

    The same samples and seed give the same interval.
    """
    values = np.asarray(samples, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), size=(RESAMPLES, len(values)))
    medians = np.median(values[draws], axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    centre = median(samples)
    return min(float(low), centre), max(float(high), centre)


def series(cell: str, contender: str, metric: str, samples: Sequence[float]) -> Series:
    low, high = interval(samples)
    return Series(cell, contender, metric, tuple(samples), median(samples), low, high)


def paired(over: Series, under: Series) -> Ratio:
    """Median of round-by-round ratios: what slows a whole round cancels.

    Raises ``ValueError`` when the two do not have the same cell, metric and number of rounds.
    """
    if (over.cell, over.metric) != (under.cell, under.metric):
        raise ValueError(f"{over.cell}/{over.metric} and {under.cell}/{under.metric} are no pair")
    ratios = [a / b for a, b in zip(over.samples, under.samples, strict=True)]
    low, high = interval(ratios)
    return Ratio(over.cell, over.metric, over.contender, under.contender, median(ratios), low, high)
