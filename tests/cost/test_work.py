"""What of a step's arrays decides its cost, counted by hand and row by row."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tenon.cost.work import PIECE_ROWS, Phase, Work, decode_shape, prefill_shape, spans_shape, step_shape


def test_decoding_sees_each_context_once() -> None:
    shape = decode_shape([5, 9])
    assert (shape.rows, shape.spans, shape.outputs) == (2, 2, 2)
    assert (shape.reads, shape.pairs, shape.largest) == ((14,), (14,), (9,))


@given(st.lists(st.integers(1, 300), max_size=9), st.one_of(st.none(), st.integers(1, 50)))
def test_decoding_is_a_step_of_one_row_a_span(contexts: list[int], window: int | None) -> None:
    pos, q_start = np.array(contexts, int) - 1, np.arange(len(contexts) + 1)
    assert decode_shape(contexts, (window,)) == step_shape(pos, q_start, len(contexts), (window,))


def test_prefill_counts_a_triangle_above_its_start() -> None:
    shape = prefill_shape(10, 4)
    assert shape.reads == (14,)
    assert shape.pairs == (11 + 12 + 13 + 14,)


def test_a_window_bounds_both() -> None:
    shape = prefill_shape(10, 4, windows=(None, 3))
    assert shape.reads == (14, 6)  # the first row's window and the rows after it
    assert shape.pairs == (50, 12)


def test_a_tree_reads_the_context_once_and_sees_its_own_path() -> None:
    shape = step_shape(np.array([7, 8, 8, 9]), np.array([0, 4]), outputs=4, parent=np.array([-1, 0, 0, 1]))
    assert shape.reads == (7 + 4,)
    assert shape.pairs == (8 + 9 + 9 + 10,)
    assert shape.branched == (9 + 9 + 10,)
    assert shape.largest == (10,)  # rows of a tree are taken one by one
    beside = step_shape(np.array([7, 8, 8, 9, 0, 1]), np.array([0, 4, 6]), 5, parent=np.array([-1, 0, 0, 1, -1, -1]))
    assert (beside.largest, beside.branched) == ((10,), (28,))


def test_an_empty_step_is_nothing() -> None:
    shape = step_shape(np.zeros(0, int), np.zeros(1, int), 0)
    assert (shape.rows, shape.spans, shape.reads, shape.pairs, shape.largest) == (0, 0, (0,), (0,), (0,))
    assert spans_shape([], 0) == shape


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=6)


@given(spans, st.one_of(st.none(), st.integers(1, 50)))
def test_shapes_are_what_counting_row_by_row_finds(spans: list[tuple[int, int]], window: int | None) -> None:
    shape = spans_shape(spans, len(spans), (window,))
    visible = [[set(range(max(0, p + 1 - (window or p + 1)), p + 1)) for p in range(s, s + n)] for s, n in spans]
    assert shape.pairs == (sum(len(row) for rows in visible for row in rows),)
    assert shape.reads == (sum(len(set().union(*rows)) for rows in visible),)
    pieces = [len(rows[-1]) * min(len(rows), PIECE_ROWS) for rows in visible]
    assert shape.largest == (min(max(pieces), shape.pairs[0]),)


def test_work_adds_its_phases() -> None:
    work = Work("bfloat16", (Phase("linear", 3.0, 5.0, 1), Phase("logits", 4.0, 6.0, 1)), 1, 1, 1)
    assert (work.flops, work.bytes) == (7.0, 11.0)
