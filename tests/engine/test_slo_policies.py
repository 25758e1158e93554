"""Policies by what sequences are promised: AdaServe's algorithms against all choices there are, and by hand.

Shapes: n sequences, C columns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.engine.policies.forest import Bool, Forest
from tenon.engine.policies.slo import LARGEST, LOST, Claims, Paper, Slack, optimal, patience
from tenon.engine.policies.speculate import Load, Throughput
from tenon.engine.policies.step_time import StepTimes
from tests.engine.trees import grown

FLAT = StepTimes({1: 1e-2, 2: 1e-2})
"""However many rows a step has it takes 10 ms."""


def of(*rows: list[tuple[int, float]]) -> Forest:
    """Rows of (parent, f)."""
    forest = Forest.empty(len(rows), max((len(row) for row in rows), default=0))
    for i, row in enumerate(rows):
        for c, (parent, f) in enumerate(row):
            forest.parent[i, c], forest.f[i, c] = parent, f
            forest.depth[i, c] = 1 if parent < 0 else forest.depth[i, parent] + 1
    return forest


def needing(need: list[float], step_s: float = 1e-2, weight: float = 1.0) -> Claims:
    """Promised one token each such a step, and that far behind."""
    n = len(need)
    tokens = 1 - np.array(need, np.float64)
    return Claims(np.zeros(n), tokens, np.full(n, step_s), np.full(n, weight))


# -- algorithm 1 -------------------------------------------------------------------------------------------------


def closed_sets(forest: Forest, i: int) -> list[tuple[int, float]]:
    """Of one row: (nodes, expected tokens) of every set that holds each one's parent; of a number the best."""
    places = np.flatnonzero(forest.depth[i]).tolist()
    best: dict[int, float] = {}
    for bits in range(1 << len(places)):
        chosen = [c for j, c in enumerate(places) if bits >> j & 1]
        if all(forest.parent[i, c] < 0 or int(forest.parent[i, c]) in chosen for c in chosen):
            gained = 1 + float(sum(forest.f[i, c].astype(np.float64) for c in chosen))
            best[len(chosen)] = max(best.get(len(chosen), 0.0), gained)
    return list(best.items())


def best_of_all(forest: Forest, need: np.ndarray, budget: int) -> float | None:
    """Most expected tokens that ``budget`` rows can bring with everybody's need met; None where they cannot."""
    found: dict[int, float] = {0: 0.0}
    for i in range(len(forest.f)):
        more: dict[int, float] = {}
        for n_nodes, gained in closed_sets(forest, i):
            if gained < need[i]:
                continue
            for n, total in found.items():
                more[n + n_nodes] = max(more.get(n + n_nodes, 0.0), total + gained)
        found = more
    return max((total for n, total in found.items() if n + len(forest.f) <= budget), default=None)


SMALL = st.builds(grown, st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6), ties=st.booleans())


@given(forest=SMALL, data=st.data())
@settings(max_examples=2000, deadline=None)
def test_algorithm_1_finds_the_best_of_all_choices_or_says_that_there_is_none(
    forest: Forest, data: st.DataObject
) -> None:
    if data.draw(st.booleans(), label="sure of everything"):
        forest.f[forest.f > 0] = 1.0
    n = len(forest.f)
    # Sums of what is there, so that needs are met exactly now and then; else anything.
    sums = [gained for i in range(n) for _, gained in closed_sets(forest, i)]
    need = np.array(data.draw(st.lists(st.sampled_from(sums) | st.floats(-1, 5), min_size=n, max_size=n)), np.float64)
    budget = data.draw(st.integers(0, n + 8))
    best, found = best_of_all(forest, need, budget), optimal(forest.f, need, budget)
    assert (found is None) == (best is None)
    if found is not None:
        assert n + found.sum() <= budget
        assert n + float(forest.f[found].astype(np.float64).sum()) == pytest.approx(best, rel=1e-12)
        assert is_closed(forest, found)


def is_closed(forest: Forest, mask: Bool) -> bool:
    return all(forest.parent[i, c] < 0 or mask[i, forest.parent[i, c]] for i, c in zip(*np.nonzero(mask), strict=True))


def test_by_the_convention_of_the_paper_s_figure_5_roots_bring_nothing() -> None:
    """A request with A = 0.6 needs a node there, which its algorithms contradict: by them the root brings a token. So a
    need by the figure's convention is one more here. The trees are made up."""
    forest = of([(-1, 0.7), (-1, 0.2), (0, 0.56)], [(-1, 0.9), (0, 0.72), (1, 0.43), (0, 0.1)])
    found = optimal(forest.f, np.array([1.6, 2.1]), 2 + 5)
    assert found is not None
    assert found.tolist() == [[True, False, True, False], [True, True, True, False]]
    only_needs = optimal(forest.f, np.array([1.6, 2.1]), 2 + 3)
    assert only_needs is not None
    assert only_needs.tolist() == [[True, False, False, False], [True, True, False, False]]
    assert optimal(forest.f, np.array([1.6, 2.1]), 2 + 2) is None


