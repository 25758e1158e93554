"""What clients get: chunks and whole answers of both endpoints, in OpenAI's shapes.

A *face* turns pieces of text into one endpoint's objects; the loops that stream or collect know no endpoint. Order
of a stream: an opening chunk per choice (chat: its role), contents, a chunk with ``finish_reason`` per choice, then
``choices: []`` with usage where asked for, then ``[DONE]``. After an error event nothing follows.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from tenon.server.text import Echo, Piece, TokenLogprob

Json = dict[str, Any]
DONE: Final = b"data: [DONE]\n\n"
_SEPARATORS: Final = [(chr(code).encode(), rb"\u%04x" % code) for code in (0x85, 0x2028, 0x2029)]


@dataclass(frozen=True)
class Usage:
    """Tokens of one HTTP request, over all its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0
    slo: Json | None = None
    """What came of what its first prompt was promised, if anything was."""

    def promised(self) -> Json:
        """As a part of the usage in any API."""
        return {} if self.slo is None else {"slo": self.slo}

    def to_json(self) -> Json:
        """While it goes on: of ``slo`` there is nothing to say yet."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }

    def at_end(self) -> Json:
        """Once all has come."""
        return self.to_json() | self.promised()


@dataclass
class Call:
    """A call of a tool as it comes together."""

    name: str
    arguments: list[str]


@dataclass
class Collected:
    """A choice as it comes together for an answer in one piece."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    reasoning: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.reasoning.append(piece.reasoning)
        for part in piece.calls:
            if part.name is not None:
                self.calls.append(Call(part.name, []))
            self.calls[part.index].arguments.append(part.arguments)
        self.logprobs.extend(piece.logprobs)
        self.finish_reason = piece.finish_reason or self.finish_reason

    def mean_logprob(self) -> float:
        """Per token; of nothing, what is less than any."""
        known = [entry.logprob for entry in self.logprobs if entry.logprob is not None]
        return sum(known) / len(known) if known else -math.inf


@dataclass(frozen=True)
class Head:
    """What every object of one response repeats."""

    id: str
    created: int
    model: str


class TokenTexts(Protocol):
    """Names tokens in log-probabilities."""

    def token_text(self, token: int) -> str: ...

    def token_bytes(self, token: int) -> bytes: ...


class Face(Protocol):
    """One endpoint's objects."""

    def opening(self, choice: int) -> Json | None:
        """The choice's first chunk, before any token."""
        ...

    def content(self, choice: int, piece: Piece) -> Json: ...

    def finish(self, choice: int, reason: str) -> Json: ...

    def choice(self, choice: int, collected: Collected) -> Json:
        """The whole choice for an answer in one piece."""
        ...

    def wrap(self, choices: list[Json], *, chunk: bool) -> Json: ...

    def add_prompts(self, answer: Json, echoes: Sequence[Echo]) -> None:
        """Put the prompts' log-probabilities into the whole answer, as vLLM does."""
        ...


