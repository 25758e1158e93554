"""Speculative decoding for real: the embedded pair on held-out code, every drafter and policy against plain decoding.

Prompts are 256 tokens from the middle of files that neither model was trained on (the standard library's held-out
packages). A cell is a temperature and a number of sequences that decode at a time; whoever ends makes room for the next
prompt. All contenders are asked for the same tokens by the same seeds. What is timed is all of serving a sample's
prompts, their prefill included. Nothing said in one sample is known in the next: the automaton is forgotten in between,
what was learned of guesses and of steps is kept, as in a server.

``ours`` is the suffix automaton with the policy "pays". Cells "T=": ours and plain decoding alone, and many rounds, for
whether guesses ever cost anything is asked to a few hundredths; cells "all": every drafter and policy. Cells "counts":
what came of guesses (accepted tokens per verified tree and by depth, predicted over accepted), and how much of what is
said repeats itself (4-grams that have stood in the output before). Cell "steps": seconds of steps of 1 to 64 rows. Cell
"choosing": CPU time of choosing nodes for 64 sequences of 32 guesses each, of judging them, in Python and in C. Cell
"off": an engine that could guess and is asked not to, over one that cannot."""

from __future__ import annotations

import sysconfig
from math import exp, log, sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Final

from tenon.base import clock
from tenon.base.result import Check, ContenderEntry, Result, at_least, at_most
from tenon.bench.claim import Cell

TITLE = "speculative decoding on held-out code: drafters and policies over plain decoding, embedded pair"
BASELINE = "none"
LIMITS = True
RATE = "tokens_per_s"

