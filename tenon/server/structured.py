"""How clients say what form an output must have, in every spelling that is in use.

response_format       OpenAI's chat: {"type": "json_schema", "json_schema": {"schema": ...}}, "json_object", "text"
text.format           the same in Responses; output_config.format in Messages
guided_json, guided_regex, guided_choice, guided_grammar, structured_outputs: {...}      vLLM's
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tenon.base.errors import RequestError
from tenon.engine.structure import Structure, choice, json_schema

FIELDS: Final = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
)  # fmt: skip
_FORMATS: Final = "text, json_object or json_schema"


def wanted(fields: Mapping[str, Any]) -> Structure | None:
    """What these fields ask for, each of ``FIELDS`` or missing. Raises ``RequestError``, also where they ask twice."""
    found = [one for name in FIELDS if (one := _of(name, fields.get(name))) is not None]
    if len(found) > 1:
        names = " and ".join(one.param.partition(".")[0] for one in found)
        said = f"{names} ask for two forms at once; give one of them"
        raise RequestError(said, param=found[1].param, code="invalid_value")
    return found[0] if found else None


def of_format(value: Any, param: str) -> Structure | None:
    """What a ``{"type": ...}`` asks for. ``json_schema`` may hold its schema directly or under its own name."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")
        return Structure("json_object", param=param) if schema is None else json_schema(schema, f"{param}.schema")
    if kind == "json_schema":
        inner, where = value.get("json_schema"), f"{param}.json_schema.schema"
        if inner is None:
            inner, where = value, f"{param}.schema"
        if not isinstance(inner, dict) or "schema" not in inner:
            raise RequestError(f"{where} is missing", param=where, code="invalid_value")
        return json_schema(inner["schema"], where)
    raise RequestError(
        f"{param}.type must be {_FORMATS}, got {kind!r:.40}", param=f"{param}.type", code="invalid_value"
    )


def _of(name: str, value: Any) -> Structure | None:
    if value is None:
        return None
    match name:
        case "response_format":
            return of_format(value, name)
        case "structured_outputs":
            return _of_many(value)
        case "guided_json":
            return json_schema(value, name)
        case "guided_choice":
            return choice(_list(value, name), name)
        case _:
            return Structure("regex" if name == "guided_regex" else "ebnf", _text(value, name), name)


def _of_many(value: Any) -> Structure | None:
    name = "structured_outputs"
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be an object", param=name, code="invalid_value")
    given = {key: one for key, one in value.items() if one not in (None, False)}
    unknown = given.keys() - {"json", "regex", "choice", "grammar", "json_object"}
    if unknown:
        where = f"{name}.{sorted(unknown)[0]}"
        raise RequestError(f"unknown parameter {where}", param=where, code="unknown_parameter")
    if len(given) > 1:
        raise RequestError(f"{name} must ask for one form, got {sorted(given)}", param=name, code="invalid_value")
    for key, one in given.items():
        where = f"{name}.{key}"
        match key:
            case "json":
                return json_schema(one, where)
            case "json_object":
                return Structure("json_object", param=where)
            case "choice":
                return choice(_list(one, where), where)
            case _:
                return Structure("regex" if key == "regex" else "ebnf", _text(one, where), where)
    return None


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{param} must be a string, got {type(value).__name__}", param=param, code="invalid_value")
    return value


def _list(value: Any, param: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f"{param} must be a list of texts", param=param, code="invalid_value")
    return value
