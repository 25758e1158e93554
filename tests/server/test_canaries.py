"""Every request has a secret of its own, and many run at once: each answer is the one that its request gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.conftest import PATIENCE_S, Running, wait_for
from tests.server.test_lifecycle import assert_conserved
from tests.server.test_survival import kill, ready

Start = Callable[..., Running]

STORY = "Once there was a library that kept one secret for each of its readers, and told it to nobody else. " * 2


def facts(n: int) -> list[str]:
    """Prompts that begin alike and differ in one word."""
    draws = random.Random(8)
    return [f"{STORY}The secret of this reader is {draws.getrandbits(64):016x}. It is" for _ in range(n)]


def ask(server: Running, number: int, fact: str, n_tokens: int) -> str:
    """The greedy answer, by one of four APIs, in one piece."""
    said = [{"role": "user", "content": fact}]
    path, body = (
        ("/v1/completions", {"prompt": fact, "max_tokens": n_tokens}),
        ("/v1/chat/completions", {"messages": said, "max_tokens": n_tokens}),
        ("/v1/messages", {"messages": said, "max_tokens": n_tokens}),
        ("/v1/responses", {"input": fact, "max_output_tokens": n_tokens}),
    )[number % 4]
    response = server.post(path, body | {"temperature": 0})
    while response.status_code == 503:  # it came between two engines, and was told so
        wait_for(lambda: ready(server))
        response = server.post(path, body | {"temperature": 0})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    if "choices" in found:
        choice = found["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])
    if path == "/v1/messages":
        return "".join(part["text"] for part in found["content"])
    return "".join(part["text"] for item in found["output"] for part in item["content"])


def together(server: Running, asked: list[str], n_tokens: int) -> list[str]:
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda pair: ask(server, *pair, n_tokens), enumerate(asked)))


def assert_nothing_foreign(found: list[str], alone: list[str]) -> None:
    assert len(set(alone)) == len(alone)
    foreign = [(i, alone.index(text)) for i, text in enumerate(found) if text != alone[i] and text in alone]
    assert foreign == []
    assert found == alone


def test_secrets_stay_with_those_who_asked(server: Running) -> None:
    asked = facts(24)
    alone = [ask(server, number, fact, 16) for number, fact in enumerate(asked)]
    for _ in range(2):
        assert_nothing_foreign(together(server, asked, 16), alone)


def leave(server: Running, fact: str, n_tokens: int) -> None:
    """Ask, and go after the first of the answer."""
    stream = server.stream(prompt=fact, max_tokens=n_tokens, temperature=0)
    next(stream.events())
    stream.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_secrets_in_a_crowd_on_too_little_memory(server: Running, own_server: Start) -> None:
    """64 at once where few fit, others leave, two engines die: evicted, preempted, replayed, and never mixed up."""
    asked = facts(64)
    alone = [ask(server, number, fact, 100) for number, fact in enumerate(asked)]
    small = own_server("--kv-bytes", "300000", "--max-model-len", "512", "--replays", "9")
    for deadly in (False, True):
        for _ in range(5):
            with ThreadPoolExecutor(10) as pool:
                whole = pool.submit(together, small, asked, 100)
                gone = [pool.submit(leave, small, fact, 200) for fact in asked[:8]]
                if deadly:
                    wait_for(lambda: small.metrics()["tenon_requests_running"] > 0)
                    kill(small)
                assert_nothing_foreign(whole.result(PATIENCE_S * 5), alone)
                for each in gone:
                    each.exception(PATIENCE_S)
    metrics = small.metrics()
    assert metrics["tenon_preemptions_total"] > 0 or metrics["tenon_kv_evictions_total"] > 0
    assert_conserved(metrics)
    assert httpx.get(small.url + "/readyz", timeout=PATIENCE_S).status_code == 200
