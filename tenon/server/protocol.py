"""What clients send: the bodies of ``/v1/completions`` and ``/v1/chat/completions``, decoded and checked.

Nothing is ignored in silence. A field that nobody knows is refused by name; a field of the OpenAI API that Tenon does
not implement yet is accepted at the value that asks for nothing and refused at any other.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, Final, Literal, TypeVar

import msgspec

from tenon.base.errors import RequestError
from tenon.engine.params import MAX_N, SamplingParams
from tenon.server import speculative, structured
from tenon.server.limits import Limits
from tenon.server.slo import Wish
from tenon.server.speculative import Speculative
from tenon.server.tools import Tool

NOT_YET: Final[dict[str, tuple[Any, ...]]] = {
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "suffix": (None, ""),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "store": (None, False),
    "metadata": (None, {}),
    "prompt_cache_key": (None,),
    "prompt_cache_retention": (None,),
    "safety_identifier": (None,),
}
"""Fields of the API that are not implemented, with the values that ask for nothing."""

_MESSAGE_NOT_YET: Final[dict[str, tuple[Any, ...]]] = {
    "function_call": (None,),
    "refusal": (None,),
    "audio": (None,),
    "annotations": (None, []),
}

WISHES: Final = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "bad_words", "min_tokens", "n", "stop", "stop_token_ids", "ignore_eos",
    "prompt_logprobs",
)  # fmt: skip
"""Fields that ``SamplingParams`` takes as they are."""

ROLES: Final = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
RESERVED: Final = ("messages", "tools", "documents", "add_generation_prompt")
"""What a template's variables may not be called by a client."""


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False
    """Accepted: asks for padding against traffic analysis; a loopback server adds none."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields that both endpoints share."""

    model: str
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    speculative: bool | Speculative | None = None
    slo: Wish | None = None
    service_tier: str | None = None
    priority: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class CompletionRequest(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``prompt``: a text, several texts, token ids, or several lists of token ids."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    @property
    def echoes_only(self) -> bool:
        """Nothing is to be generated: the prompt is shown, perhaps with its log-probabilities."""
        return bool(self.echo) and self.max_tokens == 0

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt. Raises ``RequestError`` for a mixture or an empty list."""
        return prompts_of(self.prompt, "prompt")


def prompts_of(given: str | list[str | int | list[int]], name: str) -> list[str | list[int]]:
    """One entry per prompt of the field ``name``. Raises ``RequestError`` for a mixture or an empty list."""
    if isinstance(given, str):
        return [given]
    kinds = {type(item) for item in given}
    if kinds == {int}:
        return [[item for item in given if isinstance(item, int)]]
    if kinds == {str} or kinds == {list}:
        return [item for item in given if not isinstance(item, int)]
    raise RequestError(
        f"{name} must be a string, a list of strings, a list of token ids or a list of lists of token ids, "
        + ("got an empty list" if not kinds else "got a mixture"),
        param=name,
        code="invalid_value",
    )


def check_prompts(raw: dict[str, Any], name: str, limits: Limits) -> None:
    """Prompts before they are looked at. Raises ``RequestError`` for too many."""
    given = raw.get(name)
    if isinstance(given, list) and given and not isinstance(given[0], int) and len(given) > limits.max_prompts:
        raise _too_many(name, len(given), limits.max_prompts)


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call that the model made, as it comes back in the conversation. ``index`` is a stream's, and says nothing."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None

    def flat(self, where: str) -> dict[str, Any]:
        """As templates see it: the arguments are an object. Raises ``RequestError`` where they are none."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            where = f"{where}.function.arguments"
            said = f"{where} must be a JSON object as a string, got {self.function.arguments!r:.80}"
            raise RequestError(said, param=where, code="invalid_value")
        call = {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}
        return call | ({"id": self.id} if self.id is not None else {})


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def flat(self, index: int) -> dict[str, Any]:
        """What a template sees. Raises ``RequestError`` for a part that is not text, and for what another role has."""
        where = f"messages[{index}].content"
        if self.content is None and self.role != "assistant":
            raise RequestError(f"{where} is missing", param=where, code="invalid_value")
        for field, role in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, field) and self.role != role:
                said = f"messages[{index}].{field} is for messages whose role is {role}, got {self.role}"
                raise RequestError(said, param=f"messages[{index}].{field}", code="invalid_value")
        flat: dict[str, Any] = {"role": ROLES[self.role], "content": text_of(self.content, where)}
        flat |= {"name": self.name} if self.name is not None else {}
        flat |= {"tool_call_id": self.tool_call_id} if self.tool_call_id is not None else {}
        if thought := self.reasoning_content or self.reasoning:
            flat["reasoning_content"] = thought
        if self.tool_calls:
            calls = [call.flat(f"messages[{index}].tool_calls[{i}]") for i, call in enumerate(self.tool_calls)]
            flat["tool_calls"] = calls
        return flat


