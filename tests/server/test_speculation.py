"""Guesses over HTTP: answers are those without them, a request may say how far, and what was guessed is told."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.conftest import PATIENCE_S, Running, start, wait_for
from tests.server.test_events import Event, until, watching
from tests.server.test_keys import ALICE, BOB, CAROL, FILE, bearer
from tests.server.test_lifecycle import alive

Start = Callable[..., Running]

OPTIONS = ("--speculative", "suffix", "--speculative-policy", "fixed-tree")
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5},
    "two": {"n": 2, "logprobs": 3},
    "echo": {"echo": True, "logprobs": 1, "temperature": 0},
    "short": {"max_tokens": 9, "logprobs": 0},
    "best": {"best_of": 3, "n": 2},
    "chat": CHAT | {"logprobs": True, "top_logprobs": 2, "n": 2},
}
COUNTS = "tenon_spec_decode_num_"


@pytest.fixture(scope="module")
def guessing(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """It remembers what it has said, so that what is asked again is guessed."""
    running = start(model_folder, *OPTIONS, store=tmp_path_factory.mktemp("store"))
    yield running
    assert running.stop() == 0
    running.close()


def counted(server: Running) -> dict[str, float]:
    """What was guessed so far."""
    found = server.metrics().items()
    return {name.removeprefix(COUNTS): value for name, value in found if name.startswith(COUNTS)}


def told(server: Running, asked: dict[str, Any]) -> tuple[Any, int]:
    """All choices of an answer, and how many tokens it has."""
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    body = {"max_tokens": 80, "seed": 5, "ignore_eos": True} | asked
    response = server.post(path, body if "messages" in asked else {"prompt": "hello"} | body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"], answer["usage"]["completion_tokens"]


def streamed(server: Running, asked: dict[str, Any]) -> tuple[Any, int]:
    """The same, put together from a stream, of one choice: text, log-probabilities and why it ended."""
    options = {"include_usage": True}
    stream = server.stream(**{"max_tokens": 80, "seed": 5} | asked, stream_options=options)
    *chunks, last, done = list(stream.events())
    stream.close()
    assert done == "[DONE]"
    assert not isinstance(last, str)
    choices = [chunk["choices"][0] for chunk in chunks if not isinstance(chunk, str)]
    logprobs = [entry for it in choices if it["logprobs"] for entry in it["logprobs"]["token_logprobs"]]
    said = "".join(it["text"] for it in choices), logprobs, choices[-1]["finish_reason"]
    return said, last["usage"]["completion_tokens"]


@pytest.mark.parametrize("name", ASKED)
def test_answers_are_those_without_guesses(server: Running, guessing: Running, name: str) -> None:
    plain = told(server, ASKED[name])
    assert told(guessing, ASKED[name]) == plain
    before = counted(guessing)
    assert told(guessing, ASKED[name]) == plain
    assert counted(guessing)["accepted_tokens_total"] - before["accepted_tokens_total"] > plain[1] / 2


def stops(server: Running, asked: dict[str, Any]) -> list[str]:
    """Stop strings that end the answer in several places."""
    text = told(server, asked)[0][0]["text"]
    found = [text[at : at + 2] for at in range(4, len(text) - 2)]
    return [stop for stop in found if "\ufffd" not in stop][::4]


@pytest.mark.parametrize("how", [told, streamed])
@pytest.mark.parametrize("wishes", [{"temperature": 0}, {"temperature": 0.9, "logprobs": 2, "min_tokens": 3}])
def test_a_stop_string_among_guesses_ends_text_scores_and_usage(
    server: Running, guessing: Running, wishes: dict[str, Any], how: Callable[..., Any]
) -> None:
    told(guessing, wishes)
    found = stops(server, wishes)
    assert len(found) > 2
    n_cut, before = 0, counted(guessing)
    for stop in found:
        asked = wishes | {"stop": [stop]}
        plain = how(server, asked)
        assert how(guessing, asked) == plain
        n_cut += plain[1] < 80
    assert n_cut == len(found)
    assert counted(guessing)["accepted_tokens_total"] - before["accepted_tokens_total"] > 4 * n_cut


@pytest.mark.parametrize("off", [False, {"enabled": False}, {"enabled": False, "max_tokens": 3}])
def test_a_request_may_have_nothing_guessed(server: Running, guessing: Running, off: Any) -> None:
    asked = {"temperature": 0.5}
    plain = told(server, asked)
    assert told(guessing, asked) == plain
    before = counted(guessing)
    assert told(guessing, asked | {"speculative": off}) == plain
    assert counted(guessing) == before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello", "max_tokens": 20}),
        ("/v1/chat/completions", CHAT | {"max_tokens": 20}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 20}),
        ("/v1/messages", CHAT | {"max_tokens": 20}),
    ],
)
def test_every_api_takes_how_far(guessing: Running, path: str, body: dict[str, Any]) -> None:
    def grown(given: Any) -> dict[str, float]:
        before = counted(guessing)
        response = guessing.post(path, body | {"temperature": 0, "speculative": given})
        assert response.status_code == 200, response.text
        return {name: value - before[name] for name, value in counted(guessing).items()}

    grown(True)
    assert grown({"max_tokens": 8})['accepted_tokens_per_pos_total{position="1"}'] > 0
    nearest = grown({"max_tokens": 1})
    assert nearest["accepted_tokens_total"] == nearest['accepted_tokens_per_pos_total{position="0"}'] > 0
    assert not any(grown({"enabled": False, "max_tokens": 1}).values())
    for wrong, param in (
        ({"max_tokens": 0}, "speculative.max_tokens"),
        (1, "speculative"),
        ({"x": 1}, "speculative.x"),
    ):
        refused = guessing.post(path, body | {"speculative": wrong})
        assert refused.status_code == 400
        assert param in refused.text


def test_a_server_that_guesses_nothing_takes_it_too(server: Running) -> None:
    assert told(server, {"speculative": {"max_tokens": 4}}) == told(server, {})
    assert counted(server) == {}


def test_counts_come_by_the_usual_names(guessing: Running) -> None:
    told(guessing, {"temperature": 0})
    found = counted(guessing)
    assert found["drafts_total"] > 0
    assert found["accepted_tokens_total"] <= found["draft_tokens_total"]
    assert found["expected_tokens_total"] > 0
    for name in ("accepted_tokens_per_pos_total", "drafts_per_pos_total"):
        assert {f'{name}{{position="{depth}"}}' for depth in range(8)} <= found.keys()
    by_depth = [found[f'accepted_tokens_per_pos_total{{position="{depth}"}}'] for depth in range(8)]
    assert by_depth == sorted(by_depth, reverse=True)
    assert sum(by_depth) == found["accepted_tokens_total"]


def test_stats_tell_of_guesses_where_there_are_any(server: Running, guessing: Running) -> None:
    for one in (server, guessing):
        told(one, {"temperature": 0})
        with watching(one) as events:
            guesses = until(events, "stats")["guesses"]
            while guesses is not None and guesses["trees"] < counted(one)["drafts_total"]:
                guesses = until(events, "stats")["guesses"]
        if one is server:
            assert guesses is None
        else:
            assert len(guesses["reached"]) == len(guesses["accepted_at"]) == 8
            assert sum(guesses["accepted_at"]) == guesses["accepted"] <= guesses["nodes"]


def names(tree: Event, nodes: list[int]) -> list[str]:
    return [tree["texts"][str(token)] for token in nodes]


def test_trees_are_told_to_who_asks(guessing: Running) -> None:
    told(guessing, {"temperature": 0})
    before, found = counted(guessing)["drafts_total"], list[Event]()
    with watching(guessing, "?trees=1") as events:
        answer = guessing.complete(temperature=0, seed=5, max_tokens=80, ignore_eos=True, logprobs=0)
        name = answer["id"].removeprefix("cmpl-") + "/0"
        while len(found) < counted(guessing)["drafts_total"] - before:
            event = until(events, "trees")
            found += [tree | {"texts": event["texts"]} for tree in event["trees"] if tree["request_id"] == name]
    tokens, n_prompt = answer["choices"][0]["logprobs"]["tokens"], answer["usage"]["prompt_tokens"]
    assert sum(len(tree["path"]) for tree in found) > 20
    for tree in found:
        at = tree["n_tokens"] - n_prompt
        said = names(tree, [*(tree["tokens"][node] for node in tree["path"]), tree["next"]])
        assert said == tokens[at : at + len(said)]
        assert tree["index"] == 0
        assert "tenant" not in tree
        assert len(tree["probabilities"]) == len(tree["parents"]) == len(tree["tokens"])


def test_who_comes_later_begins_with_the_newest(guessing: Running) -> None:
    for _ in range(2):
        answer = guessing.complete(temperature=0, max_tokens=40, ignore_eos=True)
    for _ in range(2):
        with watching(guessing, "?trees=1") as events:
            event = until(events, "trees")
        assert event["trees"][-1]["request_id"] == answer["id"].removeprefix("cmpl-") + "/0"
        assert 1 < len(event["trees"]) <= 64


def test_what_was_said_is_told_to_the_same_tenant_alone(own_server: Start, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(FILE)
    server = own_server(*OPTIONS, "--keys", str(tmp_path / "keys.toml"))
    body = {"prompt": "hello", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    ids = {}
    with watching(server, "?trees=1", headers=bearer(ALICE)) as events:
        for key in (BOB, BOB, CAROL, CAROL):
            ids[key] = server.post("/v1/completions", body, headers=bearer(key)).json()["id"]
        seen: set[str] = set()
        while ids[CAROL].removeprefix("cmpl-") not in {name.partition("/")[0] for name in seen}:
            seen |= {tree["request_id"] for tree in until(events, "trees")["trees"]}
    assert not any(name.startswith(ids[BOB].removeprefix("cmpl-")) for name in seen)


def test_an_answer_outlives_its_engine_and_what_it_asked_for_stays(server: Running, own_server: Start) -> None:
    guessing = own_server(*OPTIONS, "--step-ms", "2")
    wishes = [{"temperature": 0}, {"temperature": 0.7, "n": 2}, {"temperature": 0, "speculative": False}]
    asked = [each | {"max_tokens": 400} for each in wishes]
    plain = [told(server, each) for each in asked]
    with ThreadPoolExecutor(len(asked)) as pool, watching(guessing, "?trees=1") as events:
        answers = [pool.submit(told, guessing, each) for each in asked]
        until(events, "trees")
        pid = guessing.engine_pid()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid))
        assert [answer.result(PATIENCE_S) for answer in answers] == plain
        later = {tree["request_id"] for tree in until(events, "trees")["trees"]}
    assert not any("~" in name for name in later)
    assert guessing.metrics()["tenon_requests_replayed_total"] == 3
    before = counted(guessing)
    told(guessing, asked[2])
    assert counted(guessing) == before


def test_lines_of_a_batch_say_how_far_too(guessing: Running) -> None:
    def line(name: str, given: Any) -> str:
        body = {"model": "tiny", "prompt": "batched", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
        made = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body | {"speculative": given}}
        return json.dumps(made) + "\n"

    before = counted(guessing)
    with openai.OpenAI(base_url=guessing.url + "/v1", api_key="none", max_retries=0) as client:
        content = line("off", False) + line("wrong", {"max_tokens": -1}) + line("none", {"enabled": False})
        source = client.files.create(file=("lines.jsonl", content.encode()), purpose="batch")
        batch = client.batches.create(input_file_id=source.id, endpoint="/v1/completions", completion_window="24h")
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
        batch = client.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
        assert batch.error_file_id is not None
        assert "speculative.max_tokens" in client.files.content(batch.error_file_id).text
    assert counted(guessing) == before
