"""``Engine``: the step loop. It never sleeps, never reads a socket, and every number it decides by is handed in.

Parts, none of which knows the engine: the scheduler (queues, blocks, spans), the executor (a ``Step`` in, a
``StepResult`` out). One ``tick`` is schedule, execute, commit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from tenon.base.clock import SYSTEM, Clock
from tenon.base.errors import RequestError, ResourceError
from tenon.engine.config import EngineConfig
from tenon.engine.executors.base import Executor
from tenon.engine.kv_log import MAX_EVENTS
from tenon.engine.messages import (
    Accepted,
    Add,
    Delta,
    Embedded,
    KVEvent,
    KVEvents,
    Misses,
    PromptScores,
    Ready,
    Residency,
    Stats,
    Trees,
    Verified,
)
from tenon.engine.promises import Forecast, Ledger
from tenon.engine.residency import residency
from tenon.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Identity:
    """What a caller needs to know of the model that is served."""

    name: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    max_model_len: int
    kv_bytes: int
    n_blocks: int
    description: dict[str, str]
    generates: bool = True
    """False: its checkpoint has no output layer, so that it can only embed."""


class Engine:
    """One model being served. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        config: EngineConfig,
        identity: Identity,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock = SYSTEM,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        self.identity = identity
        self.scheduler = scheduler
        self.executor = executor
        self._clock = clock
        self._on_close = on_close
        self._draining = False
        self._kv_dropped = 0
        self._step_s = 0.0
        self._bookkeeping_s = 0.0

    def ready(self) -> Ready:
        """What to announce once requests can be taken."""
        it = self.identity
        return Ready(
            it.name,
            it.max_model_len,
            it.vocab_size,
            it.eos_ids,
            it.n_blocks,
            self.config.block_tokens,
            it.kv_bytes,
            it.description,
            self.scheduler.forecasts.times.plain(1),
        )

    def add(self, add: Add) -> Accepted:
        """Queue a request. Raises ``RequestError`` and its children; then nothing has changed."""
        self._require_taken(add)
        self.scheduler.at(self._clock.now_s())
        return self.scheduler.add(add)

    def estimate(self, add: Add) -> Forecast:
        """What might be expected of a request that came now, which is not served. Raises as ``add`` does, save for what
        a grammar would; nothing changes."""
        self._require_taken(add)
        return self.scheduler.estimate(msgspec.structs.replace(add, grammar=None))

    def _require_taken(self, add: Add) -> None:
        if self._draining:
            raise RequestError("the server is shutting down and takes no new requests", code="draining")
        if add.embed is None and not self.identity.generates:
            said = "this model has no output layer: it makes embeddings and generates nothing"
            raise RequestError(said, param="model", code="unsupported")

    def abort(self, request_id: str, index: int = -1, *, reason: str = "abort") -> bool:
        """Free a request, or one of its sequences, at once; False if it is not being served (which is no error)."""
        return self.scheduler.abort(request_id, index, reason=reason)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def tick(self, now_s: float) -> list[Delta]:
        """One step. Returns what each sequence gained; an empty list if there was nothing to do."""
        begin_s = self._clock.now_s()
        step = self.scheduler.schedule(now_s)
        if step is None:
            return []
        result = self.executor.poll(self.executor.submit(step))
        n_running = len(self.scheduler.running)
        deltas = self.scheduler.commit(step, result)
        if not self.scheduler.has_work:
            self.scheduler.ledgers.idle()
        self._step_s = self._clock.now_s() - begin_s
        self._bookkeeping_s = self._step_s - (result.end_s - result.start_s)
        self.scheduler.chunks.measured(step, self._step_s)
        speculation = self.scheduler.speculation
        if len(self.scheduler.running) == n_running:
            times = self.scheduler.forecasts.times
            if self.scheduler.prompt_rows:
                n = len(step.seq) - self.scheduler.prompt_spans
                drafting_s = 0.0 if speculation is None else speculation.drafting_s
                times.tell_mixed(n, step.n_rows, self.scheduler.prompt_rows, self._step_s - drafting_s)
            elif self.scheduler.tells_time and speculation is None:
                times.tell(len(step.seq), step.n_rows, self._step_s)
            elif self.scheduler.tells_time and speculation is not None:
                speculation.measured(step, self._step_s)
        return deltas

    def stats(self, now_s: float) -> Stats:
        """State and counters as they are now."""
        s, c = self.scheduler, self.scheduler.counters
        pools, lookups = s.pools, s.explain.lookups
        return Stats(
            now_s=now_s,
            steps=c.steps,
            running=len(s.running),
            waiting=len(s.waiting),
            blocks_total=sum(p.n_blocks - 1 for p in pools),
            blocks_held=sum(p.n_held for p in pools),
            blocks_cached=sum(p.n_idle for p in pools),
            prompt_tokens=c.prompt_tokens,
            cached_tokens=c.cached_tokens,
            output_tokens=c.output_tokens,
            preemptions=c.preemptions,
            started=c.started,
            finished=dict(c.finished),
            step_s=self._step_s,
            bookkeeping_s=self._bookkeeping_s,
            lookup_blocks=lookups.blocks,
            hit_blocks=lookups.block_hits,
            holes=c.holes,
            prompt_flops=lookups.cost,
            saved_flops=lookups.cost_saved,
            missed_tokens=dict(lookups.missed_tokens),
            kv_events_dropped=self._kv_dropped,
            evictions=sum(p.n_evicted for p in pools),
            guesses=None if s.speculation is None else s.speculation.guesses(),
        )

    def take_misses(self) -> list[Misses]:
        """What the cache had for requests that came in since this was last called."""
        return self.scheduler.explain.take()

    def take_ledgers(self) -> list[Ledger]:
        """Of sequences that ended since this was last called: where their time went."""
        return self.scheduler.ledgers.take()

    def take_prompt_scores(self) -> list[PromptScores]:
        """What was scored of prompts since this was last called."""
        found, self.scheduler.prompt_scores = self.scheduler.prompt_scores, []
        return found

    def take_embedded(self) -> list[Embedded]:
        """Prompts that were embedded since this was last called."""
        found, self.scheduler.embedded = self.scheduler.embedded, []
        return found

    def take_kv_events(self, limit: int = MAX_EVENTS) -> KVEvents:
        """Blocks that came and went since this was last called, at most ``limit``, each group's oldest first."""
        events: list[KVEvent] = []
        for group, pool in enumerate(self.scheduler.pools):
            taken, n_lost = pool.take_events(limit - len(events))
            self._kv_dropped += n_lost
            events += (KVEvent(e.kind, group, e.key.hex(), e.position, e.parent.hex(), e.reason) for e in taken)
        return KVEvents(tuple(events), self._kv_dropped)

    def restart_kv_events(self) -> None:
        """The next batch of events begins with all that is resident; what was not taken yet is not lost but settled."""
        for pool in self.scheduler.pools:
            pool.restart_events()

    def stop_kv_events(self) -> None:
        """Nobody takes them until they are restarted: none are kept."""
        for pool in self.scheduler.pools:
            pool.log.stop()

    def residency(self, now_s: float) -> Residency:
        """What is where in the cache. O(blocks)."""
        return residency(self.scheduler, now_s)

    def watch_victims(self, on: bool) -> None:
        """Whether evictions are written down in the pools' ``victims``."""
        for pool in self.scheduler.pools:
            pool.victims.watch = on

    def take_trees(self) -> Trees:
        """Trees of guesses that were verified since this was last called, of bounded number."""
        speculation = self.scheduler.speculation
        return Trees(()) if speculation is None else speculation.kept.take()

    def restart_trees(self) -> None:
        """The next batch of trees begins with the newest there are, also if they were taken already."""
        if self.scheduler.speculation is not None:
            self.scheduler.speculation.kept.restart()

    def trees_of(self, request_id: str, index: int = 0) -> list[Verified]:
        """What was guessed of one sequence and what came of it, as far as that is among the newest trees of all."""
        speculation = self.scheduler.speculation
        return [] if speculation is None else speculation.kept.of(request_id, index)

    def load_weights(self, path: str, version: int) -> None:
        """New weights between steps. Running requests are aborted by the caller first; the cache is forgotten."""
        if self.has_work:
            raise RequestError("weights can be replaced only while no request is being served", code="busy")
        self.executor.load_weights(path, version)
        self.scheduler.reset()
        self.scheduler.weights_version = version

    def expect_grammars(self) -> None:
        """Start what masks are made by, without waiting for it."""
        if self.scheduler.masks is not None:
            with contextlib.suppress(ResourceError):  # the request itself will be told
                self.scheduler.masks.begin()

    def drain(self) -> None:
        """Take nothing new; what is queued and running finishes."""
        self._draining = True

    def reset(self) -> list[str]:
        """Abort all requests, forget the prefix cache; returns the ids dropped."""
        return self.scheduler.reset()

    def forget_idle(self) -> int:
        """Forget what is cached and held by nobody, in all groups; returns how many blocks. Nobody is aborted."""
        return sum(pool.forget_idle() for pool in self.scheduler.pools)

    def check_integrity(self) -> None:
        """Raises ``IntegrityError`` when blocks, queues or counters do not add up."""
        self.scheduler.check_integrity()

    def close(self) -> None:
        if self._on_close is not None:
            self._on_close()
        if self.scheduler.speculation is not None:
            self.scheduler.speculation.close()
        self.executor.close()