def text_of(content: str | list[dict[str, Any]] | None, where: str) -> str:
    """A content's text. Raises ``RequestError`` for a part that is none."""
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if part.get("type") != "text":
            raise RequestError(
                f"{where} has a part of type {part.get('type')!r}; this model takes parts of type 'text' only",
                param=where,
                code="unsupported_content",
            )
        if not isinstance(part.get("text"), str) or part.keys() != {"type", "text"}:
            raise RequestError(
                f"{where} has a part that is not {{'type': 'text', 'text': string}}", param=where, code="invalid_value"
            )
    return "".join(part["text"] for part in content)


class ChatRequest(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def variables(self) -> dict[str, Any]:
        """What else the template is to know. Raises ``RequestError`` for what is not a client's to say."""
        given = dict(self.chat_template_kwargs or {})
        taken = next((name for name in given if name in RESERVED), None)
        if taken is not None:
            where = f"chat_template_kwargs.{taken}"
            raise RequestError(f"{where} is set by the server", param=where, code="invalid_value")
        if self.reasoning_effort is not None:
            given.setdefault("reasoning_effort", self.reasoning_effort)
            given.setdefault("enable_thinking", self.reasoning_effort != "none")
        return given


def parse_completion(body: bytes, limits: Limits) -> CompletionRequest:
    """Raises ``RequestError`` naming the field."""
    raw = without_not_yet(json_object(body), NOT_YET, "")
    check_prompts(raw, "prompt", limits)
    request = convert(raw, CompletionRequest)
    if request.best_of is not None:
        _check_best_of(request, request.best_of)
    return request


def _check_best_of(request: CompletionRequest, best_of: int) -> None:
    if not (request.n or 1) <= best_of <= MAX_N:
        said = f"best_of must be from n, which is {request.n or 1}, to {MAX_N}, got {best_of}"
        raise RequestError(said, param="best_of", code="invalid_value")
    if request.stream and best_of > (request.n or 1):
        said = "best_of above n cannot be streamed: which outputs are the best is known at their end"
        raise RequestError(said, param="best_of", code="invalid_value")


def parse_chat(body: bytes, limits: Limits) -> ChatRequest:
    """Raises ``RequestError`` naming the field."""
    raw = without_not_yet(json_object(body), NOT_YET, "")
    check_messages(raw, limits)
    request = convert(raw, ChatRequest)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        if request.max_tokens != request.max_completion_tokens:
            raise RequestError(
                "max_tokens and max_completion_tokens differ; give one of them",
                param="max_completion_tokens",
                code="invalid_value",
            )
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    return request


def check_messages(raw: dict[str, Any], limits: Limits) -> None:
    """Count a body's messages, and drop from them what asks for nothing. Raises ``RequestError``."""
    check_count(raw, "messages", limits)
    messages = raw.get("messages")
    if isinstance(messages, list):
        raw["messages"] = [
            without_not_yet(m, _MESSAGE_NOT_YET, f"messages[{i}].") if isinstance(m, dict) else m
            for i, m in enumerate(messages)
        ]


def check_count(raw: dict[str, Any], name: str, limits: Limits) -> None:
    """A conversation's messages, before they are looked at. Raises ``RequestError`` for none or too many."""
    items = raw.get(name)
    if not isinstance(items, list):
        return
    if len(items) > limits.max_messages:
        raise _too_many(name, len(items), limits.max_messages)
    if not items:
        raise RequestError(f"{name} must hold at least one message", param=name, code="invalid_value")


def sampling_params(
    request: CompletionRequest | ChatRequest, *, defaults: dict[str, float | int], seed: int
) -> SamplingParams:
    """The request's wishes over the model's own defaults over Tenon's. ``seed`` is used where none is given.

    ``max_tokens`` stays ``None`` where the request has none. Raises ``RequestError`` naming the field.
    """
    if isinstance(request, ChatRequest):
        name = "max_completion_tokens" if request.max_completion_tokens is not None else "max_tokens"
        max_tokens = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    else:
        name, max_tokens, logprobs = "max_tokens", request.max_tokens, request.logprobs
        if request.echoes_only:
            max_tokens = 1
    if request.prompt_logprobs is not None and request.stream:
        said = "prompt_logprobs cannot be streamed; leave stream out"
        raise RequestError(said, param="prompt_logprobs", code="invalid_value")
    wishes: dict[str, Any] = dict(defaults)
    for field in WISHES:
        value = getattr(request, field)
        if value is not None:
            wishes[field] = value
    if request.logit_bias is not None:
        wishes["logit_bias"] = _biases(request.logit_bias)
    if isinstance(request, CompletionRequest):
        if request.echo and logprobs is not None:
            if request.prompt_logprobs not in (None, logprobs):
                said = f"prompt_logprobs must be logprobs beside echo, which is {logprobs}, or left out"
                raise RequestError(said, param="prompt_logprobs", code="invalid_value")
            wishes["prompt_logprobs"] = logprobs
        if request.best_of is not None:
            wishes["n"] = request.best_of
            logprobs = logprobs or 0
    wishes |= speculative.wished(request.speculative)
    wishes["structure"] = structured.wanted({name: getattr(request, name) for name in structured.FIELDS})
    wishes.update(max_tokens=max_tokens, logprobs=logprobs, seed=seed if request.seed is None else request.seed)
    try:
        return SamplingParams(**wishes)
    except RequestError as error:
        if error.param == "max_tokens" and name != "max_tokens":
            raise RequestError(str(error).replace("max_tokens", name, 1), param=name, code=error.code) from error
        if error.param == "logprobs" and isinstance(request, ChatRequest):
            raise RequestError("top_" + str(error), param="top_logprobs", code=error.code) from error
        raise


def _biases(given: dict[str, float]) -> dict[int, float]:
    """Token ids are JSON's keys, and so strings."""
    wrong = next((key for key in given if not (key.isascii() and key.isdecimal())), None)
    if wrong is not None:
        said = f"logit_bias must map token ids to numbers, got the key {wrong!r:.40}"
        raise RequestError(said, param="logit_bias", code="invalid_value")
    return {int(key): value for key, value in given.items()}


def check_work(n_prompts: int, params: SamplingParams, max_tokens: int, n_scored: int, limits: Limits) -> None:
    """Each factor may be fine and the product not. ``n_scored``: tokens of prompts whose log-probabilities are wanted.
    Raises ``RequestError``."""
    n_sequences = n_prompts * params.n
    if n_sequences > limits.max_sequences:
        raise RequestError(
            f"{n_prompts} prompts x n={params.n} make {n_sequences} sequences; the limit is {limits.max_sequences}",
            param="n",
            code="too_much_work",
        )
    work = n_sequences * max_tokens * (1 + (params.logprobs or 0))
    if work > limits.max_work:
        raise RequestError(
            f"prompts x n x max_tokens x (1 + logprobs) is {work}; the limit is {limits.max_work}",
            param="max_tokens",
            code="too_much_work",
        )
    scores = n_scored * (1 + (params.prompt_logprobs or 0))
    if scores > limits.max_work:
        raise RequestError(
            f"tokens of prompts x (1 + logprobs) is {scores}; the limit is {limits.max_work}",
            param="logprobs",
            code="too_much_work",
        )


def json_object(body: bytes) -> dict[str, Any]:
    """Raises ``RequestError`` for a body that is none."""
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(raw, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    return raw


def without_not_yet(raw: dict[str, Any], table: dict[str, tuple[Any, ...]], prefix: str) -> dict[str, Any]:
    """``raw`` without what asks for nothing. Raises ``RequestError`` for what is in ``table`` and asks for more."""
    for name in raw.keys() & table.keys():
        if not any(_same(raw[name], neutral) for neutral in table[name]):
            raise RequestError(
                f"{prefix}{name} is not supported by this server yet; leave it out",
                param=prefix + name,
                code="unsupported",
            )
    return {name: value for name, value in raw.items() if name not in table}


def _same(value: Any, neutral: Any) -> bool:
    """Equality under which ``true`` is not 1."""
    return value is neutral or (value == neutral and not isinstance(value, bool))


_Request = TypeVar("_Request", bound=msgspec.Struct)

_PATH = re.compile(r" - at `\$\.?([^`]*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")


def convert(raw: dict[str, Any], kind: type[_Request]) -> _Request:
    """``raw`` as a ``kind``. Raises ``RequestError`` naming the field."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), kind) from error


def _explained(said: str, kind: type[msgspec.Struct]) -> RequestError:
    place = _PATH.search(said)
    path = place.group(1) if place else ""
    said = _PATH.sub("", said)
    if unknown := _UNKNOWN.search(said):
        name = unknown.group(1)
        near = difflib.get_close_matches(name, kind.__struct_fields__, n=1)
        hint = f"; did you mean {near[0]}?" if near and not path else ""
        full = f"{path}.{name}" if path else name
        return RequestError(f"unknown parameter {full}{hint}", param=full, code="unknown_parameter")
    if missing := _MISSING.search(said):
        full = f"{path}.{missing.group(1)}" if path else missing.group(1)
        return RequestError(f"{full} is missing", param=full, code="missing_parameter")
    return RequestError(f"{path or 'the body'} is wrong: {said[:1].lower()}{said[1:]}", param=path, code="invalid_type")


def _too_many(name: str, count: int, limit: int) -> RequestError:
    return RequestError(f"{name} has {count} entries; the limit is {limit}", param=name, code="too_much_work")
