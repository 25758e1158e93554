"""Limits of every route, generated from the application's table: a route that is not listed here fails."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from tenon.base.clock import ManualClock
from tenon.server.anthropic import MessagesRequest
from tenon.server.app import build_app
from tenon.server.completions import Completions
from tenon.server.embeddings import EmbeddingRequest
from tenon.server.events import EventHub
from tenon.server.limits import Limits
from tenon.server.protocol import ChatRequest, CompletionRequest
from tenon.server.responses_api import ResponsesRequest
from tenon.server.service import Service
from tenon.server.tokens import DetokenizeRequest, TokenizeRequest
from tests.server.conftest import PATIENCE_S, Running
from tests.server.test_limits import connect, read_all

HELLO = [{"role": "user", "content": "hello"}]
SOUND: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "hello", "max_tokens": 2},
    "/v1/chat/completions": {"model": "tiny", "messages": HELLO, "max_tokens": 2},
    "/v1/messages": {"model": "tiny", "messages": HELLO, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": HELLO},
    "/v1/estimate": {"model": "tiny", "messages": HELLO, "max_tokens": 2},
    "/v1/embeddings": {"model": "tiny", "input": "hello"},
    "/v1/responses": {"model": "tiny", "input": "hello", "max_output_tokens": 2},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
"""A body that each route takes."""
GETS = {
    "/v1/models", "/v1/models/{name:path}", "/tokenizer_info", "/livez", "/health", "/readyz", "/metrics", "/events",
    "/", "/page.js", "/dom.js", "/settings.js", "/answer.js", "/tokens.js", "/live.js", "/ledger.js", "/map.js",
    "/trees.js", "/page.css",
    "/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content", "/v1/batches", "/v1/batches/{batch_id}",
}  # fmt: skip
STORED = {"/v1/files", "/v1/batches", "/v1/batches/{batch_id}/cancel"}
"""Posts of what is stored: their sound bodies and their own limits are in ``test_files`` and ``test_batches``."""
DELETES = {"/v1/files/{file_id}"}
PATHS = sorted(SOUND)
JSON_PATHS = sorted([*SOUND, "/v1/batches"])
"""Where a JSON object is wanted."""
BATCH = {"input_file_id": "file-" + "0" * 24, "endpoint": "/v1/completions", "completion_window": "24h"}
NESTED = {"[": b"[" * 200_000, "{": b'{"a":' * 200_000, "prompt": b'{"model":"tiny","prompt":' + b"[" * 200_000}


def table() -> dict[str, set[str]]:
    """Paths and their methods."""
    clock = ManualClock()
    service = Service(model="tiny", limits=Limits(), clock=clock, events=EventHub(clock, bound=10))
    app = build_app(service, Completions(service), loopback_only=True)
    found: dict[str, set[str]] = {}
    for route in app.routes:
        if isinstance(route, Route):
            found.setdefault(route.path, set()).update(route.methods or ())
    return found


def post(server: Running, path: str, content: bytes) -> httpx.Response:
    return httpx.post(server.url + path, content=content, timeout=PATIENCE_S)


def assert_told(response: httpx.Response, status: int) -> str:
    """An error of this status in the shape of the route's API; returns what it says."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert isinstance(error["type"], str)
    return str(error["message"])


def test_every_route_is_tested_here() -> None:
    by_method = {
        method: {path for path, methods in table().items() if method in methods} for method in ("GET", "POST", "DELETE")
    }
    assert by_method == {"GET": GETS, "POST": set(SOUND) | STORED, "DELETE": DELETES}
    assert all(methods <= {"GET", "HEAD", "POST", "DELETE"} for methods in table().values())


@pytest.mark.parametrize("path", PATHS)
def test_a_sound_body_is_taken(server: Running, path: str) -> None:
    assert post(server, path, json.dumps(SOUND[path]).encode()).status_code == 200


