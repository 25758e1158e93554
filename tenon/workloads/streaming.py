"""A small HTTP/1.1 client for streamed answers: pieces are stamped as they arrive, and whatever a server does ends.

    Target       where: scheme, address, paths, the key
    Client       connections that are kept open between requests
    Connection   one socket and the answer that is due on it
    Events       a stream's bytes -> the data of its server-sent events

Everything that goes wrong on the way is a ``Failed`` whose kind comes from a short list: "connect", "no answer",
"timeout", "not HTTP", "broken stream", "not a stream", "bad event".
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

import httptools

from tenon.base.clock import Clock
from tenon.base.errors import ConfigError, ProtocolError

HEADER_BYTES: Final = 64 * 2**10
BODY_BYTES: Final = 1 * 2**20
"""What is kept of an answer that is not a stream: an error's message, the list of models."""
EVENT_BYTES: Final = 4 * 2**20
ONE_WRITE_BYTES: Final = 64 * 2**10
"""Larger bodies are not copied together with their header."""
DRAIN_S: Final = 1.0
"""How long a connection may take to end an answer whose last event has come, before it is closed instead of kept."""

Receive = Callable[[bytes, float], bool]
"""Gets a piece of a stream and when it arrived; true once the answer is complete. May raise ``Failed``."""


class Failed(ProtocolError):
    """One request got no whole answer. ``kind`` is a word to count by."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}", subject=kind)
        self.kind = kind


class _Stale(Exception):
    """A kept connection was closed by the server just as it was used again: nothing was answered on it."""


@dataclass(frozen=True)
class Patience:
    """How long to wait: for a connection, without any byte, for a whole answer."""

    connect_s: float = 10.0
    silence_s: float = 300.0
    total_s: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("connect_s", "silence_s", "total_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0 seconds, got {getattr(self, name)!r}", subject=name)


@dataclass(frozen=True)
class Target:
    """A server's base URL, as ``http://127.0.0.1:8000/v1``, and the key that it asks for."""

    url: str
    key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for a URL that is none, and a key that no header can carry."""
        try:
            parts = urlsplit(self.url)
            right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            right = False
        if not right or "@" in parts.netloc or parts.query or parts.fragment or not self.url.isascii():
            raise ConfigError(
                f"a server is named by a URL like http://127.0.0.1:8000/v1, got {self.url!r}", subject="url"
            )
        if not (self.key.isascii() and self.key.isprintable()):
            raise ConfigError("the API key has characters that no HTTP header can carry", subject="api_key")

    @property
    def tls(self) -> bool:
        return urlsplit(self.url).scheme == "https"

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or (443 if self.tls else 80)

    def head(self, method: str, path: str, n_body: int) -> bytes:
        """Request line and headers, up to the body."""
        parts = urlsplit(self.url)
        lines = [
            f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1",
            f"host: {parts.netloc}",
            "user-agent: tenon-load",
            "accept: text/event-stream, application/json",
        ]
        if self.key:
            lines.append(f"authorization: Bearer {self.key}")
        if method != "GET":
            lines += ["content-type: application/json", f"content-length: {n_body}"]
        return "\r\n".join([*lines, "", ""]).encode("ascii")


@dataclass(frozen=True)
class Reply:
    """An answer's status and headers; ``body`` is empty where it was a stream that went to the receiver."""

    status: int
    headers: dict[str, str]
    body: bytes = b""


class Client:
    """Sends requests to one target. Connections are made as they are needed and kept as long as the server keeps them.

    Close it in the loop that it was used in.
    """

    def __init__(self, target: Target, patience: Patience, clock: Clock, body_bytes: int = BODY_BYTES) -> None:
        """``body_bytes``: what is kept of an answer that is not a stream."""
        self.target, self.patience, self.clock, self.body_bytes = target, patience, clock, body_bytes
        self._tls = ssl.create_default_context() if target.tls else None
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self.n_connected = 0

    async def send(self, method: str, path: str, body: bytes = b"", receive: Receive | None = None) -> Reply:
        """One request. A stream's pieces go to ``receive``; without it, or with another content, the body is kept.

        Raises ``Failed``. Cancelling it closes the connection, which is how a server learns that nobody waits.
        """
        head = self.target.head(method, path, len(body))
        try:
            async with asyncio.timeout(self.patience.total_s):
                while True:
                    connection, is_kept = await self._connection()
                    try:
                        return await connection.exchange(head, body, receive, self.patience.silence_s)
                    except _Stale as stale:
                        # Servers may close an idle connection at any moment. Nothing of an answer came, so asking
                        # again on another connection is what every HTTP client does.
                        if not is_kept:
                            raise Failed("no answer", "the server closed the connection without a word") from stale
        except TimeoutError as error:
            raise Failed("timeout", f"no whole answer within {self.patience.total_s:g} s") from error

    async def close(self) -> None:
        """Close every connection and wait until the loop has let go of them."""
        closing = [connection.closed for connection in self._open]
        for connection in list(self._open):
            connection.abort()
        if closing:
            await asyncio.wait(closing, timeout=self.patience.connect_s)

    async def _connection(self) -> tuple[Connection, bool]:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection, True
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.patience.connect_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self), self.target.host, self.target.port, ssl=self._tls
                )
        except TimeoutError as error:
            raise Failed("connect", f"no connection within {self.patience.connect_s:g} s") from error
        except (OSError, UnicodeError) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise Failed("connect", said) from error
        self.n_connected += 1
        return connection, False

    def opened(self, connection: Connection) -> None:
        self._open.add(connection)

    def kept(self, connection: Connection) -> None:
        """An answer has ended and the connection can serve another."""
        self._idle.append(connection)

    def lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


