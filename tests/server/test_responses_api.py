"""OpenAI's Responses API, by its official client and by the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import PATIENCE_S, Running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_official_client_is_answered(client: openai.OpenAI, server: Running) -> None:
    answer = client.responses.create(
        model="tiny", input="hello", instructions="be brief", max_output_tokens=8, temperature=0, metadata={"a": "b"}
    )
    assert (answer.object, answer.status, answer.metadata) == ("response", "incomplete", {"a": "b"})
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 8
    chat = client.chat.completions.create(
        model="tiny", max_tokens=8, temperature=0,
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
    )  # fmt: skip
    assert answer.output_text == chat.choices[0].message.content


def test_the_official_client_streams_the_same(client: openai.OpenAI) -> None:
    wishes: Any = {"model": "tiny", "input": "hello", "max_output_tokens": 30, "temperature": 0}
    whole = client.responses.create(**wishes)
    with client.responses.stream(**wishes) as stream:
        *events, last = stream
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert last.type in ("response.completed", "response.incomplete")
    assert text == whole.output_text == last.response.output_text
    assert last.response.status == whole.status


def test_a_conversation_goes_back_as_it_came(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="hello", max_output_tokens=5, temperature=0)
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"role": "user", "content": "again"},
    ]
    assert client.responses.create(model="tiny", input=items, max_output_tokens=5).output_text


def test_a_stream_s_events_come_in_order_and_numbered(server: Running) -> None:
    asked = {"model": "tiny", "input": "hello", "max_output_tokens": 5, "stream": True, "temperature": 0}
    with httpx.stream("POST", server.url + "/v1/responses", json=asked, timeout=PATIENCE_S) as response:
        blocks = response.read().decode().strip().split("\n\n")
    events = [httpx.Response(200, content=block.split("\n", 1)[1].removeprefix("data: ")).json() for block in blocks]
    names = [event["type"].removeprefix("response.") for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = names.count("output_text.delta")
    assert names == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    done, last = events[-2]["item"], events[-1]["response"]
    assert last["output"] == [done]
    assert last["usage"]["output_tokens"] == 5
    assert events[0]["response"]["usage"] is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "web_search_call", "id": "a"}]}, "input[0].type"),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "[]"}]},
            "input[0].function.arguments",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"temperature": 200}, "temperature"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_is_wrong_is_named(server: Running, body: dict[str, Any], param: str) -> None:
    response = server.post("/v1/responses", {"input": "hello"} | body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


def test_stop_and_ignore_eos_are_taken_beyond_the_api(server: Running) -> None:
    asked: dict[str, Any] = {"input": "hello", "max_output_tokens": 40, "temperature": 0, "ignore_eos": True}
    whole = server.post("/v1/responses", asked | {"stop": None}).json()
    text = whole["output"][0]["content"][0]["text"]
    assert (whole["status"], whole["usage"]["output_tokens"]) == ("incomplete", 40)
    cut = server.post("/v1/responses", asked | {"stop": text[10:14]}).json()
    assert cut["status"] == "completed"
    assert cut["output"][0]["content"][0]["text"] == text[: text.index(text[10:14])]
    refused = server.post("/v1/responses", asked | {"stop": [""]})
    assert refused.json()["error"]["param"] == "stop"
