"""Why a request missed, what the cache saved, and the log of victims."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tenon.engine.engine import Engine
from tenon.engine.explain import MAX_REQUESTS, MAX_RUNS, MAX_TOLD, coarse, costliest
from tenon.engine.messages import Add, Miss, Misses
from tenon.engine.policies.table import POLICIES
from tenon.engine.victims import MAX_VICTIMS
from tests.engine.build import hash_engine, run
from tests.engine.test_holes import VOCAB, serve, turns

SIZE = 16
DRAWS = {"random", "random-compute", "s3fifo", "worth", "tuned"}
"""Policies that choose otherwise when they are asked earlier."""


def small(**config: object) -> Engine:
    return hash_engine(**{"vocab_size": VOCAB, "n_blocks": 12, **config})  # type: ignore[arg-type]


def tokens(seed: int, n: int = 100) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, n).tolist())


def asked(made: Engine, name: str, prompt: tuple[int, ...], **wishes: object) -> Misses:
    """Serve one prompt; what the cache had for it."""
    run(made, [Add(name, prompt, 1, 0, **wishes)])  # type: ignore[arg-type]
    (misses,) = made.take_misses()
    return misses


def lose(made: Engine, n: int, now_s: float = 0.0) -> None:
    """``n`` blocks of each group are evicted."""
    made.scheduler.at(now_s)
    for pool in made.scheduler.pools:
        for block in [pool.take() for _ in range(pool.n_available - pool.n_idle + n)]:
            pool.release(block)


def spans(misses: Misses) -> list[tuple[int, int, str]]:
    return [(it.start, it.end, it.kind) for it in misses.runs]


def test_what_was_never_seen_is_new() -> None:
    misses = asked(small(), "a", tokens(0))
    assert (misses.request_id, misses.cached_tokens, misses.holes) == ("a", 0, 0)
    assert spans(misses) == [(0, 96, "new")]
    assert misses.runs[0].cost == 6.0
    assert misses.runs[0].differs_at is None


def test_a_full_hit_misses_nothing() -> None:
    made = small()
    asked(made, "a", tokens(0))
    misses = asked(made, "b", tokens(0))
    assert (misses.cached_tokens, misses.n_runs, misses.runs) == (96, 0, ())


@pytest.mark.parametrize("at", [0, 5, 16, 39, 95])
def test_the_first_token_that_differs_is_named(at: int) -> None:
    made = small()
    asked(made, "a", tokens(0))
    changed = list(tokens(0))
    changed[at] = (changed[at] + 1) % VOCAB
    misses = asked(made, "b", tuple(changed))
    assert misses.runs[0].differs_at == at
    assert spans(misses) == [(at // SIZE * SIZE, 96, "new")]


def test_another_tenants_context_is_not_compared_with() -> None:
    made = small()
    asked(made, "a", tokens(0), tenant="a")
    changed = (tokens(0)[0] + 1, *tokens(0)[1:])
    assert asked(made, "b", changed, tenant="b").runs[0].differs_at is None


def test_a_sibling_that_is_gone_is_not_compared_with() -> None:
    made = small()
    asked(made, "a", tokens(0))
    lose(made, 6)
    assert asked(made, "b", ((tokens(0)[0] + 1) % VOCAB, *tokens(0)[1:])).runs[0].differs_at is None


def test_evictions_are_told_with_time_policy_and_score() -> None:
    made = small(evict="lru")
    for pool in made.scheduler.pools:
        pool.victims.watch = True
    asked(made, "a", tokens(0))
    lose(made, 2, 7.0)
    lose(made, 1, 9.0)
    misses = asked(made, "b", tokens(0))
    assert spans(misses) == [(48, 96, "evicted")]
    (it,) = misses.runs
    assert (it.evicted_s, it.until_s, it.policy, it.score, it.cost) == (7.0, 9.0, "lru", 0.0, 3.0)


def test_without_a_watch_no_score_is_known() -> None:
    made = small()
    asked(made, "a", tokens(0))
    lose(made, 2)
    assert asked(made, "b", tokens(0)).runs[0].score is None
    assert all(len(pool.victims) == 0 for pool in made.scheduler.pools)


def test_what_a_prefix_rule_passes_over_is_told_apart() -> None:
    made = small(evict="random", reuse="prefix")
    asked(made, "a", tokens(0))
    lose(made, 2)
    kinds = {it.kind for it in asked(made, "b", tokens(0)).runs}
    assert kinds == {"evicted", "skipped"}


@pytest.mark.parametrize("evict", POLICIES)
@pytest.mark.parametrize("reuse", ["blocks", "prefix"])
def test_runs_and_hits_make_up_what_was_looked_up(evict: str, reuse: str) -> None:
    made = small(evict=evict, reuse=reuse, n_blocks=16)
    for seed in range(4):
        serve(made, turns(seed))
    lookups, counters = made.scheduler.explain.lookups, made.scheduler.counters
    assert lookups.block_hits * SIZE == counters.cached_tokens > 0
    assert lookups.blocks * SIZE == counters.cached_tokens + sum(lookups.missed_tokens.values())
    assert lookups.cost_saved == lookups.block_hits
    assert lookups.cost == pytest.approx(counters.prompt_tokens / SIZE)
    assert sum(it.holes for it in made.scheduler.explain.kept.values()) == counters.holes
    assert lookups.missed_tokens["evicted"] > 0


def test_costs_grow_with_the_position() -> None:
    made = small()
    made.scheduler.explain._cost_of = lambda position: 1.0 + position
    misses = asked(made, "a", tokens(0, 40))
    assert misses.runs[0].cost == 1 + 17
    assert made.scheduler.explain.lookups.cost == 1 + 17 + 33 / 2


def test_a_preempted_request_is_explained_once() -> None:
    made = small(n_blocks=9, max_preemptions=1)
    run(made, [Add(str(i), tokens(i, 40), 60, 0) for i in range(3)])
    assert made.scheduler.counters.preemptions > 0
    assert [it.request_id for it in made.take_misses()] == ["0", "1", "2"]


def test_without_a_cache_nothing_is_looked_up() -> None:
    made = small(prefix_cache=False)
    run(made, [Add("a", tokens(0), 1, 0)])
    assert made.take_misses() == []
    assert made.scheduler.explain.lookups.blocks == 0
    assert made.scheduler.explain.lookups.cost == 100 / SIZE


def test_what_is_kept_is_bounded() -> None:
    made = small(block_tokens=1, n_blocks=60)
    for i in range(MAX_REQUESTS + 9):
        run(made, [Add(str(i), tokens(i, 3), 1, 0)])
    assert list(made.scheduler.explain.kept) == [str(i) for i in range(9, MAX_REQUESTS + 9)]
    assert len(made.take_misses()) == MAX_REQUESTS
    run(made, [Add("long", tokens(0, 3), 1, 0)])
    assert [it.request_id for it in made.take_misses()] == ["long"]


def test_of_many_runs_the_costliest_are_kept_and_told() -> None:
    made = small(block_tokens=1, n_blocks=400, evict="random")
    asked(made, "a", tokens(0, 390))
    lose(made, 200)
    misses = asked(made, "b", tokens(0, 390))
    kept = made.scheduler.explain.kept["b"]
    assert misses.n_runs > MAX_RUNS == len(kept.runs)
    assert len(misses.runs) == MAX_TOLD
    assert set(misses.runs) <= set(kept.runs)
    assert min(it.cost for it in misses.runs) == sorted(it.cost for it in kept.runs)[-MAX_TOLD]


def test_costliest_are_in_order_of_position() -> None:
    runs = [Miss(i, i + 1, "new", cost) for i, cost in enumerate([3.0, 1.0, 5.0, 4.0])]
    assert [it.start for it in costliest(runs, 3)] == [0, 2, 3]


def test_coarse_runs_close_the_smallest_gaps() -> None:
    runs = [(0, 4), (5, 8), (20, 21), (23, 30)]
    assert coarse(runs, 4) == runs
    assert coarse(runs, 3) == [(0, 8), (20, 21), (23, 30)]
    assert coarse(runs, 1) == [(0, 30)]


# -- victims ---------------------------------------------------------------------------------------------------


def watched(evict: str, watch: bool) -> Engine:
    made = small(evict=evict)
    for pool in made.scheduler.pools:
        pool.victims.watch = watch
    at_s = 0.0
    for seed in range(4):
        for add in turns(seed):
            made.add(add)
            while made.has_work:
                made.tick(at_s := at_s + 0.25)
    return made


@pytest.mark.parametrize("evict", POLICIES)
def test_the_runner_up_goes_next_or_was_used_meanwhile(evict: str) -> None:
    made = watched(evict, True)
    for pool in made.scheduler.pools:
        log = list(pool.victims)
        assert len(log) > 50
        assert all(it.idle_s >= 0 and it.next_key != it.key for it in log)
        followed = sum(a.next_key == b.key for a, b in itertools.pairwise(log))
        assert followed > len(log) // 4


@pytest.mark.parametrize("evict", sorted(set(POLICIES) - DRAWS))
def test_watching_changes_no_decision(evict: str) -> None:
    plain, seen = watched(evict, False), watched(evict, True)
    for a, b in zip(plain.scheduler.pools, seen.scheduler.pools, strict=True):
        assert list(a.log) == list(b.log)
        assert a.n_evicted == b.n_evicted > 0
        assert len(a.victims) == 0


def test_a_victim_scores_least_where_scores_decide() -> None:
    for evict in ("lru", "lfu", "pensieve", "asymcache"):
        for pool in watched(evict, True).scheduler.pools:
            assert all(it.next_score is None or it.score <= it.next_score for it in pool.victims)


def test_the_last_idle_block_has_no_runner_up() -> None:
    made = small(n_blocks=4)
    made.scheduler.pools[0].victims.watch = True
    asked(made, "a", tokens(0, 20))
    lose(made, 1)
    (victim,) = made.scheduler.pools[0].victims
    assert (victim.position, victim.next_key, victim.next_score) == (0, b"", None)


def test_the_log_of_victims_is_bounded() -> None:
    made = small(block_tokens=1)
    made.scheduler.pools[0].victims.watch = True
    for seed in range(200):
        run(made, [Add(str(seed), tokens(seed, 9), 1, 0)])
    assert made.scheduler.pools[0].n_evicted > MAX_VICTIMS == len(made.scheduler.pools[0].victims)
