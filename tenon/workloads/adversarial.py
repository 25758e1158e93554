"""Traces made to be hard for a cache: each is one thing that real traffic does, and nothing else.

Made for replay against a cache of ``capacity`` tokens, which they are sized after. All are short and seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from tenon.base.errors import ConfigError
from tenon.workloads.trace import Segment, Trace, TraceRequest

Rng = np.random.Generator
Rows = Iterator[tuple[float, tuple[Segment, ...]]]
"""Arrival and prompt of each request."""

CONTEXT: Final = 8192
"""Tokens of a context, unless a trace is about their lengths."""
N_REQUESTS: Final = 1200


def cyclic_scan(rng: Rng, capacity: int) -> Rows:
    """The same contexts round and round, a tenth more of them than fit: LRU loses each just before it comes."""
    n = max(2, round(1.1 * capacity / CONTEXT))
    for i in range(N_REQUESTS):
        yield float(i), (Segment(1 + i % n, CONTEXT),)


def scan_pollution(rng: Rng, capacity: int) -> Rows:
    """Conversations that would fit, and every so often a scan of contexts that are never seen again."""
    n = max(1, capacity // (2 * CONTEXT))
    fresh = 10**6
    for i in range(N_REQUESTS):
        if i % 100 < 30:
            fresh += 1
            yield float(i), (Segment(fresh, CONTEXT),)
        else:
            yield float(i), (Segment(1 + int(rng.integers(n)), CONTEXT),)


def zipf(rng: Rng, capacity: int) -> Rows:
    """Documents asked about as Zipf says, four times as many as fit; each question is new."""
    n = max(4, 4 * capacity // CONTEXT)
    share = 1.0 / np.arange(1, n + 1)
    drawn = rng.choice(n, N_REQUESTS, p=share / share.sum())
    for i, document in enumerate(drawn.tolist()):
        yield float(i), (Segment(1 + document, CONTEXT), Segment(10**6 + i, 300))


def one_shot_flood(rng: Rng, capacity: int) -> Rows:
    """Nine requests of ten are never seen again; the tenth goes on with one of a few conversations."""
    n = max(1, capacity // (8 * CONTEXT))
    length = [2048] * n
    for i in range(N_REQUESTS):
        if i % 10:
            yield float(i), (Segment(10**6 + i, CONTEXT),)
        else:
            who = int(rng.integers(n))
            length[who] = length[who] + 512 if length[who] < 4 * CONTEXT else 2048
            yield float(i), (Segment(1 + who, length[who]),)


def branches(rng: Rng, capacity: int) -> Rows:
    """One long beginning, and as many ends as there are requests."""
    for i in range(N_REQUESTS):
        yield float(i), (Segment(1, max(1024, capacity // 4)), Segment(10**6 + i, 2048))


def supersession(rng: Rng, capacity: int) -> Rows:
    """Agents whose context grows and is then compacted: what was long and dear is dead from one step to the next."""
    n = max(2, capacity // (2 * CONTEXT))
    generation, length = [0] * n, [2048] * n
    for i in range(N_REQUESTS):
        who = int(rng.integers(n))
        yield float(i), (Segment(1, 1024), Segment(10 + who * 1000 + generation[who], length[who]))
        length[who] += 2048
        if length[who] > 3 * CONTEXT:
            generation[who], length[who] = generation[who] + 1, 2048


def lifespan_shift(rng: Rng, capacity: int) -> Rows:
    """Returns after about a minute, and from the middle on after ten: what was learned is wrong."""
    at_s, n_new = 0.0, 0
    waiting: list[tuple[float, int]] = []
    for i in range(N_REQUESTS):
        at_s += float(rng.exponential(0.5 * CONTEXT * 120 / capacity))
        mean_s = 60.0 if i < N_REQUESTS // 2 else 600.0
        due = [entry for entry in waiting if entry[0] <= at_s]
        if due:
            entry = min(due)
            waiting.remove(entry)
            who = entry[1]
        else:
            n_new += 1
            who = n_new
        if rng.random() < 0.8:
            waiting.append((at_s + float(rng.gamma(16.0, mean_s / 16.0)), who))
        yield at_s, (Segment(who, CONTEXT),)


def bursts(rng: Rng, capacity: int) -> Rows:
    """Everybody comes at once, thirty requests in a second, then nobody for a minute."""
    n = max(2, round(1.5 * capacity / CONTEXT))
    for i in range(N_REQUESTS):
        yield 60.0 * (i // 30) + (i % 30) / 30, (Segment(1 + int(rng.integers(n)), CONTEXT), Segment(10**6 + i, 256))


ADVERSARIES: Final[dict[str, Callable[[Rng, int], Rows]]] = {
    "cyclic-scan": cyclic_scan,
    "scan-pollution": scan_pollution,
    "zipf": zipf,
    "one-shot-flood": one_shot_flood,
    "branches": branches,
    "supersession": supersession,
    "lifespan-shift": lifespan_shift,
    "bursts": bursts,
}


def adversary(name: str, *, capacity: int, seed: int = 0) -> Trace:
    """The trace ``name`` for a cache of ``capacity`` tokens. Raises ``ConfigError`` for an unknown name or a capacity
    below two contexts."""
    if name not in ADVERSARIES:
        raise ConfigError(f"there is no adversary {name!r}; there are {', '.join(ADVERSARIES)}", subject=name)
    if capacity < 2 * CONTEXT:
        raise ConfigError(f"capacity must be at least {2 * CONTEXT} tokens, got {capacity}", subject="capacity")
    rng = np.random.default_rng([seed, list(ADVERSARIES).index(name)])
    rows = ADVERSARIES[name](rng, capacity)
    requests = [TraceRequest(f"{name}-{i}", at_s, prompt, 1) for i, (at_s, prompt) in enumerate(rows)]
    return Trace.make(name, "adversarial, made by hand", requests, seed=seed, capacity=capacity)
