"""Eviction policies: what all of them promise, heaps against a look at every idle block, counted work."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tenon.engine.policies.asymcache import AsymCache
from tenon.engine.policies.evict import Cached, Evict, Heap
from tenon.engine.policies.latency import Pensieve
from tenon.engine.policies.recency import Lru
from tenon.engine.policies.table import POLICIES

EVERY = pytest.mark.parametrize("name", sorted(POLICIES))
LEAST = ("asymcache", "gdsf", "lfu", "lru", "max-score", "pensieve", "t-lru")
"""Those whose victim is a block of the least score, Pensieve's within its ``RATIO``."""
JUMPS_S = (0.0, 0.0, 0.0, 1e-6, 0.5, 0.5, 3.0, 60.0, 4000.0)


class Moves:
    """What a pool may tell a policy, at random: stored, used, held by several, let go of, evicted.

    Costs and times repeat, so that there are ties; the clock stands still, jumps, and has passed 1e6 s at the end.
    """

    def __init__(self, policy: Evict, n: int = 40, seed: int = 0, costs: int = 12) -> None:
        self.policy, self.random, self.costs, self.n_blocks = policy, random.Random(seed), costs, n
        self.now_s, self.n_moves, self.n_victims = 0.0, 0, 0
        self.free = list(range(1, n + 1))
        self.idle: dict[int, Cached] = {}
        self.held: dict[int, Cached] = {}
        self.shadows: dict[bytes, Cached] = {}

    def go(self, n: int) -> Iterator[None]:
        """After each of ``n`` moves, a pause to look. Lives differ by a thousand between the thirds of the time."""
        for i in range(n):
            self.now_s += self.random.choice(JUMPS_S) * (1.0, 1e-3, 20.0)[3 * i // n]
            if i == n // 2:
                self.now_s += 1e6
            self.random.choice((self.store, self.use, self.use_held, self.let_go, self.let_go, self.evict))()
            yield

    def store(self) -> None:
        if not self.free:
            return
        place = self.random.randrange(3 * self.n_blocks)
        if any(entry.key == b"%d" % place for entry in (*self.idle.values(), *self.held.values())):
            return
        position = 16 * (place % self.costs)
        turn, now_s = self.random.randint(1, 10), self.now_s
        entry = Cached(self.free.pop(), b"%d" % place, position, 1.0 + position / 64, turn, 1, now_s, position + 16)
        if (shadow := self.shadows.pop(entry.key, None)) is not None:
            entry.away_s, entry.away_turn = now_s - shadow.last_s, shadow.turn
            entry.n_uses = shadow.n_uses + 1
        self.held[entry.block] = entry
        self.policy.stored(entry, now_s)

    def use(self) -> None:
        if self.idle:
            entry = self.random.choice(list(self.idle.values()))
            self.policy.used(entry, self.now_s)
            self.policy.busy(entry)
            self.held[entry.block] = self.idle.pop(entry.block)
            self.used(entry)

    def use_held(self) -> None:
        if self.held:
            entry = self.random.choice(list(self.held.values()))
            self.policy.used(entry, self.now_s)
            self.used(entry)

    def used(self, entry: Cached) -> None:
        entry.n_uses += 1
        entry.turn = self.random.randint(1, 10)

    def let_go(self) -> None:
        if self.held:
            entry = self.held.pop(self.random.choice(list(self.held)))
            entry.last_s, entry.length = self.now_s, entry.position + self.random.choice((16, 4000))
            self.idle[entry.block] = entry
            self.policy.idle(entry, self.now_s)

    def evict(self) -> Cached | None:
        if not self.idle:
            return None
        entry = self.policy.victim(self.now_s)
        self.policy.evicted(entry, self.now_s)
        del self.idle[entry.block]
        entry.evicted_s = self.now_s
        self.shadows[entry.key] = entry
        self.free.append(entry.block)
        self.n_victims += 1
        return entry


def made(name: str, n: int = 40) -> Evict:
    return POLICIES[name](n)


# -- all of them -----------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("seed", range(3))
def test_the_victim_is_idle_and_stays_so_until_it_is_evicted(name: str, seed: int) -> None:
    moves = Moves(made(name), seed=seed, n=(3, 12, 40)[seed])
    for _ in moves.go(1500):
        assert len(moves.policy) == len(moves.idle)
        if not moves.idle:
            with pytest.raises(LookupError):
                moves.policy.victim(moves.now_s)
            continue
        victim = moves.policy.victim(moves.now_s)
        assert moves.idle[victim.block] is victim
        assert moves.policy.victim(moves.now_s) is victim
        assert not math.isnan(moves.policy.score(victim, moves.now_s))
        assert len(moves.policy) == len(moves.idle)
    assert moves.now_s > 1e6
    assert moves.n_victims > 50


@EVERY
def test_all_are_evicted_in_the_end_and_each_once(name: str) -> None:
    moves = Moves(made(name), seed=9)
    for _ in moves.go(500):
        pass
    while moves.held:
        moves.let_go()
    left = set(moves.idle)
    assert {victim.block for victim in iter(moves.evict, None)} == left
    assert len(moves.policy) == 0


@EVERY
def test_what_is_not_idle_cannot_be_held_again(name: str) -> None:
    policy = made(name)
    entry = Cached(1, b"a", 0, 1.0)
    policy.stored(entry, 0.0)
    with pytest.raises(KeyError):
        policy.busy(entry)


@EVERY
def test_the_same_moves_give_the_same_victims(name: str) -> None:
    one, other = (Moves(made(name), seed=4) for _ in range(2))
    for _ in zip(one.go(800), other.go(800), strict=True):
        assert [*one.idle] == [*other.idle]
    assert one.n_victims == other.n_victims > 50


# -- the least of all idle blocks ------------------------------------------------------------------------------


def check_least(moves: Moves, n: int, ratio: float = 1.0) -> None:
    """Every victim's score, of ``n`` moves, against those of all idle blocks."""
    policy = moves.policy
    for _ in moves.go(n):
        if not moves.idle:
            continue
        score = policy.score(policy.victim(moves.now_s), moves.now_s)
        least = min(policy.score(entry, moves.now_s) for entry in moves.idle.values())
        # Keys hold a time over a lifespan, up to 1e7, and the difference of two such is compared.
        assert least <= score <= ratio * least + 1e-7 * (1 + abs(least) * (ratio == 1.0)), (score, least)


def ratio_of(name: str) -> float:
    return Pensieve.RATIO if name == "pensieve" else 1.0


@pytest.mark.parametrize("name", LEAST)
def test_victims_are_the_least_of_all_idle_blocks(name: str) -> None:
    moves = Moves(made(name), seed=1)
    check_least(moves, 10_000, ratio_of(name))
    assert moves.n_victims > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAST)
