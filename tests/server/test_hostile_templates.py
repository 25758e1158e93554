"""A checkpoint's chat template is a stranger's code: on every route that renders it may cost its request, nothing else.

The server, its engine and all its workers run optimised here (``python -O``), so nothing can hang on an ``assert``.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.models.hostile_templates import ENDLESS, ESCAPES, LEAKS
from tests.server.conftest import CHAT_TEMPLATE, PATIENCE_S, Running, start, wait_for, write_model
from tests.server.test_limits import connect, read_all
from tests.server.test_orphans import descendants, kinds

KEY = "the-key-of-these-tests"
AUTHORISED = {"authorization": f"Bearer {KEY}"}
ROUTES = ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/tokenize")
"""Those that render."""
WRITES = [
    "{{{{ open('{marker}', 'w').write('x') }}}}",
    "{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}",
    "{{{{ ''.__class__.__mro__[1].__subclasses__()[104].load_module('os').system('touch {marker}') }}}}",
    "{{{{ joiner.__init__.__globals__['__builtins__'].open('{marker}', 'w') }}}}",
    "{{{{ self._TemplateReference__context.environment.compile('x').exec('touch {marker}') }}}}",
    "{{% set x = namespace.__init__.__globals__.sys.modules['subprocess'].run(['touch', '{marker}']) %}}{{{{ x }}}}",
]
"""What would leave a file, if it could."""
LATE = [
    "{{ 'a' * 10 ** (8 + messages|length) }}",
    "{{ ((8 + messages|length) ** 9999999) | string | length }}",
    "{{ '%999999999d' | format(messages|length) }}",
]
"""Expressions that would end the server's start, were they constant: the compiler computes those."""


def told(name: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": name}]}


def body_for(path: str, name: str) -> dict[str, Any]:
    """A sound body whose one message names the piece of the template that renders it."""
    if path == "/v1/responses":
        return {"model": "tiny", "input": name, "max_output_tokens": 2}
    limits = {} if path in ("/tokenize", "/v1/messages/count_tokens") else {"max_tokens": 2}
    return {"model": "tiny", **told(name), **limits}


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marked") / "marker"


@pytest.fixture(scope="module")
def corpus(marker: Path) -> dict[str, str]:
    """Pieces of one template, each under what the first message has to say for it to be rendered."""
    late = [source for source in ENDLESS if source.startswith("{%")] + LATE
    named = {f"endless{i}": source for i, source in enumerate(late)}
    named |= {f"escape{i}": source for i, source in enumerate(ESCAPES)}
    return named | {f"write{i}": source.format(marker=marker) for i, source in enumerate(WRITES)}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, str]) -> Iterator[Running]:
    folder = write_model(tmp_path_factory.mktemp("hostile"))
    branches = "".join(
        f"{{% {'elif' if i else 'if'} messages[0].content == '{name}' %}}{source}"
        for i, (name, source) in enumerate(corpus.items())
        if "import" not in source and "include" not in source
    )
    (folder / "chat_template.jinja").write_text(f"{branches}{{% else %}}{CHAT_TEMPLATE}{{% endif %}}")
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(f'[[key]]\nname = "one"\nkey = "{KEY}"\nwatch = true\n')
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONOPTIMIZE", "1")
        running = start(folder, "--keys", str(keys))
    yield running
    assert running.stop() == 0
    running.close()


def post(server: Running, path: str, name: str) -> httpx.Response:
    return httpx.post(server.url + path, json=body_for(path, name), headers=AUTHORISED, timeout=PATIENCE_S)


def assert_contained(response: httpx.Response, name: str) -> None:
    """An error of the request's, or text in which nothing of the interpreter shows."""
    assert response.status_code in (200, 400), (name, response.text)
    assert not any(leak in response.text for leak in LEAKS), (name, response.text)
    if name.startswith("endless"):
        assert response.status_code == 400
        assert "chat template" in response.json()["error"]["message"]


def attack(server: Running, pairs: list[tuple[str, str]]) -> None:
    """Each pair of route and piece, four at a time, while others ask for what needs no template and are served."""
    with ThreadPoolExecutor(5) as pool:
        attacks = [pool.submit(post, server, path, name) for path, name in pairs]
        others = 0
        while not all(each.done() for each in attacks):
            said = httpx.post(
                server.url + "/v1/completions",
                json={"model": "tiny", "prompt": "a", "max_tokens": 2},
                headers=AUTHORISED,
                timeout=PATIENCE_S,
            )
            assert said.status_code == 200
            others += 1
        for (_, name), each in zip(pairs, attacks, strict=True):
            assert_contained(each.result(), name)
    assert others > 0


