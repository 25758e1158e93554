"""The block pool against a model that recounts everything: matches, forks, aborts, evictions, resets in any order."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tenon.base.errors import IntegrityError
from tenon.engine.blocks import BlockPool
from tenon.engine.kv_log import CLEARED, STORED
from tenon.engine.policies.asymcache import AsymCache
from tenon.engine.policies.evict import Cached
from tenon.engine.policies.recency import Lru
from tenon.engine.policies.table import POLICIES
from tests.engine.test_evict import heaps

SIZE = 16
PATHS = st.text("ab", min_size=1, max_size=5).map(str.encode)


def content_of(path: bytes) -> bytes:
    return b"tokens of " + path


@dataclass
class Known:
    """What the model knows of a published key: of which block, and what policies should see of it."""

    block: int
    n_uses: int
    turn: int
    last_s: float
    length: int
    away_s: float
    away_turn: int


@dataclass
class Table:
    """A sequence: its context, a letter a block, and the block of each."""

    path: bytes
    blocks: list[int]


class Pooled(RuleBasedStateMachine):
    """A key is the path of letters up to its block; the key before it is the path without its last letter."""

    pool_type = BlockPool

    @initialize(policy=st.sampled_from(sorted(POLICIES)), n_blocks=st.integers(2, 10))
    def start(self, policy: str, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.pool = self.pool_type(n_blocks, SIZE, lambda: POLICIES[policy](n_blocks), lambda position: 1.0 + position)
        self.tables: list[Table] = []
        self.known: dict[bytes, Known] = {}
        self.shadows: OrderedDict[bytes, Known] = OrderedDict()
        self.n_stored = 0

    # -- the model ------------------------------------------------------------------------------------------

    def holders(self, block: int) -> int:
        return sum(table.blocks.count(block) for table in self.tables)

    def key_of(self, block: int) -> bytes | None:
        return next((key for key, known in self.known.items() if known.block == block), None)

    @property
    def states(self) -> dict[int, str]:
        found = {}
        for block in range(1, self.n_blocks):
            is_idle = self.key_of(block) is not None
            found[block] = "held" if self.holders(block) else "idle" if is_idle else "free"
        return found

    def took(self, block: int, before: dict[int, str]) -> None:
        """What follows from the pool's choice, which has to be a free block where there is one."""
        if "free" in before.values():
            assert before[block] == "free"
            return
        assert before[block] == "idle"
        key = self.key_of(block)
        assert key is not None
        self.shadows[key] = self.known.pop(key)
        while len(self.shadows) > self.n_blocks - 1:
            self.shadows.popitem(last=False)

    def let_go(self, table: Table) -> None:
        """From the last block to the first, as sequences do."""
        length = len(table.path) * SIZE
        while table.blocks:
            block = table.blocks.pop()
            self.pool.release(block, length)
            key = self.key_of(block)
            if key is not None and not self.holders(block):
                self.known[key].last_s, self.known[key].length = self.pool.now_s, length
        if table in self.tables:
            self.tables.remove(table)

    # -- moves ----------------------------------------------------------------------------------------------

    @rule(path=PATHS, turn=st.integers(1, 3), ends=st.booleans(), ahead_s=st.sampled_from([0.0, 1e-6, 1.0, 300.0, 1e6]))
    def serve(self, path: bytes, turn: int, ends: bool, ahead_s: float) -> None:
        """A request from its beginning to its end, or to where it decodes."""
        table = self.enter(path, turn)
        if table is not None:
            self.pool.now_s += ahead_s
            self.offer(table, 0, len(path), turn)
            if ends:
                self.let_go(table)

    @rule(path=PATHS, turn=st.integers(1, 3))
    def begin(self, path: bytes, turn: int) -> None:
        self.enter(path, turn)

    def enter(self, path: bytes, turn: int) -> Table | None:
        """All that is resident is held first, beyond holes too; then the rest is taken. Where that fails, all goes."""
        keys = [path[: i + 1] for i in range(len(path))]
        hits = {key: self.pool.lookup(key, content_of(key)) for key in keys}
        assert hits == {key: self.known[key].block if key in self.known else None for key in keys}
        table = Table(path, [])
        self.tables.append(table)
        for key, block in hits.items():
            if block is not None:
                self.pool.take_over(block, turn)
                table.blocks.append(block)
                self.known[key].n_uses += 1
                self.known[key].turn = turn
        found = dict(hits)
        for key in keys:
            if found[key] is None:
                before = self.states
                if "free" not in before.values() and "idle" not in before.values():
                    with pytest.raises(LookupError):
                        self.pool.take()
                    self.let_go(table)
                    return None
                block = self.pool.take()
                self.took(block, before)
                table.blocks.append(block)
                found[key] = block
        table.blocks = [block for key in keys if (block := found[key]) is not None]
        return table

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), turn=st.integers(1, 3))
    def publish(self, data: st.DataObject, turn: int) -> None:
        """Some of a sequence's blocks, in order, known ones among them."""
        table = data.draw(st.sampled_from(self.tables))
        first = data.draw(st.integers(0, len(table.path) - 1))
        self.offer(table, first, data.draw(st.integers(first + 1, len(table.path))), turn)

    def offer(self, table: Table, first: int, end: int, turn: int) -> None:
        for i in range(first, end):
            key, block, now_s = table.path[: i + 1], table.blocks[i], self.pool.now_s
            self.pool.publish(block, key, content_of(key), i * SIZE, key[:-1], turn)
            if key in self.known or self.key_of(block) is not None:
                continue
            was = self.shadows.pop(key, None)
            self.n_stored += 1
            away_s, away_turn = (now_s - was.last_s, was.turn) if was else (-1.0, 1)
            n_uses = was.n_uses + 1 if was else 1
            self.known[key] = Known(block, n_uses, turn, now_s, (i + 1) * SIZE, away_s, away_turn)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        for block in table.blocks:
            self.pool.share(block)
        self.tables.append(Table(table.path, list(table.blocks)))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """The end of a sequence, its abort or its preemption."""
        self.let_go(data.draw(st.sampled_from(self.tables)))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        """A sequence's last block for one of its own, as where siblings part."""
        table = data.draw(st.sampled_from(self.tables))
        before = self.states
        if "free" in before.values() or "idle" in before.values():
            new = self.pool.take()
            self.took(new, before)
            old = table.blocks.pop()
            self.pool.release(old, len(table.path) * SIZE)
            if (key := self.key_of(old)) is not None and not self.holders(old):
                self.known[key].last_s, self.known[key].length = self.pool.now_s, len(table.path) * SIZE
            table.blocks.append(new)

    @rule(path=PATHS)
    def ask_wrongly(self, path: bytes) -> None:
        """A collision; a release of what nobody holds."""
        assert self.pool.lookup(path, b"others") is None
        assert self.pool.knows(path) == (path in self.known)
        for block in (block for block, state in self.states.items() if state == "free"):
            with pytest.raises(IntegrityError, match="did not hold"):
                self.pool.release(block)
            self.pool.ref[block] = 0

    @rule(is_sure=st.integers(0, 4).map(lambda n: n == 0))
    def forget(self, is_sure: bool) -> None:
        if is_sure:
            self.pool.forget()
            self.known.clear()
            self.shadows.clear()

    # -- what always holds ----------------------------------------------------------------------------------

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool, states = self.pool, list(self.states.values())
        counts = states.count("held"), states.count("idle"), states.count("free")
        assert (pool.n_held, pool.n_idle, pool.n_available - pool.n_idle) == counts
        assert sum(counts) == self.n_blocks - 1
        assert [pool.ref[block] for block in self.states] == [self.holders(block) for block in self.states]
        pool.check_integrity([np.array(table.blocks) for table in self.tables])

    @invariant()
    def the_policy_chooses_among_idle_blocks(self) -> None:
        if hasattr(self, "pool"):
            if self.pool.n_idle:
                assert self.states[self.pool.evict.victim(self.pool.now_s).block] == "idle"
            else:
                with pytest.raises(LookupError):
                    self.pool.evict.victim(self.pool.now_s)

    @invariant()
    def a_key_is_one_block_and_policies_see_the_truth(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert {entry.key for entry in self.pool.entries} == set(self.known)
        for key, known in self.known.items():
            entry = self.pool.entry(known.block)
            assert entry is not None
            assert seen(entry) == (key, *vars(known).values())
            assert (entry.position, entry.cost) == ((len(key) - 1) * SIZE, 1.0 + (len(key) - 1) * SIZE)
            followers = [known for after, known in self.known.items() if after[:-1] == key]
            blocks = [other.block for other in followers]
            assert (entry.child.block if entry.child else None) in (blocks or [None])
            before = self.known.get(key[:-1])
            assert (entry.parent.block if entry.parent else None) == (before.block if before else None)
            if before:
                assert entry.parent is self.pool.entry(before.block)

    @invariant()
    def shadows_are_what_was_evicted_last(self) -> None:
        if hasattr(self, "pool"):
            assert list(self.pool.shadows) == list(self.shadows)
            assert not set(self.shadows) & set(self.known)
            assert len(self.shadows) < self.n_blocks
            for key, entry in self.pool.shadows.items():
                assert seen(entry) == (key, *vars(self.shadows[key]).values())
                assert entry.parent is entry.child is None

    @invariant()
    def events_replay_to_what_is_resident(self) -> None:
        if hasattr(self, "pool"):
            resident: set[bytes] = set()
            n_stored = 0
            for event in self.pool.log:
                if event.kind == CLEARED:
                    resident.clear()
                elif event.kind == STORED:
                    assert event.key not in resident
                    resident.add(event.key)
                    n_stored += 1
                else:
                    resident.remove(event.key)
            assert n_stored == self.pool.n_stored == self.n_stored
            assert resident == set(self.known)


def seen(entry: Cached) -> tuple[Any, ...]:
    """Its key, and the rest as the model's ``Known``."""
    return (
        entry.key, entry.block, entry.n_uses, entry.turn, entry.last_s, entry.length, entry.away_s, entry.away_turn
    )  # fmt: skip


def check(machine: type[Pooled], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        ),
    )  # fmt: skip


