"""Spans of requests, as a collector gets them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.server.conftest import PATIENCE_S, Running, wait_for

Start = Callable[..., Running]
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Collector:
    """Keeps what it is sent; ``silent`` ones never answer."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[Any] = []
        self.bytes = b""
        self.silent = threading.Event()
        self.asked = threading.Event()
        self.left = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.asked.set()
                if outer.silent.is_set():
                    outer.left.wait(PATIENCE_S)
                    return
                outer.take(body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                """Nothing: a test's output is its own."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # so that closing it waits for them, and for their sockets
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def take(self, body: bytes) -> None:
        self.bytes += body
        told = ExportTraceServiceRequest.FromString(body)
        for resource in told.resource_spans:
            self.resources.append(resource.resource)
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def close(self) -> None:
        self.left.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def attributes(span: Any) -> dict[str, Any]:
    kinds = {"string_value": str, "int_value": int, "double_value": float}
    found: dict[str, Any] = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        found[pair.key] = (
            kinds[kind](getattr(pair.value, kind))
            if kind in kinds
            else [value.string_value for value in pair.value.array_value.values]
        )
    return found


def test_a_request_is_a_span_below_its_clients(own_server: Start, collector: Collector) -> None:
    server = own_server("--traces", collector.url)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    body = {"prompt": "my secret", "max_tokens": 5, "ignore_eos": True, "temperature": 0.5}
    assert server.post("/v1/completions", body, headers=headers).status_code == 200
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    assert server.post("/v1/chat/completions", chat).status_code == 200
    assert server.stop() == 0  # sends what is left
    assert len(collector.spans) == 2
    named = {span.name: span for span in collector.spans}
    span = named["text_completion tiny"]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert not named["chat tiny"].parent_span_id
    expected = {
        "gen_ai.operation.name": "text_completion", "gen_ai.request.model": "tiny", "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5, "gen_ai.usage.input_tokens": 9, "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0, "gen_ai.response.finish_reasons": ["length"],
    }  # fmt: skip
    assert expected.items() <= attributes(span).items()
    (first,) = span.events
    assert span.start_time_unix_nano < first.time_unix_nano < span.end_time_unix_nano
    assert b"my secret" not in collector.bytes
    names = {pair.key: pair.value.string_value for pair in collector.resources[0].attributes}
    assert names["service.name"] == "tenon"


def test_a_collector_that_hangs_costs_spans_alone(own_server: Start, collector: Collector) -> None:
    collector.silent.set()
    server = own_server("--traces", collector.url)
    body = {"model": "tiny", "prompt": [1], "max_tokens": 1}
    with httpx.Client(timeout=PATIENCE_S) as client:
        for _ in range(600):  # more than go at once
            assert client.post(server.url + "/v1/completions", json=body).status_code == 200
    wait_for(collector.asked.is_set)
    assert server.complete(max_tokens=3)
    assert server.stop() == 0


def test_without_opentelemetry_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from tenon.cli.main import main\n"
        "sys.exit(main(['serve', '--port', '0', '--traces', 'http://127.0.0.1:1/v1/traces']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    assert "pip install 'tenon[otel]'" in done.stderr
    assert "Traceback" not in done.stderr
