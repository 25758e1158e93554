"""Functions that a model may call: what clients declare, how this model's template writes calls, what a choice forces.

A *dialect* is read off the chat template, for that is what the model was trained on:

    hermes    <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>         Qwen, Hermes and many others
    mistral   [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
    llama     {"name": ..., "parameters": {...}}                                    the whole answer
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from tenon.base.errors import RequestError
from tenon.engine.schema import with_patterns
from tenon.engine.structure import Structure, json_schema

MAX_TOOLS: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Dialect:
    """How calls stand in a text. ``opening`` begins them (an answer that is one begins with it where it is empty);
    ``keys`` name the two members of a call's object."""

    name: str
    opening: str
    closing: str
    arguments_key: str
    id_length: int | None = None
    """Of a call's id, where the template insists."""

    def begin(self, function: str) -> str:
        """What a call of this function begins with, up to its arguments, inside of opening and closing."""
        return f'{{"name": {json.dumps(function)}, "{self.arguments_key}": '


HERMES: Final = Dialect("hermes", "<tool_call>", "</tool_call>", "arguments")
MISTRAL: Final = Dialect("mistral", "[TOOL_CALLS]", "]", "arguments", id_length=9)
LLAMA: Final = Dialect("llama", "", "", "parameters")


def dialect_of(template: str) -> Dialect | None:
    """The dialect that a template speaks; None where it takes no tools, or in a way that is not known here."""
    if "tools" not in template or "<function=" in template or "[ARGS]" in template:
        return None
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if '"parameters"' in template and '"name"' in template:
        return LLAMA
    return None


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    function: Function


@dataclass(frozen=True)
class Calling:
    """What a request lets a model call. ``choice``: "auto", "required", or a function's name."""

    functions: tuple[Function, ...]
    choice: str = "auto"
    parallel: bool = True

    def to_template(self) -> list[dict[str, Any]]:
        """The tools as templates expect them."""
        return [
            {"type": "function", "function": {k: v for k, v in msgspec.to_builtins(f).items() if v is not None}}
            for f in self.functions
        ]

    def structure(self, dialect: Dialect) -> Structure | None:
        """What the output must be: calls where one is forced, and wherever a function wants its arguments strictly to
        be what its schema says. Raises ``RequestError`` for a schema that cannot be kept."""
        forced = self.choice != "auto"
        if not forced and not any(function.strict for function in self.functions):
            return None
        wanted = [f for f in self.functions if self.choice in ("auto", "required", f.name)]
        tags = [_tag(dialect, function, forced) for function in wanted]
        many = self.parallel and self.choice in ("auto", "required") and dialect is not LLAMA
        if not forced:
            form = {
                "type": "triggered_tags", "triggers": [dialect.opening or '{"name": '], "tags": tags,
                "at_least_one": False, "stop_after_first": not many,
            }  # fmt: skip
        else:
            form = {
                "type": "tags_with_separator", "tags": tags, "separator": ", " if dialect is MISTRAL else "\n",
                "at_least_one": True, "stop_after_first": not many,
            }  # fmt: skip
            if dialect is MISTRAL:
                ends = [{"type": "const_string", "value": said} for said in (dialect.opening + " [", "]")]
                form = {"type": "sequence", "elements": [ends[0], form, ends[1]]}
        exact = any(function.strict for function in wanted)
        return Structure("tags", json.dumps({"type": "structural_tag", "format": form}), "tools", exact)


def _tag(dialect: Dialect, function: Function, forced: bool) -> dict[str, Any]:
    begin, end = dialect.begin(function.name), "}"
    if dialect is HERMES:
        begin, end = f"{dialect.opening}\n{begin}", f"}}\n{dialect.closing}"
    elif dialect is MISTRAL and not forced:
        begin, end = f"{dialect.opening} [{begin}", "}]"
    parameters = function.parameters if function.parameters is not None else {"type": "object"}
    content = {"type": "json_schema", "json_schema": with_patterns(parameters), "max_whitespace_cnt": 16}
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def calling(
    tools: Sequence[Tool] | None, choice: Any, parallel: bool | None, dialect: Dialect | None
) -> Calling | None:
    """What a request lets the model call; None for nothing. Raises ``RequestError`` naming the field."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise _wrong("tool_choice", "tool_choice needs tools")
        return None
    if len(tools) > MAX_TOOLS:
        raise _wrong("tools", f"tools must be at most {MAX_TOOLS}, got {len(tools)}")
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if tool.type != "function":
            said = f"{where}.type must be 'function', got {tool.type!r:.40}"
            raise _wrong(f"{where}.type", said)
        if not _NAME.fullmatch(tool.function.name):
            said = f"{where}.function.name must be 1 to 64 letters, digits, _, - or ., got {tool.function.name!r:.80}"
            raise _wrong(f"{where}.function.name", said)
        if tool.function.parameters is not None:
            json_schema(tool.function.parameters, f"{where}.function.parameters", strict=bool(tool.function.strict))
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise _wrong("tools", f"tools must have different names, got {names}")
    if choice == "none":
        return None
    if dialect is None:
        said = "this model's chat template takes no tools, or writes calls in a way that is not known here"
        raise RequestError(said, param="tools", code="unsupported")
    return Calling(tuple(tool.function for tool in tools), _choice(choice, names), parallel is not False)


def _choice(choice: Any, names: Sequence[str]) -> str:
    if choice in (None, "auto"):
        return "auto"
    if choice == "required":
        return "required"
    name = choice.get("function", choice).get("name") if isinstance(choice, dict) and _is_object(choice) else None
    if name not in names:
        said = f"tool_choice must be none, auto, required or name one of {', '.join(names)}, got {choice!r:.80}"
        raise _wrong("tool_choice", said)
    return str(name)


def _is_object(choice: Mapping[str, Any]) -> bool:
    return choice.get("type") in ("function", None) and isinstance(choice.get("function", {}), dict)


def _wrong(param: str, said: str) -> RequestError:
    return RequestError(said, param=param, code="invalid_value")
