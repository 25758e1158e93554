from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.server.tool_text import ToolText
from tenon.server.tools import HERMES, LLAMA, MISTRAL, Dialect

NAMES = ("get_weather", "f")


def read(dialect: Dialect, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls (name, arguments) of a text that comes in these pieces."""
    parser = ToolText(dialect, NAMES)
    content, calls = "", list[list[str]]()
    for said, parts in [*(parser.push(piece) for piece in pieces), parser.flush()]:
        content += said
        for part in parts:
            if part.name is not None:
                assert part.index == len(calls)
                calls.append([part.name, ""])
            calls[part.index][1] += part.arguments
    return content, [(name, arguments) for name, arguments in calls]


PARIS = '{"city": "Paris", "note": "a } \\" ] b", "n": [1, {"x": 2}]}'
HERMES_CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
CASES: list[tuple[Dialect, str, str, list[tuple[str, str]]]] = [
    (HERMES, "plain text, with < and <tool and {}", "plain text, with < and <tool and {}", []),
    (HERMES, HERMES_CALL, "", [("get_weather", PARIS)]),
    (HERMES, f"Let me see.\n{HERMES_CALL}\n", "Let me see.", [("get_weather", PARIS)]),
    (HERMES, f"{HERMES_CALL}\n{HERMES_CALL}", "", [("get_weather", PARIS)] * 2),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
     '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', []),
    (HERMES, "<tool_call>call f please</tool_call>", "<tool_call>call f please</tool_call>", []),
    (HERMES, "<tool_call>", "<tool_call>", []),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": ', "", [("f", '{"a": ')]),
    (HERMES, '<tool_call>{"nam', '<tool_call>{"nam', []),
    (HERMES, f"{HERMES_CALL}\nDone.", "\nDone.", [("get_weather", PARIS)]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}, {"name": "f", "arguments": {}}]', "",
     [("f", '{"a": [1]}'), ("f", "{}")]),
    (MISTRAL, "no [TOOL call", "no [TOOL call", []),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"b": 2}}', "",
     [("f", "{}"), ("f", '{"b": 2}')]),
    (LLAMA, '{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', []),
    (LLAMA, '{"age": 36}', '{"age": 36}', []),
    (LLAMA, 'It is {"name": "f", "parameters": {}}', 'It is {"name": "f", "parameters": {}}', []),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "text", "content", "calls"), CASES)
def test_calls_are_found_and_all_else_is_content(
    dialect: Dialect, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert read(dialect, [text]) == (content, calls)
    assert read(dialect, list(text)) == (content, calls)


@given(st.data())
def test_where_a_text_is_cut_says_nothing(data: st.DataObject) -> None:
    dialect, text, content, calls = data.draw(st.sampled_from(CASES))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(dialect, pieces) == (content, calls)


@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "{", "}", '"name"', ":", '"f"', ",", '"arguments"', " ",
                                 "\n", "a", "[", "]", '"', "\\", HERMES_CALL])))  # fmt: skip
def test_nothing_breaks_it(parts: list[str]) -> None:
    text = "".join(parts)
    whole = read(HERMES, [text])
    assert read(HERMES, list(text)) == whole
    if "<tool_call>" not in text:
        assert whole == (text, [])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_arguments_are_told_to_the_character(value: Any) -> None:
    arguments = json.dumps({"value": value}, ensure_ascii=False)
    for dialect, text in (
        (HERMES, f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'),
        (MISTRAL, f'[TOOL_CALLS][{{"name": "f", "arguments": {arguments}}}]'),
        (LLAMA, f'{{"name": "f", "parameters": {arguments}}}'),
    ):
        assert read(dialect, [text]) == ("", [("f", arguments)])
