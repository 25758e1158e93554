"""OpenAI's Responses API, stateless: ``/v1/responses``.

Nothing is stored: a conversation is sent whole each time. Order of a stream: ``response.created``,
``response.in_progress``, the items one after another (a thought, a message, calls: ``output_item.added``, what there is
to each kind, ``output_item.done``), then ``response.completed`` or ``response.incomplete``; or, at any point, ``error``
and ``response.failed``. Events are numbered.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from tenon.base.errors import RequestError, TenonError
from tenon.engine.params import SamplingParams
from tenon.server.completions import Answer, Said
from tenon.server.failures import body_of
from tenon.server.flights import Job
from tenon.server.limits import Limits
from tenon.server.protocol import ROLES, FunctionCall, ToolCall, check_count, convert, json_object, without_not_yet
from tenon.server.responses import Head, Json, line_safe
from tenon.server.slo import Wish
from tenon.server.speculative import Speculative, wished
from tenon.server.structured import of_format
from tenon.server.text import Piece
from tenon.server.tools import Dialect, Function, Tool, calling

PATH: Final = "/v1/responses"
_log = logging.getLogger("tenon.server")

NOT_YET: Final[dict[str, tuple[Any, ...]]] = {
    "store": (None, False),
    "previous_response_id": (None,),
    "conversation": (None,),
    "background": (None, False),
    "max_tool_calls": (None,),
    "include": (None, [], ["reasoning.encrypted_content"]),
    "prompt": (None,),
    "truncation": (None, "disabled"),
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


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="message"):
    """A message of the conversation, as a client sends it or as it got it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="function_call"):
    """A call that the model made, as it comes back."""

    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class CallOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="function_call_output"):
    call_id: str
    output: str | list[Part]
    id: str | None = None
    status: str | None = None


class ReasoningItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="reasoning"):
    """A thought of the model's, as it comes back."""

    id: str | None = None
    summary: list[dict[str, Any]] = []
    content: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        return "".join(str(part.get("text", "")) for part in self.content or ())


AnyItem = Item | CallItem | CallOutput | ReasoningItem


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    type: Literal["function"] = "function"
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ReasoningConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = None


def _flat(items: Sequence[AnyItem]) -> list[dict[str, Any]]:
    """As templates see them: a thought, a message and calls that follow one another are one message."""
    messages: list[dict[str, Any]] = []
    thought = ""
    for i, item in enumerate(items):
        match item:
            case ReasoningItem():
                thought += item.text
            case CallOutput():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)})
            case Item():
                said: dict[str, Any] = {"role": ROLES[item.role], "content": _joined(item.content)}
                if thought and item.role == "assistant":
                    said["reasoning_content"] = thought
                thought = ""
                messages.append(said)
            case CallItem():
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                    if thought:
                        messages[-1]["reasoning_content"] = thought
                thought = ""
                call = ToolCall(FunctionCall(item.name, item.arguments), item.call_id).flat(f"input[{i}]")
                messages[-1].setdefault("tool_calls", []).append(call)
    return messages


