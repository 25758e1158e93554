from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pytest

from tenon.base.errors import RequestError
from tenon.server.structured import of_format, wanted
from tests.server.conftest import PATIENCE_S, Running

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 30}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
HOSTILE = "((((((a{1,99}){1,99}){1,99}){1,99}){1,99}){1,99}){1,99}"


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=PATIENCE_S, max_retries=0) as made:
        yield made


def check(text: str | None) -> None:
    jsonschema.validate(json.loads(text or ""), SCHEMA)


def test_a_schema_is_kept_in_every_form_of_answer(client: openai.OpenAI, server: Running) -> None:
    asked: dict[str, Any] = {"model": server.model, "max_tokens": 200, "seed": 3}
    chat = client.chat.completions.create(messages=HELLO, response_format=FORMAT, n=2, logprobs=True, **asked)  # type: ignore[call-overload]
    for choice in chat.choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content)
        assert len(choice.logprobs.content) >= len(choice.message.content or "")
    stream = client.chat.completions.create(messages=HELLO, response_format=FORMAT, stream=True, **asked)  # type: ignore[call-overload]
    check("".join(chunk.choices[0].delta.content or "" for chunk in stream))
    plain = client.completions.create(prompt="hello", extra_body={"guided_json": SCHEMA}, **asked)
    check(plain.choices[0].text)
    response = client.responses.create(
        model=server.model, input="hello", max_output_tokens=200, temperature=0,
        text={"format": {"type": "json_schema", "name": "pet", "schema": SCHEMA, "strict": True}},
    )  # fmt: skip
    check(response.output_text)
    config = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}, "temperature": 0}
    with anthropic.Anthropic(base_url=server.url, api_key="none", timeout=PATIENCE_S, max_retries=0) as messages:
        message = messages.messages.create(model=server.model, max_tokens=200, messages=HELLO, extra_body=config)
    check(message.content[0].text)  # type: ignore[union-attr]


def test_other_forms(server: Running) -> None:
    def text(**form: Any) -> str:
        return str(server.complete(max_tokens=300, seed=5, **form)["choices"][0]["text"])

    assert text(response_format={"type": "json_object"}).startswith("{")
    assert text(guided_choice=["yes", "no"]) in ("yes", "no")
    assert text(structured_outputs={"choice": ["up", "down"]}) in ("up", "down")
    assert text(guided_regex="[0-9]{4}").isdecimal()
    assert set(text(guided_grammar='root ::= ("x" | "y"){3}')) <= {"x", "y"}


@pytest.mark.parametrize(
    ("form", "param", "said"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "must be text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.schema", "is missing"),
        ({"guided_regex": "[ab"}, "guided_regex", "Unclosed"),
        ({"guided_regex": "[ab]", "guided_choice": ["a"]}, "guided_choice", "ask for two forms at once"),
        ({"structured_outputs": {"xml": 1}}, "structured_outputs.xml", "unknown parameter"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "must ask for one form"),
        ({"structured_outputs": {"regex": 4}}, "structured_outputs.regex", "must be a string"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "'uniqueItems' cannot be enforced"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "cannot be had with a grammar"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens", "cannot be had with a grammar"),
    ],
)
def test_what_cannot_be_kept_is_a_400_that_names_it(server: Running, form: Any, param: str, said: str) -> None:
    response = server.post("/v1/completions", {"prompt": "hello", "max_tokens": 3} | form)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], said in error["message"]) == (param, True)


def test_hostile_grammars_cost_their_own_requests(server: Running) -> None:
    """Row 13: each is refused or ends; nobody else hears of it."""
    hostile: list[Any] = [
        {"guided_regex": HOSTILE},
        {"guided_regex": "(" * 60 + "a" + ")*" * 60},
        {"guided_grammar": "root ::= root root | \"\""},
        {"guided_grammar": "root ::= " + " | ".join(f'"{i:05d}" root' for i in range(3000))},
        {"guided_json": {"$ref": "#"}},
        {"guided_json": {"type": "string", "pattern": "^(a+)+$", "minLength": 10**9}},
        {"guided_json": {"enum": ["x" * 50] * 1000}},
        {"guided_json": {"type": "array", "minItems": 10**9}},
    ]  # fmt: skip
    before = server.complete(max_tokens=40, seed=2)["choices"]

    def ask(form: Any) -> int:
        return server.post("/v1/completions", {"prompt": "hello", "max_tokens": 8} | form).status_code

    with ThreadPoolExecutor(len(hostile)) as pool:
        statuses = [pool.submit(ask, form) for form in hostile]
        during = [server.complete(max_tokens=40, seed=2)["choices"] for _ in range(5)]
        assert {status.result(PATIENCE_S) for status in statuses} <= {200, 400, 500}
    assert all(choices == before for choices in during)
    assert json.loads(server.complete(max_tokens=200, guided_json=SCHEMA)["choices"][0]["text"])
    assert httpx.get(server.url + "/readyz").status_code == 200


def test_without_the_library_it_says_so_and_serves_all_else(own_server: Callable[..., Running], tmp_path: Any) -> None:
    (tmp_path / "xgrammar.py").write_text("raise ModuleNotFoundError('No module', name='xgrammar')")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        server = own_server()
    response = server.post("/v1/completions", {"prompt": "hello", "guided_regex": "a"})
    assert response.status_code == 400
    assert "pip install 'tenon[structured]'" in response.json()["error"]["message"]
    assert server.complete(max_tokens=2)["choices"]


def test_every_spelling_is_read() -> None:
    assert wanted({}) is None
    assert wanted({"response_format": {"type": "text"}}) is None
    assert of_format(None, "p") is None
    spelled: list[dict[str, Any]] = [
        {"response_format": FORMAT},
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA, "regex": None}},
    ]
    found = [wanted(one) for one in spelled]
    assert {(one.kind, one.source) for one in found if one} == {("json_schema", json.dumps(SCHEMA))}
    with pytest.raises(RequestError, match=r"text\.format\.type"):
        of_format({"type": 3}, "text.format")
