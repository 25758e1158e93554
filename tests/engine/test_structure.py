from __future__ import annotations

import json
from typing import Any

import pytest

from tenon.base.errors import RequestError
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


def test_words_inside_of_values_are_no_keywords() -> None:
    json_schema({"enum": [{"not": 1}], "properties": {"if": {"const": {"contains": 2}}}}, "p")


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
