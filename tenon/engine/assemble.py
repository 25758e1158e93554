"""Spans of sequences to the arrays of a ``Step``. Vectorised: the cost per span is a microsecond.

Shapes: T rows, S spans, R outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tenon.base.errors import IntegrityError
from tenon.engine.edits import NO_KINDS, NO_TOKENS, NO_VALUES
from tenon.engine.grammar import Masks
from tenon.engine.sequence import Seq
from tenon.engine.step import F32, I32, I64, SAMPLE, U8, U32, GroupStep, Params, Step


@dataclass(eq=False, slots=True)
class Span:
    """A run of one sequence's rows to compute in this step: positions [start, start + n)."""

    seq: Seq
    start: int
    n: int
    targets: list[Seq]
    """Whose next token the last row gives: the sequence's, all siblings' where their prompt ends here, or nobody's."""


NO_MOVES = np.zeros((0, 2), np.int32)
NO_TRANSFERS = np.zeros((0, 3), np.int64)
NO_BITMASK = np.zeros((0, 0), np.uint32)


class _Tables:
    """Of each group and sequence the blocks that a step reads, one after the other."""

    def __init__(self, seqs: list[Seq]) -> None:
        self._seqs = seqs
        self._shifts: dict[tuple[int, ...], I32] = {}

    def cut(self, n_table: I32) -> None:
        """Each sequence's tables to its first ``n_table`` blocks."""
        self.start = _starts(n_table)
        self._lengths: list[int] = n_table.tolist()
        self.flat: list[I32] = [
            np.concatenate([table[:n] for table, n in zip(tables, self._lengths, strict=True)])
            for tables in zip(*(seq.tables for seq in self._seqs), strict=True)
        ]

    def grow(self, rows: list[int]) -> list[list[int]]:
        """A block more of these sequences, in order: none of those that were cut before has been replaced since.
        Returns each group's new blocks."""
        ends = [self.start.item(i + 1) for i in rows]
        self.start = self.start + self._shift(rows)
        lengths = self._lengths
        grown: list[list[int]] = []
        for group, flat in enumerate(self.flat):
            pieces: list[I32] = []
            blocks: list[int] = []
            at = 0
            for i, end in zip(rows, ends, strict=True):
                table, n = self._seqs[i].tables[group], lengths[i]
                pieces += (flat[at:end], table[n : n + 1])
                blocks.append(table.item(n))
                at = end
            self.flat[group] = np.concatenate((*pieces, flat[at:]))
            grown.append(blocks)
        for i in rows:
            lengths[i] += 1
        return grown

    def _shift(self, rows: list[int]) -> I32:
        """(S+1,) how much further each sequence's blocks begin. It comes again whenever these rows have filled a
        block."""
        shift = self._shifts.get(tuple(rows))
        if shift is None:
            shift = self._shifts[tuple(rows)] = np.zeros_like(self.start)
            for i in rows:
                shift[i + 1 :] += 1
        return shift


class _Known:
    """What a step says of a sequence and what never changes of it, a row each: steps pick theirs."""

    N_ROWS = 512

    def __init__(self) -> None:
        self._row_of: dict[int, int] = {}
        self._make(self.N_ROWS)

    def _make(self, n_rows: int) -> None:
        self._row_of.clear()
        self._n_rows = n_rows
        self.seq = np.zeros(n_rows, np.int64)
        self.n_prompt = np.zeros(n_rows, np.int32)
        self.params = Params(
            temperature=np.zeros(n_rows, np.float32),
            top_k=np.zeros(n_rows, np.int32),
            top_p=np.zeros(n_rows, np.float32),
            min_p=np.zeros(n_rows, np.float32),
            seed=np.zeros(n_rows, np.uint64),
            sample=np.zeros(n_rows, np.int32),
            n_logprobs=np.zeros(n_rows, np.int32),
        )

    def rows(self, seqs: list[Seq]) -> I64:
        """Theirs; valid until the next call."""
        row_of = self._row_of
        new = {seq.id: seq for seq in seqs if seq.id not in row_of}  # a sequence with holes stands there several times
        if len(row_of) + len(new) > self._n_rows:  # most of those that are known have left
            self._make(max(self._n_rows, 2 * len(seqs)))
            new = {seq.id: seq for seq in seqs}
        for seq in new.values():
            self._add(seq)
        return np.array([row_of[seq.id] for seq in seqs], np.int64)

    def _add(self, seq: Seq) -> None:
        row = self._row_of[seq.id] = len(self._row_of)
        add, params = seq.request.add, self.params
        self.seq[row], self.n_prompt[row] = seq.id, seq.n_prompt
        params.temperature[row], params.top_k[row] = add.temperature, max(add.top_k, 0)
        params.top_p[row], params.min_p[row] = add.top_p, add.min_p
        params.seed[row], params.sample[row] = add.seed % 2**64, seq.index
        params.n_logprobs[row] = add.n_logprobs


