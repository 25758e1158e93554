"""Policies by the word that a config names them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tenon.engine.policies.asymcache import AsymCache
from tenon.engine.policies.evict import Evict
from tenon.engine.policies.latency import Gdsf, MaxScore, Pensieve, RandomCompute
from tenon.engine.policies.recency import Arc, Lfu, Lru, Random, S3Fifo, TailLru
from tenon.engine.policies.slo import Paper, Slack
from tenon.engine.policies.speculate import ByBatch, Chain, EqualSplit, FixedTree, Pays, Speculate, Throughput
from tenon.engine.policies.tuned import Tuned
from tenon.engine.policies.worth import Worth

POLICIES: Final[dict[str, Callable[[int], Evict]]] = {
    "lru": lambda n_blocks: Lru(),
    "lfu": lambda n_blocks: Lfu(),
    "gdsf": lambda n_blocks: Gdsf(),
    "s3fifo": S3Fifo,
    "arc": Arc,
    "t-lru": lambda n_blocks: TailLru(),
    "pensieve": lambda n_blocks: Pensieve(),
    "max-score": lambda n_blocks: MaxScore(),
    "random": lambda n_blocks: Random(),
    "random-compute": lambda n_blocks: RandomCompute(),
    "asymcache": lambda n_blocks: AsymCache(),
    "asymcache-fixed": lambda n_blocks: AsymCache(adapts=False),
    "worth": lambda n_blocks: Worth(),
    "tuned": Tuned,
}
"""Each takes the number of blocks of the pool."""

SPECULATES: Final[dict[str, Callable[[], Speculate]]] = {
    "pays": Pays,
    "slack": Slack,
    "paper": Paper,
    "throughput": Throughput,
    "equal-split": EqualSplit,
    "fixed-tree": FixedTree,
    **{f"chain-{k}": (lambda k=k: Chain(k)) for k in range(2, 9)},  # type: ignore[misc]
    "by-batch": ByBatch,
    "per-second": lambda: Pays(chains=True),
}
BUDGETED: Final = ("paper", "throughput", "equal-split")
"""Those that have a fixed budget of rows."""
