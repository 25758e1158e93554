"""Which blocks of KV a trace's prompts consist of, at any block size, without making a token.

A block is identified by all tokens up to its end, as a prefix cache does: two prompts share a block when they are
equal from the start to the block's last token. Equality of prompts is equality of segments: contents differ from their
first token on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tenon.base.errors import ConfigError
from tenon.workloads.trace import TraceRequest

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """``id[start[i] : start[i + 1]]`` are request i's blocks from its first token on: small numbers, equal when
    shared.
    """

    block_tokens: int
    id: Ints
    start: Ints

    @property
    def distinct(self) -> int:
        return int(self.id.max()) + 1 if len(self.id) else 0

    def request_of(self) -> Ints:
        """Request of each access."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))


def identify(requests: Sequence[TraceRequest], block_tokens: int, *, partial: bool = True) -> Blocks:
    """The prompts' blocks. A last block that is not full counts with ``partial``, as in Mooncake's published hashes.

    Raises ``ConfigError`` for a block size below 1.
    """
    if block_tokens < 1:
        raise ConfigError(f"block_tokens must be at least 1, got {block_tokens}", subject="block_tokens")
    # A node is a place in the tree of segments: the whole of what precedes, and the content that follows. A block
    # inside a segment is then (node, position of its end), and a segment's blocks are a run of these.
    nodes: dict[tuple[int, int, int], int] = {}
    node_of: list[int] = []
    first_end: list[int] = []
    count: list[int] = []
    start = np.zeros(len(requests) + 1, dtype=np.int64)
    for i, request in enumerate(requests):
        node, before, at, total = 0, 0, 0, 0
        for segment in request.prompt:
            node = nodes.setdefault((node, before, segment.content), len(nodes) + 1)
            done = at // block_tokens
            at, before = at + segment.n, segment.n
            if new := at // block_tokens - done:
                node_of.append(node)
                first_end.append((done + 1) * block_tokens)
                count.append(new)
                total += new
        if partial and at % block_tokens:
            node_of.append(node)
            first_end.append(at)
            count.append(1)
            total += 1
        start[i + 1] = total
    counts = np.array(count, dtype=np.int64)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = np.repeat(np.array(first_end, dtype=np.int64), counts) + within * block_tokens
    keys = np.repeat(np.array(node_of, dtype=np.int64) << 32, counts) | ends
    _, number = np.unique(keys, return_inverse=True)
    return Blocks(block_tokens, number.astype(np.int64).reshape(-1), np.cumsum(start))
