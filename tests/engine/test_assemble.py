"""Steps from spans: what they say of a sequence, however many spans it has and however many came before it."""

from __future__ import annotations

import numpy as np

from tenon.engine.assemble import Assembler, Span
from tenon.engine.messages import Add
from tenon.engine.sequence import Request, Seq
from tenon.engine.step import Step

SIZE = 4


def sequence(seq_id: int, n_prompt: int) -> Seq:
    """Its blocks are numbered from ten times its id on."""
    add = Add(f"r{seq_id}", tuple(range(n_prompt)), 8, seed=100 + seq_id, temperature=seq_id / 1000)
    request = Request(add, seq_id, bytes(32), bytes(32), frozenset())
    seq = Seq(seq_id, request, 0, 1, SIZE)
    request.seqs.append(seq)
    seq.tables[0][:] = 10 * seq_id + np.arange(len(seq.tables[0]))
    return seq


def step_of(assembler: Assembler, *spans: Span) -> Step:
    return assembler.step(1, 0, list(spans), [])


def test_a_sequence_with_a_hole_has_two_spans_and_one_row_of_parameters() -> None:
    one, other = sequence(3, 14), sequence(5, 6)
    step = step_of(Assembler("m", 1), Span(one, 2, 3, []), Span(one, 9, 5, [one]), Span(other, 0, 6, [other]))
    assert step.seq.tolist() == [3, 3, 5]
    assert step.pos.tolist() == [2, 3, 4, 9, 10, 11, 12, 13, *range(6)]
    slots = [10 * seq * SIZE + pos for seq, pos in zip([3] * 8 + [5] * 6, step.pos.tolist(), strict=True)]
    assert step.groups[0].slot.tolist() == slots
    assert step.out_seq.tolist() == [3, 5]
    assert step.params.seed.tolist() == [103, 105]
    assert step.params.temperature.tolist() == np.array([0.003, 0.005], np.float32).tolist()


def test_sequences_are_told_apart_after_thousands_of_others() -> None:
    assembler = Assembler("m", 1)
    for first in range(0, 3000, 40):
        seqs = [sequence(i, 3) for i in range(first, first + 60)]  # twenty of them were there before
        step = step_of(assembler, *(Span(seq, 0, 3, [seq]) for seq in seqs))
        assert step.out_seq.tolist() == step.seq.tolist() == [seq.id for seq in seqs]
        assert step.params.seed.tolist() == [100 + seq.id for seq in seqs]


def test_one_step_may_have_more_sequences_than_were_ever_known() -> None:
    seqs = [sequence(i, 2) for i in range(1500)]
    step = step_of(Assembler("m", 1), *(Span(seq, 0, 2, [seq]) for seq in seqs))
    assert step.params.seed.tolist() == [100 + i for i in range(1500)]
