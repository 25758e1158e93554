"""The admin side: who reaches it, that probes answer whatever the main loop does, and reloads under load."""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tenon.base.clock import SYSTEM
from tenon.base.errors import ConfigError, ResourceError
from tenon.server.admin import Door
from tests.server.conftest import PATIENCE_S, Running, free_port, launch, start, wait_for
from tests.server.test_keys import ALICE, BOB, FILE, bearer
from tests.server.test_lifecycle import assert_conserved

GETS = ("/livez", "/readyz", "/metrics", "/state")
POSTS = ("/drain", "/reload", "/restart-engine", "/forget-cache")
DAVE = "dave-0123456789abcdef"
MORE = FILE + f'\n[[key]]\nname = "dave"\nkey = "{DAVE}"\n'
CONFIG = "replays = 0\nmax_in_flight = 400\n"

STALLED = """
import os, signal, sys
from tenon.cli.main import main
held = sys.argv.pop(1)
def stall(*_):
    while os.path.exists(held):  # never rests, so that the interpreter's lock is fought for as well
        pass
signal.signal(signal.SIGUSR1, stall)
sys.exit(main(sys.argv[1:]))
"""
"""``tenon serve`` whose main thread does nothing else from a SIGUSR1 on, while a file is there."""


@dataclass
class Administered:
    """A server with keys, a config file and an admin socket."""

    server: Running
    admin: httpx.Client
    folder: Path

    def reload(self, keys: str = FILE, config: str = CONFIG) -> httpx.Response:
        self.write(keys, config)
        return self.admin.post("/reload")

    def write(self, keys: str, config: str) -> None:
        for name, text in (("keys.toml", keys), ("config.toml", config)):
            (self.folder / "new").write_text(text)
            (self.folder / "new").replace(self.folder / name)

    def state(self) -> Any:
        return self.admin.get("/state").json()


