"""The picture of what is where: strips of running sequences, the pools' fill."""

from __future__ import annotations

import pytest

from tenon.engine.engine import Engine
from tenon.engine.messages import Add
from tenon.engine.residency import MAX_CELLS, MAX_ROWS
from tests.engine.build import run
from tests.engine.test_explain import lose, small, tokens


def holed() -> Engine:
    """Of a context of six full blocks the third and the last are gone."""
    made = small(n_blocks=30, max_step_tokens=10)
    run(made, [Add("earlier", tokens(0), 1, 0)])
    for pool in made.scheduler.pools:
        for entry in [entry for entry in pool.entries if entry.position in (32, 80)]:
            pool.evict.evicted(entry, 0.0)
            pool._unpublish(entry, "evicted")
            pool._free.append(entry.block)
    made.check_integrity()
    return made


def strip(made: Engine) -> str:
    (row,) = made.residency(0.0).rows
    return row.cells


def test_a_strip_shows_holes_fill() -> None:
    made, seen = holed(), []
    made.add(Add("a", tokens(0), 20, 0))
    while made.has_work:
        made.tick(0.0)
        if made.has_work and (not seen or strip(made) != seen[-1]):
            seen.append(strip(made))
    assert seen == ["rrhrrtt", "rrcrrtt", "rrcrrcc", "rrcrrccc"]


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_a_strip_is_bounded_and_nothing_rare_is_lost_in_it(n: int) -> None:
    made = small(block_tokens=1, n_blocks=700)
    run(made, [Add("earlier", tokens(0, n), 1, 0)])
    made.add(Add("a", tokens(0, n), 5, 0))
    made.tick(0.0)
    cells = strip(made)
    assert len(cells) == min(n + 1, MAX_CELLS)
    assert cells[-1] == "c"
    assert cells.count("r") >= len(cells) - 2


def test_rows_are_bounded() -> None:
    made = small(n_blocks=200, max_sequences=100)
    for i in range(100):
        made.add(Add(str(i), tokens(i, 5), 5, 0))
    made.tick(0.0)
    seen = made.residency(0.0)
    assert (seen.running, len(seen.rows)) == (100, MAX_ROWS)


def test_the_fill_adds_up_and_ages() -> None:
    made = small(n_blocks=30)
    run(made, [Add("a", tokens(0), 1, 0)])
    made.add(Add("b", tokens(1, 40), 5, 0))
    made.tick(0.0)
    for now_s, age in ((0.5, 0), (5.0, 1), (50.0, 2), (500.0, 3), (3000.0, 4), (4000.0, 5)):
        seen = made.residency(now_s)
        assert seen.free + seen.held + sum(seen.idle_by_age) == 2 * 29
        assert seen.idle_by_age[age] == 12 == sum(seen.idle_by_age) == sum(seen.idle_by_turn)
        assert seen.held == 6


def test_turns_of_a_conversation_are_told_apart() -> None:
    made = small(n_blocks=60)
    for n in (40, 80, 120):
        run(made, [Add(str(n), tokens(0, n), 1, 0)])
    run(made, [Add("alone", tokens(1, 40), 1, 0)])
    assert made.residency(0.0).idle_by_turn == (2 * 2, 0, 2 * 7, 0, 0)
    lose(made, 9)
    assert made.residency(0.0).idle_by_turn == (0, 0, 0, 0, 0)
