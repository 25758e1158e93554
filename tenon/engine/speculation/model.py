"""A draft model: smaller, of the same vocabulary, with keys and values of its own.

Level by level it guesses the likeliest tokens below the likeliest nodes (a beam of a fixed width). What is likely is
judged with the very noise that the target's sampling will add at that position: at temperature 0 that is none, and at
any other both models then tend to the same token far more often than two independent draws would. What is emitted does
not depend on it, for that is the target's sample whatever was guessed.

    resident    [ K and V of the sequence's tokens ...... ) [ of the levels, after a guess ]
                                                n_computed  n_tokens

Rows that were skipped (steps without a guess, tokens that nobody guessed) are caught up with the next guess. A tree's
rows are computed anew with each of its levels: the launch is what a level costs, not its rows. Of a chain, and of a
tree that came true, what was computed stays.

Shapes: n sequences, R outputs, k best tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from tenon.base.clock import Clock
from tenon.engine.assemble import Assembler, Span
from tenon.engine.blocks import BlockPool
from tenon.engine.executors.base import Executor
from tenon.engine.pending import Pending
from tenon.engine.policies.calibrate import warmth
from tenon.engine.policies.forest import I32, Forest
from tenon.engine.policies.plan import Plan
from tenon.engine.policies.recency import Lru
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.reuse import hold, resident, runs_of
from tenon.engine.sequence import Seq
from tenon.engine.speculation.drafter import Planned
from tenon.engine.speculation.tree import ROOT, Tree
from tenon.engine.step import DRAFT, F32, Step
from tenon.engine.tables import Tables
from tenon.models.spec import KVGroup

CATCH_UP_ROWS: Final = 512
"""In one round, of all sequences: a long prompt is caught up with over several."""
MOST_BEST: Final = 4
"""Tokens that are looked at below each node."""
NOBODY: list[Seq] = []


@dataclass
class _Beam:
    """A tree as it grows."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    qs: list[float] = field(default_factory=list)
    paths: list[float] = field(default_factory=list)
    frontier: list[int] = field(default_factory=lambda: [ROOT])

    def grow(self, ids_k: list[list[int]], q_k: list[list[float]], width: int, most: int) -> None:
        """The ``width`` likeliest nodes below the frontier, of which row i of the arguments has the best tokens; no
        more than ``most`` nodes in all."""
        depth = (self.depths[-1] if self.depths else 0) + 1
        found = [
            ((self.paths[node] if node != ROOT else 1.0) * q, node, rank, token, q)
            for node, ids, qs in zip(self.frontier, ids_k, q_k, strict=True)
            for rank, (token, q) in enumerate(zip(ids, qs, strict=True))
            if token >= 0
        ]
        found.sort(key=lambda each: -each[0])
        first = len(self.tokens)
        for path, node, rank, token, q in found[: min(width, most - first)]:
            self.tokens.append(token)
            self.parents.append(node)
            self.depths.append(depth)
            self.ranks.append(rank)
            self.qs.append(q)
            self.paths.append(path)
        self.frontier = list(range(first, len(self.tokens)))


class _Twin:
    """A sequence as the draft model has it: the same tokens, other blocks."""

    def __init__(self, seq: Seq, n_groups: int, block_tokens: int, max_tree: int) -> None:
        self.seq = seq
        self.own = own = Seq(seq.id, seq.request, seq.index, n_groups, block_tokens, max_tree)
        own.tokens, own.digests = seq.tokens, seq.digests
        own.edits = own.binding = None
        self.beam = _Beam()
        self.n_levels = 0
        """Levels of the beam whose rows are computed, beyond ``n_computed``."""
        self.is_chain = False


