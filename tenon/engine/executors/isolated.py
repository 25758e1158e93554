"""An exception in a step costs the sequence that raises it, and nobody else.

A step that raises is computed again, a sequence at a time; what a step writes it can write twice, and its moves are
made once for all parts. A sequence that raises alone is told so. Where nothing at all can be computed any more, the
exception goes on: the process ends and another one takes over."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tenon.engine.executors.base import Caps, Executor, Ticket
from tenon.engine.step import HIDDEN, I32, GroupStep, Step, StepResult
from tenon.models.spec import KVGroup

PATIENCE: Final = 3
"""Steps in a row of which nothing could be computed, after which the executor counts as broken."""

Mask = NDArray[np.bool_]
_log = logging.getLogger("tenon.engine")


class Isolated:
    """``inner``, which may raise on any step."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self._results: dict[Ticket, StepResult] = {}
        self._n_barren = 0

    @property
    def caps(self) -> Caps:
        return self.inner.caps

    def allocate(self, groups: tuple[KVGroup, ...], n_blocks: int) -> None:
        self.inner.allocate(groups, n_blocks)

    def submit(self, step: Step) -> Ticket:
        ticket = Ticket(step.id)
        try:
            self._results[ticket] = self.inner.poll(self.inner.submit(step))
            self._n_barren = 0
        except Exception as error:
            self._results[ticket] = self._apart(step, error)
        return ticket

    def poll(self, ticket: Ticket) -> StepResult:
        return self._results.pop(ticket)

    def load_weights(self, path: str, version: int) -> None:
        self.inner.load_weights(path, version)

    def close(self) -> None:
        self.inner.close()

    def _apart(self, step: Step, error: Exception) -> StepResult:
        """The step's result from its sequences', each computed alone. Raises ``error`` where none can be any more."""
        _log.warning("step %d raised; its sequences are computed one at a time", step.id, exc_info=error)
        seqs = list(dict.fromkeys(step.seq.tolist()))
        parts: list[tuple[Part, StepResult]] = []
        errors: dict[int, str] = {}
        for seq in seqs:
            part = only(step, step.seq == seq)
            try:
                parts.append((part, self.inner.poll(self.inner.submit(part.step))))
            except Exception as own:
                errors[seq] = f"the engine failed on this request ({type(own).__name__})"
                _log.error("sequence %d raises", seq, exc_info=own)
        if not parts:
            self._n_barren += 1
            if len(seqs) > 1 or self._n_barren >= PATIENCE:
                raise error
        else:
            self._n_barren = 0
        return joined(step, parts, errors)


class Part:
    """Some spans of a step as a step, and which of the whole's outputs and scores they are."""

    def __init__(self, step: Step, outputs: Mask, scores: Mask) -> None:
        self.step, self.outputs, self.scores = step, outputs, scores


def only(step: Step, spans: Mask) -> Part:
    """The step with these spans alone, and with all copies between blocks, which belong to no span and are made
    once."""
    rows = np.repeat(spans, np.diff(step.q_start))
    place = np.cumsum(rows, dtype=np.int32) - np.int32(1)
    outputs = rows[step.out_row]
    edits = np.repeat(outputs, np.diff(step.edit_start))
    scores = np.repeat(outputs, np.diff(step.score_start))
    parent = step.parent[rows]
    groups = tuple(
        GroupStep(
            slot=group.slot[rows],
            table_start=_starts(np.diff(group.table_start)[spans]),
            table=group.table[np.repeat(spans, np.diff(group.table_start))],
            moves=group.moves,
            transfers=group.transfers,
        )
        for group in step.groups
    )
    part = replace(
        step,
        seq=step.seq[spans],
        q_start=_starts(np.diff(step.q_start)[spans]),
        tok=step.tok[rows],
        pos=step.pos[rows],
        parent=np.where(parent < 0, parent, place[parent]).astype(np.int32),
        groups=groups,
        out_row=place[step.out_row[outputs]],
        edit_start=_starts(np.diff(step.edit_start)[outputs]),
        edit_token=step.edit_token[edits],
        edit_kind=step.edit_kind[edits],
        edit_value=step.edit_value[edits],
        score_start=_starts(np.diff(step.score_start)[outputs]),
        score_token=step.score_token[scores],
        **{name: getattr(step, name)[outputs] for name in _PER_OUTPUT},
    )
    return Part(part, outputs, scores)


_PER_OUTPUT: Final = ("out_seq", "out_position", "want", "params_index", "bitmask_index")


def joined(step: Step, parts: list[tuple[Part, StepResult]], errors: dict[int, str]) -> StepResult:
    """The result of ``step``: what ``parts`` found, and nothing of the sequences in ``errors``."""
    k = max([0, *(result.top_ids.shape[1] for _, result in parts)])
    width = max([0, *(result.hidden.shape[1] for _, result in parts)])
    wants_hidden = (step.want & HIDDEN) > 0
    whole = StepResult.nothing(step, k, int(wants_hidden.sum()), width)
    whole.transfers_done = np.concatenate([whole.transfers_done, *(result.transfers_done for _, result in parts)])
    whole.start_s = min((result.start_s for _, result in parts), default=0.0)
    whole.end_s = max((result.end_s for _, result in parts), default=0.0)
    whole.errors = dict(errors)
    for part, result in parts:
        for name in ("ids", "logprobs", "top_ids", "top_logprobs"):
            getattr(whole, name)[part.outputs] = getattr(result, name)
        whole.scores[part.scores] = result.scores
        whole.ranks[part.scores] = result.ranks
        whole.hidden[part.outputs[wants_hidden]] = result.hidden
        whole.errors.update(result.errors)
    return whole


def _starts(counts: I32) -> I32:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