class _Frame:
    """What of a step follows from whose rows there are, how many, and who samples; mostly the next has the same."""

    def __init__(self, seqs: list[Seq], counts: list[int], targets: list[list[Seq]], known: _Known) -> None:
        self.seqs, self.counts, self.targets = seqs, counts, targets
        self.tables = _Tables(seqs)
        rows = known.rows(seqs)  # first: it may make the arrays anew
        self.seq = known.seq[rows]
        self.count = np.array(counts, np.int32)
        self.q_start = _starts(self.count)
        T, S = int(self.q_start[-1]), len(seqs)
        self.row_span = np.repeat(np.arange(S), self.count)
        self.row_offset = np.arange(T, dtype=np.int32) - self.q_start[:-1][self.row_span]
        self.parent = np.full(T, -1, np.int32)
        self.bucket_T, self.bucket_S = _bucket(T), _bucket(S)

        outputs = [seq for each in targets for seq in each]
        self.edited = [(r, seq, seq.edits) for r, seq in enumerate(outputs) if seq.edits is not None]
        rows = known.rows(outputs)
        R = len(rows)
        self.out_span = np.repeat(np.arange(S), [len(each) for each in targets])
        self.out_row = (self.q_start[1:] - 1)[self.out_span]
        self.out_seq, self.n_prompt = known.seq[rows], known.n_prompt[rows]
        self.bound = [(r, seq) for r, seq in enumerate(outputs) if seq.binding is not None]
        self.want = np.full(R, SAMPLE, np.uint8)
        self.params_index = np.arange(R, dtype=np.int32)
        self.bitmask_index = np.full(R, -1, np.int32)
        self.bitmask_index[[r for r, _ in self.bound]] = np.arange(len(self.bound))
        self.no_starts = np.zeros(R + 1, np.int32)
        all_of = known.params
        self.params = Params(
            temperature=all_of.temperature[rows],
            top_k=all_of.top_k[rows],
            top_p=all_of.top_p[rows],
            min_p=all_of.min_p[rows],
            seed=all_of.seed[rows],
            sample=all_of.sample[rows],
            n_logprobs=all_of.n_logprobs[rows],
        )

    def fits(self, seqs: list[Seq], counts: list[int], targets: list[list[Seq]]) -> bool:
        return counts == self.counts and seqs == self.seqs and targets == self.targets


class Assembler:
    """Makes the steps of one model. A step shares with the next the arrays that stay the same: nobody writes them."""

    def __init__(self, model: str, n_groups: int, masks: Masks | None = None) -> None:
        self._model, self._n_groups, self._masks = model, n_groups, masks
        self._known = _Known()
        self._frame = _Frame([], [], [], self._known)
        self._slots: list[I32] = []
        self._out_position = NO_TOKENS
        """Those of the last step."""

    def step(self, step_id: int, weights_version: int, spans: list[Span], moves: list[tuple[int, int, int]]) -> Step:
        """The step that computes ``spans``. ``moves`` are (group, source slot, target slot)."""
        seqs = [span.seq for span in spans]
        who = seqs, [span.n for span in spans], [span.targets for span in spans]
        if not self._frame.fits(*who):
            self._frame = _Frame(*who, self._known)
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
        block, offset = np.divmod(pos, size)
        block += frame.tables.start[frame.row_span]
        slots = [table[block] * size + offset for table in frame.tables.flat]
        # Whoever samples has all its tokens in this step, so its outputs end where its rows do.
        out_position = end[frame.out_span] - frame.n_prompt
        return self._fill(step_id, weights_version, tok, pos, slots, step_moves, out_position)

    def further(self, step_id: int, weights_version: int, tok_S: I32, pos_S: I32, crossed: list[int]) -> Step:
        """The step that follows the one that was made last: its spans, each one row long, a position further. The rows
        of ``crossed``, in order, are the first of their blocks."""
        tables, size = self._frame.tables, self._frame.seqs[0].block_tokens
        slots = [slot + 1 for slot in self._slots]
        if crossed:
            for slot, blocks in zip(slots, tables.grow(crossed), strict=True):
                for i, block in zip(crossed, blocks, strict=True):
                    slot[i] = block * size
        moves = [NO_MOVES] * self._n_groups
        return self._fill(step_id, weights_version, tok_S, pos_S, slots, moves, self._out_position + 1)

    def _fill(
        self, step_id: int, weights_version: int, tok: I32, pos: I32, slots: list[I32], moves: list[I32],
        out_position: I32,
    ) -> Step:  # fmt: skip
        """The step of the frame's rows."""
        frame = self._frame
        self._slots, self._out_position = slots, out_position
        edits = _edits(frame) if frame.edited else (frame.no_starts, NO_TOKENS, NO_KINDS, NO_VALUES)
        start = frame.tables.start
        groups = tuple(
            GroupStep(slot, start, table, group_moves, NO_TRANSFERS)
            for slot, table, group_moves in zip(slots, frame.tables.flat, moves, strict=True)
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
            out_position=out_position,
            want=frame.want,
            params_index=frame.params_index,
            bitmask_index=frame.bitmask_index,
            params=frame.params,
            bitmask=self._bitmask(frame.bound) if frame.bound else NO_BITMASK,
            edit_start=edits[0],
            edit_token=edits[1],
            edit_kind=edits[2],
            edit_value=edits[3],
            score_start=frame.no_starts,
            score_token=NO_TOKENS,
        )

    def _bitmask(self, bound: list[tuple[int, Seq]]) -> U32:
        if self._masks is None:
            raise IntegrityError("a sequence has a grammar and nobody makes masks")
        return self._masks.rows([seq for _, seq in bound])


def _edits(frame: _Frame) -> tuple[I32, I32, U8, F32]:
    """Where each output's edits begin, and theirs one after the other."""
    found = [edits.of(seq.tokens[: seq.n_tokens], seq.n_prompt) for _, seq, edits in frame.edited]
    counts = np.zeros(len(frame.want), np.int32)
    counts[[r for r, _, _ in frame.edited]] = [len(tokens) for tokens, _, _ in found]
    tokens, kinds, values = (np.concatenate(each) for each in zip(*found, strict=True))
    return _starts(counts), tokens, kinds, values


def _starts(counts: I32) -> I32:
    """(n + 1,) where each run begins, and at last where all end."""
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def _bucket(n: int) -> int:
    """The next power of two: few sizes, so that what is compiled per size is compiled seldom."""
    return 1 << max(n - 1, 0).bit_length()