PACKAGES: Final = ("asyncio", "concurrent", "html", "json", "sqlite3", "tomllib", "wsgiref", "zoneinfo")
PROMPT_TOKENS, MAX_TOKENS = 256, 256
PROMPTS: Final = {1: 6, 4: 10, 16: 32}
TEMPERATURES: Final = (0.0, 0.7, 1.0)
DEPTHS: Final = 8
ROWS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def prompts(n: int) -> list[str]:
    """The middles of ``n`` files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for package in PACKAGES for path in sorted((library / package).glob("*.py"))]
    texts = [path.read_text() for path in files if path.stat().st_size > 4000]
    step = max(1, len(texts) // n)
    return [text[len(text) // 3 :] for text in texts[::step][:n]]


class Tenon:
    """The engine in this process. ``counts``: tell what came of guesses instead of the rate."""

    def __init__(self, *, counts: bool = False, guesses: int = -1, **config: Any) -> None:
        self._config, self._counts, self._guesses = config, counts, guesses

    def setup(self, cell: dict[str, Any]) -> None:
        import torch

        from tenon import LLM

        self._cell, self._sample = cell, 0
        threads = torch.get_num_threads()
        self._llm = LLM("embedded", progress=False, threads=threads, kv_bytes=256 * 2**20, **self._config)
        tokenizer = self._llm.tokenizer
        encoded = [tokenizer.encode(text, add_special=True)[:PROMPT_TOKENS] for text in prompts(cell["prompts"])]
        self._prompts = [tuple(ids) for ids in encoded]
        self._serve()

    def _serve(self) -> tuple[int, int, float, list[list[int]]]:
        """Tokens, steps, seconds, and what was said."""
        from tenon.engine.messages import Add

        engine, cell = self._llm.engine, self._cell
        self._sample += 1
        waiting = list(enumerate(self._prompts))
        said: dict[str, list[int]] = {}
        live = steps = 0
        start_s = clock.SYSTEM.now_s()
        while waiting or engine.has_work:
            while waiting and live < cell["batch"]:
                i, ids = waiting.pop(0)
                add = Add(
                    f"{self._sample}-{i}", ids, MAX_TOKENS, 1000 * self._sample + i, temperature=cell["temperature"],
                    ignore_eos=True, speculate=self._guesses,
                )  # fmt: skip
                engine.add(add)
                live += 1
            for delta in engine.tick(clock.SYSTEM.now_s()):
                said.setdefault(delta.request_id, []).extend(delta.ids)
                live -= delta.finish_reason is not None
            steps += 1
        taken_s = clock.SYSTEM.now_s() - start_s
        engine.reset()
        return sum(map(len, said.values())), steps, taken_s, list(said.values())

    def sample(self) -> dict[str, float]:
        speculation = self._llm.engine.scheduler.speculation
        before = None
        if speculation is not None:
            c = speculation.counts
            before = c.trees, c.nodes, c.accepted, c.expected, list(c.reached), list(c.accepted_at)
        n_tokens, n_steps, taken_s, said = self._serve()
        if not self._counts:
            return {RATE: n_tokens / taken_s}
        found = {
            "tokens_per_step_and_sequence": n_tokens / n_steps / self._cell["batch"],
            "repeated": mean(map(repeated, said)),
        }
        if speculation is not None and before is not None:
            c = speculation.counts
            trees, nodes, accepted = c.trees - before[0], c.nodes - before[1], c.accepted - before[2]
            found["nodes_per_tree"] = nodes / max(1, trees)
            found["accepted_per_tree"] = accepted / max(1, trees)
            found["predicted_over_accepted"] = (c.expected - before[3]) / max(1, accepted)
            for depth in range(DEPTHS):
                reached = c.reached[depth] - before[4][depth]
                found[f"accepted_at_{depth + 1}"] = (c.accepted_at[depth] - before[5][depth]) / max(1, reached)
        return found

    def close(self) -> None:
        self._llm.close()


def repeated(ids: list[int]) -> float:
    """The share of 4-grams that have stood there before."""
    seen: set[tuple[int, ...]] = set()
    again = 0
    for i in range(len(ids) - 3):
        gram = tuple(ids[i : i + 4])
        again += gram in seen
        seen.add(gram)
    return again / max(1, len(ids) - 3)


class Steps:
    """Milliseconds of the target's steps by their rows, and the rows at which one takes twice as long as with one."""

    def setup(self, cell: dict[str, Any]) -> None:
        import torch

        from tenon.engine.build import build_engine
        from tenon.engine.config import EngineConfig

        self._config = EngineConfig(threads=torch.get_num_threads(), kv_bytes=64 * 2**20)
        self._engine = build_engine(self._config, lambda *_: None)

    def sample(self) -> dict[str, float]:
        from tenon.engine.speculation.measure import step_times

        engine = self._engine
        groups = engine.scheduler.tables.pools
        found = step_times(engine.executor, groups, engine.identity.n_blocks, self._config, clock.SYSTEM, 2.0, 4096)  # type: ignore[arg-type]
        metrics = {f"ms_{rows}": 1e3 * found[rows] for rows in ROWS}
        knee = next((rows for rows in ROWS if found[rows] >= 2 * found[1]), ROWS[-1])
        return metrics | {"knee_rows": float(knee)}

    def close(self) -> None:
        self._engine.close()


