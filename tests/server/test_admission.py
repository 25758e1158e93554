"""Memory running short (row 37): less is taken, then nothing, and nobody is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message

from tenon.base.errors import ConfigError
from tenon.base.machine import MACHINE, MemoryBound
from tenon.server.admission import (
    DROP_EVERY_S,
    SHORT_LOOK_EVERY_S,
    SMALL_BODY_BYTES,
    Admission,
    BodyRefused,
    MemoryWatch,
)
from tenon.server.failures import Refusal
from tenon.server.limits import Limits
from tests.server.conftest import PATIENCE_S, Running, free_port, launch, wait_for
from tests.server.test_orphans import descendants

MIB = 2**20


def at(share: float, **limits: float) -> Admission:
    """Where this share of 1000 MiB is in use."""
    admission = Admission(Limits(max_in_flight=100, **limits))  # type: ignore[arg-type]
    admission.use([MemoryBound(2000 * MIB, 0), MemoryBound(1000 * MIB, int(share * 1000) * MIB)])
    return admission


@pytest.mark.parametrize(
    ("share", "pressure", "n_taken", "status"),
    [(0.2, 0.0, 100, 429), (0.85, 0.0, 100, 429), (0.9, 0.5, 50, 503), (0.95, 1.0, 0, 503), (1.2, 1.0, 0, 503)],
)
def test_fewer_are_in_flight_the_less_is_left(share: float, pressure: float, n_taken: int, status: int) -> None:
    admission = at(share)
    assert admission.pressure == pytest.approx(pressure)
    for n_open in range(n_taken):
        admission.require_room(1, n_open, 0.0)
    with pytest.raises(Refusal) as raised:
        admission.require_room(1, n_taken, 0.0)
    assert raised.value.status == status
    assert raised.value.retry_after_s
    assert admission.has_room(1, 0, 0) == (pressure == 0)
    assert (admission.memory_is_short_because() is None) == (pressure < 1)


def test_without_a_bound_there_is_no_pressure() -> None:
    admission = Admission(Limits())
    admission.use([])
    assert admission.pressure == 0


def test_of_a_large_machine_only_the_last_gibibytes_count() -> None:
    admission = Admission(Limits())
    for left_gib, is_short in ((20, False), (4, False), (1, True)):
        admission.use([MemoryBound(100 * 1024 * MIB, (100 - left_gib) * 1024 * MIB, MACHINE)])
        assert (admission.pressure > 0) == is_short
    admission.use([MemoryBound(100 * 1024 * MIB, 96 * 1024 * MIB, "/a/control/group")])
    assert admission.pressure == 1


@pytest.mark.parametrize("wrong", [{"memory_shed": 0.95}, {"memory_shed": 0.0}, {"memory_reject": 1.5}])
def test_shares_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"memory_(shed|reject) must be"):
        Limits(**wrong)  # type: ignore[arg-type]


def coming(*pieces: bytes) -> Request:
    left = [{"type": "http.request", "body": piece, "more_body": i < len(pieces) - 1} for i, piece in enumerate(pieces)]

    async def receive() -> Message:
        return left.pop(0)

    return Request({"type": "http", "headers": [], "method": "POST", "path": "/"}, receive)


def read(admission: Admission, *pieces: bytes) -> bytes:
    return asyncio.run(admission.read(coming(*pieces)))


def test_bodies_on_their_way_have_a_bound_of_their_own() -> None:
    admission = at(0.2, all_bodies_bytes=10 * MIB)
    admission.body_bytes = 9 * MIB  # of others
    assert len(read(admission, b"a" * MIB)) == MIB
    with pytest.raises(BodyRefused, match="10 MiB of requests are coming in, and there is memory for 10 MiB"):
        read(admission, b"a" * MIB, b"a")
    assert admission.body_bytes == 9 * MIB
    assert read(admission, b"a" * SMALL_BODY_BYTES)


def test_little_memory_left_bounds_the_bodies_too() -> None:
    admission = at(0.9)
    assert read(admission, b"a" * 6 * MIB)  # 50 MiB are left, and a body may take eight times its size
    with pytest.raises(BodyRefused):
        read(admission, b"a" * 7 * MIB)
    with pytest.raises(BodyRefused, match="memory is short"):
        admission.require_spare_memory()
    with pytest.raises(BodyRefused, match="memory is short: 50 MiB are left"):
        read(at(0.95), b"a")


def test_what_is_kept_is_dropped_at_once_and_then_now_and_then() -> None:
    admission, dropped, used = Admission(Limits()), list[int](), 50
    watch = MemoryWatch(admission, lambda: dropped.append(n), lambda: [MemoryBound(100, used)])
    per_drop = int(DROP_EVERY_S / SHORT_LOOK_EVERY_S)
    for n in range(3 * per_drop):
        used = 90 if n >= 5 else 50
        watch.look()
    assert dropped == [5, 5 + per_drop, 5 + 2 * per_drop]


def test_a_server_short_of_memory_refuses_and_recovers(own_server: Callable[..., Running], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("")
    server = own_server("--config", str(config))
    stream = server.stream(max_tokens=2000)
    events = stream.events()
    next(events)
    short = f"memory_shed = 0.01\nmemory_reject = 0.0101\nmachine_bytes = {2**60}\n"  # any machine uses more
    config.write_text(short)
    server.process.send_signal(1)
    wait_for(lambda: server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 503)
    refused = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert refused.json()["error"]["code"] == "overloaded"
    assert "MiB are left" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) == 2
    told = httpx.get(server.url + "/readyz", timeout=PATIENCE_S)
    assert told.status_code == 503
    assert told.json()["reason"].startswith("memory is short")
    assert server.metrics()["tenon_memory_pressure"] == 1
    assert list(events)[-1] == "[DONE]"  # what is in flight goes on
    stream.close()
    config.write_text("")
    server.process.send_signal(1)
    wait_for(lambda: server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200)
    assert httpx.get(server.url + "/readyz", timeout=PATIENCE_S).status_code == 200


@contextlib.contextmanager
def control_group() -> Iterator[Path]:
    """A memory control group of our own; skips the test where there can be none."""
    if os.access("/sys/fs/cgroup/cgroup.controllers", os.R_OK):
        root = Path("/sys/fs/cgroup")
    else:
        (own,) = (line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
        root = Path("/sys/fs/cgroup/memory") / own.rpartition(":")[2].strip("/")
    folder = root / f"tenon-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            wait_for(lambda: not (folder / "cgroup.procs").read_text())
            folder.rmdir()


@pytest.mark.slow
def test_large_requests_in_a_tight_group_kill_nobody(state_folder: None) -> None:
    """Row 37: a limit of 1.2 times what the server needs, and clients who send all that they may."""
    with control_group() as group:
        limit, used = "memory.max", "memory.current"
        if not (group / limit).exists():
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        port = free_port()
        enter = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0'); "
        run = "import sys; from tenon.cli.main import main; sys.exit(main(sys.argv[1:]))"
        serve = ["serve", "embedded", "--kv-bytes", str(64 * MIB), "--port", str(port)]
        server = launch(["-c", enter + run, *serve], port, "embedded")
        try:
            for _ in range(4):
                server.complete(max_tokens=50)
            (group / limit).write_text(str(int(1.2 * int((group / used).read_text()))))
            before = descendants(server.process.pid)
            statuses = storm(server)
            assert server.process.poll() is None
            assert before <= descendants(server.process.pid)
            assert server.metrics()["tenon_engine_restarts_total"] == 0
            assert 503 in statuses
            assert statuses <= {400, 429, 503}
            wait_for(lambda: server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200)
        finally:
            server.close()


def storm(server: Running, n_clients: int = 32, n_each: int = 12) -> set[int]:
    """The statuses of many requests as large as may be, all at once."""
    statuses = set[int]()
    bodies = [
        json.dumps({"model": "embedded", "prompt": "a" * (7 * MIB), "max_tokens": 1}).encode(),
        json.dumps({"model": "embedded", "prompt": [1] * (2 * MIB), "max_tokens": 1}).encode(),
        json.dumps({"model": "embedded", "messages": [{"role": "user", "content": "a " * (3 * MIB)}]}).encode(),
    ]

    def send(number: int) -> None:
        for i in range(n_each):
            body = bodies[(number + i) % 3]
            path = "/v1/chat/completions" if (number + i) % 3 == 2 else "/v1/completions"
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.post(server.url + path, content=body, timeout=PATIENCE_S)
                statuses.add(answer.status_code)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(n_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses
