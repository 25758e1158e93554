"""OpenAI's Responses API, stateless: ``/v1/responses`` with text in and text out.

Nothing is stored: a conversation is sent whole each time. Order of a stream: ``response.created``,
``response.in_progress``, the one message (``output_item.added``, ``content_part.added``, its ``output_text.delta``s,
``output_text.done``, ``content_part.done``, ``output_item.done``), then ``response.completed`` or
``response.incomplete``; or, at any point, ``error`` and ``response.failed``. Events are numbered.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from tenon.base.errors import RequestError, TenonError
from tenon.engine.params import SamplingParams
from tenon.server.completions import Answer
from tenon.server.failures import body_of
from tenon.server.flights import Job
from tenon.server.limits import Limits
from tenon.server.protocol import ROLES, check_count, convert, json_object, without_not_yet
from tenon.server.responses import Head, Json, line_safe

PATH: Final = "/v1/responses"

NOT_YET: Final[dict[str, tuple[Any, ...]]] = {
    "store": (None, False),
    "previous_response_id": (None,),
    "conversation": (None,),
    "background": (None, False),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "max_tool_calls": (None,),
    "text": (None, {}, {"format": {"type": "text"}}),
    "reasoning": (None, {}),
    "include": (None, []),
    "prompt": (None,),
    "truncation": (None, "disabled"),
    "service_tier": (None, "auto", "default"),
    "top_logprobs": (None, 0),
    "prompt_cache_key": (None,),
    "prompt_cache_retention": (None,),
    "safety_identifier": (None,),
}
"""Fields of the API that are not implemented, with the values that ask for nothing."""

WISHES: Final = ("temperature", "top_p", "stop", "ignore_eos")
"""Fields that ``SamplingParams`` takes as they are; the API itself has no ``stop``, and clients that measure ask for an
exact length."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message of the conversation, as a client sends it or as it got it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None

    def flat(self) -> dict[str, str]:
        """What a chat template sees."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": ROLES[self.role], "content": text}


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None

    def flat(self) -> list[dict[str, str]]:
        """What a chat template sees."""
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            return [*system, {"role": "user", "content": self.input}]
        return system + [item.flat() for item in self.input]

    def params(self, defaults: dict[str, float | int], seed: int) -> SamplingParams:
        """Over the model's own defaults. Raises ``RequestError`` naming the field."""
        wishes: dict[str, Any] = dict(defaults)
        wishes |= {name: value for name in WISHES if (value := getattr(self, name)) is not None}
        try:
            return SamplingParams(**wishes, max_tokens=self.max_output_tokens, seed=seed)
        except RequestError as error:
            if error.param != "max_tokens":
                raise
            said = str(error).replace("max_tokens", "max_output_tokens", 1)
            raise RequestError(said, param="max_output_tokens", code=error.code) from error


def parse_responses(body: bytes, limits: Limits) -> ResponsesRequest:
    """Raises ``RequestError`` naming the field."""
    raw = without_not_yet(json_object(body), NOT_YET, "")
    check_count(raw, "input", limits)
    return convert(raw, ResponsesRequest)


@dataclass
class ResponseAnswer:
    """An accepted request, told as a response."""

    answer: Answer
    head: Head
    request: ResponsesRequest
    params: SamplingParams
    _number: int = field(default=0, init=False)
    """Of the next event."""

    @property
    def job(self) -> Job:
        return self.answer.job

    @property
    def _item_id(self) -> str:
        return self.head.id.replace("resp", "msg", 1)

    def _part(self, text: str) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, text: str | None, status: str) -> Json:
        content = [] if text is None else [self._part(text)]
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": content}

    def _response(self, status: str, *, text: str | None = None, error: Json | None = None) -> Json:
        asked, usage = self.request, self.answer.usage()
        ended = status in ("completed", "incomplete")
        return {
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.head.model,
            "output": [self._item(text, status)] if text is not None else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self.params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": self.params.top_p,
            "truncation": "disabled",
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            }
            if ended
            else None,
            "user": asked.user,
        }

    async def whole(self) -> Json:
        """The answer in one piece. Raises what the request failed with."""
        text, reason = [], ""
        async for _, piece in self.answer.pieces():
            text.append(piece.text)
            reason = piece.finish_reason or reason
        return self._response(_status(reason), text="".join(text))

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; the last is ``response.completed``, ``response.incomplete`` or ``response.failed``."""
        at = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        yield self._event("response.output_item.added", output_index=0, item=self._item(None, "in_progress"))
        yield self._event("response.content_part.added", **at, part=self._part(""))
        pieces, reason = [], ""
        try:
            async for _, piece in self.answer.pieces():
                if piece.text:
                    pieces.append(piece.text)
                    yield self._event("response.output_text.delta", **at, delta=piece.text, logprobs=[])
                reason = piece.finish_reason or reason
        except TenonError as error:
            said = body_of(error)["error"]
            yield self._event("error", code=said["code"], message=said["message"], param=said["param"])
            failure = {"code": "server_error", "message": said["message"]}
            yield self._event("response.failed", response=self._response("failed", error=failure))
            return
        text, status = "".join(pieces), _status(reason)
        yield self._event("response.output_text.done", **at, text=text, logprobs=[])
        yield self._event("response.content_part.done", **at, part=self._part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._item(text, status))
        yield self._event(f"response.{status}", response=self._response(status, text=text))

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = line_safe(msgspec.json.encode({"type": kind, "sequence_number": self._number} | fields))
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)


def _status(reason: str) -> str:
    return "incomplete" if reason == "length" else "completed"
