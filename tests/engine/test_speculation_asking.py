"""Whether it pays to ask for guesses: what rounds win against what they take."""

from __future__ import annotations

import numpy as np
import pytest

from tenon.engine.policies.asking import LONG, SELDOM, TURN, Asking

STEP_S = 1e-3


def asked(it: Asking, n_steps: int, won_s: float, taken_s: float) -> int:
    """Steps that had a round, each of which would win so much were everybody asked."""
    n_rounds = 0
    for _ in range(n_steps):
        if it.due():
            n_rounds += 1
            it.tell(won_s, taken_s, STEP_S)
    return n_rounds


def test_what_wins_more_than_it_takes_is_always_asked() -> None:
    assert asked(Asking(), 2000, 7e-5, 4e-5) == 2000


@pytest.mark.parametrize("won_s", [0.0, 3e-5])
def test_what_wins_less_than_it_takes_is_asked_seldom(won_s: float) -> None:
    it = Asking()
    asked(it, 1500, won_s, 4e-5)
    assert asked(it, 1600, won_s, 4e-5) == 1600 // SELDOM[won_s == 0]


def test_rounds_that_take_no_time_are_always_held() -> None:
    assert asked(Asking(), 1000, 0.0, 0.0) == 1000


def test_guesses_that_pay_again_are_found() -> None:
    it = Asking()
    asked(it, 1000, 0.0, 4e-5)
    assert it.one_in == SELDOM[1]
    asked(it, 30 * SELDOM[1], 2e-4, 4e-5)
    assert it.one_in == 1


def test_everybody_has_a_turn() -> None:
    it, turns = Asking(), set()
    for _ in range(1000 + TURN * SELDOM[1]):
        if it.due():
            if it.one_in == SELDOM[1]:
                turns.add(it.turn)
            it.tell(0.0, 4e-5, STEP_S)
    assert turns == set(range(SELDOM[1]))


def test_others_are_asked_with_hope() -> None:
    it = Asking()
    asked(it, 1000, 0.0, 4e-5)
    it.hope()
    assert asked(it, LONG, 0.0, 4e-5) == LONG


def test_rounds_with_newcomers_say_nothing_of_what_one_takes() -> None:
    it = Asking()
    for _ in range(200):
        it.tell(2e-5, None, STEP_S)
        it.tell(2e-5, 1e-5, STEP_S)
    assert it.one_in == 1


def test_seldom_wins_are_weighed_by_how_often_they_come() -> None:
    rng = np.random.default_rng(0)
    worth, not_worth = Asking(), Asking()
    for it, each_s in ((worth, 4e-4), (not_worth, 1e-4)):
        held = 0
        for _ in range(4000):
            if it.due():
                held += 1
                it.tell(each_s * (rng.random() < 0.2), 4e-5, STEP_S)
        assert (held > 2000) == (it is worth)
