"""What happened in the cache: why a request missed what it missed, what the cache saved, what is where now.

    why        of one request as it came in: runs of its blocks that were not taken over, each with its reason
    Explainer  asks that once per admission, counts, and keeps the newest requests' answers

A run is ``new`` (never seen, or so long ago that nobody remembers), ``evicted`` (its shadow is there still) or
``skipped`` (resident, but ``reuse="prefix"`` stops at the first miss). All of it is O(blocks of the prompt) in lookups
by key, once when a request comes in; a step costs nothing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Final, TypeVar

import numpy as np

from tenon.engine.blocks import DIGEST_BYTES, BlockPool
from tenon.engine.messages import Miss, Misses
from tenon.engine.recompute import CostOf, alike
from tenon.engine.reuse import runs_of
from tenon.engine.sequence import Seq

MAX_REQUESTS: Final = 1024
MAX_RUNS: Final = 64
"""Of a request, so many runs are kept: those that cost the most."""
MAX_TOLD: Final = 8
"""Of these, so many are told to others."""
MAX_HITS: Final = 128
"""Runs of a request that it took over; more are drawn together over the smallest gaps."""

K = TypeVar("K")
V = TypeVar("V")
Run = tuple[int, int]
First = tuple[bytes, bytes]
"""Key and content of a context's first block."""


@dataclass
class Lookups:
    """Only ever grow; of requests as they came in for the first time. Blocks are positions' blocks, however many groups
    of layers keep one. Costs are in the unit of ``cost_of``: FLOPs in an engine, unless it was given another."""

    blocks: int = 0
    """Looked up: full blocks of prompts before the position whose logits are wanted."""
    block_hits: int = 0
    cost: float = 0.0
    """Of all prompts, as if nothing had been resident."""
    cost_saved: float = 0.0
    missed_tokens: Counter[str] = field(default_factory=Counter)
    """Of what was looked up in vain, by reason."""


