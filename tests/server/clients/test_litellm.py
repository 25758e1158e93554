"""LiteLLM, unmodified, as a process: by OpenAI's API, by Anthropic's, and with keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.clients.environments import told
from tests.server.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
KEY = "alice-0123456789abcdef"


@pytest.fixture(scope="module")
def said(server: Running) -> Any:
    return told("litellm", server.url, server.model, "none")


def test_a_chat_is_answered_with_its_usage(said: Any) -> None:
    first, again = said["chats"]
    assert first["text"] == again["text"] != ""
    assert first["reason"] == "length"
    n_prompt, n_output, n_total = first["counts"]
    assert (n_output, n_total) == (12, n_prompt + 12)
    assert first["cached"] == 0
    assert again["cached"] >= 96


def test_a_stream_adds_up_to_the_same(said: Any) -> None:
    assert said["streamed"] == said["chats"][1]


def test_completions_are_the_same_on_both_routes_and_streamed(said: Any) -> None:
    one, two, streamed = said["completions"]
    assert one == two == streamed != ""


def test_anthropic_s_api_answers_the_same(said: Any) -> None:
    whole, streamed = said["messages"]
    assert whole == said["chats"][1]
    assert streamed == whole | {name: streamed[name] for name in ("counts", "cached")}


def test_the_responses_api_answers_the_same(said: Any) -> None:
    assert said["response"]["text"].startswith(said["chats"][0]["text"])
    assert said["response"]["cached"] == said["chats"][1]["cached"]


def test_too_long_a_prompt_is_known_as_such(said: Any) -> None:
    for overflow in said["overflows"]:
        assert (overflow["kind"], overflow["status"]) == ("ContextWindowExceededError", 400)
        assert "maximum context length is 2048 tokens" in overflow["said"]


def test_a_wrong_key_is_known_as_such(own_server: Callable[..., Running], tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[key]]\nname = "alice"\nkey = "{KEY}"\n')
    guarded = own_server("--keys", str(keys))
    said = told("litellm", guarded.url, guarded.model, KEY, "strangers", "chats", "messages")
    assert [(each["kind"], each["status"]) for each in said["strangers"]] == [("AuthenticationError", 401)] * 3
    assert all(answer["text"] for answer in said["chats"])
    assert said["messages"][0]["text"] == said["chats"][0]["text"]
