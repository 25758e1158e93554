"""One answer of an OpenAI-compatible server, as it streams in: when its tokens came, why it ended, what was wrong.

Tokens are counted by the server's ``usage``, chunks by their arrival. A chunk may hold several tokens, and a token may
have no text to show. Where each chunk carries usage, every token's time is exact; where only the last one does and the
two counts differ, the tokens are spread over the chunks evenly: first and last keep their times, those between are
estimates.
"""

from __future__ import annotations

from array import array
from typing import Any, Final

import msgspec
import numpy as np

from tenon.workloads.streaming import Events, Failed, Reply

MESSAGE_CHARS: Final = 200
SPARE_CHUNKS: Final = 1024
"""An answer may have this many chunks or tokens, and 16 for each that was asked for, before it is cut off."""


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    object: str | None = None
    message: str | None = None


_chunk = msgspec.json.Decoder(_Chunk)


class Answer:
    """The stream that answers a request for ``asked`` tokens. Stamps are the clock's, as given to :meth:`receive`."""

    def __init__(self, asked: int, *, keep_text: bool = False) -> None:
        self._events = Events()
        self._most = 16 * asked + SPARE_CHUNKS
        self._keep_text = keep_text
        self._is_done = False
        self._marks: list[tuple[float, int]] = []
        """(stamp, tokens so far) of chunks that say so."""
        self._n_unmarked = 0
        self.chunk_s = array("d")
        """Stamps of chunks that bring text."""
        self.text: list[str] = []
        self.finish_reason = ""
        self.n_prompt = 0
        self.cached_tokens = 0
        self.n_output: int | None = None
        self.end_s: float | None = None

    def receive(self, piece: bytes, now_s: float) -> bool:
        """Take a piece of the stream; true once ``[DONE]`` has come. Raises ``Failed`` for what is no answer."""
        for data in self._events.feed(piece):
            self.end_s = now_s
            if data == b"[DONE]":
                self._is_done = True
                return True
            try:
                chunk = _chunk.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise Failed("bad event", f"{error} in {data[:80]!r}") from error
            self._take(chunk, now_s)
        return False

    def verdict(self, reply: Reply) -> str:
        """What is wrong with the answer as it stands, "" for nothing."""
        if reply.status != 200:
            return f"http {reply.status}: {message_of(reply.body)}{_retry(reply.headers)}"
        if self.end_s is None and reply.body:
            kind = reply.headers.get("content-type", "nothing named")
            return f"not a stream: the answer is {kind}"
        if not (self._is_done or self.finish_reason):
            return "broken stream: it ended without [DONE] or a reason to finish"
        return ""

    @property
    def is_spread(self) -> bool:
        """Whether the tokens' times within the stream are an estimate."""
        return bool(self.n_output and self._n_unmarked) and self.n_output != len(self.chunk_s)

    def token_stamps(self) -> list[float]:
        """When each token came, in order."""
        if self._marks and not self._n_unmarked:
            counts = np.diff([0, *(count for _, count in self._marks)])
            stamps: list[float] = np.repeat([stamp for stamp, _ in self._marks], counts).tolist()
            return stamps
        n, n_chunks = self.n_output or len(self.chunk_s), len(self.chunk_s)
        if n == n_chunks:
            return self.chunk_s.tolist()
        # Token i of n falls on chunk i (chunks - 1) / (n - 1), rounded.
        last = max(n - 1, 1)
        return [self.chunk_s[(2 * i * (n_chunks - 1) + last) // (2 * last)] for i in range(n)]

    def _take(self, chunk: _Chunk, now_s: float) -> None:
        if chunk.error is not None or chunk.object == "error":
            said = chunk.error.get("message") if isinstance(chunk.error, dict) else chunk.error
            raise Failed("server error", str(said or chunk.message or "without a message"))
        has_text = False
        for choice in chunk.choices or ():
            delta = choice.delta or _NO_DELTA
            text = choice.text or delta.content
            has_text |= bool(text or delta.reasoning_content or delta.reasoning or delta.tool_calls)
            self.finish_reason = choice.finish_reason or self.finish_reason
            if text and self._keep_text:
                self.text.append(text)
        if has_text:
            self.chunk_s.append(now_s)
        if chunk.usage is not None and chunk.usage.completion_tokens is not None:
            self._take_usage(chunk.usage, chunk.usage.completion_tokens, now_s)
        elif has_text:
            self._n_unmarked += 1
        if len(self.chunk_s) > self._most:
            raise Failed("bad event", f"more than {self._most} chunks, far beyond what was asked for")

    def _take_usage(self, usage: _Usage, n_output: int, now_s: float) -> None:
        before = self.n_output or 0
        if not before <= n_output <= self._most:
            raise Failed("bad event", f"usage counts {n_output} tokens after {before}, at most {self._most} make sense")
        self.n_output = n_output
        if n_output > before:
            self._marks.append((now_s, n_output))
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None
        self.n_prompt, self.cached_tokens = _count(usage.prompt_tokens), _count(cached)


def _count(tokens: int | None) -> int:
    """A count that may be missing. Raises ``Failed`` for one that no context has room for."""
    if tokens is not None and not 0 <= tokens < 2**40:
        raise Failed("bad event", f"usage counts {tokens} tokens of the prompt")
    return tokens or 0


_NO_DELTA: Final = _Delta()


class _Said(msgspec.Struct):
    error: Any = None
    message: Any = None
    detail: Any = None


def message_of(body: bytes) -> str:
    """What an error's body says, in any of the shapes that servers give it."""
    try:
        said = msgspec.json.decode(body, type=_Said)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:MESSAGE_CHARS].decode("utf-8", "replace") or "without a message"
    inner = said.error.get("message") if isinstance(said.error, dict) else said.error
    return str(inner or said.message or said.detail or "without a message")


def _retry(headers: dict[str, str]) -> str:
    after = headers.get("retry-after")
    return f" (retry after {after} s)" if after else ""
