"""Requests with objectives for the time between tokens: who is served in time under which policy. Simulated.

The engine that serves, its scheduler and its policies (``tenon.engine.simulate``), on devices that are not here and
with a draft model that is described (``tenon.engine.speculation.simulated``): AdaServe's mix of copilots, chats and
summaries (EuroSys'26, arXiv 2501.12162), 150 seconds of it, of which the first 30 fill the engine and count for
nothing; five seeds that all contenders share. A round is a seed.

Steps take what AdaServe's artifact measured of them, by their rows (``llama``: Llama-3.1-70B on 4 A100; ``qwen``:
Qwen2.5-32B on 2), or what the cost model says (``h200``: Qwen2.5-32B on one H200, where steps that were measured took
up to a quarter longer: docs/cost.md). All policies pay alike for the draft model's levels.

    sarathi, vllm   no guesses: prompts beside decodes, or in steps of their own; 256 sequences, the others 64
    chain-K         as most engines guess
    paper           AdaServe's algorithm 2 with its artifact's budget
    ours            budget by price, guesses by lateness, prompts as far as nobody gets late by them

Metrics: ``met``, percent of requests whose mean time per token after the first keeps their class's objective;
``lateness``, of those that miss it, their time over the objective in the mean (1 where nobody does); ``goodput``,
output tokens a second of those that keep it, ``requests``, these a second; ``ttft99`` seconds; ``gap99`` ms, the 99th
percentile of requests' longest waits between two tokens; ``emitted`` tokens a verified tree; ``explained``, percent of
each request's time that its ledger explains, the worst.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from tenon.base.result import Check, ContenderEntry, Result, at_least, at_most
from tenon.bench.claim import Cell
from tenon.workloads.report import Outcome

if TYPE_CHECKING:
    from tenon.engine.simulate import Simulation
    from tenon.workloads.trace import Trace

TITLE = "objectives for the time between tokens, in a simulated engine: who is served in time"
BASELINE = "sarathi"
LIMITS = False

OURS, PAPER = "ours", "paper"
CHAINS = ("chain-2", "chain-4", "chain-6", "chain-8")
SEEDS, DURATION_S, WARM_S = 5, 150.0, 30.0
QUICK_SEEDS, QUICK_DURATION_S = 2, 75.0

TABLES: dict[str, list[tuple[int, float]]] = {
    # Rows, milliseconds: AdaServe's artifact. Beyond the last the slope goes on.
    "llama": [(1, 30), (128, 55), (256, 85), (384, 105), (512, 125), (640, 145)],
    "qwen": [(1, 28), (128, 48), (256, 66), (384, 84), (512, 104), (640, 124), (768, 144), (896, 164), (1024, 188)],
}
# Of each: objectives per token of the three classes (s), the paper's budget, a draft's level (s, and s a row).
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"tpot": (0.036, 0.05, 0.15), "budget": 512, "draft": (4e-3, 1e-5), "easy": (12.0, 1.0)},
    "qwen": {"tpot": (0.0336, 0.05, 0.15), "budget": 256, "draft": (3e-3, 1e-5), "easy": (7.0, 1.0)},
    "h200": {"tpot": (0.0204, 0.0284, 0.085), "budget": 256, "draft": (1.5e-3, 1e-5), "easy": (7.0, 1.0)},
}
CLASSES = ("coding", "chat", "summary")
# Percent of requests in time (AdaServe, figures 8 and 9, read off the plots): none beside decodes, none in steps of
# their own, chains of 4, 6 and 8, the paper.
PUBLISHED = {
    "llama 2.6": (56.3, 46.9, 98.4, 98.0, 96.2, 98.4),
    "llama 4.0": (39.9, 35.6, 80.9, 79.1, 55.7, 93.5),
    "llama 4.8": (33.4, 25.8, 33.9, 41.7, 25.4, 86.5),
    "qwen 2.4": (90.2, 69.9, 99.1, 96.9, 91.4, 98.7),
    "qwen 4.2": (50.3, 40.1, 52.9, 30.3, 14.9, 85.5),
}
HIGH = ("llama 6.4", "llama 7.2")
"""Cells of high load: the paper's 4.8 a second is none where drafting costs what it does here."""


class Policy:
    """One policy. All seeds of a cell are simulated when it is set up; a sample is the next one's."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._found: list[dict[str, float]] = []

    def setup(self, cell: dict[str, Any]) -> None:
        with ProcessPoolExecutor(os.cpu_count()) as workers:
            self._found = list(workers.map(partial(simulate, cell, self._name), range(cell["seeds"])))

    def sample(self) -> dict[str, float]:
        return self._found.pop(0)

    def close(self) -> None:
        self._found.clear()


def simulate(cell: dict[str, Any], policy: str, seed: int) -> dict[str, float]:
    """The cell's trace of one seed under one policy."""
    simulation, trace, bounds = prepared(cell, policy, seed)
    result = simulation.run(trace)
    speculation = simulation.scheduler.speculation
    counts = None if speculation is None else speculation.counts
    return figures(result.outcomes, bounds, WARM_S, result.end_s) | {
        "emitted": 1 + (counts.accepted / counts.trees if counts is not None and counts.trees else 0.0),
        "explained": 100 * (1 - max(abs(one.residual_s) / (one.end_s - one.received_s) for one in result.ledgers)),
    }


