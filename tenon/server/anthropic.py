"""Anthropic's Messages API: ``/v1/messages`` and ``/v1/messages/count_tokens``, text only.

Order of a stream: ``message_start``, one content block (``content_block_start``, its deltas, ``content_block_stop``),
``message_delta`` with the reason and the usage, ``message_stop``; or, at any point, one ``error``.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from tenon.base.errors import RequestError, TenonError
from tenon.engine.params import SamplingParams
from tenon.engine.structure import Structure
from tenon.server.completions import Answer, Said
from tenon.server.failures import status_of
from tenon.server.flights import Job
from tenon.server.limits import Limits
from tenon.server.protocol import check_count, convert, json_object, without_not_yet
from tenon.server.responses import Collected, Head, Json, line_safe
from tenon.server.slo import Wish
from tenon.server.speculative import Speculative, wished
from tenon.server.structured import of_format
from tenon.server.tools import Calling, Dialect, Function, Tool, calling

PATH: Final = "/v1/messages"
COUNT_PATH: Final = "/v1/messages/count_tokens"

NOT_YET: Final[dict[str, tuple[Any, ...]]] = {
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


class TextBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    """``cache_control`` asks for what happens anyway: every prompt is cached."""

    text: str
    cache_control: dict[str, Any] | None = None
    citations: list[Any] | None = None


class ThinkingBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="thinking"):
    """A thought of the model's that comes back. Nothing is signed here."""

    thinking: str
    signature: str | None = None


class ToolUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None


class ToolResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None


Block = TextBlock | ThinkingBlock | ToolUse | ToolResult


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant"]
    content: str | list[Block]

    def flat(self) -> list[dict[str, Any]]:
        """As templates see it: results of tools are messages of their own, before what the user says besides."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        results = [
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content or "")}
            for block in self.content
            if isinstance(block, ToolResult)
        ]
        text = "".join(block.text for block in self.content if isinstance(block, TextBlock))
        if results and not text:
            return results
        said: dict[str, Any] = {"role": self.role, "content": text}
        if thought := "".join(block.thinking for block in self.content if isinstance(block, ThinkingBlock)):
            said["reasoning_content"] = thought
        calls = [
            {"type": "function", "id": block.id, "function": {"name": block.name, "arguments": block.input}}
            for block in self.content
            if isinstance(block, ToolUse)
        ]
        return [*results, said | ({"tool_calls": calls} if calls else {})]


class AnthropicTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None


class ToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class Conversation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take."""

    model: str
    messages: list[Turn]
    system: str | list[TextBlock] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    def said(self, dialect: Dialect | None) -> Said:
        """What a chat template sees. Raises ``RequestError`` where the last turn is the model's own, and for tools that
        cannot be had."""
        if self.messages[-1].role != "user":
            said = "the last message must be the user's: an answer that is begun by the client is not continued here"
            raise RequestError(said, param="messages", code="unsupported")
        system = [] if self.system is None else [{"role": "system", "content": _text(self.system)}]
        messages = system + [one for turn in self.messages for one in turn.flat()]
        variables = {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}
        return Said(messages, self._calling(dialect), variables)

    def _calling(self, dialect: Dialect | None) -> Calling | None:
        tools = [
            Tool("function", Function(tool.name, tool.description, tool.input_schema, tool.strict))
            for tool in self.tools or ()
        ]
        chosen = self.tool_choice
        if chosen is None:
            return calling(tools, None, None, dialect)
        choice: Any = {"auto": "auto", "any": "required", "none": "none", "tool": {"name": chosen.name}}[chosen.type]
        return calling(tools, choice, not chosen.disable_parallel_tool_use, dialect)


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
    speculative: bool | Speculative | None = None
    slo: Wish | None = None
    service_tier: str | None = None
    priority: int | None = None

    def _structure(self) -> Structure | None:
        later = of_format(self.output_config.format, "output_config.format") if self.output_config else None
        return later or of_format(self.output_format, "output_format")

    def params(self, defaults: dict[str, float | int], seed: int) -> SamplingParams:
        """Over the model's own defaults. Raises ``RequestError`` naming the field."""
        wishes: dict[str, Any] = dict(defaults)
        wishes |= {
            name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(self, name)) is not None
        }
        wishes |= wished(self.speculative)
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


