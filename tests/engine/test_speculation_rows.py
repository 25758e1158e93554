"""How attention reads rows of trees: up to where through the block table, and in which pieces, row by row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.base.errors import IntegrityError
from tenon.engine.executors.attention import FEW_ITEM_ROWS, FEW_ROWS, ITEM_ROWS, cut, roots
from tenon.engine.step import Step
from tests.engine.build import Run, step
from tests.engine.trees import random_tree

pytestmark = pytest.mark.torch
PIECES = {"chain": ["run"], "tree": ["run", "tree"], "mixed": ["run", "tree", "run", "tree", "run"]}


def spans(rng: np.random.Generator, kinds: list[str]) -> list[Run]:
    """A run of positions, a tree below its last row, or runs and trees by turns."""
    made = []
    for seq, kind in enumerate(kinds):
        parent: list[int] = []
        pos: list[int] = []
        at = int(rng.integers(0, 40))
        for piece in PIECES[kind]:
            first, n = len(pos), int(rng.integers(1, 24))
            if piece == "run":
                parent += [-1] * n
                pos += range(at, at + n)
                at += n
            else:
                tree = random_tree(rng, n, 9)
                parent += [first - 1 if above < 0 else first + above for above in tree.parents]
                pos += [at - 1 + depth for depth in tree.depths]
        made.append(Run(seq, [1] * len(pos), pos, [list(range(1, 9))], parent=parent, slots=[[0] * len(pos)]))
    return made


def roots_of(made: Step) -> list[int]:
    """Row by row, the position of the ancestor that continues a context."""
    found = []
    for row in range(made.n_rows):
        at = row
        while made.parent[at] >= 0:
            at = int(made.parent[at])
        found.append(int(made.pos[at]))
    return found


def items_of(made: Step) -> list[tuple[int, int, int]]:
    """Span, first row and number of rows: runs of positions as far as they follow one another, and trees with the root
    that stands before them, as far as they are of one root's position."""
    most = FEW_ITEM_ROWS if made.n_rows <= FEW_ROWS else ITEM_ROWS
    base, items = roots_of(made), []
    for span, (start, end) in enumerate(itertools.pairwise(made.q_start.tolist())):
        in_tree = [bool(parent >= 0) for parent in made.parent[start:end]]
        for i in range(end - start - 1):
            in_tree[i] |= in_tree[i + 1] and base[start + i] == base[start + i + 1]
        runs: list[list[int]] = []
        for row in range(start, end):
            goes_on = row > start and in_tree[row - start] == in_tree[row - start - 1]
            if goes_on and (not in_tree[row - start] or base[row] == base[row - 1]):
                runs[-1].append(row)
            else:
                runs.append([row])
        items += [(span, run[at], len(run[at : at + most])) for run in runs for at in range(0, len(run), most)]
    return items


def cut_of(made: Step) -> list[tuple[int, int, int]]:
    return list(zip(*(each.tolist() for each in cut(made, roots(made))), strict=True))


@settings(max_examples=150)
@given(kinds=st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_rows_are_read_in_the_pieces_of_the_plain_rule(kinds: list[str], seed: int) -> None:
    made = step(spans(np.random.default_rng(seed), kinds))
    assert roots(made).tolist() == roots_of(made)
    assert cut_of(made) == items_of(made)


@pytest.mark.parametrize("n", [1, FEW_ROWS // 2, FEW_ROWS - 1, FEW_ROWS, 300])
def test_small_and_large_steps_are_cut_alike(n: int) -> None:
    """On both sides of the number of rows up to which pieces are smaller."""
    tree = random_tree(np.random.default_rng(n), n, 9)
    pos, parent = [7, *(7 + depth for depth in tree.depths)], [-1, *(above + 1 for above in tree.parents)]
    made = step([Run(0, [1] * len(pos), pos, [[1, 2, 3]], parent=parent, slots=[[0] * len(pos)])])
    most = FEW_ITEM_ROWS if n < FEW_ROWS else ITEM_ROWS
    assert roots(made).tolist() == [7] * (n + 1)
    assert cut_of(made) == items_of(made) == [(0, at, min(most, n + 1 - at)) for at in range(0, n + 1, most)]


@pytest.mark.parametrize("n", [4, 6])
def test_trees_of_two_roots_share_no_piece(n: int) -> None:
    """Those of one do, whatever stands between its rows."""
    pos, parent = [3, 4, 4, 5, 5, 6][:n], [-1, -1, 0, 2, 1, 4][:n]
    made = step([Run(0, [1] * n, pos, [[1]], parent=parent, slots=[[0] * n])])
    assert roots(made).tolist() == roots_of(made) == [3, 4, 3, 3, 4, 4][:n]
    assert cut_of(made) == items_of(made) == [(0, row, 2) for row in range(0, n, 2)]


@pytest.mark.parametrize(("parent", "pos"), [(2, 5), (3, 5), (1, 4), (1, 6), (0, 5)])
def test_a_row_that_does_not_follow_its_parent_is_refused(parent: int, pos: int) -> None:
    made = step([Run(0, [1] * 4, [3, 4, 5, 5], [[1]], parent=[-1, 0, 1, 1], slots=[[0] * 4])])
    assert roots(made).tolist() == [3] * 4
    made.parent[2], made.pos[2] = parent, pos
    with pytest.raises(IntegrityError, match="must follow its parent"):
        roots(made)