def prepared(cell: dict[str, Any], policy: str, seed: int) -> tuple[Simulation, Trace, dict[str, float]]:
    """What is simulated, of what trace, and its classes' seconds per token."""
    from tenon.engine.config import EngineConfig
    from tenon.engine.promises import Slo
    from tenon.engine.simulate import Marks, Simulation
    from tenon.engine.speculation.simulated import Agreement, SimulatedDraft
    from tenon.models.shapes import find as find_model
    from tenon.workloads.generator import make

    setting, share = SETTINGS[cell["steps"]], cell["urgent"]
    shares = {"share_coding": share, "share_chat": (1 - share) / 2, "share_summary": (1 - share) / 2}
    trace = make("adaserve", seed=seed, duration_s=cell["duration_s"], rate=cell["rate"], cv=cell["cv"], **shares)
    bounds = dict(zip(CLASSES, setting["tpot"], strict=True))
    bounds["coding"] *= cell["scale"]
    fixed_s, row_s = setting["draft"]
    agreement = Agreement(easy=setting["easy"], sharp=cell["sharp"])
    if cell["temperature"]:  # the best token is seldom all there is; made up, for nothing is published of it
        agreement = Agreement(easy=(4.0, 2.0), hard_run=2.0, sure=(12.0, 1.0), sharp=cell["sharp"])
    kinds = {"": agreement} | ({"coding": Agreement(easy=(6.0, 3.0))} if cell["urgent_hard"] else {})
    settings: dict[str, Any] = {"max_step_tokens": 2048, "max_waiting": 1 << 20, "prefix_cache": False}
    draft = None
    if policy in ("sarathi", "vllm"):
        settings |= {"max_sequences": 256, "prompts": "first" if policy == "vllm" else "beside"}
    else:
        draft = SimulatedDraft(lambda rows: fixed_s + row_s * rows, kinds)
        settings |= {
            "max_sequences": 64, "speculative": "draft", "speculative_nodes": 24,
            "speculative_policy": "slack" if policy == OURS else policy,
        }  # fmt: skip
        if policy == OURS:
            settings |= {"chunk": "patient"}
        if policy == PAPER:
            settings |= {"speculative_budget": setting["budget"]}
    model = find_model("Llama-3-70B" if cell["steps"] == "llama" else "Qwen2.5-32B")
    simulation = Simulation(
        EngineConfig(**settings), model, cost_of(cell["steps"]), Marks(cell["steps"], cell["steps"], "bench"),
        memory_bytes=60 * 2**30, slos={name: Slo(tpot_s=bound) for name, bound in bounds.items()}, draft=draft,
        seed=seed,
    )  # fmt: skip
    return simulation, trace, bounds


def figures(
    outcomes: Sequence[Outcome], bounds: Mapping[str, float], warm_s: float, end_s: float, tail: int = 99
) -> dict[str, float]:
    """Of requests that were due after ``warm_s``, by their classes' seconds per token; see the module's docstring."""
    import numpy as np

    counted = [one for one in outcomes if one.intended_s >= warm_s and one.token_s]
    n_tokens = np.array([len(one.token_s) for one in counted])
    times = [np.array(one.token_s) for one in counted]
    tpot_s = np.array([(at_s[-1] - at_s[0]) / max(1, len(at_s) - 1) for at_s in times])
    late = tpot_s / np.array([bounds[one.slo_class] for one in counted])
    in_time = late <= 1
    gaps_s = [float(np.diff(at_s).max()) if len(at_s) > 1 else 0.0 for at_s in times]
    ttft_s = [at_s[0] - one.intended_s for at_s, one in zip(times, counted, strict=True)]
    return {
        "met": 100 * float(in_time.mean()),
        "lateness": float(late[~in_time].mean()) if (~in_time).any() else 1.0,
        "goodput": float(n_tokens[in_time].sum()) / (end_s - warm_s),
        "requests": float(in_time.sum()) / (end_s - warm_s),
        f"ttft{tail}": float(np.percentile(ttft_s, tail)),
        f"gap{tail}": 1e3 * float(np.percentile(gaps_s, tail)),
    }


def cost_of(steps: str) -> Callable[[Any], float]:
    """Seconds of a step by its shape."""
    from tenon.cost.device import find as find_device
    from tenon.engine.simulate import device_cost
    from tenon.models.shapes import find as find_model

    if steps not in TABLES:
        return device_cost(find_model("Qwen2.5-32B"), find_device("H200"), "bfloat16")
    table = TABLES[steps]
    (rows_before, ms_before), (rows_last, ms_last) = table[-2:]
    slope = (ms_last - ms_before) / (rows_last - rows_before)

    def seconds(shape: Any) -> float:
        rows = shape.rows
        if rows >= rows_last:
            return 1e-3 * (ms_last + slope * (rows - rows_last))
        for (low, ms_low), (high, ms_high) in pairwise(table):
            if rows <= high:
                return 1e-3 * (ms_low + (ms_high - ms_low) * (max(rows, low) - low) / (high - low))
        return 1e-3 * ms_last

    return seconds