# -- algorithm 2 -------------------------------------------------------------------------------------------------


def written_out(forest: Forest, load: Load, policy: Paper) -> Bool:
    """Algorithm 2 as it is printed, with what its text leaves open as the class says."""
    n, f = load.n, forest.f.astype(np.float64)
    left = most = min(load.most, max(0, policy.budget - n))
    mask = np.zeros(forest.shape, np.bool_)
    assert load.claims is not None
    step_s = float(load.seconds.mixed(n, np.array([n + most]), load.prompt_rows)[0])
    need = load.claims.need(step_s)
    capped = [min(float(need[i]), int(forest.depth[i].max(initial=0)) + 1) for i in range(len(f))]
    for i in sorted(range(len(f)), key=lambda i: capped[i] if policy.ascending else -capped[i]):
        gained = 1.0
        while gained < capped[i] and mask[i].sum() < int(LARGEST * policy.budget / n) and left > 0:
            others = [c for c in range(f.shape[1]) if not mask[i, c] and f[i, c] > 0]
            if not others:
                break
            c = max(others, key=lambda c: (f[i, c], -c))
            mask[i, c] = True
            gained += f[i, c]
            left -= 1
    while left > 0:
        rest = [(f[i, c], -i, -c) for i, c in zip(*np.nonzero(~mask & (f > 0)), strict=True)]
        if not rest:
            break
        _, i, c = max(rest)
        mask[-i, -c] = True
        left -= 1
    return mask


FORESTS = st.builds(grown, st.integers(1, 5), st.integers(1, 12), st.integers(0, 10**6), ties=st.booleans())


@given(forest=FORESTS, data=st.data())
@settings(max_examples=400, deadline=None)
def test_the_paper_s_policy_is_algorithm_2(forest: Forest, data: st.DataObject) -> None:
    n = len(forest.f)
    policy = Paper(data.draw(st.integers(1, 60)), ascending=data.draw(st.booleans()))
    need = data.draw(st.lists(st.floats(-2, 9), min_size=n, max_size=n))
    load = Load(n + data.draw(st.integers(0, 3)), data.draw(st.integers(0, 70)), FLAT, claims=needing(need))
    found = policy.choose(forest, load)
    assert np.array_equal(found, written_out(forest, load, policy))
    assert found.sum() <= load.most
    assert is_closed(forest, found)


def test_the_first_phase_asks_for_what_a_step_of_the_whole_budget_takes() -> None:
    """Prompts that the step computes besides count too."""
    forest = of([(-1, 0.5), (0, 0.25), (1, 0.2)], [(-1, 0.9), (0, 0.8), (1, 0.7)])
    seconds = StepTimes({1: 1e-2, 101: 2e-2, 201: 3e-2})
    claims = Claims(np.array([0.019, 0.0]), np.array([1.0, 0.0]), np.array([0.02, 1.0]), np.ones(2))
    # Alone: (19 ms + 10 ms) / 20 ms - 1, half a token, is needed, which the root brings: both nodes go to the other.
    assert Paper(4).choose(forest, Load(2, 9, seconds, claims=claims)).sum(1).tolist() == [0, 2]
    # With 200 rows of a prompt nearly 1.5 tokens are: a node is for the first.
    assert Paper(4).choose(forest, Load(2, 9, seconds, claims=claims, prompt_rows=200)).sum(1).tolist() == [1, 1]


@given(forest=FORESTS, budget=st.integers(1, 60))
def test_where_nothing_is_promised_the_paper_s_policy_is_throughput(forest: Forest, budget: int) -> None:
    load = Load(len(forest.f), 99, FLAT)
    assert np.array_equal(Paper(budget).choose(forest, load), Throughput(budget).choose(forest, load))


@pytest.mark.parametrize(
    ("n", "drafts"), [(1, (8, 3)), (32, (7, 3)), (40, (5, 2)), (64, (4, 1)), (200, (4, 1))]
)  # fmt: skip
def test_the_paper_s_trees_are_the_smaller_the_more_decode(n: int, drafts: tuple[int, int]) -> None:
    assert Paper(256).drafts(n) == drafts


# -- ours --------------------------------------------------------------------------------------------------------


@given(forest=FORESTS, data=st.data())
@settings(max_examples=200, deadline=None)
def test_ours_chooses_trees_within_the_budget(forest: Forest, data: st.DataObject) -> None:
    n = len(forest.f)
    need = data.draw(st.lists(st.floats(-5, 9), min_size=n, max_size=n))
    load = Load(n, data.draw(st.integers(0, 40)), StepTimes({1: 1e-2, 64: 2e-2}), claims=needing(need))
    mask = Slack().choose(forest, load)
    if mask is not None:
        assert 0 < mask.sum() <= load.most
        assert is_closed(forest, mask)


