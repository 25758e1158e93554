"""Beginnings and ends: loading, disconnects, a dying engine, drains, orphans, what the counters say afterwards."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tenon.base.records import read_records
from tenon.server.run import bind
from tests.server.conftest import PATIENCE_S, Running, free_port, wait_for

Start = Callable[..., Running]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it is gone between opening and reading
        return False


def assert_conserved(metrics: dict[str, float]) -> None:
    finished = sum(value for name, value in metrics.items() if name.startswith("tenon_requests_finished_total"))
    assert metrics["tenon_requests_started_total"] == finished + metrics["tenon_requests_running"]


def test_http_side_loads_no_torch() -> None:
    program = "import sys, tenon.cli.serve; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_disconnect_frees_everything(own_server: Start) -> None:
    server = own_server()
    streams = [server.stream(max_tokens=30_000, n=n) for n in (1, 2, 3)]
    for stream in streams:
        next(stream.events())
    assert server.metrics()["tenon_requests_running"] == 3
    assert_conserved(server.metrics())
    for stream in streams:
        stream.close()
    wait_for(lambda: server.metrics()["tenon_requests_running"] == 0)
    wait_for(lambda: server.metrics()["tenon_kv_blocks_used"] == 0)
    metrics = server.metrics()
    assert metrics['tenon_requests_finished_total{reason="abort"}'] == 3
    assert metrics["tenon_engine_running"] == 0
    assert_conserved(metrics)


def test_a_disconnect_frees_what_was_not_streamed(own_server: Start) -> None:
    server = own_server()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            server.url + "/v1/completions",
            json={"model": "tiny", "prompt": "a", "max_tokens": 30_000, "ignore_eos": True},
            timeout=0.5,
        )
    wait_for(lambda: server.metrics()['tenon_requests_finished_total{reason="abort"}'] == 1)
    wait_for(lambda: server.metrics()["tenon_kv_blocks_used"] == 0)


def test_the_engine_dies_with_the_server(own_server: Start) -> None:
    server = own_server()
    pid = server.engine_pid()
    server.process.kill()
    wait_for(lambda: not alive(pid))


def test_sigterm_drains(own_server: Start) -> None:
    server = own_server()
    stream = server.stream(max_tokens=2000, stream_options={"include_usage": True})
    events = stream.events()
    next(events)
    pid = server.engine_pid()
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(server.url + "/readyz", timeout=PATIENCE_S).status_code == 503)
    refused = server.post("/v1/completions", {"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    rest = list(events)
    stream.close()
    assert rest[-1] == "[DONE]"
    assert isinstance(rest[-2], dict)
    assert rest[-2]["usage"]["completion_tokens"] == 2000
    assert server.process.wait(PATIENCE_S) == 0
    assert not alive(pid)


def test_what_does_not_finish_in_time_is_told_so(own_server: Start) -> None:
    server = own_server("--drain-s", "0.3")
    stream = server.stream(max_tokens=30_000)
    events = stream.events()
    next(events)
    server.process.send_signal(signal.SIGTERM)
    last = list(events)[-1]
    stream.close()
    assert isinstance(last, dict)
    assert last["error"]["code"] == "draining"
    assert server.process.wait(PATIENCE_S) == 0


def test_a_second_signal_ends_it_now(own_server: Start) -> None:
    server = own_server()
    stream = server.stream(max_tokens=30_000)
    next(stream.events())
    pid = server.engine_pid()
    server.process.send_signal(signal.SIGINT)
    wait_for(lambda: httpx.get(server.url + "/readyz", timeout=PATIENCE_S).status_code == 503)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(PATIENCE_S) == 128 + signal.SIGINT
    stream.close()
    wait_for(lambda: not alive(pid))


def test_a_port_that_is_taken(server: Running, model_folder: Path) -> None:
    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "tenon.cli", "serve", str(model_folder), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"tenon: port {port} on 127.0.0.1 is taken; choose another with --port\n"


def test_connections_send_small_pieces_at_once() -> None:
    """Otherwise the end of an answer waits for the other side to acknowledge its beginning, which takes 40 ms."""

    async def nodelay() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            found.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = bind("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            writer.close()
            return await found

    assert asyncio.run(nodelay())


def test_remote_hosts_must_be_meant(model_folder: Path) -> None:
    command = [sys.executable, "-m", "tenon.cli", "serve", str(model_folder), "--host", "192.0.2.1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--allow-remote" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_model_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "tenon.cli", "serve", str(tmp_path), "--executor", "hash"]
    done = subprocess.run([*command, "--port", str(free_port())], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "config.json" in done.stderr.splitlines()[-1]


def test_models_and_probes_answer_while_loading(own_server: Start) -> None:
    server = own_server(wait_ready=False)

    def listens() -> bool:
        try:
            return httpx.get(server.url + "/livez", timeout=PATIENCE_S).status_code == 200
        except httpx.TransportError:
            return False

    wait_for(listens)
    assert httpx.get(server.url + "/v1/models", timeout=PATIENCE_S).json()["data"][0]["id"] == "tiny"
    statuses = set()
    while 200 not in statuses:
        ready = httpx.get(server.url + "/readyz", timeout=PATIENCE_S)
        statuses.add(ready.status_code)
        if ready.status_code == 503:
            assert ready.json()["reason"].startswith(("loading", "starting"))
    assert server.complete(max_tokens=1)


def test_records_are_kept_where_asked(own_server: Start, tmp_path: Path) -> None:
    server = own_server("--record", str(tmp_path))
    server.complete(max_tokens=3)
    assert server.stop() == 0
    (folder,) = tmp_path.iterdir()
    kinds = [record["kind"] for record in read_records(folder)]
    assert kinds[0] == "run"
    assert [kind for kind in kinds if kind in ("started", "first", "finished")] == ["started", "first", "finished"]


def test_metrics_are_a_valid_exposition(server: Running) -> None:
    text = httpx.get(server.url + "/metrics", timeout=PATIENCE_S).text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    for line in text.splitlines():
        if not line.startswith("#"):
            assert any(line.startswith(name) for name in names)
            float(line.rpartition(" ")[2])
    assert_conserved(server.metrics())
