"""The HTTP process's view of the engine: its state, the requests in flight, and what is counted about them.

Each HTTP request is a ``Job`` (:mod:`tenon.server.flights`), each of its prompts a ``Flight``.

Each request that was started ends exactly once, in ``Service._end``: finished, aborted, rejected or failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from typing import Final

import msgspec

from tenon.base.clock import Clock
from tenon.base.errors import IntegrityError, TenonError
from tenon.engine import messages as m
from tenon.engine.promises import OUT_OF_REACH, Ledger
from tenon.server import outcome
from tenon.server.admission import Admission
from tenon.server.backlog import retry_after_s
from tenon.server.estimate import Estimates, refusal
from tenon.server.events import EventHub
from tenon.server.failures import Refusal
from tenon.server.flights import NO_TRACE, Flight, Job, Trace, again, cache_json, outcome_of
from tenon.server.keys import Caller
from tenon.server.limits import Limits
from tenon.server.metrics import Reading, ServerMetrics, engine_readings, render
from tenon.server.reports import Reports
from tenon.server.trees import publish_trees

MOST_DEATHS: Final = 20
"""Engines that a request may see die, whoever ends them: some may die of company."""

_log = logging.getLogger("tenon.server")


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    DEAD = "dead"


class Service:
    """What the engine says comes in by ``receive``; what it is told goes out by the function given to ``attach``."""

    def __init__(self, *, model: str, limits: Limits, clock: Clock, events: EventHub) -> None:
        self.model = model
        self.admission = Admission(limits)
        self.clock = clock
        self.events = events
        self.metrics = ServerMetrics()
        self.created = int(clock.wall_s())
        self.state = State.LOADING
        self.reason = "starting"
        self.phase = m.Phase("start", 0.0)
        self.ready: m.Ready | None = None
        self.stats: m.Stats | None = None
        self._token_text: Callable[[int], str] | None = None
        self.settled = asyncio.Event()
        """Set once engine and tokenizer are ready, or the engine is dead."""
        self._send: Callable[[m.ToEngine], None] | None = None
        self._is_lost = False
        """Whether the engine has ended and the next one is not ready yet."""
        self._flights: dict[str, Flight] = {}
        self._suspects: deque[Flight] = deque()
        self._probed: Flight | None = None
        """The suspect that the present engine is at."""
        self._served: dict[str, Flight] = {}
        """By what the present engine calls them."""
        self._emptied = asyncio.Event()
        self._progress_s = clock.now_s()
        self._longest_step_s = 0.0
        self._reports = Reports(events, clock, lambda: len(self._flights))
        self._estimates = Estimates()
        self._unsettled = outcome.Unsettled()
        self._announce()
        events.on_extras = self._tell_extras
        self.on_end: list[Callable[[Flight, str, float], None]] = []
        """Called with each request that has ended, how, and when."""

    def attach(self, send: Callable[[m.ToEngine], None]) -> None:
        """From now on there is an engine that can be told something."""
        self._send = send
        self._tell_extras()

    @property
    def limits(self) -> Limits:
        """As they are now: a reload changes them."""
        return self.admission.limits

    # What the engine says.

    def receive(self, message: m.FromEngine) -> None:
        self._progress_s = self.clock.now_s()
        match message:
            case m.Phase():
                self.on_phase(message)
            case m.Ready():
                self.ready = message
                if self.state is State.LOADING:
                    self.reason = "loading: tokenizer"
                self._begin()
                self._tell_extras()
                if self._is_lost:
                    self._go_on()
            case m.Accepted():
                if flight := self._served.get(message.request_id):
                    self._accept(flight, message)
            case m.Rejected():
                if flight := self._served.get(message.request_id):
                    is_full = message.status == 429 and message.code != OUT_OF_REACH  # else the forecast says when
                    failure = refusal(message, retry_after_s(self._wait_s()) if is_full else message.retry_after_s)
                    self._end(flight, "error" if flight.accepted else "rejected")
                    flight.job.fail(failure, "abort")
            case m.Misses():
                flight = self._served.get(message.request_id)
                if flight is not None and flight.cache is None:
                    flight.cache = cache_json(message)
            case m.PromptScores():
                if flight := self._served.get(message.request_id):
                    flight.scores.append(message)
            case m.Embedded():
                if flight := self._served.get(message.request_id):
                    flight.vector = message.vector
                    self._deliver(flight, m.Delta(message.request_id, 0, (), "stop"))
            case m.Outputs():
                for delta in message.deltas:
                    if flight := self._served.get(delta.request_id):
                        self._deliver(flight, delta)
            case Ledger():
                self._take_ledger(message)
            case m.Estimated():
                self._estimates.take(message)
            case m.Stats():
                self._take_stats(message)
            case m.KVEvents():
                self.events.publish_kv(message)
            case m.Residency():
                self.events.publish_extra("residency", **msgspec.structs.asdict(message))
            case m.Trees():
                publish_trees(self.events, message, self._token_text or str)

    def text_loaded(self, token_text: Callable[[int], str] = str) -> None:
        """The tokenizer is there, and names tokens: with an engine that is ready, so is the server."""
        self._token_text = token_text
        self._begin()

    def _begin(self) -> None:
        if self.ready is None or self._token_text is None:
            return
        if self.state is State.LOADING:
            self._enter(State.READY, "")
        self.settled.set()

    def on_phase(self, phase: m.Phase) -> None:
        """Start-up has come this far; the reason why the server is not ready names it."""
        self.phase = phase
        if self.state is State.LOADING:
            self.reason = f"loading: {phase.name}" + (f" ({phase.detail})" if phase.detail else "")
        self.events.publish("phase", name=phase.name, fraction=phase.fraction, detail=phase.detail)

    def engine_died(self, message: str) -> None:
        """For good. Every request in flight ends with an error, now."""
        self._enter(State.DEAD, message)
        self._estimates.lose(message)
        for flight in list(self._flights.values()):
            self._lose(flight, message)
        self.settled.set()

    def engine_lost(self, message: str, n_failures: int, *, blameless: bool = False) -> None:
        """There will be another one; the last ``n_failures`` ended before they served. Requests in flight wait for it,
        save those that too many engines have died under, and all of them where engines do not even start. A
        ``blameless`` end counts against no request."""
        under = set(self._served.values()) if n_failures == 0 else set(self._flights.values())
        under = set() if blameless else under
        self._is_lost = True
        self._suspects.clear()
        self._probed = None
        self._send = _nobody
        self._served.clear()
        self._unsettled.forget()
        self._estimates.lose(message)
        self.metrics.restarts.add()
        often = f"; the last {n_failures} ended before they were ready" if n_failures else ""
        if self.state is not State.DRAINING:
            self._enter(State.RESTARTING, f"the engine is started again: {message}{often}")
        for flight in [flight for flight in self._flights.values() if flight in under]:
            flight.n_again += 1
            flight.n_deaths += 1
            if flight.n_again > self.limits.replays or flight.n_deaths > MOST_DEATHS:
                self._lose(flight, message)

    def _lose(self, flight: Flight, message: str) -> None:
        if flight.add.request_id not in self._flights:
            return  # lost already, with another prompt of its job
        self._end(flight, "error")
        flight.job.fail(Refusal(message, status=503, code="engine_dead", retry_after_s=5.0), "error")

    def _go_on(self) -> None:
        """Another engine is ready. It takes over what is in flight, in the order in which it came.

        If there are some that would be given up with this engine, one of them may be what kills them. Then each of
        these comes alone first, until it has got a token; all others wait, and new ones are not taken.
        """
        self._is_lost = False
        _log.warning("another engine is ready; it takes over %d requests", len(self._flights))
        self._suspects = deque(one for one in self._flights.values() if one.n_again >= max(1, self.limits.replays))
        if self._suspects and self.state is State.RESTARTING:
            self._enter(State.RESTARTING, f"which of {len(self._suspects)} requests ends the engine is being found out")
        self._probe()

    def _probe(self) -> None:
        """The next suspect, or, when there is none left, all that are in flight."""
        self._probed = self._suspects.popleft() if self._suspects else None
        self._progress_s = self.clock.now_s()
        if self._probed is not None:
            self._hand_over(self._probed)
            return
        if self.state is State.RESTARTING:
            self._enter(State.READY, "")
        for flight in self._flights.values():
            self._hand_over(flight)

    def _hand_over(self, flight: Flight) -> None:
        self.metrics.replays.add()
        for add in again(flight):
            self._served[add.request_id] = flight
            for index in range(add.index, add.index + add.n):
                flight.names[index] = add.request_id
            self._tell(add)

    def _take_back(self, flight: Flight) -> None:
        """The engine is to forget it; what still comes of it is dropped."""
        for name in {flight.names[index] for index in flight.open}:
            self._tell(m.Abort(name))
        for name in set(flight.names.values()):
            self._served.pop(name, None)

    def _cleared(self, flight: Flight) -> None:
        """It has got a token, or is over, and the engine lives."""
        if flight is self._probed:
            flight.n_again = max(0, self.limits.replays - 1)
            self._take_back(flight)
            self._probe()
        elif flight in self._suspects:
            self._suspects.remove(flight)

    # What requests ask for.

    def submit(self, adds: Sequence[m.Add], caller: Caller, trace: Trace = NO_TRACE) -> Job:
        """Hand these prompts to the engine. Raises ``Refusal``: 503 when not ready or short of memory, 429 when too
        much is in flight, the queue is too long or the caller's tokens are used up."""
        self.require_ready()
        self.admission.require_room(sum(add.n for add in adds), self._n_open, self._wait_s())
        caller.take_tokens(sum(len(add.prompt) + add.n * add.max_tokens for add in adds))
        job = Job(self, self.limits.queued_deltas)
        base = 0
        if not self._flights:
            self._progress_s = self.clock.now_s()
        for add in adds:
            names = dict.fromkeys(range(add.n), add.request_id)
            flight = Flight(add, job, caller, base, set(range(add.n)), names, trace=trace)
            base += add.n
            job.flights.append(flight)
            self._flights[add.request_id] = self._served[add.request_id] = flight
            self.metrics.started.add()
            self._tell(add)
        return job

    def require_model(self, name: str) -> None:
        """Raises ``Refusal`` (404) for another model than the one that is served."""
        if name != self.model:
            said = f"the model {name!r} does not exist here; this server serves {self.model!r}"
            raise Refusal(said, status=404, code="model_not_found", param="model")

    def require_ready(self) -> m.Ready:
        """Raises ``Refusal`` (503) naming why not."""
        if self.ready is None or self.state is not State.READY:
            codes = {State.LOADING: "model_loading", State.DRAINING: "draining", State.RESTARTING: "engine_restarting"}
            code = codes.get(self.state, "engine_dead")
            said = f"the server is not ready: {self.reason}"
            soon = self.state in (State.LOADING, State.RESTARTING)
            raise Refusal(said, status=503, code=code, retry_after_s=1.0 if soon else 5.0)
        return self.ready

    async def estimate(self, add: m.Add) -> m.Estimated:
        """What might be expected of a request, which is not served. Raises ``Refusal``."""
        self.require_ready()
        return await self._estimates.answer(add.request_id, lambda: self._tell(m.Estimate(add)))

    def expect_grammar(self) -> None:
        """A request with a grammar will be submitted once that is compiled. Raises ``Refusal`` when not ready."""
        self.require_ready()
        self._tell(m.Expect())

    def close_sequence(self, flight: Flight, index: int, reason: str, n_tokens: int) -> None:
        """One sequence is over here; the engine is told to forget it. Of what has come of it ``n_tokens`` count."""
        n_surplus = len(flight.outputs.get(index, ())) - n_tokens
        flight.n_output -= n_surplus
        if flight.add.request_id not in self._flights:
            flight.caller.give_tokens_back(n_surplus)
            return
        if index not in flight.open:
            return
        flight.open.discard(index)
        flight.reasons.add(reason)
        self._tell(m.Abort(flight.names[index], index))
        if not flight.open:
            self._end(flight, outcome_of(flight.reasons))

    def give_up(self, flight: Flight, reason: str) -> None:
        """Abort what is left of a request; nothing if it has ended."""
        if flight.add.request_id in self._flights:
            self._take_back(flight)
            self._end(flight, reason)

    # Lifecycle.

    @property
    def n_running(self) -> int:
        return len(self._flights)

    @property
    def flights(self) -> Collection[Flight]:
        """Requests started and not ended."""
        return self._flights.values()

    def has_room(self, n_new: int, n_coming: int) -> bool:
        """Whether ``n_new`` sequences after ``n_coming`` would neither wait nor take what others may need soon; in any
        case where there are no others."""
        n_waiting = self.stats.waiting if self.stats is not None and self._flights else 0
        return self.state is State.READY and self.admission.has_room(n_new, n_coming + self._n_open, n_waiting)

    def unready_because(self) -> str | None:
        """Why ``/readyz`` answers 503, or ``None``."""
        if self.state is not State.READY:
            return self.reason
        stalled_s = self.clock.now_s() - self._progress_s
        if self._flights and stalled_s > max(self.limits.stall_s, 3 * self._longest_step_s):
            return f"no progress for {stalled_s:.0f} s while {len(self._flights)} requests are in flight"
        return self.admission.memory_is_short_because()

    def drain(self) -> None:
        """Take no more requests; those in flight go on."""
        self._enter(State.DRAINING, "shutting down")

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        while self._flights:
            self._emptied.clear()
            await self._emptied.wait()

    def abort_all(self, failure: TenonError) -> None:
        for flight in list(self._flights.values()):
            flight.job.abort(failure)

    def close(self) -> None:
        self._reports.close()
        self.events.close()

    def exposition(self) -> str:
        """``/metrics``: counters kept here, and the state as it is now."""
        families = self.metrics.families()
        ready = float(self.unready_because() is None)
        families += [
            Reading("tenon_ready", "1 when requests are taken and progress is made.", ready),
            Reading("tenon_requests_running", "Requests started and not finished.", len(self._flights)),
            Reading("tenon_memory_share", "Of the nearest bound of memory, in use.", self.admission.memory_share),
            Reading("tenon_memory_pressure", "0: memory to spare; 1: nothing is taken.", self.admission.pressure),
        ]
        if self.stats is not None:
            families += engine_readings(self.stats)
        return render(families)

    # Inside.

    def _tell(self, message: m.ToEngine) -> None:
        if self._send is None:
            raise IntegrityError(f"{type(message).__name__} was sent before there was an engine")
        self._send(message)

    @property
    def _n_open(self) -> int:
        """Sequences in flight."""
        return sum(len(flight.open) for flight in self._flights.values())

    def _wait_s(self) -> float:
        """How long a request that came now would wait for its turn."""
        n_waiting = sum(len(flight.open) for flight in self._flights.values() if flight.first_s is None)
        return self.admission.backlog.wait_s(n_waiting, self.clock.now_s())

    def _accept(self, flight: Flight, message: m.Accepted) -> None:
        if flight.accepted:
            return  # by another engine, before
        flight.accepted = True
        flight.cached_tokens, flight.forecast = message.cached_tokens, message.forecast
        self.metrics.downgraded.add(outcome.is_downgraded(flight))
        self.metrics.prompt_tokens.add(len(flight.add.prompt))
        self.events.publish(
            "started", request_id=flight.add.request_id, n_prompt=len(flight.add.prompt), n=flight.add.n
        )
        flight.job.wake()

    def _deliver(self, flight: Flight, delta: m.Delta) -> None:
        if delta.index not in flight.open:
            return  # ended here by a stop string before the engine heard of it
        if delta.finish_reason in ("abort", "error"):
            said = delta.error or "the engine gave this request up"
            self._end(flight, "error")
            flight.job.fail(Refusal(said, status=500, code="engine_error"), "error")
            return
        if flight.n_asked == 0:
            flight.cached_tokens = max(flight.cached_tokens, delta.cached_tokens)
        flight.outputs.setdefault(delta.index, []).extend(delta.ids)
        flight.n_output += len(delta.ids)
        self.metrics.output_tokens.add(len(delta.ids))
        if delta.ids and flight.first_s is None:
            flight.first_s = self.clock.now_s()
            self.admission.backlog.started(flight.add.n, flight.first_s)
            ttft_s = flight.first_s - flight.add.arrival_s
            self.metrics.ttft.observe(ttft_s)
            self.events.publish("first", request_id=flight.add.request_id, ttft_s=ttft_s, cache=flight.cache)
        if delta.ids and delta.index == 0:
            flight.last_s = self.clock.now_s()
        if delta.finish_reason is not None:
            flight.open.discard(delta.index)
            flight.reasons.add(delta.finish_reason)
            if not flight.open:
                self._end(flight, outcome_of(flight.reasons))
        if flight.open:
            self._cleared(flight)
        flight.job.put(flight, delta)

    def _end(self, flight: Flight, reason: str) -> None:
        del self._flights[flight.add.request_id]
        for name in set(flight.names.values()):
            self._served.pop(name, None)
        self._cleared(flight)
        if not self._flights:
            self._emptied.set()
        flight.open.clear()
        unused = flight.add.n * flight.add.max_tokens - flight.n_output
        flight.caller.give_tokens_back(unused if flight.accepted else unused + len(flight.add.prompt))
        now_s = flight.end_s = self.clock.now_s()
        outcome.count(self.metrics, flight, reason)
        self.events.publish("finished", **outcome.ended(flight, reason))
        self._unsettled.expect(flight)
        for hear in self.on_end:
            try:
                hear(flight, reason, now_s)
            except Exception:  # whoever looks on must not cost a request
                _log.exception("a request's end could not be told")
        flight.job.wake()

    def _take_stats(self, stats: m.Stats) -> None:
        if self.stats is not None and stats.steps > self.stats.steps:
            self.metrics.step.observe(stats.step_s)
            self._longest_step_s = max(self._longest_step_s, stats.step_s)
        self.stats = stats
        self.admission.backlog.queue(stats.waiting, self.clock.now_s())
        self._reports.take(stats)

    def _take_ledger(self, ledger: Ledger) -> None:
        """Before the end of the sequence where the engine ended it; after that, where it ended here."""
        if flight := self._served.get(ledger.request_id):
            flight.ledgers.append(ledger)
        elif told := self._unsettled.settle(ledger):
            self.events.publish("ledger", **told)

    def _tell_extras(self) -> None:
        """Have the engine send what somebody reads, and no more."""
        wanted = self.events.wanted
        if self._send is not None and self.state is not State.DEAD:
            self._send(m.Watch("kv" in wanted, "residency" in wanted, "victims" in wanted, "trees" in wanted))

    def _enter(self, state: State, reason: str) -> None:
        if self.state is not state:
            _log.info("%s -> %s%s", self.state, state, f": {reason}" if reason else "")
        self.state, self.reason = state, reason
        self._announce()

    def _announce(self) -> None:
        self.events.publish(
            "state", state=self.state, reason=self.reason, model=self.model,
            max_model_len=self.ready.max_model_len if self.ready else None,
        )  # fmt: skip


def _nobody(_: m.ToEngine) -> None:
    """Between two engines: the next one is told of what is left by then."""
