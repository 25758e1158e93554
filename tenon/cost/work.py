"""Work: what a step asks of a device, as phases of floating-point operations and bytes.

Who makes it knows shapes (``models.spec.step_work``); who prices it knows devices (``cost.price.seconds``). Neither
knows the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

PhaseKind = Literal["linear", "experts", "attention", "logits", "rowwise", "exchange"]
KINDS: Final[tuple[PhaseKind, ...]] = ("linear", "experts", "attention", "logits", "rowwise", "exchange")

PIECE_ROWS: Final = 16
"""Rows of one span that an attention kernel takes through its keys together; longer runs are cut, trees into rows."""


class Phase(msgspec.Struct, frozen=True):
    """All kernels of one kind in a step.

    ``flops`` counts a multiply-add as two. ``bytes`` is what moves between memory and the device's caches at the least:
    weights once, keys and values once per span, activations in and out; of ``exchange`` it is what each device sends.
    ``launches`` is the number of kernels. ``serial`` is the share of the largest piece that one worker has to do alone:
    1 where the phase cannot be divided, 0 where it can at will. ``branched`` is the part of ``flops`` that is done for
    rows of trees, which some kernels take one by one.
    """

    kind: PhaseKind
    flops: float
    bytes: float
    launches: int
    serial: float = 0.0
    branched: float = 0.0


class Work(msgspec.Struct, frozen=True):
    """One step. ``rows`` are computed, ``spans`` are runs of one sequence's rows, ``outputs`` are rows with logits."""

    dtype: str
    phases: tuple[Phase, ...]
    rows: int
    spans: int
    outputs: int

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    @property
    def bytes(self) -> float:
        return sum(phase.bytes for phase in self.phases)


class StepShape(msgspec.Struct, frozen=True):
    """What of a step decides its cost. Lengths of the tuples: KV groups, in the order of the model's.

    ``reads``: positions whose keys and values are read, summed over spans. ``pairs``: (row, visible position) pairs,
    summed over rows. ``largest``: pairs of the piece that has most: ``PIECE_ROWS`` rows of a run, one of a tree; empty
    where nobody counted, which prices attention as if it could be divided among workers at will. ``branched``: of
    ``pairs``, those of rows in trees; empty where there are none.
    """

    rows: int
    spans: int
    outputs: int
    reads: tuple[int, ...]
    pairs: tuple[int, ...]
    largest: tuple[int, ...] = ()
    branched: tuple[int, ...] = ()


def decode_shape(contexts: Sequence[int] | NDArray[np.integer], windows: Sequence[int | None] = (None,)) -> StepShape:
    """One row for each sequence, which sees ``contexts`` positions, itself included. Quick: simulators ask often."""
    seen = np.asarray(contexts, np.int64)
    n, total, most = len(seen), int(seen.sum()), int(seen.max(initial=0))
    pairs = tuple([total if window is None else int(np.minimum(seen, window).sum()) for window in windows])
    largest = tuple([most if window is None else min(most, window) for window in windows])
    return StepShape(n, n, n, pairs, pairs, largest)


def prefill_shape(start: int, n: int, windows: Sequence[int | None] = (None,), outputs: int = 1) -> StepShape:
    """Positions [start, start + n) of one sequence."""
    return spans_shape([(start, n)], outputs, windows)


def with_run(shape: StepShape, start: int, n: int, windows: Sequence[int | None], outputs: int = 0) -> StepShape:
    """``shape`` and positions [start, start + n) of one more sequence, in closed form: no array is made.

    Equal to ``spans_shape`` of both, but for ``largest`` where a run is shorter than twice ``PIECE_ROWS``: its piece
    counts no more than the run's pairs.
    """
    end = start + n
    reads, pairs, largest = [], [], []
    for i, window in enumerate(windows):
        seen, read = n * start + n * (n + 1) // 2, end
        if window is not None and end > window:
            whole = max(0, window - start)  # rows that the window does not cut
            seen = whole * start + whole * (whole + 1) // 2 + (n - whole) * window
            read = min(end, n + window - 1)
        last = end if window is None else min(end, window)
        reads.append(shape.reads[i] + read)
        pairs.append(shape.pairs[i] + seen)
        largest.append(max(shape.largest[i], min(last * min(n, PIECE_ROWS), seen)))
    return StepShape(
        shape.rows + n, shape.spans + 1, shape.outputs + outputs, tuple(reads), tuple(pairs), tuple(largest)
    )


def spans_shape(spans: Sequence[tuple[int, int]], outputs: int, windows: Sequence[int | None] = (None,)) -> StepShape:
    """Runs of positions [start, start + n) of sequences: decodes, chunks of prompts and holes, mixed at will."""
    pos = np.concatenate([np.arange(start, start + n) for start, n in spans]) if spans else np.zeros(0, np.int64)
    return step_shape(pos, np.cumsum([0, *(n for _, n in spans)]), outputs, windows)


def step_shape(
    pos: NDArray[np.integer],
    q_start: NDArray[np.integer],
    outputs: int,
    windows: Sequence[int | None] = (None,),
    parent: NDArray[np.integer] | None = None,
) -> StepShape:
    """The shape of a step's arrays: ``pos`` (T,) of each row, ``q_start`` (S+1,) the spans, ``windows`` of the groups,
    ``parent`` (T,) of rows in trees (-1 of others; None where there are no trees).

    Holes are spans like others. A row of a tree stands at its root's position plus its depth, so it sees ``pos + 1``
    positions as a row of a chain does; its span reads the context below the root and the tree's rows.
    """
    q_start = np.asarray(q_start, np.int64)
    count = np.diff(q_start)
    spans = len(count)
    seen_all = np.asarray(pos, np.int64) + 1
    reads_all = seen_all[q_start[:-1]] - 1 + count
    last = q_start[1:] - 1
    in_tree = None if parent is None or not len(parent) or parent.max() < 0 else np.asarray(parent) >= 0
    together = np.minimum(count, PIECE_ROWS)
    if in_tree is not None:
        together = np.where(np.logical_or.reduceat(in_tree, q_start[:-1]), 1, together)
    reads, pairs, largest, branched = [], [], [], []
    for window in windows:
        seen = seen_all if window is None else np.minimum(seen_all, window)
        read = reads_all if window is None else np.minimum(reads_all, count + window - 1)
        reads.append(int(read.sum()))
        pairs.append(int(seen.sum()))
        piece = seen[last] * together if spans else seen
        largest.append(int(min(piece.max(initial=0), pairs[-1])))
        if in_tree is not None:
            branched.append(int(seen[in_tree].sum()))
    return StepShape(len(seen_all), spans, outputs, tuple(reads), tuple(pairs), tuple(largest), tuple(branched))