def _joined(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class TextConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str
    input: str | list[AnyItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    speculative: bool | Speculative | None = None
    slo: Wish | None = None
    service_tier: str | None = None
    priority: int | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None

    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None

    def said(self, dialect: Dialect | None) -> Said:
        """What a chat template sees. Raises ``RequestError`` for tools that cannot be had."""
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        said = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else _flat(self.input)
        tools = [
            Tool("function", Function(tool.name, tool.description, tool.parameters, tool.strict))
            for tool in self.tools or ()
        ]
        effort = self.reasoning.effort if self.reasoning is not None else None
        variables = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        asked = calling(tools, self.tool_choice, self.parallel_tool_calls, dialect)
        return Said([*system, *said], asked, variables)

    def params(self, defaults: dict[str, float | int], seed: int) -> SamplingParams:
        """Over the model's own defaults. Raises ``RequestError`` naming the field."""
        wishes: dict[str, Any] = dict(defaults)
        wishes |= {name: value for name in WISHES if (value := getattr(self, name)) is not None}
        wishes |= wished(self.speculative)
        try:
            structure = of_format(self.text.format, "text.format") if self.text is not None else None
            return SamplingParams(**wishes, max_tokens=self.max_output_tokens, seed=seed, structure=structure)
        except RequestError as error:
            if error.param != "max_tokens":
                raise
            said = str(error).replace("max_tokens", "max_output_tokens", 1)
            raise RequestError(said, param="max_output_tokens", code=error.code) from error


def parse_responses(body: bytes, limits: Limits) -> ResponsesRequest:
    """Raises ``RequestError`` naming the field."""
    raw = without_not_yet(json_object(body), NOT_YET, "")
    check_count(raw, "input", limits)
    if isinstance(raw.get("input"), list):
        raw["input"] = [{"type": "message"} | item if isinstance(item, dict) else item for item in raw["input"]]
    if isinstance(raw.get("tools"), list):
        foreign = [tool for tool in raw["tools"] if isinstance(tool, dict) and tool.get("type") != "function"]
        if foreign:  # agents declare what their usual provider runs for them, and go on without it
            _log.warning("tools of type %s are not run here and are left out", {str(t.get("type")) for t in foreign})
            raw["tools"] = [tool for tool in raw["tools"] if tool not in foreign]
    return convert(raw, ResponsesRequest)


class _Outputs:
    """Items of an answer as they come, one after another, and the events that tell of them."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self.items: list[Json] = []
        self._open: Json | None = None

    def take(self, piece: Piece) -> list[Json]:
        """Events of what a piece adds."""
        events: list[Json] = []
        if piece.reasoning:
            events += self._to("reasoning") + self._add("reasoning_text", piece.reasoning)
        if piece.text:
            events += self._to("message") + self._add("output_text", piece.text)
        for part in piece.calls:
            if part.name is not None:
                events += self._begin_call(part.name)
            if part.arguments and self._open is not None:
                self._open["arguments"] += part.arguments
                events.append(self._at("function_call_arguments.delta", delta=part.arguments))
        return events

    def end(self, status: str) -> list[Json]:
        """Events of the end; an answer without any item has an empty message."""
        return (self._to("message") if not self.items else []) + self._close(status)

    def _to(self, kind: str) -> list[Json]:
        if self._open is not None and self._open["type"] == kind:
            return []
        events = self._close("completed")
        part = {"type": "reasoning_text", "text": ""} if kind == "reasoning" else _text_part("")
        if kind == "reasoning":
            item = {"type": kind, "id": f"rs_{self._suffix}_{len(self.items)}", "summary": [], "content": []}
        else:
            item = {"type": kind, "id": f"msg_{self._suffix}_{len(self.items)}", "role": "assistant", "content": []}
        return events + self._begin(item) + [self._at("content_part.added", content_index=0, part=part)]

    def _begin_call(self, name: str) -> list[Json]:
        events, call = self._close("completed"), f"call_{secrets.token_hex(12)}"
        item = {"type": "function_call", "id": f"fc_{self._suffix}_{len(self.items)}", "call_id": call, "name": name}
        return events + self._begin(item | {"arguments": ""})

    def _begin(self, item: Json) -> list[Json]:
        self._open = item | {"status": "in_progress"}
        self.items.append(self._open)
        return [{"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(self._open)}]

    def _add(self, kind: str, text: str) -> list[Json]:
        if self._open is None:
            return []
        if not self._open["content"]:
            part = _text_part("") if kind == "output_text" else {"type": kind, "text": ""}
            self._open["content"] = [part]
        self._open["content"][0]["text"] += text
        more: Json = {"logprobs": []} if kind == "output_text" else {}
        return [self._at(f"{kind}.delta", content_index=0, delta=text, **more)]

    def _close(self, status: str) -> list[Json]:
        item, events = self._open, list[Json]()
        if item is None:
            return events
        if item["type"] == "function_call":
            events.append(self._at("function_call_arguments.done", arguments=item["arguments"], name=item["name"]))
        else:
            kind = "reasoning_text" if item["type"] == "reasoning" else "output_text"
            part = item["content"][0] if item["content"] else _text_part("")
            item["content"] = [part]
            more: Json = {"logprobs": []} if kind == "output_text" else {}
            events.append(self._at(f"{kind}.done", content_index=0, text=part["text"], **more))
            events.append(self._at("content_part.done", content_index=0, part=part))
        item["status"], index = status, len(self.items) - 1
        events.append({"type": "response.output_item.done", "output_index": index, "item": dict(item)})
        self._open = None
        return events

    def _at(self, kind: str, **fields: Any) -> Json:
        where = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}"} | where | fields


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


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

    def _response(self, status: str, *, output: Sequence[Json] = (), error: Json | None = None) -> Json:
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
            "output": list(output),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "store": False,
            "temperature": self.params.temperature,
            "text": {"format": (asked.text and asked.text.format) or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [msgspec.to_builtins(tool) for tool in asked.tools or ()],
            "top_p": self.params.top_p,
            "truncation": "disabled",
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            }
            | usage.promised()
            if ended
            else None,
            "user": asked.user,
        }

    async def whole(self) -> Json:
        """The answer in one piece. Raises what the request failed with."""
        outputs, reason = _Outputs(self._suffix), ""
        async for _, piece in self.answer.pieces():
            outputs.take(piece)
            reason = piece.finish_reason or reason
        outputs.end(_status(reason))
        return self._response(_status(reason), output=outputs.items)

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; the last is ``response.completed``, ``response.incomplete`` or ``response.failed``."""
        yield self._event({"type": "response.created", "response": self._response("in_progress")})
        yield self._event({"type": "response.in_progress", "response": self._response("in_progress")})
        outputs, reason = _Outputs(self._suffix), ""
        try:
            async for _, piece in self.answer.pieces():
                for event in outputs.take(piece):
                    yield self._event(event)
                reason = piece.finish_reason or reason
        except TenonError as error:
            said = body_of(error)["error"]
            named = {"code": said["code"], "message": said["message"], "param": said["param"]}
            yield self._event({"type": "error"} | named)
            failure = {"code": "server_error", "message": said["message"]}
            yield self._event({"type": "response.failed", "response": self._response("failed", error=failure)})
            return
        status = _status(reason)
        for event in outputs.end(status):
            yield self._event(event)
        yield self._event({"type": f"response.{status}", "response": self._response(status, output=outputs.items)})

    @property
    def _suffix(self) -> str:
        """What the ids of items share."""
        return self.head.id.partition("-")[2]

    def _event(self, event: Json) -> bytes:
        data = line_safe(msgspec.json.encode(event | {"sequence_number": self._number}))
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (str(event["type"]).encode(), data)


def _status(reason: str) -> str:
    return "incomplete" if reason == "length" else "completed"
