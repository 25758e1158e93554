"""Steps made by hand: several spans of one sequence at any positions, holes, trees; and mistakes that must show."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.build import LONG, Lab, Labs, Run, chain, errors, fresh, sequence, step, tables
from tests.models import zoo

pytestmark = pytest.mark.torch
CASES = [(name, 32) for name in zoo.CASES] + [(name, None) for name in zoo.ONE_EACH]
TOLERANCE = 1e-5
"""The floor of what fp32 rows may err; transformers' own error on these checkpoints is about 2e-6."""
SHOWS = 1e-3
"""What a mistake must exceed: a hundred times the tolerance."""


def right(lab: Lab, tokens: list[int]) -> Tensor:
    return lab.references([tuple(tokens)])[0]


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_a_hole_is_filled_while_later_positions_are_resident(name: str, head_dim: int | None, lab: Labs) -> None:
    it, a, b = lab(name, "fp32", head_dim), sequence(1), sequence(2)
    fresh(it)
    it.executor.logits(step([chain(it, 0, a, 0, 60), chain(it, 1, b, 0, 33)]))
    # The hole's slots hold another sequence's keys and values before it is filled again.
    junk = replace_tables(chain(it, 0, b, 16, 32), it)
    it.executor.logits(step([junk]))
    mixed = [chain(it, 0, a, 16, 32), chain(it, 0, a, 60, 61), chain(it, 1, b, 33, 34), chain(it, 0, a, 61, 64)]
    found = it.executor.logits(step(mixed))
    want = torch.cat([right(it, a)[16:32], right(it, a)[60:61], right(it, b)[33:34], right(it, a)[61:64]])
    assert errors(found, want).max() <= TOLERANCE


def replace_tables(run: Run, lab: Lab) -> Run:
    """The same rows as a sequence whose first block lies elsewhere: writes the hole, reads nothing of value."""
    return replace(run, seq=7, tables=[[60, *table[1:]] for table in run.tables])


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_spans_of_one_sequence_in_one_step(name: str, head_dim: int | None, lab: Labs) -> None:
    it, a = lab(name, "fp32", head_dim), sequence(3)
    fresh(it)
    cuts = [0, 5, 6, 22, 39, 40, 64, LONG]
    found = it.executor.logits(step([chain(it, 0, a, s, e) for s, e in itertools.pairwise(cuts)]))
    assert errors(found, right(it, a)).max() <= TOLERANCE


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_tree_rows_see_their_ancestors_alone(name: str, head_dim: int | None, lab: Labs) -> None:
    it, a = lab(name, "fp32", head_dim), sequence(4)
    fresh(it)
    it.executor.logits(step([chain(it, 0, a, 0, 40, [])]))
    # root 40, two children, three grandchildren, then a chain down one leaf across a block border.
    parent = [-1, 0, 0, 1, 1, 2, 3, 6, 7, 8, 9, 10]
    tok = sequence(5, len(parent))
    depth = [0]
    for p in parent[1:]:
        depth.append(depth[p] + 1)
    own = tables(it, 1)
    slots = [[t[40 // 16] * 16 + 40 % 16, *range(50 * 16, 50 * 16 + len(parent) - 1)] for t in own]
    tree = Run(0, tok, [40 + d for d in depth], own, list(range(len(parent))), parent, slots)
    other = chain(it, 1, a, 0, 9)
    found = it.executor.logits(step([tree, other]))
    for row in range(len(parent)):
        path, at = [], row
        while at >= 0:
            path.append(tok[at])
            at = parent[at]
        assert errors(found[row : row + 1], right(it, a[:40] + path[::-1])[-1:]).max() <= TOLERANCE, row
    assert errors(found[len(parent) :], right(it, a)[:9]).max() <= TOLERANCE


def test_moves_come_before_writes(lab: Labs) -> None:
    it, a, b = lab("qwen3-window"), sequence(6), sequence(7)
    fresh(it)
    it.executor.logits(step([chain(it, 0, a, 0, 40, [])]))
    made = step([chain(it, 0, a, 40, 41), replace(chain(it, 0, a[:40] + b, 40, 44), seq=2)])
    for group in made.groups:
        old = group.table[2]
        group.table[group.table_start[1] + 2] = 50
        group.slot[1:] += (50 - old) * 16
        group.moves = np.array([(old * 16 + i, 50 * 16 + i) for i in range(8)], np.int32)
    found = it.executor.logits(made)
    want = torch.cat([right(it, a)[40:41], right(it, a[:40] + b)[40:44]])
    assert errors(found, want).max() <= TOLERANCE


# -- controls: each mistake must exceed the tolerance by far ---------------------------------------------------------


def second_chunk(lab: Lab, spoil: Callable[[Run], Run]) -> float:
    """Prefill in two chunks, the first spoilt; the worst error of the second's rows."""
    a, b = sequence(8), sequence(9)
    fresh(lab)
    lab.executor.logits(step([chain(lab, 1, b, 0, 48, [])]))
    lab.executor.logits(step([spoil(chain(lab, 0, a, 0, 40, []))]))
    second = chain(lab, 0, a, 40, LONG)
    return float(errors(lab.executor.logits(step([second])), right(lab, a)[40:]).max())


FULL = ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"]


@pytest.mark.parametrize("name", FULL)
def test_the_control_itself_is_right(name: str, lab: Labs) -> None:
    assert second_chunk(lab(name), lambda run: run) <= TOLERANCE


@pytest.mark.parametrize("name", FULL)
def test_positions_off_by_one_show(name: str, lab: Labs) -> None:
    def spoil(run: Run) -> Run:
        slots = [[t[p // 16] * 16 + p % 16 for p in run.pos] for t in run.tables]
        return replace(run, pos=[p + 1 for p in run.pos], slots=slots)

    assert second_chunk(lab(name), spoil) > SHOWS


@pytest.mark.parametrize("name", FULL)
def test_one_dropped_write_shows(name: str, lab: Labs) -> None:
    def spoil(run: Run) -> Run:
        slots = [[0 if p == 39 else t[p // 16] * 16 + p % 16 for p in run.pos] for t in run.tables]
        return replace(run, slots=slots)

    assert second_chunk(lab(name), spoil) > SHOWS


@pytest.mark.parametrize("name", FULL)
def test_a_block_of_another_sequence_shows(name: str, lab: Labs) -> None:
    it, a, b = lab(name), sequence(8), sequence(9)
    fresh(it)
    it.executor.logits(step([chain(it, 0, a, 0, 40, []), chain(it, 1, b, 0, 48, [])]))
    second = chain(it, 0, a, 40, LONG)
    for table, theirs in zip(second.tables, tables(it, 9), strict=True):
        table[1] = theirs[1]
    assert errors(it.executor.logits(step([second])), right(it, a)[40:]).max() > SHOWS


@pytest.mark.parametrize("name", [name for name in zoo.CASES if name.endswith("window")])
def test_an_ignored_window_shows(name: str, lab: Labs) -> None:
    it, a = lab(name), sequence(8)
    wide = Lab(name, "fp32", it.folder, 32)
    groups = tuple(replace(group, window=None) for group in wide.groups())
    wide.executor.allocate(groups, 64)
    fresh(it)
    spans = step([chain(it, 0, a, 0, LONG)])
    assert errors(it.executor.logits(spans), right(it, a)).max() <= TOLERANCE
    assert errors(wide.executor.logits(spans), right(it, a)).max() > SHOWS
