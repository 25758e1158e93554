"""The clock that is moved by hand."""

import pytest

from tenon.base.clock import SYSTEM, ManualClock, sleep_s, thread_cpu_s


def test_a_manual_clock_moves_only_when_told() -> None:
    clock = ManualClock(5.0, epoch_s=1000.0)
    assert (clock.now_s(), clock.wall_s()) == (5.0, 1000.0)
    clock.advance(2.5)
    assert (clock.now_s(), clock.wall_s()) == (7.5, 1002.5)


def test_a_manual_clock_never_runs_back() -> None:
    with pytest.raises(ValueError, match="cannot go back"):
        ManualClock().advance(-1.0)


def test_the_system_clock_runs_forward() -> None:
    before = SYSTEM.now_s()
    sleep_s(0.001)
    assert SYSTEM.now_s() > before
    assert SYSTEM.wall_s() > 1.6e9
    assert thread_cpu_s() >= 0
