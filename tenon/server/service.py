"""The HTTP process's view of the engine: its state, the requests in flight, and what is counted about them.

    Service   state of the engine, every request in flight, metrics, events
    Job       one HTTP request: one or more ``Add``s and the queue of what came back for them

Each request that was started ends exactly once, in ``Service._end``: finished, aborted, rejected or failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import msgspec

from tenon.base.clock import Clock
from tenon.base.errors import IntegrityError, TenonError
from tenon.engine import messages as m
from tenon.server.events import EventHub
from tenon.server.failures import Refusal
from tenon.server.limits import Limits
from tenon.server.metrics import Reading, Readings, ServerMetrics, render

STATS_EVERY_S: Final = 0.12
KV_EVENTS_AT_ONCE: Final = 1024

_log = logging.getLogger("tenon.server")


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(eq=False)
class _Flight:
    """One ``Add`` in flight. ``base``: the job's index of its first choice; ``open``: sequences not yet ended."""

    add: m.Add
    job: Job
    base: int
    open: set[int]
    accepted: bool = False
    cached_tokens: int = 0
    n_output: int = 0
    first_s: float | None = None
    reasons: set[str] = field(default_factory=set)
    scores: list[m.PromptScores] = field(default_factory=list)
    """Of its prompt, where they are wanted: all of them before its first output."""
    cache: dict[str, Any] | None = None
    """What the cache had for its prompt; None until the engine takes it up."""


class Job:
    """What one HTTP request waits for. Used by one task; ``abort`` may come from any."""

    def __init__(self, service: Service, queued_tokens: int) -> None:
        self._service = service
        self._queued_tokens = queued_tokens
        self._wake = asyncio.Event()
        self._queue: list[tuple[int, m.Delta]] = []
        self._n_queued = 0
        self._failure: TenonError | None = None
        self.flights: list[_Flight] = []

    @property
    def cached_tokens(self) -> int:
        return sum(flight.cached_tokens for flight in self.flights)

    async def accepted(self) -> None:
        """Wait until the engine has taken every prompt. Raises what it refused the first one with."""
        while self._failure is None and not all(flight.accepted for flight in self.flights):
            await self._turn()
        if self._failure is not None:
            raise self._failure

    async def batch(self) -> list[tuple[int, m.Delta]]:
        """What has come since the last call, at least one (choice, delta); empty once all choices have ended.

        Raises what the request failed with, after everything that came before it was handed out.
        """
        while not self._queue and self._failure is None and any(flight.open for flight in self.flights):
            await self._turn()
        if not self._queue and self._failure is not None:
            raise self._failure
        batch, self._queue, self._n_queued = self._queue, [], 0
        return batch

    def scores(self, prompt: int) -> list[m.PromptScores]:
        """Of that prompt, as far as they have come."""
        return self.flights[prompt].scores

    def close_choice(self, choice: int) -> None:
        """A stop string ended this choice: its tokens are wanted no more."""
        for flight in self.flights:
            if flight.base <= choice < flight.base + flight.add.n:
                self._service.close_sequence(flight, choice - flight.base, "stop")

    def abort(self, failure: TenonError | None = None) -> None:
        """Give everything up at once; the engine forgets the sequences. Does nothing after the end."""
        self.fail(failure or Refusal("the client left", status=499, code="client_closed"), "abort")

    def put(self, flight: _Flight, delta: m.Delta) -> None:
        """Queue a delta; a client that lets too many wait is given up."""
        self._queue.append((flight.base + delta.index, delta))
        self._n_queued += len(delta.ids)
        self._wake.set()
        if self._n_queued > self._queued_tokens:
            self.abort(
                Refusal(
                    f"the client reads too slowly: {self._n_queued} tokens are waiting", status=408, code="slow_client"
                )
            )

    def fail(self, failure: TenonError, reason: str) -> None:
        """End all that is left with this failure, counted as ``reason``."""
        if self._failure is None:
            self._failure = failure
        for flight in self.flights:
            self._service.give_up(flight, reason)
        self._wake.set()

    def wake(self) -> None:
        self._wake.set()

    async def _turn(self) -> None:
        self._wake.clear()
        await self._wake.wait()


