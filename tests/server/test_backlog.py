"""How long a new request would wait: the pace of the queue, and what a client is told."""

from __future__ import annotations

import pytest

from tenon.base.clock import ManualClock
from tenon.engine import messages as m
from tenon.server.backlog import LEAST_STARTS, Backlog, predicted_wait_s, retry_after_s
from tenon.server.events import EventHub
from tenon.server.failures import Refusal
from tenon.server.keys import Caller
from tenon.server.limits import Limits
from tenon.server.service import Service


def test_the_wait_is_the_queue_over_its_pace() -> None:
    assert predicted_wait_s(30, 20, 2.0) == 3.0
    assert predicted_wait_s(0, 20, 2.0) == 0.0
    assert predicted_wait_s(30, LEAST_STARTS - 1, 2.0) == 0.0  # too few to tell


def test_a_client_is_told_neither_at_once_nor_never() -> None:
    assert [retry_after_s(wait_s) for wait_s in (0.0, 2.5, 1e6)] == [1.0, 2.5, 60.0]


def test_only_time_in_which_somebody_waits_counts() -> None:
    backlog = Backlog()
    backlog.started(100, 0.5)  # the engine has room: says nothing of what it can at most
    assert backlog.wait_s(10, 1.0) == 0.0
    backlog.queue(5, 1.0)
    for i in range(10):
        backlog.started(1, 1.0 + 0.1 * i)
    assert backlog.wait_s(20, 2.0) == pytest.approx(2.0)  # ten in a second
    backlog.queue(0, 2.0)
    assert backlog.wait_s(20, 3.0) == 0.0
    backlog.queue(5, 1000.0)  # a quiet time between is not slowness
    assert backlog.wait_s(20, 1000.0) == pytest.approx(2.0)


def test_a_queue_that_stands_still_waits_longer_and_longer() -> None:
    backlog = Backlog()
    backlog.queue(5, 0.0)
    backlog.started(LEAST_STARTS, 0.0)
    waits = [backlog.wait_s(8, now_s) for now_s in (1.0, 2.0, 10.0)]
    assert waits == [1.0, 2.0, 10.0]


def stats(waiting: int) -> m.Stats:
    return m.Stats(0.0, 0, 2, waiting, 10, 0, 0, 0, 0, 0, 0, 0, {}, 0.0, 0.0)


def test_the_service_refuses_what_would_wait_too_long_and_says_when_to_come() -> None:
    clock = ManualClock()
    limits = Limits(max_wait_s=2.0, max_in_flight=40)
    service = Service(model="tiny", limits=limits, clock=clock, events=EventHub(clock, bound=10))
    service.text_loaded()
    service.attach(lambda _: None)
    service.receive(m.Ready("tiny", 4096, 1000, (), 100, 16, 1000))
    anybody = Caller(None, clock)
    n = 0

    def submit() -> None:
        nonlocal n
        service.submit([m.Add(f"r{n}", (1,), 4, 0)], anybody)
        n += 1

    for _ in range(20):
        submit()
    service.receive(stats(20))
    for i in range(10):  # nine tenths of a second from the first to the last
        clock.advance(0.1)
        service.receive(m.Outputs(1, (m.Delta(f"r{i}", 0, (7,), "stop"),)))
    while service.n_running < 23:  # ten still wait
        submit()
    with pytest.raises(Refusal, match=r"would wait 2\.1 s for its turn and the limit is 2 s") as refused:
        submit()
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert refused.value.retry_after_s == pytest.approx(23 * 0.09)
    service.receive(stats(0))  # the engine has room again
    while service.n_running < 40:
        submit()
    with pytest.raises(Refusal, match="40 sequences are in flight and the limit is 40") as refused:
        submit()
    assert refused.value.retry_after_s == 1.0
