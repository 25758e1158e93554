"""Requests, readers who leave, stop strings, messages under way and dying engines in any order, against a small model.

The service and a real engine on the hash executor, with a line between them on which messages wait until a rule lets
them pass, as on a socket: an engine that dies may have said more than was heard, and was told more than it read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import cache
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

from tenon.base.clock import ManualClock
from tenon.base.errors import RequestError, TenonError
from tenon.engine import messages as m
from tenon.engine.config import EngineConfig
from tenon.engine.engine import Engine, Identity
from tenon.engine.executors.hash import HashExecutor
from tenon.engine.scheduler import Scheduler
from tenon.models.spec import KVGroup
from tenon.server.engine_host import rejection
from tenon.server.events import EventHub
from tenon.server.failures import Refusal
from tenon.server.flights import Job
from tenon.server.keys import Caller, Key
from tenon.server.limits import Limits
from tenon.server.service import Service, State

VOCAB = 50
BLOCK = 16
PREFIXES = [tuple(np.random.default_rng(i).integers(0, VOCAB, 40).tolist()) for i in range(2)]
GROUPS = (KVGroup("m", (0, 1), "full", None, BLOCK, 1), KVGroup("m", (2,), "window", 8, BLOCK, 1))
QUOTA = 10**9
READY = m.Ready("m", 512, VOCAB, (), 12, BLOCK, 1000)
EVER = ("stop", "length")


def new_engine(n_blocks: int = 12, **settings: Any) -> Engine:
    config = EngineConfig(executor="hash", block_tokens=BLOCK, **settings)
    executor = HashExecutor(VOCAB)
    executor.allocate(GROUPS, n_blocks)
    longest = (n_blocks - 1) * BLOCK
    scheduler = Scheduler(
        config, GROUPS, n_blocks, model="m", vocab_size=VOCAB, eos_ids=(), max_model_len=longest, secret=b"k" * 32
    )
    return Engine(config, Identity("m", VOCAB, (), longest, 0, n_blocks, {}), scheduler, executor)


@cache
def alone(add: m.Add) -> dict[int, tuple[tuple[int, ...], str]]:
    """Of each sequence: its tokens and why it ends, where it is all that is served."""
    engine = new_engine(40, prefix_cache=False)
    engine.add(add)
    found: dict[int, tuple[tuple[int, ...], str]] = {}
    while engine.has_work:
        for delta in engine.tick(0.0):
            ids, _ = found.get(delta.index, ((), ""))
            found[delta.index] = (ids + delta.ids, delta.finish_reason or "")
    return found


def at_once(waiting: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that has nothing to wait for."""
    try:
        waiting.send(None)
    except StopIteration as done:
        return done.value
    waiting.close()
    raise AssertionError("it had to wait")


@dataclass
class Asked:
    """What the model knows of one request."""

    adds: list[m.Add]
    job: Job
    heard: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    """Of the choices that ended, why: as told, or "here" where the reader's side closed it."""
    failure: TenonError | None = None
    left: bool = False
    n_deaths: int = 0

    def expected(self, choice: int) -> tuple[tuple[int, ...], str]:
        for add in self.adds:
            if choice < add.n:
                return alone(add)[choice]
            choice -= add.n
        raise KeyError(choice)

    @property
    def n_choices(self) -> int:
        return sum(add.n for add in self.adds)

    @property
    def is_over(self) -> bool:
        return self.left or self.failure is not None or len(self.ends) == self.n_choices


