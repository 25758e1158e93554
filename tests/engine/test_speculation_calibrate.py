"""How likely guesses are said to be: as many come true as were predicted, whatever the truth, and in C it is the same.

Shapes: n sequences, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.engine.policies.calibrate import DEPTHS, HIGH, LOW, WARM, Calibrator, Observation, warmth
from tenon.engine.policies.forest import Forest
from tenon.engine.speculation import native
from tenon.engine.speculation.native import QuickCalibrator
from tests.engine.trees import grown

N_KINDS: Final = 3
Truth = Callable[[int, int, int, float, int], float]
"""Of kind, warmth, depth, q and rank: how likely such a guess is true."""


def logit(x: float) -> float:
    return math.log(x / (1 - x))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


TRUTHS: dict[str, Truth] = {
    "as they say": lambda kind, warm, depth, q, rank: q,
    "hopeless": lambda kind, warm, depth, q, rank: 0.05,
    "nearly sure": lambda kind, warm, depth, q, rank: 0.93,
    "boasting": lambda kind, warm, depth, q, rank: sigmoid(0.4 * logit(q) - 1.2),
    "modest": lambda kind, warm, depth, q, rank: sigmoid(1.6 * logit(q) + 1.0),
    "by kind": lambda kind, warm, depth, q, rank: (0.2, 0.5, 0.8)[kind],
    "by depth": lambda kind, warm, depth, q, rank: sigmoid(logit(q) + 1.5 - 0.6 * depth),
    "by warmth": lambda kind, warm, depth, q, rank: sigmoid(logit(q) - 0.7 * warm),
    "the first alone": lambda kind, warm, depth, q, rank: 0.75 if rank == 0 else 0.05,
}


def drawn(rng: np.random.Generator, truth: Truth, warm: int | None = None) -> Observation:
    """One guess and what came of it; the deeper the rarer, as those whose parents came true are."""
    kind, rank, depth = int(rng.integers(N_KINDS)), int(rng.integers(2)), min(int(rng.geometric(0.4)), 10)
    warm = int(rng.integers(len(WARM) + 1)) if warm is None else warm
    q = float(np.clip(rng.beta(2, 1.5) if rank == 0 else rng.beta(1, 4), 0.02, 0.98))
    return kind, warm, depth, q, rank, bool(rng.random() < truth(kind, warm, depth, q, rank))


def taught(
    it: Calibrator, rng: np.random.Generator, truth: Truth, n: int, warm: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """``it`` sees ``n`` guesses, a few at a time. Returns, by kind, how many it predicted to come true before it saw
    them, and how many had to be expected."""
    predicted, expected = np.zeros(N_KINDS), np.zeros(N_KINDS)
    for _ in range(n // 5):
        seen = [drawn(rng, truth, warm) for _ in range(5)]
        kinds, warms, depths, qs, ranks, _ = (np.array(column) for column in zip(*seen, strict=True))
        np.add.at(predicted, kinds, it.probabilities(kinds, warms, depths, qs, ranks))
        np.add.at(expected, kinds, [truth(*one[:5]) for one in seen])
        it.observe(seen)
    return predicted, expected


@pytest.mark.parametrize("truth", TRUTHS)
def test_after_two_thousand_guesses_as_many_come_true_as_are_predicted(truth: str) -> None:
    rng, it = np.random.default_rng(len(truth)), Calibrator(N_KINDS)
    taught(it, rng, TRUTHS[truth], 2000, warm=1)
    predicted, expected = taught(it, rng, TRUTHS[truth], 6000, warm=1)
    assert predicted.sum() == pytest.approx(expected.sum(), rel=0.1)
    assert predicted == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("truth", TRUTHS)
def test_company_of_other_temperatures_teaches_too(truth: str) -> None:
    """A step is as large as suits a half, so who is all but always wrong is found out later."""
    rng, it = np.random.default_rng(len(truth)), Calibrator(N_KINDS)
    taught(it, rng, TRUTHS[truth], 2000)
    predicted, expected = taught(it, rng, TRUTHS[truth], 6000)
    assert predicted.sum() == pytest.approx(expected.sum(), rel=0.3 if truth == "hopeless" else 0.1)


def test_a_change_of_text_is_followed() -> None:
    rng, it = np.random.default_rng(1), Calibrator(N_KINDS)
    taught(it, rng, TRUTHS["nearly sure"], 10_000, warm=0)
    taught(it, rng, TRUTHS["boasting"], 2000, warm=0)
    predicted, expected = taught(it, rng, TRUTHS["boasting"], 6000, warm=0)
    assert predicted.sum() == pytest.approx(expected.sum(), rel=0.1)


def test_before_anything_is_seen_guesses_are_believed_the_less_the_warmer() -> None:
    it, nothing = Calibrator(1), np.zeros(1, np.int64)
    p = [float(it.probabilities(nothing, nothing + w, nothing + 1, np.array([0.6]), nothing)[0]) for w in range(4)]
    assert p[0] == pytest.approx(0.6)
    assert p == sorted(p, reverse=True)
    assert [warmth(t) for t in (0.0, 0.1, 0.5, 0.7, 0.9, 1.5)] == [0, 1, 1, 2, 2, 3]


# -- judging -----------------------------------------------------------------------------------------------------

CASES = st.tuples(
    st.integers(1, 5), st.integers(1, 16), st.integers(0, 9999), st.booleans(), st.booleans(),
    st.sampled_from(sorted(TRUTHS)),
)  # fmt: skip


def case(drawn_case: tuple[int, int, int, bool, bool, str], it: Calibrator) -> tuple[Forest, np.ndarray]:
    """A forest to judge and its rows' warmths; ``it`` has learned something by then."""
    n, C, seed, ties, chains, truth = drawn_case
    rng = np.random.default_rng(seed)
    taught(it, rng, TRUTHS[truth], 300)
    forest = grown(n, C, seed, ties=ties, chains=chains, n_kinds=N_KINDS)
    forest.f[:] = -1
    return forest, rng.integers(0, len(WARM) + 1, n)


