"""The API as clients use it: the official client, the order of streams, what answers hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import PATIENCE_S, Running

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_official_client_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8, seed=1)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_official_client_streams_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=40, seed=7)
    with client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=40, seed=7, stream=True) as chunks:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def test_official_client_lists_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "tenon")
    assert client.models.retrieve("tiny").created == model.created


def test_official_client_sees_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=40_000)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length" in caught.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"


def test_chat_stream_comes_in_order(server: Running) -> None:
    options = {"include_usage": True}
    stream = server.stream(
        "/v1/chat/completions", messages=HELLO, max_tokens=6, ignore_eos=True, stream_options=options
    )
    *chunks, last, done = list(stream.events())
    stream.close()
    assert done == "[DONE]"
    assert isinstance(last, dict)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0} or last["usage"]["prompt_tokens"] > 16
    first, *contents, finish = [chunk["choices"][0] for chunk in chunks if isinstance(chunk, dict)]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert all(chunk["delta"].keys() == {"content"} and chunk["finish_reason"] is None for chunk in contents)
    assert (finish["delta"], finish["finish_reason"]) == ({}, "length")
    assert all(chunk["usage"] is None for chunk in chunks if isinstance(chunk, dict))


def test_continuous_usage_grows_to_the_total(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = server.stream(max_tokens=6, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in stream.events() if isinstance(event, dict)]
    stream.close()
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_no_usage_unless_asked(server: Running) -> None:
    stream = server.stream(max_tokens=3)
    events = list(stream.events())
    stream.close()
    assert all("usage" not in event for event in events if isinstance(event, dict))
    assert events[-1] == "[DONE]"


def test_several_prompts_and_n_are_indexed(server: Running) -> None:
    answer = server.complete(prompt=["one", "two"], n=2, max_tokens=4, ignore_eos=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 16


def test_token_ids_are_taken_as_they_are(server: Running) -> None:
    text = server.complete(prompt="abc", seed=3, max_tokens=10, ignore_eos=True)
    ids = server.complete(prompt=[64, 65, 66], seed=3, max_tokens=10, ignore_eos=True)
    several = server.complete(prompt=[[64, 65, 66]], seed=3, max_tokens=10, ignore_eos=True)
    assert text["usage"] == ids["usage"] == several["usage"]
    assert text["choices"][0]["text"] == ids["choices"][0]["text"] == several["choices"][0]["text"]


def test_a_seed_repeats_and_its_absence_does_not(server: Running) -> None:
    seeded = {server.complete(seed=5, max_tokens=30)["choices"][0]["text"] for _ in range(2)}
    free = {server.complete(max_tokens=30, ignore_eos=True)["choices"][0]["text"] for _ in range(2)}
    assert (len(seeded), len(free)) == (1, 2)
    assert server.complete(seed=-1, max_tokens=3)


def test_echo_puts_the_prompt_first(server: Running) -> None:
    plain = server.complete(prompt="abc", seed=3, max_tokens=5)["choices"][0]["text"]
    assert server.complete(prompt="abc", seed=3, max_tokens=5, echo=True)["choices"][0]["text"] == "abc" + plain
    stream = server.stream(prompt="abc", seed=3, max_tokens=5, echo=True, ignore_eos=False)
    text = "".join(e["choices"][0]["text"] for e in stream.events() if isinstance(e, dict))
    stream.close()
    assert text == "abc" + plain


def test_completion_logprobs_line_up(server: Running) -> None:
    answer = server.complete(seed=1, max_tokens=12, logprobs=2, ignore_eos=True)["choices"][0]
    logprobs = answer["logprobs"]
    assert {len(logprobs[key]) for key in logprobs} == {12}
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == value <= max(top.values())
        assert 2 <= len(top) <= 3
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


def test_chat_logprobs_stream_with_their_text(server: Running) -> None:
    body = {"messages": HELLO, "max_tokens": 12, "logprobs": True, "top_logprobs": 1, "ignore_eos": True, "seed": 2}
    whole = server.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    stream = server.stream("/v1/chat/completions", **body)
    choices = [e["choices"][0] for e in stream.events() if isinstance(e, dict)]
    stream.close()
    streamed = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert streamed == whole
    assert len(whole) == 12
    assert all(len(entry["top_logprobs"]) == 1 and isinstance(entry["bytes"], list) for entry in whole)


def test_stop_string_ends_the_text_before_it(server: Running) -> None:
    text = server.complete(seed=11, max_tokens=60, ignore_eos=True)["choices"][0]["text"]
    stop = text[20:23]
    cut = text[: text.index(stop)]
    whole = server.complete(seed=11, max_tokens=60, ignore_eos=True, stop=stop)
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == (cut, "stop")
    assert whole["usage"]["completion_tokens"] < 60
    stream = server.stream(seed=11, max_tokens=60, stop=[stop, "never there"])
    events = [event["choices"][0] for event in stream.events() if isinstance(event, dict)]
    stream.close()
    assert "".join(event["text"] for event in events) == cut
    assert events[-1]["finish_reason"] == "stop"


def test_stop_strings_end_each_of_n_alone(server: Running) -> None:
    plain = server.complete(seed=11, n=2, max_tokens=40, ignore_eos=True)["choices"]
    stop = plain[0]["text"][5:8]
    first, second = server.complete(seed=11, n=2, max_tokens=40, ignore_eos=True, stop=stop)["choices"]
    assert first["text"] == plain[0]["text"][: plain[0]["text"].index(stop)]
    assert second["text"] == plain[1]["text"].partition(stop)[0]


def test_stop_token_is_not_shown(server: Running) -> None:
    ids = {chr(i + 33) if i < 94 else None: i for i in range(94)}
    text = server.complete(seed=4, max_tokens=60, ignore_eos=True)["choices"][0]["text"]
    stop = next(c for c in text if c in ids)
    answer = server.complete(seed=4, max_tokens=60, ignore_eos=True, stop_token_ids=[ids[stop]])
    assert answer["choices"][0] == answer["choices"][0] | {"text": text.partition(stop)[0], "finish_reason": "stop"}


def test_cached_tokens_are_reported(server: Running) -> None:
    prompt = [7] * 100
    server.complete(prompt=prompt, max_tokens=1)
    again = server.complete(prompt=prompt, max_tokens=1)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 96


def test_request_ids_go_both_ways(server: Running) -> None:
    given = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    hostile = httpx.get(server.url + "/livez", headers={"x-request-id": "a b\tc"}, timeout=PATIENCE_S)
    assert hostile.headers["x-request-id"] not in ("", "a b\tc")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/no_such_thing", 404), ("GET", "/v1/completions", 405)]
)
def test_unknown_paths_answer_in_the_shape_of_openai(server: Running, method: str, path: str, status: int) -> None:
    response = httpx.request(method, server.url + path, timeout=PATIENCE_S)
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"host": "evil.example"}, {"origin": "null"}])
def test_other_web_sites_are_kept_out(server: Running, headers: dict[str, str]) -> None:
    assert httpx.get(server.url + "/v1/models", headers=headers, timeout=PATIENCE_S).status_code == 403


def test_the_page_is_served_under_a_strict_policy(server: Running) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/page.js", "text/javascript"),
        ("/map.js", "text/javascript"),
        ("/trees.js", "text/javascript"),
        ("/ledger.js", "text/javascript"),
        ("/tokens.js", "text/javascript"),
        ("/page.css", "text/css"),
    ):
        response = httpx.get(server.url + path, timeout=PATIENCE_S)
        assert response.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "//" not in response.text.replace("http://www.w3.org/2000/svg", "") or path != "/"


def test_events_tell_of_a_request(server: Running) -> None:
    with httpx.stream("GET", server.url + "/events", timeout=PATIENCE_S) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        seen = [httpx.Response(200, content=next(lines)[6:]).json()]
        server.complete(max_tokens=3)
        while seen[-1]["kind"] != "finished":
            seen.append(httpx.Response(200, content=next(lines)[6:]).json())
    assert {event["v"] for event in seen} == {1}
    assert seen[0]["kind"] == "state"
    kinds = [event["kind"] for event in seen if event["kind"] in ("started", "first", "finished")]
    assert kinds == ["started", "first", "finished"]


def test_biases_bans_and_least_lengths_reach_the_engine(server: Running) -> None:
    """Greedy: what is banned is never taken, and nothing before it changes."""
    ids = {chr(i + 33): i for i in range(94)}

    def answer(**wishes: Any) -> tuple[str, int]:
        whole = server.complete(temperature=0, max_tokens=60, ignore_eos=True, **wishes)
        return whole["choices"][0]["text"], whole["usage"]["completion_tokens"]

    plain, _ = answer()
    banned = next(c for c in plain[10:] if c in ids)
    before = plain.partition(banned)[0]
    for wish in ({"bad_words": [banned]}, {"logit_bias": {str(ids[banned]): -100}}):
        text, _ = answer(**wish)
        assert text.startswith(before)
        assert banned not in text
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0, "logit_bias": {"5": 0}, "min_tokens": 0}
    assert answer(**neutral)[0] == plain
    assert answer(repetition_penalty=5.0, frequency_penalty=2.0)[0] != plain
    for stop in ({"stop": banned}, {"stop_token_ids": [ids[banned]]}):
        assert answer(**stop)[0] == before
        text, n_tokens = answer(**stop, min_tokens=50)
        assert n_tokens >= 50
        assert text.startswith(before)


def test_echo_with_logprobs_reads_as_lm_evaluation_harness_reads_it(server: Running) -> None:
    """Arrays cover the prompt and one token more; what a token costs does not depend on what comes after it."""
    context, continuation = [7, 8, 9] * 12, [10, 70, 3]
    body = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234, "ignore_eos": True}
    answer = server.complete(prompt=[context + continuation, context], **body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    long, short = (choice["logprobs"] for choice in answer["choices"])
    assert len(long["token_logprobs"]) == len(context) + len(continuation) + 1 == len(long["top_logprobs"])
    assert long["token_logprobs"][0] is None is long["top_logprobs"][0]
    n = len(context)
    assert long["token_logprobs"][1:n] == short["token_logprobs"][1:n]
    for token, logprob, top in zip(
        long["tokens"][1:], long["token_logprobs"][1:], long["top_logprobs"][1:], strict=True
    ):
        assert top[token] == logprob
        assert max(top.values()) >= logprob
    best = max(short["top_logprobs"][-1], key=short["top_logprobs"][-1].get)
    assert short["tokens"][-1] == best  # greedy
    assert long["text_offset"][:n] == list(range(n))
    again = server.complete(prompt=[context], **body)["choices"][0]["logprobs"]
    assert again == short
    alone = server.complete(prompt=[context], **body | {"max_tokens": 0})
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == short["token_logprobs"][:-1]
    assert alone["choices"][0]["finish_reason"] == "length"
    assert alone["usage"]["completion_tokens"] == 0


def test_echo_with_logprobs_streams_the_prompt_first(server: Running) -> None:
    whole = server.complete(prompt=["one", "two"], n=2, max_tokens=3, seed=1, logprobs=2, echo=True, ignore_eos=True)
    stream = server.stream(prompt=["one", "two"], n=2, max_tokens=3, seed=1, logprobs=2, echo=True)
    parts: dict[int, list[Any]] = {}
    for event in stream.events():
        if isinstance(event, dict):
            parts.setdefault(event["choices"][0]["index"], []).append(event["choices"][0])
    stream.close()
    for choice in whole["choices"]:
        mine = parts[choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        told = [x for part in mine if part["logprobs"] for x in part["logprobs"]["token_logprobs"]]
        assert told == choice["logprobs"]["token_logprobs"]
        offsets = [x for part in mine if part["logprobs"] for x in part["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]
    assert [choice["text"][:3] for choice in whole["choices"]] == ["one", "one", "two", "two"]


def test_best_of_keeps_the_likeliest(server: Running) -> None:
    wishes = {"max_tokens": 8, "seed": 3, "ignore_eos": True, "prompt": ["a", "b"]}
    many = server.complete(n=6, logprobs=0, **wishes)["choices"]
    best = server.complete(n=2, best_of=6, **wishes)["choices"]
    for at in (0, 6):
        ranked = sorted(many[at : at + 6], key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
        assert [choice["text"] for choice in best[at // 3 : at // 3 + 2]] == [choice["text"] for choice in ranked[:2]]
    assert [choice["index"] for choice in best] == [0, 1, 2, 3]
    assert best[0]["logprobs"] is None


def test_prompt_logprobs_name_the_token_and_its_rank(server: Running) -> None:
    messages = [{"role": "user", "content": "hello there, " * 10}]
    chat: dict[str, Any] = {"messages": messages, "max_tokens": 1, "prompt_logprobs": 20, "seed": 1}
    told = server.post("/v1/chat/completions", chat).json()["prompt_logprobs"]
    ids = httpx.post(server.url + "/tokenize", json={"messages": messages}, timeout=PATIENCE_S).json()["tokens"]
    assert told[0] is None
    n_best = 0
    for token, entry in zip(ids[1:], told[1:], strict=True):
        own, *_ = entry.items()
        assert own[0] == str(token)
        assert len(entry) == (20 if own[1]["rank"] <= 20 else 21)
        best = sorted(entry.values(), key=lambda each: each["rank"])
        assert [each["rank"] for each in best][:20] == list(range(1, 21))
        assert [each["logprob"] for each in best] == sorted((each["logprob"] for each in best), reverse=True)
        n_best += own[1]["rank"] <= 20
    assert 0 < n_best < len(ids) - 1
    asked = {"prompt": [ids, ids[:3]], "max_tokens": 1, "n": 2, "seed": 1}
    choices = server.complete(prompt_logprobs=20, **asked)["choices"]
    assert [choice["prompt_logprobs"] for choice in choices] == [told, told, told[:3], told[:3]]
    echoed = server.complete(echo=True, logprobs=20, prompt_logprobs=20, **asked)["choices"][0]
    assert echoed["prompt_logprobs"] == told
    own_logprobs = [next(iter(entry.values()))["logprob"] for entry in told[1:]]
    assert echoed["logprobs"]["token_logprobs"][1 : len(ids)] == own_logprobs
    for wrong in ({"stream": True}, {"echo": True, "logprobs": 3}):
        refused = server.post("/v1/completions", {"prompt": "a", "prompt_logprobs": 2} | wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")