class Choosing:
    """CPU milliseconds of one round's judging and choosing, 64 sequences of 32 guesses each: median and 99th percentile
    over many rounds. ``quick``: in C."""

    def __init__(self, *, policy: str, quick: bool = False) -> None:
        self._name, self._quick = policy, quick

    def setup(self, cell: dict[str, Any]) -> None:
        import numpy as np

        from tenon.engine.policies.calibrate import Calibrator
        from tenon.engine.policies.forest import Forest
        from tenon.engine.policies.speculate import Load
        from tenon.engine.policies.step_time import StepTimes
        from tenon.engine.policies.table import SPECULATES
        from tenon.engine.speculation import native

        n, room, self._rounds = cell["sequences"], cell["guesses"], cell["rounds"]
        rng = np.random.default_rng(0)
        times = StepTimes({1: 0.010, 64: 0.011, 256: 0.016, 1024: 0.050})
        lib = native.load() if self._quick else None
        self._calibrator = native.QuickCalibrator(4, lib) if lib else Calibrator(4)
        self._policy = native.QuickPays(lib, times) if lib else SPECULATES[self._name]()
        self._load = Load(n, 4096, times)
        self._warm = np.zeros(n, np.int64)
        self._forests = []
        for _ in range(16):
            forest = Forest.empty(n, room)
            for i in range(n):
                children: dict[int, int] = {}
                for c in range(room):
                    parent = int(rng.integers(-1, c)) if c else -1
                    while children.get(parent, 0) > 2:
                        parent = int(rng.integers(-1, c))
                    forest.parent[i, c], forest.rank[i, c] = parent, children.get(parent, 0)
                    forest.depth[i, c] = 1 if parent < 0 else forest.depth[i, parent] + 1
                    children[parent] = children.get(parent, 0) + 1
            forest.q[:] = rng.uniform(0.05, 0.95, (n, room))
            forest.source[:] = rng.integers(0, 4, (n, room))
            self._forests.append(forest)

    def sample(self) -> dict[str, float]:
        judging, choosing = [], []
        for k in range(self._rounds):
            forest = self._forests[k % len(self._forests)]
            start_s = clock.thread_cpu_s()
            self._calibrator.judge(forest, self._warm)
            judged_s = clock.thread_cpu_s()
            self._policy.choose(forest, self._load)
            choosing.append(clock.thread_cpu_s() - judged_s)
            judging.append(judged_s - start_s)
        choosing.sort()
        return {
            "choose_p50_ms": 1e3 * median(choosing),
            "choose_p99_ms": 1e3 * choosing[len(choosing) * 99 // 100],
            "judge_p50_ms": 1e3 * median(judging),
        }

    def close(self) -> None:
        self._forests.clear()


def _tenon(drafters: str, policy: str, **options: Any) -> ContenderEntry:
    return ContenderEntry("bench.speculation:Tenon", {"speculative": drafters, "speculative_policy": policy} | options)


POLICIES: Final = ("throughput", "equal-split", "fixed-tree", "chain-2", "chain-4", "chain-8", "by-batch", "per-second")
DRAFTERS: Final = {
    "ngram": ("ngram", "pays"),
    "draft model": ("embedded-draft", "pays"),
    "draft model, chain-3": ("embedded-draft", "chain-3"),
    "suffix and draft model": ("suffix,embedded-draft", "pays"),
}
CHOOSERS: Final = ("pays", *POLICIES)
CONTENDERS = {
    "ours": _tenon("suffix", "pays"),
    "none": ContenderEntry("bench.speculation:Tenon", {}),
    "off": _tenon("suffix", "pays", guesses=0),
    **{name: _tenon("suffix", name) for name in POLICIES},
    **{name: _tenon(*entry) for name, entry in DRAFTERS.items()},
    "ours, counted": _tenon("suffix", "pays", counts=True),
    "chain-8, counted": _tenon("suffix", "chain-8", counts=True),
    "ngram, counted": _tenon("ngram", "chain-8", counts=True),
    "draft model, counted": _tenon("embedded-draft", "chain-8", counts=True),
    "none, counted": ContenderEntry("bench.speculation:Tenon", {"counts": True}),
    "steps": ContenderEntry("bench.speculation:Steps", {}),
    **{f"{name}, chosen": ContenderEntry("bench.speculation:Choosing", {"policy": name}) for name in CHOOSERS},
    "pays in C, chosen": ContenderEntry("bench.speculation:Choosing", {"policy": "pays", "quick": True}),
}
TIMED: Final = ("ours", "none", *POLICIES, *DRAFTERS)
COUNTED: Final = tuple(name for name in CONTENDERS if name.endswith("counted"))
CHOSEN: Final = tuple(name for name in CONTENDERS if name.endswith("chosen"))
QUICKLY_CHOSEN: Final = ("pays, chosen", "chain-8, chosen", "pays in C, chosen")

SPEEDUP, LEAST, OFF = 1.5, 0.97, 0.98
P50_MS, P99_MS = 0.3, 1.0
CALIBRATED = 0.10


def cells(quick: bool) -> list[Cell]:
    return _quick_cells() if quick else _all_cells()


def _cell(name: str, temperature: float, batch: int, rounds: int, who: tuple[str, ...], prompts: int = 0) -> Cell:
    n = prompts or PROMPTS[batch]
    params = {"temperature": temperature, "batch": batch, "prompts": n}
    return Cell(f"{name} x{batch}", params, rounds, 1, who, n * (0.35 if batch == 1 else 0.08))


def _quick_cells() -> list[Cell]:
    return [
        _cell("T=0", 0.0, 1, 3, ("ours", "none"), 4),
        _cell("T=1", 1.0, 16, 3, ("ours", "none"), 16),
        _cell("off", 1.0, 16, 3, ("off", "none"), 16),
        _cell("counts T=0", 0.0, 4, 2, ("ours, counted", "chain-8, counted"), 8),
        Cell("steps", {}, 2, 1, ("steps",), 0.3),
        Cell("choosing", {"sequences": 64, "guesses": 32, "rounds": 500}, 2, 1, QUICKLY_CHOSEN, 0.5),
    ]


def _all_cells() -> list[Cell]:
    places = [(t, b) for t in TEMPERATURES for b in PROMPTS]
    return [
        *(_cell(f"T={t:g}", t, b, 21, ("ours", "none")) for t, b in places),
        *(_cell(f"all T={t:g}", t, b, 3, TIMED) for t, b in places),
        *(_cell("off", 1.0, b, 21, ("off", "none")) for b in (1, 16)),
        *(_cell(f"counts T={t:g}", t, 4, 5, COUNTED) for t in TEMPERATURES),
        Cell("steps", {}, 5, 1, ("steps",), 0.3),
        Cell("choosing", {"sequences": 64, "guesses": 32, "rounds": 2000}, 3, 1, CHOSEN, 2.0),
    ]


def lower_bound(result: Result, cell: str, over: str, under: str) -> float:
    """One-sided 95 % bound of the geometric mean of paired ratios."""
    pairs = zip(result.find(cell, over, RATE).samples, result.find(cell, under, RATE).samples, strict=True)
    logs = [log(a / b) for a, b in pairs]
    return exp(mean(logs) - STUDENT[len(logs)] * stdev(logs) / sqrt(len(logs)))


STUDENT: Final = {21: 1.725}
"""95 % quantiles of Student's t for so many samples; fewer say nothing to a few hundredths."""


def checks(result: Result) -> list[Check]:
    out: list[Check] = []
    for name, params in result.cells.items():
        rounds = {one.contender: len(one.samples) for one in result.series if one.cell == name}
        if name.startswith("T="):
            if params["batch"] == 1 and params["temperature"] == 0:
                ratio = result.ratio(name, "ours", "none", RATE)
                out.append(at_least(f"{name}: ours over none", ratio, SPEEDUP))
            if rounds["ours"] in STUDENT:
                bound = lower_bound(result, name, "ours", "none")
                out.append(at_least(f"{name}: ours over none, 95 % bound", bound, LEAST))
        elif name.startswith("off") and rounds["off"] in STUDENT:
            out.append(at_least(f"{name}: could guess over cannot", result.ratio(name, "off", "none", RATE), OFF))
        elif name.startswith("counts"):
            # Ours guesses so seldom at temperature 1 that it says little; chains of 8 guess always.
            for who in ("ours, counted", "chain-8, counted") if params["temperature"] < 1 else ("chain-8, counted",):
                value = result.median(name, who, "predicted_over_accepted")
                out.append(at_most(f"{name}: {who}, predicted over accepted off by", abs(value - 1), CALIBRATED))
        elif name == "choosing":
            for who in rounds:
                out.append(at_most(f"{who}: p50 ms", result.median(name, who, "choose_p50_ms"), P50_MS))
                out.append(at_most(f"{who}: p99 ms", result.median(name, who, "choose_p99_ms"), P99_MS))
    return out
