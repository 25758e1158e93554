"""How long steps are said to take: as measured, then as observed, on a machine that gets slower, and never less for
more rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.engine.policies.step_time import KNOTS, StepTimes

MEASURED = {1: 1.0e-3, 2: 1.05e-3, 4: 1.1e-3, 8: 1.3e-3, 16: 1.8e-3, 32: 3.0e-3, 64: 5.5e-3}
SEQS = (1, 2, 4, 6, 12)
Truth = Callable[[int, int], float]
"""Of sequences and rows; where there are more of these, with guesses."""


def curve(rows: int) -> float:
    return float(np.interp(rows, list(MEASURED), list(MEASURED.values())))


def live(it: StepTimes, rng: np.random.Generator, truth: Truth, n: int, noise: float = 0.0) -> None:
    """``n`` steps as an engine has them: so many sequences for a while, some steps with guesses."""
    n_seqs = 1
    for i in range(n):
        if i % 40 == 0:
            n_seqs = int(rng.choice([1, 2, 4, 6, 12]))
        guessed = bool(rng.random() < 0.4)
        rows = n_seqs * int(rng.integers(2, 6)) if guessed else n_seqs
        it.tell(n_seqs, rows, truth(n_seqs, rows) * float(rng.lognormal(0, noise)))


def error(it: StepTimes, truth: Truth) -> float:
    """Mean relative error over the rows that are seen."""
    plain = [abs(it.plain(n) / truth(n, n) - 1) for n in SEQS]
    guessed = [abs(float(it.guessed(n, np.array([k * n]))[0]) / truth(n, k * n) - 1) for n in SEQS for k in range(2, 6)]
    return float(np.mean(plain + guessed))


def test_before_any_step_it_is_what_was_measured() -> None:
    it = StepTimes(MEASURED)
    assert [it.plain(n) for n in SEQS] == [curve(n) for n in SEQS]
    found = it.guessed(2, np.array([3, 8, 64])) - it.plain(2)
    assert np.diff(found) == pytest.approx([curve(8) - curve(3), curve(64) - curve(8)])
    assert 0 < found[0] - (curve(3) - curve(2)) < 0.5 * MEASURED[1]  # a tree costs something, however small
    slope = (MEASURED[64] - MEASURED[32]) / 32
    assert it.plain(96) == pytest.approx(MEASURED[64] + 32 * slope)  # the last slope goes on
    assert it.plain(10_000) == pytest.approx(MEASURED[64] + (KNOTS[-1] - 64) * slope)
    alone = StepTimes({1: 2e-3})
    assert alone.plain(1) == alone.plain(500) == 2e-3


TRUTHS: dict[str, Truth] = {
    "as measured": lambda n, rows: curve(rows),
    "slower": lambda n, rows: 2.3 * curve(rows),
    "quicker": lambda n, rows: 0.4 * curve(rows),
    "with a cost of guessing": lambda n, rows: curve(rows) + 0.4e-3 * (rows > n),
    "guesses dearer than sequences": lambda n, rows: curve(n) + 0.1e-3 * (rows > n) + 2.5 * (curve(rows) - curve(n)),
    "steeper": lambda n, rows: 0.6e-3 + 0.15e-3 * rows,
    "flat": lambda n, rows: 1.5e-3,
}


@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize("truth", TRUTHS)
def test_predictions_come_to_what_is_observed(truth: str, noise: float) -> None:
    it = StepTimes(MEASURED)
    live(it, np.random.default_rng(0), TRUTHS[truth], 2000, noise)
    assert error(it, TRUTHS[truth]) < 0.1


def test_a_machine_that_gets_slower_and_recovers_is_followed() -> None:
    rng, it = np.random.default_rng(2), StepTimes(MEASURED)
    for speed in (1.0, 1.8, 0.9, 3.0):
        live(it, rng, lambda n, rows, speed=speed: speed * curve(rows), 1000, 0.05)  # type: ignore[misc]
        assert error(it, lambda n, rows, speed=speed: speed * curve(rows)) < 0.1  # type: ignore[misc]


def test_what_all_steps_have_in_common_is_heard_by_those_that_were_not_seen() -> None:
    """A machine that is slower is so for every number of rows."""
    it = StepTimes(MEASURED)
    for _ in range(600):
        it.tell(4, 4, 2 * curve(4))
    assert it.plain(4) == pytest.approx(2 * curve(4), rel=0.05)
    assert it.plain(64) == pytest.approx(2 * curve(64), rel=0.05)
    assert np.diff(it.guessed(4, np.array([8, 64])))[0] == pytest.approx(2 * (curve(64) - curve(8)), rel=0.05)


def test_a_pause_now_and_then_changes_little() -> None:
    rng, it = np.random.default_rng(3), StepTimes(MEASURED)
    live(it, rng, lambda n, rows: curve(rows) * (40 if rng.random() < 0.03 else 1), 3000)
    assert error(it, lambda n, rows: curve(rows)) < 0.15


def test_what_comes_after_a_guess_is_counted_to_it() -> None:
    """Steps with guesses that make the next one without a quarter longer."""
    it = StepTimes(MEASURED)
    for i in range(2000):
        guessed = i % 3 == 0
        it.tell(4, 8 if guessed else 4, curve(8) if guessed else 1.25 * curve(4) if i % 3 == 1 else curve(4))
    assert it.plain(4) == pytest.approx(curve(4), rel=0.03)
    assert it.guessed(4, np.array([8]))[0] == pytest.approx(curve(8) + 0.25 * curve(4), rel=0.05)


@settings(max_examples=100)
@given(
    told=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000), st.floats(0.0, 10.0)), max_size=200),
    measured=st.dictionaries(st.sampled_from(KNOTS), st.floats(1e-5, 1.0), min_size=1, max_size=6),
    n=st.integers(1, 40),
)
def test_more_rows_never_take_less_nor_guesses_less_than_none(
    told: list[tuple[int, int, float]], measured: dict[int, float], n: int
) -> None:
    it = StepTimes(measured)
    arrays = knots, plain, _, extra = it.arrays
    for seqs, rows, seconds in told:
        it.tell(seqs, rows, seconds)
    assert np.isfinite(plain).all()
    assert (plain > 0).all()
    assert (np.diff(plain) >= 0).all()
    assert np.isfinite(extra).all()
    guessed = it.guessed(n, np.arange(n + 1, n + 300))
    assert (np.diff(guessed) >= -1e-12).all()
    assert guessed[0] >= it.plain(n)
    assert [it.plain(int(k)) for k in knots] == plain.tolist()
    assert all(array is same for array, same in zip(it.arrays, arrays, strict=True))