def _text(content: str | list[TextBlock]) -> str:
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

    def _usage(self, *, ended: bool = True) -> Json:
        usage = self.answer.usage()
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion_tokens,
        } | (usage.promised() if ended else {})

    def _message(self, content: list[Json], reason: str | None) -> Json:
        stop = self.answer.outputs[0].stop
        return {
            "id": self.head.id,
            "type": "message",
            "role": "assistant",
            "model": self.head.model,
            "content": content,
            "stop_reason": None if reason is None else _stop_reason(reason, stop),
            "stop_sequence": stop,
            "usage": self._usage(ended=reason is not None),
        }

    async def whole(self) -> Json:
        """The answer in one piece. Raises what the request failed with."""
        collected = Collected()
        async for _, piece in self.answer.pieces():
            collected.add(piece)
        thought, text = "".join(collected.reasoning), "".join(collected.text)
        content: list[Json] = [{"type": "thinking", "thinking": thought, "signature": ""}] if thought else []
        content += [{"type": "text", "text": text}] if text or not collected.calls else []
        for call in collected.calls:
            arguments = "".join(call.arguments)
            try:
                given = msgspec.json.decode(arguments)
            except msgspec.DecodeError:  # cut off by max_tokens
                given = {}
            content.append({"type": "tool_use", "id": _call_id(), "name": call.name, "input": given})
        return self._message(content, collected.finish_reason)

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; one terminal: ``message_stop`` or ``error``."""
        yield _event("message_start", message=self._message([], None))
        blocks, reason = _Blocks(), ""
        try:
            async for _, piece in self.answer.pieces():
                if piece.reasoning:
                    started = blocks.to("thinking", thinking="", signature="")
                    yield started + blocks.delta("thinking_delta", thinking=piece.reasoning)
                if piece.text:
                    yield blocks.to("text", text="") + blocks.delta("text_delta", text=piece.text)
                for part in piece.calls:
                    if part.name is not None:
                        yield blocks.to("tool_use", anew=True, id=_call_id(), name=part.name, input={})
                    if part.arguments:
                        yield blocks.delta("input_json_delta", partial_json=part.arguments)
                reason = piece.finish_reason or reason
        except TenonError as error:
            yield _event("error", error=error_json(error)["error"])
            return
        stop = self.answer.outputs[0].stop
        yield blocks.end()
        ending = {"stop_reason": _stop_reason(reason, stop), "stop_sequence": stop}
        yield _event("message_delta", delta=ending, usage=self._usage())
        yield _event("message_stop")


class _Blocks:
    """Content blocks of a stream, one after another."""

    def __init__(self) -> None:
        self._index = -1
        self._kind = ""

    def to(self, kind: str, *, anew: bool = False, **fields: Any) -> bytes:
        """What it takes to be in a block of this kind: nothing, or the end of one and the start of the next."""
        if kind == self._kind and not anew:
            return b""
        ended = self._stop()
        self._index, self._kind = self._index + 1, kind
        start = _event("content_block_start", index=self._index, content_block={"type": kind} | fields)
        return ended + start

    def delta(self, kind: str, **fields: Any) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": kind} | fields)

    def end(self) -> bytes:
        """The last block's end; an answer without any has an empty text."""
        return (self.to("text", text="") if not self._kind else b"") + self._stop()

    def _stop(self) -> bytes:
        return _event("content_block_stop", index=self._index) if self._kind else b""


def _call_id() -> str:
    return f"toolu_{secrets.token_hex(12)}"


def _stop_reason(reason: str, stop: str | None) -> str:
    if reason in ("length", "tool_calls"):
        return "max_tokens" if reason == "length" else "tool_use"
    return "end_turn" if stop is None else "stop_sequence"
