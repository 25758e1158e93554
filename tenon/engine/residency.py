"""What is where in the cache, for a person to look at: a strip per running sequence, and the pools' fill."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Final

import numpy as np

from tenon.engine.messages import Residency, Row
from tenon.engine.scheduler import Scheduler
from tenon.engine.sequence import Seq

MAX_ROWS: Final = 64
MAX_CELLS: Final = 128
AGES_S: Final = (1.0, 10.0, 60.0, 600.0, 3600.0)
TURNS: Final = (1, 2, 3, 7)
KINDS: Final = np.frombuffer(b"rcth", np.uint8)
REUSED, COMPUTED, TAIL, HOLE = range(len(KINDS))


def residency(scheduler: Scheduler, now_s: float) -> Residency:
    """O(blocks that are published, and those of the sequences shown): for once a second, not for every step."""
    ages, turns = [0] * (len(AGES_S) + 1), [0] * (len(TURNS) + 1)
    for pool in scheduler.pools:
        for entry in pool.entries:
            if pool.ref[entry.block] == 0:
                ages[bisect_right(AGES_S, now_s - entry.last_s)] += 1
                turns[bisect_left(TURNS, entry.turn)] += 1
    held = sum(pool.n_held for pool in scheduler.pools)
    rows = [
        Row(seq.request.add.request_id, seq.index, seq.n_tokens, cells(seq, scheduler.explain.hits(seq)))
        for seq in scheduler.running[:MAX_ROWS]
    ]
    return Residency(
        now_s=now_s,
        running=len(scheduler.running),
        rows=tuple(rows),
        free=sum(pool.n_available - pool.n_idle for pool in scheduler.pools),
        held=held,
        ages_s=AGES_S,
        idle_by_age=tuple(ages),
        turns=TURNS,
        idle_by_turn=tuple(turns),
    )


def cells(seq: Seq, hits: Sequence[tuple[int, int]]) -> str:
    """A running sequence's ``Row.cells``; ``hits`` are runs of positions that it took over."""
    size = seq.block_tokens
    n_blocks = -(-seq.n_tokens // size)
    kinds = np.full(n_blocks, TAIL, np.uint8)
    if seq.ahead:
        kinds[: seq.ahead[-1][1] // size] = HOLE
    n_done = n_blocks if seq.is_decoding else seq.n_computed // size  # the newest token is not counted as a lack
    kinds[:n_done] = COMPUTED
    for start, end in seq.ahead:
        kinds[start // size : end // size] = COMPUTED
    for start, end in hits:
        here = kinds[start // size : end // size]
        here[here == COMPUTED] = REUSED
    starts = np.unique(np.arange(min(n_blocks, MAX_CELLS)) * n_blocks // min(n_blocks, MAX_CELLS))
    return KINDS[np.maximum.reduceat(kinds, starts)].tobytes().decode()