def running(*since_s: float, weight: float = 1.0) -> Claims:
    """Promised a token each 10 ms, and with 15 of them since their first."""
    n = len(since_s)
    return Claims(np.array(since_s), np.full(n, 15.0), np.full(n, 1e-2), np.full(n, weight))


@pytest.mark.parametrize(
    ("since_s", "who"),
    [((0.05, 0.16), 1), ((0.16, 0.05), 0), ((0.14, 0.16), 1), ((0.16, 0.50), 0), ((0.05, 0.50), 1)],
    ids=[
        "the late one",
        "wherever it stands",
        "the later one",
        "not one that is lost",
        "one that is lost is not worst",
    ],
)
def test_of_equal_guesses_ours_takes_those_of_who_needs_them(since_s: tuple[float, float], who: int) -> None:
    forest = of([(-1, 0.6), (0, 0.5)], [(-1, 0.6), (0, 0.5)])
    mask = Slack().choose(forest, Load(2, 2, FLAT, claims=running(*since_s)))
    assert mask is not None
    assert mask.sum(1).tolist() == [2 * (who == 0), 2 * (who == 1)]


def test_a_node_is_worth_its_rows_time_at_what_time_usually_brings() -> None:
    """One step with good guesses does not stop where its own average would be best."""
    seconds = StepTimes({1: 1e-2, 101: 1.1e-1})  # a millisecond a row
    poor, rich = of([(-1, 0.12)] * 4), of([(-1, 0.99), (0, 0.98), (1, 0.6), (2, 0.5)])
    policy = Slack()
    assert policy.choose(poor, Load(1, 9, seconds)) is None
    for _ in range(200):
        policy.choose(poor, Load(1, 9, seconds))
    # Time brings 100 tokens a second, a row's millisecond 0.1: all of them are worth it.
    found = policy.choose(rich, Load(1, 9, seconds))
    assert found is not None
    assert found.sum() == 4


def test_steps_with_prompts_are_judged_by_their_rows_alone() -> None:
    forest = of([(-1, 0.6), (0, 0.5)], [(-1, 0.6), (0, 0.5)])
    seconds = StepTimes({1: 1e-2, 101: 2e-2})
    alone, beside = (Slack().choose(forest, Load(2, 9, seconds, prompt_rows=rows)) for rows in (0, 500))
    assert alone is not None
    assert np.array_equal(alone, beside)


def test_of_equal_sequences_ours_takes_the_guesses_of_who_weighs_more() -> None:
    forest = of([(-1, 0.6), (0, 0.5)], [(-1, 0.6), (0, 0.5)])
    claims = replace(running(0.15, 0.15), weight=np.array([1.0, 2.0]))
    mask = Slack().choose(forest, Load(2, 2, FLAT, claims=claims))
    assert mask is not None
    assert mask.tolist() == [[False, False], [True, True]]


# -- prompts beside decodes --------------------------------------------------------------------------------------


@given(
    since=st.lists(st.floats(0, 0.5), min_size=1, max_size=5),
    least=st.integers(1, 20),
    more=st.integers(0, 100),
    row_s=st.sampled_from([0.0, 1e-5, 1e-3]),
)
def test_prompts_have_as_many_rows_as_leave_those_in_time_who_are(
    since: list[float], least: int, more: int, row_s: float
) -> None:
    claims, most = running(*since), least + more

    def step_s(rows: int) -> float:
        return 5e-3 + rows * row_s

    rows = patience(claims, 1.0, step_s, least, most)
    assert least <= rows <= most
    left_s = [0.16 - one for one in since if one + step_s(0) <= LOST * 0.16]
    n_late = sum(one + step_s(0) > 0.16 for one in since)
    if not left_s or n_late:  # of five one is many
        assert rows == most
    elif rows > least:
        assert step_s(rows) <= min(left_s) + 1e-12
    if rows < most:
        assert step_s(rows + 1) > min(left_s)


@pytest.mark.parametrize(
    ("since_s", "rows"),
    [
        ([0.1005], 54),
        ([0.16], 10),
        ([0.17], 10),
        ([0.2], 54),
        ([0.16, 0.2], 10),
        ([0.16, 0.16, 0.2], 500),
        ([0.2] * 20, 500),
    ],
)
def test_prompts_wait_for_who_might_still_make_up_for_it(since_s: list[float], rows: int) -> None:
    """In time, just late, late, and too late for prompts to matter, beside nineteen who have time; then two of twenty,
    which is not many yet, one of whom is lost, and three; at last all."""
    claims = running(*since_s, *[0.1005] * (20 - len(since_s)))
    assert patience(claims, 1.0, lambda rows: 5e-3 + 1e-3 * rows, 10, 500) == rows


def test_where_nobody_is_promised_anything_prompts_have_all_the_room() -> None:
    nothing = Claims(np.zeros(2), np.ones(2), np.full(2, np.inf), np.ones(2))
    assert patience(None, 1.0, float, 1, 500) == patience(nothing, 1.0, float, 1, 500) == 500
