"""Arrival processes: rates, variation, prefix stability, and the time change behind varying rates."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.base.errors import ConfigError
from tenon.workloads import arrivals
from tenon.workloads.arrivals import RateCurve
from tenon.workloads.parameters import Quantiles

GAPS = Quantiles([[0, 0.0], [80, 1.0], [100, 40.0]])
CURVE = RateCurve([[0, 1.0], [6, 9.0], [12, 1.0], [18, 1.0]], 24.0)
PROCESSES: dict[str, Callable[[np.random.Generator], Iterator[float]]] = {
    "poisson": lambda stream: arrivals.poisson(stream, 2.0),
    "gamma": lambda stream: arrivals.renewal(stream, 2.0, 3.0),
    "regular": lambda stream: arrivals.renewal(stream, 2.0, 0.25),
    "batched": lambda stream: arrivals.batched(stream, 2.0, 3.0),
    "measured": lambda stream: arrivals.measured(stream, GAPS, 2.0),
    "clustered": lambda stream: arrivals.measured(stream, GAPS, 2.0, memory=0.3, run=5),
    "varying": lambda stream: arrivals.varying(stream, CURVE, 2.0),
    "bursty day": lambda stream: arrivals.varying(stream, CURVE, 2.0, 2.0),
}


def times(name: str, n: int, seed: int = 1) -> np.ndarray:
    return np.array(list(itertools.islice(PROCESSES[name](np.random.Generator(np.random.Philox(seed))), n)))


@pytest.mark.parametrize("name", PROCESSES)
def test_times_rise_have_the_rate_and_do_not_depend_on_how_many_are_taken(name: str) -> None:
    made = times(name, 20_000)
    assert made[0] >= 0
    assert (np.diff(made) >= 0).all()
    np.testing.assert_array_equal(made[:500], times(name, 500))
    assert len(made) / made[-1] == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(("name", "cv"), [("poisson", 1.0), ("gamma", 3.0), ("regular", 0.25)])
def test_gaps_vary_as_asked(name: str, cv: float) -> None:
    gaps = np.diff(times(name, 50_000))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_batches_stand_on_ticks_and_count_like_poisson() -> None:
    made = times("batched", 30_000)
    assert set(np.unique(made % 3.0)) == {0.0}
    counts = np.bincount((made / 3).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, rel=0.1)


def test_memory_puts_short_gaps_together_and_keeps_their_distribution() -> None:
    plain, clustered = (np.diff(times(name, 40_000)) for name in ("measured", "clustered"))
    for share in (0.2, 0.5, 0.8, 0.95):
        assert np.quantile(clustered, share) == pytest.approx(np.quantile(plain, share), rel=0.15)

    def correlation(gaps: np.ndarray) -> float:
        ranks = np.argsort(np.argsort(gaps))
        return float(np.corrcoef(ranks[1:], ranks[:-1])[0, 1])

    assert abs(correlation(plain)) < 0.02
    assert 0.15 < correlation(clustered) < 0.32


def test_demand_follows_the_curve() -> None:
    made = times("varying", 40_000)
    hours = np.bincount((made % 24).astype(int), minlength=24) / len(made)
    for hour in range(24):
        parts = [CURVE.rate(hour + part / 10) for part in range(11)]
        assert hours[hour] == pytest.approx(np.mean(parts) / CURVE.mean / 24, abs=0.005)


rates = st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(lambda rs: max(rs) > 1e-3)


@given(rates, st.floats(0, 5), st.floats(0, 5))
def test_time_of_inverts_the_integral_of_the_rate(values: list[float], start: float, periods: float) -> None:
    curve = RateCurve([[i, rate] for i, rate in enumerate(values)], len(values))
    low, high = sorted((curve.time_of(start), curve.time_of(start + periods)))
    assert high >= low >= 0
    expected = sum((curve.rate(low + (high - low) * (i + 0.5) / 2000)) for i in range(2000)) * (high - low) / 2000
    assert expected == pytest.approx(periods, rel=0.03, abs=0.05)


@pytest.mark.parametrize(
    ("points", "period", "said"),
    [([], 1, "times must rise"), ([[1, 1], [1, 2]], 2, "times must rise"), ([[0, 1], [3, 2]], 3, "times must rise"),
     ([[-1, 1]], 3, "times must rise"), ([[0, -1], [1, 2]], 3, "at least 0"), ([[0, 0]], 3, "one more than 0")],
)  # fmt: skip
def test_a_curve_that_cannot_be_is_refused(points: list[list[float]], period: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RateCurve(points, period)


@given(st.lists(st.floats(0, 1e5), min_size=2, max_size=30), st.floats(0.01, 100))
def test_rescaling_keeps_the_shape(given_: list[float], rate: float) -> None:
    if max(given_) - min(given_) < 1e-3:
        return
    made = arrivals.rescaled(given_, rate)
    assert made[0] == 0
    assert (len(made) - 1) / made[-1] == pytest.approx(rate)
    shape = (np.sort(given_) - min(given_)) / (max(given_) - min(given_))
    np.testing.assert_allclose(np.array(made) / made[-1], shape, atol=1e-9)


@pytest.mark.parametrize("bad", [[], [3.0], [2.0, 2.0]])
def test_too_few_times_cannot_be_stretched(bad: list[float]) -> None:
    with pytest.raises(ConfigError, match="two times or more"):
        arrivals.rescaled(bad, 1.0)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="rate must be more than 0"):
        next(arrivals.poisson(np.random.default_rng(0), rate))


def test_batches_that_would_nearly_all_be_empty_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rate must be at least 0.0002, or every_s longer.*got 1e-09"):
        next(arrivals.batches(np.random.default_rng(0), 1e-9, 5.0))