class Serving(RuleBasedStateMachine):
    """One service, one engine after another."""

    service: Service
    n_ops = 0
    """Rules run over all examples."""

    @initialize(replays=st.integers(0, 5), max_waiting=st.integers(1, 6), max_in_flight=st.integers(3, 20))
    def start(self, replays: int, max_waiting: int, max_in_flight: int) -> None:
        self.clock = ManualClock()
        self.limits = Limits(replays=replays, max_in_flight=max_in_flight)
        self.service = Service(model="m", limits=self.limits, clock=self.clock, events=EventHub(self.clock, bound=10))
        self.service.text_loaded()
        self.max_waiting = max_waiting
        self.caller = Caller(Key("one", b"", "one", tokens_per_minute=QUOTA), self.clock)
        self.asked: list[Asked] = []
        self.n_refused = 0
        self.n_lost = 0
        self.is_down = False
        self.new_line()
        self.begin()

    def new_line(self) -> None:
        self.to_engine: deque[m.ToEngine] = deque()
        self.to_server: deque[m.FromEngine] = deque()
        line = self.to_engine
        self.service.attach(line.append)

    def begin(self) -> None:
        self.engine = new_engine(max_waiting=self.max_waiting)
        self.is_down = False
        self.service.receive(READY)

    # What clients do.

    @rule(
        prompts=st.lists(
            st.tuples(st.integers(0, 1), st.integers(1, 40), st.lists(st.integers(0, VOCAB - 1), max_size=4)),
            min_size=1, max_size=2,
        ),
        max_tokens=st.integers(1, 24),
        n=st.integers(1, 3),
        sampled=st.booleans(),
        stops=st.lists(st.integers(0, VOCAB - 1), max_size=1),
    )  # fmt: skip
    def ask(self, prompts: list[Any], max_tokens: int, n: int, sampled: bool, stops: list[int]) -> None:
        adds = [
            m.Add(
                f"r{len(self.asked)}-{i}-{self.n_refused}", (*PREFIXES[which][:length], *tail), max_tokens,
                len(self.asked), n, float(sampled), stop_ids=tuple(stops),
            )
            for i, (which, length, tail) in enumerate(prompts)
        ]  # fmt: skip
        open_ = self.n_open()
        is_ready = self.service.state is State.READY
        if is_ready and open_ + n * len(adds) <= self.limits.max_in_flight:
            self.asked.append(Asked(adds, self.service.submit(adds, self.caller)))
            return
        self.n_refused += 1
        with pytest.raises(Refusal) as refused:
            self.service.submit(adds, self.caller)
        assert refused.value.status == (429 if is_ready else 503)

    def pick(self, data: st.DataObject) -> Asked:
        return data.draw(st.sampled_from(self.asked))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        self.hear(self.pick(data))

    def hear(self, one: Asked) -> None:
        """Read what has come for a request, if it still is to be read."""
        if one.is_over:
            assert one.left or not one.job._queue
            return
        if not one.job._queue and one.job._failure is None:
            return
        try:
            batch = at_once(one.job.batch())
        except TenonError as failure:
            one.failure = failure
            return
        for choice, delta in batch:
            assert choice not in one.ends
            one.heard.setdefault(choice, []).extend(delta.ids)
            if delta.finish_reason is not None:
                one.ends[choice] = delta.finish_reason

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = self.pick(data)
        was_over = one.is_over
        one.job.abort()
        one.left = one.left or not was_over
        one.job.abort()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        """A stop string is found in what was heard of a choice: of several tokens at once perhaps not in the last, and
        perhaps in those that were the last anyway."""
        one = self.pick(data)
        was_over = one.is_over
        self.hear(one)
        choices = sorted(choice for choice in one.heard if one.ends.get(choice) != "here")
        if choices and not was_over and one.failure is None:
            choice = data.draw(st.sampled_from(choices))
            n_tokens = data.draw(st.integers(1, len(one.heard[choice]))) if one.heard[choice] else 0
            one.job.close_choice(choice, n_tokens)
            one.ends[choice] = "here"

    # What the line and the engine do.

    @rule(n=st.integers(1, 6))
    def pass_on(self, n: int) -> None:
        """The engine reads so many messages."""
        for _ in range(min(n, 0 if self.is_down else len(self.to_engine))):
            match self.to_engine.popleft():
                case m.Add() as add:
                    try:
                        self.to_server.append(self.engine.add(add))
                    except RequestError as error:
                        self.to_server.append(rejection(add.request_id, error))
                case m.Abort(request_id, index):
                    self.engine.abort(request_id, index)
                case _:
                    continue

    @rule(n=st.integers(1, 8))
    def step(self, n: int) -> None:
        for _ in range(n):
            if not self.is_down and self.engine.has_work:
                deltas = self.engine.tick(self.clock.now_s())
                told = [*self.engine.take_misses(), *self.engine.take_ledgers(), m.Outputs(1, tuple(deltas))]
                self.to_server.extend(told)
                self.engine.check_integrity()

    @rule(n=st.integers(1, 12))
    def tell(self, n: int) -> None:
        """The server reads so many messages."""
        for _ in range(min(n, len(self.to_server))):
            self.service.receive(self.to_server.popleft())

    @rule(n=st.integers(1, 12))
    def turn(self, n: int) -> None:
        """All of it in order, as on a line that is never long."""
        for _ in range(n):
            self.pass_on(100)
            self.step(1)
            self.tell(100)

    @rule(n=st.integers(0, 12), n_failures=st.integers(1, 2))
    def die(self, n: int, n_failures: int) -> None:
        """The engine dies; of what it said so much is still heard. If it is down, another start fails."""
        self.tell(n)
        for one in self.asked:
            one.n_deaths += not one.is_over
        self.n_lost += 1
        self.service.engine_lost("it died", n_failures if self.is_down else 0)
        self.is_down = True
        self.new_line()

    @precondition(lambda self: self.is_down)
    @rule()
    def come_back(self) -> None:
        self.begin()

    @precondition(lambda self: self.asked and not self.is_down)
    @rule(n=st.integers(0, 12), more=st.integers(0, 6))
    def be_replaced(self, n: int, more: int) -> None:
        """One engine dies, the next is there at once."""
        self.die(n, 1)
        self.begin()
        self.turn(more)

    # What holds.

    def n_open(self) -> int:
        return sum(len(flight.open) for one in self.asked for flight in one.job.flights)

    def counted(self) -> dict[str, float]:
        lines = self.service.exposition().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "service"):
            return
        Serving.n_ops += 1
        counted = self.counted()
        finished = sum(value for name, value in counted.items() if name.startswith("tenon_requests_finished_total"))
        running = counted["tenon_requests_running"]
        assert counted["tenon_requests_started_total"] == finished + running
        assert counted["tenon_requests_started_total"] == sum(len(one.adds) for one in self.asked)
        assert running == self.service.n_running
        assert counted["tenon_engine_restarts_total"] == self.n_lost
        for one in self.asked:
            for choice, ids in one.heard.items():
                right, reason = one.expected(choice)
                assert tuple(ids) == right[: len(ids)]
                if one.ends.get(choice) in EVER:
                    assert (tuple(ids), one.ends[choice]) == (right, reason)
            if one.failure is not None:
                code = getattr(one.failure, "code", None)
                assert code in ("engine_dead", "rate_limit_exceeded")
                assert code != "engine_dead" or one.n_deaths > 0

    def teardown(self) -> None:
        """With an engine that lives, everything comes to its one end, and all is given back."""
        if not hasattr(self, "service"):
            return
        if self.is_down:
            self.begin()
        for _ in range(5000):
            self.pass_on(100)
            self.step(1)
            self.tell(100)
            for one in self.asked:
                self.hear(one)
            if not (self.service.n_running or self.engine.has_work or self.to_engine or self.to_server):
                break
        for one in self.asked:
            self.hear(one)
            self.hear(one)
            assert one.is_over
            assert all(not flight.open for flight in one.job.flights)
        self.holds()
        assert self.service.state is State.READY
        assert self.service.n_running == 0
        assert not self.service._served
        assert self.engine.stats(0.0).blocks_held == 0
        assert self.used() == sum(
            flight.n_output + flight.accepted * len(flight.add.prompt)
            for one in self.asked
            for flight in one.job.flights
        )

    def used(self) -> float:
        """Tokens that the caller's quota is short of."""
        bucket = self.caller._tokens
        assert bucket is not None
        return QUOTA - bucket._level


def check(examples: int, steps: int) -> int:
    before = Serving.n_ops
    run_state_machine_as_test(
        Serving,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
        ),
    )
    return Serving.n_ops - before


def test_serving_in_any_order() -> None:
    check(examples=60, steps=40)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_steps_in_any_order() -> None:
    assert check(examples=2500, steps=60) >= 100_000