class ChatFace:
    """``chat.completion`` and its chunks."""

    def __init__(self, head: Head, texts: TokenTexts, *, logprobs: bool, id_length: int | None = None) -> None:
        """``id_length``: of the ids of calls, where the model's template insists on one."""
        self._head, self._texts, self._logprobs, self._id_length = head, texts, logprobs, id_length

    def opening(self, choice: int) -> Json | None:
        return self._chunk(choice, {"role": "assistant", "content": ""})

    def content(self, choice: int, piece: Piece) -> Json:
        delta: Json = {"content": piece.text} if piece.text or not (piece.reasoning or piece.calls) else {}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.calls:
            delta["tool_calls"] = [
                {"index": part.index, "function": {"arguments": part.arguments}}
                if part.name is None
                else {"index": part.index, "id": self.call_id(), "type": "function"}
                | {"function": {"name": part.name, "arguments": part.arguments}}
                for part in piece.calls
            ]
        return self._chunk(choice, delta, logprobs=piece.logprobs)

    def call_id(self) -> str:
        """A new one."""
        return secrets.token_hex(16)[: self._id_length] if self._id_length else f"call_{secrets.token_hex(12)}"

    def finish(self, choice: int, reason: str) -> Json:
        return self._chunk(choice, {}, reason=reason)

    def choice(self, choice: int, collected: Collected) -> Json:
        text = "".join(collected.text)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if any(collected.reasoning):
            message["reasoning_content"] = "".join(collected.reasoning)
        if collected.calls:
            message["content"] = text or None
            message["tool_calls"] = [
                {"id": self.call_id(), "type": "function"}
                | {"function": {"name": call.name, "arguments": "".join(call.arguments)}}
                for call in collected.calls
            ]
        return {
            "index": choice,
            "message": message,
            "logprobs": self._logprobs_json(collected.logprobs) if self._logprobs else None,
            "finish_reason": collected.finish_reason,
        }

    def wrap(self, choices: list[Json], *, chunk: bool) -> Json:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        return _wrap(self._head, kind, choices)

    def add_prompts(self, answer: Json, echoes: Sequence[Echo]) -> None:
        answer["prompt_logprobs"] = _prompt_json(echoes[0], self._texts)

    def _chunk(
        self, choice: int, delta: Json, *, logprobs: Sequence[TokenLogprob] = (), reason: str | None = None
    ) -> Json:
        return {
            "index": choice,
            "delta": delta,
            "logprobs": self._logprobs_json(logprobs) if logprobs else None,
            "finish_reason": reason,
        }

    def _logprobs_json(self, logprobs: Sequence[TokenLogprob]) -> Json:
        return {
            "content": [
                self._token(entry.id, entry.logprob) | {"top_logprobs": [self._token(i, lp) for i, lp in entry.top]}
                for entry in logprobs
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float | None) -> Json:
        return {
            "token": self._texts.token_text(token),
            "logprob": logprob,
            "bytes": list(self._texts.token_bytes(token)),
        }


def _prompt_json(echo: Echo, texts: TokenTexts) -> list[Json | None]:
    """For each token null, if it is the first, or by id: its own log-probability, then the best of its place."""

    def entry(token: int, logprob: float | None, rank: int) -> Json:
        return {"logprob": logprob, "rank": rank, "decoded_token": texts.token_text(token)}

    found: list[Json | None] = []
    for scored, rank in zip(echo.logprobs, (0, *echo.ranks), strict=True):
        if scored.logprob is None:
            found.append(None)
            continue
        best = {str(token): entry(token, logprob, i) for i, (token, logprob) in enumerate(scored.top, 1)}
        own = str(scored.id)
        found.append({own: entry(scored.id, scored.logprob, rank)} | {k: v for k, v in best.items() if k != own})
    return found


class CompletionFace:
    """``text_completion``, whole and in chunks. ``echo``: per prompt, what comes before its ``n`` outputs."""

    def __init__(self, head: Head, texts: TokenTexts, *, logprobs: bool, n: int, echo: Sequence[Echo] = ()) -> None:
        self._head, self._texts, self._logprobs, self._n, self._echo = head, texts, logprobs, n, echo

    def opening(self, choice: int) -> Json | None:
        echo = self._echoed(choice)
        return self._choice(choice, echo.text, echo.logprobs, None) if echo is not None else None

    def content(self, choice: int, piece: Piece) -> Json:
        return self._choice(choice, piece.text, piece.logprobs, None)

    def finish(self, choice: int, reason: str) -> Json:
        return self._choice(choice, "", (), reason)

    def choice(self, choice: int, collected: Collected) -> Json:
        text, logprobs, echo = "".join(collected.text), collected.logprobs, self._echoed(choice)
        if echo is not None:
            text, logprobs = echo.text + text, [*echo.logprobs, *logprobs]
        return self._choice(choice, text, logprobs, collected.finish_reason, whole=True)

    def wrap(self, choices: list[Json], *, chunk: bool) -> Json:
        return _wrap(self._head, "text_completion", choices)

    def add_prompts(self, answer: Json, echoes: Sequence[Echo]) -> None:
        for choice in answer["choices"]:
            choice["prompt_logprobs"] = _prompt_json(echoes[choice["index"] // self._n], self._texts)

    def _echoed(self, choice: int) -> Echo | None:
        return self._echo[choice // self._n] if self._echo else None

    def _choice(
        self, choice: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None, *, whole: bool = False
    ) -> Json:
        wanted = self._logprobs and (whole or bool(logprobs))
        return {
            "index": choice,
            "text": text,
            "logprobs": self._logprobs_json(choice, logprobs) if wanted else None,
            "finish_reason": reason,
        }

    def _logprobs_json(self, choice: int, logprobs: Sequence[TokenLogprob]) -> Json:
        name = self._texts.token_text
        echo = self._echoed(choice)
        start = 0 if echo is None else len(echo.text)
        return {
            "tokens": [name(entry.id) for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [
                None
                if entry.logprob is None
                else {name(i): logprob for i, logprob in (*entry.top, (entry.id, entry.logprob))}
                for entry in logprobs
            ],
            "text_offset": [start + entry.offset for entry in logprobs],
        }


def sse(value: Any) -> bytes:
    """One server-sent event: one line by any reading, for many clients end lines at U+0085, U+2028 and U+2029 too."""
    return b"data: " + line_safe(msgspec.json.encode(value)) + b"\n\n"


def line_safe(data: bytes) -> bytes:
    """JSON that no client takes for several lines."""
    for separator, escaped in _SEPARATORS:
        data = data.replace(separator, escaped)
    return data


def stream_chunk(face: Face, choice: Json, usage: Callable[[], Json | None] | None) -> bytes:
    """One chunk; ``usage`` gives its usage field, ``None`` where the client asked for none at all."""
    chunk = face.wrap([choice], chunk=True)
    return sse(chunk if usage is None else chunk | {"usage": usage()})


def _wrap(head: Head, kind: str, choices: list[Json]) -> Json:
    return {"id": head.id, "object": kind, "created": head.created, "model": head.model, "choices": choices}
