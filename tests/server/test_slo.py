"""What clients ask to be promised: which word counts, what is refused, and what is told of how it went."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from tenon.base.clock import ManualClock
from tenon.base.errors import ConfigError, RequestError
from tenon.engine import messages as m
from tenon.engine.promises import OUT_OF_REACH, Forecast, Slo
from tenon.server.estimate import MOST_WAITING, Estimates
from tenon.server.events import EventHub
from tenon.server.failures import Refusal
from tenon.server.keys import Caller, Key, read_keys
from tenon.server.limits import Limits
from tenon.server.outcome import PARTS, slo_json
from tenon.server.protocol import CompletionRequest
from tenon.server.service import Service
from tenon.server.slo import NOTHING_HEARD, Heard, Objectives, Promise, Wish, class_from, classes_from, heard
from tests.server.conftest import PATIENCE_S, Running, start
from tests.server.test_events import Event, until, watching
from tests.server.test_interleavings import new_engine
from tests.server.test_keys import ALICE, BOB, FILE, bearer

Start = Callable[..., Running]

STEP_MS = 10.0
TOKEN_S = 0.02
CLASSES = {"": Slo(8.0, 0.8), "interactive": Slo(0.5, 0.05, 2.0), "batch": Slo(60.0, weight=0.5)}
OPTIONS = ("--slo", "ttft=60,tpot=60", "--slo", "interactive:ttft=50s,tpot=50000ms", "--slo", "hopeless:tpot=1ms")
HELLO = [{"role": "user", "content": "hello"}]
EARLY = {"ttft_ms": 55_000, "tpot_ms": 54_000}


# Which word counts.


def promised(heard: Heard = NOTHING_HEARD, key: Key | None = None, classes: Any = CLASSES, **body: Any) -> Promise:
    wish = Wish(**body.pop("slo")) if "slo" in body else None
    request = CompletionRequest(model="m", prompt="p", slo=wish, **body)
    return Objectives(classes).of(request, heard, key, TOKEN_S)


def owner(**has: Any) -> Key:
    return Key("one", b"", "one", **has)


@pytest.mark.parametrize(
    ("asked", "name", "slo"),
    [
        ({}, "", Slo(8.0, 0.8)),
        ({"classes": {}}, "", None),
        ({"classes": {}, "slo": {"ttft_ms": 100}}, "", Slo(0.1)),
        ({"slo": {"name": "interactive"}}, "interactive", Slo(0.5, 0.05, 2.0)),
        ({"slo": {"name": "batch"}}, "batch", Slo(60.0, 0.8, 0.5)),
        ({"slo": {"name": "batch", "tpot_x": 3, "strict": True}}, "batch", Slo(60.0, 0.06, 0.5, True)),
        ({"slo": {"name": "batch"}, "heard": Heard(name="interactive")}, "batch", Slo(60.0, 0.8, 0.5)),
        ({"heard": Heard(name="interactive"), "service_tier": "flex"}, "interactive", Slo(0.5, 0.05, 2.0)),
        ({"heard": Heard(100, 20), "slo": {"tpot_ms": 30}}, "", Slo(0.1, 0.03)),
        ({"heard": Heard(100, 20), "slo": {"tpot_x": 2, "name": "interactive"}}, "interactive", Slo(0.1, 0.04, 2.0)),
        ({"service_tier": "priority"}, "interactive", Slo(0.5, 0.05, 2.0)),
        ({"service_tier": "flex"}, "batch", Slo(60.0, 0.8, 0.5)),
        ({"service_tier": "auto", "priority": 0}, "", Slo(8.0, 0.8)),
        ({"priority": -3}, "interactive", Slo(0.5, 0.05, 2.0)),
        ({"priority": 7, "service_tier": "default"}, "batch", Slo(60.0, 0.8, 0.5)),
        ({"key": owner(slo_class="interactive")}, "interactive", Slo(0.5, 0.05, 2.0)),
        ({"key": owner(slo_class="interactive"), "priority": 1}, "batch", Slo(60.0, 0.05, 0.5)),
        ({"key": owner(slo_class="interactive", least_ttft_ms=900)}, "interactive", Slo(0.9, 0.05, 2.0)),
        ({"key": owner(least_ttft_ms=90, least_tpot_ms=90), "heard": Heard(90)}, "", Slo(0.09, 0.8)),
    ],
)
def test_the_nearest_word_counts(asked: dict[str, Any], name: str, slo: Slo | None) -> None:
    found = promised(**asked)
    assert found.name == name
    assert (found.slo is None) == (slo is None)
    if slo is not None and found.slo is not None:
        assert msgspec.structs.astuple(found.slo) == pytest.approx(msgspec.structs.astuple(slo))


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms", "a number above 0, got 0"),
        ({"slo": {"ttft_ms": math.inf}}, "slo.ttft_ms", "got inf"),
        ({"slo": {"tpot_ms": -1}}, "slo.tpot_ms", "got -1"),
        ({"slo": {"tpot_x": math.nan}}, "slo.tpot_x", "got nan"),
        ({"slo": {"tpot_x": 1.7e308}}, "slo.tpot_x", "got inf"),
        ({"slo": {"tpot_ms": 9, "tpot_x": 2}}, "slo.tpot_x", "give one of them"),
        ({"slo": {"name": "gold"}}, "slo.class", "interactive, batch"),
        ({"slo": {"name": ""}}, "slo.class", "interactive, batch"),
        ({"heard": Heard(name="gold")}, "x-slo-class", "interactive, batch"),
        ({"heard": Heard(name="gold"), "classes": {}}, "x-slo-class", "none"),
        ({"service_tier": "scale"}, "service_tier", "'scale' is not defined here; this server's classes: interactive"),
        ({"service_tier": "flex", "classes": {}}, "service_tier", "stands for the class 'batch', which is not defined"),
        ({"priority": -1, "classes": {}}, "priority", "'interactive', which is not defined here"),
        ({"slo": {"strict": True}, "classes": {}}, "slo.strict", "something to be strict about"),
        ({"slo": {"ttft_ms": 80}, "key": owner(least_ttft_ms=90)}, "slo.ttft_ms", "at least 90 ms for this key"),
        ({"heard": Heard(None, 80), "key": owner(least_tpot_ms=90)}, "x-slo-tpot-ms", "at least 90 ms for this key"),
        ({"slo": {"tpot_x": 4}, "key": owner(least_tpot_ms=90)}, "slo.tpot_x", "at least 90 ms"),
    ],
)
def test_what_cannot_be_promised_is_named(asked: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        promised(**asked)
    assert refused.value.param == param
    assert param in str(refused.value)
    assert said in str(refused.value)


def test_headers_are_numbers() -> None:
    assert heard({"x-slo-ttft-ms": "250", "x-slo-tpot-ms": "2.5", "x-slo-class": "a"}) == Heard(250, 2.5, "a")
    assert heard({}) == Heard()
    for name in ("x-slo-ttft-ms", "x-slo-tpot-ms"):
        for wrong in ("soon", "", "0", "-1", "nan", "inf"):
            with pytest.raises(RequestError, match=f"{name} must be a number above 0") as refused:
                heard({name: wrong})
            assert refused.value.param == name


def test_classes_are_read_as_they_are_written() -> None:
    assert class_from("ttft=0.5, tpot=50ms") == ("", Slo(0.5, 0.05))
    assert class_from("chat:tpot=2s,weight=2") == ("chat", Slo(None, 2.0, 2.0))
    assert list(classes_from(["a:ttft=1", "ttft=2", "b:weight=0.5"])) == ["a", "", "b"]
    for wrong in (
        "ttft",
        "ttft=0",
        "ttft=inf",
        "e2e=5",
        "weight=2ms",
        "ttft=1,",
        ":ttft=1",
        "a b:ttft=1",
        "",
        "ttft=1,ttft=2",
    ):
        with pytest.raises(ConfigError) as refused:
            class_from(wrong)
        assert repr(wrong) in str(refused.value)
    with pytest.raises(ConfigError, match="two SLOs are given for the class 'a'"):
        classes_from(["a:ttft=1", "a:tpot=1"])


def test_keys_have_classes_and_floors(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    entry = f'[[key]]\nname = "a"\nkey = "{ALICE}"\n'
    path.write_text(entry + 'slo_class = "batch"\nleast_ttft_ms = 200\nleast_tpot_ms = 2.5\n')
    (key,) = read_keys(path)
    assert (key.slo_class, key.least_ttft_ms, key.least_tpot_ms) == ("batch", 200, 2.5)
    Objectives(CLASSES).check_keys([key])
    with pytest.raises(
        ConfigError, match=r"key 'a': slo_class must be a class that --slo defines \(none\), got 'batch'"
    ):
        Objectives().check_keys([key])
    for line in ("slo_class = 3", 'slo_class = ""', "least_ttft_ms = 0", "least_tpot_ms = inf", "least_tpot_ms = true"):
        path.write_text(entry + line)
        with pytest.raises(ConfigError) as refused:
            read_keys(path)
        assert refused.value.subject == line.partition(" ")[0]


# Over HTTP.


@pytest.fixture(scope="module")
def slow(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Whose steps take their time."""
    store = tmp_path_factory.mktemp("store")  # the usual one is for the server that others share
    running = start(model_folder, "--step-ms", str(STEP_MS), *OPTIONS, store=store)
    yield running
    assert running.stop() == 0
    running.close()


