"""A draft model that is not here: its guesses are as right as they are said to be, its levels take what is said.

Of each output position it is drawn beforehand, from the seed and the request's id alone, how the draft's confidence is
spread over its best tokens and which of these is the true one: with the very probability that the draft gives it, so
that an ``Agreement`` whose ``sharp`` is 1 describes a draft that knows what it knows. Below a wrong guess it is as
confident as anywhere. So policies that are compared are shown the same texts.

Positions are easy or hard, in runs: published accepted lengths of chains grow nearly linearly with their length, which
independent positions do not do (AdaServe, arXiv 2501.12162, figures of its chains of 4, 6 and 8).

Shapes: n sequences, P positions, B best tokens, w nodes of a level.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tenon.engine.executors.simulated import TrueTokens
from tenon.engine.policies.calibrate import warmth
from tenon.engine.policies.forest import I32, MAX_DEPTH, Forest
from tenon.engine.policies.plan import Plan
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.sequence import Seq
from tenon.engine.speculation.drafter import Planned
from tenon.engine.step import F32
from tenon.sim.clock import VirtualClock

BEST: Final = 4
"""Tokens that are looked at below a node."""
POOL: Final = 4096
"""Spreads for what is below wrong guesses."""


@dataclass(frozen=True)
class Agreement:
    """How a draft agrees with its target. ``easy``: parameters of the Beta distribution of a request's share of easy
    positions; ``hard_run``: how many hard ones stand together in the mean; ``sure`` and ``unsure``: of the Beta
    distributions of the best token's probability at both; ``second``: what of the rest the next token has, in the mean.
    ``sharp``: the draft says p**sharp, normed, of its tokens: above 1 it is too sure of itself."""

    easy: tuple[float, float] = (12.0, 1.0)
    hard_run: float = 3.0
    sure: tuple[float, float] = (60.0, 1.0)
    unsure: tuple[float, float] = (2.0, 3.0)
    second: float = 0.5
    sharp: float = 1.0

    def spreads(self, stream: np.random.Generator, is_hard: NDArray[np.bool_]) -> F32:
        """(P, B) probabilities of the best tokens, falling; what they lack of 1 has none of them."""
        P = len(is_hard)
        best = np.where(is_hard, stream.beta(*self.unsure, P), stream.beta(*self.sure, P))
        p = np.empty((P, BEST))
        p[:, 0] = best
        left = 1 - best
        for rank in range(1, BEST):
            p[:, rank] = left * np.minimum(1, 2 * self.second * stream.random(P))
            left = left - p[:, rank]
        return -np.sort(-p, axis=1).astype(np.float32)

    def hardness(self, stream: np.random.Generator, P: int) -> NDArray[np.bool_]:
        """(P,) where a text is hard: a chain of two states."""
        easy = float(np.clip(stream.beta(*self.easy), 0.02, 0.98))
        leaves_hard = 1 / self.hard_run
        enters_hard = min(1.0, leaves_hard * (1 - easy) / easy)
        found = np.empty(P, np.bool_)
        is_hard = bool(stream.random() >= easy)
        for i, drawn in enumerate(stream.random(P).tolist()):
            found[i] = is_hard
            is_hard = drawn >= leaves_hard if is_hard else drawn < enters_hard
        return found

    def said(self, p: F32) -> F32:
        """What the draft says of tokens that have these probabilities."""
        if self.sharp == 1.0:
            return p
        rest = np.maximum(1 - p.sum(axis=-1, keepdims=True), 1e-6)
        powers, rest = p**self.sharp, rest**self.sharp
        return np.asarray(powers / (powers.sum(axis=-1, keepdims=True) + rest), np.float32)


@dataclass(frozen=True)
class SimulatedDraft:
    """What a simulation is told of the draft model: ``seconds`` of a level by its rows, how it agrees with the target,
    by SLO class ("" for all others)."""

    seconds: Callable[[int], float]
    agreement: Mapping[str, Agreement]

    def of(self, slo_class: str) -> Agreement:
        return self.agreement.get(slo_class) or self.agreement[""]


@dataclass
class _Text:
    """Of one sequence's outputs: what the draft says of its best tokens, and which of them is true (BEST: none)."""

    said_PB: F32
    true_P: NDArray[np.int8]
    tokens_P: I32
    salt: int


