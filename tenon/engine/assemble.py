"""Spans of sequences to the arrays of a ``Step``. Vectorised: the cost per span is a microsecond.

Shapes: T rows, S spans, R outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tenon.base.errors import IntegrityError
from tenon.engine.edits import NO_KINDS, NO_TOKENS, NO_VALUES, Edits
from tenon.engine.grammar import Masks
from tenon.engine.sequence import Seq
from tenon.engine.speculation.tree import Tree
from tenon.engine.step import F32, I32, I64, SAMPLE, U8, U32, GroupStep, Params, Step


@dataclass(eq=False, slots=True)
class Span:
    """A run of one sequence's rows to compute in this step: positions [start, start + n), or with ``tree`` the row at
    ``start`` and those of the tree below it."""

    seq: Seq
    start: int
    n: int
    targets: list[Seq]
    """Whose next token the last row gives: the sequence's, all siblings' where their prompt ends here, or nobody's."""
    tree: Tree | None = None
    """Each of its rows gives a token, if the walk comes to it."""

    @property
    def n_outputs(self) -> int:
        return len(self.targets) if self.tree is None else self.n


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

    def __init__(self, spans: list[Span], known: _Known) -> None:
        self.seqs, self.counts = [span.seq for span in spans], [span.n for span in spans]
        self.targets, self.has_trees = [span.targets for span in spans], any(span.tree is not None for span in spans)
        seqs = self.seqs
        self.tables = _Tables(seqs)
        rows = known.rows(seqs)  # first: it may make the arrays anew
        self.seq = known.seq[rows]
        self.count = np.array(self.counts, np.int32)
        self.q_start = _starts(self.count)
        T, S = int(self.q_start[-1]), len(seqs)
        self.row_span = np.repeat(np.arange(S), self.count)
        self.row_offset = np.arange(T, dtype=np.int32) - self.q_start[:-1][self.row_span]
        self.row_depth = self.row_offset
        """How far each row's position is from its span's first: less than its place where a tree branches."""
        self.parent = np.full(T, -1, np.int32)
        self.bucket_T, self.bucket_S = _bucket(T), _bucket(S)

        outputs = [seq for each in self.targets for seq in each]
        n_outputs = [len(each) for each in self.targets]
        if self.has_trees:
            n_outputs = [span.n_outputs for span in spans]
            outputs = [seq for span in spans for seq in ([span.seq] * span.n if span.tree else span.targets)]
            self._branch(spans)
        self.edited = _edited(spans) if any(seq.edits for seq in outputs) else []
        rows = known.rows(outputs)
        R = len(rows)
        self.out_span = np.repeat(np.arange(S), n_outputs)
        self.out_row = (self.q_start[1:] - 1)[self.out_span]
        if self.has_trees:
            places = [np.arange(n) - n + 1 for span, n in zip(spans, n_outputs, strict=True) if span.tree]
            in_tree = np.repeat([span.tree is not None for span in spans], n_outputs)
            self.out_row[in_tree] += np.concatenate(places).astype(np.int32)
        self.out_reach = self.row_depth[self.out_row] + 1
        """From its span's first position to that of the token which an output is."""
        self.out_seq, self.n_prompt = known.seq[rows], known.n_prompt[rows]
        self.bound = [
            (seq, 1 if span.tree is None else span.n)
            for span in spans
            for seq in span.targets
            if seq.binding is not None
        ]
        bound = [r for r, seq in enumerate(outputs) if seq.binding is not None]
        self.want = np.full(R, SAMPLE, np.uint8)
        self.params_index = np.arange(R, dtype=np.int32)
        self.bitmask_index = np.full(R, -1, np.int32)
        self.bitmask_index[bound] = np.arange(len(bound))
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

    def grown(self, spans: list[Span]) -> _Frame:
        """This one, a row a sequence, with the trees that ``spans`` have below the rows."""
        frame = object.__new__(_Frame)
        frame.__dict__.update(self.__dict__)  # a copy; copy.copy takes ten times as long
        frame.has_trees, frame.counts = True, [span.n for span in spans]
        frame.count = np.array(frame.counts, np.int32)
        frame.q_start = _starts(frame.count)
        T = int(frame.q_start[-1])
        frame.out_span = frame.row_span = row_span = np.repeat(self.row_span, frame.count)
        frame.out_row = np.arange(T, dtype=np.int32)
        frame.row_offset = frame.row_depth = frame.out_row - frame.q_start[:-1][row_span]
        frame.parent = np.full(T, -1, np.int32)
        frame.bucket_T = _bucket(T)
        frame._branch(spans)
        frame.out_reach = frame.row_depth + 1
        frame.edited = _edited(spans) if any(seq.edits for seq in self.seqs) else []
        frame.out_seq, frame.n_prompt = self.seq[row_span], self.n_prompt[row_span]
        frame.want = np.full(T, SAMPLE, np.uint8)
        frame.params_index = row_span.astype(np.int32)
        frame.bitmask_index = np.full(T, -1, np.int32)
        if self.bound:
            frame.bound = [(span.seq, span.n) for span in spans if span.seq.binding is not None]
            bound = np.array([span.seq.binding is not None for span in spans])[row_span]
            frame.bitmask_index[bound] = np.arange(np.count_nonzero(bound))
        frame.no_starts = np.zeros(T + 1, np.int32)
        return frame

    def _branch(self, spans: list[Span]) -> None:
        """Depths and parents of the rows of trees. One that does not branch is a run of positions like others."""
        if all(span.tree is None or span.tree.is_chain for span in spans):
            return
        depth, parent = self.row_depth.copy(), self.parent
        for at, span in zip(self.q_start.tolist(), spans, strict=False):
            tree = span.tree
            if tree is not None and not tree.is_chain:
                rows = slice(at + 1, at + 1 + len(tree))
                depth[rows] = tree.depths
                parent[rows] = np.array(tree.parents, np.int32) + (at + 1)
        self.row_depth = depth

    def fits(self, spans: list[Span]) -> bool:
        """Whether a step of ``spans`` is this one, further on."""
        if self.has_trees or [span.n for span in spans] != self.counts:
            return False
        return self.is_of(spans) and all(span.tree is None for span in spans)

    def is_of(self, spans: list[Span]) -> bool:
        """Whether it has as many spans of the same sequences, for the same targets."""
        mine = zip(spans, self.seqs, self.targets, strict=True)
        return all(span.seq is seq and span.targets == targets for span, seq, targets in mine)


