"""The tokenizer over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.base.errors import ContextTooLong
from tenon.models.hub import resolve
from tenon.models.tokenizer import Tokenizer, load_tokenizer
from tenon.server.tokens import INLINE_CHARS, LONG_CHARS, ids_of
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


class Counting:
    """A tokenizer that counts the characters it is given, and how many texts at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.long_texts = asyncio.Lock()
        self.n_chars = self.n_at_once = self.most_at_once = 0

    def encode(self, text: str, *, special: bool) -> list[int]:
        self.n_chars += len(text)
        self.n_at_once += 1
        self.most_at_once = max(self.most_at_once, self.n_at_once)
        ids = self._tokenizer.encode(text, add_special=special)
        self.n_at_once -= 1
        return ids


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve("embedded"))


@given(
    words=st.lists(
        st.sampled_from(["the", "def f(x):\n", " ", "\n\n", "\u00e9\u0301", "x" * 40, "1234567", "\U0001f600"])
    ),
    repeat=st.integers(1, 4000),
    most=st.integers(1, 3000),
)
@settings(max_examples=60, deadline=None)
def test_no_text_that_fits_is_refused(tokenizer: Tokenizer, words: list[str], repeat: int, most: int) -> None:
    text = " ".join(words * repeat)[:400_000]
    whole = tokenizer.encode(text, add_special=True)
    try:
        found = asyncio.run(ids_of(Counting(tokenizer), text, special=True, most=most))  # type: ignore[arg-type]
    except ContextTooLong:
        assert len(whole) > most
    else:
        assert found == whole


def test_a_text_that_cannot_fit_is_not_tokenised_whole(tokenizer: Tokenizer) -> None:
    it = Counting(tokenizer)
    with pytest.raises(ContextTooLong, match=r"maximum context length is 1000 tokens.*at least \d+ tokens"):
        asyncio.run(ids_of(it, "hello there " * 500_000, special=True, most=1000))  # type: ignore[arg-type]
    assert INLINE_CHARS < it.n_chars <= 8000


def test_very_long_texts_take_their_turn(tokenizer: Tokenizer) -> None:
    it, text = Counting(tokenizer), "a " * (LONG_CHARS // 2 + 1)

    async def all_at_once() -> list[list[int]]:
        return await asyncio.gather(*(ids_of(it, text, special=False) for _ in range(2)))  # type: ignore[arg-type]

    found = asyncio.run(all_at_once())
    assert all(ids == found[0] for ids in found)
    assert it.most_at_once == 1
