"""Rows of tokens to train on: every epoch shuffles the documents, joins them, and cuts rows anew.

The order is a pure function of (seed, epoch, length), so that ``Cursor`` is the whole state of the data.

Shapes: B rows of S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16]


@dataclass(frozen=True)
class Cursor:
    """Where reading stands: the next row of an epoch's permutation; ``length`` is the epoch's row length."""

    epoch: int = 0
    row: int = 0
    length: int = 0


class Rows:
    """Batches of (S + 1)-token rows; the last token is only ever a target."""

    def __init__(self, documents: list[Tokens], seed: int) -> None:
        self.documents = documents
        self.seed = seed
        self._epoch: tuple[int, int] | None = None
        self._stream: Tokens = np.zeros(0, np.uint16)
        self._starts: NDArray[np.int64] = np.zeros(0, np.int64)

    def _open(self, epoch: int, length: int) -> None:
        if self._epoch == (epoch, length):
            return
        rng = np.random.default_rng((self.seed, epoch, length))
        self._stream = np.concatenate([self.documents[i] for i in rng.permutation(len(self.documents))])
        offset = int(rng.integers(length))
        count = (len(self._stream) - offset - 1) // length
        if count < 1:
            raise ValueError(f"{len(self._stream)} tokens make no row of {length}")
        self._starts = offset + length * rng.permutation(count).astype(np.int64)
        self._epoch = (epoch, length)

    def take(self, cursor: Cursor, batch: int, length: int) -> tuple[Tokens, Cursor]:
        """The next ``batch`` rows (B, S + 1) and the cursor after them. A new length opens a new epoch."""
        if cursor.length not in (0, length):
            cursor = Cursor(cursor.epoch + 1, 0, length)
        epoch, row = cursor.epoch, cursor.row
        taken: list[Tokens] = []
        while len(taken) < batch:
            self._open(epoch, length)
            if row == len(self._starts):
                epoch, row = epoch + 1, 0
                continue
            start = int(self._starts[row])
            taken.append(self._stream[start : start + length + 1])
            row += 1
        return np.stack(taken), Cursor(epoch, row, length)