NAMES = (
    OURS, "sarathi", "vllm", PAPER, *CHAINS, "throughput", "equal-split", "fixed-tree", "by-batch", "per-second",
)  # fmt: skip
CONTENDERS = {name: ContenderEntry("bench.slo:Policy", {"name": name}) for name in NAMES}

FEWER = (OURS, "sarathi", PAPER, "chain-4", "chain-6", "throughput", "per-second")
"""Where one thing is changed: ours, the paper, and of each kind the rivals that did best under load."""

PLAIN = {"urgent": 0.6, "scale": 1.0, "cv": 1.094, "sharp": 1.0, "urgent_hard": False, "temperature": 0}


def cells(quick: bool) -> list[Cell]:
    """Listed before anything runs: loads, then one thing changed at a time."""
    seeds, duration_s = (QUICK_SEEDS, QUICK_DURATION_S) if quick else (SEEDS, DURATION_S)
    loads: dict[str, dict[str, Any]] = {
        **{f"llama {rate}": {"rate": rate} for rate in (2.6, 4.0, 4.8, 5.6, 6.4, 7.2)},
        **{f"qwen {rate}": {"rate": rate, "steps": "qwen"} for rate in (2.4, 4.2, 5.6)},
        **{f"h200 {rate}": {"rate": rate, "steps": "h200"} for rate in (6.0, 9.0, 12.0)},
    }
    changed: dict[str, dict[str, Any]] = {
        **{f"urgent {share:.0%}": {"urgent": share} for share in (0.2, 0.9)},
        **{f"scale {scale}": {"scale": scale / 1.2} for scale in (0.6, 0.8, 1.6)},
        "burst": {"cv": 3.0},
        "urgent hard": {"urgent_hard": True},
        "too sure": {"sharp": 2.0},
        "temperature 1": {"temperature": 1},
    }
    wanted = [(name, what, ()) for name, what in loads.items()] + [
        (name, what, FEWER) for name, what in changed.items()
    ]
    if quick:
        wanted = [one for one in wanted if one[0] in ("llama 4.0", "llama 6.4", "urgent hard")]
    common = {"steps": "llama", "rate": 5.6} | PLAIN | {"seeds": seeds, "duration_s": duration_s}
    return [Cell(name, common | what, seeds, 0, who, 1.3 if quick else 2.0, 600) for name, what, who in wanted]


T_95 = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132}
"""Student's t, one-sided 95 %, by the number of pairs."""


def least(ours: tuple[float, ...], others: tuple[float, ...]) -> float:
    """By how much ours is more than others', over paired seeds, at the least with 95 %."""
    apart = [a - b for a, b in zip(ours, others, strict=True)]
    spread = stdev(apart) if len(apart) > 1 else 0.0
    return fmean(apart) - T_95.get(len(apart), 2.0) * spread / math.sqrt(len(apart))


def checks(result: Result) -> list[Check]:
    def met(cell: str, who: str) -> tuple[float, ...]:
        return result.find(cell, who, "met").samples

    def mean(cell: str, who: str, metric: str = "met") -> float:
        return fmean(result.find(cell, who, metric).samples)

    found: list[Check] = []
    for cell, (sarathi, vllm, *_) in PUBLISHED.items():
        if cell in result.cells:
            found.append(at_most(f"{cell}: sarathi off the published", abs(mean(cell, "sarathi") - sarathi), 10))
            found.append(at_most(f"{cell}: vllm off the published", abs(mean(cell, "vllm") - vllm), 10))
    rivals = [name for name in NAMES if name != OURS]
    for cell in result.cells:
        there = {one.contender for one in result.series if one.cell == cell}
        best = max((name for name in rivals if name in there), key=lambda name: mean(cell, name))
        found.append(
            at_least(f"{cell}: ours less {best}, the best, 95 %", least(met(cell, OURS), met(cell, best)), -0.5)
        )
        found.append(at_least(f"{cell}: ours less the paper", mean(cell, OURS) - mean(cell, PAPER), 0))
        apart = mean(cell, OURS, "lateness") - mean(cell, PAPER, "lateness")
        found.append(at_most(f"{cell}: ours less the paper, lateness", apart, 0))
        found.append(at_least(f"{cell}: explained by ledgers, percent", mean(cell, OURS, "explained"), 98))
    for cell in HIGH:
        if cell in result.cells:
            chain = max(CHAINS, key=lambda name: mean(cell, name))
            missed = max(100 - mean(cell, OURS), 1e-9)
            found.append(at_least(f"{cell}: {chain} misses, over ours", (100 - mean(cell, chain)) / missed, 2))
    return found