class SimulatedDrafter(Planned):
    """See the module's docstring."""

    name = "model"
    kinds: tuple[str, ...] = ("model",)
    beliefs: tuple[float, ...] = (0.0,)

    def __init__(
        self,
        draft: SimulatedDraft,
        plan: Plan,
        times: StepTimes,
        oracle: TrueTokens,
        clock: VirtualClock,
        vocab_size: int,
        seed: int,
    ) -> None:
        super().__init__(plan)
        self._draft, self._times, self._oracle, self._clock = draft, times, oracle, clock
        self._vocab_size, self._seed = vocab_size, seed
        self._texts: dict[int, _Text] = {}
        self._pools: dict[str, F32] = {}

    def propose(self, seqs: Sequence[Seq], depth_n: I32, room: int) -> Forest | None:
        depth, width = self.plan.choose([warmth(seq.request.add.temperature) for seq in seqs], len(seqs))
        width = min(width, BEST)
        depth = min(depth, int(depth_n.max(initial=0)), room // width if width else 0)
        if depth <= 0:
            return None
        n = len(seqs)
        texts = [self._text(seq) for seq in seqs]
        first = [seq.n_output for seq in seqs]
        said = np.stack([text.said_PB[at : at + depth] for text, at in zip(texts, first, strict=True)])
        true = np.stack([text.true_P[at : at + depth] for text, at in zip(texts, first, strict=True)])
        tokens = np.stack([text.tokens_P[at : at + depth] for text, at in zip(texts, first, strict=True)])
        pools = np.stack([self._pool(seq.request.add.slo_class) for seq in seqs]) if n else np.zeros((0, POOL, BEST))
        salt = np.array([text.salt + at for text, at in zip(texts, first, strict=True)], np.int64)

        forest = Forest.empty(n, room)
        rows = np.arange(n)[:, None]
        path, column, is_true = np.ones((n, 1)), np.full((n, 1), -1), np.ones((n, 1), np.bool_)
        for level in range(depth):
            alive = depth_n > level
            n_alive = int(np.count_nonzero(alive))
            hopes_n = path[alive].max(axis=1)
            if level and not self.plan.goes_on(hopes_n, self.counts_n[alive], n_alive * path.shape[1]):
                break
            self._spend(n_alive * path.shape[1])
            other = pools[rows, (salt[:, None] + 31 * level + 977 * (column + 2)) % POOL]
            q = np.where(is_true[:, :, None], said[:, level][:, None, :], other)
            worth = (path[:, :, None] * q).reshape(n, -1)
            best = np.argsort(-worth, axis=1, kind="stable")[:, :width]
            above, rank = best // BEST, best % BEST
            of_true = is_true[rows, above]
            is_true = of_true & (rank == true[:, level, None])
            wrong = (tokens[:, level, None] + 1 + rank + BEST * above) % self._vocab_size
            at = slice(level * width, (level + 1) * width)
            forest.token[:, at] = np.where(is_true, tokens[:, level, None], wrong)
            forest.parent[:, at] = column[rows, above]
            forest.depth[:, at] = np.where(alive[:, None], level + 1, 0)
            forest.rank[:, at], forest.q[:, at] = rank, q.reshape(n, -1)[rows, best]
            path, column = worth[rows, best], np.arange(at.start, at.stop)[None, :].repeat(n, 0)
        return forest

    def _spend(self, n_rows: int) -> None:
        taken_s = self._draft.seconds(n_rows)
        self._clock.advance(taken_s)
        self._times.tell(n_rows, n_rows, taken_s)

    def _text(self, seq: Seq) -> _Text:
        text = self._texts.get(seq.id)
        if text is None:
            add, outputs = seq.request.add, self._oracle.of(seq.id)
            agreement = self._draft.of(add.slo_class)
            salt = zlib.crc32(f"{self._seed} {add.request_id} {seq.index}".encode())
            stream = np.random.default_rng(salt)
            P = len(outputs) + MAX_DEPTH
            p_PB = agreement.spreads(stream, agreement.hardness(stream, P))
            drawn = stream.random(P)[:, None]
            true_P = (drawn >= np.cumsum(p_PB, axis=1)).sum(axis=1).astype(np.int8)
            tokens = np.concatenate([outputs, np.zeros(MAX_DEPTH, np.int32)])
            text = self._texts[seq.id] = _Text(agreement.said(p_PB), true_P, tokens, salt)
        return text

    def _pool(self, slo_class: str) -> F32:
        pool = self._pools.get(slo_class)
        if pool is None:
            agreement = self._draft.of(slo_class)
            stream = np.random.default_rng(self._seed)
            texts = [agreement.hardness(stream, 64) for _ in range(POOL // 64)]
            pool = self._pools[slo_class] = agreement.said(agreement.spreads(stream, np.concatenate(texts)))
        return pool

    def forget(self, seq: Seq) -> None:
        self._texts.pop(seq.id, None)

    def reset(self) -> None:
        """What it draws depends on seed and request alone."""

    def close(self) -> None:
        self._texts.clear()
