"""The next step when it is the one before, one position further: all that run decode, and nobody comes or goes.

Most steps of a busy engine are of this kind. For them a :class:`Lane` takes the place of the scheduler's walk over its
sequences: it reserves the same blocks in the same order, and gives the same step. Whoever changes what runs drops it.

Shapes: S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np

from tenon.engine.assemble import Span
from tenon.engine.blocks import BlockPool
from tenon.engine.messages import Delta
from tenon.engine.step import I32


class Lane:
    """Sequences that have each computed one row, and sample from it.

    ``spans`` begin as those of the step before; ``settle`` brings them up to date, for whoever asks, which is seldom.
    """

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans
        self.seqs = seqs = [span.seq for span in spans]
        self._size = size = seqs[0].block_tokens
        starts = [span.start for span in spans]
        self.start_S: I32 = np.array(starts, np.int32)
        self.tok_S: I32 = np.zeros(0, np.int32)
        """What was sampled last: the next step's tokens. Whoever takes over a step's result puts it here."""
        self._n_further = 0
        self._phases: list[list[int]] = [[] for _ in range(size)]
        """Rows by their first position modulo the size of a block."""
        for row, start in enumerate(starts):
            self._phases[start % size].append(row)
        requests = [seq.request for seq in seqs]
        adds = [request.add for request in requests]
        self._names = [add.request_id for add in adds], [seq.index for seq in seqs]
        self._cached_tokens = [request.cached_tokens for request in requests]
        self._last = [
            0 if add.n_logprobs >= 0 else seq.n_prompt + add.max_tokens for seq, add in zip(seqs, adds, strict=True)
        ]
        """The number of tokens from which on somebody has to look closer."""
        self._n_plain = min(last - start for last, start in zip(self._last, starts, strict=True)) - 2
        """Steps before any sequence comes to its last token."""
        self._stops = [request.stop_ids for request in requests]
        self._any_stops = frozenset().union(*self._stops)

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
        crossed, size = self._phases[-(self._n_further + 1) % self._size], self._size
        # All but always each of them needs a block; a pinned sequence has them in advance.
        short = [seq for i in crossed if (seq := self.seqs[i]).n_blocks * size == start_S.item(i)]
        if short:
            if min(pool.n_available for pool in pools) < len(short):
                return False
            for seq in short:
                for pool, table in zip(pools, seq.tables, strict=True):
                    table[seq.n_blocks] = pool.take()
                seq.n_blocks += 1
        self.start_S = start_S
        self._n_further += 1
        return True

    @property
    def further(self) -> bool:
        """Whether this is not its first step."""
        return self._n_further > 0

    @property
    def rows(self) -> tuple[I32, I32, list[int]]:
        """(S,) tokens and (S,) positions of the step that was reserved; which rows, in order, are the first of their
        blocks."""
        return self.tok_S, self.start_S, self._phases[-self._n_further % self._size]

    @property
    def full(self) -> list[int]:
        """Rows that are the last of their blocks, in order."""
        return self._phases[-(self._n_further + 1) % self._size]

    def deltas(self, ids: list[int]) -> list[Delta]:
        """What each sequence gained by a token that ends nothing, without log-probabilities."""
        nothing = repeat(None), repeat(None), repeat(()), repeat(())
        return list(map(Delta, *self._names, zip(ids, strict=True), *nothing, self._cached_tokens))

    def to_look_at(self, ids: list[int]) -> list[int]:
        """Rows whose sequences may end with the token sampled from them, or whose log-probabilities are wanted."""
        rows: list[int] = []
        if self._n_further >= self._n_plain:
            rows = [i for i, seq in enumerate(self.seqs) if seq.n_tokens + 1 >= self._last[i]]
        if not self._any_stops.isdisjoint(ids):
            rows += [i for i, (token, stops) in enumerate(zip(ids, self._stops, strict=True)) if token in stops]
        return rows

    def settle(self) -> None:
        """Tell the spans where they have come to. The lane is over."""
        for span, start in zip(self.spans, self.start_S.tolist(), strict=True):
            span.start = start