def test_the_pool_is_what_the_model_says() -> None:
    check(Pooled, 120, 40)


@pytest.mark.slow
def test_the_pool_is_what_the_model_says_for_long() -> None:
    check(Pooled, 500, 60)


class Dangling(BlockPool):
    """Leaves followers pointing at what was evicted."""

    def _unlink(self, entry: Cached) -> None:
        self._after.pop(entry.key, None)
        super()._unlink(entry)


class Hoarding(BlockPool):
    """Evicts although blocks are free."""

    def take(self) -> int:
        if self.n_idle:
            entry = self.evict.victim(self.now_s)
            self.evict.evicted(entry, self.now_s)
            self._unpublish(entry, "evicted")
            self._remember(entry)
            self.ref[entry.block] = 1
            return entry.block
        return super().take()


class Shadowless(BlockPool):
    def _remember(self, entry: Cached) -> None:
        """Forgets it."""


class Twice(BlockPool):
    """Offers a block anew under a key that is taken."""

    def publish(self, block: int, digest: bytes, *more: Any) -> None:
        known = self._entry_of.get(digest)
        if known is not None and known.block != block and self._entry[block] is None:
            self._unpublish(known, "evicted")
        super().publish(block, digest, *more)


@pytest.mark.parametrize("broken", [Dangling, Hoarding, Shadowless, Twice])
def test_a_broken_pool_is_noticed(broken: type[BlockPool]) -> None:
    class Broken(Pooled):
        pool_type = broken

    with pytest.raises((AssertionError, KeyError, IntegrityError)):
        check(Broken, 60, 40)