def client(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://admin", timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def administered(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Administered]:
    folder = tmp_path_factory.mktemp("admin")
    with client(folder / "admin.sock") as admin:
        (folder / "keys.toml").write_text(FILE)
        (folder / "config.toml").write_text(CONFIG)
        options = ["--keys", folder / "keys.toml", "--config", folder / "config.toml", "--admin", folder / "admin.sock"]
        running = start(model_folder, *map(str, options))
        yield Administered(running, admin, folder)
        assert running.stop() == 0
        running.close()
    assert not (folder / "admin.sock").exists()


def test_public_clients_do_not_reach_it(administered: Administered, server: Running) -> None:
    for running, status in ((administered.server, 401), (server, 404)):
        for path in ("/state", *POSTS):
            for method in ("GET", "POST"):
                assert httpx.request(method, running.url + path, timeout=PATIENCE_S).status_code == status
    assert httpx.get(administered.server.url + "/state", headers=bearer(ALICE), timeout=PATIENCE_S).status_code == 404
    assert stat.S_IMODE((administered.folder / "admin.sock").stat().st_mode) == 0o600


def test_it_tells_what_there_is(administered: Administered) -> None:
    admin, running = administered.admin, administered.server
    assert admin.get("/livez").json()["status"] == "alive"
    assert admin.get("/readyz").json() == {"status": "ready"}
    assert "tenon_ready 1" in admin.get("/metrics").text
    state = administered.state()
    assert (state["state"], state["engine"]["pid"]) == ("ready", running.engine_pid())
    assert state["config"]["key_names"] == ["alice", "bob", "carol"]
    assert state["limits"]["max_in_flight"] == 400
    assert not any(secret in admin.get("/state").text for secret in (ALICE, BOB))
    assert admin.get("/v1/models").status_code == 404
    assert admin.get("/drain").status_code == 405
    assert admin.get("/state", headers={"origin": "http://elsewhere"}).status_code == 403


def streamed(server: Running, max_tokens: int, key: str = ALICE) -> Iterator[str]:
    """Lines of a stream, of which the first says that it has begun."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": max_tokens, "stream": True, "ignore_eos": True, "seed": 1}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, headers=bearer(key), timeout=PATIENCE_S) as it:
        assert it.status_code == 200
        yield from (line for line in it.iter_lines() if line)


def test_an_engine_is_replaced_and_streams_go_on(administered: Administered) -> None:
    """With no engine that may die under a request: this end counts against none."""
    running, before = administered.server, administered.state()["engine"]
    lines = streamed(running, 2000)
    next(lines)
    assert administered.state()["in_flight"] == {"research": {"sent": 0, "waiting": 0, "running": 1}}
    ended = administered.admin.post("/restart-engine")
    assert (ended.status_code, ended.json()["ended"]["pid"]) == (202, before["pid"])
    rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    assert not any("error" in line for line in rest)
    assert administered.state()["engine"]["epoch"] == before["epoch"] + 1
    assert running.engine_pid() != before["pid"]


def cached(server: Running) -> int:
    body = {"prompt": [9] * 100, "max_tokens": 1}
    usage = server.post("/v1/completions", body, headers=bearer(ALICE)).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_the_cache_is_forgotten(administered: Administered) -> None:
    wait_for(lambda: administered.admin.get("/readyz").status_code == 200)
    cached(administered.server)
    assert cached(administered.server) == 96
    assert administered.admin.post("/forget-cache").status_code == 202
    assert cached(administered.server) == 0


def test_a_reload_says_what_changed_or_changes_nothing(administered: Administered) -> None:
    changed = administered.reload(MORE, CONFIG + "body_bytes = 100\n").json()["changed"]
    assert changed["config"] == {"body_bytes": {"from": 8 * 2**20, "to": 100}}
    assert changed["keys"] == {"added": ["dave"], "removed": [], "changed": []}
    url = administered.server.url + "/v1/completions"
    too_large = httpx.post(url, content=b" " * 101, headers=bearer(DAVE), timeout=PATIENCE_S)
    assert too_large.status_code == 413
    for keys, config, said in (
        (FILE, "port = 1", "'port' needs a restart"),
        (FILE, "replays = -1", "replays must be"),
        ("[[key]]", CONFIG, "key 1 needs a name"),
    ):
        refused = administered.reload(keys, config)
        assert refused.status_code == 400
        assert said in refused.json()["error"]["message"]
        assert administered.state()["limits"]["body_bytes"] == 100
        assert "dave" in administered.state()["config"]["key_names"]
    back = administered.reload().json()["changed"]
    assert back["config"] == {"body_bytes": {"from": 100, "to": 8 * 2**20}}
    assert back["keys"]["removed"] == ["dave"]
    administered.write(MORE, CONFIG)
    administered.server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "dave" in administered.state()["config"]["key_names"])
    assert administered.reload().status_code == 200


def test_no_request_fails_of_a_reload(administered: Administered) -> None:
    """A hundred, four at once, of good files and bad ones, while clients stream."""
    files = [(FILE, CONFIG), ("[[key", CONFIG), (MORE, "max_in_flight = 500"), (MORE, "drain_s = -1")]
    left, writing, statuses = threading.Event(), threading.Lock(), list[int]()

    def ask() -> int:
        done = 0
        while not left.is_set():
            assert list(streamed(administered.server, 20))[-1] == "data: [DONE]"
            done += 1
        return done

    def reload(number: int) -> None:
        with client(administered.folder / "admin.sock") as admin:
            for i in range(25):
                with writing:
                    administered.write(*files[(number + i) % 4])
                statuses.append(admin.post("/reload").status_code)

    with ThreadPoolExecutor(7) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        try:
            for each in [pool.submit(reload, number) for number in range(4)]:
                each.result(PATIENCE_S)
        finally:
            left.set()
        assert all(each.result(PATIENCE_S) for each in asking)
    assert len(statuses) == 100
    assert set(statuses) == {200, 400}
    assert administered.reload().status_code == 200
    assert administered.state()["config"]["key_names"] == ["alice", "bob", "carol"]
    metrics = administered.admin.get("/metrics").text.splitlines()
    assert_conserved({line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in metrics if line[0] != "#"})


@pytest.fixture(scope="module")
def stalling(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, httpx.Client, Path]]:
    port, admin_port, held = free_port(), free_port(), tmp_path_factory.mktemp("stalling") / "held"
    command = ["-c", STALLED, str(held), "serve", str(model_folder), "--executor", "hash", "--port", str(port)]
    running = launch([*command, "--served-name", "tiny", "--admin", str(admin_port)], port, "tiny")
    with httpx.Client(base_url=f"http://127.0.0.1:{admin_port}", timeout=PATIENCE_S) as admin:
        yield running, admin, held
    running.close()


def test_probes_answer_while_the_main_loop_stands_still(stalling: tuple[Running, httpx.Client, Path]) -> None:
    running, admin, held = stalling
    assert admin.get("/livez", headers={"host": "elsewhere"}).status_code == 403
    held.touch()
    running.process.send_signal(signal.SIGUSR1)
    wait_for(lambda: admin.get("/livez").json()["main_loop_silent_s"] > 0.5)
    took = []
    for _ in range(20):
        began_s = SYSTEM.now_s()
        assert admin.get("/livez").status_code == 200
        took.append(SYSTEM.now_s() - began_s)
    assert max(took) < PATIENCE_S / 10
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(running.url + "/livez", timeout=0.2)
    busy = admin.post("/drain")
    assert (busy.status_code, busy.json()["error"]["code"]) == (503, "main_loop_busy")
    assert "nothing was done" in busy.json()["error"]["message"]
    assert admin.get("/readyz").status_code == 200
    held.unlink()
    wait_for(lambda: admin.get("/state").json().get("state") == "ready")
    assert running.complete(max_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3


def test_a_drain_is_asked_for_twice_and_signalled(stalling: tuple[Running, httpx.Client, Path]) -> None:
    """As by a hook before the signal: neither cuts short what is in flight."""
    server, admin, _ = stalling
    stream = server.stream(max_tokens=30_000)
    events = stream.events()
    next(events)
    assert admin.post("/reload").json()["error"]["message"].startswith("there is nothing to reload")
    assert admin.post("/drain").status_code == 202
    wait_for(lambda: admin.get("/readyz").status_code == 503)
    assert admin.post("/drain").status_code == 202
    server.process.send_signal(signal.SIGTERM)
    assert admin.get("/state").json()["state"] == "draining"
    assert all(isinstance(next(events), dict) for _ in range(300))
    stream.close()
    assert server.process.wait(PATIENCE_S) == 0


def test_a_socket_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    first = Door(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ResourceError, match="belongs to a server that runs"):
        Door(str(path))
    first.close()
    assert not path.exists()


def test_a_door_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    first = Door(str(path))
    path.unlink()
    second = Door(str(path))
    first.close()
    assert path.exists()
    second.close()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("none/a.sock", "there is no folder"),
        ("file", "something that is no socket is there"),
        ("a" * 200, "path too long"),
        ("0", "a port from 1 to 65535, got 0"),
        ("70000", "a port from 1 to 65535, got 70000"),
    ],
)
def test_a_wrong_address_is_told(tmp_path: Path, address: str, said: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises((ConfigError, ResourceError), match=said):
        Door(address if address.isdecimal() else str(tmp_path / address))
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ResourceError, match="choose another"):
        Door(str(taken.getsockname()[1]))
