"""What of a context is resident already: every block by its own key, beyond holes too (AsymCache, arXiv 2606.02964).

A key is chained over all tokens before its block, so it stands for them whether they are resident or not: a block that
is found is right wherever it is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tenon.engine.blocks import BlockPool
from tenon.engine.pending import Pending
from tenon.engine.sequence import Seq


def resident(
    seq: Seq, pools: Sequence[BlockPool], pending: Pending, *, gaps: bool
) -> tuple[dict[int, list[int]], dict[int, Seq]]:
    """By position block, in order, the blocks of each group where all groups have one; and who computes those that are
    missing but pending. Without ``gaps`` up to the first that is neither. The position whose logits are wanted counts
    as not resident. Nothing is held for the caller yet."""
    found: dict[int, list[int]] = {}
    awaited: dict[int, Seq] = {}
    for i in range((seq.n_tokens - 1) // seq.block_tokens):
        digest = seq.digest(i)
        if all(pool.knows(digest) for pool in pools):
            content = seq.block_content(i)
            hits = [hit for pool in pools if (hit := pool.lookup(digest, content)) is not None]
            if len(hits) == len(pools):
                found[i] = hits
                continue
        owner = pending.owner(seq, i)
        if owner is not None:
            awaited[i] = owner
        elif not gaps:
            break
    return found, awaited


def hold(
    seq: Seq, pools: Sequence[BlockPool], cached: dict[int, list[int]], awaited: dict[int, Seq], n_blocks: int
) -> None:
    """``n_blocks`` blocks of each group for the sequence: those that ``resident`` found, the rest of its own. All that
    was found is held before anything is taken: taking evicts."""
    for group, (pool, table) in enumerate(zip(pools, seq.tables, strict=True)):
        for i, blocks in cached.items():
            pool.take_over(blocks[group], seq.turn)
            table[i] = blocks[group]
        for i, owner in awaited.items():
            table[i] = owner.tables[group][i]
            pool.share(int(table[i]))
        for i in range(n_blocks):
            if i not in cached and i not in awaited:
                table[i] = pool.take()
    seq.n_blocks = n_blocks


def runs_of(blocks: Iterable[int], block_tokens: int) -> list[tuple[int, int]]:
    """Position blocks, in order, as runs of positions [start, end)."""
    runs: list[tuple[int, int]] = []
    for i in blocks:
        start, end = i * block_tokens, (i + 1) * block_tokens
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, end))
    return runs


def turn_of(found: dict[int, list[int]], pool: BlockPool) -> int:
    """Which turn of a conversation the context is whose resident blocks were found: one more than that of the context
    it continues, or 1. It continues one if it has most of it in common, not a common beginning alone."""
    if not found:
        return 1
    deepest = next(reversed(found))
    entry = pool.entry(found[deepest][0])
    if entry is None or 2 * (deepest + 1) * pool.block_tokens < entry.length:
        return 1
    return entry.turn + 1
