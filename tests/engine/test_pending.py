"""Blocks that one running request computes for others that came meanwhile: computed once, never read before, never lost
with the one who was to compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.base.errors import IntegrityError
from tenon.engine.engine import Engine
from tenon.engine.executors.hash import HashExecutor
from tenon.engine.messages import Add
from tenon.engine.pending import Pending
from tenon.engine.sequence import Seq
from tenon.engine.step import Step
from tests.engine.build import Labs, Outputs, chunked, hash_engine, run
from tests.engine.test_invariant import CASES
from tests.engine.test_shared import VOCAB, asked, drive, prompt, right


class Rows(HashExecutor):
    """Counts the rows that it computes, by position."""

    at: np.ndarray

    def submit(self, step: Step) -> Any:
        np.add.at(self.at, step.pos, 1)
        return super().submit(step)


def engine(size: int = 16, n_tokens: int = 1600, chunk: int = 1024, **config: Any) -> Engine:
    """Of blocks for ``n_tokens``, its scheduler ``Chunked``, its executor ``Rows``."""
    made = chunked(hash_engine(n_tokens // size, VOCAB, block_tokens=size, **config), chunk)
    made.executor.__class__, made.executor.at = Rows, np.zeros(512, int)  # type: ignore[attr-defined]
    return made


def computed(made: Engine, end: int) -> list[int]:
    """How often each position below ``end`` was."""
    assert isinstance(made.executor, Rows)
    return made.executor.at[:end].tolist()


def cached(made: Engine, adds: Iterable[Add]) -> dict[str, int]:
    """Tokens that each request is told were not computed for it."""
    for add in adds:
        made.add(add)
    told: dict[str, int] = {}
    while made.has_work:
        told.update((delta.request_id, delta.cached_tokens) for delta in made.tick(0.0))
    return told


def seq_of(made: Engine, name: str) -> Seq:
    return made.scheduler.requests[name].seqs[0]


# -- computed once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "chunk"), [(1, 1), (7, 5), (40, 1), (40, 16), (1024, 21), (1024, 1024)])
@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_one_prompt_asked_for_three_times_at_once_is_computed_once(size: int, budget: int, chunk: int) -> None:
    adds = [asked(name, prompt(0)) for name in "abc"]
    made = engine(size, chunk=chunk, max_step_tokens=budget)
    assert drive(made, {0: adds})[0] == right(adds)
    shared = 149 // size * size  # the last position's logits are wanted
    assert computed(made, 150) == [1] * shared + [3] * (150 - shared)
    assert made.scheduler.counters.cached_tokens == 2 * shared
    assert made.scheduler.counters.pending_tokens == 2 * shared or chunk == 1 or budget < 16


def test_each_computes_its_own_where_that_is_asked_for() -> None:
    adds = [asked(name, prompt(0)) for name in "abc"]
    for config in ({"pending": "private"}, {"prefix_cache": False}):
        made = engine(**config)
        assert drive(made, {0: adds})[0] == right(adds)
        assert computed(made, 150) == [3] * 150
        assert made.scheduler.counters.pending_tokens == made.scheduler.counters.cached_tokens == 0


@pytest.mark.parametrize("chunk", [1, 16, 37])
def test_who_comes_in_the_middle_shares_what_is_left(chunk: int) -> None:
    first, second = asked("first", prompt(0)), asked("second", (*prompt(0, 100), *prompt(1, 30)))
    for delay in range(1, 4):
        made = engine(chunk=chunk)
        assert drive(made, {0: [first], delay: [second]})[0] == right([first, second])
        assert computed(made, 96) == [1] * 96


def test_the_answer_says_what_was_not_computed_for_it() -> None:
    adds = [asked("first", prompt(0)), asked("same", prompt(0)), asked("longer", (*prompt(0, 149), *prompt(1, 20)))]
    made = engine()
    assert cached(made, adds) == {"first": 0, "same": 144, "longer": 144}
    assert made.scheduler.counters.cached_tokens == made.scheduler.counters.pending_tokens == 288
    assert made.scheduler.counters.holes == 0


def test_a_waiter_s_rows_are_in_the_step_that_computes_what_it_waits_for_and_not_before() -> None:
    made = engine(chunk=50)
    for name in "ab":
        made.add(asked(name, prompt(0)))
    first, second = (seq_of(made, name).id for name in "ab")
    for spans in ([first], [first], [first, second]):
        step = made.scheduler.schedule(0.0)
        assert step is not None
        assert step.seq.tolist() == spans
        made.scheduler.commit(step, made.executor.poll(made.executor.submit(step)))
    assert step.pos.tolist() == [*range(100, 150), *range(144, 150)]


def test_policies_hear_of_those_who_waited() -> None:
    made = engine()
    run(made, [asked(name, prompt(0)) for name in "abc"])
    for pool in made.scheduler.pools:
        assert [entry.n_uses for entry in pool.entries] == [3] * 9


def test_tenants_wait_for_nobody_else() -> None:
    adds = [asked(f"{i}", prompt(0), tenant="ab"[i % 2]) for i in range(4)]
    made = engine()
    assert drive(made, {0: adds})[0] == right(adds)
    assert computed(made, 144) == [2] * 144


@pytest.mark.parametrize("n", [2, 3])
def test_siblings_fork_from_what_was_waited_for(n: int) -> None:
    adds = [asked("first", prompt(0)), asked("many", prompt(0), n=n), asked("more", prompt(0, 140), n=n)]
    made = engine(chunk=37, max_sequences=1 + 2 * n)
    assert drive(made, {0: adds})[0] == right(adds)
    assert computed(made, 128) == [1] * 128


def test_the_leading_run_goes_on_through_what_is_pending_and_no_further() -> None:
    """Blocks 0-1 are lost, 2-4 resident, the rest is new."""
    for reuse, counts in (("prefix", [1] * 144), ("blocks", [1] * 32 + [0] * 48 + [1] * 64)):
        made = engine(reuse=reuse)
        run(made, [asked("earlier", prompt(0, 80))])
        for pool in made.scheduler.pools:
            for entry in list(pool.entries)[:2]:
                pool.evict.busy(entry)
                pool._unpublish(entry, "forgotten")
                pool._free.append(entry.block)
        made.executor.at[:] = 0  # type: ignore[attr-defined]
        adds = [asked("a", prompt(0)), asked("b", prompt(0))]
        assert run(made, adds) == right(adds)
        assert computed(made, 144) == counts


def without(outputs: Outputs, gone: Container[str]) -> Outputs:
    return {key: tokens for key, tokens in outputs.items() if key[0] not in gone}


# -- the one who was to compute leaves ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [5, 16, 50])
@pytest.mark.parametrize("size", [4, 16])
def test_of_three_in_a_chain_whoever_stays_is_right_whenever_one_goes(size: int, chunk: int) -> None:
    adds = [
        asked("first", prompt(0)),
        asked("second", (*prompt(0, 100), *prompt(1, 60))),
        asked("third", (*prompt(0, 100), *prompt(1, 40), *prompt(2, 20))),
    ]
    wanted = right(adds)
    for cut in range(1, 170 // chunk + 3, max(1, 10 // chunk)):
        for gone in (["first"], ["second"], ["first", "second"]):
            made = engine(size, chunk=chunk)
            outputs, _ = drive(made, {0: adds}, {cut: gone})
            assert without(outputs, gone) == without(wanted, gone)


@pytest.mark.parametrize("chunk", [5, 16, 1024])
def test_an_abort_between_a_step_and_its_commit(chunk: int) -> None:
    """Rows that counted on those of the one that left come to nothing and are computed again."""
    adds = [asked(name, prompt(0)) for name in "abc"]
    wanted = right(adds)
    for cut in range(1, 160 // chunk + 3):
        made, outputs = engine(chunk=chunk), dict[tuple[str, int], list[int]]()
        for add in adds:
            made.add(add)
        while made.has_work:
            step = made.scheduler.schedule(0.0)
            assert step is not None
            if step.id == cut:
                made.abort("a")
            for delta in made.scheduler.commit(step, made.executor.poll(made.executor.submit(step))):
                outputs.setdefault((delta.request_id, delta.index), []).extend(delta.ids)
            made.check_integrity()
        assert without(outputs, "a") == without(wanted, "a")


class Failing(Rows):
    """In step ``at_step`` whatever sequence ``victim`` computes is garbage, and it says so."""

    at_step = victim = -1

    def submit(self, step: Step) -> Any:
        ticket = super().submit(step)
        if step.id == self.at_step and self.victim in step.seq:
            mine = np.repeat(step.seq, np.diff(step.q_start)) == self.victim
            for slots, group in zip(self._slots, step.groups, strict=True):
                slots[group.slot[mine]] = -1
            self._results[ticket].errors[self.victim] = "not a number"
        return ticket


@pytest.mark.parametrize("chunk", [16, 50, 1024])
def test_who_counted_on_one_that_failed_in_the_same_step_goes_on_alone(chunk: int) -> None:
    adds = [asked(name, prompt(0)) for name in "abc"]
    wanted = right(adds)
    for at_step in range(1, 160 // chunk + 2):
        made = engine(chunk=chunk)
        made.executor.__class__ = Failing
        made.executor.at_step, made.executor.victim = at_step, 0  # type: ignore[attr-defined]
        outputs, _ = drive(made, {0: adds})
        assert made.scheduler.counters.finished == {"error": 1, "length": 2}
        assert without(outputs, "a") == without(wanted, "a")


def test_what_its_heir_computes_is_not_said_to_be_cached() -> None:
    made = engine(chunk=50)
    for name in "abc":
        made.add(asked(name, prompt(0)))
    made.tick(0.0)
    made.abort("a")
    assert cached(made, []) == {"b": 48, "c": 144}
    assert computed(made, 144) == [1] * 48 + [2] * 2 + [1] * 94


# -- any mix ------------------------------------------------------------------------------------------------------


def mix(rng: np.random.Generator) -> dict[int, list[Add]]:
    """Up to nine requests over two beginnings, some of several answers, by the step that they come before."""
    arrivals: dict[int, list[Add]] = {}
    for i in range(int(rng.integers(2, 10))):
        start, own = prompt(int(rng.integers(0, 2)), int(rng.choice([33, 64, 90, 150]))), int(rng.integers(0, 20))
        n = int(rng.choice([1, 1, 2]))
        add = Add(f"r{i}", (*start, *prompt(9, own)), int(rng.choice([1, 6, 20])), i, n, temperature=0.8)
        arrivals.setdefault(int(rng.choice([0, 0, 1, 3, 9])), []).append(add)
    return arrivals


def served_right(seed: int, config: Mapping[str, Any]) -> tuple[bool, Engine]:
    """Whether a mix with aborts in it gets the answers of serving without a cache."""
    rng = np.random.default_rng(seed)
    arrivals = mix(rng)
    adds = [add for at in sorted(arrivals) for add in arrivals[at]]
    gone = [add.request_id for add in adds if rng.random() < 0.3]
    aborts: dict[int, list[str]] = {}
    for name in gone:
        aborts.setdefault(int(rng.integers(1, 14)), []).append(name)
    made = engine(**config)
    outputs, _ = drive(made, arrivals, aborts)
    return without(outputs, gone) == without(right(adds), gone), made


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.fixed_dictionaries(
        {
            "size": st.sampled_from([1, 4, 16, 64]),
            "n_tokens": st.sampled_from([320, 448, 1600]),
            "max_step_tokens": st.sampled_from([1, 16, 61, 512]),
            "chunk": st.sampled_from([1, 5, 16, 40]),
            "max_preemptions": st.integers(0, 3),
            "max_sequences": st.integers(2, 12),
            "reuse": st.sampled_from(["blocks", "prefix"]),
            "evict": st.sampled_from(["lru", "random"]),
        }
    ),
)
def test_any_mix_is_answered_as_without_a_cache(seed: int, config: dict[str, Any]) -> None:
    assert served_right(seed, config)[0]


def test_waiters_and_those_they_wait_for_are_preempted() -> None:
    preempted = shared = 0
    for seed in range(20):
        fine, made = served_right(seed, {"n_tokens": 288, "chunk": 24, "max_sequences": 8})
        assert fine
        counters = made.scheduler.counters
        preempted += counters.preemptions
        shared += counters.preemptions and counters.pending_tokens
    assert min(preempted, shared) > 0


@pytest.mark.torch
@pytest.mark.parametrize("chunk", [37, 1024])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_waiting_changes_no_bit(name: str, dtype: str, chunk: int, lab: Labs) -> None:
    it = lab(name, dtype, numerics="invariant")
    adds = [asked("a", prompt(0)), asked("b", prompt(0)), asked("c", (*prompt(0, 90), 1, 2, 3), n=2)]
    made = chunked(it.engine(), chunk)
    outputs, rows = run(made, adds), it.executor.rows
    assert made.scheduler.counters.pending_tokens == 144 + 80
    assert outputs == run(it.engine(prefix_cache=False), adds)
    assert rows.keys() == it.executor.rows.keys()
    assert all(torch.equal(row, it.executor.rows[where]) for where, row in rows.items())


# -- negative controls --------------------------------------------------------------------------------------------


class Impatient(Pending):
    """Takes what is pending for resident."""

    def enter(self, seq: Seq, awaited: Iterable[int], own: Iterable[int]) -> None:
        super().enter(seq, awaited, own)
        for i in list(seq.awaited):
            self._claims[seq.digest(i)].waiters.remove(seq)
            seq.arrived(i)


class Forgetful(Pending):
    """Who waits for one that leaves believes that it has computed everything."""

    def leave(self, seq: Seq) -> None:
        for i in seq.claimed:
            for waiter in self._claims[seq.digest(i)].waiters:
                waiter.arrived(i)
            self._claims[seq.digest(i)].waiters = []
        super().leave(seq)


@pytest.mark.parametrize("wrong", [Impatient, Forgetful])
def test_who_does_not_wait_is_found_out(wrong: type[Pending]) -> None:
    adds, noticed = [asked(name, prompt(0)) for name in "abc"], 0
    for cut in range(1, 9):
        made = engine(chunk=16)
        made.scheduler.pending = wrong()
        try:
            outputs, _ = drive(made, {0: adds}, {cut: ["a"]})
        except (IntegrityError, AssertionError):
            noticed += 1
        else:
            noticed += without(outputs, "a") != without(right(adds), "a")
    assert noticed == 8


SPOILT: list[Callable[[Pending, Seq, Seq], object]] = [
    lambda pending, a, b: a.claimed.pop(),
    lambda pending, a, b: b.awaited.pop(),
    lambda pending, a, b: b.tables[1].__setitem__(3, b.tables[1][4]),
    lambda pending, a, b: pending.enter(b, b.awaited, ()),
    lambda pending, a, b: setattr(b, "n_computed", 48),
]


@pytest.mark.parametrize("spoil", SPOILT)
def test_claims_that_do_not_add_up_are_found_out(spoil: Callable[[Pending, Seq, Seq], object]) -> None:
    made = engine(chunk=16)
    for name in "ab":
        made.add(asked(name, prompt(0)))
    made.tick(0.0)
    made.check_integrity()
    pending = made.scheduler.pending
    spoil(pending, seq_of(made, "a"), seq_of(made, "b"))
    with pytest.raises(IntegrityError):
        pending.check_integrity(made.scheduler.running)
