"""Who computes what in the next step, and what came of it.

    schedule(now_s) -> Step    pick spans: decodes first, then running prefills, then newcomers, within one budget
    commit(step, result)       append samples, publish full blocks, fork, finish; returns what to tell callers

Order is by arrival. When blocks run out, the latest arrivals give theirs up and recompute later (their
published blocks often survive until then). A sequence preempted ``max_preemptions`` times comes back only when
all blocks it can ever need are free, takes them at once, and is left alone: preemptions per request are bounded.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from tenon.base.errors import IntegrityError, RequestError
from tenon.engine.assemble import Assembler, Span
from tenon.engine.blocks import BlockPool
from tenon.engine.chunks import Chunks
from tenon.engine.config import EngineConfig
from tenon.engine.counters import Counters
from tenon.engine.entry import enter, fork, hand_over, requested
from tenon.engine.explain import Explainer
from tenon.engine.forecasts import Forecasts
from tenon.engine.grammar import Masks, begin
from tenon.engine.guesses import draft, grow_trees, take_over
from tenon.engine.integrity import check_integrity
from tenon.engine.lane import Lane
from tenon.engine.ledger import Ledgers, nothing_known
from tenon.engine.messages import Accepted, Add, Delta, Embedded, PromptScores
from tenon.engine.pending import Pending
from tenon.engine.policies.evict import Evict
from tenon.engine.policies.order import ORDERS
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.policies.table import POLICIES
from tenon.engine.pooling import pooled, with_hidden
from tenon.engine.promises import Forecast
from tenon.engine.recompute import CostOf, alike
from tenon.engine.scoring import output_scores, told, with_scores
from tenon.engine.sequence import Request, Seq, State
from tenon.engine.speculation.speculation import Speculation
from tenon.engine.step import Step, StepResult
from tenon.engine.tables import Move, Tables
from tenon.models.spec import KVGroup

RUNNING = State.RUNNING  # looked up for each sequence in each step, which an Enum makes slow
NOBODY: list[Seq] = []
NOBODY_LATE: frozenset[int] = frozenset()
UNKNOWN_S = 1e-3
"""Of a step, before any has been seen."""
LANE_TELLS, LANE_LOOKS = 16, 4
"""Of a lane's steps one in so many is looked at for what it took: there are many of them, and they are alike. The
second is where guesses are asked for."""


def _turn(seq: Seq) -> tuple[float, int, int]:
    return seq.request.due_s, seq.request.order, seq.index


class Scheduler:
    """Owns sequences, block pools and queues of one model. Knows neither clock nor executor."""

    def __init__(
        self,
        config: EngineConfig,
        groups: tuple[KVGroup, ...],
        n_blocks: int,
        *,
        model: str,
        vocab_size: int,
        eos_ids: Iterable[int],
        max_model_len: int,
        secret: bytes,
        cost_of: CostOf = alike,
        chunks: Chunks | None = None,
        make_evict: Callable[[], Evict] | None = None,
        masks: Masks | None = None,
        speculation: Speculation | None = None,
        times: StepTimes | None = None,
    ) -> None:
        """``cost_of``: what a block at a position costs to compute once more, for policies to weigh. ``chunks``: rows
        of each step; by default the config's policy, which learns what steps take. ``make_evict``: another eviction
        policy than the config's. ``masks``: of grammars; without, no request may have one. ``speculation``: drafts what
        running sequences may say next; without, each step gives each of them one token. ``times``: how long steps take,
        where there is no ``speculation``, which has its own; without, that is learned from the first on."""
        self.config = config
        self.model = model
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(eos_ids)
        self.max_model_len = max_model_len
        self.weights_version = 0
        make_evict = make_evict or partial(POLICIES[config.evict], n_blocks)
        self.cost_of = cost_of
        pools = [BlockPool(n_blocks, config.block_tokens, make_evict, cost_of) for _ in groups]
        self.tables = Tables(pools, config.block_tokens, publishes=config.prefix_cache)
        self.speculation = speculation
        self.explain = Explainer(config.evict, cost_of, on=config.prefix_cache)
        self.requests: dict[str, Request] = {}
        self.waiting: list[Seq] = []
        self.running: list[Seq] = []
        self.counters = Counters()
        self.prompt_scores: list[PromptScores] = []
        self.embedded: list[Embedded] = []
        """Not yet taken by whoever sends them."""
        self.ledgers = Ledgers(nothing_known if speculation is None else speculation.split)
        known = StepTimes({1: UNKNOWN_S}) if times is None else times
        self.forecasts = Forecasts(known if speculation is None else speculation.times)
        self.now_s = 0.0
        self.pending = Pending()
        self.order = ORDERS[config.order]()
        self.chunks = chunks or Chunks(config, groups)
        self.secret = secret
        self._order = self._next_seq = 0
        self._spans: list[Span] = []
        self._lane: Lane | None = None
        self.tells_time = False
        """Whether what the last step took says something of steps that only decode."""
        self.prompt_spans = self.prompt_rows = 0
        """Of prompts in the last step."""
        self.masks = masks
        self._n_bound, self._late = 0, NOBODY_LATE
        """Requests with a grammar, and sequences whose mask is not there yet."""
        self._assembler = Assembler(model, len(groups), masks)

    def add(self, add: Add) -> Accepted:
        """Queue a request. Raises ``RequestError`` (or ``ContextTooLong``, ``Overloaded``) and changes nothing then."""
        if add.request_id in self.requests:
            raise RequestError(f"request id {add.request_id!r} is being served already", param="request_id")
        if add.grammar is not None:
            begin(self.masks, add)
        request = requested(self, add, self._order, self._next_seq)
        self.forecasts.admit(self, request)
        self._order, self._next_seq = self._order + 1, self._next_seq + add.n
        self.requests[add.request_id] = request
        self.ledgers.received(request.seqs[0], self.now_s, len(self.running) + len(self.waiting))
        request.due_s = self.order.due_s(self.forecasts.coming(add, self.now_s))
        insort(self.waiting, request.seqs[0], key=_turn)
        self.counters.started += 1
        self._n_bound += add.grammar is not None
        return Accepted(add.request_id, forecast=request.forecast)

    def estimate(self, add: Add) -> Forecast:
        """What might be expected of a request that came now. Raises as ``add`` does; nothing changes."""
        return self.forecasts.of(self, requested(self, add, self._order, self._next_seq).seqs[0])

    def abort(self, request_id: str, index: int = -1, *, reason: str = "abort") -> bool:
        """Drop a request, or one of its sequences, in any state and free its blocks at once; False if not served.

        ``reason`` is what the request counts as when nothing of it is left. A single sequence can be dropped once the
        prompt that it shares with its siblings is computed.
        """
        request = self.requests.get(request_id)
        dropped = [seq for seq in request.seqs if index in (-1, seq.index)] if request is not None else []
        if request is None or not dropped:
            return False
        if index >= 0 and not request.forked and request.add.n > 1:
            return False
        for seq in dropped:
            if seq.state is not State.FINISHED:
                self._leave(seq, reason)
        if request.n_unfinished == 0:
            self._end(request, reason)
        return True

    def reset(self) -> list[str]:
        """Abort everything and forget what is published; returns the ids of the dropped requests."""
        dropped = list(self.requests)
        for request_id in dropped:
            self.abort(request_id)
        for pool in self.pools:
            pool.forget()
        self.tables.moves.clear()
        if self.speculation is not None:
            self.speculation.reset()
        return dropped

    @property
    def pools(self) -> list[BlockPool]:
        """Of the KV groups."""
        return self.tables.pools

    @pools.setter
    def pools(self, pools: list[BlockPool]) -> None:
        self.tables.pools = pools

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    # -- one step -------------------------------------------------------------------------------------------

    def at(self, now_s: float) -> None:
        """What time it is: all that policies see happens then, until the next call."""
        self.now_s = now_s
        for pool in self.pools:
            pool.now_s = now_s

    def schedule(self, now_s: float) -> Step | None:
        """The next step, or None when there is nothing to compute. Blocks are reserved for all its rows."""
        self.at(now_s)
        alone = self.config.prompts == "first" and self._has_prompts()
        n_guessed = 0
        if self.speculation is not None and not alone:
            seqs = self._lane.seqs if self._lane is not None else [seq for seq in self.running if seq.is_decoding]
            # A tree may not have been in the last step where its masks were late.
            n_guessed = draft(self, self.speculation, seqs, now_s, may_have=self._n_bound > 0)
        late = self._late = self.masks.late(self.running, self.waiting) if self.masks and self._n_bound else NOBODY_LATE
        lane = self._lane if not (n_guessed or alone) else None
        if lane is not None and late and not late.isdisjoint(seq.id for seq in self.running):
            lane = None
        if lane is not None and lane.reserve(self.pools):
            self._spans = lane.spans
            if self.waiting:
                self._spans = list(lane.spans)
                self._admit(self.prompt_budget(lane.seqs, ()) - len(lane.spans))
            if self._lane is not lane:
                self._count_prompts()
                return self._assembled(self.tables.take_moves())
            self.counters.steps += 1
            self.prompt_spans = self.prompt_rows = 0
            looks = self.speculation is not None and self.speculation.looks
            self.tells_time = self.counters.steps % (LANE_LOOKS if looks else LANE_TELLS) == 0
            return self._assembler.further(self.counters.steps, self.weights_version, *lane.rows)
        self.leave_lane()
        self.pending.begin_step()
        self._spans = []
        n_preempted = self.counters.preemptions
        decodes: list[Seq] = []
        prefills: list[Seq] = []
        for seq in self.running:
            (decodes if seq.is_decoding else prefills).append(seq)
        budget = min(self.config.max_step_tokens, self.prompt_budget(decodes, prefills) + n_guessed)
        if not alone:
            budget = self._span_decodes(decodes, budget)
        for seq in prefills:  # their blocks were taken when they came in
            if budget <= 0:
                break
            if seq.state is RUNNING and seq.id not in late:
                budget -= self._span_runs(seq, budget)
        if self.counters.preemptions == n_preempted:
            self._admit(budget)
        if alone and not self._spans:
            self._span_decodes(decodes, budget)
        if n_guessed:
            grow_trees(self, self._spans)
        if not self._spans:
            if late and self.masks is not None:
                self.masks.wait()
                return None
            if self.has_work:
                raise IntegrityError("there is work, but no span could be scheduled")
            return None
        moves = self.tables.take_moves()
        self._count_prompts()
        self._lane = None if moves else Lane.open(self._spans, len(self.running))
        return self._assembled(moves)

    def _span_decodes(self, decodes: list[Seq], budget: int) -> int:
        """A row for each that has its turn; returns what is left of the budget."""
        size, late = self.config.block_tokens, self._late
        for seq in decodes:
            if budget <= 0:
                break
            if seq.state is not RUNNING or seq.id in late:
                continue
            fits = seq.n_tokens <= seq.n_blocks * size and not seq.may_share  # all but always, so it is seen here
            if fits or self._reserve(seq, seq.n_tokens):
                self._spans.append(Span(seq, seq.n_computed, 1, seq.heirs))
                budget -= 1 if seq.tree is None else 1 + len(seq.tree)
        return budget

    def _has_prompts(self) -> bool:
        """Whether a step of prompts alone has anything to compute; who waits for blocks has nothing."""
        if any(not seq.is_decoding for seq in self.running):
            return True
        n_slots = self.config.max_sequences - sum(seq.n_slots for seq in self.running)
        return bool(self.waiting) and self.waiting[0].n_slots <= n_slots and self.waiting[0].looked_up is None

    def prompt_budget(self, decodes: Sequence[Seq], prefills: Sequence[Seq]) -> int:
        """Rows of the next step, guesses aside, if these decode and these and who waits compute prompts."""
        return self.chunks.budget(decodes, prefills, self.waiting, self.now_s, self.forecasts)

    def _count_prompts(self) -> None:
        prompts = [span.n for span in self._spans if not span.seq.is_decoding]
        self.tells_time, self.prompt_spans, self.prompt_rows = not prompts, len(prompts), sum(prompts)

    def _assembled(self, moves: list[Move]) -> Step:
        self.counters.steps += 1
        step = self._assembler.step(self.counters.steps, self.weights_version, self._spans, moves)
        return with_hidden(with_scores(step, self._spans), self._spans)

    def leave_lane(self) -> None:
        """What runs has changed, or is taken further by somebody else: the next step is looked for anew."""
        if self._lane is not None:
            self._lane.settle()
            self._lane = None

    def _admit(self, budget: int) -> None:
        for seq in [seq for seq in self.waiting if seq.id not in self._late] if self._late else list(self.waiting):
            if budget <= 0:
                return
            if self.running and sum(s.n_slots for s in (seq, *self.running)) > self.config.max_sequences:
                return
            if not enter(self, seq):
                return
            self.ledgers.entered(seq, self.now_s, self.explain.evicted(seq))
            self.waiting.remove(seq)
            budget -= self._span_runs(seq, budget)

    def _span_runs(self, seq: Seq, budget: int) -> int:
        """Spans of what the sequence can compute next, at most ``budget`` rows of it; returns how many they are."""
        n_rows = 0
        for start, n in self.pending.runs(seq, budget):
            self._spans.append(Span(seq, start, n, seq.heirs if start + n == seq.n_tokens else NOBODY))
            n_rows += n
        return n_rows

    def _reserve(self, seq: Seq, n_tokens: int) -> bool:
        """Blocks for positions up to ``n_tokens``, the one written next private; preempts later arrivals for it."""
        while (n_lacking := self.tables.n_lacking(seq, n_tokens)) > self.tables.n_available:
            victim = self._victim(seq)
            if victim is None:
                return False
            self._preempt(victim)
        if n_lacking:
            self.tables.reserve(seq, n_tokens)
        seq.may_share = False
        return True

    def _victim(self, seq: Seq) -> Seq | None:
        """The latest arrival after ``seq`` that is neither in this step nor pinned."""
        scheduled = {span.seq.id for span in self._spans}
        for other in reversed(self.running):
            if other is seq:
                return None
            if other.id not in scheduled and not other.pinned:
                return other
        return None

    def _preempt(self, seq: Seq) -> None:
        self.leave_lane()
        self.ledgers.preempted(seq)
        self.pending.leave(seq)
        self.tables.release(seq)
        self.running.remove(seq)
        seq.state = State.WAITING
        seq.n_computed = seq.n_published = 0
        seq.ahead, seq.looked_up, seq.tree = [], None, None
        seq.n_preempted += 1
        self.counters.preemptions += 1
        insort(self.waiting, seq, key=_turn)

    def commit(self, step: Step, result: StepResult) -> list[Delta]:
        """Take over the step's samples. Sequences aborted since then are passed over."""
        failed, ids, size = result.errors, result.ids.tolist(), self.config.block_tokens
        if self.masks is not None and self._n_bound:
            failed = failed | self.masks.take_failed()
        if self._lane is not None and self._lane.further:
            self.ledgers.stepped_alike(result.end_s, len(ids))
        else:
            late = [seq for seq in self.running if seq.id in self._late] if self._late else NOBODY
            self.ledgers.stepped(self.now_s, result.end_s, self._spans, late)
        if self._lane is not None and not failed:
            return self._commit_lane(self._lane, ids, result)
        self.leave_lane()
        if len(step.score_token):
            self.prompt_scores += told(self._spans, result)
        deltas: list[Delta] = []
        row = n_new = n_prompted = 0
        for span in self._spans:
            seq, targets = span.seq, span.targets
            fails = seq.id in failed
            # Where somebody who was to compute what is below these rows in this step did not, they come to nothing.
            if seq.state is not RUNNING or fails or span.start != seq.n_computed:
                row += span.n_outputs
                if fails and seq.state is RUNNING:
                    deltas.extend(self._fail(seq.request, failed[seq.id]))
                continue
            seq.tree = None  # whether it was in the step or not
            if span.tree is not None:
                tokens, rows = take_over(self, seq, span.tree, ids[row : row + span.n])
                self.ledgers.gained(seq, len(tokens))
                deltas.append(self._tell(seq, tokens, [row + one for one in rows], result))
                if seq.state is RUNNING:
                    self.tables.trim(seq)
                row += span.n
                n_new += len(tokens)
                continue
            seq.computed_to(span.start + span.n)
            if seq.n_computed >= (seq.n_published + 1) * size:
                self.tables.publish(seq)
            if seq.claimed:
                hand_over(self, seq)
            if seq.n_tokens == seq.n_prompt:
                n_prompted += len(targets)
            if len(targets) > 1:
                fork(self, seq)
            for target in targets:
                deltas.append(self._append(target, ids[row], row, result))
                row += 1
            n_new += len(targets)
        for done in pooled(step, self._spans, result):
            self.abort(done.request_id, reason="stop")
            self.embedded.append(done)
        self.counters.output_tokens += n_new
        n_decodes, n_rows = len(self._spans) - self.prompt_spans, step.n_rows - self.prompt_rows
        drafting_s = 0.0 if self.speculation is None else self.speculation.drafting_s
        self.forecasts.stepped(n_decodes, n_rows, n_new - n_prompted, self.prompt_rows, drafting_s)
        self._spans = []
        return deltas

    def _commit_lane(self, lane: Lane, ids: list[int], result: StepResult) -> list[Delta]:
        """``commit`` where every running sequence had one row and nobody left since."""
        lane.tok_S = result.ids.astype(np.int32)
        to_look_at = set(lane.to_look_at(ids))
        for seq, token in zip(lane.seqs, ids, strict=True):
            n_tokens = seq.n_computed = seq.n_tokens
            seq.tokens[n_tokens] = token
            seq.n_tokens = n_tokens + 1
        deltas = lane.deltas(ids)
        full = lane.full
        for row in sorted(to_look_at.union(full)) if to_look_at else full:
            if row in full:
                self.tables.publish(lane.seqs[row])
            if row in to_look_at:
                deltas[row] = self._tell(lane.seqs[row], (ids[row],), (row,), result)
        self.counters.output_tokens += len(ids)
        self.forecasts.stepped_alike(len(ids))
        self._spans = []
        return deltas

    def _append(self, seq: Seq, token: int, r: int, result: StepResult) -> Delta:
        """Output ``r`` of the step was ``token``, and it is this sequence's."""
        seq.tokens[seq.n_tokens], seq.n_tokens = token, seq.n_tokens + 1
        return self._tell(seq, (token,), (r,), result)

    def _tell(self, seq: Seq, tokens: tuple[int, ...], outputs: Sequence[int], result: StepResult) -> Delta:
        """What the newest tokens, those of these ``outputs``, mean for their sequence, which ends with some."""
        request = seq.request
        add = request.add
        if seq.first_s is None:
            seq.first_s, seq.first_n = result.end_s, seq.n_output
        token = tokens[-1]  # those before it were guessed, which is never done of one that ends a sequence
        stops = token in request.stop_ids
        if not stops and seq.n_tokens - seq.n_prompt < add.max_tokens and add.n_logprobs < 0:
            return Delta(add.request_id, seq.index, tokens, cached_tokens=request.cached_tokens)
        reason = "stop" if stops else "length" if seq.n_output >= add.max_tokens else None
        logprobs, top = output_scores(result, outputs, add.n_logprobs)
        if reason is not None:
            self._leave(seq, reason)
            if request.n_unfinished == 0:
                self._end(request, reason)
        stop_id = token if stops else None
        return Delta(add.request_id, seq.index, tokens, reason, stop_id, logprobs, top, request.cached_tokens)

    def _fail(self, request: Request, message: str) -> list[Delta]:
        lost = [seq for seq in request.seqs if seq.state is not State.FINISHED]
        for seq in lost:
            self._leave(seq, "error")
        self._end(request, "error")
        return [Delta(request.add.request_id, seq.index, (), "error", error=message) for seq in lost]

    # -- endings --------------------------------------------------------------------------------------------

    def _leave(self, seq: Seq, reason: str) -> None:
        ledger = self.ledgers.ended(seq, reason)
        if ledger is not None:
            self.forecasts.ended(seq, ledger)
        if seq.state is RUNNING:
            self.leave_lane()
            self.pending.leave(seq)
            self.tables.release(seq)
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        seq.state, seq.tree = State.FINISHED, None
        if self.speculation is not None:
            self.speculation.forget(seq)

    def _end(self, request: Request, reason: str) -> None:
        del self.requests[request.add.request_id]
        self.order.ended(request.add.tenant)
        self._n_bound -= request.add.grammar is not None
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def check_integrity(self) -> None:
        """Conservation of blocks, requests and queues. Raises ``IntegrityError``."""
        check_integrity(self)
