from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tenon.base.errors import RequestError
from tenon.engine.schema import with_patterns
from tenon.engine.structure import MAX_BYTES, MAX_DEPTH, Structure, choice, json_schema


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("schema", [{"type": "object"}, '{"type": "object"}', True, {"properties": {"not": {}}}])
def test_a_schema_is_taken(schema: Any) -> None:
    assert json_schema(schema, "p").kind == "json_schema"


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("{", "p is not JSON"),
        (7, "which is an object, got int"),
        (nested(MAX_DEPTH + 1), "deep; the limit is 64"),
        (nested(5000), "deep; the limit is 64"),
        ({"description": "x" * MAX_BYTES}, "exceeds the limit of 65536"),
        ({"type": "array", "uniqueItems": True}, "the keyword 'uniqueItems' cannot be enforced"),
        ({"properties": {"a": {"anyOf": [{"not": {}}]}}}, "the keyword 'not'"),
        ({"$defs": {"a": {"multipleOf": 3}}}, "the keyword 'multipleOf'"),
    ],
)
def test_what_cannot_be_kept_is_refused(schema: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said) as raised:
        json_schema(schema, "p")
    assert raised.value.param == "p"


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"minimum": 5}, "'minimum' is enforced only beside a type"),
        ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {}}}, "'minimum' beside '$ref' cannot be enforced"),
        ({"properties": {"a": {}}, "anyOf": [{"required": ["a"]}]}, "'properties' beside 'anyOf'"),
        ({"type": "object", "properties": {"a": {}}, "required": ["a", "z"]}, "'required' names 'z'"),
    ],
)
def test_what_the_compiler_would_pass_over_is_refused(schema: Any, said: str) -> None:
    with pytest.raises(RequestError, match=re.escape(said)):
        json_schema(schema, "p")
    json_schema(schema, "p", strict=False)


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Name"},
        {"$ref": "#/$defs/a", "description": "x", "$defs": {"a": {"type": "integer", "minimum": 1}}},
        {"type": "object", "propertyNames": {"maxLength": 3}, "additionalProperties": {"type": "integer"}},
        {"type": ["string", "null"], "maxLength": 3},
        {"enum": [1, 2], "type": "integer"},
    ],
)
def test_what_common_libraries_write_is_taken(schema: Any) -> None:
    json_schema(schema, "p")


def test_lengths_become_patterns() -> None:
    made = with_patterns({"type": "string", "minLength": 2, "maxLength": 9, "enum": None, "title": "maxLength"})
    assert made == {"type": "string", "minLength": 2, "maxLength": 9, "enum": None, "title": "maxLength"}
    assert with_patterns({"items": [{"maxLength": 3}]}) == {"items": [{"pattern": "^.{0,3}$"}]}
    assert with_patterns({"minLength": 2})["pattern"] == "^.{2,}$"
    assert with_patterns({"pattern": "a", "maxLength": 3}) == {"pattern": "a", "maxLength": 3}


def test_words_inside_of_values_are_no_keywords() -> None:
    json_schema({"properties": {"if": {"const": {"contains": 2}}, "not": {"enum": [{"not": 1}]}}}, "p")


def test_a_choice_is_a_grammar_of_these_texts() -> None:
    assert choice(['a "b"', "c\n"], "p").source == 'root ::= "a \\"b\\"" | "c\\n"'


@pytest.mark.parametrize("options", [[], [""], [1], ["x"] * 1025])
def test_a_choice_needs_texts(options: list[Any]) -> None:
    with pytest.raises(RequestError, match="1 to 1024 texts"):
        choice(options, "p")


def test_a_pattern_has_limits_too() -> None:
    with pytest.raises(RequestError, match="is empty"):
        Structure("regex", "")
    with pytest.raises(RequestError, match="nested 65 deep"):
        Structure("regex", "(" * 65 + "a" + ")" * 65)
    assert json.loads(json_schema({"a": "ü"}, "p").source) == {"a": "ü"}
