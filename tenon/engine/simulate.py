"""A trace served in virtual time: the engine that serves, an executor that only takes time, and the loop between them.

Parts, none of which knows the simulation: the engine (scheduler, cache), the simulated executor (cost model, oracle),
the heap of what is going to happen. The loop is that of the engine's process: take what has come, tick, hand out what
came of it. A step once begun is not interrupted; who arrives meanwhile waits for its end.

Times of an :class:`Outcome` are those of a caller: ``text_s`` away from the engine, each way (HTTP, templates, token
ids).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from tenon.base.errors import ConfigError, IntegrityError, Overloaded, RequestError
from tenon.base.records import RecordWriter
from tenon.cost.device import Device
from tenon.cost.price import seconds
from tenon.cost.work import StepShape, decode_shape
from tenon.engine import fast_forward
from tenon.engine.assemble import Span
from tenon.engine.build import plan_memory
from tenon.engine.chunks import Chunks
from tenon.engine.config import EngineConfig
from tenon.engine.engine import Engine, Identity
from tenon.engine.executors.simulated import SimulatedExecutor, StepCost, TrueTokens
from tenon.engine.messages import Add, Delta, Stats
from tenon.engine.policies.evict import Evict
from tenon.engine.policies.step_time import KNOTS, StepTimes
from tenon.engine.promises import Ledger, Slo
from tenon.engine.recompute import recompute_cost
from tenon.engine.scheduler import Scheduler
from tenon.engine.speculation.build import chooser, draft_plan
from tenon.engine.speculation.measure import CONTEXT, MOST_ROWS
from tenon.engine.speculation.simulated import SimulatedDraft, SimulatedDrafter
from tenon.engine.speculation.speculation import Speculation
from tenon.engine.step import Step
from tenon.models.spec import CostShape, ModelSpec, dtype_bytes, step_work
from tenon.sim.clock import VirtualClock
from tenon.sim.events import EventHeap
from tenon.workloads.report import Outcome
from tenon.workloads.trace import Trace, TraceRequest, content_tokens, prompt_tokens

STATS_EVERY_S: Final = 0.1
"""Of virtual time, as the engine's process reports."""
SCRATCH_BYTES: Final = 256 * 2**20
"""Left free beside weights and cache for a step's activations, as the torch executor does."""
SECRET: Final = bytes(32)
"""Keys of blocks are hashed with it. Nothing outside a simulation sees them, so it hides nothing."""
NAMELESS: Final = 1 << 127
"""Where the numbers of contents begin that no trace refers to: each such answer is one of its own."""

MEASURED: Final = tuple(rows for rows in KNOTS if rows <= MOST_ROWS)

OnProgress = Callable[[int, int, float], None]
"""Requests that have ended, requests in all, virtual seconds."""


def free_bytes(model: ModelSpec | CostShape, device: Device, dtype: str, n_devices: int = 1) -> int:
    """What ``n_devices`` that share the model have left for keys and values, weights and activations aside.

    Raises ``ConfigError`` where the weights do not fit.
    """
    memory, weights = n_devices * device.memory_bytes.value, model.weights_bytes(dtype)
    free = int(memory - weights) - n_devices * SCRATCH_BYTES
    if free <= 0:
        raise ConfigError(
            f"the weights take {weights / 1e9:.1f} GB as {dtype} and {n_devices} x {device.name} has "
            f"{memory / 1e9:.1f} GB; simulate more devices or a larger one",
            subject=device.name,
        )
    return free


def device_cost(model: ModelSpec | CostShape, device: Device, dtype: str, n_devices: int = 1) -> StepCost:
    """Seconds of a step on ``n_devices`` that divide each matrix among them, the engine's own time included.

    Raises ``ConfigError`` where the device has no arithmetic in ``dtype``, or no link where several are asked for.
    """

    def cost(shape: StepShape) -> float:
        return seconds(step_work(model, shape, dtype, tensor_parallel=n_devices), device)

    n_groups = len(model.kv_groups("", 16, 1))
    cost(StepShape(1, 1, 1, (1,) * n_groups, (1,) * n_groups))  # what cannot be priced is said before the run
    return cost


@dataclass(frozen=True)
class Marks:
    """What every record of a simulation says of itself."""

    model: str
    device: str
    cost: str
    """Where the cost model's figures come from, and its error against measurements."""


