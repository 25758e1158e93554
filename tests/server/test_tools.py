from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import openai
import pytest
import tokenizers

from tenon.base.errors import RequestError
from tenon.engine.grammar import Compiler, Masks, Vocabulary
from tenon.engine.messages import Add, Grammar
from tenon.models.tokenizer import load_tokenizer
from tenon.server.tool_text import ToolText
from tenon.server.tools import HERMES, LLAMA, MISTRAL, Calling, Function, Tool, calling, dialect_of
from tests.engine import build
from tests.server.conftest import PATIENCE_S, Running, start, write_model

TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>"
    'Call with <tool_call>{"name": ..., "arguments": ...}</tool_call>\n{% endif %}'
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model knows tools and thinks, as far as its files tell."""
    folder = write_model(tmp_path_factory.mktemp("tooled"))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    backend.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 262}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    running = start(folder)
    yield running
    assert running.stop() == 0
    running.close()


@pytest.fixture(scope="module")
def client(tooled: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=tooled.url + "/v1", api_key="none", timeout=PATIENCE_S, max_retries=0) as made:
        yield made


@pytest.fixture
def messages(tooled: Running) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=tooled.url, api_key="none", timeout=PATIENCE_S, max_retries=0) as made:
        yield made.messages


def chat(client: Any, tooled: Running, **wishes: Any) -> Any:
    asked = {"messages": HELLO, "max_tokens": 200, "seed": 4, "tools": TOOLS} | wishes
    return client.chat.completions.create(model=tooled.model, **asked)


def check(name: str, arguments: str) -> None:
    given = json.loads(arguments)
    if name == "weather":
        jsonschema.validate(given, WEATHER)
    else:
        assert (name, given) == ("now", {})


def test_a_required_call_is_made_and_is_sound(client: Any, tooled: Running) -> None:
    for seed in range(4):
        (choice,) = chat(
            client,
            tooled,
            tool_choice="required",
            logit_bias={"258": -100},
            seed=seed,
            max_tokens=400,
            parallel_tool_calls=seed > 2,
        ).choices
        assert choice.finish_reason == "tool_calls" or seed > 2
        assert choice.message.content is None
        assert len({call.id for call in choice.message.tool_calls}) == len(choice.message.tool_calls)
        for call in choice.message.tool_calls[: None if choice.finish_reason == "tool_calls" else -1]:
            check(call.function.name, call.function.arguments)


def test_the_official_client_puts_a_stream_together(client: Any, tooled: Running) -> None:
    """Its accumulator concatenates strings: id and name come once, arguments piece by piece, calls by their index."""
    asked = {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    (whole,) = chat(client, tooled, **asked).choices
    found: dict[int, dict[str, str]] = {}
    reasons = []
    for chunk in chat(client, tooled, stream=True, **asked):
        (choice,) = chunk.choices
        reasons.append(choice.finish_reason)
        for part in choice.delta.tool_calls or ():
            entry = found.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
            entry["id"] += part.id or ""
            entry["name"] += part.function.name or ""
            entry["arguments"] += part.function.arguments or ""
    assert [reason for reason in reasons if reason] == ["tool_calls"]
    (call,) = found.values()
    assert call["id"].startswith("call_")
    assert len(call["id"]) == len("call_") + 24
    (told,) = whole.message.tool_calls
    assert (call["name"], call["arguments"]) == (told.function.name, told.function.arguments)
    check(call["name"], call["arguments"])


def test_a_conversation_with_calls_goes_back(client: Any, tooled: Running) -> None:
    (choice,) = chat(client, tooled, tool_choice="required", parallel_tool_calls=False).choices
    (call,) = choice.message.tool_calls
    messages = [
        *HELLO,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
    ]
    answer = chat(client, tooled, messages=messages, tool_choice="none", max_tokens=5)
    assert answer.usage.prompt_tokens > 60
    assert answer.choices[0].message.tool_calls is None


def test_strict_functions_bind_only_where_they_are_called(client: Any, tooled: Running) -> None:
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    plain = chat(client, tooled, tools=strict, max_tokens=20).choices[0]
    assert plain.message.content
    marks = {"logit_bias": {"260": 100}, "extra_body": {"bad_words": []}}
    forced = chat(client, tooled, tools=strict, **marks).choices[0]
    for call in forced.message.tool_calls:
        if call.function.arguments.endswith("}"):
            check(call.function.name, call.function.arguments)


def test_thoughts_are_told_apart(client: Any, tooled: Running) -> None:
    """A bias has the model end its thought soon; the grammar binds after it."""
    wishes = {"tools": [], "reasoning_effort": "high", "logit_bias": {"259": 4.5}, "max_tokens": 400}
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}}
    (choice,) = chat(client, tooled, response_format=form, **wishes).choices
    assert choice.finish_reason == "stop"
    assert choice.message.reasoning_content
    jsonschema.validate(json.loads(choice.message.content), WEATHER)
    streamed = {"reasoning": "", "content": ""}
    for chunk in chat(
        client, tooled, response_format=form, stream=True, stream_options={"include_usage": True}, **wishes
    ):
        for part in chunk.choices:
            streamed["reasoning"] += getattr(part.delta, "reasoning_content", None) or ""
            streamed["content"] += part.delta.content or ""
        usage = chunk.usage
    assert streamed == {"reasoning": choice.message.reasoning_content, "content": choice.message.content}
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_messages_have_tools_and_thoughts(messages: Any, tooled: Running) -> None:
    asked: dict[str, Any] = {
        "model": tooled.model, "max_tokens": 400, "messages": HELLO, "extra_body": {"temperature": 0},
        "tools": [{"name": "weather", "description": "of a city", "input_schema": WEATHER}],
        "tool_choice": {"type": "tool", "name": "weather"},
    }  # fmt: skip
    message = messages.create(**asked)
    assert message.stop_reason == "tool_use"
    (use,) = message.content
    jsonschema.validate(use.input, WEATHER)
    with messages.stream(**asked) as stream:
        final = stream.get_final_message()
    (streamed,) = final.content
    jsonschema.validate(streamed.input, WEATHER)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
    back = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    count = messages.count_tokens(model=tooled.model, messages=back, tools=asked["tools"]).input_tokens
    again = messages.create(**asked | {"messages": back, "max_tokens": 5})
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == count


def test_responses_have_calls_and_thoughts(client: Any, tooled: Running) -> None:
    asked: dict[str, Any] = {
        "model": tooled.model, "input": "hello", "max_output_tokens": 400, "tool_choice": "required",
        "temperature": 0.0, "parallel_tool_calls": False,
        "tools": [{"type": "function", "name": "weather", "parameters": WEATHER}, {"type": "web_search"}],
    }  # fmt: skip
    events = list(client.responses.create(stream=True, **asked))
    final = events[-1].response
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in done] == [item.id for item in final.output]
    calls = [item for item in final.output if item.type == "function_call"]
    assert calls
    for call in calls:
        check(call.name, call.arguments)
        deltas = [e.delta for e in events if e.type.endswith("arguments.delta") and e.item_id == call.id]
        assert "".join(deltas) == call.arguments
    assert [event.sequence_number for event in events] == list(range(len(events)))
    back: list[Any] = [
        {"role": "user", "content": "hello"},
        *(item.model_dump(exclude_none=True) for item in final.output),
    ]
    back += [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in calls]
    answer = client.responses.create(**asked | {"input": back, "tool_choice": "none", "max_output_tokens": 4})
    assert answer.status == "incomplete"


def test_a_grammar_lets_a_special_token_begin_a_call(tmp_path: Path) -> None:
    """Mistral's files hold the mark of calls for special; under a strict function the model must still get to it."""
    folder = write_model(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["[TOOL_CALLS]"])
    backend.save(str(folder / "tokenizer.json"))
    mark = 258
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": mark + 1}))
    vocabulary = Vocabulary(str(folder), mark + 1, (257,))
    compiler, masks = Compiler(vocabulary), Masks(vocabulary, n_rows=2)
    form = Calling((Function("weather", parameters=WEATHER, strict=True),)).structure(MISTRAL)
    assert form is not None
    bias = ((mark, 5000.0),)  # above all that the hash executor gives
    add = Add("r", (1, 2), 300, 1, logit_bias=bias, grammar=Grammar(*compiler.compile(form)))
    engine = build.hash_engine(100, mark + 1, masks=masks, eos_ids=(257,))
    ids = build.run(engine, [add])["r", 0]
    compiler.close()
    masks.close()
    assert ids[0] == mark
    text = load_tokenizer(folder).decode(ids[1:], skip_special=True)
    parser = ToolText(MISTRAL, ["weather"])
    parts = [*parser.push("[TOOL_CALLS]" + text)[1], *parser.flush()[1]]
    assert parts[0].name == "weather"
    jsonschema.validate(json.loads("".join(part.arguments for part in parts if part.index == 0)), WEATHER)


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        (TEMPLATE, HERMES),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", MISTRAL),
        ('{{ tools }} {"name": f, "parameters": {}}', LLAMA),
        ("{{ messages }}", None),
        ("{{ tools }}<tool_call><function=f>", None),
        ("{{ tools }}", None),
    ],
)
def test_a_template_tells_how_calls_are_written(template: str, dialect: Any) -> None:
    assert dialect_of(template) is dialect


def tool(name: str, **more: Any) -> Tool:
    return Tool("function", Function(name, **more))


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([tool("a b")], None, "tools[0].function.name"),
        ([tool("a"), tool("a")], None, "tools"),
        ([tool("a")] * 129, None, "tools"),
        ([Tool("web", Function("a"))], None, "tools[0].type"),
        ([tool("a")], "sometimes", "tool_choice"),
        ([tool("a")], {"type": "function", "function": {"name": "b"}}, "tool_choice"),
        ([tool("a")], {"type": "function", "function": []}, "tool_choice"),
        ([], "required", "tool_choice"),
        ([tool("a", parameters={"not": {}}, strict=True)], None, "tools[0].function.parameters"),
    ],
)
def test_what_is_wrong_is_named(tools: list[Tool], choice: Any, param: str) -> None:
    with pytest.raises(RequestError) as raised:
        calling(tools, choice, None, HERMES)
    assert raised.value.param == param
