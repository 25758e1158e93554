"""Requests in flight when engines die: who kills them is found out, and nobody else pays."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tenon.base.clock import ManualClock
from tenon.engine import messages as m
from tenon.server.events import EventHub
from tenon.server.failures import Refusal
from tenon.server.flights import Job
from tenon.server.keys import Caller, Key
from tenon.server.limits import Limits
from tenon.server.service import Service

READY = m.Ready("tiny", 4096, 1000, (), 100, 16, 1000)


class Engine:
    """Gives every sequence a token a step: its position. Dies at the tokens in ``deadly``: (prompt, position)."""

    def __init__(self, service: Service, deadly: set[tuple[int, int]]) -> None:
        self.service, self.deadly = service, deadly
        self.adds: dict[str, m.Add] = {}
        self.done: dict[tuple[str, int], int] = {}
        service.attach(self.hear)
        service.receive(READY)

    def hear(self, message: m.ToEngine) -> None:
        if isinstance(message, m.Add):
            self.adds[message.request_id] = message
            for index in range(message.index, message.index + message.n):
                self.done[message.request_id, index] = len(message.outputs)
            self.service.receive(m.Accepted(message.request_id))
        elif isinstance(message, m.Abort):
            for key in [key for key in self.done if key[0] == message.request_id and message.index in (-1, key[1])]:
                del self.done[key]

    def step(self) -> bool:
        """False if it has died."""
        if any((self.adds[name].prompt[0], at) in self.deadly for (name, _), at in self.done.items()):
            return False
        deltas = []
        for (name, index), at in list(self.done.items()):
            self.done[name, index] = at + 1
            ends = at + 1 == self.adds[name].max_tokens
            if ends:
                del self.done[name, index]
            deltas.append(m.Delta(name, index, (at,), "length" if ends else None))
        self.service.receive(m.Outputs(1, tuple(deltas)))
        return True


def serving(replays: int = 2) -> Service:
    clock = ManualClock()
    service = Service(
        model="tiny", limits=Limits(replays=replays), clock=clock, events=EventHub(clock, bound=10)
    )  # fmt: skip
    service.text_loaded()
    return service


def run(service: Service, engine: Engine, limit: int = 200) -> int:
    """Serve to the end, by one engine after another; returns how many died."""
    deaths = 0
    while service.n_running:
        if not engine.step():
            deaths += 1
            assert deaths < limit
            service.engine_lost("it died", 0)
            engine = Engine(service, engine.deadly)
    return deaths


def submit(service: Service, prompts: list[int], n: int = 1, max_tokens: int = 12) -> list[Job]:
    anybody = Caller(None, ManualClock())
    return [service.submit([m.Add(f"r{p}", (p,), max_tokens, 0, n)], anybody) for p in prompts]


def tokens(job: Job) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for choice, delta in job._queue:
        found.setdefault(choice, []).extend(delta.ids)
    return found


@pytest.mark.parametrize("replays", [1, 2, 5])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_the_one_that_kills_is_the_only_one_given_up(replays: int, at: int) -> None:
    service = serving(replays)
    engine = Engine(service, {(3, at)})
    jobs = submit(service, [0, 1, 2, 3, 4], n=2)
    deaths = run(service, engine)
    assert deaths == replays + 1
    for i, job in enumerate(jobs):
        assert (job._failure is not None) is (i == 3)
        expected = list(range(at if i == 3 else 12))
        assert tokens(job) == ({0: expected, 1: expected} if expected else {})


def test_several_that_kill_at_several_times() -> None:
    rng = random.Random(5)
    for _ in range(50):
        service = serving()
        prompts = list(range(12))
        deadly = {(p, rng.randrange(12)) for p in rng.sample(prompts, rng.randrange(4))}
        engine = Engine(service, deadly)
        jobs = submit(service, prompts, n=rng.randrange(1, 4))
        run(service, engine)
        killers = {p for p, _ in deadly}
        assert {i for i, job in enumerate(jobs) if job._failure is not None} == killers
        for i, job in enumerate(jobs):
            if i not in killers:
                assert all(each == list(range(12)) for each in tokens(job).values())
        metrics = service.exposition()
        assert "tenon_requests_running 0" in metrics


def test_without_replays_all_are_given_up_at_once() -> None:
    service = serving(0)
    engine = Engine(service, set())
    jobs = submit(service, [0, 1])
    engine.step()
    service.engine_lost("it died", 0)
    assert service.n_running == 0
    assert all(job._failure is not None for job in jobs)


def test_several_prompts_of_one_job_are_given_up_once() -> None:
    service = serving(0)
    engine = Engine(service, set())
    anybody = Caller(None, ManualClock())
    job = service.submit([m.Add("a", (1,), 9, 0), m.Add("b", (2,), 9, 0), m.Add("c", (3,), 9, 0)], anybody)
    engine.step()
    service.engine_lost("it died", 0)
    assert service.n_running == 0
    assert job._failure is not None
    Engine(service, set())
    assert service.unready_because() is None


def test_engines_that_do_not_start_give_everybody_up() -> None:
    service = serving(2)
    engine = Engine(service, set())
    jobs = submit(service, [0, 1])
    engine.step()
    for n_failures in (0, 1, 2):
        assert service.n_running == 2
        service.engine_lost("no weights", n_failures)
    assert service.n_running == 0
    assert all(job._failure is not None for job in jobs)
    assert "the last 2 ended before they were ready" in str(service.unready_because())


def test_who_leaves_while_it_is_held_back_holds_nobody_up() -> None:
    service = serving(1)
    Engine(service, set())
    jobs = submit(service, [0, 1, 2])
    service.engine_lost("it died", 0)
    engine = Engine(service, set())
    assert len(engine.adds) == 1
    jobs[1].abort()
    jobs[0].abort()
    assert {add.prompt[0] for add in engine.adds.values()} == {0, 2}
    while service.n_running:
        assert engine.step()
    assert tokens(jobs[2]) == {0: list(range(12))}


def test_who_is_not_taken_pays_nothing() -> None:
    service, clock = serving(), ManualClock()
    service.attach(lambda _: None)
    service.receive(READY)
    caller = Caller(Key("a", b"", "a", tokens_per_minute=100), clock)
    service.submit([m.Add("r", (1,) * 40, 60, 0)], caller)
    service.receive(m.Rejected("r", "the queue is full", 429))
    service.submit([m.Add("s", (1,) * 40, 60, 0)], caller)
    with pytest.raises(Refusal, match="100 tokens a minute"):
        service.submit([m.Add("t", (1,), 1, 0)], caller)


@pytest.mark.parametrize("finish", [None, "length"])
@pytest.mark.parametrize("n", [1, 2])
def test_what_follows_a_stop_string_in_the_same_step_is_not_paid_for(finish: str | None, n: int) -> None:
    service, heard = serving(), list[int]()
    service.on_end.append(lambda flight, reason, now_s: heard.append(flight.n_output))
    Engine(service, set())
    caller = Caller(Key("a", b"", "a", tokens_per_minute=100), ManualClock())
    job = service.submit([m.Add("r", (1,) * 40, 60 // n, 0, n)], caller)
    for index in range(n):
        service.receive(m.Outputs(1, (m.Delta("r", index, (4, 5, 6, 7, 8), finish),)))
        job.close_choice(index, 2)
    assert service.n_running == 0
    assert heard[-1] == (2 * n if finish is None else 5 + 2 * (n - 1))  # who hears of an end hears of it at once
    caller.take_tokens(100 - 40 - 2 * n)
    with pytest.raises(Refusal):
        caller.take_tokens(1)


def test_who_hears_of_ends_cannot_stop_them() -> None:
    service, heard = serving(1), list[str]()

    def fails(flight: Any, reason: str, now_s: float) -> None:
        raise RuntimeError(reason)

    service.on_end += [fails, lambda flight, reason, now_s: heard.append(f"{flight.add.request_id} {reason}")]
    engine = Engine(service, set())
    jobs = submit(service, [0, 1])
    run(service, engine)
    assert sorted(heard) == ["r0 length", "r1 length"]
    assert [tokens(job)[0] for job in jobs] == [list(range(12))] * 2
