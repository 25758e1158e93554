"""Ours: reuse times learned by class and age, the Gittins index, victims, and the net of miniature caches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from tenon.engine.blocks import BlockPool
from tenon.engine.cache_replay import Visit, replay, visits
from tenon.engine.policies.evict import Cached
from tenon.engine.policies.recency import Lru
from tenon.engine.policies.tuned import Tuned
from tenon.engine.policies.worth import EDGES, N_BUCKETS, N_CLASSES, ReuseTimes, Worth, bucket_of, class_of, gittins
from tenon.workloads.adversarial import ADVERSARIES, adversary

BLOCK = 1024


def cost_of(position: int) -> float:
    return 1.0 + position / 8192


def by_hand(returns: list[float]) -> list[float]:
    """The definition, without arrays."""
    widths = [b - a for a, b in itertools.pairwise(EDGES)]
    widths[-1] = EDGES[-2]
    best = []
    for start in range(N_BUCKETS):
        alive, used, waited, found = 1.0, 0.0, 0.0, 0.0
        for p, width in zip(returns[start:], widths[start:], strict=True):
            used += alive * p
            waited += alive * width * (1 - p / 2)
            alive *= 1 - p
            found = max(found, used / waited)
        best.append(found)
    return best


def test_the_index_is_its_definition() -> None:
    returns_CB = np.random.default_rng(0).random((3, N_BUCKETS)) ** 3
    for row, found in zip(returns_CB, gittins(returns_CB), strict=True):
        assert found == pytest.approx(by_hand(row.tolist()), rel=1e-12)


def test_buckets_begin_at_their_edges() -> None:
    for b, edge in enumerate(EDGES[:-1]):
        assert bucket_of(edge) == b
        assert bucket_of(np.nextafter(edge, -1.0)) == max(0, b - 1)


def periodic(period_s: float, n_keys: int = 50, rounds: int = 40) -> ReuseTimes:
    times, kind = ReuseTimes(), 0
    for turn in range(rounds):
        for key in range(n_keys):
            times.see(key.to_bytes(4, "little"), kind, turn * period_s + key * 0.01, waited=True)
    times.fit(rounds * period_s)
    return times


def test_worth_rises_towards_the_return_and_falls_after_it() -> None:
    index_B = periodic(100.0).index[0]
    due = bucket_of(100.0)
    assert (np.diff(index_B[: due + 1]) > 0).all()
    assert index_B[due + 5] < index_B[due] / 5


def test_a_held_blocks_end_is_no_return() -> None:
    times = ReuseTimes()
    times.see(b"a", 0, 0.0, waited=True)
    times.see(b"a", 0, 50.0, waited=False)
    times.see(b"a", 0, 60.0, waited=True)
    assert times._used_CB.sum() == 1
    assert times._used_CB[0, bucket_of(10.0)] == 1


def test_a_full_sample_follows_fewer_keys_for_as_long() -> None:
    times = ReuseTimes()
    for i in range(3 * ReuseTimes.MOST):
        times.see(i.to_bytes(4, "little"), 0, i * 1e-3, waited=True)
    assert times.sample > 1
    assert times.n_followed <= ReuseTimes.MOST
    assert times.oldest_s < 1.0


def test_what_was_never_seen_falls_as_one_over_age() -> None:
    times = ReuseTimes()
    times.fit(0.0)
    index_B = times.index[0]
    assert (np.diff(index_B[1:-1]) < 0).all()  # the first bucket and the last are wider than those beside them
    assert index_B[10] / index_B[20] == pytest.approx(2**5, rel=0.2)


def moved(policy: Worth, rng: np.random.Generator, n: int = 3000) -> Iterator[tuple[float, dict[int, Cached]]]:
    """Contexts come, are idle, come again, are evicted; yields time and idle blocks before each eviction."""
    idle: dict[int, Cached] = {}
    now_s, free = 0.0, list(range(200))
    for i in range(n):
        now_s += float(rng.exponential(3.0))
        if len(free) >= 8:
            made = [Cached(free.pop(), f"{i}.{j}".encode(), j * 16, 1.0 + j, 1, 1, now_s, 128) for j in range(8)]
            for entry in made:
                policy.stored(entry, now_s)
            for entry in reversed(made):
                policy.idle(entry, now_s)
                idle[entry.block] = entry
        for entry in [e for e in idle.values() if rng.random() < 0.02]:
            policy.used(entry, now_s)
            policy.busy(entry)
            entry.n_uses, entry.turn, entry.last_s = entry.n_uses + 1, entry.turn + 1, now_s
            policy.idle(entry, now_s)
        while len(free) < 8:
            yield now_s, idle
            victim = policy.victim(now_s)
            policy.evicted(victim, now_s)
            free.append(idle.pop(victim.block).block)


def test_victims_are_within_the_runs_factor_of_the_least() -> None:
    policy, n, exact = Worth(), 0, 0
    for now_s, idle in moved(policy, np.random.default_rng(1)):
        victim = policy.victim(now_s)
        least = min(policy.score(entry, now_s) for entry in idle.values())
        assert policy.score(victim, now_s) <= Worth.RUN * least * (1 + 1e-9)
        n, exact = n + 1, exact + (policy.score(victim, now_s) <= least)
    assert n > 1000
    assert exact > n / 3


def test_scores_are_those_of_the_age() -> None:
    policy = Worth()
    for now_s, idle in moved(policy, np.random.default_rng(2), 800):
        policy.victim(now_s)  # brings the buckets up to date, to a quarter of a second
        for entry in idle.values():
            ages = (now_s - entry.last_s, max(now_s - entry.last_s - Worth.LOOK_S, 0.0))
            index = policy.times.index[class_of(entry)]
            right = [entry.cost * index[bucket_of(age)] for age in ages]
            assert min(right) * 0.999 <= policy.score(entry, now_s) <= max(right) * 1.001 or policy.times.n_seen < 512
    assert policy.times.index.shape == (N_CLASSES, N_BUCKETS)


def test_what_is_used_all_the_time_leaves_nothing_behind() -> None:
    """Each use makes a run; those that are over are thrown away though nothing is ever evicted."""
    policy = Worth()
    hot = [Cached(i, str(i).encode(), 16 * i, 100.0 - i, 1, 1, 0.0, 16) for i in range(20)]
    for entry in hot:
        policy.stored(entry, 0.0)
        policy.idle(entry, 0.0)
    for i in range(20_000):
        entry, now_s = hot[i % 20], 0.05 * i
        policy.busy(entry)
        entry.last_s = now_s
        policy.idle(entry, now_s)
        policy.victim(now_s)
    assert sum(len(cell.heap) + len(cell.queue) for cell in policy._cells.values()) < 1000
    assert len(policy) == 20


@pytest.mark.parametrize("name", sorted(ADVERSARIES))
def test_never_a_point_under_lru(name: str) -> None:
    asked = visits(adversary(name, capacity=250_000), BLOCK)
    for n_blocks in (60, 200):
        found = [replay(asked, n_blocks, BLOCK, make, cost_of, warm=240) for make in (partial(Tuned, n_blocks), Lru)]
        assert found[0].saved_ratio >= found[1].saved_ratio - 0.01


def test_the_net_catches_what_ours_gets_wrong() -> None:
    """All is used again in the order in which it was, by a hair within what LRU holds: nothing can beat that."""
    rng = np.random.default_rng(3)
    recent: list[int] = []
    asked = []
    for i in range(6000):
        key = int(recent[-40:][int(rng.integers(min(40, len(recent))))]) if recent and rng.random() < 0.6 else i
        recent = [k for k in recent[-60:] if k != key] + [key]
        asked.append(Visit(float(i), (key.to_bytes(8, "little"),), 1, BLOCK))
    tuned, lru = Tuned(64), replay(asked, 64, BLOCK, Lru, cost_of)
    assert replay(asked, 64, BLOCK, lambda: tuned, cost_of).saved_ratio >= lru.saved_ratio - 0.01
    assert tuned.n_changes < 6


def test_a_cycle_makes_it_leave_lru() -> None:
    tuned = Tuned(200)
    asked = visits(adversary("cyclic-scan", capacity=250_000), BLOCK)
    assert replay(asked, 200, BLOCK, lambda: tuned, cost_of).saved_ratio > 0.5
    assert replay(asked, 200, BLOCK, Lru, cost_of).saved_ratio == 0.0
    assert tuned.present != "lru"


def test_miniatures_hold_what_the_pool_holds() -> None:
    """Else candidates are judged by blocks that nobody could give up."""
    rng = np.random.default_rng(11)
    tuned = Tuned(40)
    pool = BlockPool(40, BLOCK, lambda: tuned, cost_of)
    held: list[int] = []
    for i in range(4000):
        pool.now_s = float(i)
        if held and (len(held) > 36 or rng.random() < 0.5):
            pool.release(held.pop(int(rng.integers(len(held)))))
        else:
            key = int(rng.integers(80)).to_bytes(8, "little")
            block = pool.lookup(key, b"")
            if block is None:
                block = pool.take()
                pool.publish(block, key, b"")
            else:
                pool.take_over(block)
            held.append(block)
        keys = {entry.key for entry in pool.entries if pool.ref[entry.block]}
        for mini in tuned._mini.values():
            assert mini._held == keys
            assert len(mini._entries) - len(mini.policy) == len(keys)
            assert len(mini._entries) <= max(40, len(keys))
