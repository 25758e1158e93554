"""The next step when it is the one before, one position further: all that run decode, and nobody comes or goes.

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

Member = tuple[Seq, I32, frozenset[int], int, str, int, int]
"""A sequence, its tokens, what stops it, the number of tokens from which on somebody has to look closer, its request's
id, its index there, and how many tokens were found in the cache."""


def _member(seq: Seq) -> Member:
    add = seq.request.add
    last = 0 if add.n_logprobs >= 0 else seq.n_prompt + add.max_tokens
    return seq, seq.tokens, seq.request.stop_ids, last, add.request_id, seq.index, seq.request.cached_tokens


class Lane:
    """Sequences that have each computed one row, and sample from it.

    ``spans`` begin as those of the step before; ``settle`` brings them up to date, for whoever asks, which is seldom.
    """

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans
        self.seqs = [span.seq for span in spans]
        size = self.seqs[0].block_tokens
        self.start_S: I32 = np.array([span.start for span in spans], np.int32)
        self.tok_S: I32 = np.zeros(0, np.int32)
        """What was sampled last: the next step's tokens. Whoever takes over a step's result puts it here."""
        self._room_S = np.array([seq.n_blocks * size for seq in self.seqs], np.int32)
        self._size = size
        self.members = [_member(seq) for seq in self.seqs]
        """Of each sequence what taking over a token needs to know, and does not change."""

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
        """Go one position further and take the blocks for it; False, and nothing has changed, if there are too few."""
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
        return True

    def full(self) -> set[int]:
        """Whose latest row was the last of its block."""
        return set(np.flatnonzero((self.start_S + 1) % self._size == 0).tolist())

    def settle(self) -> None:
        """Tell the spans where they have come to. The lane is over."""
        for span, start in zip(self.spans, self.start_S.tolist(), strict=True):
            span.start = start
