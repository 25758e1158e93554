"""Runs of decode steps that differ by counting alone, taken without the scheduler's walk over every sequence.

While every running sequence decodes, none finishes and nobody can join them, a step is the one before with each
position one further and, where a block was full, one more block in a table. A :class:`Stretch` counts on: blocks are
taken and published exactly when and in the order in which :class:`Scheduler` would, the sequences themselves are
brought up to date at its end. ``step()`` and ``deltas()`` give whoever asks the bytes of the step that ``schedule`` and
``commit`` would have made.

A sequence at position p takes a block before the step in which p is a multiple of the block's size, and publishes the
one that it fills in the step before. So sequences are kept by p modulo the size, and a step touches two of those lists.

Shapes: S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from tenon.cost.work import StepShape
from tenon.engine.assemble import Assembler, Span
from tenon.engine.blocks import DIGEST_BYTES
from tenon.engine.executors.simulated import decoding_shape
from tenon.engine.messages import Delta
from tenon.engine.scheduler import Scheduler
from tenon.engine.sequence import Seq
from tenon.engine.step import I32, GroupStep, Step

Truth = Callable[[int], I32]
"""Of a sequence, all its outputs."""

SHORTEST: Final = 2
"""Setting a stretch up costs about a step: a shorter one is not worth it."""
GATHERED: Final = 32
"""Steps whose tokens are laid out at once, for whoever asks for steps."""


def begin(scheduler: Scheduler, truth: Truth, windows: Sequence[int | None]) -> Stretch | None:
    """The stretch that starts with the next step, or None where the next steps are not all of its kind."""
    running, config = scheduler.running, scheduler.config
    if not running or not running[-1].is_decoding or len(running) > config.max_step_tokens:
        return None  # the latest arrival tells soonest whether somebody is at their prompt
    if scheduler.waiting and not _is_shut(scheduler):
        return None
    longest = min(seq.request.add.max_tokens - seq.n_output for seq in running) - 1
    if longest < SHORTEST or not all(_is_plain(seq, scheduler) for seq in running):
        return None
    for seq in running:
        if seq.request.stop_ids:
            coming = truth(seq.id)[seq.n_output : seq.n_output + longest]
            longest = next((i for i, token in enumerate(coming.tolist()) if token in seq.request.stop_ids), longest)
    return Stretch(scheduler, truth, windows, longest) if longest >= SHORTEST else None


def _is_shut(scheduler: Scheduler) -> bool:
    """Whether who waits cannot come in however many blocks there are, as long as the same sequences run.

    A chunk policy leaves a row for them wherever the step has one.
    """
    n_slots = sum(seq.n_slots for seq in (scheduler.waiting[0], *scheduler.running))
    return n_slots > scheduler.config.max_sequences or len(scheduler.running) == scheduler.config.max_step_tokens


def _is_plain(seq: Seq, scheduler: Scheduler) -> bool:
    """Whether the sequence decodes alone, in blocks of its own; its logits are not edited and nobody asks for
    log-probabilities."""
    request = seq.request
    if not seq.is_decoding or request.add.n_logprobs >= 0 or seq.edits is not None or seq.binding is not None:
        return False
    if request.add.n == 1:
        return True
    block = seq.n_computed // seq.block_tokens
    return request.forked and (block >= seq.n_blocks or scheduler.pools[0].ref[seq.tables[0][block]] == 1)


class Stretch:
    """At most ``n_left`` more steps, each by ``reserve`` and ``commit``; ``end`` at last. Nothing else may touch the
    scheduler in between."""

    def __init__(self, scheduler: Scheduler, truth: Truth, windows: Sequence[int | None], n_left: int) -> None:
        self.seqs = list(scheduler.running)
        self.n_left = n_left
        self.n_done = 0
        self._scheduler, self._windows = scheduler, windows
        scheduler.leave_lane()
        self._size = size = scheduler.config.block_tokens
        self._computed = np.fromiter((seq.n_computed for seq in self.seqs), np.int64, len(self.seqs))
        self._total, self._most = int(self._computed.sum()), int(self._computed.max())
        self._is_windowed = any(window is not None for window in windows)
        self._phases: list[list[tuple[int, Seq]]] = [[] for _ in range(size)]
        for i, seq in enumerate(self.seqs):
            self._phases[seq.n_computed % size].append((i, seq))
            # Blocks are published before the end, so their tokens must stand where a key is made of them.
            first = seq.n_output
            seq.tokens[seq.n_tokens : seq.n_tokens + n_left] = truth(seq.id)[first : first + n_left]
        self._batch: _Batch | None = None

    def reserve(self, now_s: float) -> bool:
        """Take the next step's blocks; False, and nothing is taken, where it must be left to the scheduler."""
        if self.n_left == 0:
            return False
        self._scheduler.at(now_s)
        crossing = self._phases[-self.n_done % self._size]
        if crossing:
            pools = self._scheduler.pools
            if min(pool.n_available for pool in pools) < len(crossing):
                return False
            for i, seq in crossing:
                if seq.n_blocks * self._size == seq.n_computed + self.n_done:  # a pinned one has its blocks already
                    for pool, table in zip(pools, seq.tables, strict=True):
                        table[seq.n_blocks] = pool.take()
                    seq.n_blocks += 1
                if self._batch is not None:
                    self._batch.crossed(i, self.n_done)
        self._scheduler.counters.steps += 1
        return True

    def shape(self) -> StepShape:
        """Of the step that was reserved."""
        S, further = len(self.seqs), self.n_done + 1
        if self._is_windowed:
            return decoding_shape(self._computed + further, self._windows)
        seen = (self._total + S * further,) * len(self._windows)
        return StepShape(S, S, S, seen, seen, (self._most + further,) * len(self._windows))

    def step(self) -> Step:
        """The step that was reserved, as ``Scheduler.schedule`` makes it."""
        if self._batch is None:
            self._batch = _Batch(self.seqs, self._scheduler, self.n_done, self.n_left)
        return self._batch.step(self.n_done, self._scheduler.counters.steps)

    def deltas(self) -> list[Delta]:
        """What ``Scheduler.commit`` returns of the step that was reserved."""
        return [
            Delta(
                seq.request.add.request_id,
                seq.index,
                (int(seq.tokens[seq.n_tokens + self.n_done]),),
                cached_tokens=seq.request.cached_tokens,
            )
            for seq in self.seqs
        ]

    def commit(self) -> None:
        """The step is done: publish what it filled."""
        self.n_done += 1
        self.n_left -= 1
        self._scheduler.counters.output_tokens += len(self.seqs)
        if not self._scheduler.config.prefix_cache:
            return
        for _, seq in self._phases[-self.n_done % self._size]:
            i = seq.n_published
            digest, content = seq.key_and_content(i)
            for pool, table in zip(self._scheduler.pools, seq.tables, strict=True):
                pool.publish(int(table[i]), digest, content, i * self._size, content[:DIGEST_BYTES], seq.turn)
            seq.n_published = i + 1

    def end(self) -> None:
        """Bring the sequences up to date. The stretch is over."""
        for seq in self.seqs:
            seq.n_tokens += self.n_done
            seq.n_computed += self.n_done
        self.n_left = self.n_done = 0


