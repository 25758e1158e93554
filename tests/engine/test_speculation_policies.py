"""What policies choose: trees within budgets, whatever the forest; "pays" the best of all choices. In C it is the same.

Shapes: n sequences, C columns.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.engine.policies.forest import Bool, Forest, merged
from tenon.engine.policies.speculate import (
    MARGIN,
    EqualSplit,
    FixedTree,
    Load,
    Pays,
    Throughput,
)
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.policies.table import SPECULATES
from tenon.engine.speculation import native
from tenon.engine.speculation.native import MOST_NODES, QuickPays
from tests.engine.trees import grown

FORESTS = st.builds(
    grown, st.integers(1, 5), st.integers(1, 9), st.integers(0, 9999), ties=st.booleans(), chains=st.booleans()
)
DISTINCT = st.builds(grown, st.integers(1, 5), st.integers(1, 9), st.integers(0, 9999), chains=st.booleans())


def machine(seed: int) -> StepTimes:
    """One whose steps take longer by their rows, at first by little."""
    rng = np.random.default_rng(seed)
    rows = (1, 8, 32, 256)
    seconds = np.cumsum([1e-3, *(rng.uniform(0, 1e-3) * np.diff(rows) * (0.02, 0.1, 1.0))])
    return StepTimes(dict(zip(rows, seconds.tolist(), strict=True)))


LOADS = st.builds(
    lambda others, most, seed: (others, most, machine(seed)), st.integers(0, 40), st.integers(1, 50), st.integers(0, 99)
)


def load_of(forest: Forest, drawn: tuple[int, int, StepTimes]) -> Load:
    """``others`` decode without a tree."""
    others, most, seconds = drawn
    return Load(forest.shape[0] + others, most, seconds)


def chosen(forest: Forest, policy: str, load: Load) -> Bool:
    mask = SPECULATES[policy]().choose(forest, load)
    return np.zeros(forest.shape, np.bool_) if mask is None else mask


@given(forest=FORESTS)
def test_the_spine_goes_from_each_root_to_the_likeliest_child_until_there_is_none(forest: Forest) -> None:
    walked = np.zeros(forest.shape, np.bool_)
    for i in range(forest.shape[0]):
        at = -1
        while children := [c for c in np.flatnonzero(forest.depth[i]) if forest.parent[i, c] == at]:
            at = max(children, key=lambda c: forest.f[i, c])  # of equals the first
            walked[i, at] = True
    assert np.array_equal(forest.spine(), walked)


@pytest.mark.parametrize("policy", SPECULATES)
@given(forest=FORESTS, drawn=LOADS)
@settings(max_examples=40)
def test_what_is_chosen_are_trees_within_the_budget(policy: str, forest: Forest, drawn: tuple) -> None:
    f = forest.f.copy()
    mask, load = chosen(forest, policy, load_of(forest, drawn)), load_of(forest, drawn)
    assert mask.sum() <= load.most
    assert not mask[forest.depth == 0].any()
    for i, c in zip(*np.nonzero(mask), strict=True):
        assert forest.parent[i, c] < 0 or mask[i, forest.parent[i, c]]
    assert np.array_equal(forest.f, f)


@pytest.mark.parametrize("policy", SPECULATES)
@given(forest=FORESTS, drawn=LOADS, more=st.integers(0, 30))
@settings(max_examples=40)
def test_with_more_room_no_less_is_chosen(policy: str, forest: Forest, drawn: tuple, more: int) -> None:
    load = load_of(forest, drawn)
    few = chosen(forest, policy, load)
    assert (few <= chosen(forest, policy, replace(load, most=load.most + more))).all()


@pytest.mark.parametrize("rule", [Throughput, EqualSplit, FixedTree])
@given(forest=FORESTS, budget=st.integers(0, 40), more=st.integers(0, 30))
@settings(max_examples=40)
def test_with_a_larger_budget_no_less_is_chosen(
    rule: type[Throughput | EqualSplit | FixedTree], forest: Forest, budget: int, more: int
) -> None:
    load = Load(forest.shape[0], 10_000, machine(0))
    few, many = (rule(b).choose(forest, load) for b in (budget, budget + more))
    assert (few <= many).all()
    if rule is not FixedTree:  # roots are among its rows
        assert few.sum() + load.n <= max(budget, load.n)
    else:
        assert few.sum(1).max() <= budget


@pytest.mark.parametrize("policy", SPECULATES)
@given(forest=DISTINCT, drawn=LOADS, data=st.data())
@settings(max_examples=40)
def test_it_does_not_matter_who_stands_where(policy: str, forest: Forest, drawn: tuple, data: st.DataObject) -> None:
    n = forest.shape[0]
    order = data.draw(st.permutations(range(n)))
    arrays = {name: getattr(forest, name)[order] for name in ("token", "parent", "depth", "rank", "source", "q", "f")}
    other = replace(Forest.empty(*forest.shape), **arrays)
    load = load_of(forest, drawn)
    assert np.array_equal(chosen(other, policy, load), chosen(forest, policy, load)[order])


def rate(forest: Forest, mask: Bool, load: Load) -> float:
    """Tokens a second that are expected of a step which verifies these nodes."""
    rows = load.n + int(mask.sum())
    gained = load.n + float(forest.f[mask].astype(np.float64).sum())
    return gained / float(load.seconds.guessed(load.n, np.array([rows]))[0])


def all_choices(forest: Forest, load: Load, *, chains: bool) -> list[Bool]:
    """Every set of nodes that holds each one's parent and has room; chains along the likeliest if asked for."""
    places = [tuple(place) for place in np.argwhere(forest.depth > 0)]
    found = []
    for bits in itertools.product((False, True), repeat=len(places)):
        mask = np.zeros(forest.shape, np.bool_)
        for (i, c), bit in zip(places, bits, strict=True):
            mask[i, c] = bit
        up = np.take_along_axis(mask, np.maximum(forest.parent, 0), 1) | (forest.parent < 0)
        if not (mask & ~up).any() and mask.sum() <= load.most and not (chains and (mask & ~forest.spine()).any()):
            found.append(mask)
    return found


