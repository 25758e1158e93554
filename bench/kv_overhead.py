"""What the scheduler and the eviction policy cost on the CPU: 64 sequences decoding out of a full pool of blocks.

The real scheduler serves conversations whose turns come and go, 64 at a time, at contexts of several thousand
tokens. Each step takes 20 ms of virtual time and nothing of ours, so what is timed, ``schedule`` and ``commit``, is all
there is between two calls of an executor. Requests are the same for every policy. The pool is full: new blocks are
others', given up. Costs that policies weigh are the FLOPs of Llama-3.1-8B. Times are the thread's CPU time: what else
runs on the machine is not in them.

Cell "64 sequences": the same steps are taken twice, by a scheduler whose policy is timed and by one whose policy is
not: times of whole steps are of the second, ``policy`` ones of the first. Its timing's own cost is subtracted: what two
readings of the clock find between them when nothing happens there, for each call. ``decode`` is of steps that compute
decodes alone, requests that end in them included, ``quiet`` of those in which none ends, ``step`` of all, prompts
included. ``add_us_per_token`` is taking a request into the queue, which is outside of steps.

Cell "100,000 idle": a larger pool, for as many idle blocks; ``take`` is ``BlockPool.take`` as a whole where it evicts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import numpy as np

from tenon.base.clock import thread_cpu_s
from tenon.base.errors import IntegrityError
from tenon.base.result import Check, ContenderEntry, Result, at_most
from tenon.bench.claim import Cell
from tenon.engine.blocks import DIGEST_BYTES, BlockPool
from tenon.engine.policies.evict import Cached, Evict
from tenon.engine.step import I32

TITLE = "microseconds of scheduler and eviction policy per step, 64 sequences"
BASELINE = "lru"
LIMITS = False

MODEL = "Llama-3.1-8B"
POLICIES = ("tuned", "lru", "gdsf", "asymcache", "worth")
FEW = ("tuned", "lru")
SEQUENCES, STEP_S = 64, 0.02
STEP_AT_MOST_US = 150.0
TAKE_AT_MOST_US = 50.0

FOLLOWS = 0.6
"""Share of requests that are the next turn of a conversation, where there is one."""
AWAY, BACK = 200, 900
"""A next turn comes after so many other requests, at least and at most."""
FIRST, FURTHER = (1000, 4000), (30, 600)
"""Tokens that a person's first turn and each of the others has."""
OUTPUT, LONGEST_OUTPUT = 300, 1000
"""Mean, and most, tokens of an answer."""
MAX_CONTEXT = 8192


@dataclass
class Turn:
    """A request and what will be answered."""

    prompt: I32
    answer: I32


@dataclass(eq=False)
class _Conversation:
    tokens: I32
    n: int = 0
    """Tokens so far, the last answer's included."""


