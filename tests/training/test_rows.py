"""Rows: every token once an epoch, and a cursor that is the whole state."""

from __future__ import annotations

import numpy as np

from tenon.training.rows import Cursor, Rows

DOCUMENTS = [np.arange(100 * i, 100 * i + 100, dtype=np.uint16) for i in range(7)]


def test_an_epoch_covers_the_text_once() -> None:
    rows, cursor = Rows(DOCUMENTS, seed=1), Cursor()
    seen: list[int] = []
    while cursor.epoch == 0:
        taken, cursor = rows.take(cursor, 1, 16)
        if cursor.epoch == 0:
            seen += taken[0, :-1].tolist()
    assert len(seen) == len(set(seen)) >= 700 - 2 * 16 - 1


def test_the_cursor_is_the_whole_state() -> None:
    _, cursor = Rows(DOCUMENTS, seed=1).take(Cursor(), 5, 16)
    a, after_a = Rows(DOCUMENTS, seed=1).take(cursor, 50, 16)
    one = Rows(DOCUMENTS, seed=1)
    one.take(Cursor(), 5, 16)
    b, after_b = one.take(cursor, 50, 16)
    assert np.array_equal(a, b)
    assert after_a == after_b


def test_another_length_opens_another_epoch() -> None:
    rows = Rows(DOCUMENTS, seed=1)
    _, cursor = rows.take(Cursor(), 3, 16)
    taken, cursor = rows.take(cursor, 3, 32)
    assert taken.shape == (3, 33)
    assert cursor == Cursor(1, 3, 32)