@pytest.mark.parametrize("policy", ["pays", "per-second"])
@given(forest=st.builds(grown, st.integers(1, 2), st.integers(1, 4), st.integers(0, 9999), ties=st.booleans()),
       drawn=LOADS)  # fmt: skip
@settings(max_examples=60)
def test_what_pays_is_the_best_of_all_choices_or_nothing(policy: str, forest: Forest, drawn: tuple) -> None:
    load = load_of(forest, drawn)
    found = SPECULATES[policy]().choose(forest, load)
    plain = load.n / load.seconds.plain(load.n)
    best = max(rate(forest, mask, load) for mask in all_choices(forest, load, chains=policy == "per-second"))
    if found is None:
        assert best <= plain * (1 + MARGIN) * (1 + 1e-12)
    else:
        assert rate(forest, found, load) >= best * (1 - 1e-12)
        assert rate(forest, found, load) >= plain * (1 + MARGIN) * (1 - 1e-12)


@given(forest=FORESTS, n=st.integers(1, 30))
def test_where_rows_cost_as_much_as_steps_nothing_pays(forest: Forest, n: int) -> None:
    dear = StepTimes({1: 1e-3, 2: 2e-3})
    assert all(SPECULATES[policy]().choose(forest, Load(n, 99, dear)) is None for policy in ("pays", "per-second"))


@pytest.mark.parametrize("n", [1, 2, 4, 5, 64, 65, 1000])
def test_chains_by_batch_are_the_table_s(n: int) -> None:
    forest = grown(3, 9, 5, chains=True)
    k = {1: 8, 2: 6, 4: 6, 5: 4, 64: 1, 65: 0, 1000: 0}[n]
    mask = chosen(forest, "by-batch", Load(n, 99, machine(0)))
    assert np.array_equal(mask, (forest.depth > 0) & (forest.depth <= k))


