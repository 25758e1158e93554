from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from tenon.base.clock import ManualClock
from tenon.base.errors import CheckpointError, RequestError
from tenon.models.template import Renderer, RenderLimits, Templates, load_templates
from tests.models.hostile_templates import ENDLESS, ESCAPES, LEAKS, LOOP

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' ~ tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{% continue %}{% endif %}{% endfor %}"
)
REAL = {"chatml": CHATML, "llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL}

TALK = [
    {"role": "user", "content": " What is <b>2+2</b>? ü你🙂 "},
    {"role": "assistant", "content": "<think>hm</think>\n4"},
    {"role": "user", "content": "and {{ 3+3 }}?"},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "<1>", "b": [2, None]}}}
TOOL = {"type": "function", "function": {"name": "add", "description": 'Adds > "two"', "parameters": {"a": "é"}}}
NO_SYSTEM = {"mistral"}


def of(source: str) -> Renderer:
    return Renderer(Templates({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"}), n_workers=1)


@pytest.fixture(scope="module")
def render() -> Iterator[Any]:
    """Render any source, all in one worker."""
    shared = Renderer(Templates({}, {"bos_token": "<s>", "eos_token": "</s>"}), n_workers=1)

    def render(source: str, messages: list[dict[str, Any]] = TALK, **options: Any) -> str:
        shared.templates = Templates({"default": source}, shared.templates.variables)
        return shared.render(messages, **options)

    yield render
    shared.close()


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("case", ["talk", "system", "tools", "call", "closed", "thinking"])
def test_prompts_are_those_of_transformers(name: str, case: str, render: Any) -> None:
    messages, options = list(TALK), {"add_generation_prompt": case != "closed"}
    variables: dict[str, Any] = {"enable_thinking": False} if case == "thinking" else {}
    tools = [TOOL] if case == "tools" else None
    if case == "system" and name not in NO_SYSTEM:
        messages.insert(0, {"role": "system", "content": "Be brief.\n"})
    if case == "call" and name in ("llama3", "qwen"):
        messages[1] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    library = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    right = library.apply_chat_template(
        messages, tools=tools, chat_template=REAL[name], tokenize=False, **options, **variables
    )
    assert render(REAL[name], messages, tools=tools, variables=variables, **options) == right


def test_a_template_may_refuse(render: Any) -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render(MISTRAL, TALK[:1] * 2)
    assert caught.value.code == "template_refused"


def test_generation_blocks_dates_and_json(render: Any) -> None:
    assert render("{% generation %}a{% endgeneration %}{{ {'b': '<é>'} | tojson }}") == 'a{"b": "<é>"}'
    with Renderer(Templates({"default": "{{ strftime_now('%Y') }}"}), clock=ManualClock(epoch_s=1e9)) as renderer:
        assert renderer.render(TALK) == "2001"
    assert render("{{ [1] | tojson(indent=2) }}{{ dict(a=1).a }}") == "[\n  1\n]1"


@pytest.mark.parametrize("source", ESCAPES)
def test_known_escapes_give_nothing(source: str, render: Any) -> None:
    try:
        text = render(source)
    except RequestError as error:
        text = str(error)
    assert not any(word in text for word in LEAKS)


@pytest.mark.parametrize("source", ENDLESS)
def test_what_never_ends_or_never_fits_costs_one_request(source: str) -> None:
    renderer = of(source)
    for _ in range(2):
        with pytest.raises(RequestError) as caught:
            renderer.render(TALK)
        assert caught.value.code in ("template_limit", "template_failed")
    renderer.templates = Templates({"default": CHATML})
    assert renderer.render(TALK).endswith("<|im_start|>assistant\n")
    renderer.close()


def test_a_silent_worker_is_killed_by_the_wall_clock() -> None:
    renderer = Renderer(Templates({"default": LOOP}), n_workers=1, limits=RenderLimits(cpu_s=60.0, wall_s=0.3))
    with pytest.raises(RequestError, match="took more than"):
        renderer.render(TALK)
    renderer.close()


def test_a_worker_that_dies_is_replaced() -> None:
    renderer = of(CHATML)
    right = renderer.render(TALK)
    process = renderer._workers[0]._process
    assert process is not None
    process.kill()
    process.wait()
    assert renderer.render(TALK) == right
    renderer.close()
    assert renderer.render(TALK) == right
    renderer.close()


def test_a_worker_ends_with_its_input() -> None:
    renderer = of(CHATML)
    renderer.render(TALK)
    process = renderer._workers[0]._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=10) == 0
    renderer.close()


def test_a_worker_has_no_environment_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    renderer = of(CHATML)
    renderer.render(TALK)
    process = renderer._workers[0]._process
    assert process is not None
    assert b"SECRET" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    renderer.close()


def test_a_conversation_larger_than_a_pipe_passes(render: Any) -> None:
    content = "é" * 300_000
    assert render("{{ messages[0].content }}", [{"role": "user", "content": content}]) == content


def test_many_threads_and_coroutines_share_the_workers() -> None:
    renderer = Renderer(Templates({"default": "{{ messages[0].content }}"}), n_workers=2)
    chats = [[{"role": "user", "content": str(i)}] for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(renderer.render, chats)) == [str(i) for i in range(40)]

    async def together() -> list[str]:
        return await asyncio.gather(*(renderer.render_async(chat) for chat in chats))

    assert asyncio.run(together()) == [str(i) for i in range(40)]
    renderer.close()


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        Renderer(Templates()).render(TALK)
    assert caught.value.code == "no_chat_template"


def test_named_templates() -> None:
    templates = Templates({"default": "d", "tool_use": "t", "rag": "r"})
    assert [templates.choose(), templates.choose(tools=True), templates.choose("rag", tools=True)] == ["d", "t", "r"]
    with pytest.raises(RequestError, match="default, rag, tool_use"):
        templates.choose("other")


def test_templates_are_checked_at_start() -> None:
    renderer = of(CHATML)
    renderer.check()
    renderer.templates = Templates({"broken": "{% if %}"})
    with pytest.raises(CheckpointError, match=r"'broken' is damaged.*line 1"):
        renderer.check()
    renderer.close()


@pytest.mark.parametrize(
    ("value", "sources"),
    [
        ("a", {"default": "a"}),
        (
            [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}],
            {"default": "a", "tool_use": "b"},
        ),
        ({"default": "a"}, {"default": "a"}),
        (None, {}),
    ],
)
def test_every_spelling_in_the_config(tmp_path: Path, value: Any, sources: dict[str, str]) -> None:
    raw = {"chat_template": value, "eos_token": {"content": "</s>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(raw))
    assert load_templates(tmp_path) == Templates(sources, {"eos_token": "</s>"})


def test_files_win_over_the_config(tmp_path: Path) -> None:
    assert load_templates(tmp_path) == Templates()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    (tmp_path / "chat_template.jinja").write_text("new é")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("more")
    assert load_templates(tmp_path).sources == {"default": "new é", "rag": "more"}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="UTF-8"):
        load_templates(tmp_path)


@pytest.mark.parametrize("value", [3, ["a"], [{"name": "default"}], {"default": 3}])
def test_a_wrong_kind_of_template_is_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match="chat_template"):
        load_templates(tmp_path)
