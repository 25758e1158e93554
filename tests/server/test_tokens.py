"""The tokenizer over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import PATIENCE_S, Running


def post(server: Running, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=PATIENCE_S)


@pytest.mark.parametrize("text", ["hello world", "", "\u00fcn\u00efcode \U0001f600", "x" * 10_000])
def test_text_comes_back(server: Running, text: str) -> None:
    found = post(server, "/tokenize", prompt=text, return_token_strs=True).json()
    assert found["count"] == len(found["tokens"]) == len(text.encode()) == len(found["token_strs"])
    assert found["max_model_len"] == 32768
    assert post(server, "/detokenize", tokens=found["tokens"]).json() == {"prompt": text}


def test_special_tokens_come_back_too(server: Running) -> None:
    assert post(server, "/detokenize", tokens=[256, 5, 257]).json() == {"prompt": "<s>&</s>"}


def test_a_chat_is_counted_as_it_will_be_served(server: Running) -> None:
    messages = [{"role": "user", "content": "hello"}]
    found = post(server, "/tokenize", model="tiny", messages=messages).json()
    answer = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).json()
    assert found["count"] == answer["usage"]["prompt_tokens"]
    assert post(server, "/detokenize", tokens=found["tokens"]).json()["prompt"] == "<|user|>hello\n<|assistant|>"
    shorter = post(server, "/tokenize", messages=messages, add_generation_prompt=False).json()
    assert shorter["count"] == found["count"] - len("<|assistant|>")
    assert shorter["token_strs"] is None


def test_special_tokens_and_the_template_are_told(server: Running) -> None:
    found = httpx.get(server.url + "/tokenizer_info", timeout=PATIENCE_S).json()
    assert (found["bos_token"], found["eos_token"], found["vocab_size"]) == ("<s>", "</s>", 258)
    assert "<|assistant|>" in found["chat_template"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}] * 4097}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "promt": "a"}, 400, "promt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {"tokens": [258]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "abc"}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
def test_what_is_wrong_is_named(server: Running, path: str, body: dict[str, Any], status: int, param: str) -> None:
    response = post(server, path, **body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