class Service:
    """What the engine says comes in by ``receive``; what it is told goes out by the function given to ``attach``."""

    def __init__(self, *, model: str, limits: Limits, clock: Clock, events: EventHub) -> None:
        self.model = model
        self.limits = limits
        self.clock = clock
        self.events = events
        self.metrics = ServerMetrics()
        self.created = int(clock.wall_s())
        self.state = State.LOADING
        self.reason = "starting"
        self.phase = m.Phase("start", 0.0)
        self.ready: m.Ready | None = None
        self.stats: m.Stats | None = None
        self._has_text = False
        self.settled = asyncio.Event()
        """Set once engine and tokenizer are ready, or the engine is dead."""
        self._send: Callable[[m.ToEngine], None] | None = None
        self._flights: dict[str, _Flight] = {}
        self._emptied = asyncio.Event()
        self._progress_s = clock.now_s()
        self._longest_step_s = 0.0
        self._stats_published_s = float("-inf")
        self._stats_timer: asyncio.TimerHandle | None = None
        self._announce()
        events.on_extras = self._tell_extras

    def attach(self, send: Callable[[m.ToEngine], None]) -> None:
        """From now on there is an engine that can be told something."""
        self._send = send
        self._tell_extras()

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
            case m.Accepted():
                if flight := self._flights.get(message.request_id):
                    self._accept(flight, message)
            case m.Rejected():
                if flight := self._flights.get(message.request_id):
                    failure = Refusal(
                        message.message, status=message.status, code=message.code, param=message.param,
                        retry_after_s=message.retry_after_s,
                    )  # fmt: skip
                    self._end(flight, "error" if flight.accepted else "rejected")
                    flight.job.fail(failure, "abort")
            case m.Misses():
                if flight := self._flights.get(message.request_id):
                    flight.cache = _cache_json(message)
            case m.PromptScores():
                if flight := self._flights.get(message.request_id):
                    flight.scores.append(message)
            case m.Outputs():
                for delta in message.deltas:
                    if flight := self._flights.get(delta.request_id):
                        self._deliver(flight, delta)
            case m.Stats():
                self._take_stats(message)
            case m.KVEvents():
                self._publish_kv(message)
            case m.Residency():
                self.events.publish_extra("residency", **msgspec.structs.asdict(message))

    def text_loaded(self) -> None:
        """The tokenizer is there: with an engine that is ready, so is the server."""
        self._has_text = True
        self._begin()

    def _begin(self) -> None:
        if self.ready is None or not self._has_text:
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
        """Every request in flight ends with an error, now."""
        failure = Refusal(message, status=503, code="engine_dead", retry_after_s=5.0)
        self._enter(State.DEAD, message)
        for flight in list(self._flights.values()):
            self._end(flight, "error")
            flight.job.fail(failure, "error")
        self.settled.set()

    # What requests ask for.

    def submit(self, adds: Sequence[m.Add]) -> Job:
        """Hand these prompts to the engine. Raises ``Refusal``: 503 when not ready, 429 when too much is in flight."""
        self.require_ready()
        n_new = sum(add.n for add in adds)
        n_open = sum(len(flight.open) for flight in self._flights.values())
        if n_open + n_new > self.limits.max_in_flight:
            raise Refusal(
                f"{n_open} sequences are in flight and the limit is {self.limits.max_in_flight}; try again later",
                status=429,
                code="rate_limit_exceeded",
                retry_after_s=1.0,
            )
        job = Job(self, self.limits.queued_deltas)
        base = 0
        if not self._flights:
            self._progress_s = self.clock.now_s()
        for add in adds:
            flight = _Flight(add, job, base, set(range(add.n)))
            base += add.n
            job.flights.append(flight)
            self._flights[add.request_id] = flight
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
            code = {State.LOADING: "model_loading", State.DRAINING: "draining"}.get(self.state, "engine_dead")
            said = f"the server is not ready: {self.reason}"
            raise Refusal(said, status=503, code=code, retry_after_s=1.0 if self.state is State.LOADING else 5.0)
        return self.ready

    def close_sequence(self, flight: _Flight, index: int, reason: str) -> None:
        """One sequence is over here; the engine is told to forget it."""
        if index not in flight.open:
            return
        flight.open.discard(index)
        flight.reasons.add(reason)
        if flight.add.request_id not in self._flights:
            return
        self._tell(m.Abort(flight.add.request_id, index))
        if not flight.open:
            self._end(flight, _outcome(flight.reasons))

    def give_up(self, flight: _Flight, reason: str) -> None:
        """Abort what is left of a request; nothing if it has ended."""
        if flight.add.request_id in self._flights:
            self._tell(m.Abort(flight.add.request_id))
            self._end(flight, reason)

    # Lifecycle.

    @property
    def n_running(self) -> int:
        """Requests started and not ended."""
        return len(self._flights)

    def unready_because(self) -> str | None:
        """Why ``/readyz`` answers 503, or ``None``."""
        if self.state is not State.READY:
            return self.reason
        stalled_s = self.clock.now_s() - self._progress_s
        if self._flights and stalled_s > max(self.limits.stall_s, 3 * self._longest_step_s):
            return f"no progress for {stalled_s:.0f} s while {len(self._flights)} requests are in flight"
        return None

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
        if self._stats_timer is not None:
            self._stats_timer.cancel()
        self.events.close()

    def exposition(self) -> str:
        """``/metrics``: counters kept here, and the state as it is now."""
        families = self.metrics.families()
        ready = float(self.unready_because() is None)
        families += [
            Reading("tenon_ready", "1 when requests are taken and progress is made.", ready),
            Reading("tenon_requests_running", "Requests started and not finished.", len(self._flights)),
        ]
        if self.stats is not None:
            families += _engine_readings(self.stats)
        return render(families)

    # Inside.

    def _tell(self, message: m.ToEngine) -> None:
        if self._send is None:
            raise IntegrityError(f"{type(message).__name__} was sent before there was an engine")
        self._send(message)

    def _accept(self, flight: _Flight, message: m.Accepted) -> None:
        flight.accepted = True
        flight.cached_tokens = message.cached_tokens
        self.metrics.prompt_tokens.add(len(flight.add.prompt))
        self.events.publish(
            "started", request_id=flight.add.request_id, n_prompt=len(flight.add.prompt), n=flight.add.n
        )
        flight.job.wake()

    def _deliver(self, flight: _Flight, delta: m.Delta) -> None:
        if delta.index not in flight.open:
            return  # ended here by a stop string before the engine heard of it
        if delta.finish_reason in ("abort", "error"):
            said = delta.error or "the engine gave this request up"
            self._end(flight, "error")
            flight.job.fail(Refusal(said, status=500, code="engine_error"), "error")
            return
        flight.cached_tokens = max(flight.cached_tokens, delta.cached_tokens)
        flight.n_output += len(delta.ids)
        self.metrics.output_tokens.add(len(delta.ids))
        if delta.ids and flight.first_s is None:
            flight.first_s = self.clock.now_s()
            ttft_s = flight.first_s - flight.add.arrival_s
            self.metrics.ttft.observe(ttft_s)
            self.events.publish("first", request_id=flight.add.request_id, ttft_s=ttft_s, cache=flight.cache)
        if delta.finish_reason is not None:
            flight.open.discard(delta.index)
            flight.reasons.add(delta.finish_reason)
            if not flight.open:
                self._end(flight, _outcome(flight.reasons))
        flight.job.put(flight, delta)

    def _end(self, flight: _Flight, reason: str) -> None:
        del self._flights[flight.add.request_id]
        if not self._flights:
            self._emptied.set()
        flight.open.clear()
        now_s = self.clock.now_s()
        e2e_s = now_s - flight.add.arrival_s
        self.metrics.finished.add(1, reason)
        self.metrics.e2e.observe(e2e_s)
        if flight.first_s is not None and flight.n_output > flight.add.n:
            per_sequence = flight.n_output / flight.add.n
            self.metrics.tpot.observe((now_s - flight.first_s) / (per_sequence - 1))
        self.events.publish(
            "finished", request_id=flight.add.request_id, reason=reason, n_output=flight.n_output, e2e_s=e2e_s,
            cache=flight.cache,
        )  # fmt: skip
        flight.job.wake()

    def _take_stats(self, stats: m.Stats) -> None:
        if self.stats is not None and stats.steps > self.stats.steps:
            self.metrics.step.observe(stats.step_s)
            self._longest_step_s = max(self._longest_step_s, stats.step_s)
        self.stats = stats
        wait_s = self._stats_published_s + STATS_EVERY_S - self.clock.now_s()
        if wait_s <= 0:
            self._publish_stats()
        elif self._stats_timer is None:
            self._stats_timer = asyncio.get_running_loop().call_later(wait_s, self._publish_stats)

    def _publish_stats(self) -> None:
        if self._stats_timer is not None:
            self._stats_timer.cancel()
            self._stats_timer = None
        if self.stats is not None:
            self._stats_published_s = self.clock.now_s()
            self.events.publish("stats", in_flight=len(self._flights), **msgspec.structs.asdict(self.stats))

    def _publish_kv(self, message: m.KVEvents) -> None:
        """In pieces, so that no event is huge."""
        for start in range(0, len(message.events), KV_EVENTS_AT_ONCE):
            events = [msgspec.structs.asdict(event) for event in message.events[start : start + KV_EVENTS_AT_ONCE]]
            self.events.publish_extra("kv", events=events, dropped=message.dropped)

    def _tell_extras(self) -> None:
        """Have the engine send what somebody reads, and no more."""
        wanted = self.events.wanted
        if self._send is not None and self.state is not State.DEAD:
            self._send(m.Watch("kv" in wanted, "residency" in wanted, "victims" in wanted))

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


