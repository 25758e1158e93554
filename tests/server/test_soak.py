"""Promise P5: many requests of all kinds leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import PATIENCE_S, Running, wait_for
from tests.server.test_lifecycle import Start, assert_conserved

WISHES: list[dict[str, Any]] = [
    {"max_tokens": 3},
    {"max_tokens": 4, "n": 3, "logprobs": 2},
    {"max_tokens": 5, "stream": True},
    {"max_tokens": 5, "guided_regex": "[ab]{4}"},
    {"max_tokens": 40, "stream": True, "leave": True},
    {"max_tokens": 3, "prompt": ["a", "b"], "echo": True, "logprobs": 0},
    {"max_tokens": 2, "temperature": -1.0},
    {"max_tokens": 4, "repetition_penalty": 1.2, "stop": ["q"]},
]


async def one(client: httpx.AsyncClient, server: Running, wishes: dict[str, Any]) -> None:
    body = {"model": server.model, "prompt": "hello", "ignore_eos": "guided_regex" not in wishes} | wishes
    leaves = body.pop("leave", False)
    async with client.stream("POST", server.url + "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if leaves and line:
                return


async def many(server: Running, n: int, seed: int) -> None:
    """So many requests, 16 at a time, some with prompts of their own."""
    draws = random.Random(seed)
    left = iter(range(n))
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:

        async def work() -> None:
            for _ in left:
                wishes = dict(draws.choice(WISHES))
                if "prompt" not in wishes and draws.random() < 0.5:
                    wishes["prompt"] = f"{draws.random()} " * draws.randint(1, 20)
                await one(client, server, wishes)

        await asyncio.gather(*(work() for _ in range(16)))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def idle(server: Running) -> bool:
    metrics = server.metrics()
    return metrics["tenon_requests_running"] == metrics["tenon_kv_blocks_used"] == 0


def soak(server: Running, warm: int, batches: int, per_batch: int) -> list[float]:
    """Mebibytes of both processes together after each batch; what must be zero is checked after each."""
    pids = server.process.pid, server.engine_pid()
    asyncio.run(many(server, warm, 0))
    wait_for(lambda: idle(server))
    before = [descriptors(pid) for pid in pids]
    sizes = []
    for batch in range(batches):
        asyncio.run(many(server, per_batch, batch + 1))
        wait_for(lambda: idle(server))
        gc.collect()
        wait_for(lambda: [descriptors(pid) for pid in pids] == before)
        sizes.append(sum(resident_mib(pid) for pid in pids))
    assert_conserved(server.metrics())
    assert server.engine_pid() == pids[1]
    return sizes


def test_nothing_is_left_of_many_requests(own_server: Start) -> None:
    soak(own_server(), 100, 2, 300)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_is_left_of_a_hundred_thousand(own_server: Start) -> None:
    """At the bar of P5: at most a mebibyte of further memory per ten thousand requests, by least squares."""
    # A pool that is full after the first thousands, so that what it writes down of its blocks has stopped growing.
    sizes = soak(own_server("--kv-bytes", str(500 * 8192), "--max-model-len", "512"), 10_000, 10, 10_000)
    mean_at = (len(sizes) - 1) / 2
    mean_size = sum(sizes) / len(sizes)
    over = sum((i - mean_at) * (size - mean_size) for i, size in enumerate(sizes))
    slope = over / sum((i - mean_at) ** 2 for i in range(len(sizes)))
    assert slope <= 1.0, sizes
