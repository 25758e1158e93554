"""What the machine may do to a server: descriptors run out, the wall clock jumps."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import PATIENCE_S, WITH_LIMITS, Running, free_port, launch, wait_for
from tests.server.test_lifecycle import alive, assert_conserved
from tests.server.test_limits import connect

DESCRIPTORS = 64
RECOVERY_S = 5.0
JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static int (*really)(clockid_t, struct timespec *);
/* The wall clock jumps every 20 ms: an hour ahead, an hour back. Monotonic clocks are as they are. */
int clock_gettime(clockid_t id, struct timespec *t) {
    struct timespec now;
    if (!really) *(void **)&really = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = really(id, t);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) {
        really(CLOCK_MONOTONIC, &now);
        t->tv_sec += now.tv_nsec / 20000000 % 2 ? 3600 : -3600;
    }
    return failed;
}
time_t time(time_t *to) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (to) *to = t.tv_sec;
    return t.tv_sec;
}
int gettimeofday(struct timeval *restrict to, void *restrict zone) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    to->tv_sec = t.tv_sec;
    to->tv_usec = t.tv_nsec / 1000;
    return 0;
}
"""
FEW_DESCRIPTORS = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS}, {DESCRIPTORS * 2}))\n"


@pytest.fixture(scope="module")
def shaken(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Running]:
    """A server with 64 descriptors whose wall clock, and its engine's, jumps by two hours fifty times a second."""
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(JUMPING_CLOCK)
    library = folder / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "clock.c", "-ldl"], check=True)
    port = free_port()
    given = json.dumps({"model": str(model_folder), "port": port, "limits": {"stall_s": 5.0}})
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LD_PRELOAD", str(library))
        running = launch(["-c", FEW_DESCRIPTORS + WITH_LIMITS, given], port, "tiny")
    yield running
    assert running.stop() == 0
    running.close()


def is_served(server: Running) -> bool:
    try:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
        return httpx.post(server.url + "/v1/completions", json=body, timeout=PATIENCE_S).status_code == 200
    except httpx.TransportError:
        return False


def crowd(server: Running, n: int) -> list[socket.socket]:
    return [connect(server) for _ in range(n)]


def test_a_wall_clock_that_jumps_ends_nothing(shaken: Running) -> None:
    """Half a request waits, a stream and a kept connection go on; what is stamped shows that the clock did jump."""
    with connect(shaken) as half, httpx.Client(timeout=PATIENCE_S) as kept:
        body = b'{"model":"tiny","prompt":"a","max_tokens":2}'
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        half.sendall(head + body[:9])
        stream = shaken.stream(max_tokens=1500)
        stamps: set[int] = set()
        for number, event in enumerate(stream.events()):
            if isinstance(event, dict):
                assert "error" not in event
                stamps.add(event["created"])
            if number % 50 == 0:
                assert kept.get(shaken.url + "/readyz").status_code == 200
        stream.close()
        assert event == "[DONE]"
        stamps |= {shaken.complete(max_tokens=1)["created"] for _ in range(20)}
        assert max(stamps) - min(stamps) > 3600
        half.sendall(body[9:])
        assert half.recv(65536).startswith(b"HTTP/1.1 200 ")
    metrics = shaken.metrics()
    assert metrics["tenon_engine_restarts_total"] == 0
    assert metrics['tenon_requests_finished_total{reason="error"}'] == 0
    assert metrics['tenon_requests_finished_total{reason="abort"}'] == 0
    assert metrics["tenon_e2e_seconds_sum"] < PATIENCE_S
    assert_conserved(metrics)


def test_clients_cannot_take_the_last_descriptors(shaken: Running) -> None:
    """Those that come are told 503, those that are there go on, even to the next engine."""
    stream = shaken.stream(max_tokens=3000)
    events = stream.events()
    next(events)
    with httpx.Client(timeout=PATIENCE_S) as inside:
        assert inside.get(shaken.url + "/livez").status_code == 200
        waiting = crowd(shaken, 3 * DESCRIPTORS)
        with connect(shaken) as refused:
            assert refused.recv(65536).startswith(b"HTTP/1.1 503 ")
        pid = shaken.engine_pid()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid))
        wait_for(lambda: inside.get(shaken.url + "/readyz").status_code == 200)
    assert list(events)[-1] == "[DONE]"
    stream.close()
    for sock in waiting:
        sock.close()
    wait_for(lambda: is_served(shaken), RECOVERY_S)
    assert_conserved(shaken.metrics())


def test_without_any_descriptor_it_waits_and_recovers(shaken: Running) -> None:
    """Nobody new is let in, who is there is served, and once there are some again so is everybody within seconds."""
    pid = shaken.process.pid
    with httpx.Client(timeout=PATIENCE_S) as inside:
        assert inside.get(shaken.url + "/livez").status_code == 200
        with few(pid, 5):
            waiting = crowd(shaken, 20)
            for _ in range(50):
                assert inside.get(shaken.url + "/livez").status_code == 200
    for sock in waiting:
        sock.close()
    wait_for(lambda: is_served(shaken), RECOVERY_S)


@contextlib.contextmanager
def few(pid: int, most: int) -> Iterator[None]:
    """While inside, the process may open no descriptor at or above ``most``."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
