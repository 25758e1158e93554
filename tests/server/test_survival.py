"""Engines that are killed, stopped or cannot start: what was in flight goes on, or is told once that it does not."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import PATIENCE_S, Running, free_port, launch, wait_for, write_model
from tests.server.test_lifecycle import alive, assert_conserved

Start = Callable[..., Running]

ASKED: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 2, "n": 3, "logprobs": 2},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"seed": 4, "prompt": ["a story", "of two"], "echo": True, "logprobs": 1},
    {"seed": 5, "stop": ["zz", "q!"], "presence_penalty": 1.0},
    {"seed": 6, "logit_bias": {"40": 5}, "bad_words": ["e"], "min_tokens": 40, "stop_token_ids": list(range(60, 90))},
    {"seed": 8, "n": 2, "guided_regex": "([a-z]{2,4} ){400}", "ignore_eos": False},
    {"seed": 7, "messages": [{"role": "user", "content": "hello"}], "logprobs": True},
]
"""What sampling and text can be asked for, all at once."""


def told(server: Running, asked: dict[str, Any], max_tokens: int, *, streamed: bool) -> Any:
    """All that a client hears: choices, or a stream's events without what names the answer."""
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    body = {"max_tokens": max_tokens, "ignore_eos": True} | asked
    if not streamed:
        if "messages" not in asked:
            body = {"prompt": "hello"} | body
        response = server.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()["choices"]
    stream = server.stream(path, **body)
    events = [event if isinstance(event, str) else event.get("choices", event) for event in stream.events()]
    stream.close()
    return by_choice(events)


def by_choice(events: list[Any]) -> Any:
    """Events of each choice in order; those of different choices may come in any."""
    assert events[-1] == "[DONE]"
    found: dict[int, list[Any]] = {}
    for (choice,) in events[:-1]:
        found.setdefault(choice["index"], []).append(choice)
    return found


def everything(server: Running, max_tokens: int) -> list[Any]:
    jobs = [(asked, streamed) for asked in ASKED for streamed in (True, False)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: told(server, job[0], max_tokens, streamed=job[1]), jobs))


def ready(server: Running) -> bool:
    return httpx.get(server.url + "/readyz", timeout=PATIENCE_S).status_code == 200


def kill(server: Running) -> int:
    """SIGKILL to the engine; returns who it was. Waits until there is one to kill."""
    wait_for(lambda: ready(server))
    pid = server.engine_pid()
    os.kill(pid, signal.SIGKILL)
    return pid


def survive(server: Running, undisturbed: list[Any], max_tokens: int, moments: list[int]) -> None:
    """Kill the engine whenever it has generated so many tokens more."""

    def generated() -> float:
        return server.metrics()["tenon_output_tokens_total"]

    with ThreadPoolExecutor(1) as pool:
        at = generated()
        whole = pool.submit(everything, server, max_tokens)
        wait_for(lambda: server.metrics()["tenon_requests_running"] > 0)
        for moment in moments:
            at += moment
            wait_for(lambda least=at: generated() >= least)  # type: ignore[misc]
            pid = kill(server)
            wait_for(lambda pid=pid: not alive(pid))  # type: ignore[misc]
        assert whole.result(PATIENCE_S) == undisturbed
    metrics = server.metrics()
    assert metrics["tenon_requests_running"] == 0
    assert_conserved(metrics)
    wait_for(lambda: server.metrics()["tenon_kv_blocks_used"] == 0)


def test_answers_are_those_of_an_undisturbed_run(own_server: Start) -> None:
    server = own_server(limits={"replays": 9})
    undisturbed = everything(server, 300)
    survive(server, undisturbed, 300, [0, 1000])
    metrics = server.metrics()
    assert metrics["tenon_engine_restarts_total"] == 2
    assert metrics["tenon_requests_replayed_total"] >= 2
    assert metrics['tenon_requests_finished_total{reason="error"}'] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_random_moments(own_server: Start) -> None:
    server = own_server(limits={"replays": 9})
    undisturbed = everything(server, 1500)
    moments = random.Random(0)
    for _ in range(10):
        survive(server, undisturbed, 1500, [moments.randrange(12_000), moments.randrange(8_000)])
    assert server.metrics()["tenon_engine_restarts_total"] == 20


