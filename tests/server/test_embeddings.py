"""``/v1/embeddings`` as OpenAI's client sees it, and across the death of an engine."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest

from tenon.base.clock import ManualClock
from tenon.engine import messages as m
from tenon.engine.executors.hash import HashExecutor
from tenon.server.embeddings import Embeddings
from tenon.server.events import EventHub
from tenon.server.keys import Caller
from tenon.server.limits import Limits
from tenon.server.service import Service
from tests.server.conftest import CONFIG, PATIENCE_S, Running, wait_for

WIDTH = int(str(CONFIG["hidden_size"]))


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as made:
        yield made


def test_texts_and_their_tokens_are_embedded_alike(server: Running, client: openai.OpenAI) -> None:
    texts = ["hello", "a longer text than that one", "x"]
    answer = client.embeddings.create(model="tiny", input=texts)  # as base64, which the client decodes
    assert answer.model == "tiny"
    assert [one.index for one in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, texts))
    for one, text in zip(answer.data, texts, strict=True):
        assert len(one.embedding) == WIDTH
        ids = server.post("/tokenize", {"prompt": text}).json()["tokens"]
        vector = HashExecutor(258, width=WIDTH).hidden(np.array(ids, np.int32)).astype(np.float64)
        assert one.embedding == pytest.approx(vector / np.linalg.norm(vector), abs=1e-6)
        for given in (text, ids, [ids]):
            again = client.embeddings.create(model="tiny", input=given, encoding_format="float", user="somebody")
            assert again.data[0].embedding == one.embedding


def test_dimensions_and_encodings(server: Running, client: openai.OpenAI) -> None:
    whole = np.array(client.embeddings.create(model="tiny", input="hello").data[0].embedding)
    cut = client.embeddings.create(model="tiny", input="hello", dimensions=5).data[0].embedding
    assert cut == pytest.approx(whole[:5] / np.linalg.norm(whole[:5]), abs=1e-6)
    raw = server.post("/v1/embeddings", {"input": "hello", "encoding_format": "base64"}).json()
    assert np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4") == pytest.approx(whole)
    plain = server.post("/v1/embeddings", {"input": "hello"}).json()
    assert isinstance(plain["data"][0]["embedding"], list)
    assert plain["object"] == "list"
    assert plain["data"][0]["object"] == "embedding"


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"input": ""}, "input", "no tokens"),
        ({"input": ["a", ""]}, "input", "input 1 has no tokens"),
        ({"input": []}, "input", "empty list"),
        ({"input": ["a", 1]}, "input", "mixture"),
        ({"input": [[1], []]}, "input", "input 1 has no tokens"),
        ({"input": [1, 258]}, "input", "token id 258 is outside the vocabulary of 258"),
        ({"input": ["a"] * 129}, "input", "129 entries; the limit is 128"),
        ({"input": {"a": 1}}, "input", "input is wrong"),
        ({}, "input", "input is missing"),
        ({"input": "a", "dimensions": 0}, "dimensions", "from 1 to 32"),
        ({"input": "a", "dimensions": 33}, "dimensions", "from 1 to 32"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "int8"),
        ({"input": "a", "dimension": 3}, "dimension", "did you mean dimensions"),
        ({"input": "a", "stream": True}, "stream", "unknown parameter stream"),
        ({"input": [1] * 32769}, "input", "maximum context length is 32768"),
    ],
)
def test_what_is_wrong_is_named(server: Running, body: dict[str, Any], param: str, said: str) -> None:
    response = server.post("/v1/embeddings", body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert said in error["message"]


def test_too_long_a_text_has_openai_s_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        client.embeddings.create(model="tiny", input="x" * 40_000)
    assert caught.value.code == "context_length_exceeded"


def test_another_engine_is_asked_again() -> None:
    clock = ManualClock()
    service = Service(model="tiny", limits=Limits(), clock=clock, events=EventHub(clock, bound=10))
    told: list[m.ToEngine] = []
    ready = m.Ready("tiny", 4096, 1000, (), 100, 16, 1000)
    service.attach(told.append)
    service.text_loaded()
    service.receive(ready)
    adds = [m.Add(f"a/{i}", (1, 2), 0, 0, embed=m.Embed("mean")) for i in range(2)]
    job = service.submit(adds, Caller(None, clock))
    for add in adds:
        service.receive(m.Accepted(add.request_id))
    service.receive(m.Embedded("a/1", b"\0\0\x80\x3f"))
    service.engine_lost("it died", 0)
    service.attach(told.append)
    service.receive(ready)
    again = [message for message in told if isinstance(message, m.Add)][2:]
    assert [(add.request_id, add.embed, add.again) for add in again] == [("a/0~1", m.Embed("mean"), True)]
    service.receive(m.Embedded("a/0", b"\0\0\0\0"))  # of the one that died
    service.receive(m.Embedded("a/0~1", b"\0\0\0\x40"))
    answer = asyncio.run(Embeddings(job, "tiny", base64=False).whole())
    assert [one["embedding"] for one in answer["data"]] == [[2.0], [1.0]]
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert service.n_running == 0


@pytest.mark.slow
def test_vectors_are_the_same_where_the_engine_was_killed(own_server: Callable[..., Running]) -> None:
    server = own_server()
    body = {"input": [[i, *range(200), i] * 10 for i in range(100)]}
    undisturbed = server.post("/v1/embeddings", body).json()
    with ThreadPoolExecutor(1) as pool:
        others = [ids[::-1] for ids in body["input"]]
        asked = pool.submit(server.post, "/v1/embeddings", {"input": others + body["input"][:28]})
        wait_for(lambda: server.metrics()["tenon_requests_running"] > 0)
        os.kill(server.engine_pid(), signal.SIGKILL)
        answer = asked.result(PATIENCE_S).json()
    assert [one["embedding"] for one in answer["data"][100:]] == [one["embedding"] for one in undisturbed["data"][:28]]
    assert len(answer["data"]) == 128
    assert server.metrics()["tenon_engine_restarts_total"] == 1
    assert server.metrics()["tenon_requests_replayed_total"] > 0