@pytest.fixture
def client(slow: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=slow.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as made:
        yield made


def told(usage: Any) -> dict[str, Any]:
    found: dict[str, Any] = usage.slo
    return found


def test_the_official_client_asks_and_is_told(client: openai.OpenAI) -> None:
    asked: Any = {"slo": EARLY | {"class": "interactive"}, "ignore_eos": True}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, extra_body=asked)  # type: ignore[arg-type]
    slo = told(answer.usage)
    expected, came = slo.pop("forecast"), slo.pop("actual")
    assert slo == {"class": "interactive", "strict": False, "met": True, "downgraded": False} | {
        name: float(value) for name, value in EARLY.items()
    }
    assert expected.keys() == {"ttft_ms", "tpot_ms", "hit_tokens", "confidence"}
    assert STEP_MS / 4 < expected["tpot_ms"] < PATIENCE_S * 1e3
    assert STEP_MS <= came["ttft_ms"] < PATIENCE_S * 1e3
    assert STEP_MS / 2 <= came["tpot_ms"] < PATIENCE_S * 1e3


def test_a_stream_tells_it_with_its_usage(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    with client.completions.create(
        model="tiny",
        prompt="hello",
        max_tokens=3,
        stream=True,
        stream_options=options,
        extra_headers={"x-slo-tpot-ms": "52000"},
    ) as stream:
        *chunks, last = list(stream)
    assert told(last.usage)["tpot_ms"] == 52_000
    assert told(last.usage)["ttft_ms"] == 60_000  # the server's default
    assert not any(hasattr(chunk.usage, "slo") for chunk in chunks)


def test_other_apis_take_and_tell_it(slow: Running) -> None:
    response = slow.post(
        "/v1/responses", {"input": "hi", "max_output_tokens": 2, "slo": EARLY, "service_tier": "priority"}
    )
    assert response.json()["usage"]["slo"]["class"] == "interactive"
    message = slow.post("/v1/messages", {"messages": HELLO, "max_tokens": 2, "slo": EARLY})
    assert message.json()["usage"]["slo"]["ttft_ms"] == 55_000
    assert message.json()["usage"]["slo"]["met"] is True
    last = slow.complete(max_tokens=1)["usage"]["slo"]
    assert last["actual"]["tpot_ms"] is None


def test_a_server_without_classes_promises_nothing(server: Running) -> None:
    assert "slo" not in server.complete(max_tokens=2)["usage"]
    assert server.complete(max_tokens=2, slo={"ttft_ms": 60_000})["usage"]["slo"]["class"] == ""


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({"slo": {"ttft_ms": "soon"}}, {}, "slo.ttft_ms"),
        ({"slo": {"tpot": 5}}, {}, "slo.tpot"),
        ({"slo": 5}, {}, "slo"),
        ({"slo": {"class": "gold"}}, {}, "slo.class"),
        ({"slo": {"strict": 1}}, {}, "slo.strict"),
        ({"service_tier": "flex"}, {}, "service_tier"),
        ({"priority": 0.5}, {}, "priority"),
        ({"priority": 1}, {}, "priority"),
        ({}, {"x-slo-class": "gold"}, "x-slo-class"),
        ({}, {"x-slo-ttft-ms": "soon"}, "x-slo-ttft-ms"),
    ],
)
def test_each_bad_value_is_named(slow: Running, body: Any, headers: dict[str, str], param: str) -> None:
    refused = slow.post("/v1/completions", {"prompt": "hello"} | body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_what_cannot_be_kept_is_refused_or_served_as_well_as_can_be(slow: Running) -> None:
    before = slow.metrics()
    strict = slow.post("/v1/completions", {"prompt": "hello", "slo": {"class": "hopeless", "strict": True}})
    assert strict.status_code == 429
    assert strict.json()["error"]["code"] == OUT_OF_REACH
    assert int(strict.headers["retry-after"]) >= 1
    answer = slow.complete(prompt="hello", max_tokens=5, ignore_eos=True, slo={"class": "hopeless"})
    slo = answer["usage"]["slo"]
    assert (slo["downgraded"], slo["met"], slo["tpot_ms"]) == (True, False, 1.0)
    kept = slow.complete(prompt="hello", max_tokens=5, ignore_eos=True, slo={"class": "interactive"})
    assert kept["usage"]["slo"]["met"] is True
    after = slow.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('tenon_slo_requests_total{class="hopeless"}') == 1
    assert grown('tenon_slo_attained_total{class="hopeless"}') == 0
    assert grown('tenon_slo_requests_total{class="interactive"}') == 1
    assert grown('tenon_slo_attained_total{class="interactive"}') == 1
    assert grown("tenon_slo_downgraded_total") == 1
    assert grown("tenon_goodput_tokens_total") == 5
    assert grown("tenon_slo_severity_count") == 1
    assert grown("tenon_slo_severity_sum") > 1
    assert grown('tenon_requests_finished_total{reason="rejected"}') == 1


def test_keys_have_floors_and_defaults_over_http(own_server: Start, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    more = 'slo_class = "interactive"\nleast_ttft_ms = 52000\n'
    path.write_text(FILE.replace("requests_per_minute = 3\n", more + "requests_per_minute = 9\n"))
    server = own_server("--keys", str(path), *OPTIONS)
    body = {"prompt": "hello", "max_tokens": 2}
    for key, name, ttft_ms in ((ALICE, "", 60_000), (BOB, "interactive", 52_000)):
        slo = server.post("/v1/completions", body, headers=bearer(key)).json()["usage"]["slo"]
        assert (slo["class"], slo["ttft_ms"]) == (name, ttft_ms)
    refused = server.post("/v1/completions", body | {"slo": {"ttft_ms": 51_000}}, headers=bearer(BOB))
    assert refused.status_code == 400
    assert "at least 52000 ms for this key" in refused.text


# What may be expected.


def estimate(server: Running, **body: Any) -> httpx.Response:
    return server.post("/v1/estimate", body)


def test_an_estimate_costs_nothing_and_changes_nothing(slow: Running) -> None:
    before = slow.metrics()
    found = estimate(slow, prompt=[7] * 40, max_tokens=5).json()
    assert found.keys() == {
        "ttft_ms", "tpot_ms", "tokens_per_s", "prompt_tokens", "hit_tokens", "confidence", "meets_slo", "queue",
    }  # fmt: skip
    assert (found["prompt_tokens"], found["hit_tokens"], found["meets_slo"]) == (40, 0, True)
    assert found["queue"] == {"running": 0, "waiting": 0}
    assert found["tokens_per_s"] == pytest.approx(1e3 / found["tpot_ms"], rel=0.01)
    counted = ("tenon_requests", "tenon_prompt", "tenon_prefix", "tenon_engine_steps", "tenon_slo")
    after = slow.metrics()
    assert {name: after[name] for name in after if name.startswith(counted)} == {
        name: before[name] for name in before if name.startswith(counted)
    }


def test_an_estimate_sees_the_cache_the_queue_and_the_promise(slow: Running) -> None:
    slow.complete(prompt=[9] * 40, max_tokens=1)
    assert estimate(slow, prompt=[9] * 40, slo={"class": "hopeless"}).json()["hit_tokens"] == 32
    assert estimate(slow, prompt=[9] * 40, slo={"class": "hopeless"}).json()["meets_slo"] is False
    stream = slow.stream(max_tokens=2000)
    next(stream.events())
    found = estimate(slow, messages=HELLO).json()
    stream.close()
    assert found["queue"] == {"running": 1, "waiting": 0}
    assert found["prompt_tokens"] > 5


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "this one has neither"),
        ({"prompt": "a", "messages": HELLO}, "this one has both"),
        ({"prompt": ["a", "b"]}, "one prompt for an estimate, got 2"),
        ({"prompt": "a", "slo": {"class": "gold"}}, "slo.class"),
        ({"prompt": "a" * 40_000}, "maximum context length"),
    ],
)
def test_what_cannot_be_estimated_is_said(slow: Running, body: dict[str, Any], said: str) -> None:
    refused = estimate(slow, **body)
    assert refused.status_code == 400
    assert said in refused.text