class Connection(asyncio.Protocol):
    """One socket. It carries one answer at a time; :meth:`exchange` returns when the answer is complete."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._reply: asyncio.Future[Reply] | None = None
        self._receive: Receive | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._silence_s = 0.0
        self._heard_s = 0.0
        self._now_s = 0.0

    @property
    def is_usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, head: bytes, body: bytes, receive: Receive | None, silence_s: float) -> Reply:
        """Send one request and wait for its answer. Raises ``Failed``, or ``_Stale`` if not one byte came back."""
        if self._transport is None or self._transport.is_closing():
            raise _Stale
        self._reply = self._loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._receive = receive
        self._status = 0
        self._headers: dict[str, str] = {}
        self._n_header = 0
        self._body = bytearray()
        self._in_body = False
        self._heard = False
        self._silence_s = silence_s
        self._heard_s = self._loop.time()
        self._timer = self._loop.call_later(silence_s, self._check_silence)
        if len(body) <= ONE_WRITE_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        try:
            return await self._reply
        except asyncio.CancelledError:
            self.abort()
            raise

    def abort(self) -> None:
        """Close at once, whatever is in flight."""
        self._stop_timer()
        if self._transport is not None:
            self._transport.abort()

    # What asyncio says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"a stream is needed, got {transport!r}")
        self._transport = transport
        self._client.opened(self)

    def data_received(self, data: bytes) -> None:
        self._now_s = self._client.clock.now_s()
        self._heard_s = self._loop.time()
        parser = self._parser
        if parser is None:  # bytes that nobody has asked for: what follows cannot be told from them
            self.abort()
            return
        self._heard = True
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(Failed("not HTTP", f"the server's bytes are no HTTP answer ({error})"))
            return
        if not self._in_body and self._parser is parser:
            self._n_header += len(data)
            if self._n_header > HEADER_BYTES:
                self._fail(Failed("not HTTP", f"the answer's header exceeds {HEADER_BYTES} bytes"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._client.lost(self)
        if not self.closed.done():
            self.closed.set_result(None)
        if self._parser is None or self._reply is None or self._reply.done():
            return
        if not self._heard:
            self._reply.set_exception(_Stale())
        elif self._in_body and exc is None and not self._is_framed():
            self._end_message(keep=False)  # such an answer ends where the connection does
        else:
            said = f"the connection was reset ({exc})" if exc else "the connection ended in the middle of the answer"
            self._fail(Failed("broken stream", said))

    # What the parser says. Nothing may be raised through it: it would come out as another error.

    def on_message_begin(self) -> None:
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._parser is not None:
            self._status = self._parser.get_status_code()
            self._in_body = self._status >= 200

    def on_body(self, body: bytes) -> None:
        if self._receive is None or not self._is_stream():
            self._body += body[: self._client.body_bytes - len(self._body)]
            return
        if self._reply is None or self._reply.done():
            return
        try:
            is_complete = self._receive(body, self._now_s)
        except Failed as failed:
            self._fail(failed)
            return
        if is_complete:
            self._reply.set_result(Reply(self._status, self._headers))
            self._stop_timer()
            self._timer = self._loop.call_later(DRAIN_S, self.abort)

    def on_message_complete(self) -> None:
        if self._in_body:  # not for an interim answer, 100 Continue
            self._end_message(keep=self._is_framed())

    # Inside.

    def _is_stream(self) -> bool:
        return self._status == 200 and self._headers.get("content-type", "").lower().startswith("text/event-stream")

    def _is_framed(self) -> bool:
        """Whether the answer says where it ends; otherwise it ends with the connection."""
        return "content-length" in self._headers or "transfer-encoding" in self._headers or self._status in (204, 304)

    def _end_message(self, *, keep: bool) -> None:
        parser, self._parser = self._parser, None
        self._stop_timer()
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(Reply(self._status, self._headers, bytes(self._body)))
        if self._transport is None or self._transport.is_closing() or parser is None:
            return
        # A request that is still being written was refused early; its rest would be taken for the next one.
        if keep and parser.should_keep_alive() and not self._transport.get_write_buffer_size():
            self._client.kept(self)
        else:
            self._transport.close()

    def _fail(self, failed: Failed) -> None:
        self._parser = None
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(failed)
        self.abort()

    def _check_silence(self) -> None:
        left_s = self._heard_s + self._silence_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check_silence)
        else:
            self._fail(Failed("timeout", f"the server said nothing for {self._silence_s:g} s"))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Events:
    """Cuts a stream into events. Lines end in LF or CRLF; comments and fields other than ``data`` say nothing here."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[bytes] = []
        self._n_data = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that ``piece`` completes. Raises ``Failed`` for one that is too large."""
        *lines, rest = piece.split(b"\n")
        found = []
        for line in lines:
            self._line += line
            whole, self._line = bytes(self._line).removesuffix(b"\r"), bytearray()
            if not whole:
                if self._data:
                    found.append(b"\n".join(self._data))
                self._data, self._n_data = [], 0
            elif whole.startswith(b"data:"):
                self._data.append(whole[5:].removeprefix(b" "))
                self._n_data += len(whole)
        self._line += rest
        if self._n_data + len(self._line) > EVENT_BYTES:
            raise Failed("bad event", f"one event exceeds {EVENT_BYTES} bytes")
        return found
