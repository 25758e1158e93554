"""Trees and the walk over them: what is cut, left out, guessed, taken over, told as simply as possible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.base.errors import IntegrityError
from tenon.engine.assemble import Assembler, Span
from tenon.engine.messages import Add
from tenon.engine.speculation.tree import ROOT, Tree, walk
from tenon.engine.step import SAMPLE, Step, StepResult, guesses
from tests.engine.build import hash_engine
from tests.engine.trees import Scripted, decoding, random_tree, ranks, sequence, shapes, speculating

V = 4


@st.composite
def trees(draw: st.DrawFn, most: int = 10) -> Tree:
    """Siblings may have the same token: then the first of them counts."""
    n = draw(st.integers(0, most))
    parents = [draw(st.integers(max(ROOT, i - 5), i - 1)) for i in range(n)]
    tokens = draw(st.lists(st.integers(0, V - 1), min_size=n, max_size=n))
    features = [(i, 0.5, 0, 1.0 / (i + 1)) for i in range(n)]
    return Tree(tokens, parents, features)


def samples(data: st.DataObject, tree: Tree) -> list[int]:
    return data.draw(st.lists(st.integers(0, V - 1), min_size=len(tree) + 1, max_size=len(tree) + 1))


def followed(tree: Tree, sampled: list[int]) -> list[int]:
    """The nodes that came true, looked for one after the other."""
    path, at = [], ROOT
    while True:
        children = [i for i in range(len(tree)) if tree.parents[i] == at and tree.tokens[i] == sampled[at + 1]]
        if not children:
            return path
        at = children[0]
        path.append(at)


@given(tree=trees(), data=st.data())
def test_the_walk_goes_to_the_child_that_was_sampled(tree: Tree, data: st.DataObject) -> None:
    sampled = samples(data, tree)
    path = walk(tree, sampled)
    assert path == followed(tree, sampled)
    assert [tree.parents[node] for node in path] == [ROOT, *path][: len(path)]
    assert [tree.depths[node] for node in path] == list(range(1, len(path) + 1))
    said = [sampled[row] for row in (0, *(node + 1 for node in path))]
    assert said[:-1] == (tree.path(path[-1]) if path else [])


@given(tree=trees(), data=st.data())
def test_rows_that_the_walk_does_not_come_to_do_not_matter(tree: Tree, data: st.DataObject) -> None:
    """So it reads one row of each depth, and noise that is keyed by positions is never read twice."""
    sampled = samples(data, tree)
    path = walk(tree, sampled)
    read = {0, *(node + 1 for node in path)}
    other = [token if row in read else -1 for row, token in enumerate(sampled)]
    assert walk(tree, other) == path


@given(tree=trees(), n=st.integers(0, 12), data=st.data())
def test_a_tree_that_is_cut_says_a_beginning(tree: Tree, n: int, data: st.DataObject) -> None:
    short, sampled = tree.cut(n), samples(data, tree)
    k = min(n, len(tree))
    assert (short.tokens, short.parents, short.features) == (tree.tokens[:k], tree.parents[:k], tree.features[:k])
    assert short.depths == tree.depths[:k]
    whole = walk(tree, sampled)
    assert walk(short, sampled) == whole[: sum(node < k for node in whole)]


@given(tree=trees(), tokens=st.sets(st.integers(0, V - 1)))
def test_what_is_left_out_takes_with_it_all_that_is_below(tree: Tree, tokens: set[int]) -> None:
    left = tree.without(tokens)
    kept = [i for i in range(len(tree)) if tokens.isdisjoint(tree.path(i))]
    assert [left.path(i) for i in range(len(left))] == [tree.path(i) for i in kept]
    assert left.features == [tree.features[i] for i in kept]
    assert left.depths == [tree.depths[i] for i in kept]


@given(tree=trees())
def test_depths_paths_and_chains_are_what_parents_say(tree: Tree) -> None:
    for i, parent in enumerate(tree.parents):
        above = [] if parent == ROOT else tree.path(parent)
        assert tree.path(i) == [*above, tree.tokens[i]]
        assert tree.depths[i] == len(above) + 1
    assert tree.is_chain is (tree.depths == list(range(1, len(tree) + 1)))


@pytest.mark.parametrize("parents", [[0], [ROOT, 1], [ROOT, 0, 2], [ROOT, -2], [ROOT, 0, 5]])
def test_a_child_before_its_parent_is_no_tree(parents: list[int]) -> None:
    with pytest.raises(IntegrityError, match="comes before its parent"):
        Tree([1] * len(parents), parents)


# -- which rows are guesses --------------------------------------------------------------------------------------


def guessed(step: Step) -> list[int]:
    """Of each sampled output the one whose sample its token guesses, row by row."""
    n = int(np.count_nonzero(step.want & SAMPLE))
    row_of = step.out_row[:n].tolist()
    found = []
    for row in row_of:
        before = int(step.parent[row]) if step.parent[row] >= 0 else row - 1
        same_span = row not in step.q_start.tolist()
        found.append(row_of.index(before) if same_span and before in row_of else -1)
    return found


@settings(max_examples=150)
@given(kinds=st.lists(st.sampled_from(["decode", "chunk", "prompt", "fork", "chain", "tree"]), min_size=1, max_size=6),
       seed=st.integers(0, 999))  # fmt: skip
def test_guesses_are_children_of_rows_that_are_sampled(kinds: list[str], seed: int) -> None:
    rng, spans = np.random.default_rng(seed), []
    for i, kind in enumerate(kinds):
        seq, n = sequence(i, 12, 3), int(rng.integers(1, 7))
        tree = Tree([1] * n, list(range(ROOT, n - 1))) if kind == "chain" else random_tree(rng, n, V)
        spans.append({
            "decode": lambda seq=seq: Span(seq, 14, 1, [seq]),
            "chunk": lambda seq=seq, n=n: Span(seq, 0, n, []),
            "prompt": lambda seq=seq, n=n: Span(seq, 15 - n, n, [seq]),
            "fork": lambda seq=seq, n=n: Span(seq, 15 - n, n, [seq, sequence(50 + seq.id, 12, 3)]),
        }.get(kind, lambda seq=seq, tree=tree: Span(seq, 14, 1 + len(tree), [seq], tree))())  # fmt: skip
    step = Assembler("m", 1).step(1, 0, spans, [])
    right = guessed(step)
    assert guesses(step).tolist() == (right if max(right, default=-1) >= 0 else [])


# -- what is taken over ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 5))
def test_what_the_walk_comes_to_is_the_sequence_s(n: int) -> None:
    """Whatever the rows sample: tokens, what counts as computed, and which rows move where."""
    rng = np.random.default_rng(n)
    for parents in shapes(n):
        tree = Tree(rng.integers(0, V, n).tolist(), parents)
        made = speculating(hash_engine(vocab_size=V, block_tokens=2), [Scripted(lambda _, tree=tree: tree)])
        seq = decoding(made, Add("r", (1, 2, 3), 20, 0))
        before, step = seq.tokens[: seq.n_tokens].tolist(), made.scheduler.schedule(0.0)
        assert step is not None
        sampled = rng.integers(0, V, n + 1).tolist()
        result = replace(StepResult.nothing(step, 0), ids=np.array(sampled, np.int32))
        (delta,) = made.scheduler.commit(step, result)
        rows = [0, *(node + 1 for node in followed(tree, sampled))]
        assert delta.ids == tuple(sampled[row] for row in rows)
        assert seq.tokens[: seq.n_tokens].tolist() == [*before, *delta.ids]
        assert seq.n_computed == seq.n_tokens - 1
        slots = step.groups[0].slot.tolist()
        moved = {(a, b) for group, a, b in made.scheduler.tables.moves if group == 0}
        assert moved == {(slots[row], slots[k]) for k, row in enumerate(rows) if k != row}
        made.check_integrity()


def test_a_scripted_tree_is_in_the_step_as_it_was_said() -> None:
    """Of the tests' own drafter: nodes in order, as deep as there is room for tokens."""
    tree = Tree([0, 1, 2, 3, 1], [ROOT, 0, 0, 1, ROOT])
    made = speculating(hash_engine(vocab_size=V), [Scripted(lambda _: tree)])
    seq = decoding(made, Add("r", (1, 2, 3), 4, 0))
    step = made.scheduler.schedule(0.0)
    assert step is not None
    assert seq.tree is not None
    assert (seq.tree.tokens, seq.tree.parents) == ([0, 1, 2, 1], [ROOT, 0, 0, ROOT])  # three tokens are left to say
    assert step.parent.tolist() == [-1, 0, 1, 1, 0]
    assert step.pos.tolist() == [3, 4, 5, 5, 4]
    assert ranks(tree) == [0, 0, 1, 0, 1]
