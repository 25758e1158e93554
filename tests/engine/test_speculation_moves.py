"""Keys and values of tokens that came true in a tree are, once the next step has moved them, those of sequential
decoding, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tenon.engine.engine import Engine
from tenon.engine.messages import Add
from tenon.engine.sequence import Seq
from tenon.engine.speculation.tree import ROOT, Tree
from tests.engine.build import Lab, Labs, ids, run, smallest_block
from tests.engine.segments import Bench, same_bits
from tests.engine.trees import MAX_NODES, Scripted, speculating
from tests.models import zoo

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(17)
ADDS = [
    Add("greedy", ids(RNG, 21), 40, 1, temperature=0.0),
    Add("forked", ids(RNG, 34), 30, 2, n=2, temperature=0.9),
    Add("short", ids(RNG, 3), 25, 3, temperature=0.7, top_p=0.9),
]
CASES = [
    ("llama-tied-llama3", "fp32"), ("qwen2", "bf16"), ("qwen3-window", "bf16"), ("qwen3_moe", "fp32"),
    ("mixtral-window", "bf16"),
]  # fmt: skip
N_BLOCKS = {16: 40, 4: 120, 2: 240, 1: 480}


class Reader(Bench):
    """Reads the cache of an engine."""

    def __init__(self, made: Engine) -> None:
        self.executor, self.size = made.executor, made.config.block_tokens  # type: ignore[assignment]
        self.n_blocks = made.identity.n_blocks

    def rows(self, seq: Seq, n: int) -> list[Tensor]:
        """K and V (n, G, D) of each layer at the first ``n`` positions."""
        p = np.arange(n)
        slots = [table[p // self.size] * self.size + p % self.size for table in seq.tables]
        views = [(group, x) for group, k, v in self.views() for x in (k, v)]
        return [x[self.places(slots[group], x)].flatten(2) for group, x in views]


class Knowing:
    """Trees with what is going to be said in them, behind what is not."""

    def __init__(self, outputs: dict[tuple[str, int], list[int]]) -> None:
        self._outputs, self._rng = outputs, np.random.default_rng(5)

    def __call__(self, seq: Seq) -> Tree:
        coming = self._outputs[name_of(seq)][seq.n_output :]
        tokens: list[int] = []
        parents: list[int] = []
        at, depth = ROOT, int(self._rng.integers(1, 6))
        for right in coming[:depth]:
            for _ in range(int(self._rng.integers(0, 3))):
                parents.append(int(self._rng.integers(ROOT, len(tokens))))
                tokens.append((right + int(self._rng.integers(1, 50))) % zoo.VOCAB)
            parents.append(at)
            tokens.append(right)
            at = len(tokens) - 1
        return Tree(tokens, parents).cut(MAX_NODES)


def name_of(seq: Seq) -> tuple[str, int]:
    return seq.request.add.request_id, seq.index


def seqs_of(made: Engine, adds: list[Add]) -> list[Seq]:
    for add in adds:
        made.add(add)
    return [seq for add in adds for seq in made.scheduler.requests[add.request_id].seqs]


def different(lab: Lab, *, drop: bool = False, **config: Any) -> tuple[list[str], int, int]:
    """Serve with trees: which keys and values differ from sequential decoding's at any time, how many rows moved, how
    often somebody gave way. With ``drop`` the moves are forgotten."""
    settings = {"n_blocks": N_BLOCKS[config.get("block_tokens", 16)], "prefix_cache": False} | config
    outputs = run(lab.engine(**settings), ADDS)
    made = lab.engine(**settings)
    seqs, reader = seqs_of(made, ADDS), Reader(made)
    right: dict[tuple[str, int], list[Tensor]] = {}
    while made.has_work:
        there = [seq for seq in seqs if not seq.finished]  # who has ended gives blocks away
        made.tick(0.0)
        right |= {name_of(seq): reader.rows(seq, seq.n_tokens - 1) for seq in there}
    made = speculating(lab.engine(**settings), [Scripted(Knowing(outputs))])
    seqs, reader, wrong, n_moved = seqs_of(made, ADDS), Reader(made), [], 0
    while made.has_work:
        known = [(seq, seq.n_computed) for seq in seqs if not seq.finished]
        made.tick(0.0)
        made.check_integrity()
        for seq, n_known in known:
            n = min(n_known, seq.n_computed)  # who gave way meanwhile has nothing
            pairs = zip(reader.rows(seq, n), right[name_of(seq)], strict=True)
            wrong += [f"{name_of(seq)}, {i}" for i, (x, y) in enumerate(pairs) if not same_bits(x, y[:n])]
        n_moved += len(made.scheduler.tables.moves)
        if drop:
            made.scheduler.tables.moves.clear()
    assert made.scheduler.speculation.counts.accepted > 40  # type: ignore[union-attr]
    return wrong, n_moved, made.scheduler.counters.preemptions


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_what_moved_is_what_sequential_decoding_writes(name: str, dtype: str, lab: Labs) -> None:
    it = lab(name, dtype, numerics="invariant")
    for size in (16, smallest_block(it.dtype)):  # in small blocks nearly every path crosses some
        wrong, n_moved, _ = different(it, block_tokens=size)
        assert wrong == []
        assert n_moved > 30


@pytest.mark.parametrize("n_blocks", [8, 10, 12])
def test_where_blocks_are_scarce_it_is_the_same(n_blocks: int, lab: Labs) -> None:
    """Trees are cut for want of blocks, and sequences are computed once more."""
    it = lab("qwen3-window", "bf16", numerics="invariant")
    wrong, n_moved, n_preempted = different(it, n_blocks=n_blocks, max_step_tokens=19)
    assert wrong == []
    assert n_moved > 20
    assert n_preempted > 0


def test_moves_that_are_dropped_show(lab: Labs) -> None:
    """The control."""
    wrong, n_moved, _ = different(lab("llama-tied-llama3", "fp32", numerics="invariant"), drop=True)
    assert n_moved > 0
    assert wrong != []