# -- in C --------------------------------------------------------------------------------------------------------


@given(forest=FORESTS, drawn=LOADS)
@settings(max_examples=300)
def test_in_c_the_same_is_chosen(forest: Forest, drawn: tuple) -> None:
    same_in_c(forest, load_of(forest, drawn))


@pytest.mark.parametrize(("n", "C"), [(1, 256), (2, 128), (2, 129), (8, 64), (2, 257), (40, 16)])
@pytest.mark.parametrize("most", [0, 1, 7, 300])
def test_in_c_the_same_is_chosen_of_many(n: int, C: int, most: int) -> None:
    """On both sides of where it takes memory, and of where numpy takes over."""
    assert MOST_NODES == 512
    for seed in range(4):
        same_in_c(grown(n, C, seed, ties=seed % 2 == 1), Load(n + seed, most, machine(seed)))


def same_in_c(forest: Forest, load: Load) -> None:
    lib, seconds = native.load(), load.seconds
    assert lib is not None
    assert isinstance(seconds, StepTimes)
    right, found = Pays().choose(forest, load), QuickPays(lib, seconds).choose(forest, load)
    assert (right is None) == (found is None)
    assert right is None or np.array_equal(found, right)


# -- several drafters ----------------------------------------------------------------------------------------------


def paths(forest: Forest, i: int) -> dict[tuple[int, ...], float]:
    """Of a row's nodes: the tokens down to each, and how likely it is; of those with the same tokens the likelier."""
    found: dict[tuple[int, ...], float] = {}
    path: list[tuple[int, ...]] = []
    for c in range(int(np.count_nonzero(forest.depth[i]))):
        parent = int(forest.parent[i, c])
        path.append((*(path[parent] if parent >= 0 else ()), int(forest.token[i, c])))
        assert forest.depth[i, c] == len(path[-1])
        found[path[-1]] = max(found.get(path[-1], 0.0), float(forest.f[i, c]))
    return found


@given(seeds=st.lists(st.integers(0, 9999), min_size=2, max_size=3), n=st.integers(1, 3), C=st.integers(1, 8))
def test_guesses_of_several_are_one_trie_of_the_likeliest(seeds: list[int], n: int, C: int) -> None:
    forests = [grown(n, 8, seed) for seed in seeds]
    one = merged(forests, C)
    for i in range(n):
        known: dict[tuple[int, ...], float] = {}
        for forest in forests:
            for path, f in paths(forest, i).items():
                known[path] = max(known.get(path, 0.0), f)
        found = paths(one, i)
        assert len(found) == np.count_nonzero(one.depth[i]) == min(C, len(known))
        for path, f in found.items():
            assert f == known[path]
        assert sorted(found.values()) == pytest.approx(sorted(known.values())[-len(found) :])


@pytest.mark.parametrize("policy", [name for name in SPECULATES if name.startswith("chain") or name == "per-second"])
@given(seeds=st.lists(st.integers(0, 9999), min_size=1, max_size=3), n=st.integers(1, 3), ties=st.booleans())
@settings(max_examples=40)
def test_chains_are_chains_of_the_likeliest(policy: str, seeds: list[int], n: int, ties: bool) -> None:
    """Also where two drafters each have a likeliest child of the same node."""
    forest = merged([grown(n, 8, seed, ties=ties) for seed in seeds], 16)
    mask = chosen(forest, policy, Load(n, 99, StepTimes({1: 1e-3})))
    for i in range(n):
        at = -1
        for c in np.flatnonzero(mask[i]).tolist():
            siblings = forest.f[i, (forest.parent[i] == at) & (forest.depth[i] > 0)]
            assert forest.parent[i, c] == at
            assert forest.f[i, c] == siblings.max()
            at = c
