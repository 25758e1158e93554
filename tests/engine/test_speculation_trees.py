"""What was guessed, as it is told: counts, and the newest trees with what came of them."""

from __future__ import annotations

import msgspec
import pytest

from tenon.engine import messages as m
from tenon.engine.engine import Engine
from tenon.engine.messages import Add, Verified
from tenon.engine.speculation.kept import MAX_TOLD, MAX_TREES
from tests.engine.build import Outputs, hash_engine, run

VOCAB = 12
"""Few tokens, so that guesses come true."""
LOOP = (3, 4, 5, 6, 7, 8) * 6


def guessing(**config: object) -> Engine:
    made = {"speculative": "ngram,suffix", "speculative_policy": "fixed-tree"} | config
    return hash_engine(200, VOCAB, **made)  # type: ignore[arg-type]


def asked(n: int, max_tokens: int = 40) -> list[Add]:
    return [Add(f"r{i}", LOOP[: 20 + i], max_tokens, i, 1 + i % 2, temperature=0.6) for i in range(n)]


def said(tree: Verified, adds: list[Add], outputs: Outputs) -> tuple[int, ...]:
    """The sequence from the tree's root to what came after its path."""
    prompt = next(add.prompt for add in adds if add.request_id == tree.request_id)
    whole = (*prompt, *outputs[tree.request_id, tree.index])
    return whole[tree.n_tokens - 1 : tree.n_tokens + len(tree.path) + 1]


def test_a_tree_tells_what_came_of_it() -> None:
    made, adds = guessing(), asked(4)
    outputs = run(made, adds)
    trees = [tree for add in adds for index in range(add.n) for tree in made.trees_of(add.request_id, index)]
    assert len(trees) > 40
    for tree in trees:
        assert len(tree.tokens) == len(tree.parents) == len(tree.probabilities)
        assert all(-1 <= parent < i for i, parent in enumerate(tree.parents))
        assert [tree.parents[node] for node in tree.path] == [-1, *tree.path][: len(tree.path)]
        assert (tree.root, *(tree.tokens[node] for node in tree.path), tree.next) == said(tree, adds, outputs)
        last = tree.path[-1] if tree.path else -1
        below = [tree.tokens[i] for i, parent in enumerate(tree.parents) if parent == last]
        assert tree.next not in below
        for i, parent in enumerate(tree.parents):
            assert 0 < tree.probabilities[i] <= (1.0 if parent < 0 else tree.probabilities[parent])


def test_trees_are_taken_once_in_order() -> None:
    made, adds = guessing(), asked(1)
    for add in adds:
        made.add(add)
    taken: list[Verified] = []
    while made.has_work:
        made.tick(0.0)
        batch = made.take_trees()
        assert batch.dropped == 0
        taken += batch.trees
    assert taken == made.trees_of("r0")
    assert [tree.n_tokens for tree in taken] == sorted({tree.n_tokens for tree in taken})
    assert made.take_trees() == m.Trees(())


def test_of_many_the_newest_are_told_and_kept() -> None:
    made, adds = guessing(), asked(40, 60)
    for i in range(0, 40, 8):
        run(made, adds[i : i + 8])
    n = made.stats(0.0).guesses.trees  # type: ignore[union-attr]
    assert n > MAX_TREES
    batch = made.take_trees()
    assert (len(batch.trees), batch.dropped) == (MAX_TOLD, n - MAX_TOLD)
    assert made.take_trees() == m.Trees(())
    made.restart_trees()
    assert made.take_trees() == m.Trees(batch.trees)
    kept = [tree for add in adds for index in range(add.n) for tree in made.trees_of(add.request_id, index)]
    assert len(kept) == MAX_TREES
    assert set(batch.trees) <= set(kept)
    assert made.trees_of("r0") == []


def test_counts_are_those_of_the_trees() -> None:
    made = guessing(speculative_depth=5)
    run(made, asked(3, 30))
    guesses = made.stats(0.0).guesses
    assert guesses is not None
    trees = [tree for i in range(3) for index in range(2) for tree in made.trees_of(f"r{i}", index)]
    assert (guesses.trees, guesses.nodes) == (len(trees), sum(len(tree.tokens) for tree in trees))
    assert guesses.accepted == sum(guesses.accepted_at) == sum(len(tree.path) for tree in trees) > 0
    assert guesses.expected == pytest.approx(sum(sum(tree.probabilities) for tree in trees))
    assert len(guesses.reached) == len(guesses.accepted_at) == 5
    assert guesses.accepted_at == tuple(sum(len(tree.path) > depth for tree in trees) for depth in range(5))
    assert all(there >= right for there, right in zip(guesses.reached, guesses.accepted_at, strict=True))


def test_where_nobody_guesses_nothing_is_told() -> None:
    made = hash_engine(200, VOCAB)
    run(made, asked(2))
    made.restart_trees()
    assert made.take_trees() == m.Trees(())
    assert made.trees_of("r0") == []
    assert made.stats(0.0).guesses is None


def test_stats_of_who_knows_of_no_guesses_are_read() -> None:
    stats = msgspec.msgpack.decode(msgspec.msgpack.encode(guessing().stats(0.0)))
    del stats["guesses"]
    frame = msgspec.msgpack.encode([1, [stats]])
    (read,) = m.decode_from_engine(frame).messages
    assert isinstance(read, m.Stats)
    assert read.guesses is None
