"""Probes while the loop that answers them is full of work."""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tenon.base.clock import SYSTEM
from tests.server.conftest import PATIENCE_S, Running, wait_for
from tests.server.test_limits import connect

LONG = json.dumps({"model": "tiny", "prompt": "a" * 200_000, "max_tokens": 2}).encode()


@contextlib.contextmanager
def full(server: Running, n: int) -> Iterator[list[int]]:
    """While inside, so many clients ask without rest, for streams of tokens and with bodies far too long; yields the
    statuses that came."""
    left, statuses = threading.Event(), list[int]()

    def ask(number: int) -> None:
        with httpx.Client(timeout=PATIENCE_S) as client:
            while not left.is_set():
                if number % 4 == 0:
                    statuses.append(client.post(server.url + "/v1/completions", content=LONG).status_code)
                    continue
                body = {"model": "tiny", "prompt": "a", "max_tokens": 100, "n": 4, "stream": True, "ignore_eos": True}
                with client.stream("POST", server.url + "/v1/completions", json=body | {"logprobs": 5}) as response:
                    statuses.append(response.status_code)
                    for _ in response.iter_raw():
                        if left.is_set():
                            break

    with ThreadPoolExecutor(n) as pool:
        asking = [pool.submit(ask, number) for number in range(n)]
        try:
            yield statuses
        finally:
            left.set()
        for each in asking:
            each.result(PATIENCE_S)


def probed(server: Running, n: int, path: str = "/livez") -> list[float]:
    """Seconds that each of so many probes took, a connection each, as a kubelet's."""
    took = []
    for _ in range(n):
        began_s = SYSTEM.now_s()
        with connect(server) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        took.append(SYSTEM.now_s() - began_s)
    return took


def test_probes_are_answered_while_the_loop_is_full(server: Running) -> None:
    with full(server, 8) as statuses:
        wait_for(lambda: 200 in statuses)
        took = probed(server, 20) + probed(server, 20, "/readyz")
    assert statistics.median(took) < PATIENCE_S / 10
    assert set(statuses) <= {200, 400, 429}


def test_probes_do_not_pile_up(server: Running) -> None:
    """A hundred at once, whose askers leave without waiting, leave nothing that grows."""
    for _ in range(3):
        for sock in [connect(server) for _ in range(100)]:
            sock.sendall(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            sock.close()
    assert statistics.median(probed(server, 10)) < PATIENCE_S / 10
    assert server.metrics()["tenon_requests_running"] == 0


@pytest.mark.slow
def test_a_probe_is_fast_under_load(server: Running) -> None:
    """Half of them within the bar of 50 ms, and nearly all within twice that; on a machine with nothing else to do."""
    with full(server, 32) as statuses:
        wait_for(lambda: len(statuses) > 32)
        took = sorted(probed(server, 200))
    assert took[100] < 0.05
    assert took[190] < 0.1
