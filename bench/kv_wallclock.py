"""Eviction policies by the clock: TTFT and TPOT of the real engine on this machine, and what the simulator says of it.

Multi-turn sessions about documents, contexts to 8k tokens, against a cache that holds part of them. The model has the
shape of ``recompute_fit``: attention costs as much as all else at about 1.5K tokens. One engine in this process serves
the trace of a seed; a request that follows another comes its pause after that one's last token, with the answer in its
prompt that the engine gave. Time is real as long as there is work; when all wait for the next arrival, the clock that
the engine and its policies see jumps there, which changes no latency.

A sample is a seed, the same for all contenders. The first half of a trace warms cache and policies up and counts for
nothing. Metrics that begin with ``simulated_`` are those of the same trace in virtual time, priced by this machine's
calibration (`tenon device local --calibrate --numerics invariant`, to be run just before); all others are measured:

    ttft_*, tpot_mean    seconds, from when a request was due; over requests
    ttft_warm            mean over the requests that warm up
    computed             percent of the prompts' tokens
    computed_flops       percent of the prompts' FLOPs, those of the warm-up too
    pieces               that a prompt is computed in: holes and one
    busy                 percent of the clock's time in which there was work
    answers              a checksum of all answers
"""

from __future__ import annotations

import heapq
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from tenon.base.clock import SYSTEM
from tenon.base.result import Check, ContenderEntry, Result, at_least, at_most
from tenon.bench.claim import Cell

TITLE = "TTFT and TPOT under capacity pressure: eviction policies in the real engine, and in the simulator"
BASELINE = "lru-prefix"
LIMITS = False

CELL = "documents"
FIRST_SEED = 500
CONTEXT = 8192
NUMERICS = "invariant"
CAPACITY = 20_480
"""Tokens of keys and values."""
WARM = 0.5
"""Share of a trace's requests that only warms up."""
APART = 0.05
"""Contenders whose measured means differ by less have no order."""
AHEAD = 1.02
CLOSE = 0.15
"""Of the simulated to the measured mean."""


def trace(seed: int, n: int, rate: float) -> Any:
    """``n`` requests at ``rate`` per second on average.

    Everybody's prompt begins with the same 256 tokens. A third of the documents are asked about once; the rest three to
    five times, after pauses as people make (lognormal, spread as in Mooncake's conversations: P75 / P50 of 2.2), but a
    third as long: a median of 36 s. Lengths and rate were set under LRU alone, with other seeds, in the simulator, so
    that contexts that will be asked about again come to up to twice the cache, 1.1 times it on average, and that there
    is work a sixth of the time: with work half of the time, everybody waited for everybody, and two runs of the same
    engine differed by more than its policies do.
    """
    from tenon.workloads import arrivals
    from tenon.workloads.dialogue import Dialogue, merged
    from tenon.workloads.draws import Contents, LogNormal, Streams
    from tenon.workloads.trace import Segment, Trace, TraceRequest

    name = "documents in turns"
    streams, contents = Streams(seed, name), Contents(seed, name)
    shared = (Segment(contents.new(), 256),)
    lengths = LogNormal(streams.of("documents"), 1200, 0.9, 6912)
    turns, answers = streams.of("turns"), streams.of("answers")
    questions = LogNormal(streams.of("questions"), 40, 0.5, 160)
    pauses = LogNormal(streams.of("pauses"), 36.0, 1.05, 360.0)

    def session(number: int, at_s: float) -> list[TraceRequest]:
        dialogue = Dialogue(f"s{number}", contents, shared)
        dialogue.say(lengths.tokens())
        requests, pause_s = [], 0.0
        for _ in range(1 if turns.random() < 1 / 3 else int(turns.integers(3, 6))):
            dialogue.say(questions.tokens())
            requests.append(dialogue.ask(at_s, int(answers.integers(8, 33)), gap_s=pause_s))
            pause_s = pauses.draw()
            at_s += pause_s
        return requests

    per_session = 1 / 3 + 2 / 3 * 4
    starts = arrivals.poisson(streams.of("arrivals"), rate / per_session)
    requests = merged(session(i, at_s) for i, at_s in enumerate(starts))
    return Trace.make(name, "this bench", itertools.islice(requests, n), seed=seed, rate=rate)


