"""One engine after another: how soon the next one is started."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tenon.server.supervisor import FIRST_WAIT_S, LONGEST_WAIT_S, SHORT_LIFE_S, Backoff
from tests.server.conftest import Running, wait_for
from tests.server.test_lifecycle import alive
from tests.server.test_survival import ready


def test_engines_that_do_not_start_are_followed_ever_more_slowly() -> None:
    backoff = Backoff()
    waits = [backoff.ended(None, was_idle=True) for _ in range(12)]
    assert waits[:3] == [FIRST_WAIT_S, 2 * FIRST_WAIT_S, 4 * FIRST_WAIT_S]
    assert waits[-1] == LONGEST_WAIT_S
    assert backoff.n_failures == 12
    assert backoff.ended(SHORT_LIFE_S, was_idle=False) == 0.0
    assert backoff.n_failures == 0


def test_who_waits_gets_the_next_engine_at_once() -> None:
    backoff = Backoff()
    assert [backoff.ended(0.1, was_idle=False) for _ in range(9)] == [0.0] * 9


def test_engines_that_flap_with_nothing_to_do_are_followed_ever_more_slowly() -> None:
    backoff = Backoff()
    assert [backoff.ended(0.1, was_idle=True) for _ in range(4)] == [
        0.0,
        FIRST_WAIT_S,
        2 * FIRST_WAIT_S,
        4 * FIRST_WAIT_S,
    ]
    assert backoff.ended(None, was_idle=True) == 4 * FIRST_WAIT_S
    assert backoff.ended(SHORT_LIFE_S, was_idle=True) == 0.0
    assert backoff.ended(0.1, was_idle=True) == 0.0


@pytest.mark.slow
def test_a_server_whose_engine_flaps_serves_between(own_server: Callable[..., Running]) -> None:
    server = own_server()
    for _ in range(4):
        wait_for(lambda: ready(server))
        pid = server.engine_pid()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: not alive(pid) and not ready(server))  # type: ignore[misc]
    wait_for(lambda: ready(server))
    assert server.complete(max_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3
    assert server.metrics()["tenon_engine_restarts_total"] == 4
