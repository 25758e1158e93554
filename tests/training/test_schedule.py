"""Warm-up, stable, decay."""

from __future__ import annotations

import pytest

from tenon.base.errors import ConfigError
from tenon.training.schedule import Wsd


def test_rises_stays_falls() -> None:
    factors = [Wsd(warmup=4, decay_at=8, stop=12).factor(i) for i in range(12)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:8] == [1.0] * 4
    assert factors[8:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_moving_the_end_leaves_the_stable_phase_alone() -> None:
    short, long = Wsd(4, 8, 12), Wsd(4, 80, 120)
    assert [short.factor(i) for i in range(8)] == [long.factor(i) for i in range(8)]


@pytest.mark.parametrize(("warmup", "decay_at", "stop"), [(0, 5, 9), (6, 5, 9), (2, 9, 5)])
def test_impossible_schedules_are_refused(warmup: int, decay_at: int, stop: int) -> None:
    with pytest.raises(ConfigError, match="warmup <= decay_at <= stop"):
        Wsd(warmup, decay_at, stop)
