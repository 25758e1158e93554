"""From a measured conversation trace to the parameters of ``mooncake-conversation``: how the shipped ones were made.

A request *follows* another when it reuses more of it than what everyone shares. It *extends* when all of the other's
full blocks come back, *repeats* when it also is as long, and *branches* when only a part comes back. What is still to
come when the trace ends is censored, so chances and gaps are Kaplan-Meier estimates; a plain count would miss the late
followers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenon.workloads.describe import BLOCK_TOKENS, Samples
from tenon.workloads.trace import Trace

PERCENTS = (
    0,
    1,
    2,
    5,
    10,
    15,
    20,
    25,
    30,
    35,
    40,
    45,
    50,
    55,
    60,
    65,
    70,
    75,
    80,
    85,
    90,
    93,
    95,
    97,
    98,
    99,
    99.5,
    99.9,
    100,
)
LENGTHS = (0, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
TURNS = (1, 2, 3, 4, 6, 8, 10)
NEW, EXTENDS, BRANCHES, REPEATS = range(4)
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Followers:
    """Who follows whom in a trace, and how."""

    def __init__(self, samples: Samples) -> None:
        self.arrival_s, self.input = samples.arrival_s, samples.input
        self.parent = samples.parent
        n = len(self.parent)
        start = samples.reuse.blocks.start
        hits = np.concatenate([[0], np.cumsum(samples.reuse.before >= 0)])
        self.matched = hits[start[1:]] - hits[start[:-1]]
        self.kind = np.full(n, NEW)
        self.child = np.full(n, -1)
        self.turn = np.zeros(n, dtype=np.int64)
        for i in np.flatnonzero(self.parent >= 0).tolist():
            p = self.parent[i]
            self.turn[i] = self.turn[p] + 1
            if self.child[p] < 0:
                self.child[p] = i
            whole = self.input[p] // samples.block_tokens
            same = self.input[i] == self.input[p]
            self.kind[i] = BRANCHES if self.matched[i] < whole else REPEATS if same else EXTENDS

    def next_kind(self) -> NDArray[np.int64]:
        """Of each request: how its follower follows; -1 without."""
        return np.where(self.child >= 0, self.kind[self.child], -1)

    def survival(self, of: Flags) -> tuple[Floats, Floats]:
        """Kaplan-Meier: times to the follower, and the share that has been followed by then."""
        last_s = self.arrival_s[-1]
        followed = self.child[of] >= 0
        wait_s = np.where(followed, self.arrival_s[self.child[of]], last_s) - self.arrival_s[of]
        # At equal times followers count before those whose trace ends.
        order = np.lexsort((~followed, wait_s))
        at_risk = len(order) - np.arange(len(order))
        alive = np.cumprod(1 - followed[order] / np.maximum(1, at_risk)).astype(np.float64)
        return wait_s[order][followed[order]], (1 - alive)[followed[order]]

    def chance(self, of: Flags) -> float:
        """That a follower ever comes."""
        share = self.survival(of)[1]
        return float(share[-1]) if len(share) else 0.0


def conversation(trace: Trace, block_tokens: int = BLOCK_TOKENS) -> dict[str, Any]:
    """Values for the parameters of ``mooncake-conversation``, by name; tables are rows of rounded numbers."""
    samples = Samples(trace, block_tokens)
    f = Followers(samples)
    new = f.kind == NEW
    follows, extends, branches = f.parent >= 0, f.kind == EXTENDS, f.kind == BRANCHES
    parent = f.parent
    said = np.maximum(1, samples.input - samples.input[parent] - samples.output[parent])
    gap_s = f.arrival_s - f.arrival_s[parent]
    twice = np.flatnonzero(extends & follows & (f.kind[parent] == EXTENDS))
    typical = float(np.log(gap_s[extends]).mean()) if extends.any() else 0.0
    tail = samples.input[branches] - block_tokens * f.matched[branches]
    kept = f.matched[branches] / (samples.input[parent[branches]] // block_tokens)
    has, how = f.child >= 0, f.next_kind()
    return {
        "requests": len(parent),
        "rate": round(len(parent) / trace.duration_s, 4),
        "max_tokens": int(samples.input.max()),
        "first_tokens": table(samples.input[new]),
        "output_tokens": table(samples.output),
        "text_first": table(said[extends & (f.turn == 1)]),
        "text_later": table(said[extends & (f.turn > 1)]),
        "text_memory": rank_correlation(said[twice], said[parent[twice]]),
        "gap_memory": rank_correlation(gap_s[twice], gap_s[parent[twice]]),
        "branch_kept": table(kept, 4),
        "branch_tokens": table(np.maximum(1, tail)),
        "gap_s": weighted_table(*f.survival(np.isin(how, (-1, EXTENDS, BRANCHES)))),
        "repeat_gap_s": table(gap_s[f.kind == REPEATS]),
        "gap_length": by_length(
            f, has & (how == EXTENDS), lambda of: np.exp(np.log(gap_s[f.child[of]]).mean() - typical)
        ),
        "again_first": by_length(f, new, f.chance),
        "again_later": [[t, round(f.chance(_turns(f, t)), 4)] for t in TURNS if _turns(f, t).any()],
        "branch_first": by_length(f, new & has, lambda of: _share(how[of] == BRANCHES)),
        "branch_later": by_length(f, extends & has, lambda of: _share(how[of] == BRANCHES)),
        "branch_again": by_length(f, branches & has, lambda of: _share(how[of] == BRANCHES)),
        "repeat_first": round(_share(how[new & has & (f.input >= LENGTHS[1])] == REPEATS), 4),
        "repeat_later": round(_share(how[follows & has & (f.kind != REPEATS)] == REPEATS), 4),
        "repeat_again": round(_share(how[(f.kind == REPEATS) & has] == REPEATS), 4),
    }


def table(values: Floats, digits: int = 0) -> list[list[float]]:
    """Rows of (percent, value)."""
    return _rows(PERCENTS, np.percentile(values, PERCENTS) if len(values) else np.ones(len(PERCENTS)), digits)


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's, between 0 and 1; ties in the order in which they stand. 0 for fewer than three pairs."""
    if len(a) < 3:
        return 0.0
    ranks = np.array([np.argsort(np.argsort(x, kind="stable"), kind="stable") for x in (a, b)], dtype=np.float64)
    return round(min(1.0, max(0.0, float(np.asarray(np.corrcoef(ranks))[0, 1]))), 4)


