"""Intervals that cover, and ratios that are paired."""

import numpy as np
import pytest

from tenon.bench import stats


def test_an_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        low, high = stats.interval(list(generator.exponential(size=25)))
        covered += low <= np.log(2) <= high
    assert 85 <= covered <= 100


def test_an_interval_is_the_same_each_time_and_holds_the_median() -> None:
    samples = [3.0, 1.0, 2.0, 9.0]
    assert stats.interval(samples) == stats.interval(samples)
    low, high = stats.interval(samples)
    assert low <= 2.5 <= high


def test_one_sample_gives_a_point() -> None:
    assert stats.interval([2.0]) == (2.0, 2.0)


def test_paired_ratios_cancel_what_slows_a_whole_round() -> None:
    drift = [1.0, 5.0, 2.0, 9.0]
    over = stats.series("c", "a", "seconds", [2.0 * x for x in drift])
    under = stats.series("c", "b", "seconds", drift)
    ratio = stats.paired(over, under)
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)


def test_what_is_no_pair_is_refused() -> None:
    a = stats.series("c", "a", "seconds", [1.0, 2.0])
    with pytest.raises(ValueError, match="no pair"):
        stats.paired(a, stats.series("d", "b", "seconds", [1.0, 2.0]))
    with pytest.raises(ValueError, match="shorter"):
        stats.paired(a, stats.series("c", "b", "seconds", [1.0]))