def why(
    seq: Seq,
    pools: Sequence[BlockPool],
    found: Mapping[int, Sequence[int]],
    *,
    policy: str = "",
    cost_of: CostOf = alike,
    first: First | None = None,
) -> list[Miss]:
    """Runs of the blocks that were looked up and are not in ``found`` (see ``resident``), in order, a reason each.

    ``policy`` is who evicts; ``first`` another context's first block under the same root, to compare with.
    """
    size = seq.block_tokens
    runs: list[_Open] = []
    end = -1
    for i in range((seq.n_tokens - 1) // size):
        if i in found:
            continue
        kind, evicted_s, score = _reason(seq, pools, i)
        if end == i and runs[-1].kind == kind:
            run = runs[-1]
        else:
            at = _differs_at(seq, pools[0], i, found.get(i - 1), first) if kind == "new" else None
            run = _Open(i, kind, at)
            runs.append(run)
        run.end = end = i + 1
        run.cost += cost_of(i * size)
        if evicted_s is not None:
            run.times.append(evicted_s)
        if score is not None:
            run.scores.append(score)
    return [
        Miss(
            start=run.start * size,
            end=run.end * size,
            kind=run.kind,
            cost=run.cost,
            differs_at=run.differs_at,
            evicted_s=min(run.times, default=None),
            until_s=max(run.times, default=None),
            policy=policy if run.kind == "evicted" else None,
            score=min(run.scores, default=None),
        )
        for run in runs
    ]


@dataclass(slots=True)
class _Open:
    """A run of blocks [start, end) that grows."""

    start: int
    kind: str
    differs_at: int | None
    end: int = 0
    cost: float = 0.0
    times: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def _reason(seq: Seq, pools: Sequence[BlockPool], i: int) -> tuple[str, float | None, float | None]:
    """Of one block: why, when it was evicted, at which score. The first group that lacks it tells."""
    digest = seq.digest(i)
    for pool in pools:
        if not pool.knows(digest):
            shadow = pool.shadows.get(digest)
            if shadow is None:
                return "new", None, None
            victim = pool.victims.get(digest)
            return "evicted", shadow.evicted_s, None if victim is None else victim.score
    content = seq.block_content(i)
    collides = any(pool.lookup(digest, content) is None for pool in pools)
    return ("new" if collides else "skipped"), None, None


def _differs_at(seq: Seq, pool: BlockPool, i: int, before: Sequence[int] | None, first: First | None) -> int | None:
    """Position of the first token that is not that of the block which another context has in place ``i``; None where no
    such block is known to be resident. Of several that follow the block ``before`` it is the one stored last."""
    content = b""
    if i == 0 and first is not None and pool.lookup(*first) is not None:
        content = first[1]
    elif before is not None:
        entry = pool.entry(before[0])
        if entry is not None and entry.child is not None:
            content = pool.content(entry.child.block)
    size = seq.block_tokens
    other = np.frombuffer(content[DIGEST_BYTES:], np.int32)
    if len(other) != size:
        return None
    differs = np.flatnonzero(other != seq.tokens[i * size : (i + 1) * size])
    return i * size + int(differs[0]) if len(differs) else None


class Explainer:
    """The newest requests' answers to ``why``, and what they sum up to."""

    def __init__(self, policy: str, cost_of: CostOf, *, on: bool) -> None:
        """``on``: whether there is a cache; without one there is nothing to explain, but prompts still cost."""
        self.lookups = Lookups()
        self.kept: OrderedDict[str, Misses] = OrderedDict()
        """By request id, the oldest first."""
        self._hits: OrderedDict[int, list[Run]] = OrderedDict()
        self._new: deque[Misses] = deque(maxlen=MAX_REQUESTS)
        self._firsts: OrderedDict[bytes, First] = OrderedDict()
        self._policy, self._cost_of, self._on = policy, cost_of, on
        self._cost_to = [0.0]
        """Of all blocks before the one of the same index."""

    def admitted(self, seq: Seq, pools: Sequence[BlockPool], found: Mapping[int, Sequence[int]]) -> None:
        """A request comes in with these blocks taken over (see ``resident``); called before anything is evicted for it.

        One that was preempted and comes back is not counted and not explained anew.
        """
        size = seq.block_tokens
        hits = runs_of(found, size)
        _keep(self._hits, seq.id, coarse(hits, MAX_HITS))
        if seq.n_preempted:
            return
        lookups = self.lookups
        lookups.cost += self._cost(seq.n_prompt, size)
        if not self._on:
            return
        lookups.blocks += (seq.n_prompt - 1) // size
        lookups.block_hits += len(found)
        lookups.cost_saved += sum(self._cost_of(i * size) for i in found)
        request = seq.request
        first = self._firsts.get(request.root)
        runs = why(seq, pools, found, policy=self._policy, cost_of=self._cost_of, first=first)
        for run in runs:
            lookups.missed_tokens[run.kind] += run.end - run.start
        if seq.n_prompt > size:
            _keep(self._firsts, request.root, (seq.digest(0), seq.block_content(0)))
        misses = Misses(request.add.request_id, len(found) * size, holes_of(hits), len(runs), costliest(runs, MAX_RUNS))
        _keep(self.kept, request.add.request_id, misses)
        self._new.append(misses)

    def hits(self, seq: Seq) -> list[Run]:
        """Runs of positions [start, end) that it took over when it last came in, perhaps drawn together."""
        return self._hits.get(seq.id, [])

    def evicted(self, seq: Seq) -> tuple[Run, ...]:
        """Runs of positions of its prompt that had been in the cache when it first came in, the costliest."""
        misses = self.kept.get(seq.request.add.request_id)
        return () if misses is None else tuple((run.start, run.end) for run in misses.runs if run.kind == "evicted")

    def take(self) -> list[Misses]:
        """Of requests that came in since this was last called (the newest of them), with the costliest runs alone."""
        told = [
            Misses(it.request_id, it.cached_tokens, it.holes, it.n_runs, costliest(it.runs, MAX_TOLD))
            for it in self._new
        ]
        self._new.clear()
        return told

    def _cost(self, n_tokens: int, size: int) -> float:
        """Of a context of so many tokens; a part of a block costs its part."""
        n, rest = divmod(n_tokens, size)
        for i in range(len(self._cost_to) - 1, n):
            self._cost_to.append(self._cost_to[i] + self._cost_of(i * size))
        return self._cost_to[n] + (self._cost_of(n * size) * rest / size if rest else 0.0)


def holes_of(hits: Sequence[Run]) -> int:
    """Runs to compute before the last that is resident."""
    return len(hits) - (bool(hits) and hits[0][0] == 0)


def costliest(runs: Iterable[Miss], n: int) -> tuple[Miss, ...]:
    """The ``n`` of most cost, in order of position."""
    return tuple(sorted(nlargest(n, runs, key=lambda run: run.cost), key=lambda run: run.start))


def coarse(runs: Sequence[Run], n: int) -> list[Run]:
    """At most ``n`` runs: those with the least between them are drawn together."""
    gaps = sorted(range(1, len(runs)), key=lambda i: runs[i][0] - runs[i - 1][1])
    joined = set(gaps[: max(0, len(runs) - n)])
    made: list[Run] = []
    for i, (start, end) in enumerate(runs):
        made.append((made.pop()[0] if i in joined else start, end))
    return made


def _keep(kept: OrderedDict[K, V], key: K, value: V) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > MAX_REQUESTS:
        kept.popitem(last=False)
