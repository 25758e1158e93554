"""Chunk policies: how many rows of prompts a step has beside its decodes. Cutting otherwise changes no answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.cost.work import StepShape, decode_shape, spans_shape, with_run
from tenon.engine.policies.chunk import (
    BOUND,
    CANDIDATES,
    MARGIN,
    Adaptive,
    Corrected,
    Fixed,
    Learned,
    Limits,
    Load,
    Model,
    Threshold,
)  # fmt: skip

WINDOWS = (None, 24)
TARGET_S = 0.02


def cost(shape: StepShape) -> float:
    """Milliseconds for a step, ten microseconds for a row, and what attention takes."""
    return 2e-3 + 1e-5 * shape.rows + 2e-8 * shape.pairs[0] + 3e-8 * shape.reads[1] + 1e-8 * shape.largest[0]


def load(contexts: list[int], runs: list[tuple[int, int, int]]) -> Load:
    return Load(decode_shape(contexts, WINDOWS), runs, WINDOWS)


def rows_only(rows: int) -> StepShape:
    return StepShape(rows, 2, 1, (1, 1), (1, 1), (1, 1))


# -- shapes ----------------------------------------------------------------------------------------------------

RUNS = st.lists(st.tuples(st.integers(0, 400), st.integers(16, 90), st.integers(0, 2)), max_size=5)
CONTEXTS = st.lists(st.integers(1, 500), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(CONTEXTS, RUNS, st.integers(0, 300))
def test_a_loads_shape_is_that_of_its_spans(contexts: list[int], runs: list[tuple[int, int, int]], rows: int) -> None:
    spans, outputs, left = [(seen - 1, 1) for seen in contexts], len(contexts), rows
    for start, n, out in runs:
        if left > 0:
            spans.append((start, min(n, left)))
            outputs += out if n <= left else 0
        left -= n
    found, right = load(contexts, runs).shape(rows), spans_shape(spans, outputs, WINDOWS)
    exact = ("rows", "spans", "outputs", "reads", "pairs")
    assert [getattr(found, name) for name in exact] == [getattr(right, name) for name in exact]
    if all(n >= 32 for _, n in spans[len(contexts) :]):  # a shorter run's piece counts at most as that run's pairs
        assert found.largest == right.largest


@pytest.mark.parametrize("window", [None, 24])
def test_a_short_runs_piece_is_its_pairs(window: int | None) -> None:
    nothing = StepShape(0, 0, 0, (0,), (0,), (0,))
    found = with_run(nothing, 3, 2, (window,))
    assert (found.pairs, found.largest) == ((9,), (9,))


# -- the choice ------------------------------------------------------------------------------------------------


def by_linear_search(limits: Limits, model: Callable[[StepShape], float], given: Load) -> int:
    within_s, best = limits.target_s * (1 - MARGIN), limits.least
    for rows in range(limits.tile, limits.most + limits.tile, limits.tile):
        if model(given.shape(min(rows, limits.most))) <= within_s:
            best = max(best, min(rows, limits.most))
    return best


COEFFICIENTS = st.tuples(*(st.floats(0, top) for top in (0.03, 3e-4, 3e-6, 3e-6, 1e-6)))


@settings(max_examples=200, deadline=None)
@given(COEFFICIENTS, CONTEXTS, RUNS, st.integers(1, 200), st.integers(1, 3000), st.floats(0.5, 2.0))
def test_adaptive_is_the_largest_count_that_fits(
    c: tuple[float, ...], contexts: list[int], runs: list[tuple[int, int, int]], least: int, most: int, ratio: float
) -> None:
    calls = 0

    def step_s(shape: StepShape) -> float:
        nonlocal calls
        calls += 1
        return c[0] + c[1] * shape.rows + c[2] * shape.pairs[0] + c[3] * shape.reads[1] + c[4] * shape.largest[0]

    limits, model = Limits(min(least, most), most, TARGET_S), Corrected(step_s)
    model.ratio = ratio
    found = Adaptive(limits, model).choose(load(contexts, runs))
    assert calls <= math.log2(CANDIDATES) + 1
    assert found == by_linear_search(limits, model, load(contexts, runs))
    assert min(least, most) <= found <= most


def test_a_hopeless_target_gives_the_floor_and_a_lax_one_the_ceiling() -> None:
    given = load([100] * 4, [(0, 5000, 1)])
    chosen = [Adaptive(Limits(64, 1000, target_s), Corrected(cost)).choose(given) for target_s in (1e-9, 1e9)]
    assert chosen == [64, 1000]


def test_without_decodes_a_chunk_is_whole_and_nothing_is_predicted() -> None:
    def never(shape: StepShape) -> float:
        raise AssertionError

    assert Adaptive(Limits(64, 1000, 1e-9), Corrected(never)).choose(load([], [(0, 5000, 1)])) == 1000


def test_a_deeper_prompt_gets_a_smaller_chunk() -> None:
    policy = Adaptive(Limits(16, 1024, TARGET_S), Corrected(cost))
    chosen = [policy.choose(load([100] * 4, [(start, 5000, 1)])) for start in (0, 10_000, 50_000)]
    assert 1024 > chosen[0] > chosen[1] > chosen[2] >= 16


def test_threshold_reduces_beyond_it_down_to_its_floor() -> None:
    policy = Threshold(Limits(64, 1024), threshold=10)
    chosen = [policy.choose(load([9] * n, [])) for n in (0, 10, 11, 20, 40, 1000)]
    assert chosen == [1024, 1024, 928, 512, 256, 64]
    assert Fixed(Limits(64, 1024)).choose(load([9] * 1000, [])) == 1024


# -- what is measured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [0.5, 2.0])
def test_a_prediction_that_is_off_by_two_is_corrected(off: float) -> None:
    model = Corrected(cost)
    for rows in range(100, 140):
        model.tell(rows_only(rows), off * cost(rows_only(rows)))
    assert model.ratio == pytest.approx(off, rel=0.01)
    assert model(rows_only(300)) == pytest.approx(off * cost(rows_only(300)), rel=0.01)


@pytest.mark.parametrize("outlier", [0.001, 1000.0])
@pytest.mark.parametrize("make", [lambda: Corrected(cost), Learned])
def test_one_outlier_changes_nothing_and_many_do(make: Callable[[], Model], outlier: float) -> None:
    model = make()
    for _ in range(60):
        model.tell(rows_only(100), 0.003)
    before = model(rows_only(100))
    model.tell(rows_only(100), 0.003 * outlier)
    assert model(rows_only(100)) == pytest.approx(before, rel=1e-3)
    for _ in range(20):
        model.tell(rows_only(100), 0.003 * outlier)
    assert abs(math.log(model(rows_only(100)) / before)) > 0.5


def test_a_correction_is_bounded_and_deaf_to_what_is_no_time() -> None:
    model = Corrected(cost)
    for taken_s in (0.0, -1.0, math.nan, math.inf):
        for _ in range(9):
            model.tell(rows_only(10), taken_s)
    assert model.ratio == 1.0
    for _ in range(99):
        model.tell(rows_only(10), 1000.0)
    assert BOUND * 0.99 < model.ratio <= BOUND


def test_a_line_is_learned_from_steps_alone_and_grows_by_doubling() -> None:
    model, policy_rows = Learned(), []
    policy = Adaptive(Limits(16, 1024, TARGET_S), model)
    given = load([100] * 8, [(0, 5000, 1)])
    for _ in range(40):
        model.tell(StepShape(8, 8, 8, (), ()), 2e-3 + 2e-5 * 8)
        policy_rows.append(policy.choose(given))
        shape = given.shape(policy_rows[-1])
        model.tell(shape, 2e-3 + 2e-5 * shape.rows)
    assert policy_rows[:3] == [16, 16, 16]
    assert all(later <= 2 * (earlier + 8) for earlier, later in pairwise(policy_rows))
    most = (0.95 * TARGET_S - 2e-3) / 2e-5 - 8
    assert policy_rows[-1] == most // 16 * 16