def write_model(folder: Path) -> Any:
    """A ``config.json`` of the model; returns its ``ModelSpec``."""
    from bench.recompute_fit import spec
    from tenon.models.hf_config import read_config

    it = spec()
    fields = {
        "model_type": it.family, "architectures": ["LlamaForCausalLM"], "vocab_size": it.vocab_size,
        "hidden_size": it.hidden_size, "num_hidden_layers": it.n_layers, "num_attention_heads": it.n_heads,
        "num_key_value_heads": it.n_kv_heads, "head_dim": it.head_dim, "intermediate_size": it.intermediate_size,
        "max_position_embeddings": it.max_position, "tie_word_embeddings": it.tie_embeddings, "dtype": it.dtype,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    return read_config(folder)


class WorkingClock:
    """The machine's clock, begun at 0, that can jump over time in which there is nothing to do."""

    def __init__(self) -> None:
        self._start_s = SYSTEM.now_s()

    def now_s(self) -> float:
        return SYSTEM.now_s() - self._start_s

    def wall_s(self) -> float:
        return SYSTEM.wall_s()

    def restart(self) -> None:
        self._start_s = SYSTEM.now_s()

    def jump_to(self, at_s: float) -> float:
        """Returns how far it was; a time that is past is no jump."""
        ahead_s = max(0.0, at_s - self.now_s())
        self._start_s -= ahead_s
        return ahead_s


class Load:
    """One trace in front of the real engine: who is due when, with which prompt, and when its tokens came."""

    def __init__(self, engine: Any, clock: WorkingClock, requests: Sequence[Any]) -> None:
        self._engine, self._clock = engine, clock
        self._requests = {request.id: request for request in requests}
        self._followers: dict[str, list[Any]] = {}
        self._due: list[tuple[float, int, Any]] = []
        self._order = itertools.count()
        self._tokens: dict[int, list[int]] = {}
        """Of each content; an answer's are the engine's own."""
        self._token_s: dict[str, list[float]] = {}
        self._intended_s: dict[str, float] = {}
        self._before = engine.stats(clock.now_s())
        self.outcomes: dict[str, Any] = {}
        self.holes: dict[str, int] = {}
        self.idle_s = self.end_s = 0.0
        for request in requests:
            if request.after:
                self._followers.setdefault(request.after, []).append(request)
            else:
                heapq.heappush(self._due, (request.arrival_s, next(self._order), request))

    def run(self) -> None:
        """Serve all."""
        engine, clock = self._engine, self._clock
        while self._due or engine.has_work:
            if not engine.has_work:
                self.idle_s += clock.jump_to(self._due[0][0])
            while self._due and self._due[0][0] <= clock.now_s():
                due_s, _, request = heapq.heappop(self._due)
                self._send(request, due_s)
            deltas = engine.tick(clock.now_s())
            self._hear(deltas, clock.now_s())
        self.end_s = clock.now_s()

    def _send(self, request: Any, due_s: float) -> None:
        from tenon.engine.messages import Add

        prompt = [token for segment in request.prompt for token in self._content(segment.content, segment.n)]
        self._intended_s[request.id], self._token_s[request.id] = due_s, []
        self._tokens[request.output] = []
        self._engine.add(
            Add(request.id, tuple(prompt), request.n_output, 0, temperature=0.0, ignore_eos=True, arrival_s=due_s)
        )

    def _content(self, content: int, n: int) -> list[int]:
        from tenon.workloads.trace import content_tokens

        if content not in self._tokens:
            self._tokens[content] = content_tokens(content, n, self._engine.identity.vocab_size).tolist()
        return self._tokens[content]

    def _hear(self, deltas: Sequence[Any], now_s: float) -> None:
        from tenon.workloads.report import Outcome

        for miss in self._engine.take_misses():
            self.holes[miss.request_id] = miss.holes
        for delta in deltas:
            request, stamps = self._requests[delta.request_id], self._token_s[delta.request_id]
            stamps += [now_s] * len(delta.ids)
            self._tokens[request.output] += delta.ids
            if delta.finish_reason is None:
                continue
            due_s = self._intended_s[request.id]
            self.outcomes[request.id] = Outcome(request.id, due_s, due_s, now_s, request.n_prompt, tuple(stamps),
                                                delta.cached_tokens)  # fmt: skip
            for follower in self._followers.get(request.id, ()):
                heapq.heappush(self._due, (now_s + follower.gap_s, next(self._order), follower))

    def computed_flops(self) -> float:
        """Percent of the prompts' FLOPs."""
        return computed_flops(self._engine.stats(self.end_s), self._before)

    def answers(self) -> int:
        """A checksum of all answers, in the order of the trace."""
        found = 0
        for request in self._requests.values():
            found = crc32(np.array(self._tokens[request.output], np.int32).tobytes(), found)
        return found


class Policy:
    """The engine with one way to evict and to reuse. Keywords are ``EngineConfig``'s."""

    def __init__(self, **config: Any) -> None:
        self._config = config

    def setup(self, cell: dict[str, Any]) -> None:
        import torch

        from tenon.base.errors import ConfigError
        from tenon.cost import calibration
        from tenon.cost.device import find
        from tenon.engine.build import build_engine
        from tenon.engine.config import EngineConfig
        from tenon.engine.simulate import device_cost

        threads, calibrated = torch.get_num_threads(), calibration.load().measured
        if (calibrated.threads, calibrated.numerics) != (threads, NUMERICS):
            raise ConfigError(
                f"calibrated for {calibrated.threads} threads and {calibrated.numerics} numerics, asked to run with "
                f"{threads} and {NUMERICS}; run `tenon device local --calibrate --numerics {NUMERICS}`"
            )
        self._cell, self._seed = cell, FIRST_SEED
        self._folder = tempfile.TemporaryDirectory()
        self._spec = write_model(Path(self._folder.name))
        (group,) = self._spec.kv_groups("", 16, 2)
        # One more block than the capacity: the null block.
        config = EngineConfig(
            model=self._folder.name, weights_seed=1, numerics=NUMERICS, threads=threads, max_model_len=CONTEXT,
            max_step_tokens=512, block_tokens=16, kv_bytes=(CAPACITY // 16 + 1) * group.block_bytes, **self._config,
        )  # fmt: skip
        self._engine_config, self._clock = config, WorkingClock()
        self._engine = build_engine(config, lambda *_: None, self._clock)
        self._cost = device_cost(self._spec, find("local"), self._spec.dtype)
        # Memory, code and caches that a first run would find cold.
        Load(self._engine, self._clock, trace(0, 4, 100.0).requests).run()

    def sample(self) -> dict[str, float]:
        made = trace(self._seed, self._cell["requests"], self._cell["rate"])
        self._seed += 1
        names = [request.id for request in made.requests]
        n_warm = int(WARM * len(names))
        self._engine.reset()
        self._clock.restart()
        load = Load(self._engine, self._clock, made.requests)
        load.run()
        measured = [load.outcomes[name] for name in names]
        metrics = figures(measured[n_warm:]) | {
            "ttft_warm": figures(measured[:n_warm])["ttft_mean"],
            "computed_flops": load.computed_flops(),
            "pieces": 1 + float(np.mean([load.holes[name] for name in names[n_warm:]])),
            "busy": 100 * (1 - load.idle_s / load.end_s),
            "answers": load.answers(),
        }
        return metrics | {f"simulated_{name}": value for name, value in self._simulated(made, n_warm).items()}

    def _simulated(self, made: Any, n_warm: int) -> dict[str, float]:
        """The figures in virtual time."""
        from tenon.engine.simulate import Marks, Simulation

        marks = Marks("documents", "local", "calibrated")
        simulation = Simulation(self._engine_config, self._spec, self._cost, marks, memory_bytes=0)
        before = simulation.engine.stats(0.0)
        served = simulation.run(made)
        end = simulation.engine.stats(served.end_s)
        return figures(served.outcomes[n_warm:]) | {"computed_flops": computed_flops(end, before)}

    def close(self) -> None:
        self._engine.close()
        self._folder.cleanup()


def figures(outcomes: Sequence[Any]) -> dict[str, float]:
    """Of requests that were served; seconds, and percent of prompt tokens."""
    ttft_s = np.array([outcome.token_s[0] - outcome.intended_s for outcome in outcomes])
    tpot_s = [(it.token_s[-1] - it.token_s[0]) / (len(it.token_s) - 1) for it in outcomes]
    cached = sum(outcome.cached_tokens for outcome in outcomes)
    return {
        "ttft_mean": float(ttft_s.mean()),
        "ttft_p50": float(np.quantile(ttft_s, 0.5)),
        "ttft_p95": float(np.quantile(ttft_s, 0.95)),
        "tpot_mean": float(np.mean(tpot_s)),
        "computed": 100 * (1 - cached / sum(outcome.n_prompt for outcome in outcomes)),
    }


def computed_flops(end: Any, before: Any) -> float:
    """Percent of the FLOPs of prompts that came in between two ``Stats``."""
    saved, asked = end.saved_flops - before.saved_flops, end.prompt_flops - before.prompt_flops
    return 100 * (1 - float(saved / asked))


OURS, PUBLISHED = "ours", ("asymcache", "asymcache-fixed")
CONFIGS = {
    OURS: {"evict": "tuned", "reuse": "blocks"},
    "lru-prefix": {"evict": "lru", "reuse": "prefix"},
    "lru-blocks": {"evict": "lru", "reuse": "blocks"},
    "asymcache": {"evict": "asymcache", "reuse": "blocks"},
    "asymcache-fixed": {"evict": "asymcache-fixed", "reuse": "blocks"},
}
CONTENDERS = {name: ContenderEntry("bench.kv_wallclock:Policy", config) for name, config in CONFIGS.items()}
FEW = (OURS, "lru-prefix", "asymcache")


def cells(quick: bool) -> list[Cell]:
    if quick:
        return [Cell(CELL, {"requests": 70, "rate": 0.5}, 1, 0, FEW, 35.0, 300)]
    return [Cell(CELL, {"requests": 150, "rate": 0.5}, 3, 0, (), 70.0, 600)]


def misplaced(measured: dict[str, float], simulated: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Pairs that are apart in the measurement and the other way round in the simulator."""
    for one, other in itertools.permutations(measured, 2):
        if measured[one] < (1 - APART) * measured[other] and simulated[one] > simulated[other]:
            yield one, other


def checks(result: Result) -> list[Check]:
    def mean(contender: str, metric: str = "ttft_mean") -> float:
        return float(np.mean(result.find(CELL, contender, metric).samples))

    there = [name for name in CONFIGS if any(one.contender == name for one in result.series)]
    measured = {name: mean(name) for name in there}
    simulated = {name: mean(name, "simulated_ttft_mean") for name in there}
    told = result.find(CELL, BASELINE, "answers").samples
    differ = sum(
        a != b
        for name in there
        for a, b in zip(result.find(CELL, name, "answers").samples, told, strict=True)
    )  # fmt: skip
    published = min(measured[name] for name in PUBLISHED if name in measured)
    (again,) = (one.median for one in result.a_a if one.metric == "ttft_mean")
    out = [
        at_most("mean TTFT, ours and ours again, apart by", abs(again - 1), APART),
        at_most("traces whose answers are not the baseline's", differ, 0),
        at_most("mean TTFT, ours over LRU prefix-stop", measured[OURS] / measured[BASELINE], 1.0),
        at_most("mean TTFT, ours over published AsymCache, the better form", measured[OURS] / published, AHEAD),
        at_most("pairs that the simulator ranks otherwise", len(list(misplaced(measured, simulated))), 0),
    ]
    for name in there:
        ratio = simulated[name] / measured[name]
        out.append(at_most(f"{name}: mean TTFT, simulated over measured", ratio, 1 + CLOSE))
        out.append(at_least(f"{name}: mean TTFT, simulated over measured", ratio, 1 - CLOSE))
    return out
