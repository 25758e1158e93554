"""Small servers over loopback that answer like a good one, or like a bad one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tenon.base.clock import SYSTEM
from tenon.workloads.load import Load, LoadOptions
from tenon.workloads.report import Outcome
from tenon.workloads.streaming import Patience, Target
from tenon.workloads.trace import Segment, Trace, TraceRequest

PATIENCE_S = 60.0
"""How long a test waits for what must happen: never reached, however busy the machine is."""


@dataclass
class Request:
    """One request as a server got it, on the ``connection``-th connection."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    connection: int
    received_s: float
    writer: asyncio.StreamWriter = field(repr=False)

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: str = "200 OK", content_type: str = "text/event-stream", *more: str) -> None:
        """Status and headers of a chunked answer."""
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", "Transfer-Encoding: chunked", *more, "", ""]
        await self.write("\r\n".join(lines).encode())

    async def chunk(self, data: bytes) -> None:
        """One chunk of the body; an empty one ends it."""
        await self.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def whole(self, status: str, body: bytes, content_type: str = "application/json", *more: str) -> None:
        length = f"Content-Length: {len(body)}"
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", length, *more, "", ""]
        await self.write("\r\n".join(lines).encode() + body)

    async def answer(self, n: int | None = None) -> None:
        """What a good server sends: a chunk a token, the reason, usage, the end."""
        await self.head()
        await self.chunk(stream(self.body["max_tokens"] if n is None else n))
        await self.chunk(b"")


Handler = Callable[[Request], Awaitable[None]]


async def good(request: Request) -> None:
    await request.answer()


class Server:
    """Runs ``handler`` for every POST and keeps the requests in the order in which they came."""

    def __init__(self, handler: Handler = good) -> None:
        self.handler = handler
        self.requests: list[Request] = []
        self.n_connections = 0
        self.url = ""

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        self._tasks: set[asyncio.Task[None]] = set()
        return self

    async def __aexit__(self, *ended: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        self.n_connections += 1
        connection = self.n_connections
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = json.loads(await reader.readexactly(int(headers.get("content-length", "0"))) or b"{}")
                request = Request(head[0].split()[1], headers, body, connection, SYSTEM.now_s(), writer)
                self.requests.append(request)
                await self.handler(request)
                if writer.is_closing():
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def text(word: str = " tok", **more: Any) -> bytes:
    return event(choices=[{"index": 0, "text": word, "finish_reason": None}], **more)


def usage(n: int, n_prompt: int = 5, cached: int = 0) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    return {"prompt_tokens": n_prompt, "completion_tokens": n, "prompt_tokens_details": details}


def ending(n: int, reason: str = "length") -> bytes:
    """The reason, usage, the end."""
    finish = event(choices=[{"index": 0, "text": "", "finish_reason": reason}])
    return finish + event(choices=[], usage=usage(n)) + b"data: [DONE]\n\n"


def stream(n: int) -> bytes:
    return text() * n + ending(n)


def trace_of(
    arrivals: Iterable[float],
    *,
    n_output: int = 3,
    n_prompt: int = 5,
    after: dict[int, int] | None = None,
    **fields: Any,
) -> Trace:
    """Requests r0, r1, ... at these times; ``after`` maps a request to the one that it follows."""
    after = after or {}
    requests = [
        TraceRequest(
            f"r{i}", at, (Segment(i + 1, n_prompt),), n_output, after=f"r{after[i]}" if i in after else "", **fields
        )
        for i, at in enumerate(arrivals)
    ]
    return Trace.make("test", "test", requests)


@dataclass
class Played:
    """What a load over a server gave."""

    outcomes: list[Outcome]
    notes: tuple[str, ...]
    server: Server
    load: Load

    @property
    def by_id(self) -> dict[str, Outcome]:
        assert len({one.id for one in self.outcomes}) == len(self.outcomes)
        return {one.id: one for one in self.outcomes}


def options(url: str, **given: Any) -> LoadOptions:
    target = Target(url, given.pop("key", ""))
    patience = Patience(PATIENCE_S, given.pop("silence_s", PATIENCE_S), given.pop("total_s", PATIENCE_S))
    return LoadOptions(target, given.pop("model", "m"), patience=patience, **given)


def play(trace: Trace, handler: Handler = good, *, url: str = "", **given: Any) -> Played:
    """Run a load over a server of its own, or over nobody at ``url``."""

    async def run() -> Played:
        async with Server(handler) as server:
            outcomes: list[Outcome] = []
            load = Load(trace, options(url or server.url, **given), outcomes.append)
            async with asyncio.timeout(PATIENCE_S):
                notes = await load.run()
            return Played(outcomes, notes, server, load)

    return asyncio.run(run())


async def says_nothing(request: Request) -> None:
    await asyncio.Event().wait()


async def refuses(request: Request) -> None:
    await request.whole(
        "429 Too Many Requests", b'{"error": {"message": "full"}}', "application/json", "Retry-After: 7"
    )


CHAT = [
    event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]),
    event(choices=[{"index": 0, "delta": {"reasoning_content": "hm"}}]),
    event(choices=[{"index": 0, "delta": {"content": "Grüße 🦜"}}]),
    event(choices=[{"index": 0, "delta": {"content": "!"}}]),
    event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
    event(choices=[], usage=usage(3, cached=4)),
    b"data: [DONE]\n\n",
]
"""A chat's answer: role, reasoning, text in several bytes a character, end, usage."""
