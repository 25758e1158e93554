"""The law of what is emitted, exactly: for every small tree and every sampling rule it is that of plain decoding.

Rows' laws are taken from the steps that verify a tree; what the walk makes of every combination of their samples is
weighed. Shapes: V vocabulary, m rows of a tree.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from tenon.engine.executors.hash import HashExecutor
from tenon.engine.messages import Add
from tenon.engine.speculation.tree import ROOT, Tree
from tests.engine.build import hash_engine
from tests.engine.laws import Plain, draw_and_reject, law_of, rejected, softmax, walked
from tests.engine.trees import Scripted, decoding, named, shapes, speculating

CASES = [
    (2, range(5)), (4, range(5)), (6, range(4)),
    *(pytest.param(V, [n], marks=pytest.mark.slow) for V, n in ((2, 5), (2, 6), (3, 6), (4, 5), (5, 4), (6, 4))),
]  # fmt: skip
"""Vocabulary, and numbers of nodes of which all trees are looked at."""
TOLERANCE = 1e-9
SHOWS = 1e-2
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top-k": {"temperature": 1.0, "top_k": 2},
    "top-p": {"temperature": 0.8, "top_p": 0.7},
    "min-p": {"temperature": 1.5, "min_p": 0.3},
    "filtered": {"temperature": 1.2, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
    "penalised": {"temperature": 0.9, "repetition_penalty": 1.7, "frequency_penalty": 0.6, "presence_penalty": 0.8},
    "encouraged": {"temperature": 1.1, "repetition_penalty": 0.6, "frequency_penalty": -0.7, "top_p": 0.95},
    "bad words": {"temperature": 1.0, "bad_words": ((0, 1, 1), (1, 1, 0)), "logit_bias": ((1, 0.7),)},
    "penalised, greedy": {"temperature": 0.0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
}


def request(vocab_size: int, option: str) -> Add:
    return Add("r", (0, 1, vocab_size - 1, 0, 1), 20, 3, **OPTIONS[option])


def trees(vocab_size: int, n_nodes: range | list[int]) -> list[Tree]:
    return [_tree(vocab_size, tuple(parents)) for n in n_nodes for parents in shapes(n)]


@cache
def _tree(vocab_size: int, parents: tuple[int, ...]) -> Tree:
    seed = [vocab_size, *(parent + 1 for parent in parents)]
    return named(np.random.default_rng(seed), list(parents), vocab_size)


def verified(tree: Tree, add: Add, vocab_size: int) -> tuple[tuple[int, ...], np.ndarray, list[tuple[int, ...]]]:
    """The context below which an engine verifies ``tree``, the laws (m, V) of the rows of that step, what they see."""
    made = speculating(hash_engine(vocab_size=vocab_size), [Scripted(lambda _: tree)])
    seq = decoding(made, add)
    context = tuple(seq.tokens[: seq.n_tokens].tolist())
    step = made.scheduler.schedule(0.0)
    assert step is not None
    assert step.n_rows == 1 + len(tree)
    seen = [(*context, *tree.path(node)) for node in range(ROOT, len(tree))]
    logits = HashExecutor(vocab_size).logits
    return context, np.stack([law_of(logits(np.array(s, np.int32)), step, r) for r, s in enumerate(seen)]), seen


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("vocab_size", "n_nodes"), CASES)
def test_the_walk_s_law_is_plain_decoding_s(vocab_size: int, n_nodes: range | list[int], option: str) -> None:
    add = request(vocab_size, option)
    plain = Plain(add, vocab_size)
    for tree in trees(vocab_size, n_nodes):
        context, laws_mV, seen = verified(tree, add, vocab_size)
        n = 1 + max(tree.depths, default=0)
        right = plain.law(context, n)
        assert right.sum() == pytest.approx(1)
        assert np.abs(walked(tree, laws_mV, plain, context, n) - right).sum() < TOLERANCE, tree.parents
        for law_V, s in zip(laws_mV, seen, strict=True):
            assert np.array_equal(law_V, plain.next(s))


@pytest.mark.parametrize("option", ["plain", "hot", "penalised"])
def test_rejection_is_wrong_where_a_tree_was_not_drawn(option: str) -> None:
    """The control: it takes a guess with probability min(1, p / q), as if q had drawn it."""
    add = request(4, option)
    plain = Plain(add, 4)
    for tree in trees(4, range(1, 5)):
        context, laws_mV, seen = verified(tree, add, 4)
        q_mV = np.stack([softmax(HashExecutor(4, seed=8).logits(np.array(s, np.int32))) for s in seen])
        n = 1 + max(tree.depths)
        wrong = rejected(tree, laws_mV, q_mV, plain, context, n)
        assert wrong.sum() == pytest.approx(1)
        assert np.abs(wrong - plain.law(context, n)).sum() > SHOWS, tree.parents


@pytest.mark.parametrize(("keeps", "right"), [((0, 1, 2), (0.2, 0.3, 0.5)), ((0,), (0.3, 0.15, 0.55))])
def test_draws_must_not_be_pruned_by_what_they_are(keeps: tuple[int, ...], right: tuple[float, ...]) -> None:
    """The control: rejection is exact for guesses that are drawn, until somebody looks at the draw."""
    p, q = np.array((0.2, 0.3, 0.5)), np.array((0.5, 0.3, 0.2))
    assert np.abs(draw_and_reject(p, q, keeps) - right).sum() < TOLERANCE
