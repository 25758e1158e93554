"""Traces that are hard for a cache are what they say they are."""

from __future__ import annotations

import pytest

from tenon.base.errors import ConfigError
from tenon.workloads import trace as traces
from tenon.workloads.adversarial import ADVERSARIES, CONTEXT, N_REQUESTS, adversary
from tenon.workloads.blocks import identify
from tenon.workloads.reuse import find, lru_hit_ratios

CAPACITY = 250_000
BLOCK = 1024


@pytest.mark.parametrize("name", ADVERSARIES)
def test_each_is_whole_seeded_and_different(name: str) -> None:
    made = adversary(name, capacity=CAPACITY)
    assert len(made.requests) == N_REQUESTS
    assert traces.dump(made) == traces.dump(adversary(name, capacity=CAPACITY))
    if name not in ("cyclic-scan", "branches"):
        assert made.requests != adversary(name, capacity=CAPACITY, seed=1).requests


def test_lru_loses_a_cycle_that_a_larger_cache_holds() -> None:
    reused = find(identify(adversary("cyclic-scan", capacity=CAPACITY).requests, BLOCK))
    fits, more = lru_hit_ratios(reused, [CAPACITY // BLOCK, int(1.2 * CAPACITY) // BLOCK])
    assert fits == 0.0
    assert more > 0.9


def test_most_of_a_flood_is_seen_once() -> None:
    assert find(identify(adversary("one-shot-flood", capacity=CAPACITY).requests, BLOCK)).once_share() > 0.9


def test_lifespans_shift_tenfold() -> None:
    made = adversary("lifespan-shift", capacity=CAPACITY).requests
    last: dict[int, float] = {}
    gaps: list[list[float]] = [[], []]
    for i, r in enumerate(made):
        who = r.prompt[0].content
        if who in last:
            gaps[i >= N_REQUESTS * 3 // 4].append(r.arrival_s - last[who])
        last[who] = r.arrival_s
    early, late = (sorted(g)[len(g) // 2] for g in gaps)
    assert 40 < early < 100
    assert late > 5 * early


@pytest.mark.parametrize(("name", "capacity", "said"), [
    ("cycle", CAPACITY, "there is no adversary 'cycle'"), ("zipf", CONTEXT, "capacity must be at least 16384"),
])  # fmt: skip
def test_what_cannot_be_made_is_said(name: str, capacity: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        adversary(name, capacity=capacity)
