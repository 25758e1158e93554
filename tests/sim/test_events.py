"""Virtual time: it never goes back, and what is due comes in the order of its time, then of its pushing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.sim.clock import VirtualClock
from tenon.sim.events import EventHeap

TIMES = st.floats(0, 100, allow_nan=False)


def heap() -> EventHeap[int]:
    return EventHeap(VirtualClock())


@given(st.lists(TIMES))
def test_events_come_by_time_and_equal_ones_as_pushed(times: list[float]) -> None:
    made = heap()
    for i, at_s in enumerate(times):
        made.push(at_s, i)
    taken = [made.pop() for _ in times]
    assert taken == sorted(range(len(times)), key=lambda i: (times[i], i))
    assert made.clock.now_s() == max(times, default=0.0)


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "cancel", "step", "due"]), TIMES), max_size=60))
def test_the_clock_never_goes_back_and_no_event_is_lost(acts: list[tuple[str, float]]) -> None:
    made, before_s, pending = heap(), 0.0, {}
    for number, (act, value) in enumerate(acts):
        now_s = made.clock.now_s()
        if act == "push":
            pending[made.push(now_s + value, number)] = now_s + value, number
        elif act == "pop" and pending:
            expected = min(pending, key=lambda ticket: (pending[ticket][0], ticket))
            assert made.pop() == pending.pop(expected)[1]
        elif act == "cancel" and pending:
            ticket = sorted(pending)[len(pending) // 2]
            assert made.cancel(ticket) == pending.pop(ticket)[1]
        elif act == "step":
            made.clock.advance(value)
        elif act == "due":
            late = sorted(ticket for ticket, (at_s, _) in pending.items() if at_s <= now_s)
            late.sort(key=lambda ticket: (pending[ticket][0], ticket))
            assert made.due() == [pending.pop(ticket)[1] for ticket in late]
        assert made.clock.now_s() >= before_s
        before_s = made.clock.now_s()
        assert len(made) == len(pending)
        assert made.next_s == min((at_s for at_s, _ in pending.values()), default=math.inf)


def test_an_event_that_became_due_during_a_step_does_not_move_the_clock() -> None:
    made = heap()
    made.push(1.0, 7)
    made.clock.advance(3.0)
    assert made.pop() == 7
    assert made.clock.now_s() == 3.0


def test_nothing_happens_in_the_past_or_never() -> None:
    made = heap()
    made.clock.advance_to(2.0)
    for at_s in (1.999, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"it is 2.0 s"):
            made.push(at_s, 0)
    with pytest.raises(LookupError):
        made.pop()
    assert len(made) == 0


def test_what_was_cancelled_or_has_happened_cannot_be_cancelled() -> None:
    made = heap()
    first, second = made.push(1.0, 1), made.push(1.0, 2)
    assert made.cancel(first) == 1
    assert made.pop() == 2
    for ticket in (first, second):
        with pytest.raises(KeyError):
            made.cancel(ticket)
    assert made.next_s == math.inf


@pytest.mark.parametrize("seconds", [-1e-9, math.nan, math.inf])
def test_a_clock_refuses_what_is_no_step_forward(seconds: float) -> None:
    clock = VirtualClock(5.0)
    with pytest.raises(ValueError):
        clock.advance(seconds)
    with pytest.raises(ValueError):
        clock.advance_to(5.0 + seconds)
    assert clock.now_s() == clock.wall_s() + 5.0 == 5.0


def test_a_time_that_was_set_is_met_exactly() -> None:
    clock = VirtualClock(0.1)
    clock.advance_to(0.7)
    assert clock.now_s() == 0.7
    clock.advance_to(0.7)
    assert clock.now_s() == 0.7
