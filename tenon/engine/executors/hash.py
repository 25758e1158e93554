"""An executor without a model: logits are a keyed hash of the tokens that a row sees.

It reads the same ``Step`` as any other and keeps a real cache of token ids in the slots, so that whatever
goes wrong above it (a wrong slot, a stale block, a position off by one) changes its output. Tests of scheduler,
cache and server run on it without weights; steps cost microseconds.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

import numpy as np

from tenon.base.clock import SYSTEM, Clock, sleep_s
from tenon.base.errors import IntegrityError
from tenon.base.philox import derive
from tenon.engine.executors.base import Caps, Ticket
from tenon.engine.sampling import draft_rows, sample_rows
from tenon.engine.step import DRAFT, F32, HIDDEN, I32, SAMPLE, Step, StepResult
from tenon.models.spec import KVGroup

EMPTY = -7
"""What a slot holds that nothing has written to."""


BELOW = 1000.0
"""How far below the live tokens all others are."""


MOST_LAST: Final = 4096
"""Sequences whose last token is remembered: more than run at once."""


class HashExecutor:
    """``n_live`` logits per row are finite: the rest of the vocabulary is never chosen. Hidden states are ``width``
    numbers that say nothing of the logits.

    A step takes ``step_s`` of the machine's time, or as long as it needs where that is more.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        seed: int = 0,
        n_live: int = 32,
        width: int = 16,
        step_s: float = 0.0,
        clock: Clock = SYSTEM,
    ) -> None:
        self._vocab_size = vocab_size
        self._seed = seed
        self._n_live = min(n_live, vocab_size)
        self._width, self._step_s = width, step_s
        self._clock = clock
        self._slots: list[I32] = []
        self._windows: list[int | None] = []
        self._block_tokens = 0
        self._last: dict[int, int] = {}
        self._results: dict[Ticket, StepResult] = {}
        self.n_steps = 0
        self._moved = -1

    @property
    def caps(self) -> Caps:
        return Caps("hash", "cpu", "int32", trees=True, holes=True, invariant=True)

    def allocate(self, groups: tuple[KVGroup, ...], n_blocks: int) -> None:
        self._block_tokens = groups[0].block_tokens
        self._slots = [np.full(n_blocks * g.block_tokens, EMPTY, np.int32) for g in groups]
        self._windows = [g.window for g in groups]
        self._moved = -1

    def logits(self, context: I32) -> np.ndarray:
        """(V,) scores of the token after ``context``: a function of nothing else."""
        out = np.full(self._vocab_size, -np.inf, np.float32)
        rng = self._drawing(context, b"")
        live = rng.choice(self._vocab_size, self._n_live, replace=False)
        out[live] = rng.standard_normal(self._n_live, dtype=np.float32) * 2
        return out

    def _others(self, context: I32, logits_V: np.ndarray) -> np.ndarray:
        """The same with finite scores for all others too, far below: for who must choose where a mask allows few."""
        rng = np.random.default_rng(np.append(context, self._vocab_size))
        return np.maximum(logits_V, rng.standard_normal(self._vocab_size, dtype=np.float32) * 2 - BELOW)

    def hidden(self, context: I32) -> F32:
        """(M,) the last hidden state of ``context``'s last token: a function of nothing else."""
        return self._drawing(context, b"hidden").standard_normal(self._width, dtype=np.float32)

    def _drawing(self, context: I32, what: bytes) -> np.random.Generator:
        key = (self._seed % 2**64).to_bytes(8, "little")
        digest = blake2b(context.astype(np.int32).tobytes(), key=key, digest_size=16, person=what).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def submit(self, step: Step) -> Ticket:
        start_s = self._clock.now_s()
        span = np.repeat(np.arange(len(step.seq)), np.diff(step.q_start))
        tok = step.tok.copy()
        for row in np.flatnonzero(tok == -1):
            tok[row] = self._last[int(step.seq[span[row]])]
        for slots, group in zip(self._slots, step.groups, strict=True):
            if len(group.moves) and step.id != self._moved:
                slots[group.moves[:, 1]] = slots[group.moves[:, 0]]
            slots[group.slot] = tok
        if step.has_moves:
            self._moved = step.id
        rows = [self._visible(step, span, tok, int(row)) for row in step.out_row]
        n = int(np.count_nonzero(step.want != HIDDEN))
        found = [self.logits(row) for row in rows[:n]]
        for r in np.flatnonzero(step.bitmask_index >= 0):
            found[r] = self._others(rows[r], found[r])
        logits_RV = np.stack(found) if n else np.zeros((0, self._vocab_size), np.float32)
        drafts = bool(len(step.want)) and bool(step.want[0] & DRAFT)
        result = draft_rows(step, logits_RV) if drafts else sample_rows(step, logits_RV)
        for seq, token, want in zip(step.out_seq.tolist(), result.ids.tolist(), step.want.tolist(), strict=True):
            if want & SAMPLE:
                self._last.pop(seq, None)
                self._last[seq] = token
        while len(self._last) > MOST_LAST:
            del self._last[next(iter(self._last))]
        if np.any(step.want & HIDDEN):
            result.hidden = np.stack([self.hidden(rows[r]) for r in np.flatnonzero(step.want & HIDDEN)])
        if (left_s := start_s + self._step_s - self._clock.now_s()) > 0 and self._step_s:
            sleep_s(left_s)
        result.start_s, result.end_s = start_s, self._clock.now_s()
        self.n_steps += 1
        ticket = Ticket(step.id)
        self._results[ticket] = result
        return ticket

    def _visible(self, step: Step, span: np.ndarray, tok: I32, row: int) -> I32:
        """The token ids that a row sees, in position order, read back through the block tables of every group."""
        path = []
        root = row
        while step.parent[root] != -1:
            path.append(root)
            root = int(step.parent[root])
        s, p = span[row], int(step.pos[root])
        reference: I32 | None = None
        for slots, group in zip(self._slots, step.groups, strict=True):
            table = group.table[group.table_start[s] : group.table_start[s + 1]]
            positions = np.arange(p + 1)
            seen = slots[table[positions // self._block_tokens] * self._block_tokens + positions % self._block_tokens]
            seen = np.concatenate((seen, tok[path[::-1]])).astype(np.int32)
            if reference is not None and not np.array_equal(reference, seen):
                raise IntegrityError(f"groups disagree about the context of sequence {step.seq[s]}")
            reference = seen
        if reference is None or (reference == EMPTY).any():
            raise IntegrityError(f"sequence {step.seq[s]} reads a slot that nothing was written to")
        return reference

    def poll(self, ticket: Ticket) -> StepResult:
        return self._results.pop(ticket)

    def load_weights(self, path: str, version: int) -> None:
        self._seed = derive(self._seed, version)

    def close(self) -> None:
        self._slots.clear()