# -- neighbours, and work --------------------------------------------------------------------------------------


def filled(n: int, pool: BlockPool) -> None:
    """``n`` idle blocks in contexts of 100."""
    for i in range(n):
        pool.now_s += 0.01
        key, before = b"%d" % i, b"%d" % (i - 1) if i % 100 else b""
        block = pool.take()
        pool.publish(block, key, key, i % 100 * SIZE, before)
        pool.release(block, 100 * SIZE)


def test_neighbours_meet_again_when_a_hole_is_filled() -> None:
    pool = BlockPool(5, SIZE, Lru)
    filled(4, pool)
    first, second, third, _ = pool.entries
    pool.take_over(first.block)
    assert pool.take() == second.block
    assert (first.child, third.parent) == (None, None)
    pool.publish(second.block, b"1", b"1", SIZE, b"0")
    anew = pool.entry(second.block)
    assert anew is not None
    assert anew is not second
    assert (first.child, anew.parent, anew.child, third.parent) == (anew, first, third, anew)


def test_of_several_followers_the_one_left_is_the_child() -> None:
    pool = BlockPool(4, SIZE, Lru)
    for key, before in ((b"a", b""), (b"ab", b"a"), (b"ac", b"a")):
        pool.publish(pool.take(), key, key, 0, before)
    stem, one, other = pool.entries
    assert stem.child is other
    pool.release(other.block)
    pool.take()
    assert stem.child is one
    assert one.parent is stem


@pytest.mark.parametrize("n_blocks", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_an_eviction_of_a_large_pool_is_little_work(n_blocks: int) -> None:
    rng, counted = random.Random(0), []
    pool = BlockPool(n_blocks, SIZE, AsymCache, lambda position: 1.0 + position / 8000)
    filled(n_blocks - 1, pool)
    found = heaps(pool.evict)
    for i in range(2000):
        before = sum(heap.n_moves for heap in found)
        block = pool.take()
        counted.append(sum(heap.n_moves for heap in found) - before)
        pool.publish(block, b"new %d" % i, b"", 0, b"")
        pool.now_s += rng.random()
        pool.release(block, SIZE)
    assert len(found) == 2
    # A victim leaves one heap at once and the other when it comes up there: single evictions clear away many.
    assert sum(counted) / len(counted) <= 2 * n_blocks.bit_length()
    assert max(counted) <= n_blocks / 10
