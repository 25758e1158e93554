"""Anthropic's Messages API, by its official client and by the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from tests.server.conftest import PATIENCE_S, Running

GREEDY = {"temperature": 0}
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


def post(server: Running, path: str = "/v1/messages", **body: Any) -> httpx.Response:
    asked = {"model": "tiny", "max_tokens": 8, "messages": HELLO} | body
    return httpx.post(server.url + path, json={k: v for k, v in asked.items() if v is not None}, timeout=PATIENCE_S)


def test_the_official_client_talks(client: Any) -> None:
    answer = client.messages.create(model="tiny", max_tokens=8, messages=HELLO, system="be brief", extra_body=GREEDY)
    assert (answer.type, answer.role, answer.stop_reason) == ("message", "assistant", "max_tokens")
    assert answer.content[0].type == "text"
    assert answer.usage.output_tokens == 8
    again = client.messages.create(model="tiny", max_tokens=8, messages=HELLO, system="be brief", extra_body=GREEDY)
    assert again.content == answer.content
    total = again.usage.input_tokens + (again.usage.cache_read_input_tokens or 0)
    assert total == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


def test_the_official_client_streams_the_same_text(client: Any) -> None:
    wishes = {"model": "tiny", "max_tokens": 30, "messages": HELLO, "extra_body": GREEDY}
    whole = client.messages.create(**wishes)
    with client.messages.stream(**wishes) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens == 30


def test_tokens_are_counted_as_they_will_be_served(client: Any, server: Running) -> None:
    counted = client.messages.count_tokens(model="tiny", messages=HELLO, system="be brief").input_tokens
    usage = post(server, system="be brief").json()["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_content_blocks_are_text(server: Running) -> None:
    blocks = [{"type": "text", "text": "hel", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "lo"}]
    told = [
        post(server, messages=[{"role": "user", "content": content}], temperature=0).json()["content"]
        for content in ("hello", blocks)
    ]
    assert told[0] == told[1]
    turns = [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "again"}]
    assert post(server, messages=turns).status_code == 200


def test_a_stop_sequence_is_named(server: Running) -> None:
    text = post(server, max_tokens=60, temperature=0).json()["content"][0]["text"]
    stop = text[10:13]
    cut = post(server, max_tokens=60, temperature=0, stop_sequences=[stop, "never there"]).json()
    assert cut["content"][0]["text"] == text[: text.index(stop)]
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", stop)


def test_a_stream_s_events_come_in_order(server: Running) -> None:
    asked = {"model": "tiny", "max_tokens": 5, "messages": HELLO, "stream": True, "temperature": 0}
    with httpx.stream("POST", server.url + "/v1/messages", json=asked, timeout=PATIENCE_S) as response:
        blocks = response.read().decode().strip().split("\n\n")
    names = [block.split("\n")[0].removeprefix("event: ") for block in blocks]
    events = [httpx.Response(200, content=block.split("\n", 1)[1].removeprefix("data: ")).json() for block in blocks]
    assert [event["type"] for event in events] == names
    deltas = names.count("content_block_delta")
    assert names == [
        "message_start", "content_block_start", *["content_block_delta"] * deltas, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0]["message"]["content"] == []
    assert events[-2]["usage"]["output_tokens"] == 5


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"max_tokens": None}, 400, "max_tokens is missing"),
        ({"max_tokens": 0}, 400, "max_tokens must be at least 1"),
        ({"max_tokens": 40_000}, 400, "maximum context length"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": HELLO * 4097}, 400, "messages has 4097 entries"),
        ({"messages": [{"role": "system", "content": "a"}]}, 400, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, 400, "the last message must be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "messages[0].content"),
        ({"stop_sequences": [""]}, 400, "stop_sequences must be"),
        ({"tools": [{"name": "f"}]}, 400, "tools[0].input_schema is missing"),
        ({"tools": [{"name": "f", "input_schema": {}}]}, 400, "template takes no tools"),
        ({"thinking": {"type": "often"}}, 400, "thinking.type"),
        ({"colour": 1}, 400, "unknown parameter colour"),
        ({"model": "other"}, 404, "does not exist here"),
    ],
)
def test_errors_have_anthropic_s_shape(server: Running, body: dict[str, Any], status: int, said: str) -> None:
    response = post(server, **body)
    assert response.status_code == status, response.text
    told = response.json()
    assert told["type"] == "error"
    assert told["error"]["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]
    assert said in told["error"]["message"]
