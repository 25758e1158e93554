"""The next step when it is the one before, one position further: every running sequence decodes, and nobody comes or goes.

Most steps of a busy engine are of this kind. For them a :class:`Lane` takes the place of the scheduler's walk over its
sequences: it reserves the same blocks in the same order, and gives the same step. Whoever changes what runs drops it.

Shapes: S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tenon.engine.assemble import Span
from tenon.engine.blocks import BlockPool
from tenon.engine.sequence import Seq
from tenon.engine.step import I32


class Lane:
    """Sequences that have each computed one row, and sample from it. ``spans`` are those of the latest step."""

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans
        self.seqs = [span.seq for span in spans]
        size = self.seqs[0].block_tokens
        self.start_S: I32 = np.array([span.start for span in spans], np.int32)
        self.tok_S: I32 = np.zeros(0, np.int32)
        """What was sampled last: the next step's tokens. Whoever takes over a step's result puts it here."""
        self._room_S = np.array([seq.n_blocks * size for seq in self.seqs], np.int32)
        self._size = size

    @staticmethod
    def open(spans: list[Span], n_running: int) -> Lane | None:
        """The lane that ``spans`` begin, or None: all that run must decode, in blocks of their own."""
        if len(spans) != n_running:
            return None
        for span in spans:
            seq = span.seq
            if span.n != 1 or seq.may_share or len(span.targets) != 1 or not seq.is_decoding:
                return None
        return Lane(spans)

    def reserve(self, pools: Sequence[BlockPool]) -> bool:
        """Go one position further and take the blocks for it; False, and nothing has changed, where they are not there."""
        start_S = self.start_S + 1
        full = np.flatnonzero(start_S == self._room_S).tolist()
        if full:
            if min(pool.n_available for pool in pools) < len(full):
                return False
            for i in full:
                seq = self.seqs[i]
                for pool, table in zip(pools, seq.tables, strict=True):
                    table[seq.n_blocks] = pool.take()
                seq.n_blocks += 1
            self._room_S[full] += self._size
        self.start_S = start_S
        for span in self.spans:
            span.start += 1
        return True
