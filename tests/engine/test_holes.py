"""Every resident block of a context is taken over, beyond holes too, and nothing that is answered changes by it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenon.base.errors import IntegrityError
from tenon.engine.engine import Engine
from tenon.engine.messages import Add
from tenon.engine.sequence import Request, Seq
from tests.engine.build import Labs, Outputs, hash_engine, run
from tests.engine.test_invariant import CASES

VOCAB = 50


def turns(seed: int, sessions: int = 3, longest: int = 150) -> list[Add]:
    """Conversations whose turns come in any order of the sessions, each prompt the one before and more."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, VOCAB, longest).tolist() for _ in range(sessions)]
    lengths = [sorted(rng.integers(20, longest, 4).tolist()) for _ in range(sessions)]
    order = rng.permutation(np.repeat(np.arange(sessions), 4)).tolist()
    return [
        Add(f"{seed}-{i}", tuple(texts[session][: lengths[session].pop(0)]), 6, seed=i, temperature=0.8)
        for i, session in enumerate(order)
    ]


def serve(made: Engine, adds: list[Add]) -> Outputs:
    """One after another."""
    outputs: Outputs = {}
    for add in adds:
        outputs |= run(made, [add])
    return outputs


@pytest.mark.parametrize("budget", [1, 7, 40, 1024])
@pytest.mark.parametrize("evict", ["random", "lru"])
def test_answers_are_those_without_a_cache(evict: str, budget: int) -> None:
    holes = 0
    for seed in range(6):
        adds = turns(seed)
        config: dict[str, Any] = {"vocab_size": VOCAB, "n_blocks": 16, "max_step_tokens": budget}
        made = hash_engine(evict=evict, **config)
        assert serve(made, adds) == serve(hash_engine(prefix_cache=False, **config), adds)
        holes += made.scheduler.counters.holes
    assert (holes > 0) == (evict == "random")


def test_blocks_find_more_than_prefixes_do() -> None:
    found = {}
    for reuse in ("prefix", "blocks"):
        made = hash_engine(vocab_size=VOCAB, n_blocks=16, evict="random", reuse=reuse)
        for seed in range(6):
            serve(made, turns(seed))
        found[reuse] = made.scheduler.counters
    assert found["prefix"].holes == 0
    assert found["blocks"].cached_tokens > found["prefix"].cached_tokens


@pytest.mark.torch
@pytest.mark.parametrize("budget", [7, 37, 1024])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_holes_change_no_bit(name: str, dtype: str, budget: int, lab: Labs) -> None:
    it = lab(name, dtype, numerics="invariant")
    adds = [*turns(1), *turns(2)]
    made = it.engine(n_blocks=16, max_step_tokens=budget, evict="random")
    outputs, rows = serve(made, adds), it.executor.rows
    plain = it.engine(n_blocks=16, prefix_cache=False)
    assert outputs == serve(plain, adds)
    assert made.scheduler.counters.holes > 0
    assert rows.keys() == it.executor.rows.keys()
    assert all(torch.equal(row, it.executor.rows[where]) for where, row in rows.items())


def test_a_hole_that_is_left_out_is_noticed() -> None:
    wrong = 0
    for seed in range(6):
        made = hash_engine(vocab_size=VOCAB, n_blocks=16, max_step_tokens=1, evict="random")
        right = serve(hash_engine(vocab_size=VOCAB, prefix_cache=False), turns(seed))
        for add in turns(seed):
            made.add(add)
            answer = made.tick(0.0)
            (seq,) = made.scheduler.running
            left_out = bool(seq.ahead)
            if left_out:
                seq.computed_to(seq.ahead.pop()[1])
                seq.ahead = []
            try:
                while made.has_work:
                    answer += made.tick(0.0)
            except IntegrityError:
                wrong += left_out
                break
            differs = [t for delta in answer for t in delta.ids] != right[add.request_id, 0]
            assert left_out or not differs
            if differs:
                wrong += 1
                break
    assert wrong >= 3


RUNS = st.lists(st.integers(1, 9), min_size=1, max_size=9)


@given(RUNS, st.integers(1, 20), st.booleans())
def test_runs_are_what_is_not_resident_in_order(lengths: list[int], budget: int, begins: bool) -> None:
    ends = np.cumsum([0, *lengths]).tolist()
    n = ends[-1] + 1  # the last position is never resident
    request = Request(Add("a", tuple(range(n)), 1, 0), 0, b"", b"", frozenset())
    seq = Seq(0, request, 0, 1, 16)
    pairs = list(itertools.pairwise(ends))
    seq.ahead = pairs[not begins :: 2]
    resident = {p for start, end in seq.ahead for p in range(start, end)}
    seq.computed_to(0)
    computed: list[int] = []
    while seq.n_computed < n:
        runs = seq.runs(budget)
        assert 0 < sum(length for _, length in runs) <= budget
        for start, length in runs:
            computed += range(start, start + length)
            seq.computed_to(start + length)
    assert computed == [p for p in range(n) if p not in resident]
