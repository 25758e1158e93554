"""Forecasts of a scheduler's requests: what its state says, what came of them, and who cannot be promised what he asks.

A request with an ``Slo`` gets one when it comes. Where it says that what is asked for cannot be kept, a strict request
is refused, with the time after which it might be; any other is served as well as can be, and told so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from tenon.base.errors import Overloaded
from tenon.engine.messages import Add
from tenon.engine.policies.forecast import Expected, Learned, Lengths, Outlook, forecast
from tenon.engine.policies.order import Coming
from tenon.engine.policies.speculate import usual_s
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.promises import OUT_OF_REACH, Forecast, Ledger, Slo
from tenon.engine.reuse import resident
from tenon.engine.sequence import Request, Seq

if TYPE_CHECKING:
    from tenon.engine.scheduler import Scheduler

RATE: Final = 0.01
"""Of the averages of what a sequence gets of a step, of what prompts add to one, of how many decode."""
NOTHING: Final = Slo()
LEAST_RETRY_S: Final = 1.0
PIECE_ROWS: Final = 256
"""Of a prompt, what its rows are priced by."""


@dataclass(slots=True)
class Usual:
    """Of steps, in the average: how many decode, tokens and rows of each, rows of prompts, a draft model's seconds."""

    decodes: float = 0.0
    per_step: float = 1.0
    rows_each: float = 1.0
    prompt_rows: float = 0.0
    drafting_s: float = 0.0

    def take(self, rate: float, decodes: int, rows: int, tokens: int, prompt_rows: int, drafting_s: float) -> None:
        self.drafting_s += rate * (drafting_s - self.drafting_s)
        self.prompt_rows += rate * (prompt_rows - self.prompt_rows)
        self.decodes += rate * (decodes - self.decodes)
        if decodes:
            self.per_step += rate * (tokens / decodes - self.per_step)
            self.rows_each += rate * (rows / decodes - self.rows_each)


