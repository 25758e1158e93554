"""A cache alone against other ways to the same figures, and the bounds of what any policy could save."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import numpy as np
import pytest

from tenon.engine.cache_replay import Visit, replay, visits
from tenon.engine.policies.optimal import Belady, BeladyCost, optimum
from tenon.engine.policies.recency import Lru, Random
from tenon.engine.policies.table import POLICIES
from tenon.workloads import reuse
from tenon.workloads.blocks import identify
from tenon.workloads.generator import make
from tenon.workloads.trace import Segment, Trace, TraceRequest

BLOCK = 512


def even(position: int) -> float:
    return 1.0


def without_outputs(trace: Trace) -> Trace:
    """Prompts of whole blocks and a token, and answers that are no part of what follows."""
    kept = [
        TraceRequest(r.id, r.arrival_s, (*r.prompt, Segment(10**9 + i, BLOCK)), 1) for i, r in enumerate(trace.requests)
    ]
    return Trace.make("prompts", "a test", kept)


def test_lru_hits_are_mattsons() -> None:
    """Distances in an LRU stack, which know nothing of pools, give the same hits at every size."""
    trace = without_outputs(make("mooncake-conversation", requests=300, seed=3))
    blocks = identify(trace.requests, BLOCK, partial=False)
    found, n_looked_up = reuse.find(blocks), len(blocks.id)
    largest = int(np.diff(blocks.start).max())
    for size in (largest, 2 * largest, 5 * largest):
        tally = replay(visits(trace, BLOCK), size, BLOCK, Lru, even)
        assert tally.found == round(reuse.lru_hit_ratios(found, [size])[0] * n_looked_up)
        assert tally.holes == 0


def test_an_endless_cache_hits_all_that_was_there_before() -> None:
    trace = without_outputs(make("mooncake-conversation", requests=300, seed=3))
    blocks = identify(trace.requests, BLOCK, partial=False)
    for name, of in POLICIES.items():
        tally = replay(visits(trace, BLOCK), len(blocks.id), BLOCK, partial(of, len(blocks.id) + 1), even)
        assert tally.found == round(reuse.find(blocks).ideal_hit_ratio * len(blocks.id)), name
        assert tally.evictions == 0


def test_prefixes_find_no_more_than_blocks() -> None:
    asked = visits(make("longbench", requests=60, seed=1), BLOCK)
    ends = [replay(asked, 400, BLOCK, Random, even, gaps=gaps) for gaps in (True, False)]
    assert ends[0].found > ends[1].found > 0
    assert ends[0].holes > 0 == ends[1].holes


def test_warming_up_counts_for_nothing_and_what_is_too_large_is_not_cached() -> None:
    asked = [Visit(float(i), (b"a", b"b", b"c"), 2, 3 * BLOCK) for i in range(4)]
    whole = replay(asked, 3, BLOCK, Lru, even, warm=1)
    assert (whole.requests, whole.looked_up, whole.found) == (3, 6, 6)
    assert replay(asked, 2, BLOCK, Lru, even).found == 0


def small(seed: int, one_block: bool) -> tuple[list[list[int]], list[Visit], dict[bytes, list[float]]]:
    rng = np.random.default_rng(seed)
    requests = [sorted(rng.choice(7, 1 if one_block else int(rng.integers(1, 4)), False).tolist()) for _ in range(30)]
    asked, uses = [], defaultdict(list)
    for i, request in enumerate(requests):
        keys = tuple(str(k).encode() for k in request)
        asked.append(Visit(float(i), keys, len(keys), 0))
        for key in keys:
            uses[key].append(float(i))
    return requests, asked, uses


@pytest.mark.parametrize("seed", range(8))
def test_belady_is_optimal_where_requests_are_blocks_of_one_cost(seed: int) -> None:
    requests, asked, uses = small(seed, one_block=True)
    best = optimum(requests, dict.fromkeys(range(7), 1.0), 3)
    assert replay(asked, 3, BLOCK, partial(Belady, uses), even).saved == best
    assert replay(asked, 3, BLOCK, Lru, even).saved <= best


@pytest.mark.parametrize("seed", range(8))
def test_nobody_saves_more_than_the_optimum(seed: int) -> None:
    requests, asked, uses = small(seed, one_block=False)
    best = optimum(requests, dict.fromkeys(range(7), 1.0), 4)
    seers = {"belady": partial(Belady, uses), "belady-cost": partial(BeladyCost, uses)}
    saved = {
        name: replay(asked, 4, BLOCK, of, even).saved
        for name, of in ({name: partial(of, 5) for name, of in POLICIES.items()} | seers).items()
    }
    assert max(saved.values()) <= best
    assert max(saved["belady"], saved["belady-cost"]) >= max(saved[name] for name in POLICIES) - 2


def test_a_request_larger_than_the_cache_has_no_optimum() -> None:
    with pytest.raises(ValueError, match="a request has 3 blocks and the cache 2"):
        optimum([[1, 2, 3]], {1: 1.0, 2: 1.0, 3: 1.0}, 2)
