"""Edits below guesses: those of a sequence that really says so, and nothing of a guess stays."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.engine.assemble import Assembler, Span
from tenon.engine.edits import Edits
from tenon.engine.messages import Add
from tenon.engine.sequence import Request, Seq
from tenon.engine.speculation.tree import ROOT, Tree
from tests.engine.test_edits import TOKENS, WISHES
from tests.engine.trees import MAX_NODES, random_tree

PATHS = st.lists(st.lists(TOKENS, max_size=6), max_size=4)
"""Guesses that are tried one after the other at the same place."""


def fresh(add: Add, context: list[int]) -> list[list[float]]:
    """What somebody says of ``context`` who has never seen anything else."""
    return plain(Edits(add, add.stop_ids), context, len(add.prompt), 0)


def plain(edits: Edits, context: list[int], n_prompt: int, n_ahead: int) -> list[list[float]]:
    return [part.tolist() for part in edits.of(np.array(context, np.int32), n_prompt, n_ahead)]


@settings(max_examples=200)
@given(
    wishes=WISHES,
    prompt=st.lists(TOKENS, min_size=1, max_size=30),
    said=st.lists(st.tuples(st.lists(TOKENS, max_size=5), PATHS), min_size=1, max_size=8),
)
def test_edits_below_a_guess_are_those_of_who_says_it(
    wishes: dict[str, Any], prompt: list[int], said: list[tuple[list[int], list[list[int]]]]
) -> None:
    """However often others are tried, before and after the context grows."""
    add = Add("r", tuple(prompt), 100, 0, **wishes)
    edits, context = Edits(add, add.stop_ids), list(prompt)
    for new, paths in said:
        context += new
        for path in paths:
            assert plain(edits, context + path, len(prompt), len(path)) == fresh(add, context + path)
        assert plain(edits, context, len(prompt), 0) == fresh(add, context)


@settings(max_examples=60)
@given(wishes=WISHES, prompt=st.lists(TOKENS, min_size=1, max_size=20), output=st.lists(TOKENS, max_size=20),
       n=st.integers(1, 12), seed=st.integers(0, 999))  # fmt: skip
def test_each_row_of_a_tree_has_the_edits_of_its_path(
    wishes: dict[str, Any], prompt: list[int], output: list[int], n: int, seed: int
) -> None:
    """As they stand in the step; of who has a chain and who has a tree, side by side."""
    add = Add("r", tuple(prompt), 60, 0, outputs=tuple(output), **wishes)
    request = Request(add, 0, bytes(32), bytes(32), frozenset(add.stop_ids))
    trees = random_tree(np.random.default_rng(seed), n, 40), Tree(list(range(n)), list(range(ROOT, n - 1)))
    spans = []
    for i, tree in enumerate(trees):
        seq = Seq(i, request, i, 1, 4, MAX_NODES)
        spans.append(Span(seq, seq.n_tokens - 1, 1 + n, [seq], tree))
    step = Assembler("m", 1).step(1, 0, spans, [])
    rows = [(tree, node) for tree in trees for node in range(ROOT, n)]
    for r, (tree, node) in enumerate(rows):
        where = slice(int(step.edit_start[r]), int(step.edit_start[r + 1]))
        found = [part[where].tolist() for part in (step.edit_token, step.edit_kind, step.edit_value)]
        assert found == fresh(add, [*prompt, *output, *tree.path(node)])
