"""A cache alone: a trace's requests against a block pool, without an engine around it.

Each request looks its prompt's blocks up when it arrives, holds what it finds, computes and publishes what it does not,
adds its answer's, and lets go, the last block first, all at that instant. The pool and its policies are those that
serve. What it says of time to first token is nothing; what it says of saved work, at many capacities quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from tenon.engine.blocks import BlockPool
from tenon.engine.policies.evict import Evict
from tenon.engine.recompute import CostOf
from tenon.engine.reuse import runs_of, turn_of
from tenon.workloads.blocks import identify
from tenon.workloads.trace import Segment, Trace


@dataclass(frozen=True)
class Visit:
    """A request as the cache sees it: keys of its full blocks, those of its prompt first."""

    arrival_s: float
    keys: tuple[bytes, ...]
    n_prompt: int
    """Of the keys, those looked up; the position whose logits are wanted is never taken over."""
    length: int


def visits(trace: Trace, block_tokens: int) -> list[Visit]:
    """What a trace asks of a cache of such blocks. Raises ``ConfigError`` for a block size below 1."""
    whole = [
        msgspec.structs.replace(r, prompt=(*r.prompt, Segment(r.output, r.n_output))) if r.output else r
        for r in trace.requests
    ]
    blocks = identify(whole, block_tokens, partial=False)
    key_of: dict[int, bytes] = {}
    made = []
    for request, all_of_it, start, end in zip(trace.requests, whole, blocks.start, blocks.start[1:], strict=False):
        ids = blocks.id[start:end].tolist()
        keys = tuple(key_of.setdefault(i, i.to_bytes(8, "little")) for i in ids)
        n_prompt = min((request.n_prompt - 1) // block_tokens, len(keys))
        made.append(Visit(request.arrival_s, keys, n_prompt, all_of_it.n_prompt))
    return made


@dataclass(slots=True)
class Tally:
    """What came of it, the warm-up aside."""

    requests: int = 0
    looked_up: int = 0
    """Blocks."""
    found: int = 0
    cost: float = 0.0
    """Of computing all that was looked up."""
    saved: float = 0.0
    holes: int = 0
    """Runs that were computed although what comes after them was found."""
    evictions: int = 0

    @property
    def hit_ratio(self) -> float:
        return self.found / max(1, self.looked_up)

    @property
    def saved_ratio(self) -> float:
        """Share of the prompts' work that was not done."""
        return self.saved / max(self.cost, 1e-30)


def replay(
    asked: Sequence[Visit],
    n_blocks: int,
    block_tokens: int,
    make_evict: Callable[[], Evict],
    cost_of: CostOf,
    *,
    gaps: bool = True,
    warm: int = 0,
) -> Tally:
    """Serve ``asked`` from a pool of ``n_blocks``; the first ``warm`` count for nothing. ``gaps``: whether what comes
    after a hole is taken over. A request that is larger than the pool is computed without it."""
    pool = BlockPool(n_blocks + 1, block_tokens, make_evict, cost_of)
    tally = Tally()
    for number, visit in enumerate(asked):
        pool.now_s = visit.arrival_s
        keys, n_prompt = visit.keys, visit.n_prompt
        found: dict[int, list[int]] = {}
        if len(keys) <= n_blocks:
            for i in range(n_prompt):
                block = pool.lookup(keys[i], b"")
                if block is not None:
                    found[i] = [block]
                elif not gaps:
                    break
            _hold(pool, visit, found)
        if number < warm:
            continue
        tally.requests += 1
        tally.looked_up += n_prompt
        tally.found += len(found)
        for i in range(n_prompt):
            tally.cost += cost_of(i * block_tokens)
        for i in found:
            tally.saved += cost_of(i * block_tokens)
        runs = runs_of(found, 1)
        tally.holes += len(runs) - (bool(runs) and runs[0][0] == 0)
    tally.evictions = pool.n_stored - len(pool.entries)
    return tally


def _hold(pool: BlockPool, visit: Visit, found: dict[int, list[int]]) -> None:
    """Hold what was found, compute the rest, let go."""
    keys, turn = visit.keys, turn_of(found, pool)
    held = []
    for blocks in found.values():
        pool.take_over(blocks[0], turn)
    for i in range(len(keys)):
        held.append(found[i][0] if i in found else pool.take())
    parent = b""
    for i, (key, block) in enumerate(zip(keys, held, strict=True)):
        if i not in found:
            pool.publish(block, key, b"", i * pool.block_tokens, parent, turn)
        parent = key
    for block in reversed(held):
        pool.release(block, visit.length)