def _outcome(reasons: set[str]) -> str:
    """One word for several sequences: "length" if any was cut."""
    return "length" if "length" in reasons else "stop"


def _cache_json(misses: m.Misses) -> dict[str, Any]:
    """The ``cache`` of an event: a run's fields that are not known are left out."""
    runs = [{name: it for name, it in msgspec.structs.asdict(run).items() if it is not None} for run in misses.runs]
    return {
        "cached_tokens": misses.cached_tokens, "holes": misses.holes, "n_misses": misses.n_runs, "misses": runs,
    }  # fmt: skip


def _engine_readings(stats: m.Stats) -> list[Reading | Readings]:
    return [
        Reading("tenon_engine_running", "Sequences being computed.", stats.running),
        Reading("tenon_engine_waiting", "Sequences that wait in the engine.", stats.waiting),
        Reading("tenon_kv_blocks", "Blocks of the KV cache.", stats.blocks_total),
        Reading("tenon_kv_blocks_used", "Blocks held by sequences.", stats.blocks_held),
        Reading("tenon_kv_blocks_cached", "Blocks kept for prefix reuse alone.", stats.blocks_cached),
        *_cache_readings(stats),
        Reading("tenon_engine_steps_total", "Steps of the engine.", stats.steps, kind="counter"),
        Reading("tenon_preemptions_total", "Sequences preempted.", stats.preemptions, kind="counter"),
    ]


