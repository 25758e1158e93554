"""Keys, quotas and tenants: who gets in, how much each may use, and that nobody's cache is another's."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from tenon.base.clock import ManualClock
from tenon.base.errors import ConfigError
from tenon.server.app import OPEN_PATHS, build_app
from tenon.server.completions import Completions
from tenon.server.events import EventHub
from tenon.server.failures import Refusal
from tenon.server.keys import Bucket, Caller, Key, KeyRing, read_keys
from tenon.server.limits import Limits
from tenon.server.service import Service
from tests.server.conftest import PATIENCE_S, Running, start, wait_for

Start = Callable[..., Running]

ALICE, BOB, CAROL = "alice-0123456789abcdef", "bob-0123456789abcdef", "carol-0123456789abcdef"
FILE = f"""
[[key]]
name = "alice"
key = "{ALICE}"
tenant = "research"
watch = true

[[key]]
name = "bob"
sha256 = "{hashlib.sha256(BOB.encode()).hexdigest()}"
requests_per_minute = 3
tokens_per_minute = 300

[[key]]
name = "carol"
key = "{CAROL}"
tenant = "research"
"""


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(FILE)
    return path


@pytest.fixture
def keyed(own_server: Start, key_file: Path) -> Running:
    return own_server("--keys", str(key_file))


@pytest.fixture(scope="module")
def shared(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with these keys for tests that leave Bob's quota and the file alone."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(FILE)
    running = start(model_folder, "--keys", str(path))
    yield running
    assert running.stop() == 0
    running.close()


def complete(server: Running, key: str, **body: Any) -> httpx.Response:
    asked = {"prompt": [7] * 100, "max_tokens": 1, "ignore_eos": True} | body
    return server.post("/v1/completions", asked, headers=bearer(key))


def routes() -> list[tuple[str, str]]:
    """Every route and method of the application, with something that is none."""
    clock = ManualClock()
    service = Service(model="tiny", limits=Limits(), clock=clock, events=EventHub(clock, bound=10))
    app = build_app(service, Completions(service), loopback_only=True)
    found = [
        (method, route.path.replace("{name:path}", "tiny"))
        for route in app.routes
        if isinstance(route, Route)
        for method in sorted(route.methods or ())
    ]
    return [*found, ("GET", "/nothing/here"), ("DELETE", "/v1/models")]


HOSTILE = [
    "/v1/../livez/../metrics", "/livez/../metrics", "//metrics", "/METRICS", "/metrics/", "/metrics%2f", "/livez%00",
    "/%6detrics", "/livez;/../metrics",
]  # fmt: skip
KEYLESS = [{}, bearer("wrong-0123456789abcdef"), {"authorization": "Basic " + ALICE}, {"x-api-key": ""}]


def test_nothing_but_probes_and_the_page_answers_without_a_key(shared: Running) -> None:
    asked = [*routes(), *(("GET", path) for path in HOSTILE)]
    assert len({path for _, path in asked}) > 15
    with httpx.Client(base_url=shared.url, timeout=PATIENCE_S) as client:
        for method, path in asked:
            for headers in KEYLESS:
                request = client.build_request(method, "/", headers=headers)
                request.url = request.url.copy_with(raw_path=path.encode())
                response = client.send(request)
                if path in OPEN_PATHS:
                    assert response.status_code == 200, path
                else:
                    assert response.status_code == 401, (method, path)
                    if method != "HEAD":
                        assert response.json()["error"]["type"] == "authentication_error"
                    assert response.headers["www-authenticate"] == "Bearer"


def test_keys_open_what_they_may(shared: Running) -> None:
    assert complete(shared, ALICE).status_code == 200
    by_header = shared.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers={"x-api-key": BOB})
    assert by_header.status_code == 200
    for path in ("/metrics", "/events"):
        denied = httpx.get(shared.url + path, headers=bearer(BOB), timeout=PATIENCE_S)
        assert (denied.status_code, denied.json()["error"]["type"]) == (403, "permission_error")
    assert httpx.get(shared.url + "/metrics", headers=bearer(ALICE), timeout=PATIENCE_S).status_code == 200


def test_tenants_share_their_cache_and_no_other(keyed: Running) -> None:
    def cached(key: str) -> int:
        usage = complete(keyed, key).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached(ALICE) == 0
    assert cached(BOB) == 0
    assert cached(CAROL) == 96 == cached(ALICE)
    assert cached(BOB) == 96


def test_quotas_are_refused_with_the_time_to_wait(keyed: Running) -> None:
    too_much = complete(keyed, BOB, max_tokens=400)
    assert (too_much.status_code, too_much.json()["error"]["param"]) == (400, "max_tokens")
    assert complete(keyed, BOB, max_tokens=150).status_code == 200
    tokens = complete(keyed, BOB, max_tokens=150)
    assert (tokens.status_code, tokens.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(tokens.headers["retry-after"]) <= 60
    requests = complete(keyed, BOB)
    assert requests.status_code == 429
    assert "3 requests a minute" in requests.json()["error"]["message"]
    assert complete(keyed, ALICE).status_code == 200


def test_what_was_not_used_comes_back(keyed: Running) -> None:
    """Two of these would be 460 of 300 tokens, had the first kept what it did not use."""
    one = complete(keyed, BOB, max_tokens=130, stop_token_ids=list(range(256)))
    assert one.json()["usage"]["completion_tokens"] < 50
    assert complete(keyed, BOB, max_tokens=50).status_code == 200


def test_a_reload_is_whole_or_nothing(keyed: Running, key_file: Path) -> None:
    def knows(key: str) -> bool:
        return httpx.get(keyed.url + "/v1/models", headers=bearer(key), timeout=PATIENCE_S).status_code == 200

    new = "dave-0123456789abcdef"
    key_file.write_text(FILE + f'\n[[key]]\nname = "dave"\nkey = "{new}"\n')
    assert not knows(new)
    keyed.process.send_signal(signal.SIGHUP)
    wait_for(lambda: knows(new))
    key_file.write_text('[[key]]\nname = "dave"\n')
    keyed.process.send_signal(signal.SIGHUP)
    assert all(knows(new) for _ in range(5))  # the file is read before the last of these is answered
    key_file.write_text(FILE)
    keyed.process.send_signal(signal.SIGHUP)
    wait_for(lambda: not knows(new))
    assert knows(ALICE)


def test_a_key_is_never_said(keyed: Running) -> None:
    for key in (ALICE, "guess-0123456789abcdef"):
        complete(keyed, key, max_tokens=0)
    assert keyed.stop() == 0
    assert keyed.process.stderr is not None
    said = keyed.process.stderr.read()
    assert ALICE not in said
    assert "guess-" not in said


def test_with_keys_other_machines_may_come(key_file: Path) -> None:
    from tenon.engine.config import EngineConfig
    from tenon.server.run import ServeConfig

    assert ServeConfig(EngineConfig(), host="192.0.2.1", keys=key_file).keys == key_file
    with pytest.raises(ConfigError, match="give --keys FILE"):
        ServeConfig(EngineConfig(), host="192.0.2.1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold \\[\\[key\\]\\] tables"),
        ("[key]\nname='a'", "must hold \\[\\[key\\]\\] tables"),
        ("[[key]]\nname='a'\n[other]\nx=1", "must hold \\[\\[key\\]\\] tables"),
        ("[[key]", "is not TOML"),
        ("[[key]]\nkey='0123456789abcdef'", "key 1 needs a name"),
        ("[[key]]\nname='a'", "needs either key or sha256"),
        ("[[key]]\nname='a'\nkey='short'", "at least 16 characters"),
        ("[[key]]\nname='a'\nsha256='abc'", "64 hexadecimal digits"),
        ("[[key]]\nname='a'\nkey='0123456789abcdef'\nrate=1", "has 'rate'; known are"),
        ("[[key]]\nname='a'\nkey='0123456789abcdef'\ntenant=''", "tenant must be a word"),
        ("[[key]]\nname='a'\nkey='0123456789abcdef'\nwatch=1", "watch must be true or false"),
        ("[[key]]\nname='a'\nkey='0123456789abcdef'\ntokens_per_minute=0", "tokens_per_minute must be"),
        ("[[key]]\nname='a'\nkey='0123456789abcdef'\n[[key]]\nname='a'\nkey='0123456789abcdeg'", "the same name"),
        ("[[key]]\nname='a'\nkey='0123456789abcdef'\n[[key]]\nname='b'\nkey='0123456789abcdef'", "the same key"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_keys(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing(tmp_path / "none.toml", ManualClock())


def test_a_bucket_fills_evenly_and_never_over() -> None:
    clock = ManualClock()
    bucket = Bucket(60, clock)
    assert bucket.take(60) == 0
    assert bucket.take(10) == 10
    clock.advance(9.5)
    assert bucket.take(10) == pytest.approx(0.5)
    clock.advance(0.5)
    assert bucket.take(10) == 0
    bucket.give_back(5)
    assert bucket.take(5) == 0
    clock.advance(1000)
    assert bucket.take(61) == 1


def test_a_reload_keeps_what_is_in_the_buckets(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(FILE)
    ring = KeyRing(path, ManualClock())
    for _ in range(3):
        ring.caller(bearer(BOB)).take_request()
    ring.reload()
    with pytest.raises(Refusal, match="3 requests a minute"):
        ring.caller(bearer(BOB)).take_request()


def test_without_limits_nothing_is_counted() -> None:
    caller = Caller(Key("a", b"", "t"), ManualClock())
    for _ in range(1000):
        caller.take_request()
        caller.take_tokens(10**9)
    caller.give_tokens_back(1)