class DraftModel(Planned):
    """Raises as its executor does. ``vocab_size`` is the target's: what it cannot say is not guessed; nothing is beyond
    ``max_len`` tokens either, which the draft model has no positions for."""

    name = "model"
    kinds: tuple[str, ...] = ("model",)
    beliefs: tuple[float, ...] = (0.0,)

    def __init__(
        self,
        executor: Executor,
        groups: Sequence[KVGroup],
        n_blocks: int,
        vocab_size: int,
        max_len: int,
        plan: Plan,
        times: StepTimes,
        clock: Clock,
    ) -> None:
        super().__init__(plan)
        self._executor, self._vocab_size, self._max_len = executor, vocab_size, max_len
        self.times, self._clock = times, clock
        self._size = groups[0].block_tokens
        pools = [BlockPool(n_blocks, self._size, Lru) for _ in groups]
        for pool in pools:
            pool.log.stop()
        self.tables = Tables(pools, self._size, publishes=True)
        self._assembler = Assembler("draft", len(groups))
        self._twins: dict[int, _Twin] = {}
        self._nobody_else = Pending()
        self.n_steps = self._n_rows = 0

    def propose(self, seqs: Sequence[Seq], depth_n: I32, room: int) -> Forest | None:
        deepest = int(depth_n.max(initial=0))
        warm = [warmth(seq.request.add.temperature) for seq in seqs]
        depth, width = self.plan.choose(warm, len(seqs))
        if (depth := min(depth, deepest)) <= 0:
            return None
        for pool in self.tables.pools:
            pool.now_s = self._clock.now_s()
        begin_s = self._clock.now_s()
        ready = self._catch_up(seqs, depth_n, room, width)
        begin_s = self._tell(begin_s)
        for level in range(2, depth + 1):
            ready = [
                twin for twin in ready if depth_n[self._row[twin.seq.id]] >= level and len(twin.beam.tokens) < room
            ]
            ready = [twin for twin in ready if twin.beam.frontier]
            if not ready:
                break
            hopes_n = np.array([max(twin.beam.paths[node] for node in twin.beam.frontier) for twin in ready])
            counts_n = self.counts_n[[self._row[twin.seq.id] for twin in ready]]
            if not self.plan.goes_on(hopes_n, counts_n, sum(len(twin.beam.frontier) for twin in ready)):
                break
            self._level(ready, level, width, room)
            begin_s = self._tell(begin_s)
        return self._forest(seqs, room)

    def _tell(self, begin_s: float) -> float:
        """A level has taken the time since then, all that belongs to it included; returns what time it is."""
        end_s = self._clock.now_s()
        self.times.tell(self._n_rows, self._n_rows, end_s - begin_s)
        return end_s

    # -- one round ------------------------------------------------------------------------------------------

    def _catch_up(self, seqs: Sequence[Seq], depth_n: I32, room: int, width: int) -> list[_Twin]:
        """The first level, with all rows that are not there yet. Returns those who have come to it."""
        self._row = {seq.id: i for i, seq in enumerate(seqs)}
        spans: list[Span] = []
        ready: list[_Twin] = []
        left = CATCH_UP_ROWS
        for i, seq in enumerate(seqs):
            twin = self._twin(seq, room)
            twin.beam = _Beam()
            own = twin.own
            if depth_n[i] <= 0 or left <= 0 or own.n_tokens + depth_n[i] > self._max_len:
                continue
            n = min(own.n_tokens - own.n_computed, left)
            end = own.n_computed + n
            if self.tables.room(own, end) < end:
                continue  # there are no blocks for it: nothing is guessed
            left -= n
            is_ready = end == own.n_tokens
            spans.append(Span(own, own.n_computed, n, [own] if is_ready else NOBODY))
            if is_ready:
                ready.append(twin)
        if not spans:
            return []
        best = self._run(spans)
        for span in spans:
            span.seq.computed_to(span.start + span.n)
            self.tables.publish(span.seq)
        self._grow(ready, best, width, room)
        return ready

    def _level(self, twins: list[_Twin], level: int, width: int, room: int) -> None:
        """One level more."""
        spans: list[Span] = []
        keep: list[int] = []
        able: list[_Twin] = []
        n_outputs = 0
        for twin in twins:
            own, beam = twin.own, twin.beam
            n_nodes = len(beam.tokens)
            if self.tables.room(own, own.n_tokens + n_nodes) < own.n_tokens + n_nodes:
                beam.frontier = []
                continue
            able.append(twin)
            if width == 1:
                own.tokens[own.n_tokens + level - 2] = beam.tokens[-1]
                spans.append(Span(own, own.n_tokens + level - 2, 1, [own]))
                keep.append(n_outputs)
                n_outputs += 1
            else:
                tree = Tree(beam.tokens[:], beam.parents[:])
                spans.append(Span(own, own.n_tokens - 1, 1 + n_nodes, [own], tree))
                keep += [n_outputs + 1 + node for node in beam.frontier]
                n_outputs += 1 + n_nodes
            twin.n_levels, twin.is_chain = level - 1, width == 1
        if able:
            self._grow(able, self._run(spans, keep), width, room)

    def _run(self, spans: list[Span], keep: list[int] | None = None) -> tuple[I32, F32]:
        """The step of ``spans``: (R, k) the best tokens of its outputs, or of those in ``keep``, and their scores."""
        self.n_steps += 1
        step = self._assembler.step(self.n_steps, 0, spans, self.tables.take_moves())
        step = drafting(step, MOST_BEST, keep)
        result = self._executor.poll(self._executor.submit(step))
        self._n_rows = step.n_rows
        return np.where(result.top_ids < self._vocab_size, result.top_ids, -1), result.top_logprobs

    def _grow(self, twins: list[_Twin], best: tuple[I32, F32], width: int, room: int) -> None:
        """Each one's beam, by the outputs of its frontier."""
        ids_Rk, scores_Rk = best
        at = 0
        for twin in twins:
            n = len(twin.beam.frontier)
            scores_k = scores_Rk[at : at + n].astype(np.float64)
            ids_k = ids_Rk[at : at + n]
            at += n
            x_k = np.where((ids_k >= 0) & ~np.isnan(scores_k), scores_k, -1e30)
            if twin.own.request.add.temperature > 0:  # scores with noise: shares among the best
                q_k = np.exp(x_k - x_k.max(1, keepdims=True))
                q_k /= q_k.sum(1, keepdims=True)
            else:
                q_k = np.exp(x_k)
            twin.beam.grow(ids_k.tolist(), q_k.tolist(), width, room)

    def _forest(self, seqs: Sequence[Seq], room: int) -> Forest | None:
        forest = None
        for i, seq in enumerate(seqs):
            beam = self._twins[seq.id].beam
            n = len(beam.tokens)
            if n:
                forest = forest or Forest.empty(len(seqs), room)
                forest.token[i, :n], forest.parent[i, :n], forest.depth[i, :n] = beam.tokens, beam.parents, beam.depths
                forest.rank[i, :n], forest.q[i, :n] = beam.ranks, beam.qs
        return forest

    # -- sequences ------------------------------------------------------------------------------------------

    def _twin(self, seq: Seq, room: int) -> _Twin:
        """The sequence's, up to its present tokens: of what was computed ahead, what came true stays."""
        twin = self._twins.get(seq.id)
        if twin is None:
            twin = self._twins[seq.id] = _Twin(seq, len(self.tables.pools), self._size, room)
            twin.own.n_tokens = seq.n_tokens
            self._enter(twin.own)
            return twin
        self._settle(twin)
        return twin

    def _enter(self, own: Seq) -> None:
        """Take over the blocks that are resident at the beginning of its context."""
        pools = self.tables.pools
        cached, _ = resident(own, pools, self._nobody_else, gaps=False)
        hold(own, pools, cached, {}, len(cached))
        own.ahead = runs_of(cached, self._size)
        own.computed_to(0)
        own.n_published = own.n_computed // self._size

    def _settle(self, twin: _Twin) -> None:
        own, beam, first = twin.own, twin.beam, twin.own.n_tokens
        actual = twin.seq.tokens[first : twin.seq.n_tokens].tolist()
        own.n_tokens = twin.seq.n_tokens
        if own.n_computed == first and twin.n_levels:  # it had come to its newest token
            at, n_true = ROOT, 0
            for token in actual[:-1]:  # of the newest the logits are wanted
                child = next(
                    (i for i, parent in enumerate(beam.parents) if parent == at and beam.tokens[i] == token), None
                )
                if child is None or beam.depths[child] > twin.n_levels:
                    break
                if not twin.is_chain and child != n_true:
                    self.tables.move(own, first + child, first + n_true)
                at, n_true = child, n_true + 1
            own.computed_to(first + n_true)
            self.tables.publish(own)
        if own.n_computed == own.n_tokens:  # nothing has come since
            own.computed_to(own.n_tokens - 1)
        twin.n_levels = 0
        self.tables.trim(own)

    def forget(self, seq: Seq) -> None:
        twin = self._twins.pop(seq.id, None)
        if twin is not None:
            self.tables.release(twin.own)

    def reset(self) -> None:
        for twin in self._twins.values():
            self.tables.release(twin.own)
        self._twins.clear()
        self.tables.moves.clear()
        for pool in self.tables.pools:
            pool.forget()

    def close(self) -> None:
        self.reset()
        self._executor.close()

    def check_integrity(self) -> None:
        """Raises ``IntegrityError``."""
        for group, pool in enumerate(self.tables.pools):
            pool.check_integrity([twin.own.tables[group][: twin.own.n_blocks] for twin in self._twins.values()])


def drafting(step: Step, k: int, keep: Sequence[int] | None = None) -> Step:
    """The step with the ``k`` best tokens wanted of its outputs, or of those in ``keep``, instead of samples."""
    which = np.arange(step.n_outputs) if keep is None else np.array(keep, np.int64)
    R = len(which)
    return replace(
        step,
        out_row=step.out_row[which],
        out_seq=step.out_seq[which],
        out_position=step.out_position[which],
        want=np.full(R, DRAFT, np.uint8),
        params_index=step.params_index[which],
        bitmask_index=np.full(R, -1, np.int32),
        params=replace(step.params, n_logprobs=np.full(len(step.params.seed), k, np.int32)),
        edit_start=np.zeros(R + 1, np.int32),
        score_start=np.zeros(R + 1, np.int32),
    )