class _Batch:
    """The steps of a stretch as arrays. The first that is asked for is an ``Assembler``'s, the others count on from it.

    ``_slots`` hold what would be right in the first step; ``_flats`` have room for each sequence's blocks up to the end
    of the stretch, and ``_in_use`` says which of them a table names by now.
    """

    def __init__(self, seqs: Sequence[Seq], scheduler: Scheduler, n_done: int, n_left: int) -> None:
        self._seqs, self._first = seqs, n_done
        self._size = size = scheduler.config.block_tokens
        starts = [seq.n_computed + n_done for seq in seqs]
        spans = [Span(seq, start, 1, [seq]) for seq, start in zip(seqs, starts, strict=True)]
        n_groups = len(scheduler.pools)
        counters, version = scheduler.counters, scheduler.weights_version
        self._like = Assembler(scheduler.model, n_groups).step(counters.steps, version, spans, [])
        self._slots = [group.slot.copy() for group in self._like.groups]
        self._n_table = np.array([start // size + 1 for start in starts], np.int64)
        room = np.array([-(-(start + n_left) // size) for start in starts], np.int64)
        self._offset = np.cumsum(room) - room
        self._flats = [
            np.concatenate([seq.tables[g][:n] for seq, n in zip(seqs, room, strict=True)]) for g in range(n_groups)
        ]
        within = np.arange(int(room.sum())) - np.repeat(self._offset, room)
        self._in_use = within < np.repeat(self._n_table, room)
        self._tables = [group.table for group in self._like.groups]
        self._table_start = self._like.groups[0].table_start
        self._grown = False
        self._tokens, self._tokens_from = np.zeros((0, len(seqs)), np.int32), n_done

    def crossed(self, i: int, n_done: int) -> None:
        """Sequence ``i`` writes the first row of another block in step ``n_done``."""
        number = int(self._n_table[i])
        at = int(self._offset[i]) + number
        for group, (slot, flat) in enumerate(zip(self._slots, self._flats, strict=True)):
            block = int(self._seqs[i].tables[group][number])
            slot[i] = block * self._size - (n_done - self._first)
            flat[at] = block
        self._in_use[at] = True
        self._n_table[i] = number + 1
        self._grown = True

    def step(self, n_done: int, step_id: int) -> Step:
        """The step after ``n_done`` others, all of whose blocks have been told by ``crossed``."""
        like, further = self._like, n_done - self._first
        if self._grown:
            self._tables = [flat[self._in_use] for flat in self._flats]
            self._table_start = np.zeros(len(self._seqs) + 1, np.int32)
            np.cumsum(self._n_table, out=self._table_start[1:])
            self._grown = False
        groups = tuple(
            GroupStep(slot + further, self._table_start, table, one.moves, one.transfers)
            for slot, table, one in zip(self._slots, self._tables, like.groups, strict=True)
        )
        return Step(
            step_id, like.model, like.weights_version, like.bucket_T, like.bucket_S, like.n_steps, like.seq,
            like.q_start, self._tok(n_done), like.pos + further, like.parent, groups, like.out_row, like.out_seq,
            like.out_position + further, like.want, like.params_index, like.bitmask_index, like.params, like.bitmask,
            like.edit_start, like.edit_token, like.edit_kind, like.edit_value, like.score_start, like.score_token,
        )  # fmt: skip

    def _tok(self, n_done: int) -> I32:
        """(S,) the newest token of each sequence; gathered for many steps at once."""
        if n_done - self._tokens_from >= len(self._tokens):
            self._tokens_from = n_done
            rows = [seq.tokens[seq.n_computed + n_done :][:GATHERED] for seq in self._seqs]
            n = min(map(len, rows))
            self._tokens = np.stack([row[:n] for row in rows], axis=1)
        row: I32 = self._tokens[n_done - self._tokens_from]
        return row