@settings(max_examples=60)
@given(drawn_case=CASES)
def test_siblings_together_are_less_likely_than_their_parent(drawn_case: tuple) -> None:
    it = Calibrator(N_KINDS)
    forest, warm_n = case(drawn_case, it)
    it.judge(forest, warm_n)
    assert not forest.f[forest.depth == 0].any()
    for i in range(forest.shape[0]):
        for parent in range(-1, forest.shape[1]):
            children = forest.f[i, (forest.depth[i] > 0) & (forest.parent[i] == parent)]
            above = forest.f[i, parent] if parent >= 0 else 1.0
            assert children.sum() <= above * HIGH * (1 + 1e-6)
            assert (children >= above * LOW / 20).all()


@settings(max_examples=60)
@given(seed=st.integers(0, 9999), truth=st.sampled_from(sorted(TRUTHS)), n=st.integers(1, 2000))
def test_in_c_the_same_is_learned(seed: int, truth: str, n: int) -> None:
    lib = native.load()
    assert lib is not None
    one, other = Calibrator(N_KINDS), QuickCalibrator(N_KINDS, lib)
    for it in (one, other):
        taught(it, np.random.default_rng(seed), TRUTHS[truth], n)
    for mine, theirs in zip(one.weights, other.weights, strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-9, atol=1e-12)


@settings(max_examples=60)
@given(drawn_case=CASES)
def test_in_c_the_same_is_judged(drawn_case: tuple) -> None:
    lib = native.load()
    assert lib is not None
    one, other = Calibrator(N_KINDS), QuickCalibrator(N_KINDS, lib)
    (forest, warm_n), (same, _) = case(drawn_case, one), case(drawn_case, other)
    one.judge(forest, warm_n)
    other.judge(same, warm_n)
    np.testing.assert_allclose(same.f, forest.f, rtol=2e-6, atol=0)


@pytest.mark.parametrize("company", [False, True])
@pytest.mark.parametrize("in_c", [False, True])
def test_who_stands_beside_it_does_not_change_what_a_guess_is_worth(in_c: bool, company: bool) -> None:
    """A chain that is nearly sure, alone and beside a tree that branches."""
    lib = native.load()
    it = QuickCalibrator(1, lib) if in_c and lib is not None else Calibrator(1)
    forest = Forest.empty(2, 4)
    forest.depth[0], forest.parent[0], forest.q[0] = range(1, 5), range(-1, 3), 1.0
    if company:
        forest.depth[1, :2], forest.rank[1, :2], forest.q[1, :2] = 1, (0, 1), 0.4
    it.judge(forest, np.zeros(2, np.int64))
    assert forest.f[0] == pytest.approx([HIGH ** (k + 1) for k in range(4)])


def test_depths_beyond_the_last_are_judged_like_it() -> None:
    it = Calibrator(N_KINDS)
    taught(it, np.random.default_rng(3), TRUTHS["by depth"], 500)
    zeros, deep = np.zeros(3, np.int64), np.array([DEPTHS, DEPTHS + 1, 60])
    assert len(set(it.probabilities(zeros, zeros, deep, np.full(3, 0.5), zeros).tolist())) == 1