def sound(server: Running, marker: Path) -> None:
    assert not marker.exists()
    for path in ROUTES:
        assert post(server, path, "hello").status_code == 200


def test_each_route_survives_the_worst(hostile: Running, corpus: dict[str, str], marker: Path) -> None:
    """Every piece on some route, every route with pieces of every kind."""
    routes = itertools.cycle(ROUTES)
    quick = [name for name in corpus if not name.startswith("endless")]
    attack(hostile, [(next(routes), name) for name in quick] + [(path, "endless0") for path in ROUTES])
    sound(hostile, marker)


@pytest.mark.slow
def test_each_route_survives_everything(hostile: Running, corpus: dict[str, str], marker: Path) -> None:
    attack(hostile, list(itertools.product(ROUTES, corpus)))
    sound(hostile, marker)


def test_rules_hold_without_asserts(hostile: Running) -> None:
    """Keys, hosts, origins, sizes: each refusal as it is with asserts."""
    flags = [
        Path(f"/proc/{pid}/environ").read_bytes() for pid in (hostile.process.pid, hostile.engine_pid())
    ]  # of the server, and of what it started
    assert all(b"PYTHONOPTIMIZE=1" in each for each in flags)
    get = {"timeout": PATIENCE_S}
    assert httpx.get(hostile.url + "/metrics", **get).status_code == 401
    assert httpx.get(hostile.url + "/v1/models", headers={"x-api-key": KEY + "x"}, **get).status_code == 401
    for path in ROUTES:
        assert httpx.post(hostile.url + path, json=body_for(path, "hello"), **get).status_code == 401
        wrong = body_for(path, "hello") | {"no_such_field": 1}
        assert httpx.post(hostile.url + path, json=wrong, headers=AUTHORISED, **get).status_code == 400
    for name, value in (("host", "evil.example"), ("origin", "https://evil.example")):
        assert httpx.get(hostile.url + "/v1/models", headers=AUTHORISED | {name: value}, **get).status_code == 403
    too_much = {"model": "tiny", "prompt": "a", "n": 128, "max_tokens": 30_000, "logprobs": 20}
    assert (
        httpx.post(hostile.url + "/v1/completions", json=too_much, headers=AUTHORISED, timeout=PATIENCE_S).status_code
        == 400
    )
    with connect(hostile) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 20_000 + b"\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 431 ")
    with connect(hostile) as sock:
        head = f"POST /tokenize HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEY}\r\ncontent-length: 999999999\r\n\r\n{{"
        sock.sendall(head.encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


def sockets(pid: int) -> set[int]:
    """Inodes of the sockets that a process has open."""
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.exists() or entry.is_symlink()]
    return {int(link[8:-1]) for link in links if link.startswith("socket:[")}


def listening(pids: set[int]) -> set[tuple[str, str]]:
    """(protocol, address) of all that these processes listen at or could be sent to, by the kernel's tables."""
    owned = set().union(*map(sockets, pids))
    found = set()
    for protocol in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        for line in Path(f"/proc/net/{protocol}").read_text().splitlines()[1:]:
            _, local, _, state, *_, = fields = line.split()  # fmt: skip
            if int(fields[9]) in owned and (state == "0A" or not protocol.startswith("tcp")):
                found.add((protocol, local))
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[6]) in owned and int(fields[3], 16) & 0x10000:  # SO_ACCEPTCON: it listens
            found.add(("unix", fields[7] if len(fields) > 7 else ""))
    return found


def test_it_listens_on_loopback_and_nowhere_else(hostile: Running) -> None:
    """One TCP port of the server's; the socket for the engine is gone once the engine has come; no datagrams."""
    wait_for(lambda: post(hostile, "/tokenize", "hello").status_code == 200)
    server = hostile.process.pid
    children = descendants(server)
    assert kinds(children) == {"engine", "worker"}
    port = int(hostile.url.rpartition(":")[2])
    assert listening({server}) == {("tcp", f"0100007F:{port:04X}")}
    assert listening(children) == set()