def _cache_readings(stats: m.Stats) -> list[Reading | Readings]:
    """Of prompts as the engine took them up, once each; blocks are positions' blocks."""

    def counted(name: str, help_text: str, value: float) -> Reading:
        return Reading(name, help_text, value, kind="counter")

    missed = {kind: float(stats.missed_tokens.get(kind, 0)) for kind in ("new", "evicted", "skipped")}
    return [
        counted("tenon_prefix_query_tokens_total", "Tokens of prompts taken up by the engine.", stats.prompt_tokens),
        counted("tenon_prefix_hit_tokens_total", "Prompt tokens found in cache.", stats.cached_tokens),
        Readings("tenon_prefix_miss_tokens_total", "Tokens looked up in vain, by reason.", "reason", missed),
        counted("tenon_prefix_query_blocks_total", "Full blocks of prompts looked up in cache.", stats.lookup_blocks),
        counted("tenon_prefix_hit_blocks_total", "Blocks of prompts found in cache.", stats.hit_blocks),
        counted("tenon_prompt_flops_total", "FLOPs of all prompts, had nothing been cached.", stats.prompt_flops),
        counted("tenon_prompt_flops_saved_total", "FLOPs of prompts that the cache saved.", stats.saved_flops),
        counted("tenon_prompt_holes_total", "Runs computed before tokens that were in cache.", stats.holes),
        counted("tenon_kv_evictions_total", "Blocks evicted, of all groups.", stats.evictions),
        counted("tenon_kv_events_dropped_total", "Events lost before they were sent.", stats.kv_events_dropped),
    ]
