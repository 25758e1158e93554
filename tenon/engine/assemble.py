"""Spans of sequences to the arrays of a ``Step``. Vectorised: the cost per span is a microsecond.

Shapes: T rows, S spans, R outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tenon.engine.sequence import Seq
from tenon.engine.step import I32, SAMPLE, GroupStep, Params, Step


@dataclass(eq=False, slots=True)
class Span:
    """A run of one sequence's rows to compute in this step: positions [start, start + n)."""

    seq: Seq
    start: int
    n: int
    targets: list[Seq]
    """Whose next token the last row gives: the sequence's, all siblings' where their prompt ends here, or nobody's."""


NO_MOVES = np.zeros((0, 2), np.int32)


class _Tables:
    """Of each group and sequence the blocks that a step reads, as views: few are longer than in the step before."""

    def __init__(self, seqs: list[Seq]) -> None:
        self._seqs = seqs
        self._n_table = np.full(len(seqs), -1, np.int32)
        self.parts: list[list[I32]] = [list(seq_tables) for seq_tables in zip(*(s.tables for s in seqs), strict=True)]

    def cut(self, n_table: I32, *, same: bool = False) -> None:
        """Each sequence's tables to its first ``n_table`` blocks. ``same``: none of those that were cut before has been
        replaced since."""
        longer = np.flatnonzero(n_table != self._n_table).tolist()
        if same and not longer:
            return
        lengths = n_table.tolist()
        for i in longer:
            for part, table in zip(self.parts, self._seqs[i].tables, strict=True):
                part[i] = table[: lengths[i]]
        self._n_table = n_table
        self.start = _starts(n_table)
        self.flat: list[I32] = [np.concatenate(part) for part in self.parts]


class _Frame:
    """What of a step follows from whose rows there are, how many, and who samples; mostly the next has the same."""

    def __init__(self, seqs: list[Seq], counts: list[int], targets: list[list[Seq]]) -> None:
        self.seqs, self.counts, self.targets = seqs, counts, targets
        self.tables = _Tables(seqs)
        self.seq = np.array([seq.id for seq in seqs], np.int64)
        self.count = np.array(counts, np.int32)
        self.q_start = _starts(self.count)
        T, S = int(self.q_start[-1]), len(seqs)
        self.row_span = np.repeat(np.arange(S), self.count)
        self.row_offset = np.arange(T, dtype=np.int32) - self.q_start[:-1][self.row_span]
        self.parent = np.full(T, -1, np.int32)
        self.bucket_T, self.bucket_S = _bucket(T), _bucket(S)

        sampling = [seq for each in targets for seq in each]
        R = len(sampling)
        self.out_span = np.repeat(np.arange(S), [len(each) for each in targets])
        self.out_row = (self.q_start[1:] - 1)[self.out_span]
        self.out_seq = np.array([seq.id for seq in sampling], np.int64)
        self.n_prompt = np.array([seq.n_prompt for seq in sampling], np.int32)
        self.want = np.full(R, SAMPLE, np.uint8)
        self.params_index = np.arange(R, dtype=np.int32)
        self.bitmask_index = np.full(R, -1, np.int32)
        self.no_starts = np.zeros(R + 1, np.int32)
        adds = [seq.request.add for seq in sampling]
        self.params = Params(
            temperature=np.array([a.temperature for a in adds], np.float32),
            top_k=np.array([max(a.top_k, 0) for a in adds], np.int32),
            top_p=np.array([a.top_p for a in adds], np.float32),
            min_p=np.array([a.min_p for a in adds], np.float32),
            seed=np.array([a.seed % 2**64 for a in adds], np.uint64),
            sample=np.array([seq.index for seq in sampling], np.int32),
            n_logprobs=np.array([a.n_logprobs for a in adds], np.int32),
        )

    def fits(self, seqs: list[Seq], counts: list[int], targets: list[list[Seq]]) -> bool:
        return counts == self.counts and seqs == self.seqs and targets == self.targets


class Assembler:
    """Makes the steps of one model. A step shares with the next the arrays that stay the same: nobody writes them."""

    def __init__(self, model: str, n_groups: int) -> None:
        self._model, self._n_groups = model, n_groups
        self._frame = _Frame([], [], [])

    def step(self, step_id: int, weights_version: int, spans: list[Span], moves: list[tuple[int, int, int]]) -> Step:
        """The step that computes ``spans``. ``moves`` are (group, source slot, target slot)."""
        seqs = [span.seq for span in spans]
        who = seqs, [span.n for span in spans], [span.targets for span in spans]
        if not self._frame.fits(*who):
            self._frame = _Frame(*who)
        frame = self._frame
        size = seqs[0].block_tokens
        start = np.array([span.start for span in spans], np.int32)
        end = start + frame.count
        if len(frame.parent) == len(spans):  # decoding: a row a span
            pos = start
            tok = np.array([span.seq.tokens.item(span.start) for span in spans], np.int32)
        else:
            pos = start[frame.row_span] + frame.row_offset
            tok = np.concatenate([span.seq.tokens[span.start : span.start + span.n] for span in spans])

        frame.tables.cut(-(-end // size))
        step_moves = [
            np.array([(a, b) for g, a, b in moves if g == group], np.int32).reshape(-1, 2)
            for group in range(self._n_groups)
        ]
        return self._fill(step_id, weights_version, tok, pos, end, step_moves)

    def further(self, step_id: int, weights_version: int, tok_S: I32, pos_S: I32) -> Step:
        """The step that follows the one that was made last: its spans, each one row long, a position further."""
        tables, end = self._frame.tables, pos_S + 1
        tables.cut(-(-end // self._frame.seqs[0].block_tokens), same=True)
        return self._fill(step_id, weights_version, tok_S, pos_S, end, [NO_MOVES] * self._n_groups)

    def _fill(self, step_id: int, weights_version: int, tok: I32, pos: I32, end: I32, moves: list[I32]) -> Step:
        """The step of the frame's rows. ``end`` (S,): where each span ends."""
        frame = self._frame
        size = frame.seqs[0].block_tokens
        table_start = frame.tables.start
        block, offset = np.divmod(pos, size)
        block += table_start[frame.row_span]
        groups = tuple(
            GroupStep(table[block] * size + offset, table_start, table, group_moves)
            for table, group_moves in zip(frame.tables.flat, moves, strict=True)
        )
        return Step(
            id=step_id,
            model=self._model,
            weights_version=weights_version,
            bucket_T=frame.bucket_T,
            bucket_S=frame.bucket_S,
            n_steps=1,
            seq=frame.seq,
            q_start=frame.q_start,
            tok=tok,
            pos=pos,
            parent=frame.parent,
            groups=groups,
            out_row=frame.out_row,
            out_seq=frame.out_seq,
            # Whoever samples has all its tokens in this step, so its outputs end where its rows do.
            out_position=end[frame.out_span] - frame.n_prompt,
            want=frame.want,
            params_index=frame.params_index,
            bitmask_index=frame.bitmask_index,
            params=frame.params,
            bitmask=np.zeros((0, 0), np.uint32),
            edit_start=frame.no_starts,
            edit_token=np.zeros(0, np.int32),
            edit_kind=np.zeros(0, np.uint8),
            edit_value=np.zeros(0, np.float32),
            score_start=frame.no_starts,
            score_token=np.zeros(0, np.int32),
        )


def _starts(counts: I32) -> I32:
    """(n + 1,) where each run begins, and at last where all end."""
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def _bucket(n: int) -> int:
    """The next power of two: few sizes, so that what is compiled per size is compiled seldom."""
    return 1 << max(n - 1, 0).bit_length()