def weighted_table(times: Floats, share: Floats) -> list[list[float]]:
    """Quantiles of the times, given that a follower comes."""
    if not len(times):
        return [[0, 1.0], [100, 1.0]]
    at = np.searchsorted(share, np.array(PERCENTS) / 100 * share[-1], "left")
    return _rows(PERCENTS, times[np.minimum(at, len(times) - 1)], 0)


def by_length(f: Followers, of: Flags, value: Any) -> list[list[float]]:
    """Rows of (length from, value) over the requests ``of``; lengths that none has take the row before."""
    rows: list[list[float]] = []
    for low, high in zip(LENGTHS, (*LENGTHS[1:], np.inf), strict=True):
        inside = of & (f.input >= low) & (f.input < high)
        if inside.any():
            rows.append([low, round(float(value(inside)), 4)])
    return rows or [[0, 0.0]]


def _turns(f: Followers, first: int) -> Flags:
    """Followers of this turn up to the next row's."""
    after = [t for t in TURNS if t > first]
    return (f.turn >= first) & (f.turn < (after[0] if after else np.inf))


def _share(flags: Flags) -> float:
    return float(np.mean(flags)) if len(flags) else 0.0


def _rows(percents: tuple[float, ...], values: Floats, digits: int) -> list[list[float]]:
    rounded = np.maximum.accumulate(np.round(values, digits))
    return [[p, float(v) if digits else int(v)] for p, v in zip(percents, rounded.tolist(), strict=True)]
