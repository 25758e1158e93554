"""Who runs when: arrival order, budgets, chunks, forks, preemption, limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tenon.base.errors import ContextTooLong, Overloaded, RequestError
from tenon.engine.engine import Engine
from tenon.engine.messages import Add, Delta
from tests.engine.build import hash_engine, run

RNG = np.random.default_rng(0)


def prompt(n: int) -> tuple[int, ...]:
    return tuple(RNG.integers(0, 1000, n).tolist())


def ask(name: str, n_prompt: int = 10, max_tokens: int = 5, **more: Any) -> Add:
    return Add(name, prompt(n_prompt), max_tokens, seed=0, **more)


def deltas(made: Engine) -> list[Delta]:
    told = []
    while made.has_work:
        told += made.tick(0.0)
        made.check_integrity()
    return told


def test_a_step_mixes_decodes_and_chunks_within_the_budget() -> None:
    made = hash_engine(max_step_tokens=20)
    made.add(ask("a", 8, 10))
    made.tick(0.0)
    made.add(ask("b", 50))
    step = made.scheduler.schedule(0.0)
    assert step is not None
    assert np.diff(step.q_start).tolist() == [1, 19]
    assert step.pos.tolist() == [8, *range(19)]
    assert step.out_seq.tolist() == [0]  # the chunk does not end the prompt, so nothing is sampled from it


def test_first_come_first_served() -> None:
    made = hash_engine(max_step_tokens=16, max_sequences=2)
    for i in range(6):
        made.add(ask(f"r{i}", 20, 3))
    first = list(dict.fromkeys(d.request_id for d in deltas(made)))
    assert first == [f"r{i}" for i in range(6)]


def test_no_more_sequences_than_allowed_run_at_once() -> None:
    made = hash_engine(max_sequences=3)
    for i in range(5):
        made.add(ask(f"r{i}", n=1 + i % 2))
    while made.has_work:
        made.tick(0.0)
        assert len(made.scheduler.running) <= 3


def test_siblings_share_the_prompt_and_differ_in_what_they_sample() -> None:
    made = hash_engine(max_sequences=4)
    made.add(ask("r", 40, 6, n=4))
    made.tick(0.0)
    tables = [seq.tables[0][:2].tolist() for seq in made.scheduler.running]
    assert len(tables) == 4
    assert all(table == tables[0] for table in tables)
    assert made.stats(0.0).blocks_held == 2 * 3
    told = run(made)
    assert made.stats(0.0).prompt_tokens == 40
    assert len({tuple(t) for t in told.values()}) == 4
    assert made.stats(0.0).blocks_held == 0


def test_greedy_siblings_are_equal_and_copies_are_made_before_writes() -> None:
    told = run(hash_engine(), [ask("r", 40, 30, n=3, temperature=0.0)])
    assert told["r", 0] == told["r", 1] == told["r", 2]


def test_prefix_hits_are_whole_blocks_and_never_the_last_token() -> None:
    made, tokens = hash_engine(), prompt(48)
    run(made, [Add("a", tokens, 2, 0)])
    told = []
    for name, asked in (("b", tokens), ("c", (*tokens, 1)), ("d", tokens[:33]), ("e", (1, *tokens))):
        made.add(Add(name, asked, 1, 0))
        told += deltas(made)
    assert {d.request_id: d.cached_tokens for d in told} == {"b": 32, "c": 48, "d": 32, "e": 0}
    assert made.stats(0.0).cached_tokens == 32 + 48 + 32


def test_generated_tokens_are_found_again() -> None:
    made, tokens = hash_engine(), prompt(10)
    answer = run(made, [Add("a", tokens, 30, 0)])["a", 0]
    run(made, [Add("b", (*tokens, *answer, 5), 1, 0)])
    assert made.stats(0.0).cached_tokens == 32


def test_without_the_cache_nothing_stays() -> None:
    made, tokens = hash_engine(prefix_cache=False), prompt(48)
    run(made, [Add("a", tokens, 2, 0)])
    assert made.stats(0.0).blocks_cached == 0
    run(made, [Add("b", tokens, 2, 0)])
    assert made.stats(0.0).cached_tokens == 0


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_preemptions_are_bounded_and_then_the_sequence_is_left_alone(limit: int) -> None:
    made = hash_engine(7, max_preemptions=limit, max_sequences=6, prefix_cache=False)
    for i in range(6):
        made.add(ask(f"r{i}", 14, 60))
    seqs = [request.seqs[0] for request in made.scheduler.requests.values()]
    while made.has_work:
        made.tick(0.0)
        assert all(seq.n_preempted <= limit for seq in seqs)
        assert all(seq.pinned for seq in made.scheduler.running if seq.n_preempted >= limit)
    assert (made.stats(0.0).preemptions > 0) == (limit > 0)


def test_the_first_arrival_is_never_preempted() -> None:
    made = hash_engine(6, max_sequences=4)
    made.add(ask("first", 20, 50))
    first = made.scheduler.requests["first"].seqs[0]
    for i in range(5):
        made.add(ask(f"r{i}", 20, 50))
    deltas(made)
    assert first.n_preempted == 0
    assert made.stats(0.0).preemptions > 0


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding", "forked", "preempted"])
def test_an_abort_frees_at_once_in_any_state(when: str) -> None:
    made = hash_engine(6, max_step_tokens=16, max_sequences=3, prefix_cache=False)
    if when == "preempted":
        made.add(ask("other", 14, 60))
    lengths = (14, 50) if when == "preempted" else (30, 9)
    made.add(ask("r", *lengths, n=3 if when == "forked" else 1))
    seq = made.scheduler.requests["r"].seqs[0]
    reached = {
        "waiting": lambda: True,
        "prefilling": lambda: seq.n_computed == 16,
        "decoding": lambda: seq.n_output == 2,
        "forked": lambda: seq.request.forked,
        "preempted": lambda: seq.n_preempted == 1,
    }[when]
    while not reached():
        made.tick(0.0)
    mine = {(g, int(b)) for s in seq.request.seqs for g, table in enumerate(s.tables) for b in table[: s.n_blocks]}
    held = made.stats(0.0).blocks_held
    assert made.abort("r")
    assert made.stats(0.0).blocks_held == held - len(mine)
    made.check_integrity()
    assert not made.abort("r")
    assert all(d.request_id == "other" for d in deltas(made))
    assert made.stats(0.0).finished["abort"] == 1


def test_an_abort_between_schedule_and_commit_is_passed_over() -> None:
    made = hash_engine()
    made.add(ask("a"))
    made.add(ask("b"))
    step = made.scheduler.schedule(0.0)
    assert step is not None
    made.abort("a")
    result = made.executor.poll(made.executor.submit(step))
    assert [d.request_id for d in made.scheduler.commit(step, result)] == ["b"]
    made.check_integrity()


def test_stop_ids_end_a_sequence_with_the_id_that_did_it() -> None:
    answer = run(hash_engine(), [Add("a", (1, 2, 3), 10, 0)])["a", 0]
    made = hash_engine()
    made.add(Add("a", (1, 2, 3), 10, 0, stop_ids=(answer[4],)))
    told = deltas(made)
    assert (told[-1].finish_reason, told[-1].stop_id, told[-1].ids) == ("stop", answer[4], (answer[4],))
    assert [t for d in told for t in d.ids] == answer[: answer.index(answer[4]) + 1]


@pytest.mark.parametrize("ignore", [False, True])
def test_the_model_s_end_of_text_stops_unless_ignored(ignore: bool) -> None:
    answer = run(hash_engine(), [Add("a", (1, 2, 3), 10, 0)])["a", 0]
    made = hash_engine()
    made.scheduler.eos_ids = frozenset({answer[3]})
    told = run(made, [Add("a", (1, 2, 3), 10, 0, ignore_eos=ignore)])
    assert len(told["a", 0]) == (10 if ignore else answer.index(answer[3]) + 1)


def test_log_probabilities_come_with_each_token() -> None:
    made = hash_engine()
    made.add(ask("a", n_logprobs=3, temperature=0.0))
    for delta in deltas(made):
        assert len(delta.logprobs) == len(delta.top) == 1
        assert len(delta.top[0]) == 3
        assert delta.top[0][0] == (delta.ids[0], delta.logprobs[0])


BAD = [
    (Add("r", (), 5, 0), RequestError, "prompt is empty"),
    (Add("r", (1, 1000), 5, 0), RequestError, "token id 1000 is outside the vocabulary of 1000"),
    (Add("r", (-1,), 5, 0), RequestError, "token id -1"),
    (Add("r", (1,), 0, 0), RequestError, "at least 1"),
    (Add("r", (1,), 5, 0, n=65), RequestError, "n must be at most 64"),
    (Add("r", (1,) * 100, 413, 0), ContextTooLong, "maximum context length is 512 tokens"),
    (Add("taken", (1,), 5, 0), RequestError, "being served already"),
]


@pytest.mark.parametrize(("add", "error", "words"), BAD)
def test_what_cannot_be_served_is_refused_and_changes_nothing(add: Add, error: type[Exception], words: str) -> None:
    made = hash_engine()
    made.add(ask("taken"))
    before = made.stats(0.0)
    with pytest.raises(error, match=words):
        made.add(add)
    assert made.stats(0.0) == before


def test_the_longest_request_that_fits_is_served() -> None:
    assert len(run(hash_engine(5), [ask("r", 40, 24)])["r", 0]) == 24
    with pytest.raises(ContextTooLong):
        hash_engine(5).add(ask("r", 40, 25))


def test_a_full_queue_says_when_to_come_back() -> None:
    made = hash_engine(max_waiting=2)
    made.add(ask("a"))
    made.add(ask("b"))
    with pytest.raises(Overloaded) as refused:
        made.add(ask("c"))
    assert refused.value.retry_after_s > 0
    made.tick(0.0)
    made.add(ask("c"))
    assert len(run(made)) == 3


def test_many_small_requests_at_once_equal_serving_each_alone() -> None:
    adds = [ask(f"r{i}", 1 + i % 40, 1 + i % 23, temperature=float(i % 2), n=1 + i % 3) for i in range(40)]
    alone: dict[tuple[str, int], list[int]] = {}
    for add in adds:
        alone |= run(hash_engine(prefix_cache=False), [add])
    assert run(hash_engine(2000), adds) == alone
    tiny = hash_engine(9, max_step_tokens=13, max_sequences=8)
    assert run(tiny, adds) == alone
    assert tiny.stats(0.0).preemptions > 0
