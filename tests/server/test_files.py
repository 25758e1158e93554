"""Stored files: the official client, other tenants, hostile names, limits, what a crash leaves."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tenon.base.clock import ManualClock
from tenon.base.errors import ResourceError
from tenon.server.failures import Refusal
from tenon.server.files import Shelf, Store, StoreFull
from tenon.server.limits import BodyTooLarge, Limits
from tests.server.conftest import PATIENCE_S, Running, start
from tests.server.test_keys import ALICE, BOB, CAROL, FILE, bearer
from tests.server.test_limits import connect, read_all

Start = Callable[..., Running]
LIMITS = Limits(file_bytes=1000, store_bytes=2500, max_files=3)


@pytest.fixture(scope="module")
def keyed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys.toml").write_text(FILE.replace("requests_per_minute = 3", ""))
    running = start(model_folder, "--keys", str(folder / "keys.toml"), store=folder / "store")
    yield running
    assert running.stop() == 0
    running.close()


def client(server: Running, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)


def upload(server: Running, key: str, name: str, content: bytes = b"x", **data: str) -> httpx.Response:
    files = {"file": (name, content)}
    form = {"purpose": "batch"} | data
    return httpx.post(server.url + "/v1/files", data=form, files=files, headers=bearer(key), timeout=PATIENCE_S)


def test_the_official_client_stores_lists_reads_and_deletes(keyed: Running) -> None:
    with client(keyed, BOB) as bob:
        content = b"line\n" * 100_000
        made = bob.files.create(file=("requests.jsonl", content), purpose="batch")
        assert (made.bytes, made.filename, made.purpose, made.object) == (500_000, "requests.jsonl", "batch", "file")
        assert bob.files.retrieve(made.id) == made
        others = [bob.files.create(file=b"%d" % i, purpose="batch").id for i in range(3)]
        listed = [each.id for each in bob.files.list(limit=2)]  # it turns the pages
        assert sorted(listed) == sorted([made.id, *others])
        assert [each.id for each in bob.files.list(order="asc", purpose="batch")] == listed[::-1]
        assert bob.files.content(made.id).read() == content
        for each in listed:
            assert bob.files.delete(each).deleted
        with pytest.raises(openai.NotFoundError):
            bob.files.retrieve(made.id)
        assert list(bob.files.list()) == []


def test_a_tenant_never_sees_anothers(keyed: Running) -> None:
    with client(keyed, ALICE) as alice, client(keyed, BOB) as bob, client(keyed, CAROL) as carol:
        mine = alice.files.create(file=b"secret", purpose="batch").id
        assert carol.files.content(mine).read() == b"secret"  # of the same tenant
        assert mine not in [each.id for each in bob.files.list()]
        for ask in (bob.files.retrieve, bob.files.content, bob.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(mine)
        with pytest.raises(openai.NotFoundError):
            bob.batches.create(input_file_id=mine, endpoint="/v1/completions", completion_window="24h")
        alice.files.delete(mine)


IDS = ["..", "../lock", "..%2Flock", "file-..%2f..", "file-" + "0" * 24, "file-" + "A" * 24, "%00", "file-\n", "%ff"]


@pytest.mark.parametrize("name", IDS)
def test_hostile_ids_name_nothing(keyed: Running, name: str) -> None:
    with httpx.Client(base_url=keyed.url, timeout=PATIENCE_S, headers=bearer(ALICE)) as http:
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
            request = http.build_request(method, "/")
            request.url = request.url.copy_with(raw_path=f"/v1/files/{name.replace(chr(10), '%0a')}{path}".encode())
            assert http.send(request).status_code == 404


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", ".hidden", "a\\b", "a\x00b", "é.jsonl", "", "a" * 129])
def test_hostile_names_are_refused(keyed: Running, name: str) -> None:
    response = upload(keyed, BOB, name)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "file"


PART = b'--B\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n'
DATA = b'--B\r\ncontent-disposition: form-data; name="%s"; filename="%s"\r\n\r\n%s\r\n'
PURPOSE, FINE = PART % (b"purpose", b"batch"), DATA % (b"file", b"a", b"x")
FORMS = {
    "no form": b"{}",
    "nothing": b"",
    "no end": PURPOSE + FINE,
    "no file": PURPOSE + b"--B--\r\n",
    "no purpose": FINE + b"--B--\r\n",
    "two files": PURPOSE + FINE + FINE + b"--B--\r\n",
    "a file elsewhere": PURPOSE + DATA % (b"other", b"a", b"x") + b"--B--\r\n",
    "a value for the file": PURPOSE + PART % (b"file", b"x") + b"--B--\r\n",
    "an unknown field": PURPOSE + PART % (b"expires_after[seconds]", b"3600") + FINE + b"--B--\r\n",
    "a long field": PART % (b"purpose", b"b" * 5000) + FINE + b"--B--\r\n",
    "a long header": b"--B\r\nx: " + b"a" * 50_000,
    "many parts": PURPOSE * 50 + FINE + b"--B--\r\n",
    "another purpose": PART % (b"purpose", b"fine-tune") + FINE + b"--B--\r\n",
    "no text": PART % (b"purpose", b"\xff") + FINE + b"--B--\r\n",
}


@pytest.mark.parametrize("how", FORMS)
def test_broken_forms_are_refused_and_leave_nothing(keyed: Running, how: str) -> None:
    headers = bearer(BOB) | {"content-type": "multipart/form-data; boundary=B"}
    response = httpx.post(keyed.url + "/v1/files", content=FORMS[how], headers=headers, timeout=PATIENCE_S)
    assert response.status_code == 400, response.text
    assert isinstance(response.json()["error"]["message"], str)
    assert httpx.get(keyed.url + "/v1/files", headers=headers).json()["data"] == []


KINDS = ["application/json", "multipart/form-data", "multipart/form-data; boundary=" + "B" * 99]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_form_is_told(keyed: Running, kind: str) -> None:
    headers = bearer(BOB) | {"content-type": kind}
    response = httpx.post(keyed.url + "/v1/files", content=b"{}", headers=headers, timeout=PATIENCE_S)
    assert response.status_code == 400
    assert "multipart/form-data" in response.json()["error"]["message"]


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=10001", "order=up", "after=file-1", "page=2"])
def test_wrong_queries_are_named(keyed: Running, query: str) -> None:
    response = httpx.get(f"{keyed.url}/v1/files?{query}", headers=bearer(BOB), timeout=PATIENCE_S)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


def test_too_large_a_file_is_refused_before_and_while_it_comes(keyed: Running) -> None:
    with connect(keyed) as sock:
        head = f"POST /v1/files HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {BOB}\r\n"
        head += "content-type: multipart/form-data; boundary=B\r\ncontent-length: 999999999\r\n\r\n{"
        sock.sendall(head.encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")

    def chunks() -> Iterator[bytes]:
        yield (PURPOSE + FINE)[:-3]
        for _ in range(70):
            yield b" " * 2**20

    headers = bearer(BOB) | {"content-type": "multipart/form-data; boundary=B"}
    response = httpx.post(keyed.url + "/v1/files", content=chunks(), headers=headers, timeout=PATIENCE_S)
    assert response.status_code == 413
    assert "67108864" in response.json()["error"]["message"]
    assert httpx.get(keyed.url + "/v1/files", headers=headers).json()["data"] == []


@pytest.mark.slow
def test_a_slow_upload_has_the_time_its_length_takes(own_server: Start, tmp_path: Path) -> None:
    server = own_server(limits={"receipt_s": 0.5, "upload_Bps": 10}, store=tmp_path / "store")
    body = PURPOSE + FINE + b"--B--\r\n"

    def half(path: str) -> socket.socket:
        sock = connect(server)
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=B\r\n"
        sock.sendall(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body[:20])
        return sock

    with half("/v1/files") as slow, half("/tokenize") as other:
        assert read_all(other).startswith(b"HTTP/1.1 408 ")  # begun later, and already over
        slow.sendall(body[20:])
        assert read_all(slow).startswith(b"HTTP/1.1 200 ")


def test_a_folder_that_was_named_and_is_taken_stops_the_start(own_server: Start, tmp_path: Path) -> None:
    held = Store(tmp_path / "store", LIMITS, ManualClock())
    with pytest.raises(AssertionError, match="is used by another server; give another folder with --store"):
        own_server(store=tmp_path / "store")
    held.close()


@pytest.mark.slow
def test_where_the_usual_folder_is_taken_the_server_serves_and_says_why(server: Running, own_server: Start) -> None:
    answers = [httpx.get(each.url + "/v1/files", timeout=PATIENCE_S) for each in (server, own_server())]
    assert [answer.status_code for answer in answers] == [200, 503]
    assert "is used by another server" in answers[1].json()["error"]["message"]


# The shelf by itself.


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", LIMITS, ManualClock(epoch_s=1000))


def put(shelf: Shelf, n_bytes: int) -> str:
    async def write() -> str:
        draft = shelf.draft()
        try:
            draft.count(n_bytes)
            draft.write(b"x" * n_bytes)
        except BaseException:
            shelf.abandon(draft)
            raise
        return (await shelf.keep(draft, "a", "batch")).id

    return asyncio.run(write())


def content(store: Store) -> list[str]:
    return sorted(path.suffix for path in store.folder.glob("*/*"))


def test_limits_of_bytes_and_counts(store: Store) -> None:
    shelf = store.shelf("t")
    with pytest.raises(BodyTooLarge, match="1000 bytes"):
        put(shelf, 1001)
    ids = [put(shelf, 1000), put(shelf, 1000)]
    with pytest.raises(StoreFull, match="take 2000 of 2500 bytes"):
        put(shelf, 501)
    ids.append(put(shelf, 500))
    with pytest.raises(StoreFull, match="you have 3 files"):
        put(shelf, 0)
    assert put(store.shelf("another"), 1000)
    asyncio.run(shelf.delete(ids[0]))
    assert shelf.n_bytes == 1500
    assert put(shelf, 1000)


def test_what_was_stored_is_there_after_a_restart_and_what_was_half_is_not(store: Store, tmp_path: Path) -> None:
    shelf = store.shelf("t")
    kept = put(shelf, 10)
    half = shelf.draft()
    half.write(b"half")
    (shelf.folder / ("file-" + "0" * 24 + ".data")).write_bytes(b"no record yet")
    assert len(content(store)) == 4
    half.drop()
    (shelf.folder / ".incoming-0").write_bytes(b"half")
    store.close()
    again = Store(tmp_path / "store", LIMITS, ManualClock())
    assert [record.id for record in again.shelf("t").files()] == [kept]
    assert again.shelf("t").n_bytes == 10
    assert content(again) == [".data", ".json"]
    with pytest.raises(Refusal, match="no file"):
        again.shelf("u").get(kept)
    (again.shelf("t").folder / f"{kept}.json").write_bytes(b"{")
    again.close()
    with pytest.raises(ResourceError, match=f"{kept}.json is damaged"):
        Store(tmp_path / "store", LIMITS, ManualClock())


def test_names_of_tenants_are_no_paths(store: Store) -> None:
    for tenant in ("../..", "", "a/b", "\x00"):
        assert store.shelf(tenant).folder.parent == store.folder


def test_nobody_else_can_read_it(store: Store) -> None:
    put(store.shelf("t"), 10)
    modes: dict[str, Any] = {path.name: path.stat().st_mode & 0o077 for path in store.folder.rglob("*")}
    assert set(modes.values()) == {0}
    assert store.folder.stat().st_mode & 0o077 == 0
