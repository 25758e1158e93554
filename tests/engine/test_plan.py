"""How far a draft model looks ahead: as far as what it finds is worth the time, to those who get it."""

from __future__ import annotations

import numpy as np
import pytest

from tenon.engine.policies.plan import DraftPlan
from tenon.engine.policies.step_time import StepTimes

SECONDS = StepTimes({1: 30e-3, 129: 55e-3})
DRAFT = StepTimes({1: 4e-3})
RATE = 100.0
"""Tokens a second. A level for 16 trees takes 4 ms, in which steps bring 0.4 tokens, and a row about 0.02."""


def plan() -> DraftPlan:
    made = DraftPlan(SECONDS, DRAFT, 8)
    assert made.choose([0] * 16, 16)[0] > 0
    made.told(RATE)
    return made


def goes_on(hopes: list[float], counts: list[float]) -> bool:
    return plan().goes_on(np.array(hopes), np.array(counts), len(hopes))


def test_another_level_is_drafted_as_long_as_it_pays() -> None:
    assert goes_on([0.5] * 16, [1.0] * 16)
    assert not goes_on([0.05] * 16, [1.0] * 16)


def test_it_pays_by_what_tokens_count() -> None:
    """Hopes of those whose tokens count more than others' or less; small ones pay where they count enough."""
    hopes = [0.9] * 8 + [0.01] * 8
    assert goes_on(hopes, [1.0] * 8 + [0.15] * 8)
    assert not goes_on([0.1] * 8 + [0.01] * 8, [0.15] * 8 + [1.0] * 8)
    assert goes_on([0.1] * 8 + [0.01] * 8, [3.0] * 8 + [1.0] * 8)


@pytest.mark.parametrize("hopeless", [0, 8, 64])
def test_trees_that_would_get_no_node_cost_nothing(hopeless: int) -> None:
    """What is not worth a row is not verified, so it does not speak against a level for the others."""
    n = 8 + hopeless
    made = DraftPlan(SECONDS, DRAFT, 8)
    made.choose([0] * n, n)
    made.told(RATE)
    assert made.goes_on(np.array([0.5] * 8 + [0.005] * hopeless), np.ones(n), n)