@dataclass
class StepLog:
    """A value a step: when it ended, how long it took, how many rows it had."""

    end_s: array[float] = field(default_factory=lambda: array("d"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    rows: array[int] = field(default_factory=lambda: array("l"))

    def __len__(self) -> int:
        return len(self.end_s)


@dataclass(frozen=True)
class Simulated:
    """What came of a trace. ``outcomes`` are in the order of its requests; ``stats`` were taken every 0.1 s."""

    outcomes: tuple[Outcome, ...]
    steps: StepLog
    stats: tuple[Stats, ...]
    ledgers: tuple[Ledger, ...]
    """Of requests in the order of their ends."""
    end_s: float
    forwarded: int
    """Steps of the log that were taken by fast-forward."""


@dataclass(slots=True)
class _Flight:
    """A request between its sending and its end."""

    request: TraceRequest
    intended_s: float
    token_s: list[float] = field(default_factory=list)


class Simulation:
    """One engine on one device that is not there. ``run`` once.

    ``watch`` is handed every step, and has fast-forward make them all. ``records`` is a run's folder for
    ``events.jsonl``, with the records that a server writes.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec | CostShape,
        cost: StepCost,
        marks: Marks,
        *,
        memory_bytes: int,
        text_s: float = 0.0,
        seed: int = 0,
        forward: bool = True,
        watch: Callable[[Step], None] | None = None,
        records: Path | None = None,
        make_evict: Callable[[], Evict] | None = None,
        slos: Mapping[str, Slo] | None = None,
        draft: SimulatedDraft | None = None,
    ) -> None:
        """``memory_bytes``: what is free for keys and values. ``make_evict``: another eviction policy than the
        config's. ``slos``: what requests are promised, by class ("" for all others). ``draft``: what there is to know
        of the draft model that the config names. Raises ``ConfigError`` where the memory holds no sequence, or the
        config wants guesses that cannot be simulated."""
        dtype = spec.dtype if config.dtype == "auto" else config.dtype
        groups = spec.kv_groups(marks.model, config.block_tokens, dtype_bytes(dtype))
        self.memory = memory = plan_memory(config, spec, groups, memory_bytes)
        self.clock = VirtualClock()
        self.oracle = TrueTokens()
        self.executor = SimulatedExecutor(cost, self.oracle, self.clock, device=marks.device, dtype=dtype, watch=watch)
        self.executor.allocate(groups, memory.n_blocks)
        self.scheduler = Scheduler(
            config,
            groups,
            memory.n_blocks,
            model=marks.model,
            vocab_size=spec.vocab_size,
            eos_ids=(),  # a trace says how long its answers are
            max_model_len=memory.max_model_len,
            secret=SECRET,
            cost_of=recompute_cost(spec, config.block_tokens),
            chunks=Chunks(config, groups, cost),
            make_evict=make_evict,
            speculation=self._speculation(config, spec.vocab_size, draft, seed),
            times=self._times(),
        )
        description = {"executor": "simulated", "device": marks.device, "dtype": dtype, "notes": marks.cost}
        length, n_blocks = memory.max_model_len, memory.n_blocks
        identity = Identity(marks.model, spec.vocab_size, (), length, memory.kv_bytes, n_blocks, description)
        self.engine = Engine(config, identity, self.scheduler, self.executor, self.clock)
        self.marks = marks
        self._slos = slos or {}
        self._text_s, self._seed, self._forward = text_s, seed % 2**64, forward
        self._events: EventHeap[_Flight] = EventHeap(self.clock)
        self._flights: dict[str, _Flight] = {}
        self._followers: dict[str, list[TraceRequest]] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._log = StepLog()
        self._forwarded = 0
        self._stats: list[Stats] = []
        self._ledgers: list[Ledger] = []
        self._stats_at_s = float("-inf")
        self._writer = RecordWriter(records, clock=self.clock) if records is not None else None

    def run(self, trace: Trace, on_progress: OnProgress | None = None) -> Simulated:
        """Serve the whole trace. Raises ``ResourceError`` when records cannot be written."""
        self._open(trace)
        for request in trace.requests:
            if request.after:
                self._followers.setdefault(request.after, []).append(request)
            else:
                self._send(request, request.arrival_s)
        n_told, forward = 0, self._forward and self.scheduler.speculation is None
        while self._events or self.engine.has_work:
            if not self.engine.has_work:
                self._receive(self._events.pop())
            for flight in self._events.due():
                self._receive(flight)
            if self.engine.has_work and not (forward and self._stretch()):
                self._tick()
            if on_progress is not None and len(self._outcomes) > n_told:
                n_told = len(self._outcomes)
                on_progress(n_told, len(trace.requests), self.clock.now_s())
        return self._close(trace)

    def _times(self) -> StepTimes:
        """As they are measured where a model runs."""
        executor = self.executor
        shapes = {rows: decode_shape([CONTEXT] * rows, executor.windows) for rows in MEASURED}
        return StepTimes({rows: executor.seconds(shape) for rows, shape in shapes.items()})

    def _speculation(
        self, config: EngineConfig, vocab_size: int, draft: SimulatedDraft | None, seed: int
    ) -> Speculation | None:
        """By the same parts as where a model runs, but for the draft's."""
        if draft is None:
            if config.drafters:
                raise ConfigError("guesses are simulated of a draft model that is described", subject="speculative")
            return None
        if len(config.drafters) != 1 or config.draft_model is None:
            said = f"speculative must name the draft model alone, got {config.speculative!r}"
            raise ConfigError(said, subject="speculative")
        times, draft_times = self._times(), StepTimes({rows: draft.seconds(rows) for rows in MEASURED})
        policy = chooser(config)
        plan = draft_plan(policy, times, draft_times, config.speculative_depth)
        drafter = SimulatedDrafter(draft, plan, draft_times, self.oracle, self.clock, vocab_size, seed)
        limits = {"max_depth": config.speculative_depth, "max_nodes": config.speculative_nodes}
        return Speculation([drafter], policy, times, clock=self.clock, **limits)

    # -- requests come and go ------------------------------------------------------------------------------

    def _send(self, request: TraceRequest, intended_s: float) -> None:
        self._events.push(intended_s + self._text_s, _Flight(request, intended_s))

    def _receive(self, flight: _Flight) -> None:
        """The engine takes a request, or refuses it."""
        request = flight.request
        vocabulary = self.scheduler.vocab_size
        prompt = prompt_tokens(request, vocabulary)
        add = Add(
            request.id,
            tuple(prompt.tolist()),
            request.n_output,
            seed=0,
            temperature=0.0,
            ignore_eos=True,
            tenant=request.tenant,
            slo_class=request.slo_class,
            slo=self._slos.get(request.slo_class) or self._slos.get(""),
            arrival_s=flight.intended_s,
        )
        try:
            self.engine.add(add)
        except RequestError as error:
            # As a client would hear it from a server.
            self._fail(flight, f"http {429 if isinstance(error, Overloaded) else 400}: {error}")
            return
        (seq,) = self.scheduler.requests[request.id].seqs
        answer = request.output or NAMELESS + (self._seed << 62) + seq.id
        self.oracle.tell(seq.id, content_tokens(answer, request.n_output, vocabulary))
        self._flights[request.id] = flight
        self._publish("started", request_id=request.id, n_prompt=len(prompt), n=1)

    def _finish(self, flight: _Flight, delta: Delta) -> None:
        """All tokens are there; what follows is sent after its pause."""
        request, end_s = flight.request, flight.token_s[-1]
        del self._flights[request.id]
        self._tell(flight, end_s, finish_reason=str(delta.finish_reason), cached_tokens=delta.cached_tokens)
        for follower in self._followers.pop(request.id, ()):
            self._send(follower, end_s + follower.gap_s)

    def _fail(self, flight: _Flight, error: str) -> None:
        """A request is refused, so what follows it, and what follows that, is never sent."""
        end_s = self.clock.now_s() + self._text_s
        self._tell(flight, end_s, error=error)
        said = f"skipped: {flight.request.id}, which it follows, failed ({error})"
        waiting = [(flight.request.id, end_s)]
        while waiting:
            failed, end_s = waiting.pop()
            for request in self._followers.pop(failed, ()):
                at_s = end_s + request.gap_s
                self._tell(_Flight(request, at_s), at_s, error=said)
                waiting.append((request.id, at_s))

    def _tell(self, flight: _Flight, end_s: float, **more: Any) -> None:
        """A request's end, as its outcome and for the record."""
        request, n_output = flight.request, len(flight.token_s)
        outcome = Outcome(
            id=request.id,
            intended_s=flight.intended_s,
            sent_s=flight.intended_s,
            end_s=end_s,
            n_prompt=request.n_prompt,
            token_s=tuple(flight.token_s),
            slo_class=request.slo_class,
            tenant=request.tenant,
            **more,
        )
        self._outcomes[request.id] = outcome
        reason = "rejected" if outcome.error else outcome.finish_reason
        e2e_s = end_s - flight.intended_s
        self._publish("finished", request_id=request.id, reason=reason, n_output=n_output, e2e_s=e2e_s)

    # -- steps ---------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """One step by the engine."""
        begin_s = self.clock.now_s()
        deltas = self.engine.tick(begin_s)
        heard_s = self.clock.now_s() + self._text_s
        flights = self._flights
        for delta in deltas:
            flight = flights[delta.request_id]
            token_s = flight.token_s
            if not token_s:
                self._publish("first", request_id=delta.request_id, ttft_s=heard_s - flight.intended_s)
            token_s.extend([heard_s] * len(delta.ids))
            if delta.finish_reason is not None:
                self._finish(flight, delta)
        self._ledgers += self.engine.take_ledgers()
        self._stepped(begin_s, self.executor.n_rows)

    def _stretch(self) -> bool:
        """As many decode steps as there are before something else happens; False where the next one is none such."""
        stretch = fast_forward.begin(self.scheduler, self.oracle.of, self.executor.windows)
        if stretch is None:
            return False
        clock, watch = self.clock, self.executor.watch
        n_rows, ledgers, forecasts = len(stretch.seqs), self.scheduler.ledgers, self.scheduler.forecasts
        heard_s: list[float] = []
        next_s = self._events.next_s
        while stretch.reserve(clock.now_s()):
            begin_s = clock.now_s()
            if watch is not None:
                watch(stretch.step())
            self.executor.spend(stretch.shape())
            if heard_s:
                ledgers.stepped_alike(clock.now_s(), n_rows)
            else:
                ledgers.stepped(begin_s, clock.now_s(), [Span(seq, 0, 1, []) for seq in stretch.seqs], ())
            stretch.commit()
            forecasts.stepped_alike(n_rows)
            heard_s.append(clock.now_s() + self._text_s)
            self._stepped(begin_s, n_rows)
            if next_s <= clock.now_s():
                break
        for seq in stretch.seqs:
            self._flights[seq.request.add.request_id].token_s.extend(heard_s)
        stretch.end()
        self._forwarded += len(heard_s)
        return bool(heard_s)

    def _stepped(self, begin_s: float, n_rows: int) -> None:
        now_s = self.clock.now_s()
        self._log.end_s.append(now_s)
        self._log.seconds.append(now_s - begin_s)
        self._log.rows.append(n_rows)
        if now_s - self._stats_at_s >= STATS_EVERY_S or not self.engine.has_work:
            self._stats_at_s = now_s
            # The engine times its own steps; those of a stretch are not its own.
            stats = msgspec.structs.replace(self.engine.stats(now_s), step_s=now_s - begin_s, bookkeeping_s=0.0)
            self._stats.append(stats)
            told = msgspec.structs.asdict(stats)
            told["guesses"] = None if stats.guesses is None else msgspec.structs.asdict(stats.guesses)
            self._publish("stats", in_flight=len(self._flights), **told)

    # -- records -------------------------------------------------------------------------------------------

    def _open(self, trace: Trace) -> None:
        header = msgspec.structs.asdict(trace.header)
        self._publish("simulated", **asdict(self.marks), trace=header, text_s=self._text_s, seed=self._seed)
        self._state("ready", "simulated")

    def _close(self, trace: Trace) -> Simulated:
        self.scheduler.check_integrity()
        wrong = [r.id for r in trace.requests if not self._is_whole(r)]
        if wrong:
            raise IntegrityError(f"{len(wrong)} requests were lost or cut, {wrong[0]!r} among them")
        self._state("ended", "the trace is served")
        if self._writer is not None:
            self._writer.close()
        outcomes = tuple(self._outcomes[r.id] for r in trace.requests)
        ledgers = tuple(self._ledgers)
        return Simulated(outcomes, self._log, tuple(self._stats), ledgers, self.clock.now_s(), self._forwarded)

    def _is_whole(self, request: TraceRequest) -> bool:
        """Every request ends once, refused or with all its tokens."""
        outcome = self._outcomes.get(request.id)
        return outcome is not None and (bool(outcome.error) or len(outcome.token_s) == request.n_output)

    def _state(self, state: str, reason: str) -> None:
        self._publish(
            "state", state=state, reason=reason, model=self.marks.model, max_model_len=self.memory.max_model_len
        )

    def _publish(self, kind: str, **fields: Any) -> None:
        if self._writer is not None:
            self._writer.write(kind, **fields)
