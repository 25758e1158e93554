"""What may be expected of a request: by hand in an engine that stands still, and held against what comes."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.base.errors import Overloaded
from tenon.cost.work import StepShape
from tenon.engine.config import EngineConfig
from tenon.engine.messages import Add
from tenon.engine.policies.forecast import BOUND, FIRST_LENGTH, LENGTHS, Learned, Lengths, Outlook, forecast
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.promises import Slo
from tenon.engine.simulate import Marks, Simulation
from tenon.engine.speculation.simulated import Agreement, SimulatedDraft
from tenon.models.spec import ModelSpec
from tenon.workloads.generator import make
from tests.engine.build import hash_engine

SECONDS = StepTimes({1: 1e-2, 1001: 1.01})
"""A millisecond a row, and nine besides."""
IDLE = Outlook(left=(), rows_ahead=0, n_ahead=0, n_slots=4, chunk=100, prompt_rows=0.0)


def test_who_is_alone_waits_for_its_own_rows() -> None:
    found = forecast(IDLE, 250, SECONDS)
    # Steps of 100, 100 and 50 rows beside the one that a step has at the least.
    assert found.ttft_s == pytest.approx(2 * 0.110 + 0.060)
    assert found.tpot_s == pytest.approx(0.010)
    assert found.wait_s == 0


def test_who_comes_when_all_slots_are_taken_waits_for_an_end() -> None:
    busy = replace(IDLE, left=(50.0, 20.0, 80.0), n_slots=0)
    found = forecast(busy, 100, SECONDS)
    assert found.wait_s == pytest.approx(20 * 0.012)  # a step of three takes 12 ms
    assert found.ttft_s == pytest.approx(found.wait_s + 0.112)
    behind = forecast(replace(busy, n_ahead=1), 100, SECONDS)
    assert behind.wait_s == pytest.approx(50 * 0.012)
    far = forecast(replace(busy, n_ahead=3), 100, SECONDS)
    assert far.wait_s == pytest.approx((80 + 20) * 0.012)  # whoever comes in for one that ends is about as long


def test_guesses_bring_tokens_and_cost_rows() -> None:
    found = forecast(replace(IDLE, left=(10.0,), per_step=3.0, rows_each=5.0), 1, SECONDS)
    assert found.tpot_s == pytest.approx(float(SECONDS.guessed(2, [10])[0]) / 3)  # type: ignore[arg-type]


OUTLOOKS = st.builds(
    Outlook,
    left=st.lists(st.floats(1, 500), max_size=6),
    rows_ahead=st.integers(0, 3000),
    n_ahead=st.integers(0, 9),
    n_slots=st.integers(0, 4),
    chunk=st.integers(1, 600),
    prompt_rows=st.floats(0, 300),
    per_step=st.floats(1, 5),
    rows_each=st.floats(1, 9),
)


@given(outlook=OUTLOOKS, rows=st.integers(1, 4000), more=st.integers(0, 500))
def test_more_work_is_never_expected_sooner(outlook: Outlook, rows: int, more: int) -> None:
    first = forecast(outlook, rows, SECONDS)
    assert 0 <= first.wait_s <= first.ttft_s < float("inf")
    assert first.tpot_s > 0
    assert forecast(outlook, rows + more, SECONDS).ttft_s >= first.ttft_s - 1e-12
    assert (
        forecast(replace(outlook, rows_ahead=outlook.rows_ahead + more), rows, SECONDS).ttft_s >= first.ttft_s - 1e-12
    )
    assert forecast(replace(outlook, n_ahead=outlook.n_ahead + more), rows, SECONDS).wait_s >= first.wait_s - 1e-12


def test_how_long_outputs_will_be_is_what_the_longer_ones_of_late_were() -> None:
    lengths = Lengths()
    assert lengths.left(0, 1000) == FIRST_LENGTH
    assert lengths.left(FIRST_LENGTH + 5, 1000) == 1
    for n in (10, 20, 30):
        lengths.add(n)
    assert lengths.left(0, 1000) == 20
    assert lengths.left(15, 1000) == 10
    assert lengths.left(15, 18) == 3
    for _ in range(LENGTHS):
        lengths.add(7)
    assert lengths.left(0, 1000) == 7  # the older ones are forgotten


def test_forecasts_are_corrected_by_what_came_of_them() -> None:
    learned = Learned()
    assert learned.confidence is None
    for _ in range(200):
        factor = learned.factor
        learned.hear(1.0 * factor, factor, 2.0)
    assert learned.factor == pytest.approx(2.0, rel=0.01)
    assert learned.confidence == 1.0
    for _ in range(1000):
        learned.hear(1.0, 1.0, 100.0)
    assert learned.factor == pytest.approx(BOUND)
    assert learned.confidence == 0.0
    learned.hear(float("inf"), 1.0, 1.0)
    learned.hear(1.0, 1.0, 0.0)
    assert learned.confidence == 0.0


def test_what_is_heard_late_does_not_make_it_swing() -> None:
    """Forty forecasts are told before the first of them comes true."""
    learned, told, seen = Learned(), deque[float](), []
    for _ in range(1000):
        told.append(learned.factor)
        if len(told) > 40:
            factor = told.popleft()
            learned.hear(factor, factor, 2.0)
            seen.append(learned.factor)
    assert max(seen) <= 2.0
    assert seen == sorted(seen)


# -- in an engine ------------------------------------------------------------------------------------------------


def test_what_cannot_be_kept_is_refused_where_it_is_strict_and_told_where_it_is_not() -> None:
    made = hash_engine()
    told = made.add(Add("a", (1, 2, 3), 4, 0, slo=Slo(ttft_s=1e-9))).forecast
    assert told is not None
    assert not told.meets
    assert told.retry_after_s > 0
    with pytest.raises(Overloaded, match=r"asks strictly for a first token within 1e-06 ms, where .* ms are expected"):
        made.add(Add("b", (1, 2, 3), 4, 0, slo=Slo(ttft_s=1e-9, strict=True)))
    assert [request.add.request_id for request in made.scheduler.requests.values()] == ["a"]
    kept = made.add(Add("c", (1, 2, 3), 4, 0, slo=Slo(ttft_s=1e9, tpot_s=1e9, strict=True))).forecast
    assert kept is not None
    assert kept.meets
    assert made.add(Add("d", (1, 2, 3), 4, 0)).forecast is None


def test_the_cache_is_part_of_a_forecast() -> None:
    made = hash_engine()
    prompt = tuple(range(100))
    made.add(Add("a", prompt, 1, 0))
    while made.has_work:
        made.tick(0.0)
    told = made.add(Add("b", prompt, 1, 0, slo=Slo(ttft_s=1.0))).forecast
    assert told is not None
    assert told.hit_tokens == 96


SPEC = ModelSpec("llama", 1000, 64, 2, 2, 2, 32, 128, 4096, dtype="float32")


def cost(shape: StepShape) -> float:
    return 2e-2 + 2e-4 * shape.rows


@pytest.mark.parametrize(
    "more", [{}, {"speculative": "draft", "speculative_policy": "slack"}], ids=["plain", "guesses"]
)
@pytest.mark.parametrize("rate", [1.0, 4.0])
def test_below_saturation_most_forecasts_are_right_within_a_fifth(more: dict[str, Any], rate: float) -> None:
    """At least half of them, but for the time between tokens that were guessed: that depends on the text."""
    trace = make("adaserve", seed=0, duration_s=60.0, rate=rate)
    draft = SimulatedDraft(lambda rows: 2e-3, {"": Agreement()}) if more else None
    simulation = Simulation(
        EngineConfig(max_waiting=1 << 20, prefix_cache=False, **more), SPEC, cost, Marks("m", "nowhere", "made up"),
        memory_bytes=10**9, slos={"": Slo(ttft_s=1.0, tpot_s=0.05)}, draft=draft,
    )  # fmt: skip
    simulation.run(trace)
    forecasts = simulation.scheduler.forecasts
    for learned, share in ((forecasts.ttft, 0.5), (forecasts.tpot, 0.33 if more else 0.5)):
        assert learned.confidence is not None
        assert learned.confidence >= share
        assert 0.5 < learned.factor < 2
