"""Load over HTTP against servers that fail: each failure is an outcome of its own kind, none is lost, none hangs."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import Counter
from typing import Any

import pytest

from tenon.workloads.report import report_of
from tenon.workloads.trace import Segment, Trace, TraceRequest
from tests.server.conftest import free_port
from tests.workloads.servers import (
    PATIENCE_S,
    Request,
    ending,
    event,
    good,
    play,
    refuses,
    says_nothing,
    text,
    trace_of,
    usage,
)


async def resets(request: Request) -> None:
    await request.head()
    await request.chunk(text())
    await asyncio.sleep(0.05)  # a reset may overtake what is still to be read
    without_lingering = struct.pack("ii", 1, 0)
    request.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, without_lingering)
    request.writer.transport.abort()


async def closes(request: Request) -> None:
    await request.head()
    await request.chunk(text())
    request.writer.close()


async def goes_quiet(request: Request) -> None:
    await request.head()
    await request.chunk(text())
    await asyncio.Event().wait()


async def hangs_up(request: Request) -> None:
    request.writer.close()


async def stops_early(request: Request) -> None:
    await request.head()
    await request.chunk(text())
    await request.chunk(b"")


async def babbles(request: Request) -> None:
    await request.head()
    await request.chunk(b"data: {not json\n\n")


async def sends_garbage(request: Request) -> None:
    await request.head()
    await request.chunk(bytes(range(256)) * 4)
    await request.chunk(b"")


async def wrong_types(request: Request) -> None:
    await request.head()
    await request.chunk(b'data: {"choices": 5}\n\n')


async def bad_utf8(request: Request) -> None:
    await request.head()
    await request.chunk(b'data: {"choices": [{"text": "\xff"}]}\n\n')


async def fails_midway(request: Request) -> None:
    await request.head()
    await request.chunk(text() + event(error={"message": "the engine died", "code": "engine_dead"}))
    await request.chunk(b"")


async def refuses_in_html(request: Request) -> None:
    await request.whole("502 Bad Gateway", b"<h1>bad\ngateway</h1>", "text/html")


async def does_not_stream(request: Request) -> None:
    await request.whole("200 OK", b'{"choices": []}')


async def is_no_http(request: Request) -> None:
    await request.write(b"220 smtp.example.org ESMTP\r\n")


async def endless_header(request: Request) -> None:
    await request.write(b"HTTP/1.1 200 OK\r\nX: ")
    while not request.writer.is_closing():
        await request.write(b"x" * 4096)


async def endless_tokens(request: Request) -> None:
    await request.head()
    while not request.writer.is_closing():
        await request.chunk(text() * 100)


async def counts_backwards(request: Request) -> None:
    await request.head()
    await request.chunk(text(usage=usage(2)) + text(usage=usage(1)))


async def counts_absurdly(request: Request) -> None:
    await request.head()
    await request.chunk(text(usage=usage(10**12)) + ending(10**12))


async def counts_below_zero(request: Request) -> None:
    await request.head()
    await request.chunk(text(usage=usage(1, n_prompt=-1)))


async def speaks_twice(request: Request) -> None:
    await request.whole("500 Internal Server Error", b"")
    await request.whole("200 OK", b"unasked")


HOSTILE = {
    resets: ("broken stream", 1),
    closes: ("broken stream", 1),
    says_nothing: ("timeout", 0),
    goes_quiet: ("timeout", 1),
    hangs_up: ("no answer", 0),
    stops_early: ("broken stream", 1),
    babbles: ("bad event", 0),
    sends_garbage: ("broken stream", 0),
    wrong_types: ("bad event", 0),
    bad_utf8: ("bad event", 0),
    fails_midway: ("server error", 1),
    refuses: ("http 429", 0),
    refuses_in_html: ("http 502", 0),
    does_not_stream: ("not a stream", 0),
    is_no_http: ("not HTTP", 0),
    endless_header: ("not HTTP", 0),
    endless_tokens: ("bad event", None),
    counts_backwards: ("bad event", None),
    counts_absurdly: ("bad event", None),
    counts_below_zero: ("bad event", None),
    speaks_twice: ("http 500", 0),
}
"""The kind of error that each must give, and how many tokens came before."""


@pytest.mark.parametrize("handler", HOSTILE, ids=lambda handler: handler.__name__)
def test_each_way_to_fail_is_an_outcome_of_its_kind(handler: Any) -> None:
    kind, n_tokens = HOSTILE[handler]
    got = play(trace_of([0.0]), handler, silence_s=0.2 if kind == "timeout" else PATIENCE_S)
    (one,) = got.outcomes
    assert one.error.partition(":")[0] == kind
    assert n_tokens is None or len(one.token_s) == n_tokens
    assert "\n" not in one.error
    assert report_of(got.outcomes).overall.errors == {kind: 1}


def test_errors_say_what_the_server_said() -> None:
    assert play(trace_of([0.0]), refuses).outcomes[0].error == "http 429: full (retry after 7 s)"
    assert play(trace_of([0.0]), refuses_in_html).outcomes[0].error == "http 502: <h1>bad gateway</h1>"
    assert play(trace_of([0.0]), fails_midway).outcomes[0].error == "server error: the engine died"


def test_among_all_of_them_none_is_lost_and_the_good_ones_are_answered() -> None:
    handlers = [*HOSTILE, good]
    n = 3 * len(handlers)

    async def mixed(request: Request) -> None:
        await handlers[request.body["max_tokens"] % len(handlers)](request)

    requests = [TraceRequest(f"r{i}", i / 1000, (Segment(1, 5),), 1 + i) for i in range(n)]
    got = play(Trace.make("t", "t", requests), mixed, silence_s=2.0)
    assert len(got.by_id) == n
    expected = Counter(kind for kind, _ in HOSTILE.values() for _ in range(3))
    assert Counter(one.error.partition(":")[0] for one in got.outcomes if one.error) == expected
    assert sum(not one.error for one in got.outcomes) == 3
    assert (got.load.n_answered, got.load.n_failed, got.load.n_running) == (3, n - 3, 0)


def test_nobody_listens() -> None:
    got = play(trace_of([0.0, 0.0]), url=f"http://127.0.0.1:{free_port()}/v1")
    assert [one.error.partition(":")[0] for one in got.outcomes] == ["connect"] * 2


def test_a_trickle_ends_at_the_total_limit() -> None:
    async def trickles(request: Request) -> None:
        await request.head()
        while True:
            await request.chunk(b": still here\n\n")
            await asyncio.sleep(0.02)

    got = play(trace_of([0.0]), trickles, total_s=0.3)
    assert got.outcomes[0].error == "timeout: no whole answer within 0.3 s"


def test_a_key_that_a_server_repeats_is_not_told() -> None:
    async def tells(request: Request) -> None:
        given = request.headers["authorization"].removeprefix("bearer ")
        await request.whole("401 Unauthorized", json.dumps({"error": {"message": f"wrong key {given}"}}).encode())

    got = play(trace_of([0.0]), tells, key="secret-1")
    assert got.outcomes[0].error == "http 401: wrong key [key]"
    assert "secret-1" not in repr(got.load._options)
