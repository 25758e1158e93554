"""Eviction policies on a cache alone: what share of the prompts' work each saves, over capacities, workloads and seeds.

A sample is a seed: its trace is replayed against a block pool of each capacity, by the pool and policy code that serves
(``tenon.engine.cache_replay``); nothing is timed but the policy itself. Costs are the FLOPs of Llama-3.1-8B. The first
fifth of each trace warms up and counts for nothing, the real one's excepted. ``belady`` and ``belady-cost`` know the
future. Simulated: there is no engine here, and a request is over at once.

Of each capacity in tokens: ``computed`` is the share of the prompts' FLOPs that is not saved, ``missed`` that of their
full blocks, both in percent; ``runs`` are pieces a prompt is computed in, holes and one.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from tenon.base.result import Check, ContenderEntry, Result, at_least
from tenon.bench.claim import Cell
from tenon.engine.policies.table import POLICIES

TITLE = "eviction policies, cache alone: share of prefill FLOPs saved"
BASELINE = "lru"
LIMITS = False

MODEL = "Llama-3.1-8B"
OURS = "tuned"
PUBLISHED = ("asymcache", "asymcache-fixed")
ORACLES = ("belady", "belady-cost")
MOONCAKE = "mooncake_conversation.jsonl"
FIRST_SEED = 100
"""Policies were designed on traces of seeds below."""

# Family, tokens of a block, requests, smallest and largest capacity in tokens.
GENERATED = {
    "mooncake-conversation": (2048, 1500, 100_000, 4_000_000),
    "mooncake-synthetic": (2048, 1000, 100_000, 4_000_000),
    "mooncake-toolagent": (2048, 2000, 100_000, 2_000_000),
    "longbench": (1024, 300, 100_000, 2_000_000),
    "loogle": (1024, 300, 100_000, 1_000_000),
    "coding-agent": (4096, 400, 200_000, 4_000_000),
    "swe-agent": (2048, 800, 200_000, 4_000_000),
    "sharegpt": (128, 1000, 20_000, 400_000),
}
REAL = (2048, 0, 250_000, 25_000_000)
ADVERSARIAL = ("cyclic-scan", "scan-pollution", "zipf", "one-shot-flood", "branches", "supersession", "lifespan-shift",
               "bursts")  # fmt: skip
HARD_BLOCK, HARD_CAPACITY = 1024, 250_000
N_CAPACITIES = 12
LEAST = 0.01
"""Percent: a share of nothing has no ratio."""


def capacities(low: int, high: int, n: int) -> list[int]:
    """Tokens, equally far apart in their logarithm."""
    return [round(low * (high / low) ** (i / (n - 1))) for i in range(n)]


class Policy:
    """One policy; each sample has the next seed."""

    def __init__(self, policy: str) -> None:
        self._policy = policy

    def setup(self, cell: dict[str, Any]) -> None:
        self._cell, self._seed = cell, FIRST_SEED
        self._workers = ProcessPoolExecutor(os.cpu_count())

    def sample(self) -> dict[str, float]:
        from tenon.engine.cache_replay import visits

        cell, block = self._cell, self._cell["block"]
        trace = self._trace()
        self._seed += 1
        asked = visits(trace, block)
        metrics = {}
        warm = int(cell["warm"] * len(asked))
        jobs = [(self._policy, asked, tokens, block, warm) for tokens in cell["capacities"]]
        for tokens, tally in zip(cell["capacities"], self._workers.map(one, jobs), strict=True):
            metrics[f"computed_{tokens}"] = max(LEAST, 100 * (1 - tally.saved_ratio))
            metrics[f"missed_{tokens}"] = max(LEAST, 100 * (1 - tally.hit_ratio))
            metrics[f"runs_{tokens}"] = 1 + tally.holes / max(1, tally.requests)
        return metrics

    def _trace(self) -> Any:
        from tenon.workloads import readers
        from tenon.workloads.adversarial import adversary
        from tenon.workloads.generator import make

        name = self._cell["workload"]
        if name == "mooncake-real":
            return readers.read(Path(os.environ["TENON_TRACES"]) / MOONCAKE)
        if name in ADVERSARIAL:
            return adversary(name, capacity=HARD_CAPACITY, seed=self._seed)
        return make(name, seed=self._seed, requests=self._cell["requests"])

    def close(self) -> None:
        self._workers.shutdown()


def one(job: tuple[str, Any, int, int, int]) -> Any:
    """The tally of one policy at one capacity."""
    from tenon.engine.cache_replay import replay
    from tenon.engine.policies.optimal import Belady, BeladyCost
    from tenon.engine.recompute import recompute_cost
    from tenon.models.shapes import find

    policy, asked, tokens, block, warm = job
    n_blocks = max(2, tokens // block)
    make: Callable[[], Any]
    if policy in ORACLES:
        uses = defaultdict(list)
        for visit in asked:
            for key in visit.keys:
                uses[key].append(visit.arrival_s)
        make = partial(Belady if policy == "belady" else BeladyCost, uses)
    else:
        make = partial(POLICIES[policy], n_blocks + 1)
    return replay(asked, n_blocks, block, make, recompute_cost(find(MODEL), block), warm=warm)


CONTENDERS = {name: ContenderEntry("bench.kv_policies:Policy", {"policy": name}) for name in (*POLICIES, *ORACLES)}


def cells(quick: bool) -> list[Cell]:
    n = 3 if quick else N_CAPACITIES
    out = []
    for name, (block, requests, low, high) in GENERATED.items():
        if quick and name != "longbench":
            continue
        params = {"workload": name, "block": block, "requests": requests, "capacities": capacities(low, high, n),
                  "warm": 0.2}  # fmt: skip
        out.append(Cell(name, params, 1 if quick else 5, 0, (), 1.5, 600))
    for name in ADVERSARIAL[:2] if quick else ADVERSARIAL:
        spread = capacities(HARD_CAPACITY // 4, HARD_CAPACITY * 3, n)
        params = {"workload": name, "block": HARD_BLOCK, "requests": 0, "capacities": spread, "warm": 0.2}
        out.append(Cell(name, params, 1 if quick else 5, 0, (), 1.5, 600))
    folder = os.environ.get("TENON_TRACES")
    if folder and (Path(folder) / MOONCAKE).exists() and not quick:
        block, _, low, high = REAL
        params = {"workload": "mooncake-real", "block": block, "capacities": capacities(low, high, n), "warm": 0.0}
        out.append(Cell("mooncake-real", params, 1, 0, (), 40.0, 1200))
    return out


def checks(result: Result) -> list[Check]:
    """Ours against LRU, the published and the oracle, in every cell of workload x capacity; seeds are paired. Of each
    workload, what is lost where most is."""
    worst, shares, ahead, n = 0.0, [], 0, 0
    losses = []
    for cell in result.cells:
        behind = []
        names = {one.metric for one in result.series if one.cell == cell and one.metric.startswith("computed_")}
        for metric in sorted(names):
            found = {who: [100 - x for x in result.find(cell, who, metric).samples] for who in CONTENDERS}
            ours, lru = found[OURS], found["lru"]
            worst = min(worst, lower_bound([a - b for a, b in zip(ours, lru, strict=True)]))
            mean = {who: sum(values) / len(values) for who, values in found.items()}
            n += 1
            published = max(mean[who] for who in PUBLISHED)
            ahead += mean[OURS] >= published - 0.05
            tokens = int(metric.removeprefix("computed_"))
            behind.append((mean[OURS] - mean["lru"], mean[OURS] - published, tokens))
            gap = max(mean[who] for who in ORACLES) - mean["lru"]
            if gap > 10:
                shares.append((mean[OURS] - mean["lru"]) / gap)
        less, _, tokens = min(behind)
        losses.append(at_least(f"{cell}: ours less LRU, points, mean, least at {tokens:,} tokens", less, -1.0))
        _, less, tokens = min(behind, key=itemgetter(1))
        losses.append(at_least(f"{cell}: ours less the better published form, least at {tokens:,} tokens", less, -0.05))
    return [
        at_least("ours less LRU, points of saved FLOPs, the worst cell's 95 % bound", worst, -1.0),
        at_least("share of cells where ours saves at least what published AsymCache does, either form", ahead / n, 0.8),
        at_least("share of the gap from LRU to the oracle closed, the worst cell of a gap over 10", min(shares), 0.25),
        at_least("the same, the median of those cells", median(shares), 0.25),
        *losses,
    ]


def lower_bound(differences: list[float]) -> float:
    """One-sided 95 % bound of the mean, by Student's t; of one sample itself."""
    n = len(differences)
    mean = sum(differences) / n
    if n == 1:
        return mean
    spread = (sum((d - mean) ** 2 for d in differences) / (n - 1)) ** 0.5
    t = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 7: 1.943}[n]
    return mean - t * spread / n**0.5