class Forecasts:
    """Of one scheduler. ``times`` say what steps take."""

    def __init__(self, times: StepTimes) -> None:
        self.times = times
        self.lengths = Lengths()
        self.ttft, self.tpot = Learned(), Learned()
        self._usual = Usual()
        self._n_alike = self._alike_of = 0
        """Steps of so many decodes alone that have not been averaged yet."""

    # -- what steps and endings say ------------------------------------------------------------------------

    def step_s(self, n_decodes: int, prompt_rows: int) -> float:
        """Of a step of so many decodes, with guesses as there have been lately, and so many rows of prompts."""
        usual = self.usual
        rows = round(n_decodes * usual.rows_each)
        return usual.drafting_s + usual_s(self.times, max(1, n_decodes), rows, prompt_rows)

    def stepped(self, n_decodes: int, n_rows: int, n_tokens: int, prompt_rows: int, drafting_s: float = 0.0) -> None:
        """A step of so many decodes had so many rows of theirs, brought them ``n_tokens``, and computed prompts; a
        draft model took so long before it."""
        self.usual.take(RATE, n_decodes, n_rows, n_tokens, prompt_rows, drafting_s)

    def stepped_alike(self, n_decodes: int) -> None:
        """A step of so many decodes, and nothing else. There are many of them."""
        if n_decodes != self._alike_of:
            self._average()
            self._alike_of = n_decodes
        self._n_alike += 1

    @property
    def usual(self) -> Usual:
        """What steps have been like lately."""
        if self._n_alike:
            self._average()
        return self._usual

    def _average(self) -> None:
        n = self._alike_of
        self._usual.take(1 - (1 - RATE) ** self._n_alike, n, n, n, 0, 0.0)
        self._n_alike = 0

    def ended(self, seq: Seq, ledger: Ledger) -> None:
        """Learn from a sequence that ended by itself."""
        if ledger.reason not in ("stop", "length"):
            return
        self.lengths.add(seq.n_output)
        told = seq.request.forecast
        if told is None or ledger.first_s is None or ledger.index:
            return
        self.ttft.hear(told.ttft_s, told.ttft_factor, ledger.first_s - ledger.received_s)
        if seq.n_output > seq.first_n:
            each_s = (ledger.end_s - ledger.first_s) / (seq.n_output - seq.first_n)
            self.tpot.hear(told.tpot_s, told.tpot_factor, each_s)

    # -- what may be expected ------------------------------------------------------------------------------

    def of(self, scheduler: Scheduler, seq: Seq) -> Forecast:
        """Of a sequence that has just come, or might. Nothing changes."""
        hit = 0
        if scheduler.config.prefix_cache and seq.reads_cache:
            gaps = scheduler.config.reuse == "blocks"
            found, awaited = resident(seq, scheduler.pools, scheduler.pending, gaps=gaps)
            hit = (len(found) + len(awaited)) * seq.block_tokens
        expected = forecast(self._outlook(scheduler, seq), max(1, seq.n_tokens - hit), self.times)
        factors = self.ttft.factor, self.tpot.factor
        ttft_s, tpot_s = expected.ttft_s * factors[0], expected.tpot_s * factors[1]
        slo = seq.request.add.slo
        confidences = [one for one in (self.ttft.confidence, self.tpot.confidence) if one is not None]
        return Forecast(
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            hit_tokens=hit,
            confidence=min(confidences) if confidences else None,
            meets=slo is None or _meets(slo, ttft_s, tpot_s),
            retry_after_s=0.0 if slo is None else self._retry_after_s(slo, expected, ttft_s, tpot_s),
            ttft_factor=factors[0],
            tpot_factor=factors[1],
        )

    def coming(self, add: Add, now_s: float) -> Coming:
        """A request as those see it who decide about turns. It costs about what its prompt's rows take, and its tokens'
        part of steps among those who decode now."""
        slo = add.slo or NOTHING
        usual = self.usual
        n = max(1, round(usual.decodes))
        step_s = self.times.plain(n)
        row_s = float(self.times.prompts(np.array([n]), PIECE_ROWS)[0]) / PIECE_ROWS
        n_tokens = self.lengths.left(0, add.max_tokens)
        cost_s = len(add.prompt) * row_s + add.n * n_tokens / usual.per_step * step_s / n
        return Coming(now_s, add.tenant, cost_s, slo.weight, slo.ttft_s)

    def admit(self, scheduler: Scheduler, request: Request) -> None:
        """Give a request that is promised something its forecast. Raises ``Overloaded`` for a strict one whose promise
        could not be kept."""
        add = request.add
        if add.slo is None or not add.slo.promises:
            return
        told = request.forecast = self.of(scheduler, request.seqs[0])
        if add.slo.strict and not (told.meets or add.again):
            after_s = max(LEAST_RETRY_S, told.retry_after_s)
            raise Overloaded(_said(add, told), retry_after_s=after_s, code=OUT_OF_REACH)

    def _outlook(self, scheduler: Scheduler, new: Seq) -> Outlook:
        running = scheduler.running
        left = [
            self.lengths.left(seq.n_output, seq.request.add.max_tokens) for seq in running if seq.is_decoding
        ]  # fmt: skip
        others = [seq for seq in (*running, *scheduler.waiting) if not seq.is_decoding and seq is not new]
        n_slots = scheduler.config.max_sequences - sum(seq.n_slots for seq in running)
        waiting = [seq for seq in scheduler.waiting if seq is not new]
        usual = self.usual
        room = max(1, scheduler.config.max_step_tokens - len(left))
        return Outlook(
            left=left,
            rows_ahead=sum(seq.n_tokens - seq.n_computed for seq in others),
            n_ahead=sum(seq.n_slots for seq in waiting),
            n_slots=n_slots,
            chunk=min(room, scheduler.chunks.chosen or room),
            prompt_rows=usual.prompt_rows,
            per_step=usual.per_step,
            rows_each=usual.rows_each,
            mean_decodes=usual.decodes,
            drafting_s=usual.drafting_s,
        )

    @staticmethod
    def _retry_after_s(slo: Slo, expected: Expected, ttft_s: float, tpot_s: float) -> float:
        """Until what is ahead has gone, as far as that is what is too much."""
        late_s = 0.0 if slo.ttft_s is None else ttft_s - slo.ttft_s
        if slo.tpot_s is not None and tpot_s > slo.tpot_s:
            late_s = max(late_s, expected.wait_s, ttft_s)
        return max(0.0, late_s)


def _meets(slo: Slo, ttft_s: float, tpot_s: float) -> bool:
    return (slo.ttft_s is None or ttft_s <= slo.ttft_s) and (slo.tpot_s is None or tpot_s <= slo.tpot_s)


def _said(add: Add, told: Forecast) -> str:
    slo = add.slo or Slo()
    parts = []
    if slo.ttft_s is not None and told.ttft_s > slo.ttft_s:
        parts.append(f"a first token within {slo.ttft_s * 1e3:.3g} ms, where {told.ttft_s * 1e3:.3g} ms are expected")
    if slo.tpot_s is not None and told.tpot_s > slo.tpot_s:
        parts.append(f"a token every {slo.tpot_s * 1e3:.3g} ms, where {told.tpot_s * 1e3:.3g} ms are expected")
    return f"the request asks strictly for {' and '.join(parts)}"
