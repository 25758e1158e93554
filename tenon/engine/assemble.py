"""Spans of sequences to the arrays of a ``Step``. Vectorised: the cost per span is a few microseconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tenon.engine.sequence import Seq
from tenon.engine.step import SAMPLE, GroupStep, Params, Step


@dataclass(frozen=True, slots=True)
class Span:
    """A run of one sequence's rows to compute in this step: positions [start, start + n)."""

    seq: Seq
    start: int
    n: int
    samples: bool

    @property
    def targets(self) -> list[Seq]:
        """Whose next token the last row gives: the sequence's, or all siblings' when the prompt ends here."""
        if not self.samples:
            return []
        request = self.seq.request
        return [self.seq] if request.forked or request.add.n == 1 else request.seqs


def assemble(
    step_id: int,
    model: str,
    weights_version: int,
    spans: list[Span],
    moves: list[tuple[int, int, int]],
    n_groups: int,
) -> Step:
    """The step that computes ``spans``. ``moves`` are (group, source slot, target slot)."""
    size = spans[0].seq.block_tokens
    start = np.fromiter((s.start for s in spans), np.int32, len(spans))
    count = np.fromiter((s.n for s in spans), np.int32, len(spans))
    q_start = np.zeros(len(spans) + 1, np.int32)
    np.cumsum(count, out=q_start[1:])
    T = int(q_start[-1])
    row_span = np.repeat(np.arange(len(spans), dtype=np.int32), count)
    pos = np.arange(T, dtype=np.int32) + (start - q_start[:-1])[row_span]
    tok = np.concatenate([s.seq.tokens[s.start : s.start + s.n] for s in spans])

    n_table = -(-(start + count) // size)
    table_start = np.zeros(len(spans) + 1, np.int32)
    np.cumsum(n_table, out=table_start[1:])
    lengths = n_table.tolist()
    groups = []
    for group in range(n_groups):
        table = np.concatenate([s.seq.tables[group][:n] for s, n in zip(spans, lengths, strict=True)])
        slot = table[table_start[row_span] + pos // size] * size + pos % size
        step_moves = np.array([(a, b) for g, a, b in moves if g == group], np.int32).reshape(-1, 2)
        groups.append(GroupStep(slot, table_start, table, step_moves))

    outputs = [(i, seq) for i, span in enumerate(spans) for seq in span.targets]
    R = len(outputs)
    adds = [seq.request.add for _, seq in outputs]
    params = Params(
        temperature=np.fromiter((a.temperature for a in adds), np.float32, R),
        top_k=np.fromiter((max(a.top_k, 0) for a in adds), np.int32, R),
        top_p=np.fromiter((a.top_p for a in adds), np.float32, R),
        min_p=np.fromiter((a.min_p for a in adds), np.float32, R),
        seed=np.fromiter((a.seed % 2**64 for a in adds), np.uint64, R),
        sample=np.fromiter((seq.index for _, seq in outputs), np.int32, R),
        n_logprobs=np.fromiter((a.n_logprobs for a in adds), np.int32, R),
    )
    last_row = q_start[1:] - 1
    return Step(
        id=step_id,
        model=model,
        weights_version=weights_version,
        bucket_T=_bucket(T),
        bucket_S=_bucket(len(spans)),
        n_steps=1,
        seq=np.fromiter((s.seq.id for s in spans), np.int64, len(spans)),
        q_start=q_start,
        tok=tok,
        pos=pos,
        parent=np.full(T, -1, np.int32),
        groups=tuple(groups),
        out_row=last_row[[i for i, _ in outputs]].astype(np.int32) if R else np.zeros(0, np.int32),
        out_seq=np.fromiter((seq.id for _, seq in outputs), np.int64, R),
        out_position=np.fromiter((seq.n_output for _, seq in outputs), np.int32, R),
        want=np.full(R, SAMPLE, np.uint8),
        params_index=np.arange(R, dtype=np.int32),
        bitmask_index=np.full(R, -1, np.int32),
        params=params,
        bitmask=np.zeros((0, 0), np.uint32),
        edit_start=np.zeros(R + 1, np.int32),
        edit_token=np.zeros(0, np.int32),
        edit_kind=np.zeros(0, np.uint8),
        edit_value=np.zeros(0, np.float32),
        score_start=np.zeros(R + 1, np.int32),
        score_token=np.zeros(0, np.int32),
    )


def _bucket(n: int) -> int:
    """The next power of two: few sizes, so that what is compiled per size is compiled seldom."""
    return 1 << max(n - 1, 0).bit_length()