@pytest.mark.parametrize("seed", range(2))
def test_victims_are_the_least_of_all_idle_blocks_for_long(name: str, seed: int) -> None:
    check_least(Moves(made(name), seed=seed, n=60), 100_000, ratio_of(name))


def test_asymcache_learns_in_these_moves() -> None:
    """Lifespan and lambda change often: the heaps are made anew under the reference's eyes."""
    moves, seen = Moves(AsymCache(), seed=1), set()
    for _ in moves.go(10_000):
        seen.add((moves.policy.lifespan_s, moves.policy.log_lambda))  # type: ignore[attr-defined]
    assert len({lifespan_s for lifespan_s, _ in seen}) >= 4
    assert len({log_lambda for _, log_lambda in seen}) >= 6


class Backwards(AsymCache):
    """The greater of the two heads."""

    def victim(self, now_s: float) -> Cached:
        chosen = super().victim(now_s)
        return max((self._slow.first()[1], self._steep.first()[1]), key=lambda e: (e is not chosen, e.block))


class Forgetful(AsymCache):
    """Keeps its heaps when the lifespan changes."""

    def _learn(self, lifespan_s: float) -> None:
        if hasattr(self, "lifespan_s"):
            slow, steep = self._slow, self._steep
            self._slow, self._steep = Heap(), Heap()
            super()._learn(lifespan_s)
            self._slow, self._steep = slow, steep
        else:
            super()._learn(lifespan_s)