def test_an_estimate_counts_as_a_request_and_takes_no_tokens(own_server: Start, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(FILE)
    server = own_server("--keys", str(tmp_path / "keys.toml"))
    for status in (200, 200, 200, 429):
        answer = server.post("/v1/estimate", {"prompt": "a", "max_tokens": 250}, headers=bearer(BOB))
        assert answer.status_code == status
    assert "requests a minute" in answer.text


def test_an_engine_estimates_and_is_as_before() -> None:
    engine = new_engine()
    engine.add(m.Add("a", tuple(range(20)), 8, 1))
    for _ in range(3):
        engine.tick(0.0)
    before = engine.stats(0.0)
    add = m.Add("b", tuple(range(20)), 8, 1, slo=Slo(1e-9), grammar=m.Grammar("n", "{}"))
    found = engine.estimate(add)
    assert (found.hit_tokens, found.meets) == (16, False)
    assert engine.estimate(msgspec.structs.replace(add, slo=Slo(1e-9, strict=True))) == found
    with pytest.raises(RequestError, match="maximum context length"):
        engine.estimate(m.Add("c", (1,) * 600, 8, 1))
    assert engine.stats(0.0) == before
    assert len(engine.scheduler.requests) == 1
    engine.check_integrity()
    assert engine.ready().token_s > 0


def service() -> tuple[Service, list[m.ToEngine]]:
    clock, sent = ManualClock(), list[m.ToEngine]()
    made = Service(model="tiny", limits=Limits(), clock=clock, events=EventHub(clock, bound=10))
    made.attach(sent.append)
    return made, sent


def get_ready(service: Service) -> None:
    service.receive(m.Ready("tiny", 4096, 1000, (), 100, 16, 1000, token_s=TOKEN_S))
    service.text_loaded()


async def refused_because(waiting: Any) -> Refusal:
    with pytest.raises(Refusal) as refused:
        await waiting
    return refused.value


def test_an_estimate_that_does_not_come_is_a_503() -> None:
    async def asked() -> None:
        made, sent = service()
        add = m.Add("e", (1,), 1, 1)
        assert (await refused_because(made.estimate(add))).code == "model_loading"
        get_ready(made)
        waiting = asyncio.ensure_future(made.estimate(add))
        await asyncio.sleep(0)
        assert m.Estimate(add) in sent
        made.receive(m.Estimated("another"))
        made.engine_lost("it died", 0)
        died = await refused_because(waiting)
        assert (died.status, died.code) == (503, "engine_dead")
        slow = await refused_because(Estimates(patience_s=0.001).answer("e", lambda: None))
        assert (slow.status, slow.code) == (503, "engine_busy")
        many = Estimates()
        waiting = asyncio.gather(*(many.answer(f"{i}", lambda: None) for i in range(MOST_WAITING)))
        await asyncio.sleep(0)
        assert (await refused_because(many.answer("one more", lambda: None))).status == 429
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(asked())


def test_an_estimate_is_told_what_the_engine_would_refuse() -> None:
    async def asked() -> None:
        made, _ = service()
        get_ready(made)
        waiting = asyncio.ensure_future(made.estimate(m.Add("e", (1,), 1, 1)))
        await asyncio.sleep(0)
        made.receive(m.Estimated("e", None, m.Rejected("e", "full", 429, "code", None, 2.5)))
        refused = await refused_because(waiting)
        assert (refused.status, refused.retry_after_s) == (429, 2.5)

    asyncio.run(asked())


# What comes of it.


@pytest.mark.parametrize(("code", "after_s"), [(OUT_OF_REACH, 7.5), ("rate_limit_exceeded", 1.0)])
def test_a_forecast_says_itself_when_to_come_again(code: str, after_s: float) -> None:
    made, _ = service()
    get_ready(made)
    job = made.submit([m.Add("a", (1,), 1, 1, slo=Slo(1.0, strict=True))], Caller(None, made.clock))
    made.receive(m.Rejected("a", "no", 429, code, None, 7.5))
    failure = asyncio.run(refused_because(job.accepted()))
    assert (failure.status, failure.retry_after_s) == (429, after_s)


def test_the_first_prompt_is_the_one_that_is_told() -> None:
    made, _ = service()
    get_ready(made)
    clock = made.clock
    assert isinstance(clock, ManualClock)
    adds = [m.Add(f"{i}", (1,), 3, 1, n=2, slo=Slo(2.0, 0.5), slo_class="c", arrival_s=clock.now_s()) for i in range(2)]
    job = made.submit(adds, Caller(None, clock))
    for i in range(2):
        made.receive(m.Accepted(f"{i}", forecast=Forecast(1.0, 0.25, 0, 0.5)))
    for at_s, name, index, n, reason in (
        (1.0, "0", 0, 1, None), (1.0, "0", 1, 1, None), (2.5, "0", 0, 2, "length"), (9.0, "0", 1, 2, "length"),
        (9.0, "1", 0, 3, "length"), (9.0, "1", 1, 3, "length"),
    ):  # fmt: skip
        clock.advance(at_s - clock.now_s())
        made.receive(m.Outputs(1, (m.Delta(name, index, (1,) * n, reason),)))
    first, second = (slo_json(flight) for flight in job.flights)
    assert first is not None
    assert second is not None
    assert first["actual"] == {"ttft_ms": 1000.0, "tpot_ms": 750.0}
    assert first["forecast"] == {"ttft_ms": 1000.0, "tpot_ms": 250.0, "hit_tokens": 0, "confidence": 0.5}
    assert (first["met"], second["met"]) == (False, False)
    said = made.exposition()
    assert 'tenon_slo_requests_total{class="c"} 2' in said
    assert 'tenon_slo_attained_total{class="c"} 0' in said
    assert "tenon_slo_severity_sum 4" in said  # 0.5 of a token's bound, 3.5 of the first one's


def ledger_of(event: Event, e2e_s: float) -> dict[str, Any]:
    ledger: dict[str, Any] = event["ledger"]
    assert sum(ledger[part] for part in PARTS) == pytest.approx(e2e_s, abs=1e-6)
    return ledger


def test_the_end_of_a_request_says_where_its_time_went(slow: Running) -> None:
    with watching(slow) as events, ThreadPoolExecutor(3) as pool:
        for _ in pool.map(lambda i: slow.complete(prompt=[i] * 30, max_tokens=20, ignore_eos=True), range(3)):
            pass
        for _ in range(3):
            finished = until(events, "finished")
            ledger = ledger_of(finished, finished["e2e_s"])
            assert ledger["decode_s"] > 0.1
            assert ledger["prefill_s"] > 0
            assert 0 <= ledger["to_engine_s"] < finished["e2e_s"]
            assert 0 <= ledger["from_engine_s"] < finished["e2e_s"]
            assert abs(ledger["residual_s"]) < 1e-6
            assert finished["slo"]["met"] is True


def test_what_ends_here_is_told_a_little_later(slow: Running) -> None:
    text = slow.complete(prompt="hello", seed=3, max_tokens=40, ignore_eos=True)["choices"][0]["text"]
    stop = next(text[at : at + 2] for at in range(6, 30) if "\ufffd" not in text[at : at + 2])
    with watching(slow) as events:
        slow.complete(prompt="hello", seed=3, max_tokens=400, ignore_eos=True, stop=[stop])
        finished, later = until(events, "finished"), until(events, "ledger")
    assert finished["ledger"] is None
    assert later["request_id"] == finished["request_id"]
    assert ledger_of(later, finished["e2e_s"])["decode_s"] > 0
