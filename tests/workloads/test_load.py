"""Load over HTTP: when requests go out, what counts, and that nothing a server does loses or hangs a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.base.clock import SYSTEM, sleep_s
from tenon.base.errors import ConfigError, ResourceError
from tenon.workloads.answers import Answer
from tenon.workloads.load import Load, LoadOptions, ServerModel, find_server
from tenon.workloads.prompts import text_of
from tenon.workloads.report import Outcome, report_of
from tenon.workloads.streaming import EVENT_BYTES, Events, Failed, Patience, Reply, Target
from tenon.workloads.trace import Segment, Trace, TraceRequest
from tests.server.conftest import Running, free_port, hash_server
from tests.workloads.servers import (
    CHAT,
    PATIENCE_S,
    Request,
    Server,
    ending,
    event,
    good,
    options,
    play,
    refuses,
    says_nothing,
    stream,
    text,
    trace_of,
    usage,
)

# What a good server does.


def test_every_request_is_answered_once_with_its_tokens() -> None:
    got = play(trace_of([0.0, 0.01, 0.02], slo_class="chat", tenant="t"))
    assert sorted(got.by_id) == ["r0", "r1", "r2"]
    for one in got.outcomes:
        assert (len(one.token_s), one.n_chunks, one.n_prompt, one.error) == (3, 3, 5, "")
        assert (one.finish_reason, one.slo_class, one.tenant) == ("length", "chat", "t")
        assert one.intended_s <= one.sent_s <= one.token_s[0] <= one.token_s[-1] <= one.end_s
    assert (got.load.n_sent, got.load.n_answered, got.load.n_failed, got.load.n_running) == (3, 3, 0, 0)
    assert report_of(got.outcomes).overall.n_answered == 3


def test_requests_say_what_the_trace_asks_for() -> None:
    got = play(trace_of([0.0]), model="name", ignore_eos=True, extra={"temperature": 0}, key="secret")
    (request,) = got.server.requests
    assert request.path == "/v1/completions"
    assert request.headers["authorization"] == "bearer secret"
    prompt = request.body.pop("prompt")
    assert len(prompt.split()) == 5
    assert request.body == {
        "model": "name",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 3,
        "ignore_eos": True,
        "temperature": 0,
    }


def test_a_request_has_fields_of_its_own() -> None:
    fields = {"r1": {"slo": {"class": "chat"}, "prompt": "a b", "temperature": 1}}
    got = play(trace_of([0.0, 0.0]), extra={"temperature": 0}, fields=fields)
    by_prompt = {request.body["prompt"]: request.body for request in got.server.requests}
    mine = by_prompt.pop("a b")
    (other,) = by_prompt.values()
    assert (mine["slo"], mine["temperature"]) == ({"class": "chat"}, 1)
    assert ("slo" in other, other["temperature"]) == (False, 0)


def test_a_kept_connection_serves_the_next_request() -> None:
    got = play(trace_of([0.0] * 5, after={i: i - 1 for i in range(1, 5)}))
    assert len(got.outcomes) == 5
    assert got.server.n_connections == 1


def test_a_server_that_closes_idle_connections_loses_nothing() -> None:
    async def closing(request: Request) -> None:
        await request.answer()
        request.writer.close()

    got = play(trace_of([0.0] * 20, after={i: i - 1 for i in range(1, 20)}), closing)
    assert [one.error for one in got.outcomes] == [""] * 20


def test_interim_answers_and_ends_by_closing_are_http() -> None:
    async def old(request: Request) -> None:
        await request.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await request.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + stream(3))
        request.writer.close()

    got = play(trace_of([0.0, 0.0]), old)
    assert [(one.error, len(one.token_s)) for one in got.outcomes] == [("", 3)] * 2


def test_an_answer_ends_with_done_although_its_message_does_not() -> None:
    async def open_ended(request: Request) -> None:
        await request.head()
        await request.chunk(stream(3))
        await asyncio.Event().wait()

    got = play(trace_of([0.0, 0.0]), open_ended)
    assert [one.error for one in got.outcomes] == ["", ""]


def test_a_stream_may_end_without_done_if_it_said_why() -> None:
    async def terse(request: Request) -> None:
        await request.head()
        await request.chunk(stream(3).removesuffix(b"data: [DONE]\n\n"))
        await request.chunk(b"")

    assert play(trace_of([0.0]), terse).outcomes[0].error == ""


def test_a_stream_may_be_cut_anywhere() -> None:
    async def byte_by_byte(request: Request) -> None:
        await request.head()
        for byte in b": ping\r\n\r\n" + b"".join(CHAT).replace(b"\n", b"\r\n"):
            await request.chunk(bytes([byte]))
        await request.chunk(b"")

    got = play(trace_of([0.0]), byte_by_byte, endpoint="chat")
    (one,) = got.outcomes
    assert (one.error, one.n_chunks, len(one.token_s), one.cached_tokens) == ("", 3, 3, 4)
    assert one.finish_reason == "stop"
    (request,) = got.server.requests
    assert request.path == "/v1/chat/completions"
    assert [message["role"] for message in request.body["messages"]] == ["user"]


@given(st.lists(st.integers(0, len(b"".join(CHAT))), max_size=8))
def test_cuts_change_no_event_and_no_text(cuts: list[int]) -> None:
    data = b"".join(CHAT)
    places = [0, *sorted(cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(places)]
    events = Events()
    assert [found for piece in pieces for found in events.feed(piece)] == [one[6:-2] for one in CHAT]
    answer = Answer(3, keep_text=True)
    assert [answer.receive(piece, 1.0) for piece in pieces if piece][-1]
    assert "".join(answer.text) == "Grüße 🦜!"


def test_events_follow_the_standard() -> None:
    said = b":comment\nevent: x\nid: 1\ndata: a\ndata:b\n\n\n\nretry: 5\n\ndata\n\ndata: c\r\n\r\ndata: torn"
    assert Events().feed(said) == [b"a\nb", b"c"]


def test_an_endless_event_is_given_up() -> None:
    events = Events()
    for piece in (b"data: 1\ndata: ", b"x" * (EVENT_BYTES // 2), b"\ndata: "):
        assert events.feed(piece) == []
    with pytest.raises(Failed, match="one event exceeds"):
        events.feed(b"x" * (EVENT_BYTES // 2))


# Tokens and their times.


def answer_of(*pieces: tuple[float, bytes], asked: int = 10) -> Answer:
    answer = Answer(asked)
    for at_s, piece in pieces:
        answer.receive(piece, at_s)
    return answer


def test_a_chunk_a_token_gives_each_its_own_time() -> None:
    answer = answer_of((1.0, text()), (2.0, text()), (4.0, text()), (5.0, ending(3)))
    assert answer.token_stamps() == [1.0, 2.0, 4.0]
    assert not answer.is_spread


def test_chunks_that_say_how_many_tokens_there_are_give_exact_times() -> None:
    pieces = [(1.0, text(usage=usage(2))), (3.0, text(usage=usage(3))), (4.0, text(usage=usage(6)))]
    answer = answer_of(*pieces, (5.0, ending(6)))
    assert answer.token_stamps() == [1.0, 1.0, 3.0, 4.0, 4.0, 4.0]
    assert not answer.is_spread


def test_several_tokens_a_chunk_are_spread_and_said() -> None:
    answer = answer_of((1.0, text()), (2.0, text()), (3.0, text()), (4.0, ending(7)))
    assert answer.token_stamps() == [1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0]
    assert answer.is_spread


@given(st.integers(1, 40), st.integers(1, 40))
def test_spread_tokens_keep_count_order_first_and_last(n_chunks: int, n_tokens: int) -> None:
    stamps = answer_of(
        *((float(i), text()) for i in range(n_chunks)), (99.0, ending(n_tokens)), asked=40
    ).token_stamps()
    assert len(stamps) == n_tokens
    assert stamps == sorted(stamps)
    assert stamps[0] == 0.0
    assert n_tokens == 1 or stamps[-1] == n_chunks - 1


def test_without_usage_chunks_are_counted() -> None:
    async def silent_about_usage(request: Request) -> None:
        await request.head()
        await request.chunk(text() * 2 + event(choices=[{"text": "", "finish_reason": "stop"}]) + b"data: [DONE]\n\n")
        await request.chunk(b"")

    got = play(trace_of([0.0]), silent_about_usage)
    assert (len(got.outcomes[0].token_s), got.outcomes[0].n_prompt) == (2, 5)
    assert any("1 answers came without usage" in note for note in got.notes)
    assert any("1 answers are shorter than the trace asks for; --ignore-eos" in note for note in got.notes)


def test_tokens_without_text_came_with_the_end_at_the_latest() -> None:
    assert answer_of((1.0, ending(2))).token_stamps() == [1.0, 1.0]
    assert answer_of((1.0, ending(0))).token_stamps() == []


def test_an_answer_of_several_tokens_a_chunk_is_in_the_notes() -> None:
    async def packed(request: Request) -> None:
        await request.head()
        await request.chunk(text() + ending(3))
        await request.chunk(b"")

    got = play(trace_of([0.0, 0.0]), packed)
    assert any(note.startswith("in 2 answers chunks and tokens differ in number") for note in got.notes)
    assert report_of(got.outcomes).overall.chunks == 2


# When requests go out.


def test_a_stalled_server_does_not_stop_the_clock() -> None:
    """No answer comes before all requests have: only an open loop gets there. Each TTFT has its part of the stall."""
    n = 12
    everyone = asyncio.Event()
    released_s: list[float] = []
    arrived: list[str] = []

    async def stalls(request: Request) -> None:
        arrived.append(request.body["prompt"])
        if len(arrived) == n:
            released_s.append(SYSTEM.now_s())
            everyone.set()
        await everyone.wait()
        await request.answer()

    got = play(trace_of([0.02 * i for i in range(n)]), stalls)
    released = released_s[0] - got.load.start_s
    assert len(got.outcomes) == n
    for one in got.outcomes:
        assert one.token_s[0] - one.intended_s >= released - one.intended_s > 0
    assert not any("open loop" in note for note in got.notes)


def test_behind_a_limit_latencies_still_count_from_when_requests_were_due() -> None:
    """The case that hides a stall when requests are timed from their sending (coordinated omission)."""
    loads: list[Load] = []

    async def stalls_once(request: Request) -> None:
        while loads[0].n_held < 5:
            await asyncio.sleep(0.01)
        await request.answer()

    async def run() -> tuple[list[Outcome], tuple[str, ...]]:
        async with Server(stalls_once) as server:
            outcomes: list[Outcome] = []
            trace = trace_of([0.02 * i for i in range(6)])
            loads.append(Load(trace, options(server.url, concurrency_limit=1), outcomes.append))
            return outcomes, await loads[0].run()

    outcomes, notes = asyncio.run(run())
    stalled, *held = sorted(outcomes, key=lambda one: one.intended_s)
    assert len(held) == 5
    for one in held:
        assert one.sent_s >= stalled.end_s
        assert one.token_s[0] - one.intended_s >= stalled.end_s - one.intended_s > 0
    (note,) = (note for note in notes if note.startswith("not an open loop"))
    assert "1 requests at once held back 5" in note


def test_as_many_are_in_flight_as_the_limit_allows_and_no_more() -> None:
    four = asyncio.Barrier(4)
    now, most = 0, 0

    async def counts(request: Request) -> None:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await four.wait()
        now -= 1
        await request.answer()

    got = play(trace_of([0.0] * 32), counts, concurrency_limit=4)
    assert len(got.outcomes) == 32
    assert most == 4


def test_a_request_that_follows_another_waits_for_its_end_and_its_own_pause() -> None:
    got = play(trace_of([0.0, 0.0, 0.0], after={1: 0, 2: 1}, gap_s=0.05))
    first, second, third = (got.by_id[name] for name in ("r0", "r1", "r2"))
    assert second.intended_s == first.end_s + 0.05
    assert third.intended_s == second.end_s + 0.05
    assert second.sent_s >= second.intended_s
    assert [request.body["prompt"] for request in got.server.requests] == [text_of(i, 5) for i in (1, 2, 3)]


def test_what_follows_a_failed_request_is_skipped_however_long_the_chain() -> None:
    n = 3000
    got = play(trace_of([0.0] * n, after={i: i - 1 for i in range(1, n)}), refuses)
    assert len(got.by_id) == n
    assert len(got.server.requests) == 1
    assert report_of(got.outcomes).overall.errors == {"http 429": 1, "skipped": n - 1}
    assert got.by_id["r9"].error.startswith("skipped: r0, which it follows, failed (http 429: full")


def test_the_rate_is_scaled_and_pauses_are_not() -> None:
    trace = trace_of([0.0, 0.2, 0.2], after={2: 0}, gap_s=0.1)
    got = play(trace, rate_scale=4.0)
    assert got.by_id["r1"].intended_s == 0.05
    assert got.by_id["r2"].intended_s == got.by_id["r0"].end_s + 0.1


def test_limit_and_warmup_choose_what_is_sent_and_what_counts() -> None:
    got = play(trace_of([0.0] * 10), limit=5, warmup=2)
    assert len(got.server.requests) == 5
    assert sorted(got.by_id) == ["r2", "r3", "r4"]
    assert "the first 2 requests were sent to warm up and are not counted" in got.notes


def test_a_client_that_cannot_keep_up_says_so() -> None:
    async def run() -> tuple[str, ...]:
        async with Server() as server:
            load = Load(trace_of([0.005 * i for i in range(20)]), options(server.url), lambda _: sleep_s(0.05))
            return await load.run()

    (note,) = (note for note in asyncio.run(run()) if "could not keep up" in note)
    assert "at most 10 ms is sound" in note


def test_a_stopped_load_tells_what_ran() -> None:
    async def run() -> tuple[list[Outcome], tuple[str, ...], Load]:
        async def handler(request: Request) -> None:
            await (good if request.body["max_tokens"] == 3 else says_nothing)(request)

        async with Server(handler) as s:
            outcomes: list[Outcome] = []
            requests = [TraceRequest(f"r{i}", 0.0, (Segment(1, 5),), 3 + i // 2) for i in range(4)]
            requests += [TraceRequest("follows", 0.0, (Segment(1, 5),), 3, after="r3")]
            requests += [TraceRequest("later", 1000.0, (Segment(1, 5),), 3)]
            load = Load(Trace.make("t", "t", requests), options(s.url), outcomes.append)
            running = asyncio.create_task(load.run())
            async with asyncio.timeout(PATIENCE_S):
                while load.n_answered < 2 or load.n_running < 2:
                    await asyncio.sleep(0.01)
                load.stop()
                return outcomes, await running, load

    outcomes, notes, load = asyncio.run(run())
    assert sorted((one.id, one.error.partition(":")[0]) for one in outcomes) == [
        ("r0", ""),
        ("r1", ""),
        ("r2", "interrupted"),
        ("r3", "interrupted"),
    ]
    assert "stopped before its end: 2 of 6 requests were not sent" in notes
    assert load.n_running == 0


def test_what_breaks_inside_ends_the_run() -> None:
    def receive(outcome: Outcome) -> None:
        raise ConfigError(f"cannot take {outcome.id}")

    async def run() -> None:
        async with Server() as server:
            await Load(trace_of([0.0, 1000.0]), options(server.url), receive).run()

    with pytest.raises(ConfigError, match="cannot take r0"):
        asyncio.run(run())


@pytest.mark.slow
def test_ten_thousand_requests_are_all_told() -> None:
    got = play(trace_of([i / 1000 for i in range(10_000)], n_output=2), concurrency_limit=200)
    assert len(got.by_id) == 10_000
    assert report_of(got.outcomes).overall.n_answered == 10_000


def test_a_thousand_at_once_are_all_told() -> None:
    got = play(trace_of([0.0] * 1000, n_output=2), concurrency_limit=100)
    assert len(got.by_id) == 1000
    assert got.load.n_answered == 1000
    assert got.server.n_connections <= 100


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rate_scale": 0.0}, "rate_scale must be above 0, got 0.0"),
        ({"rate_scale": float("nan")}, "rate_scale must be above 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"concurrency_limit": 0}, "concurrency_limit must be at least 1"),
        ({"feed_answers": True, "vocab_size": 99}, "feed_answers needs text prompts"),
    ],
)
def test_wrong_options_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoadOptions(Target("http://a/v1"), "m", **wrong)


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://a/v1", "http://", "http://u:p@a/v1", "http://a/v1?k=1", "http://a:x/", "http://ä/v1"],
)
def test_wrong_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="a server is named by a URL like"):
        Target(url)


def test_wrong_keys_and_patience_are_refused() -> None:
    with pytest.raises(ConfigError, match="no HTTP header can carry") as caught:
        Target("http://a/v1", "se\ncret")
    assert "cret" not in str(caught.value)
    with pytest.raises(ConfigError, match="silence_s must be above 0"):
        Patience(silence_s=0.0)


def test_a_load_needs_something_to_count() -> None:
    with pytest.raises(ConfigError, match="has 2 requests to send and 2 are for warming up"):
        Load(trace_of([0.0, 0.0]), options("http://a/v1", warmup=2), lambda _: None)


# Asking the server.


def find(status: str, body: Any, model: str = "") -> ServerModel:
    async def models(request: Request) -> None:
        assert request.path == "/v1/models"
        await request.whole(status, body if isinstance(body, bytes) else json.dumps(body).encode())

    async def run() -> ServerModel:
        async with Server(models) as server:
            return await find_server(Target(server.url, "secret-1"), model, patience=Patience(5.0, 5.0, 5.0))

    return asyncio.run(run())


def test_servers_tell_their_model_and_some_their_vocabulary() -> None:
    two = {"data": [{"id": "a", "vocab_size": 4096}, {"id": "b", "meta": {"n_vocab": 128256}}, {"id": "c"}]}
    assert find("200 OK", two) == ServerModel("a", 4096)
    assert find("200 OK", two, "b") == ServerModel("b", 128256)
    assert find("200 OK", two, "c") == ServerModel("c", 0)
    assert find("200 OK", two, "adapter") == ServerModel("adapter", 0)
    assert find("200 OK", b"no json", "b") == ServerModel("b", 0)
    assert find("404 Not Found", b"", "b") == ServerModel("b", 0)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        ("404 Not Found", {"detail": "Not Found"}, "answers with HTTP 404, Not Found"),
        ("401 Unauthorized", {"error": {"message": "secret-1 is wrong"}}, r"answers with HTTP 401, \[key\] is wrong"),
        ("200 OK", {"data": []}, "answers with no list of models"),
        ("200 OK", b"\xff", "answers with no list of models"),
    ],
)
def test_without_a_model_the_server_must_name_one(status: str, body: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"no model is named, and .*{said}"):
        find(status, body)


def test_nobody_to_ask_is_one_sentence() -> None:
    port = free_port()
    with pytest.raises(ResourceError, match=rf"no server answers at http://127.0.0.1:{port}/v1 \(connect: "):
        asyncio.run(find_server(Target(f"http://127.0.0.1:{port}/v1"), patience=Patience()))


def test_a_verdict_names_what_is_missing() -> None:
    assert Answer(3).verdict(Reply(200, {})) == "broken stream: it ended without [DONE] or a reason to finish"
    said = Answer(3).verdict(Reply(200, {"content-type": "text/html"}, b"<p>"))
    assert said == "not a stream: the answer is text/html"
    assert Answer(3).verdict(Reply(500, {}, b"[1]")) == "http 500: [1]"
    assert Answer(3).verdict(Reply(503, {}, b"")) == "http 503: without a message"


# A real server.


@pytest.fixture(scope="module")
def tenon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """``tenon serve`` with the hash executor."""
    yield from hash_server(tmp_path_factory)


def drive(trace: Trace, server: Running, **given: Any) -> tuple[dict[str, Outcome], tuple[str, ...]]:
    async def run() -> tuple[dict[str, Outcome], tuple[str, ...]]:
        outcomes: list[Outcome] = []
        async with asyncio.timeout(PATIENCE_S):
            notes = await Load(trace, options(server.url + "/v1", model="tiny", **given), outcomes.append).run()
        assert len({one.id for one in outcomes}) == len(outcomes)
        return {one.id: one for one in outcomes}, notes

    return asyncio.run(run())


SESSIONS = Trace.make(
    "sessions",
    "shared system prompt, two turns",
    [
        request
        for i in range(15)
        for request in (
            TraceRequest(f"a{i}", 0.02 * i, (Segment(1, 200), Segment(100 + i, 40)), 12, output=500 + i),
            TraceRequest(
                f"b{i}",
                0.02 * i,
                (Segment(1, 200), Segment(100 + i, 40), Segment(500 + i, 12), Segment(200 + i, 40)),
                12,
                after=f"a{i}",
                gap_s=0.01,
            ),
        )
    ],
)


def test_tenon_answers_token_prompts_with_the_traces_lengths(tenon: Running) -> None:
    before = tenon.metrics()["tenon_requests_started_total"]
    got, _ = drive(SESSIONS, tenon, vocab_size=256, ignore_eos=True, chunk_usage=True)
    assert len(got) == 30
    for one in SESSIONS.requests:
        outcome = got[one.id]
        assert (outcome.error, outcome.n_prompt, len(outcome.token_s)) == ("", one.n_prompt, 12)
    assert all(got[f"b{i}"].cached_tokens >= 192 for i in range(15))
    assert tenon.metrics()["tenon_requests_started_total"] == before + 30


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_tenon_answers_text(tenon: Running, endpoint: Any) -> None:
    got, notes = drive(SESSIONS, tenon, endpoint=endpoint, ignore_eos=True, limit=10)
    assert len(got) == 10
    assert all((one.error, len(one.token_s), one.finish_reason) == ("", 12, "length") for one in got.values())
    assert any("texts do not become one token a word" in note for note in notes)  # its tokens are bytes


def test_tenons_refusals_are_outcomes(tenon: Running) -> None:
    requests = [TraceRequest("fits", 0.0, (Segment(1, 10),), 4), TraceRequest("long", 0.0, (Segment(2, 40_000),), 4)]
    got, _ = drive(Trace.make("t", "t", requests), tenon, vocab_size=256, ignore_eos=True)
    assert got["fits"].error == ""
    assert got["long"].error.startswith("http 400: This model's maximum context length is 32768 tokens.")


def test_tenon_names_its_model_and_its_vocabulary(tenon: Running) -> None:
    found = asyncio.run(find_server(Target(tenon.url + "/v1"), patience=Patience()))
    assert found == ServerModel("tiny", 258)