class Assembler:
    """Makes the steps of one model. A step shares with the next the arrays that stay the same: nobody writes them."""

    def __init__(self, model: str, n_groups: int, masks: Masks | None = None) -> None:
        self._model, self._n_groups, self._masks = model, n_groups, masks
        self._known = _Known()
        self._frame = self._steady = _Frame([], self._known)
        self._slots: list[I32] = []
        self._out_position = NO_TOKENS
        """Those of the last step."""

    def step(self, step_id: int, weights_version: int, spans: list[Span], moves: list[tuple[int, int, int]]) -> Step:
        """The step that computes ``spans``. ``moves`` are (group, source slot, target slot)."""
        frame = self._steady
        if not frame.fits(spans):
            frame = self._framed(spans)
        self._frame = frame
        size = spans[0].seq.block_tokens
        start = np.array([span.start for span in spans], np.int32)
        end = start + frame.count
        if len(frame.parent) == len(spans):  # decoding: a row a span
            pos = start
            tok = np.array([span.seq.tokens.item(span.start) for span in spans], np.int32)
        else:
            pos = start[frame.row_span] + frame.row_depth
            tok = _tokens(spans)

        frame.tables.cut(-(-end // size))
        step_moves = [
            np.array([(a, b) for g, a, b in moves if g == group], np.int32).reshape(-1, 2)
            for group in range(self._n_groups)
        ]
        place = pos if frame.row_depth is frame.row_offset else start[frame.row_span] + frame.row_offset
        block, offset = np.divmod(place, size)
        block += frame.tables.start[frame.row_span]
        slots = [table[block] * size + offset for table in frame.tables.flat]
        out_position = start[frame.out_span] + frame.out_reach - frame.n_prompt
        return self._fill(step_id, weights_version, tok, pos, slots, step_moves, out_position)

    def _framed(self, spans: list[Span]) -> _Frame:
        """The frame of these, and what comes again after it: where sequences decode, that without their trees."""
        has_trees = any(span.tree is not None for span in spans)
        if not has_trees:
            self._steady = _Frame(spans, self._known)
            return self._steady
        if not all(len(span.targets) == 1 and (span.n == 1 or span.tree is not None) for span in spans):
            return _Frame(spans, self._known)
        if self._steady.counts != [1] * len(spans) or not self._steady.is_of(spans):
            self._steady = _Frame([Span(span.seq, span.start, 1, span.targets) for span in spans], self._known)
        return self._steady.grown(spans)

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

    def _bitmask(self, bound: list[tuple[Seq, int]]) -> U32:
        if self._masks is None:
            raise IntegrityError("a sequence has a grammar and nobody makes masks")
        return self._masks.rows(bound)


_Edited = tuple[int, Seq, Edits, list[int]]
"""An output, whose, what is done to its logits, and the tokens of its tree between the sequence's and it."""


def _edited(spans: list[Span]) -> list[_Edited]:
    found: list[_Edited] = []
    r = 0
    for span in spans:
        tree = span.tree
        for i in range(span.n_outputs):
            seq = span.targets[i] if tree is None else span.seq
            if seq.edits is not None:
                found.append((r + i, seq, seq.edits, tree.path(i - 1) if tree is not None else []))
        r += span.n_outputs
    return found


def _edits(frame: _Frame) -> tuple[I32, I32, U8, F32]:
    """Where each output's edits begin, and theirs one after the other."""
    found = [edits.of(seq.context(path), seq.n_prompt, len(path)) for _, seq, edits, path in frame.edited]
    counts = np.zeros(len(frame.want), np.int32)
    counts[[each[0] for each in frame.edited]] = [len(tokens) for tokens, _, _ in found]
    tokens, kinds, values = (np.concatenate(each) for each in zip(*found, strict=True))
    return _starts(counts), tokens, kinds, values


def _tokens(spans: list[Span]) -> I32:
    """Of all rows."""
    if not any(span.tree for span in spans):
        return np.concatenate([span.seq.tokens[span.start : span.start + span.n] for span in spans])
    found: list[int] = []
    for span in spans:
        tokens, start, tree = span.seq.tokens, span.start, span.tree
        if tree is None:
            found += tokens[start : start + span.n].tolist()
        else:
            found.append(tokens.item(start))
            found += tree.tokens
    return np.array(found, np.int32)


def _starts(counts: I32) -> I32:
    """(n + 1,) where each run begins, and at last where all end."""
    starts = np.zeros(len(counts) + 1, np.int32)
    counts.cumsum(out=starts[1:])
    return starts


def _bucket(n: int) -> int:
    """The next power of two: few sizes, so that what is compiled per size is compiled seldom."""
    return 1 << max(n - 1, 0).bit_length()
