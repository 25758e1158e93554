"""What a request may not say, each with the field that the answer names; all of it answered by the HTTP status."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import PATIENCE_S, Running

COMPLETION: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": [258]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**63]}, "prompt"),
    ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"speculative": {"max_tokens": 0}}, "speculative.max_tokens"),
    ({"speculative": {"width": 3}}, "speculative.width"),
    ({"speculative": "yes"}, "speculative"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 32768}, "prompt"),
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"n": 64, "prompt": ["a", "b", "c"]}, "n"),
    ({"n": 64, "max_tokens": 30_000, "logprobs": 20}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": 2**64}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": True, "logprobs": 21}, "logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 65}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"presence_penalty": "much"}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"one": 2}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"258": 1}}, "logit_bias"),
    ({"bad_words": ["a", ""]}, "bad_words"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"temprature": 1}, "temprature"),
]
CHAT: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages[0].colour"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    ({"messages": [{"role": "user", "content": "a", "tool_call_id": "b"}]}, "messages[0].tool_call_id"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"messages": [{"role": "user", "content": "a" * 40_000}]}, "messages"),
]


@pytest.mark.parametrize(("body", "param"), COMPLETION)
def test_completion_field_is_refused_by_name(server: Running, body: dict[str, Any], param: str | None) -> None:
    response = server.post("/v1/completions", {"prompt": "a"} | body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert isinstance(error["code"], str)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("body", "param"), CHAT)
def test_chat_field_is_refused_by_name(server: Running, body: dict[str, Any], param: str | None) -> None:
    response = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]} | body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"model": "\xff"}', b'{"model":"tiny","prompt":"a","seed":NaN}', b"[" * 99999,
             b'{"model":"tiny","prompt":"a","temperature":1e999}', b'{"model":"tiny","prompt":"\\ud800"}']
)  # fmt: skip
def test_bodies_that_are_no_json_object(server: Running, body: bytes) -> None:
    response = httpx.post(server.url + "/v1/completions", content=body, timeout=PATIENCE_S)
    assert response.status_code == 400
    assert "error" in response.json()


def test_values_that_ask_for_nothing_are_taken(server: Running) -> None:
    neutral = {"best_of": 1, "suffix": None, "presence_penalty": 0, "logit_bias": {}, "stop": None, "user": "me"}
    assert server.complete(max_tokens=1, **neutral)
    message = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": []}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {
        "messages": [{"role": "developer", "content": "x"}, message, {"role": "user", "content": parts}],
        "response_format": {"type": "text"}, "tools": [], "max_completion_tokens": 1, "max_tokens": 1,
    }  # fmt: skip
    assert server.post("/v1/chat/completions", body).status_code == 200


def test_a_streamed_request_is_refused_by_status(server: Running) -> None:
    response = server.post("/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 99_999})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
