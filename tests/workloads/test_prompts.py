"""Prompts made of contents: ids, texts and chats that share what their contents share."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.base.errors import ConfigError
from tenon.workloads.prompts import WORDS, Prompts, common_ids, text_of
from tenon.workloads.trace import Segment, Trace, TraceRequest
from tests.workloads.servers import (
    CHAT,
    Request,
    ending,
    play,
    text,
    trace_of,
)


def body_of(prompts: Prompts, *segments: Segment, n_output: int = 4, **answers: str) -> Any:
    request = TraceRequest("r", 0.0, segments, n_output)
    return json.loads(prompts.body(request, {int(key[1:]): value for key, value in answers.items()}))


def test_words_are_distinct_and_plain() -> None:
    assert len(set(WORDS)) == len(WORDS) >= 200
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)


@given(st.integers(0, 2**40), st.integers(1, 60), st.integers(1, 60))
def test_texts_of_one_content_begin_alike_and_have_a_word_a_token(content: int, a: int, b: int) -> None:
    short, long = sorted((a, b))
    assert len(text_of(content, short).split()) == short
    assert (text_of(content, long) + " ").startswith(text_of(content, short) + " ")


@pytest.mark.parametrize("vocab_size", [0, 32000])
def test_prompts_that_share_contents_share_their_beginning(vocab_size: int) -> None:
    prompts = Prompts("m", "completions", vocab_size=vocab_size)
    whole = body_of(prompts, Segment(1, 50), Segment(2, 30))["prompt"]
    other = body_of(prompts, Segment(1, 50), Segment(3, 30))["prompt"]
    shared = body_of(prompts, Segment(1, 50))["prompt"]
    assert whole[: len(shared)] == other[: len(shared)] == shared
    assert whole != other


@given(st.integers(16, 200_000))
def test_token_ids_stay_within_the_common_part_of_the_vocabulary(vocab_size: int) -> None:
    ids = body_of(Prompts("m", "completions", vocab_size=vocab_size), Segment(5, 200))["prompt"]
    first, end = common_ids(vocab_size)
    assert len(ids) == 200
    assert 0 < first <= min(ids) <= max(ids) < end < vocab_size


def test_a_chat_alternates_and_gives_answers_back_as_they_were() -> None:
    prompts = Prompts("m", "chat", outputs=[20, 21, 10])
    segments = (Segment(10, 2), Segment(11, 3), Segment(20, 4), Segment(12, 1), Segment(13, 1), Segment(21, 2))
    messages = body_of(prompts, *segments, Segment(14, 1), c20=" As it was. ")["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[0]["content"] == (text_of(10, 2) + text_of(11, 3))[1:]
    assert messages[1]["content"] == " As it was. "
    assert messages[2]["content"] == (text_of(12, 1) + text_of(13, 1))[1:]
    assert messages[3]["content"] == text_of(21, 2)
    assert [message["role"] for message in body_of(prompts, *segments)["messages"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize(("endpoint", "vocab_size"), [("chat", 32000), ("completions", 15), ("completions", -1)])
def test_prompts_that_cannot_be_made_are_refused(endpoint: Any, vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=r"token ids go to the completions endpoint|vocab_size must be at least 16"):
        Prompts("m", endpoint, vocab_size=vocab_size)


TURNS = Trace.make(
    "t",
    "t",
    [
        TraceRequest("one", 0.0, (Segment(1, 4),), 3, output=50),
        TraceRequest("two", 0.0, (Segment(1, 4), Segment(50, 3), Segment(2, 4)), 3, output=51, after="one"),
    ],
)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_real_answers_are_fed_into_later_prompts(endpoint: Any) -> None:
    async def answers(request: Request) -> None:
        await request.head()
        if endpoint == "chat":
            await request.chunk(b"".join(CHAT))
        else:
            await request.chunk(text(" Grüße") + text(" 🦜!") + ending(2))
        await request.chunk(b"")

    got = play(TURNS, answers, endpoint=endpoint, feed_answers=True)
    body = got.server.requests[1].body
    if endpoint == "chat":
        assert [message["content"] for message in body["messages"]] == [
            text_of(1, 4)[1:],
            "Grüße 🦜!",
            text_of(2, 4)[1:],
        ]
    else:
        assert body["prompt"] == text_of(1, 4) + " Grüße 🦜!" + text_of(2, 4)
    assert not any("earlier answers" in note for note in got.notes)


def test_prompts_with_the_traces_own_answers_are_in_the_notes() -> None:
    notes = play(TURNS).notes
    assert any(note.startswith("1 prompts contain earlier answers as the trace has them") for note in notes)


def test_a_server_that_counts_other_prompt_tokens_is_in_the_notes() -> None:
    notes = play(trace_of([0.0], n_prompt=50)).notes
    assert any(note.startswith("the server counted 5 prompt tokens, the trace has 50") for note in notes)
