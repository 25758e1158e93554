"""Anthropic's Messages API: ``/v1/messages`` and ``/v1/messages/count_tokens``, text only.

Order of a stream: ``message_start``, one content block (``content_block_start``, its deltas, ``content_block_stop``),
``message_delta`` with the reason and the usage, ``message_stop``; or, at any point, one ``error``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from tenon.base.errors import RequestError, TenonError
from tenon.engine.params import SamplingParams
from tenon.engine.structure import Structure
from tenon.server.completions import Answer
from tenon.server.failures import status_of
from tenon.server.flights import Job
from tenon.server.limits import Limits
from tenon.server.protocol import check_count, convert, json_object, without_not_yet
from tenon.server.responses import Head, Json, line_safe
from tenon.server.structured import of_format

PATH: Final = "/v1/messages"
COUNT_PATH: Final = "/v1/messages/count_tokens"

NOT_YET: Final[dict[str, tuple[Any, ...]]] = {
    "tools": (None, []),
    "tool_choice": (None, {"type": "none"}),
    "thinking": (None, {"type": "disabled"}),
    "service_tier": (None, "auto", "standard_only"),
    "container": (None,),
    "mcp_servers": (None, []),
    "context_management": (None,),
}
"""Fields of the API that are not implemented, with the values that ask for nothing."""

_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


class TextBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``cache_control`` asks for what happens anyway: every prompt is cached."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    citations: list[Any] | None = None


Content = str | list[TextBlock]


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant"]
    content: Content


class Conversation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take."""

    model: str
    messages: list[Turn]
    system: Content | None = None

    def flat(self) -> list[dict[str, str]]:
        """What a chat template sees. Raises ``RequestError`` where the last turn is the model's own."""
        if self.messages[-1].role != "user":
            said = "the last message must be the user's: an answer that is begun by the client is not continued here"
            raise RequestError(said, param="messages", code="unsupported")
        system = [] if self.system is None else [{"role": "system", "content": _text(self.system)}]
        return system + [{"role": turn.role, "content": _text(turn.content)} for turn in self.messages]


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: dict[str, Any] | None = None


class MessagesRequest(Conversation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None
    """What ``output_config.format`` was called first."""

    def _structure(self) -> Structure | None:
        later = of_format(self.output_config.format, "output_config.format") if self.output_config else None
        return later or of_format(self.output_format, "output_format")

    def params(self, defaults: dict[str, float | int], seed: int) -> SamplingParams:
        """Over the model's own defaults. Raises ``RequestError`` naming the field."""
        wishes: dict[str, Any] = dict(defaults)
        wishes |= {
            name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(self, name)) is not None
        }
        try:
            return SamplingParams(
                **wishes, max_tokens=self.max_tokens, stop=tuple(self.stop_sequences or ()), seed=seed,
                structure=self._structure(),
            )  # fmt: skip
        except RequestError as error:
            if error.param == "stop":
                raise RequestError(
                    str(error).replace("stop", "stop_sequences", 1), param="stop_sequences", code=error.code
                ) from error
            raise


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def parse_messages(body: bytes, limits: Limits) -> MessagesRequest:
    """Raises ``RequestError`` naming the field."""
    return convert(_raw(body, limits), MessagesRequest)


def parse_count(body: bytes, limits: Limits) -> Conversation:
    """Raises ``RequestError`` naming the field."""
    return convert(_raw(body, limits), Conversation)


def _raw(body: bytes, limits: Limits) -> dict[str, Any]:
    raw = without_not_yet(json_object(body), NOT_YET, "")
    check_count(raw, "messages", limits)
    return raw


def error_json(error: TenonError) -> Json:
    """A failure in this API's shape."""
    kind = _TYPES.get(status_of(error), "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def _event(kind: str, **fields: Any) -> bytes:
    data = line_safe(msgspec.json.encode({"type": kind} | fields))
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)


@dataclass(frozen=True)
class MessageAnswer:
    """An accepted request, told as a message."""

    answer: Answer
    head: Head

    @property
    def job(self) -> Job:
        return self.answer.job

    def _usage(self) -> Json:
        usage = self.answer.usage()
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion_tokens,
        }

    def _message(self, text: str | None, reason: str | None) -> Json:
        stop = self.answer.outputs[0].stop
        return {
            "id": self.head.id,
            "type": "message",
            "role": "assistant",
            "model": self.head.model,
            "content": [] if text is None else [{"type": "text", "text": text}],
            "stop_reason": None if reason is None else _stop_reason(reason, stop),
            "stop_sequence": stop,
            "usage": self._usage(),
        }

    async def whole(self) -> Json:
        """The answer in one piece. Raises what the request failed with."""
        text, reason = [], None
        async for _, piece in self.answer.pieces():
            text.append(piece.text)
            reason = piece.finish_reason or reason
        return self._message("".join(text), reason)

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; one terminal: ``message_stop`` or ``error``."""
        yield _event("message_start", message=self._message(None, None))
        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        reason = ""
        try:
            async for _, piece in self.answer.pieces():
                if piece.text:
                    yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece.text})
                reason = piece.finish_reason or reason
        except TenonError as error:
            yield _event("error", error=error_json(error)["error"])
            return
        stop = self.answer.outputs[0].stop
        yield _event("content_block_stop", index=0)
        ending = {"stop_reason": _stop_reason(reason, stop), "stop_sequence": stop}
        yield _event("message_delta", delta=ending, usage=self._usage())
        yield _event("message_stop")


def _stop_reason(reason: str, stop: str | None) -> str:
    if reason == "length":
        return "max_tokens"
    return "end_turn" if stop is None else "stop_sequence"
