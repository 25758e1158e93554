"""A server that is killed outright leaves no process behind, whatever it was doing: no engine, no template worker."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.server import conftest
from tests.server.conftest import PATIENCE_S, Running, wait_for, write_model
from tests.server.test_lifecycle import alive

Start = Callable[..., Running]

GONE_S = 5.0
PIDFD_GETFD = 438
"""The system call, which has the same number on every processor."""
SLOW_TEMPLATE = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


def descendants(pid: int) -> set[int]:
    """Every process below this one, by what the kernel says."""
    found: set[int] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found |= {child} | descendants(child)
    return found


def kinds(pids: set[int]) -> set[str]:
    """What these processes are."""
    names = {"engine_host": "engine", "template_worker": "worker"}
    found = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            found |= {kind for name, kind in names.items() if name in words}
    return found


def kill(server: Running) -> None:
    """SIGKILL to the server alone; whoever it had started has to be gone soon."""
    below = descendants(server.process.pid)
    assert below
    server.process.kill()
    server.process.wait(PATIENCE_S)
    wait_for(lambda: not any(map(alive, below)), GONE_S, lambda: {pid: kinds({pid}) for pid in below if alive(pid)})


@contextlib.contextmanager
def chats(server: Running, n: int = 6) -> Iterator[None]:
    """While inside, so many clients ask for chats one after another, whatever comes back."""
    left = threading.Event()

    def ask() -> None:
        while not left.is_set():
            with contextlib.suppress(httpx.TransportError):
                httpx.post(server.url + "/v1/chat/completions", json=CHAT, timeout=PATIENCE_S)

    threads = [threading.Thread(target=ask) for _ in range(n)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        left.set()
        for thread in threads:
            thread.join()


def loaded(server: Running) -> list[conftest.Stream]:
    streams = [server.stream(max_tokens=30_000, n=2) for _ in range(4)]
    for stream in streams:
        next(stream.events())
    return streams


def unready(server: Running) -> bool:
    return httpx.get(server.url + "/readyz", timeout=PATIENCE_S).status_code == 503


@pytest.fixture
def slow_model(tmp_path: Path) -> Path:
    """A model whose template never ends: its workers are always busy."""
    folder = write_model(tmp_path)
    (folder / "chat_template.jinja").write_text(SLOW_TEMPLATE)
    return folder


def test_killed_in_a_drain_under_load(slow_model: Path) -> None:
    server = conftest.start(slow_model)
    streams = loaded(server)
    with chats(server):
        assert kinds(descendants(server.process.pid)) == {"engine", "worker"}
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: unready(server))
        kill(server)
    for stream in streams:
        stream.close()
    server.close()


def test_killed_while_it_starts(own_server: Start) -> None:
    server = own_server(wait_ready=False)
    wait_for(lambda: "engine" in kinds(descendants(server.process.pid)))
    kill(server)


def borrow_sockets(pid: int) -> list[int]:
    """Descriptors of ours for all sockets of another process: what it has open does not end with it."""
    libc, pidfd, found = ctypes.CDLL(None, use_errno=True), os.pidfd_open(pid), []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(entry).startswith("socket:"):
            found.append(libc.syscall(PIDFD_GETFD, pidfd, int(entry.name), 0))
    os.close(pidfd)
    assert found
    assert min(found) >= 0, os.strerror(ctypes.get_errno())
    return found


def test_an_engine_that_sees_no_end_of_its_socket_does_not_outlive_its_server(own_server: Start) -> None:
    """As one that is in a long step, or hangs: the kernel has to end it."""
    server = own_server()
    ours = borrow_sockets(server.process.pid)
    kill(server)
    for descriptor in ours:
        os.close(descriptor)


@pytest.mark.slow
@pytest.mark.parametrize("signals", [0, 1])
def test_killed_under_load(slow_model: Path, signals: int) -> None:
    """Ten servers each, with and without a drain."""
    for _ in range(10):
        server = conftest.start(slow_model)
        streams = loaded(server)
        with chats(server):
            if signals:
                server.process.send_signal(signal.SIGTERM)
            kill(server)
        for stream in streams:
            stream.close()
        server.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_every_moment_of_the_start(own_server: Start) -> None:
    """Every hundredth of a second from the first child on, until it is ready."""
    for moment in range(60):
        server = own_server(wait_ready=False)
        wait_for(lambda: bool(descendants(server.process.pid)))  # noqa: B023
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(moment / 100)
        kill(server)


def test_the_count_of_descendants_sees_them(server: Running) -> None:
    below = descendants(server.process.pid)
    assert server.engine_pid() in below
    assert "engine" in kinds(below)
