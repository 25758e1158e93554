"""Batches through a server: the official client, what a line costs, keys, cancelling, kill -9 in the middle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tenon.base.clock import ManualClock
from tenon.server.batch_lines import Journal, answered
from tenon.server.batches import Batches
from tenon.server.events import EventHub
from tenon.server.files import Store
from tenon.server.keys import Caller
from tenon.server.limits import Limits
from tenon.server.service import Service
from tests.server.conftest import PATIENCE_S, Running, start, wait_for
from tests.server.test_files import client
from tests.server.test_keys import ALICE, BOB, FILE, bearer

Start = Callable[..., Running]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "seed": 7},
    COMPLETIONS: {"prompt": "hello", "max_tokens": 3, "seed": 7},
    RESPONSES: {"input": "hello", "max_output_tokens": 3, "temperature": 0},
    EMBEDDINGS: {"input": ["hello", "you"]},
}
LONG = {"prompt": "hello", "max_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def keyed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys.toml").write_text(FILE)
    running = start(model_folder, "--keys", str(folder / "keys.toml"), store=folder / "store")
    yield running
    assert running.stop() == 0
    running.close()


def line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "tiny"} | body}


def written(lines: list[Any]) -> bytes:
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)


def create(api: openai.OpenAI, lines: list[Any], url: Any = COMPLETIONS, **more: Any) -> str:
    stored = api.files.create(file=("requests.jsonl", written(lines)), purpose="batch")
    return api.batches.create(input_file_id=stored.id, endpoint=url, completion_window="24h", **more).id


def ended(api: openai.OpenAI, batch_id: str) -> Any:
    wait_for(lambda: api.batches.retrieve(batch_id).status in ("completed", "failed", "cancelled", "expired"))
    return api.batches.retrieve(batch_id)


def outputs(api: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    found = [json.loads(text) for text in api.files.content(file_id).read().splitlines()]
    assert len({each["custom_id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


@pytest.mark.parametrize("url", BODIES)
def test_answers_are_those_of_the_route(keyed: Running, url: str) -> None:
    with client(keyed, ALICE) as api:
        lines = [line(f"request {i}", url, **BODIES[url]) for i in range(5)]
        done = ended(api, create(api, lines, url, metadata={"for": "a test"}))
        assert (done.status, done.endpoint, done.metadata) == ("completed", url, {"for": "a test"})
        assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (5, 5, 0)
        assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at < done.expires_at
        assert done.error_file_id is None
        answered = outputs(api, done.output_file_id)
        direct = keyed.post(url, BODIES[url], headers=bearer(ALICE)).json()
        told = {RESPONSES: ("output", "status"), EMBEDDINGS: ("data",)}.get(url, ("choices", "object", "model"))
        for each in answered.values():
            assert each["response"]["status_code"] == 200
            assert each["error"] is None
            body = each["response"]["body"]
            assert body["usage"].keys() == direct["usage"].keys()
            assert without_ids([body[name] for name in told]) == without_ids([direct[name] for name in told])
        assert sorted(answered) == [f"request {i}" for i in range(5)]


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_ids(it) for name, it in value.items() if name != "id"}
    return [without_ids(it) for it in value] if isinstance(value, list) else value


def test_a_bad_body_costs_only_its_line(keyed: Running) -> None:
    lines = [line(f"c{i}", prompt="hello", max_tokens=2) for i in range(4)]
    lines[1]["body"]["temperature"] = "hot"
    lines[2]["body"]["model"] = "other"
    with client(keyed, ALICE) as api:
        done = ended(api, create(api, lines))
        assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 2, 2)
        assert set(outputs(api, done.output_file_id)) == {"c0", "c3"}
        wrong = outputs(api, done.error_file_id)
        assert {name: each["response"]["status_code"] for name, each in wrong.items()} == {"c1": 400, "c2": 404}
        assert wrong["c1"]["response"]["body"]["error"]["param"] == "temperature"


GOOD = line("a", prompt="hello")
WRONG: dict[str, tuple[list[Any], str, str, int]] = {
    "no JSON": ([GOOD, b"{", line("b", prompt="x")], "invalid_json_line", "line 2: it must be a JSON object", 2),
    "deep": ([b"[" * 100_000], "invalid_json_line", "line 1", 1),
    "again": ([GOOD, line("b"), GOOD], "duplicate_custom_id", "'a' is that of line 1 too", 3),
    "no id": ([{"method": "POST", "url": COMPLETIONS, "body": {}}], "missing_required_parameter", "custom_id", 1),
    "an empty id": ([GOOD | {"custom_id": ""}], "invalid_value", "custom_id must be a string of 1 to 512", 1),
    "a number as id": ([GOOD | {"custom_id": 7}], "invalid_value", "got 7", 1),
    "GET": ([GOOD | {"method": "GET"}], "invalid_value", "method must be 'POST', got \"GET\"", 1),
    "another url": ([GOOD | {"url": CHAT}], "invalid_url", f"url must be {COMPLETIONS}, got", 1),
    "what else": ([GOOD | {"priority": 1}], "invalid_value", "'priority' is not known", 1),
    "no object": ([GOOD | {"body": [1]}], "invalid_value", "body must be a JSON object, got [1]", 1),
    "a stream": ([line("a", prompt="x", stream=True)], "invalid_value", "body.stream must be false", 1),
    "nothing": ([b""], "empty_file", "the file is empty", 1),
}


def test_a_file_that_is_none_fails_before_anything_is_asked(keyed: Running) -> None:
    before = httpx.get(keyed.url + "/metrics", headers=bearer(ALICE)).text.split("tenon_requests_started_total ")[-1]
    with client(keyed, ALICE) as api:
        for lines, code, said, number in WRONG.values():
            done = ended(api, create(api, lines))
            assert done.status == "failed"
            first = done.errors.data[0]
            assert (first.code, first.line) == (code, number), first
            assert said in first.message
            assert done.output_file_id is None
    after = httpx.get(keyed.url + "/metrics", headers=bearer(ALICE)).text.split("tenon_requests_started_total ")[-1]
    assert after.split()[0] == before.split()[0]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"endpoint": "/v1/moderations"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"input_file_id": "file-../../x"}, 404, "file_id"),
        ({"metadata": {"a": "b" * 513}}, 400, "metadata"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, 400, "output_expires_after"),
        ({"priority": 1}, 400, "priority"),
    ],
)
def test_wrong_wishes_are_named(keyed: Running, change: dict[str, Any], status: int, param: str) -> None:
    body = {"input_file_id": "file-" + "0" * 24, "endpoint": COMPLETIONS, "completion_window": "24h"} | change
    response = httpx.post(keyed.url + "/v1/batches", json=body, headers=bearer(ALICE), timeout=PATIENCE_S)
    assert response.status_code == status
    assert (response.json()["error"]["param"] or "").startswith(param)


def test_a_tenant_sees_its_own_batches_alone(keyed: Running) -> None:
    with client(keyed, ALICE) as alice, client(keyed, BOB) as bob:
        made = create(alice, [line("a", prompt="hello", max_tokens=1)])
        assert ended(alice, made).status == "completed"
        assert made in [each.id for each in alice.batches.list(limit=1)]
        assert list(bob.batches.list()) == []
        with pytest.raises(openai.NotFoundError):
            bob.batches.retrieve(made)
        with pytest.raises(openai.NotFoundError):
            bob.batches.cancel(made)
        with pytest.raises(openai.BadRequestError, match="completed and cannot be cancelled"):
            alice.batches.cancel(made)


@pytest.mark.slow
def test_a_batch_uses_its_keys_quota_and_waits_for_it(own_server: Start, tmp_path: Path) -> None:
    """Bob may send three requests a minute, and his file and his batch are two of them."""
    (tmp_path / "keys.toml").write_text(FILE)
    server = own_server("--keys", str(tmp_path / "keys.toml"), store=tmp_path / "store")
    with client(server, BOB) as bob:
        made = create(bob, [line(f"c{i}", prompt=[7], max_tokens=1) for i in range(4)])
        wait_for(lambda: bob.batches.retrieve(made).request_counts.completed == 1)  # type: ignore[union-attr]
        with pytest.raises(openai.RateLimitError):
            bob.completions.create(model="tiny", prompt=[7], max_tokens=1)
        assert bob.batches.retrieve(made).request_counts.failed == 0  # type: ignore[union-attr]
    assert server.stop() == 0


def test_a_cancelled_batch_keeps_what_was_answered(keyed: Running) -> None:
    with client(keyed, ALICE) as api:
        made = create(api, [line(f"c{i}", **LONG) for i in range(2000)])
        wait_for(lambda: api.batches.retrieve(made).request_counts.completed > 5)  # type: ignore[union-attr]
        source = api.batches.retrieve(made).input_file_id
        with pytest.raises(openai.BadRequestError, match="is the input of"):
            api.files.delete(source)
        assert api.batches.cancel(made).status == "cancelling"
        done = ended(api, made)
        assert (done.status, done.request_counts.total) == ("cancelled", 2000)
        answered = outputs(api, done.output_file_id)
        assert 5 < len(answered) == done.request_counts.completed < 2000
        assert done.cancelling_at <= done.cancelled_at
        assert api.files.delete(source).deleted
    wait_for(lambda: "tenon_requests_running 0" in httpx.get(keyed.url + "/metrics", headers=bearer(ALICE)).text)


def test_kill_in_the_middle_and_nothing_answered_is_asked_again(own_server: Start, tmp_path: Path) -> None:
    n = 100
    store = tmp_path / "store"
    server = own_server(store=store)
    api = client(server, "none")
    made = create(api, [line(f"c{i}", **LONG) for i in range(n)])
    wait_for(lambda: api.batches.retrieve(made).request_counts.completed > 20)  # type: ignore[union-attr]
    server.process.kill()
    server.process.wait(PATIENCE_S)
    api.close()
    [journal] = store.glob("*/*.journal")
    before = [text for text in journal.read_bytes().splitlines(keepends=True) if text.endswith(b"\n")]
    assert 20 < len(before) < n
    with journal.open("ab") as file:
        file.write(before[0][:-20])  # torn, as a machine that loses power may leave it

    again = own_server(store=store)
    with client(again, "none") as api:
        assert ended(api, made).status == "completed"
        done = api.batches.retrieve(made)
        assert (done.request_counts.completed, done.request_counts.failed) == (n, 0)  # type: ignore[union-attr]
        assert done.output_file_id is not None
        content = api.files.content(done.output_file_id).read()
        assert content.startswith(b"".join(before))
        assert set(outputs(api, done.output_file_id)) == {f"c{i}" for i in range(n)}
    assert again.metrics()["tenon_requests_started_total"] == n - len(before)
    assert not list(store.glob("*/*.journal"))


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_leaves_the_rest_to_the_next(own_server: Start, tmp_path: Path) -> None:
    store = tmp_path / "store"
    server = own_server(store=store)
    with client(server, "none") as api:
        made = create(api, [line(f"c{i}", **LONG) for i in range(2000)])
        wait_for(lambda: api.batches.retrieve(made).request_counts.completed > 5)  # type: ignore[union-attr]
    assert server.stop() == 0
    [record] = store.glob("*/batch_*.json")
    assert json.loads(record.read_bytes())["status"] == "in_progress"
    [journal] = store.glob("*/*.journal")
    n_before = journal.read_bytes().count(b"\n")
    other = own_server("--served-name", "another", store=store)  # not the model that it was made for: it waits
    with client(other, "none") as api:
        wait_for(lambda: api.batches.retrieve(made).request_counts.completed == n_before)  # type: ignore[union-attr]
    assert other.stop() == 0
    asked = json.loads(record.read_bytes())
    record.write_text(json.dumps(asked | {"expires_at": 1}))
    with client(own_server(store=store), "none") as api:
        done = ended(api, made)
        assert (done.status, done.request_counts.total) == ("expired", 2000)
        assert len(outputs(api, done.output_file_id)) == n_before == done.request_counts.completed
        late = outputs(api, done.error_file_id)
        assert len(late) == 2000 - n_before == done.request_counts.failed
        assert {each["error"]["code"] for each in late.values()} == {"batch_expired"}


@pytest.mark.slow
def test_a_tenant_that_has_no_room_left_keeps_what_was_answered(own_server: Start, tmp_path: Path) -> None:
    server = own_server(limits={"store_bytes": 40_000, "max_open_batches": 1}, store=tmp_path / "store")
    with client(server, "none") as api:
        made = create(api, [line(f"c{i}", **LONG) for i in range(100)])
        with pytest.raises(openai.RateLimitError, match="1 of your batches are under way"):
            create(api, [line("a", prompt="hello")])
        done = ended(api, made)
        assert done.status == "failed"
        assert done.errors.data[0].code == "storage_limit_exceeded"
        assert 0 < len(outputs(api, done.output_file_id)) == done.request_counts.completed < 100
        with pytest.raises(openai.APIStatusError, match=r"take .* of 40000 bytes"):
            api.files.create(file=b"x" * 40_000, purpose="batch")


@pytest.mark.slow
def test_interactive_requests_come_first(own_server: Start, tmp_path: Path) -> None:
    """With a queue that holds four sequences, a batch of many leaves room: nobody else is ever refused."""
    server = own_server(limits={"max_in_flight": 4}, store=tmp_path / "store")
    with client(server, "none") as api:
        made = create(api, [line(f"c{i}", **LONG) for i in range(300)])
        wait_for(lambda: api.batches.retrieve(made).request_counts.completed > 0)  # type: ignore[union-attr]
        for _ in range(20):
            assert api.completions.create(model="tiny", prompt="hello", max_tokens=2).usage is not None
        assert api.batches.cancel(made).status == "cancelling"


def reopened(folder: Path) -> Batches:
    """What a server has of this store; it never gets ready."""
    clock, limits = ManualClock(epoch_s=100), Limits()
    service = Service(model="tiny", limits=limits, clock=clock, events=EventHub(clock, bound=10))
    return Batches(Store(folder, limits, clock), service, limits, clock, lambda key: Caller(None, clock))


@pytest.mark.parametrize(("status", "end"), [("finalizing", "completed"), ("cancelling", "cancelled")])
@pytest.mark.parametrize("noted", [False, True])
def test_an_end_that_was_cut_off_is_made_once_more(tmp_path: Path, status: str, end: str, noted: bool) -> None:
    async def begun() -> Path:
        batches = reopened(tmp_path)
        shelf = batches.store.shelf("")
        draft = shelf.draft()
        draft.write(written([line("a", prompt="x"), line("b", prompt="x")]))
        source = await shelf.keep(draft, "requests.jsonl", "batch")
        made = await batches.create(Caller(None, ManualClock()), source.id, COMPLETIONS, "24h", None)
        await batches.close()
        return shelf.folder / f"{made.id}.json"

    record = asyncio.run(begun())
    ids = {"output_file_id": "file-" + "1" * 24, "error_file_id": "file-" + "2" * 24} if noted else {}
    record.write_text(json.dumps(json.loads(record.read_bytes()) | {"status": status, "total": 2, "ending": end} | ids))
    if noted:  # the output had become a file already
        (record.parent / ("file-" + "1" * 24 + ".data")).write_bytes(b"half")
    with Journal(record.with_suffix(".journal")) as journal:
        journal.append(answered("b", 200, "r", b"{}"))
        journal.append(answered("a", 400, "r", b"{}"))

    async def ended_again() -> dict[str, Any]:
        batches = reopened(tmp_path)
        batches.start()
        await batches.close()
        return batches.of("")[0].to_json()

    done = asyncio.run(ended_again())
    assert done["status"] == end
    assert done["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    for name, custom_id in (("output_file_id", "b"), ("error_file_id", "a")):
        assert done[name] == ids.get(name, done[name])
        assert json.loads((record.parent / f"{done[name]}.data").read_bytes())["custom_id"] == custom_id
    assert not record.with_suffix(".journal").exists()
    assert asyncio.run(ended_again()) == done