@pytest.mark.parametrize("path", JSON_PATHS)
def test_too_many_bytes(server: Running, path: str) -> None:
    with connect(server) as sock:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999999999\r\n\r\n{{"
        sock.sendall(head.encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")
    with connect(server) as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nhost: localhost\r\nx: {'a' * 20_000}\r\n\r\n".encode())
        assert read_all(sock).startswith(b"HTTP/1.1 431 ")

    def chunks() -> Any:
        for _ in range(40):
            yield b" " * 262_144

    assert_told(httpx.post(server.url + path, content=chunks(), timeout=PATIENCE_S), 413)


@pytest.mark.parametrize("path", JSON_PATHS)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe", b'{"model": "\xff"}'])
def test_what_is_no_object(server: Running, path: str, body: bytes) -> None:
    assert_told(post(server, path, body), 400)


@pytest.mark.parametrize("path", JSON_PATHS)
@pytest.mark.parametrize("how", NESTED)
def test_deep_bodies(server: Running, path: str, how: str) -> None:
    assert_told(post(server, path, NESTED[how]), 400)


@pytest.mark.parametrize("path", JSON_PATHS)
def test_unknown_fields_are_named(server: Running, path: str) -> None:
    body = SOUND.get(path, BATCH) | {"no_such_field": 1}
    assert "no_such_field" in assert_told(post(server, path, json.dumps(body).encode()), 400)


@pytest.mark.parametrize("path", [path for path in PATHS if "messages" in SOUND[path]])
def test_too_many_messages(server: Running, path: str) -> None:
    body = SOUND[path] | {"messages": HELLO * 4097}
    assert "4097" in assert_told(post(server, path, json.dumps(body).encode()), 400)


@pytest.mark.parametrize("path", [path for path in PATHS if "model" in SOUND[path]])
def test_other_models_are_not_there(server: Running, path: str) -> None:
    body = SOUND[path] | {"model": "other"}
    assert "other" in assert_told(post(server, path, json.dumps(body).encode()), 404)


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, "", "x", "\u0000", "\ud7ff",
    "a" * 70_000, [], [None], [[]], [-1], [2**63], ["x"] * 200, {}, {"a": 1}, {"5": 1e9},
    [{"role": "user", "content": "a"}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], [{"role": "tool"}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], [{"type": "function"}],
    [{"name": "f", "input_schema": {}}], {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"schema": {}}},
    {"format": {"type": "json_schema", "schema": {"$ref": "#"}}}, {"type": "function", "function": {"name": "f"}},
    {"regex": "[a"}, {"include_usage": True}, "required", "none", {"type": "enabled"}, {"effort": "high"},
    {"ttft_ms": 1e-9, "tpot_x": 1e308}, {"tpot_ms": 1e308}, {"class": "x"},
]  # fmt: skip


FIELDS = sorted(
    {"no_such_field"}.union(
        *(
            kind.__struct_fields__
            for kind in (
                ChatRequest, CompletionRequest, MessagesRequest, ResponsesRequest, EmbeddingRequest, TokenizeRequest,
                DetokenizeRequest,
            )
        )
    )
)  # fmt: skip


def mutated(random_: random.Random, path: str) -> dict[str, Any]:
    """A sound body with one to three fields replaced, added or left out."""
    body = dict(SOUND[path])
    for _ in range(random_.randint(1, 3)):
        field, value = random_.choice(FIELDS), random_.choice([*VALUES, "leave out"])
        if value == "leave out":
            body.pop(field, None)
        else:
            body[field] = value
    return body


def answered(server: Running, path: str, n: int) -> None:
    """No 500, nothing in flight that stays, and the server serves on."""
    draws = random.Random(path)
    statuses = set()
    with httpx.Client(timeout=PATIENCE_S) as client:
        for i in range(n):
            body = mutated(draws, path) if i else SOUND[path]
            response = client.post(server.url + path, content=json.dumps(body).encode())
            assert response.status_code in (200, 400, 404, 413), (body, response.text)
            statuses.add(response.status_code)
            if response.status_code != 200:
                assert_told(response, response.status_code)
    assert {200, 400} <= statuses
    assert server.metrics()["tenon_requests_running"] == 0
    assert post(server, path, json.dumps(SOUND[path]).encode()).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_whatever_a_field_holds_it_is_answered(server: Running, path: str) -> None:
    answered(server, path, 300)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", PATHS)
def test_whatever_many_fields_hold_they_are_answered(server: Running, path: str) -> None:
    answered(server, path, 20_000)
