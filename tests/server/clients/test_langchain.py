"""LangChain's adapter for OpenAI, unmodified, as a process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.clients.environments import told
from tests.server.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def said(server: Running) -> Any:
    return told("langchain", server.url, server.model)


def test_a_chat_is_answered_with_its_usage(said: Any) -> None:
    first, again = said["first"], said["again"]
    assert first["text"] == again["text"] != ""
    assert first["metadata"]["finish_reason"] == "length"
    assert first["usage"]["output_tokens"] == 12
    assert first["usage"]["total_tokens"] == first["usage"]["input_tokens"] + 12
    assert first["usage"]["input_token_details"] == {"cache_read": 0}
    assert again["usage"]["input_token_details"]["cache_read"] >= 96


def test_a_stream_adds_up_to_the_same(said: Any) -> None:
    assert said["streamed"]["text"] == said["again"]["text"] == said["batch"][0]
    assert said["streamed"]["usage"] == said["again"]["usage"]
    assert said["streamed"]["metadata"]["finish_reason"] == "length"


def test_log_probabilities_arrive(said: Any) -> None:
    tokens = said["scored"]["metadata"]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == said["scored"]["text"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0 for token in tokens)


def test_a_seed_gives_the_same_text(said: Any) -> None:
    one, same, other, default = said["seeds"]
    assert one == same == default != other


def test_too_long_a_prompt_is_a_typed_error(said: Any) -> None:
    for refusal in [*said["refused"], said["refused_completion"]]:
        assert (refusal["code"], refusal["status"]) == ("context_length_exceeded", 400)
        assert "maximum context length is 2048 tokens" in refusal["said"]


def test_completions_are_answered(said: Any) -> None:
    assert all(said["completions"])
    assert said["streamed_completion"] == said["completions"][0]
    assert said["reasons"] == ["length", "length"]
    assert said["completion_usage"]["completion_tokens"] == 24


def test_the_responses_api_answers_the_same(said: Any) -> None:
    for answer in (said["response"], said["streamed_response"]):
        assert answer["text"] == said["first"]["text"]
        assert answer["usage"]["output_tokens"] == 12
        assert answer["usage"]["input_token_details"] == said["again"]["usage"]["input_token_details"]
