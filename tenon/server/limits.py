"""What one client may take: bytes, time, counts. Checked in the order bytes, counts, schema, token cost, admission.

``GuardedProtocol`` adds to uvicorn's HTTP protocol what uvicorn lacks: a limit on the header's bytes, a deadline for
receiving a whole request (a client that trickles one byte a second is cut off) and one for a client that does not
read its response.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import msgspec
from starlette.types import Message, Receive
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tenon.base.errors import ConfigError, RequestError

UPLOAD_PATH: Final = "/v1/files"
READ_BYTES: Final = 64 * 2**10
"""Of one connection at a time."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one server. ``max_work`` caps the product prompts x n x max_tokens x (1 + logprobs)."""

    header_bytes: int = 16 * 2**10
    body_bytes: int = 8 * 2**20
    receipt_s: float = 10.0
    write_stall_s: float = 20.0
    stall_s: float = 10.0
    """Without a step for so long (or three times the longest step) while work exists, the server is not ready. An
    engine process that shows no sign of life for so long is replaced."""
    max_messages: int = 4096
    max_prompts: int = 128
    max_sequences: int = 128
    max_work: int = 2**22
    max_in_flight: int = 512
    """Sequences of all requests together; more are refused with 429."""
    max_wait_s: float = math.inf
    """Where the queue is so long that a new request would wait longer than so, it is refused with 429."""
    max_connections: int = 1024
    all_bodies_bytes: int = 256 * 2**20
    """Of bodies that are coming in at one time; beyond it only small ones are read."""
    memory_shed: float = 0.85
    """From this share of the memory in use on, less is taken (:mod:`tenon.server.admission`)."""
    memory_reject: float = 0.95
    """From this share on, nothing is."""
    machine_bytes: int = 12 * 2**30
    """Of a machine with more memory, so much counts: the rest is to spare. A control group counts whole."""
    queued_deltas: int = 4096
    """Tokens that may wait for a client that reads slowly; then its request is aborted."""
    queued_events: int = 512
    file_bytes: int = 64 * 2**20
    """Of one stored file: its upload alone may exceed ``body_bytes``."""
    upload_Bps: int = 256 * 2**10
    """An upload has ``receipt_s`` and what its announced length takes at this pace."""
    store_bytes: int = 2**30
    """Of all files and batches of one tenant."""
    max_files: int = 1000
    max_batches: int = 1000
    """Of one tenant; ``max_open_batches`` of them may be under way."""
    max_open_batches: int = 16
    max_batch_lines: int = 50_000
    batch_concurrency: int = 16
    """Lines of all batches that are asked at once."""
    replays: int = 2
    """Engines that may die under a request before it is given up; 0: none."""

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` naming the field."""
        for name in ("memory_shed", "memory_reject"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}", subject=name)
        if self.memory_shed >= self.memory_reject:
            raise ConfigError(
                f"memory_shed must be below memory_reject, got {self.memory_shed} and {self.memory_reject}",
                subject="memory_shed",
            )


class BodyTooLarge(RequestError):
    """The request's body exceeds the limit (HTTP 413)."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request body exceeds the limit of {limit} bytes", code="request_too_large")


async def read_body(
    receive: Receive, content_length: str | None, limit: int, grow: Callable[[int], None] = lambda n_bytes: None
) -> bytes:
    """The whole body. Raises ``BodyTooLarge`` before reading where the announced length already tells, and
    ``RequestError`` where the client leaves. ``grow`` hears of each piece before it is kept, and may raise.
    """
    if content_length is not None and content_length.isdecimal() and int(content_length) > limit:
        raise BodyTooLarge(limit)
    body = bytearray()
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the client left while sending its request", code="client_closed")
        piece = message.get("body", b"")
        if len(body) + len(piece) > limit:
            raise BodyTooLarge(limit)
        grow(len(piece))
        body += piece
        if not message.get("more_body", False):
            return bytes(body)


class GuardedProtocol(HttpToolsProtocol):
    """One connection with limits on its header and deadlines on its reading and writing.

    The receipt deadline runs from the first byte of a request (from the connection's start for the first one) to
    the end of its body.
    """

    limits: Limits = Limits()
    _receipt: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _in_header = True
    _header_bytes = 0
    _refusal: HTTPStatus | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(transport, "max_size"):  # asyncio's reads take this much at once for each connection
            transport.max_size = READ_BYTES
        self._arm_receipt()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        if self._in_header:
            if self._header_bytes > self.limits.header_bytes:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
                return
            self._header_bytes += len(data)
            if self._receipt is None:
                self._arm_receipt()
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._parsed_bytes = 0
        if self._receipt is None:
            self._arm_receipt()

    def on_url(self, url: bytes) -> None:
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_header = False
        super().on_headers_complete()
        if self.scope["path"] == UPLOAD_PATH and self._receipt is not None:
            announced = dict(self.headers).get(b"content-length", b"")
            n_bytes = min(int(announced) if announced.isdigit() else 0, self.limits.file_bytes)
            self._receipt.cancel()
            self._arm_receipt(n_bytes / self.limits.upload_Bps)

    def on_message_complete(self) -> None:
        self._in_header = True
        self._header_bytes = 0
        if self._receipt is not None:
            self._receipt.cancel()
            self._receipt = None
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what it cannot parse; ours tells a header that is too large from a broken one."""
        self._refuse(self._refusal or HTTPStatus.BAD_REQUEST)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self.limits.write_stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _count_header(self, n_bytes: int) -> None:
        self._parsed_bytes += n_bytes
        if self._parsed_bytes > self.limits.header_bytes:
            self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise ValueError("header too large")  # httptools hands it on as a parser error

    def _arm_receipt(self, more_s: float = 0.0) -> None:
        self._receipt = self.loop.call_later(self.limits.receipt_s + more_s, self._on_receipt_deadline)

    def _on_receipt_deadline(self) -> None:
        self._receipt = None
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body:  # a pipelined request waits because we stopped reading: not the client's fault
                self._arm_receipt()
                return
            if cycle.response_started:
                self.transport.abort()
                return
        self._refuse(HTTPStatus.REQUEST_TIMEOUT)

    def _refuse(self, status: HTTPStatus) -> None:
        self._refusal = status
        said = {
            HTTPStatus.REQUEST_TIMEOUT: f"the request was not received within {self.limits.receipt_s:g} s",
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: f"the header exceeds {self.limits.header_bytes} bytes",
        }.get(status, "this is not a valid HTTP request")
        body = msgspec.json.encode(error_body(said, code=status.phrase.lower().replace(" ", "_")))
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        if not self.transport.is_closing():
            self.transport.write(head.encode("ascii") + body)
            self.transport.close()

    def _disarm(self) -> None:
        for handle in (self._receipt, self._stall):
            if handle is not None:
                handle.cancel()
        self._receipt = self._stall = None


def guarded_protocol(limits: Limits) -> type[GuardedProtocol]:
    """The protocol class bound to ``limits``: uvicorn makes one instance per connection from a class alone."""
    return type("BoundGuardedProtocol", (GuardedProtocol,), {"limits": limits})


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """OpenAI's error shape; ``code`` is a string or null, never a number."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
