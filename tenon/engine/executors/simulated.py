"""An executor that computes nothing: a step takes the time that a cost model gives it, on a virtual clock, and an
oracle knows the tokens that come of it.

Everything above it (scheduler, cache, sampling rules, metrics) is the code that serves. No torch.

Shapes: S spans, R outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, Protocol

import numpy as np

from tenon.base.errors import IntegrityError
from tenon.cost.work import StepShape, step_shape
from tenon.engine.executors.base import Caps, Ticket
from tenon.engine.step import F32, HIDDEN, I32, I64, Step, StepResult
from tenon.models.spec import KVGroup
from tenon.sim.clock import VirtualClock

StepCost = Callable[[StepShape], float]
"""Seconds that a device needs for a step of this shape."""

_NO_I64: Final[I64] = np.zeros(0, np.int64)


class Oracle(Protocol):
    """Knows what a model would have said."""

    def answer(self, step: Step) -> tuple[I32, dict[int, str]]:
        """(R,) the true token of each output, and what went wrong with which sequence.

        Raises ``IntegrityError`` for a sequence that nothing is known of.
        """
        ...


class TrueTokens:
    """The oracle of a trace: each sequence's whole output, told when it is queued and forgotten when it has ended."""

    def __init__(self) -> None:
        self._arrays: dict[int, I32] = {}
        self._lists: dict[int, list[int]] = {}  # the same: a list gives single items sooner

    def tell(self, seq: int, tokens: I32) -> None:
        """From now on output ``i`` of ``seq`` is ``tokens[i]``."""
        self._arrays[seq], self._lists[seq] = tokens, tokens.tolist()

    def forget(self, seq: int) -> None:
        """Raises ``KeyError`` for a sequence that is not known."""
        del self._arrays[seq], self._lists[seq]

    def of(self, seq: int) -> I32:
        """All outputs of ``seq``, to be read only. Raises ``IntegrityError`` for one that is not known."""
        try:
            return self._arrays[seq]
        except KeyError:
            raise IntegrityError(f"the oracle was not told what sequence {seq} answers") from None

    def answer(self, step: Step) -> tuple[I32, dict[int, str]]:
        if len(step.score_token):
            raise IntegrityError("the oracle knows what sequences answer, not how likely their prompts are")
        if (step.want & HIDDEN).any():
            raise IntegrityError("the oracle knows what sequences answer, and no hidden states")
        lists = self._lists
        where = zip(step.out_seq.tolist(), step.out_position.tolist(), strict=True)
        try:
            return np.array([lists[seq][position] for seq, position in where], np.int32), {}
        except (KeyError, IndexError):
            for seq, position in zip(step.out_seq.tolist(), step.out_position.tolist(), strict=True):
                known = len(self.of(seq))
                if position >= known:
                    raise IntegrityError(f"sequence {seq} is asked for output {position}, it has {known}") from None
            raise


def decoding_shape(seen: I64, windows: Sequence[int | None]) -> StepShape:
    """``step_shape`` of a row a span, without its detours; ``seen`` (S,) are the positions that each row sees."""
    S, total, most = len(seen), int(seen.sum()), int(seen.max())
    reads, largest = [], []
    for window in windows:
        reads.append(total if window is None else int(np.minimum(seen, window).sum()))
        largest.append(most if window is None else min(most, window))
    return StepShape(S, S, S, tuple(reads), tuple(reads), tuple(largest))


@lru_cache(maxsize=256)
def _unknown(R: int, k: int) -> tuple[F32, I32, F32]:
    """Log-probabilities, best ids (R, k) and theirs, of which nothing is known. Nobody writes to a result's arrays."""
    return np.full(R, np.nan, np.float32), np.full((R, k), -1, np.int32), np.full((R, k), np.nan, np.float32)


class SimulatedExecutor:
    """``cost`` moves ``clock`` forward at ``submit``; ``oracle`` says what was sampled. Log-probabilities are NaN,
    hidden states of no width.

    ``watch`` is shown every step before it is computed.
    """

    def __init__(
        self,
        cost: StepCost,
        oracle: Oracle,
        clock: VirtualClock,
        *,
        device: str,
        dtype: str,
        watch: Callable[[Step], None] | None = None,
    ) -> None:
        self._cost, self._oracle, self._clock = cost, oracle, clock
        self.watch = watch
        self.n_rows = 0
        """Of the last step."""
        self._caps = Caps("simulated", device, dtype, trees=True, holes=True, invariant=True)
        self.windows: tuple[int | None, ...] = ()
        """Of the KV groups, once they are allocated."""
        self._results: dict[Ticket, StepResult] = {}

    @property
    def caps(self) -> Caps:
        return self._caps

    def allocate(self, groups: tuple[KVGroup, ...], n_blocks: int) -> None:
        self.windows = tuple(group.window for group in groups)

    def seconds(self, shape: StepShape) -> float:
        """The cost of a step. Raises ``IntegrityError`` where it is none."""
        seconds = self._cost(shape)
        if not 0 <= seconds < math.inf:
            raise IntegrityError(f"the cost model gives {seconds} s for {shape}")
        return seconds

    def spend(self, shape: StepShape) -> float:
        """Move the clock by the cost of a step. Returns it, in seconds. Raises as ``seconds`` does."""
        seconds = self.seconds(shape)
        self._clock.advance(seconds)
        return seconds

    def submit(self, step: Step) -> Ticket:
        if self.watch is not None:
            self.watch(step)
        ids, errors = self._oracle.answer(step)
        self.n_rows = step.n_rows
        start_s = self._clock.now_s()
        if step.n_rows == len(step.seq) == step.n_outputs:
            self.spend(decoding_shape(step.pos.astype(np.int64) + 1, self.windows))
        else:
            self.spend(step_shape(step.pos, step.q_start, step.n_outputs, self.windows))
        ticket = Ticket(step.id)
        self._results[ticket] = StepResult(
            ids,
            *_unknown(step.n_outputs, max(0, int(step.params.n_logprobs.max(initial=-1)))),
            scores=np.full(len(step.score_token), np.nan, np.float32),
            ranks=np.zeros(len(step.score_token), np.int32),
            hidden=np.zeros((int(np.count_nonzero(step.want & HIDDEN)), 0), np.float32),
            transfers_done=_NO_I64,
            start_s=start_s,
            end_s=self._clock.now_s(),
            errors=errors,
        )
        return ticket

    def poll(self, ticket: Ticket) -> StepResult:
        return self._results.pop(ticket)

    def load_weights(self, path: str, version: int) -> None:
        """Nothing to load: what a model says is the oracle's."""

    def close(self) -> None:
        if self._results:
            raise IntegrityError(f"{len(self._results)} submitted steps were never polled")
