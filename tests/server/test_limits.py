"""Bytes, time and counts that one client may take."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.server.conftest import PATIENCE_S, Running, wait_for

Start = Callable[..., Running]


def connect(server: Running, receive_bytes: int | None = None) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(PATIENCE_S)
    sock.connect((host, int(port)))
    return sock


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        return data
    return data


def ended_by(server: Running) -> dict[str, float]:
    """How many requests have ended, by reason."""
    pattern = re.compile(r'tenon_requests_finished_total\{reason="(\w+)"\}')
    counts = {match[1]: value for name, value in server.metrics().items() if (match := pattern.fullmatch(name))}
    return {reason: count for reason, count in counts.items() if count}


def test_large_headers_are_refused(server: Running) -> None:
    for header in (b"x: " + b"a" * 20_000, b"\r\n".join(b"x%d: y" % i for i in range(4000))):
        with connect(server) as sock:
            sock.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n" + header + b"\r\n\r\n")
            assert read_all(sock).startswith(b"HTTP/1.1 431 ")


def test_an_endless_header_is_cut_off(server: Running) -> None:
    with connect(server) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nx: ")
        sent = 0
        try:
            while sent < 50_000_000:
                sent += sock.send(b"a" * 65536)
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert sent < 50_000_000


def test_an_announced_large_body_is_refused_early(server: Running) -> None:
    with connect(server) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999999999\r\n\r\n{")
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_large_body_is_refused_as_it_comes(server: Running) -> None:
    def chunks() -> object:
        for _ in range(40):
            yield b" " * 262_144

    response = httpx.post(server.url + "/v1/completions", content=chunks(), timeout=PATIENCE_S)  # type: ignore[arg-type]
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_what_is_no_http_is_refused(server: Running) -> None:
    with connect(server) as sock:
        sock.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")


def test_slow_senders_are_cut_off_and_others_served(own_server: Start) -> None:
    server = own_server(limits={"receipt_s": 0.6})
    partial = (b"", b"GET /livez HT", b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
    socks = [connect(server) for _ in range(10) for _ in partial]
    for sock, start in zip(socks, partial * 10, strict=True):
        sock.sendall(start)
    assert server.complete(max_tokens=2)
    for sock in socks:
        assert read_all(sock).startswith(b"HTTP/1.1 408 ")
        sock.close()
    assert server.complete(max_tokens=2)


def test_a_long_answer_outlives_the_receipt_deadline(own_server: Start) -> None:
    server = own_server(limits={"receipt_s": 0.2})
    assert server.complete(max_tokens=1500, ignore_eos=True)["usage"]["completion_tokens"] == 1500


def test_a_client_that_does_not_read_is_given_up(own_server: Start) -> None:
    server = own_server(limits={"queued_deltas": 64, "write_stall_s": 1.0})
    body = b'{"model":"tiny","prompt":"a","stream":true,"ignore_eos":true,"max_tokens":30000,"logprobs":20}'
    with connect(server, receive_bytes=4096) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        sock.sendall(head + body)
        wait_for(lambda: ended_by(server) != {}, told=lambda: server.metrics())
        assert ended_by(server) == {"abort": 1}
        assert server.metrics()["tenon_requests_running"] == 0
        assert server.complete(max_tokens=2)
        wait_for(lambda: server.metrics()["tenon_kv_blocks_used"] == 0)


def test_too_much_in_flight_is_answered_with_429(own_server: Start) -> None:
    server = own_server(limits={"max_in_flight": 2})
    stream = server.stream(n=2, max_tokens=30_000)
    next(stream.events())
    refused = server.post("/v1/completions", {"prompt": "a"})
    stream.close()
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    wait_for(lambda: server.post("/v1/completions", {"prompt": "a"}).status_code == 200)


def test_the_engines_queue_is_bounded_too(own_server: Start) -> None:
    server = own_server("--max-sequences", "1", "--max-waiting", "1")
    with ThreadPoolExecutor(6) as pool:
        body = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True}
        answers = list(pool.map(lambda _: server.post("/v1/completions", body), range(6)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses[0] == 200
    assert statuses[-1] == 429
    metrics = server.metrics()
    assert metrics['tenon_requests_finished_total{reason="rejected"}'] == statuses.count(429)
