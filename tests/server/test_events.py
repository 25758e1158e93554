"""What the event stream and the metrics say about the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec

from tests.server.conftest import PATIENCE_S, Running

Event = dict[str, Any]


@contextmanager
def watching(server: Running, query: str = "") -> Iterator[Iterator[Event]]:
    """Events as they come, from the present state on."""
    with httpx.stream("GET", f"{server.url}/events{query}", timeout=PATIENCE_S) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        next(lines)
        yield (msgspec.json.decode(line[6:]) for line in lines if line.startswith("data: "))


def until(events: Iterator[Event], kind: str) -> Event:
    return next(event for event in events if event["kind"] == kind)


def prompt(first: int, n: int = 100) -> list[int]:
    return [first, *[(7 * i + first) % 250 for i in range(n - 1)]]


def test_a_request_says_what_it_missed_and_where_it_parted(server: Running) -> None:
    server.complete(prompt=prompt(11), max_tokens=1)
    with watching(server) as events:
        server.complete(prompt=[*prompt(11)[:50], 3, *prompt(11)[51:]], max_tokens=1)
        first, finished = until(events, "first"), until(events, "finished")
    assert first["cache"] == finished["cache"]
    (miss,) = finished["cache"].pop("misses")
    assert finished["cache"] == {"cached_tokens": 48, "holes": 0, "n_misses": 1}
    assert (miss["kind"], miss["start"], miss["end"], miss["differs_at"]) == ("new", 48, 96, 50)
    assert miss["cost"] > 0
    assert "evicted_s" not in miss


def test_metrics_count_by_block_token_and_flop(server: Running) -> None:
    server.complete(prompt=prompt(12), max_tokens=1)
    before = server.metrics()
    server.complete(prompt=prompt(12), max_tokens=1)
    after = server.metrics()
    grown = {name: after[name] - before[name] for name in after if name.startswith(("tenon_prefix", "tenon_prompt"))}
    assert grown["tenon_prefix_query_tokens_total"] == 100
    assert grown["tenon_prefix_hit_tokens_total"] == 96
    assert grown['tenon_prefix_miss_tokens_total{reason="new"}'] == 0
    assert grown["tenon_prefix_query_blocks_total"] == grown["tenon_prefix_hit_blocks_total"] == 6
    assert 0.9 < grown["tenon_prompt_flops_saved_total"] / grown["tenon_prompt_flops_total"] < 1
    assert grown["tenon_prompt_holes_total"] == 0