@pytest.fixture
def embedded(request: pytest.FixtureRequest) -> Iterator[Running]:
    """The embedded model, really computed, with the numerics that the test names."""
    port = free_port()
    words = ["-m", "tenon.cli", "serve", "--numerics", request.param, "--replays", "9"]
    running = launch([*words, "--port", str(port), "--served-name", "embedded"], port, "embedded")
    yield running
    assert running.stop() == 0
    running.close()


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("embedded", ["invariant"], indirect=True)
def test_twenty_random_moments_of_a_real_model(embedded: Running) -> None:
    """With numerics under which a token does not depend on who else is served, to the byte."""
    undisturbed = everything(embedded, 120)
    moments = random.Random(1)
    for _ in range(10):
        survive(embedded, undisturbed, 120, [moments.randrange(1200), moments.randrange(600)])


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.timeout(900)
@pytest.mark.parametrize("embedded", ["fast"], indirect=True)
def test_what_was_sent_stays_sent_and_the_stream_is_whole(embedded: Running) -> None:
    """Where a token may depend on who else is served, what comes after a death may differ; nothing comes twice."""
    streams = [embedded.stream(seed=i, max_tokens=200, stream_options={"include_usage": True}) for i in range(4)]
    events = [stream.events() for stream in streams]
    for each in events:
        for _ in range(10):
            next(each)
    kill(embedded)
    for stream, each in zip(streams, events, strict=True):
        *_, usage, done = each
        stream.close()
        assert done == "[DONE]"
        assert isinstance(usage, dict)
        assert usage["usage"]["completion_tokens"] == 200


def test_too_many_deaths_are_told_once_each_and_the_server_serves_on(own_server: Start) -> None:
    server = own_server(limits={"replays": 0})
    streams = [server.stream(max_tokens=30_000, n=n) for n in (1, 2, 3)]
    for stream in streams:
        next(stream.events())
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": "a", "max_tokens": 30_000, "ignore_eos": True}
        whole = pool.submit(server.post, "/v1/completions", body)
        wait_for(lambda: server.metrics()["tenon_requests_running"] == 4)
        pid = kill(server)
        assert whole.result(PATIENCE_S).status_code == 503
    for stream in streams:
        ends = [e for e in stream.events() if isinstance(e, str) or "error" in e]
        stream.close()
        assert [end["error"]["code"] for end in ends if isinstance(end, dict)] == ["engine_dead"] * len(ends) != []
        assert len(ends) == 1
    wait_for(lambda: ready(server))
    assert server.engine_pid() != pid
    assert server.complete(max_tokens=5, ignore_eos=True)["usage"]["completion_tokens"] == 5
    assert_conserved(server.metrics())
    assert server.stop() == 0


def test_an_engine_that_hangs_is_replaced(own_server: Start) -> None:
    server = own_server(limits={"stall_s": 2.0})
    undisturbed = told(server, {"seed": 1}, 400, streamed=True)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(told, server, {"seed": 1}, 400, streamed=True)
        wait_for(lambda: server.metrics()["tenon_requests_running"] > 0)
        pid = server.engine_pid()
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: not ready(server))
        assert httpx.get(server.url + "/livez", timeout=PATIENCE_S).status_code == 200
        assert stream.result(PATIENCE_S) == undisturbed
    assert not alive(pid)
    wait_for(lambda: ready(server))


def test_engines_that_cannot_start_are_tried_again(own_server: Start, tmp_path: Path) -> None:
    """Requests in flight are given up, the reason is there to be read, and once it is gone the server serves."""
    from tests.server import conftest

    folder = write_model(tmp_path)
    server = conftest.start(folder)
    try:
        stream = server.stream(max_tokens=30_000)
        next(stream.events())
        (folder / "config.json").rename(tmp_path / "gone")
        pid = kill(server)
        (end,) = [e for e in stream.events() if isinstance(e, str) or "error" in e]
        stream.close()
        assert isinstance(end, dict)
        assert end["error"]["code"] == "engine_dead"
        wait_for(lambda: "ended before they were ready" in httpx.get(server.url + "/readyz", timeout=PATIENCE_S).text)
        said = httpx.get(server.url + "/readyz", timeout=PATIENCE_S)
        assert said.status_code == 503
        assert "config.json" in said.json()["reason"]
        refused = server.post("/v1/completions", {"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarting")
        assert "retry-after" in refused.headers
        (tmp_path / "gone").rename(folder / "config.json")
        wait_for(lambda: ready(server))
        assert not alive(pid)
        assert server.complete(max_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3
        assert server.stop() == 0
    finally:
        server.close()


def test_who_leaves_between_two_engines_leaves_nothing_behind(own_server: Start) -> None:
    server = own_server()
    streams = [server.stream(max_tokens=30_000, n=2) for _ in range(3)]
    for stream in streams:
        next(stream.events())
    kill(server)
    for stream in streams:
        stream.close()
    wait_for(lambda: server.metrics()["tenon_requests_running"] == 0)
    wait_for(lambda: ready(server))
    wait_for(lambda: server.metrics()["tenon_kv_blocks_used"] == 0)
    metrics = server.metrics()
    assert metrics['tenon_requests_finished_total{reason="abort"}'] == 3
    assert_conserved(metrics)


def test_a_drain_outlives_its_engine(own_server: Start) -> None:
    server = own_server()
    undisturbed = told(server, {"seed": 1}, 1500, streamed=True)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(told, server, {"seed": 1}, 1500, streamed=True)
        wait_for(lambda: server.metrics()["tenon_requests_running"] > 0)
        pid = server.engine_pid()
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not ready(server))
        os.kill(pid, signal.SIGKILL)
        assert stream.result(PATIENCE_S) == undisturbed
    assert server.process.wait(PATIENCE_S) == 0