class Chat:
    """Turns in an order that depends on the seed alone."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._random, self._vocab_size = np.random.default_rng(seed), vocab_size
        self._past: deque[_Conversation | None] = deque(maxlen=BACK)

    def next(self) -> Turn:
        random = self._random
        asks_anew = len(self._past) <= AWAY or random.random() >= FOLLOWS
        i = 0 if asks_anew else int(random.integers(len(self._past) - AWAY))
        found = None if asks_anew else self._past[i]
        n_answer = min(1 + int(random.geometric(1 / OUTPUT)), LONGEST_OUTPUT)
        n_asked = int(random.integers(*(FIRST if found is None else FURTHER)))
        if found is None or found.n + n_asked + n_answer > MAX_CONTEXT:
            found = _Conversation(random.integers(0, self._vocab_size, MAX_CONTEXT, np.int32))
        else:
            self._past[i] = None
        n_prompt = found.n + n_asked
        found.n = n_prompt + n_answer
        self._past.append(found)
        return Turn(found.tokens[:n_prompt], found.tokens[n_prompt : found.n])


class TimedPolicy:
    """A policy that is timed: an ``Evict`` that forwards every call."""

    def __init__(self, policy: Evict) -> None:
        self.policy = policy
        self._now = thread_cpu_s
        self.spent_s, self.n_calls = 0.0, 0
        self.evict_s: list[float] = []
        """Of each eviction: to find the victim and to let it go."""
        self._victim_s = 0.0

    def _add(self, seconds: float) -> None:
        self.spent_s += seconds
        self.n_calls += 1

    def stored(self, entry: Cached, now_s: float) -> None:
        start_s = self._now()
        self.policy.stored(entry, now_s)
        self._add(self._now() - start_s)

    def used(self, entry: Cached, now_s: float) -> None:
        start_s = self._now()
        self.policy.used(entry, now_s)
        self._add(self._now() - start_s)

    def idle(self, entry: Cached, now_s: float) -> None:
        start_s = self._now()
        self.policy.idle(entry, now_s)
        self._add(self._now() - start_s)

    def busy(self, entry: Cached) -> None:
        start_s = self._now()
        self.policy.busy(entry)
        self._add(self._now() - start_s)

    def victim(self, now_s: float) -> Cached:
        start_s = self._now()
        entry = self.policy.victim(now_s)
        self._victim_s = self._now() - start_s
        self._add(self._victim_s)
        return entry

    def evicted(self, entry: Cached, now_s: float) -> None:
        start_s = self._now()
        self.policy.evicted(entry, now_s)
        seconds = self._now() - start_s
        self._add(seconds)
        self.evict_s.append(self._victim_s + seconds)

    def score(self, entry: Cached, now_s: float) -> float:
        start_s = self._now()
        score = self.policy.score(entry, now_s)
        self._add(self._now() - start_s)
        return score

    def __len__(self) -> int:
        start_s = self._now()
        n = len(self.policy)
        self._add(self._now() - start_s)
        return n


class TimedPool(BlockPool):
    """A pool whose evictions are timed."""

    take_s: list[float]

    def take(self) -> int:
        if self._free:
            return super().take()
        start_s = thread_cpu_s()
        block = super().take()
        self.take_s.append(thread_cpu_s() - start_s)
        return block


def reading_s(n: int = 20_000) -> float:
    """What two readings of the clock find between them when nothing happens there."""
    now = thread_cpu_s
    found = []
    for _ in range(n):
        start_s = now()
        found.append(now() - start_s)
    return mean(sorted(found)[: n * 9 // 10])  # without those that something else came between


@dataclass
class Steps:
    """A value a step. Times in seconds."""

    spent_s: list[float] = field(default_factory=list)
    policy_s: list[float] = field(default_factory=list)
    decodes: list[bool] = field(default_factory=list)
    """Whether all its rows are decodes."""
    ended: list[int] = field(default_factory=list)
    """Requests that ended in it."""
    idle: list[int] = field(default_factory=list)
    add_s: float = 0.0
    added: int = 0

    def mean_us(self, of: list[float], *, decodes: bool | None = None, ends: bool | None = None) -> float:
        return 1e6 * mean(
            x
            for x, is_decode, n_ended in zip(of, self.decodes, self.ended, strict=True)
            if (decodes is None or is_decode == decodes) and (ends is None or bool(n_ended) == ends)
        )


class Service:
    """A scheduler that always has as many requests as it may, and an executor that takes no time of ours."""

    def __init__(self, policy: str, n_blocks: int, *, timed: bool = False, timed_takes: bool = False) -> None:
        from tenon.engine.config import EngineConfig
        from tenon.engine.executors.simulated import SimulatedExecutor, TrueTokens
        from tenon.engine.policies.table import POLICIES as MADE
        from tenon.engine.recompute import recompute_cost
        from tenon.engine.scheduler import Scheduler
        from tenon.models.shapes import find
        from tenon.sim.clock import VirtualClock

        model, config = find(MODEL), EngineConfig(max_sequences=SEQUENCES, evict=policy)
        groups = model.kv_groups(MODEL, config.block_tokens, 2)
        cost_of = recompute_cost(model, config.block_tokens)
        self.scheduler = Scheduler(
            config, groups, n_blocks, model=MODEL, vocab_size=model.vocab_size, eos_ids=(),
            max_model_len=MAX_CONTEXT + 1, secret=bytes(32), cost_of=cost_of,
        )  # fmt: skip
        made = MADE[policy](n_blocks)
        self.policy = TimedPolicy(made) if timed else made
        pool = TimedPool if timed_takes else BlockPool
        (self.pool,) = self.scheduler.pools = [pool(n_blocks, config.block_tokens, lambda: self.policy, cost_of)]
        if isinstance(self.pool, TimedPool):
            self.pool.take_s = []
        self._clock, self._oracle = VirtualClock(), TrueTokens()
        self._executor = SimulatedExecutor(lambda shape: STEP_S, self._oracle, self._clock, device="", dtype="")
        self._executor.allocate(groups, n_blocks)
        self._chat = Chat(0, model.vocab_size)
        self._n_sent = 0

    def warm(self, n_steps: int) -> None:
        """Fill the pool with contexts that are over, told to it directly, then serve for a while."""
        while self.pool.n_evicted == 0:
            turn = self._chat.next()
            self._send(Turn(np.concatenate([turn.prompt, turn.answer]), turn.answer[:1]), Steps())
            ((name, request),) = self.scheduler.requests.items()
            self._publish(request.seqs[0])
            self._oracle.forget(request.seqs[0].id)
            self.scheduler.abort(name)
            self._clock.advance(STEP_S)
        self.run(n_steps)

    def _publish(self, seq: Any) -> None:
        pool, blocks = self.pool, []
        self.scheduler.at(self._clock.now_s())
        for i in range(seq.n_tokens // seq.block_tokens):
            key, content = seq.key_and_content(i)
            found = pool.lookup(key, content)
            if found is not None:
                pool.take_over(found)
                blocks.append(found)
                continue
            blocks.append(pool.take())
            pool.publish(blocks[-1], key, content, i * seq.block_tokens, content[:DIGEST_BYTES])
        for block in reversed(blocks):
            pool.release(block, seq.n_tokens)

    def run(self, n_steps: int) -> Steps:
        steps = Steps()
        for _ in range(n_steps):
            while len(self.scheduler.requests) < SEQUENCES:
                self._send(self._chat.next(), steps)
            self._step(steps)
        return steps

    def _send(self, turn: Turn, steps: Steps) -> None:
        from tenon.engine.messages import Add

        name = f"r{self._n_sent}"
        self._n_sent += 1
        n_answer = len(turn.answer)
        add = Add(name, tuple(turn.prompt.tolist()), n_answer, seed=0, temperature=0.0, ignore_eos=True)
        start_s = thread_cpu_s()
        self.scheduler.add(add)
        steps.add_s += thread_cpu_s() - start_s
        steps.added += len(add.prompt)
        self._oracle.tell(self.scheduler.requests[name].seqs[0].id, turn.answer)

    def _step(self, steps: Steps) -> None:
        scheduler, policy, now = self.scheduler, self.policy, thread_cpu_s
        is_timed = isinstance(policy, TimedPolicy)
        if is_timed:
            policy.spent_s, policy.n_calls = 0.0, 0
        start_s = now()
        step = scheduler.schedule(self._clock.now_s())
        spent_s = now() - start_s
        if step is None:
            raise IntegrityError("the scheduler has nothing to do")
        seqs = {seq.request.add.request_id: seq.id for seq in scheduler.running}
        result = self._executor.poll(self._executor.submit(step))
        start_s = now()
        deltas = scheduler.commit(step, result)
        steps.spent_s.append(spent_s + now() - start_s)
        if is_timed:
            steps.policy_s.append(policy.spent_s - policy.n_calls * READING_S)
        ended = [delta for delta in deltas if delta.finish_reason is not None]
        for delta in ended:
            self._oracle.forget(seqs[delta.request_id])
        steps.ended.append(len(ended))
        alone = step.n_rows == len(step.seq) == step.n_outputs
        steps.decodes.append(alone and int(step.out_position.min()) > 0)
        steps.idle.append(self.pool.n_idle)


READING_S = reading_s()


class Policy:
    """One policy; each sample serves so many steps further."""

    def __init__(self, policy: str) -> None:
        self._policy = policy

    def setup(self, cell: dict[str, Any]) -> None:
        self._n_steps, self._evicts = cell["steps"], cell["evicts"]
        kinds = [{"timed_takes": True}] if self._evicts else [{}, {"timed": True}]
        self._services = [Service(self._policy, cell["blocks"], **kind) for kind in kinds]
        for service in self._services:
            service.warm(cell["warm"])

    def sample(self) -> dict[str, float]:
        return self._sample_takes() if self._evicts else self._sample_steps()

    def _sample_steps(self) -> dict[str, float]:
        plain, timed = self._services
        policy = timed.policy
        n_evicted = plain.pool.n_evicted
        steps = plain.run(self._n_steps)
        policy.evict_s.clear()
        told = timed.run(self._n_steps)
        if list(plain.pool.log)[-1000:] != list(timed.pool.log)[-1000:]:
            raise IntegrityError("the timed policy evicts others than the one that is not timed")
        evict_us = 1e6 * (np.array(policy.evict_s) - 2 * READING_S)
        return {
            "quiet_us": steps.mean_us(steps.spent_s, decodes=True, ends=False),
            "quiet_policy_us": told.mean_us(told.policy_s, decodes=True, ends=False),
            "decode_us": steps.mean_us(steps.spent_s, decodes=True),
            "decode_policy_us": told.mean_us(told.policy_s, decodes=True),
            "step_us": steps.mean_us(steps.spent_s),
            "step_policy_us": told.mean_us(told.policy_s),
            "add_us_per_token": 1e6 * steps.add_s / steps.added,
            "evict_policy_us": float(np.median(evict_us)),
            "evictions_per_step": (plain.pool.n_evicted - n_evicted) / self._n_steps,
            "decode_steps_percent": 100 * sum(steps.decodes) / self._n_steps,
        }

    def _sample_takes(self) -> dict[str, float]:
        (service,) = self._services
        service.pool.take_s.clear()
        steps = service.run(self._n_steps)
        take_us = 1e6 * (np.array(service.pool.take_s) - READING_S)
        return {
            "take_us": float(np.median(take_us)),
            "idle_blocks": mean(steps.idle),
        }

    def close(self) -> None:
        self._services.clear()


CONTENDERS = {name: ContenderEntry("bench.kv_overhead:Policy", {"policy": name}) for name in POLICIES}


def cells(quick: bool) -> list[Cell]:
    rounds, n_steps, n_warm = (1, 200, 100) if quick else (5, 1000, 300)
    chosen = FEW if quick else ()
    steps = {"blocks": 100_000, "warm": n_warm, "steps": n_steps, "evicts": False}
    takes = {"blocks": 113_000, "warm": n_warm, "steps": n_steps, "evicts": True}
    return [
        Cell("64 sequences", steps, rounds, 0, chosen, sample_s=n_steps / 400, limit_s=300),
        Cell("100,000 idle", takes, rounds, 0, chosen, sample_s=n_steps / 1000, limit_s=300),
    ]


def checks(result: Result) -> list[Check]:
    out: list[Check] = []
    there = [name for name in POLICIES if any(one.contender == name for one in result.series)]
    of_steps = {
        "quiet_us": "a step of decodes in which none ends",
        "decode_us": "a step of decodes",
        "step_us": "a step, prompts included",
    }
    for metric, what in of_steps.items():
        for policy in there:
            value = result.median("64 sequences", policy, metric)
            out.append(at_most(f"{policy}: us of {what}, mean", value, STEP_AT_MOST_US))
    for policy in there:
        value = result.median("100,000 idle", policy, "take_us")
        out.append(at_most(f"{policy}: us to take a block by eviction, median", value, TAKE_AT_MOST_US))
    return out
