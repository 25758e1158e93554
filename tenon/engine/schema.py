"""JSON schemas before they are compiled: what no grammar here can keep, and what must be said in other words.

A finished output must validate. The compiler takes more schemas than it keeps: of some keywords it says so while it
compiles (``grammar_worker``), of those here it does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

NEVER: Final = (
    "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "contains", "minContains",
    "maxContains", "uniqueItems", "multipleOf", "unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$anchor",
    "$dynamicAnchor", "$id",
)  # fmt: skip
"""Keywords that no grammar here enforces."""
ALONE: Final = ("anyOf", "oneOf", "allOf", "$ref", "enum", "const")
"""Keywords beside which others are passed over."""
SAYS_NOTHING: Final = frozenset((
    "title", "description", "default", "examples", "example", "$comment", "$schema", "$defs", "definitions", "type",
    "deprecated", "readOnly", "writeOnly", "discriminator", "nullable", "format", "contentEncoding", "contentMediaType",
))  # fmt: skip
"""Keywords that may stand beside those: notes, and the type, which they are held to anyway or do not contradict."""
OF_TYPE: Final = {
    "minimum": "number", "maximum": "number", "exclusiveMinimum": "number", "exclusiveMaximum": "number",
    "minLength": "string", "maxLength": "string", "pattern": "string",
}  # fmt: skip
_MAPS: Final = ("properties", "patternProperties", "$defs", "definitions")
_VALUES: Final = ("enum", "const", "default", "examples", "example")


def cannot_keep(schema: Any) -> str | None:
    """Why a finished output might not validate, in a sentence; None where it will."""
    for one, is_name in _schemas(schema):
        for name, value in one.items():
            if name in NEVER and value not in (False, None):
                return f"the keyword {name!r} cannot be enforced here; leave it out and check for it yourself"
            if name in OF_TYPE and "type" not in one and not is_name and not any(key in one for key in ALONE):
                return f"{name!r} is enforced only beside a type: say 'type': {OF_TYPE[name]!r}"
        alone = next((name for name in ALONE if name in one), None)
        beside = sorted(one.keys() - SAYS_NOTHING - {alone}) if alone is not None else []
        if beside:
            return f"{beside[0]!r} beside {alone!r} cannot be enforced here; say all of it inside of {alone!r}"
        missing = [name for name in _required(one) if name not in one.get("properties", {})]
        if missing and alone is None:
            return f"'required' names {missing[0]!r:.80}, of which 'properties' says nothing"
    return None


def with_patterns(schema: Any) -> Any:
    """The same schema with lengths of strings said as patterns: by length alone the compiler lets control characters
    into strings, which is no JSON."""
    if isinstance(schema, list):
        return [with_patterns(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: value if name in _VALUES else with_patterns(value) for name, value in schema.items()}
    least, most = made.get("minLength"), made.get("maxLength")
    if (_is_length(least) or _is_length(most)) and not made.keys() & {"pattern", "format", *ALONE}:
        made.pop("minLength", None)
        made.pop("maxLength", None)
        made["pattern"] = f"^.{{{least or 0},{'' if most is None else most}}}$"
    return made


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _required(schema: Mapping[str, Any]) -> list[Any]:
    required = schema.get("required")
    return required if isinstance(required, list) else []


def _schemas(schema: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every schema inside of this one, where schemas stand, and whether it is one of names."""
    waiting: list[tuple[Any, bool]] = [(schema, False)]
    while waiting:
        one, is_name = waiting.pop()
        if isinstance(one, list):
            waiting += [(each, False) for each in one]
        if not isinstance(one, dict):
            continue
        yield one, is_name
        for name, value in one.items():
            if name in _MAPS:
                waiting += [(each, False) for each in value.values()] if isinstance(value, dict) else []
            elif name not in _VALUES:
                waiting.append((value, name == "propertyNames"))