@pytest.mark.parametrize("broken", [Backwards, Forgetful])
def test_a_broken_victim_is_noticed(broken: Callable[[], Evict]) -> None:
    with pytest.raises(AssertionError):
        check_least(Moves(broken(), seed=1), 10_000)


def test_with_equal_costs_asymcache_is_lru() -> None:
    """Victim by victim, over changes of lifespan and lambda."""
    one, other = Moves(AsymCache(), seed=6, costs=1), Moves(Lru(), seed=6, costs=1)
    for _ in zip(one.go(10_000), other.go(10_000), strict=True):
        if one.idle:
            assert one.policy.victim(one.now_s).block == other.policy.victim(other.now_s).block
    assert one.n_victims > 1000


# -- counted work ----------------------------------------------------------------------------------------------


def heaps(held: Any) -> list[Heap]:
    """All that a policy works with, however deep."""
    if isinstance(held, Heap):
        return [held]
    if isinstance(held, list | tuple):
        return [heap for one in held for heap in heaps(one)]
    if isinstance(held, dict):
        return heaps(list(held.values()))
    ours = any(base.__module__.startswith("tenon.engine.policies") for base in type(held).__mro__)
    if ours and not isinstance(held, Cached):
        return heaps(list(getattr(held, "__dict__", {}).values()))
    return []


def moves_per_operation(policy: Evict, n: int) -> float:
    """Array entries touched by an eviction, a return and a use, each with what follows, among ``n`` idle blocks."""
    rng, now_s = random.Random(n), 0.0
    entries = [Cached(b, b"%d" % b, 16 * (b % 500), 1.0 + b % 500, b % 7 + 1) for b in range(n)]
    for entry in entries:
        now_s += 0.01
        policy.stored(entry, now_s)
        entry.last_s = now_s
        policy.idle(entry, now_s)
    before = sum(heap.n_moves for heap in heaps(policy))
    for _ in range(n):
        now_s += 0.01
        entry = policy.victim(now_s)
        policy.evicted(entry, now_s)
        entry.away_s = now_s - entry.last_s
        policy.stored(entry, now_s)
        entry.last_s = now_s
        policy.idle(entry, now_s)
        entry = rng.choice(entries)
        policy.used(entry, now_s)
        policy.busy(entry)
        entry.n_uses, entry.last_s = entry.n_uses + 1, now_s
        policy.idle(entry, now_s)
    assert len(policy) == n
    return (sum(heap.n_moves for heap in heaps(policy)) - before) / (2 * n)


def check_growth(make: Callable[[int], Evict], sizes: tuple[int, ...]) -> None:
    """Fitted on log-log axes work grows as n^0.15 at most (log n does as n^0.12 here), and log n bounds it."""
    work = [moves_per_operation(make(n), n) for n in sizes]
    x, y = [math.log(n) for n in sizes], [math.log(w) for w in work]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    assert slope < 0.2, (slope, work)
    assert all(w < 8 * math.log2(n) for n, w in zip(sizes, work, strict=True)), work


HEAPED = [name for name in sorted(POLICIES) if heaps(made(name))]


def test_these_work_with_heaps() -> None:
    assert {"asymcache", "gdsf", "lfu"} <= set(HEAPED)


@pytest.mark.parametrize("name", HEAPED)
def test_work_grows_as_a_logarithm(name: str) -> None:
    check_growth(POLICIES[name], (300, 1000, 3000, 10_000))


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAPED)
def test_work_grows_as_a_logarithm_up_to_many_blocks(name: str) -> None:
    check_growth(POLICIES[name], (1000, 10_000, 100_000))


class Anxious(AsymCache):
    """Makes its heaps anew at every use."""

    def used(self, entry: Cached, now_s: float) -> None:
        self._learn(self.lifespan_s)


def test_work_that_grows_with_the_blocks_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_growth(lambda n: Anxious(), (100, 300, 1000))
