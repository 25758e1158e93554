"""A simulation as a picture: the requests on lanes, and what the engine held and did over time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final

from tenon.engine.simulate import Simulated
from tenon.sim.timeline import Series, Slice, Timeline
from tenon.workloads.report import Outcome

LANES: Final = 64
"""Requests at the same time that are drawn; more only make the picture taller."""


def timeline(result: Simulated, title: str) -> Timeline:
    """Each answered request as its wait for the first token and its decoding; queues, blocks and steps as series."""
    at_s = [stats.now_s for stats in result.stats]
    counts = {
        "running": [stats.running for stats in result.stats],
        "waiting": [stats.waiting for stats in result.stats],
        "KV blocks held": [stats.blocks_held for stats in result.stats],
        "KV blocks cached": [stats.blocks_cached for stats in result.stats],
        "preemptions": [stats.preemptions for stats in result.stats],
    }
    steps = result.steps
    series = [Series(name, at_s, values) for name, values in counts.items()]
    series.append(Series("step time, ms", steps.end_s, [1e3 * seconds for seconds in steps.seconds]))
    series.append(Series("rows of a step", steps.end_s, steps.rows))
    return Timeline(title, tuple(_slices(result.outcomes)), tuple(series))


def _slices(outcomes: Sequence[Outcome]) -> list[Slice]:
    """Requests on the lowest lane that is free; those above the last one are left out."""
    free = list(range(LANES))
    busy: list[tuple[float, int]] = []
    slices: list[Slice] = []
    for one in sorted((o for o in outcomes if o.token_s), key=lambda o: o.intended_s):
        while busy and busy[0][0] <= one.intended_s:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            continue
        lane = heapq.heappop(free)
        heapq.heappush(busy, (one.end_s, lane))
        name, first_s = f"lane {lane + 1}", one.token_s[0]
        said = {"prompt": one.n_prompt, "cached": one.cached_tokens, "output": len(one.token_s)}
        slices.append(Slice(name, one.id, one.intended_s, first_s, "to the first token", said))
        slices.append(Slice(name, one.id, first_s, one.end_s, "decoding", said))
    return slices
