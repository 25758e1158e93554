"""Requests that share blocks while they run, with holes: the same prefix twice in flight, aborts, storms, tenants,
colliding keys. After every step blocks are conserved and each published one holds the tokens that it says.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from tenon.engine.blocks import DIGEST_BYTES
from tenon.engine.engine import Engine
from tenon.engine.executors.hash import HashExecutor
from tenon.engine.kv_log import KVLog
from tenon.engine.messages import Add, Delta, KVEvents
from tenon.engine.policies.table import POLICIES
from tests.engine.build import Outputs, chunked, hash_engine, run
from tests.engine.test_blocks import Colliding
from tests.engine.test_holes import VOCAB, turns

SIZES = (1, 4, 16)
POOL = 12
"""Blocks of 16 tokens, or as many tokens in smaller ones: too few for three conversations."""


def small(size: int = 16, **config: Any) -> Engine:
    settings = {"evict": "random", "vocab_size": VOCAB, "block_tokens": size, "n_blocks": POOL * 16 // size, **config}
    return hash_engine(**settings)


def right(adds: Sequence[Add]) -> Outputs:
    """The answers without a cache."""
    return run(hash_engine(200, VOCAB, prefix_cache=False), adds)


def check(made: Engine) -> None:
    """Conservation, and that the slots of every published block hold the tokens that it is published for."""
    made.check_integrity()
    assert isinstance(made.executor, HashExecutor)
    for pool, slots in zip(made.scheduler.pools, made.executor._slots, strict=True):
        for entry in pool.entries:
            here = slots.reshape(-1, pool.block_tokens)[entry.block].tobytes()
            assert here == pool.content(entry.block)[DIGEST_BYTES:]


def drive(
    made: Engine, arrivals: Mapping[int, Sequence[Add]], aborts: Mapping[int, Sequence[str]] | None = None
) -> tuple[Outputs, list[Delta]]:
    """Serve what arrives before which step, less what is aborted then; in the end nobody holds a block."""
    deltas: list[Delta] = []
    at = 0
    while made.has_work or at <= max((*arrivals, *(aborts or {}))):
        for add in arrivals.get(at, ()):
            made.add(add)
        for request_id in (aborts or {}).get(at, ()):
            made.abort(request_id)
            check(made)
        deltas += made.tick(0.0)
        check(made)
        at += 1
    assert all(pool.n_held == 0 for pool in made.scheduler.pools)
    outputs: Outputs = {}
    for delta in deltas:
        outputs.setdefault((delta.request_id, delta.index), []).extend(delta.ids)
    return outputs, deltas


def wear(made: Engine, n: int) -> None:
    """Nobody is served; ``n`` idle blocks of each group, at random, are evicted."""
    for pool in made.scheduler.pools:
        taken = [pool.take() for _ in range(pool.n_available - pool.n_idle + n)]
        for block in taken:
            pool.release(block)
    check(made)


def prompt(seed: int, n: int = 150) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, n).tolist())


def asked(name: str, tokens: tuple[int, ...], **wishes: Any) -> Add:
    return Add(name, tokens, 6, 5, temperature=0.8, **wishes)


def worn(size: int, budget: int, n_blocks: int = 2 * POOL, *, chunk: int = 1024) -> Engine:
    """An engine that served ``prompt(0)`` and lost about half of its blocks since."""
    made = chunked(small(size, max_step_tokens=budget, n_blocks=n_blocks * 16 // size), chunk)
    drive(made, {0: [asked("earlier", prompt(0))]})
    wear(made, 75 // size)
    return made


@pytest.mark.parametrize("budget", [5, 16, 37])
@pytest.mark.parametrize("size", SIZES)
def test_a_prefix_that_is_in_flight_twice(size: int, budget: int) -> None:
    """Others come when the first has computed nothing, some or all of what they share; holes are among it."""
    first, second = asked("first", prompt(0)), asked("second", (*prompt(0, 140), 1, 2, 3))
    wanted = right([first, second, msgspec.structs.replace(first, request_id="third")])
    for delay in range(1, 100 // budget, max(1, 12 // budget)):
        made = worn(size, budget)
        third = msgspec.structs.replace(first, request_id="third")
        assert drive(made, {0: [first], delay: [second, third]})[0] == wanted
        assert made.scheduler.counters.holes > 1


@pytest.mark.parametrize("chunk", [3, 16, 37])
@pytest.mark.parametrize("size", SIZES)
def test_holes_that_are_being_filled_are_waited_for(size: int, chunk: int) -> None:
    """The first is at a hole when others come, who have the blocks beyond it already; the first may leave meanwhile."""
    adds = [asked(name, prompt(0)) for name in ("first", "second", "third")]
    wanted = right(adds)
    for cut in range(1, 80 // chunk + 2, max(1, 9 // chunk)):
        for gone in ([], ["first"]):
            made = worn(size, 1024, chunk=chunk)
            outputs, _ = drive(made, {0: adds[:1], 1: adds[1:]}, {cut: gone})
            assert all(outputs.get(key, tokens) == tokens for key, tokens in wanted.items() if key[0] not in gone)
            assert {key[0] for key in outputs} >= {"second", "third"}
            assert made.scheduler.counters.pending_tokens > 0


@pytest.mark.parametrize("budget", [5, 16])
@pytest.mark.parametrize("size", SIZES)
def test_an_abort_in_the_middle_of_a_prefill_leaves_what_is_right(size: int, budget: int) -> None:
    """What it had published is found by the next, and who shares its blocks meanwhile goes on."""
    first, second, third = (asked(name, prompt(0)) for name in ("first", "second", "third"))
    wanted, found = right([second, third]), set()
    for cut in itertools.count(1):
        if drive(worn(size, budget), {0: [first]}, {cut: ["first"]})[0]:
            break  # its prefill was over before
        made, arrivals = worn(size, budget), {0: [first], 60: [third]}
        arrivals[cut - 1] = [*arrivals.get(cut - 1, []), second]
        outputs, deltas = drive(made, arrivals, {cut: ["first"]})
        assert outputs == wanted
        assert made.scheduler.counters.finished == {"length": 3, "abort": 1}
        found.add(next(delta.cached_tokens for delta in deltas if delta.request_id == "second"))
    assert len(found) > 1


@pytest.mark.parametrize("evict", POLICIES)
@pytest.mark.parametrize("size", SIZES)
def test_a_storm_of_evictions(size: int, evict: str) -> None:
    """Twelve requests at once, where the pool holds one."""
    adds = turns(3)
    longest = max(len(add.prompt) for add in adds) + 6
    made = small(size, n_blocks=1 + -(-longest // size), evict=evict, max_step_tokens=37)
    outputs, _ = drive(made, {i: [add] for i, add in enumerate(adds)})
    assert outputs == right(adds)
    assert sum(pool.n_evicted for pool in made.scheduler.pools) > made.scheduler.pools[0].n_blocks


@pytest.mark.parametrize("size", SIZES)
def test_tenants_never_meet_beyond_holes_either(size: int) -> None:
    made = worn(size, 16)
    adds = [asked(f"{turn}-{tenant}", prompt(0), tenant=tenant) for turn in range(2) for tenant in ("a", "b")]
    adds.append(asked("none", prompt(0)))
    outputs, deltas = drive(made, {0: adds[:2], 40: adds[2:]})
    assert outputs == right(adds)
    cached = {delta.request_id: delta.cached_tokens for delta in deltas}
    assert cached["0-a"] == cached["0-b"] == 0
    assert min(cached["1-a"], cached["1-b"], cached["none"]) > 0


@pytest.mark.parametrize("size", SIZES)
def test_no_block_is_held_by_two_tenants(size: int) -> None:
    made = small(size, n_blocks=60 * 16 // size, max_step_tokens=16)
    for i in range(6):
        made.add(asked(str(i), prompt(0), tenant=str(i % 3)))
    while made.has_work:
        made.tick(0.0)
        check(made)
        for group, pool in enumerate(made.scheduler.pools):
            held = {
                (seq.request.add.tenant, int(b))
                for seq in made.scheduler.running
                for b in seq.tables[group][: seq.n_blocks]
            }
            assert len({block for _, block in held}) == len(held) == pool.n_held


class Counting(Colliding):
    """Colliding keys, and how often only the tokens told two blocks apart."""

    n_bits = 3
    saved = 0

    def lookup(self, digest: bytes, tokens: bytes) -> int | None:
        found = super().lookup(digest, tokens)
        self.saved += found is None and self.knows(digest)
        return found


@pytest.mark.parametrize("size", SIZES)
def test_colliding_keys_beyond_holes_serve_nothing_wrong(size: int) -> None:
    made = small(size, max_step_tokens=37)
    made.scheduler.pools = [Counting(pool.n_blocks, size, pool._make_evict) for pool in made.scheduler.pools]
    adds = [add for seed in range(4) for add in turns(seed)]
    assert drive(made, {i: [add] for i, add in enumerate(adds)})[0] == right(adds)
    assert made.scheduler.counters.cached_tokens > 0
    assert all(pool.saved > 100 for pool in made.scheduler.pools)  # type: ignore[attr-defined]


Mirrored = dict[tuple[int, str], tuple[int, str]]
"""By group and digest: position and parent."""


def mirror(seen: Mirrored, events: KVEvents) -> None:
    for event in events.events:
        where = event.group, event.digest
        if event.kind == "stored":
            seen[where] = event.position, event.parent
        elif event.kind == "removed":
            seen.pop(where, None)
        else:
            for gone in [other for other in seen if other[0] == event.group]:
                del seen[gone]


def resident(made: Engine) -> Mirrored:
    return {
        (group, entry.key.hex()): (entry.position, pool.content(entry.block)[:DIGEST_BYTES].hex())
        for group, pool in enumerate(made.scheduler.pools)
        for entry in pool.entries
    }


def busy(size: int = 16) -> Engine:
    made = small(size, max_step_tokens=37)
    for add in turns(5):
        made.add(add)
    return made


@pytest.mark.parametrize("size", SIZES)
def test_events_replay_to_what_is_resident(size: int) -> None:
    """Each batch is applied twice, which makes no difference."""
    made, seen = busy(size), Mirrored()
    while made.has_work:
        made.tick(0.0)
        events = made.take_kv_events()
        mirror(seen, events)
        mirror(seen, events)
        assert seen == resident(made)
    assert events.dropped == 0


@pytest.mark.parametrize("end", ["reset", "load_weights", "forget_idle"])
def test_events_replay_beyond_what_empties_the_cache(end: str) -> None:
    made, seen = busy(), Mirrored()
    for _ in range(7):
        made.tick(0.0)
    if end == "load_weights":
        run(made)
    before = len(resident(made))
    {"reset": made.reset, "load_weights": lambda: made.load_weights("", 1), "forget_idle": made.forget_idle}[end]()
    mirror(seen, made.take_kv_events())
    assert seen == resident(made)
    assert len(seen) < before
    assert (len(seen) > 0) == (end == "forget_idle")
    run(made, [asked("next", prompt(8))])
    mirror(seen, made.take_kv_events())
    assert seen == resident(made)


def test_lost_events_are_counted_and_what_is_resident_is_told_anew() -> None:
    made, seen = busy(), Mirrored()
    for pool in made.scheduler.pools:
        pool.log = KVLog(pool.n_blocks, 5)
    run(made)
    events = made.take_kv_events()
    assert events.dropped == made.stats(0.0).kv_events_dropped > 0
    assert {event.reason for event in events.events if event.kind == "cleared"} == {"resident"}
    mirror(seen, events)
    assert seen == resident(made)
    assert made.take_kv_events().dropped == events.dropped


def test_while_nobody_takes_events_none_are_kept() -> None:
    made, seen = busy(), Mirrored()
    made.stop_kv_events()
    run(made)
    assert [len(pool.log) for pool in made.scheduler.pools] == [0] * len(made.scheduler.pools)
    mirror(seen, made.take_kv_events())
    assert seen == resident(made)
    run(made, [asked("next", prompt(8))])
    mirror(seen, made.take_kv_events())
    assert seen == resident(made)
    assert made.stats(0.0).kv_events_dropped == 0


def test_a_mirror_that_misses_a_batch_is_wrong() -> None:
    made, seen = busy(), Mirrored()
    while made.has_work:
        made.tick(0.0)
        events = made.take_kv_events()
        if made.scheduler.counters.steps % 5:
            mirror(seen, events)
    assert seen != resident(made)
    made.restart_kv_events()
    mirror(seen, made.take_kv_events())
    assert seen == resident(made)


def test_events_come_in_pieces_where_they_are_many() -> None:
    made, seen, n = busy(), Mirrored(), 0
    run(made)
    while (events := made.take_kv_events(3)).events:
        assert len(events.events) <= 3
        mirror(seen, events)
        n += 1
    assert seen == resident(made)
    assert n > 5


def test_forgetting_what_is_idle_disturbs_nobody() -> None:
    made = small(n_blocks=60, max_step_tokens=37)
    run(made, [asked("earlier", prompt(0))])
    first = asked("first", prompt(1))
    made.add(first)
    for _ in range(5):
        made.tick(0.0)
    idle = sum(pool.n_idle for pool in made.scheduler.pools)
    assert made.forget_idle() == idle > 0
    check(made)
    assert run(made)["first", 0] == right([first])["first", 0][1:]
    assert [run(made, [asked(name, prompt(seed))]) and made.take_misses()[-1].cached_tokens for name, seed in
            (("a", 0), ("b", 1))] == [0, 144]  # fmt: skip


class Careless(Colliding):
    """Believes its keys."""

    def lookup(self, digest: bytes, tokens: bytes) -> int | None:
        entry = self._entry_of.get(self.short(digest))
        return entry and entry.block


def test_keys_that_are_believed_are_found_out() -> None:
    made = small()
    made.scheduler.pools = [Careless(pool.n_blocks, 16, pool._make_evict) for pool in made.scheduler.pools]
    assert drive(made, {i: [add] for i, add in enumerate(turns(0))})[0] != right(turns(0))


class Traced(Colliding):
    """Knows each block's whole key, and how often another's was taken for it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.wrong, self.whole = 0, dict[int, bytes]()

    def publish(self, block: int, digest: bytes, content: bytes, *more: Any) -> None:
        if self.entry(block) is None:
            self.whole[block] = digest
        super().publish(block, digest, content, *more)

    def lookup(self, digest: bytes, tokens: bytes) -> int | None:
        found = super().lookup(digest, tokens)
        self.wrong += found is not None and self.whole[found] != digest
        return found


def test_a_collision_of_equal_tokens_after_others_is_no_hit() -> None:
    made = small(n_blocks=60)
    made.scheduler.pools = [Traced(pool.n_blocks, 16, pool._make_evict) for pool in made.scheduler.pools]
    adds = [asked(str(i), (*prompt(i, 16), *prompt(99, 20))) for i in range(12)]
    drive(made, {20 * i: [add] for i, add in enumerate(adds)})
    assert [pool.wrong for pool in made.scheduler.pools] == [0, 0]  # type: ignore[attr-defined]


def test_an_overwritten_block_is_found_out() -> None:
    made = worn(16, 37)
    block = next(iter(made.scheduler.pools[1].entries)).block
    made.executor._slots[1][block * 16] += 1  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        check(made)
