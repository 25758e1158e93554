"""What the event stream and the metrics say about the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest

from tests.server.conftest import PATIENCE_S, Running

Event = dict[str, Any]


@contextmanager
def watching(server: Running, query: str = "", headers: dict[str, str] | None = None) -> Iterator[Iterator[Event]]:
    """Events as they come, from the present state on."""
    with httpx.stream("GET", f"{server.url}/events{query}", headers=headers, timeout=PATIENCE_S) as response:
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


def mirrored(seen: set[tuple[int, str]], event: Event) -> set[tuple[int, str]]:
    for it in event["events"]:
        if it["kind"] == "cleared":
            seen = {where for where in seen if where[0] != it["group"]}
        elif it["kind"] == "stored":
            seen.add((it["group"], it["digest"]))
        else:
            seen.discard((it["group"], it["digest"]))
    return seen


def test_kv_events_begin_with_what_is_resident(server: Running) -> None:
    server.complete(prompt=prompt(13), max_tokens=1)
    with watching(server, "?kv=1") as events:
        begun = until(events, "kv")
        assert (begun["events"][0]["kind"], begun["events"][0]["reason"]) == ("cleared", "resident")
        before = mirrored(set(), begun)
        server.complete(prompt=prompt(14), max_tokens=1)
        after = mirrored(set(before), until(events, "kv"))
    assert before < after
    with watching(server, "?kv=1") as events:
        assert mirrored(set(), until(events, "kv")) == after


def test_each_who_comes_later_begins_there_too_and_the_first_reads_on(server: Running) -> None:
    with watching(server, "?kv=1") as first:
        seen = mirrored(set(), until(first, "kv"))
        with watching(server, "?kv=1") as second:
            assert mirrored(set(), until(second, "kv")) == seen
            assert mirrored(set(seen), until(first, "kv")) == seen


def test_who_asks_for_nothing_gets_no_extras(server: Running) -> None:
    with watching(server) as plain, watching(server, "?kv=1&residency=1&trees=1") as asked:
        server.complete(prompt=prompt(15), max_tokens=1)
        assert until(asked, "kv")["dropped"] == 0
        kinds = set()
        while "finished" not in kinds:
            kinds.add(next(plain)["kind"])
    assert not kinds & {"kv", "residency"}


def test_residency_shows_strips_of_those_that_run(server: Running) -> None:
    server.complete(prompt=prompt(16), max_tokens=1)
    with watching(server, "?residency=1") as events:
        stream = server.stream(prompt=prompt(16), max_tokens=30_000)
        next(stream.events())
        busy = next(event for event in events if event["kind"] == "residency" and event["rows"])
        stream.close()
        rest = next(event for event in events if event["kind"] == "residency" and not event["rows"])
    (row,) = busy["rows"]
    assert row["cells"][0] == "r"  # of a long context a cell shows several blocks, so how many depends on the moment
    assert row["cells"].lstrip("r")[0] == "c"
    assert len(row["cells"]) <= 128
    for it in (busy, rest):
        assert sum(it["idle_by_age"]) == sum(it["idle_by_turn"])
        assert it["free"] + it["held"] + sum(it["idle_by_age"]) == server.metrics()["tenon_kv_blocks"]
    assert rest["at_s"] - busy["at_s"] > 0.9
    assert rest["held"] == 0


@pytest.mark.parametrize("query", ["?kv=2", "?all=1"])
def test_extras_that_do_not_exist_are_refused(server: Running, query: str) -> None:
    refused = httpx.get(f"{server.url}/events{query}", timeout=PATIENCE_S)
    assert refused.status_code == 400
    assert "kv, residency, trees, victims" in refused.json()["error"]["message"]


@pytest.mark.parametrize("victims", [False, True])
def test_scores_of_the_evicted_are_known_while_somebody_asks(own_server: Callable[..., Running], victims: bool) -> None:
    server = own_server("--kv-bytes", str(9 * 16 * 2 * 2 * 2 * 16 * 4))  # eight blocks and the null block
    with watching(server, f"?kv={int(victims)}&victims={int(victims)}") as events:
        if victims:
            until(events, "kv")  # now the engine has heard of it
        for first in (21, 22, 21):
            server.complete(prompt=prompt(first), max_tokens=1)
            cache = until(events, "finished")["cache"]
    (miss,) = cache["misses"]
    assert (miss["kind"], miss["policy"], "score" in miss) == ("evicted", "lru", victims)
    assert miss["evicted_s"] <= miss["until_s"]
    assert server.metrics()["tenon_kv_evictions_total"] > 0
    assert server.metrics()['tenon_prefix_miss_tokens_total{reason="evicted"}'] == miss["end"] - miss["start"]
    assert server.metrics()["tenon_kv_events_dropped_total"] == 0
