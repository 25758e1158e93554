"""A trace in figures: lengths, arrivals, reuse and the LRU curve, and two traces side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from tenon.base.errors import ConfigError
from tenon.workloads import blocks as block_ids
from tenon.workloads import reuse as reuses
from tenon.workloads.trace import Trace

BLOCK_TOKENS = 512
CACHE_TOKENS = (
    100_000,
    200_000,
    512_000,
    1_000_000,
    1_536_000,
    3_000_000,
    5_120_000,
    10_000_000,
    15_360_000,
    51_200_000,
)
MINUTE_S = 60.0
# Fields of a description that say how it was taken, or how long the trace is.
NO_FIGURES = ("block_tokens",)
SHARES = ("ideal_hit_ratio", "once_share", "top10_share", "follow", "single_turn", "zero_gaps")
SHARE_PREFIXES = ("lru_", "hit_", "class_")

Floats = NDArray[np.float64]


class Spread(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A distribution. ``cv``: standard deviation over mean, 0 where the mean is. Percentiles as numpy's ``linear``."""

    n: int
    mean: float
    cv: float
    p50: float
    p75: float
    p90: float
    p99: float
    max: float


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """LRU's share of block hits in a cache of ``tokens``."""

    tokens: int
    hit_ratio: float


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What :func:`describe` finds. What a trace is too short for is None, never a number that is none.

    ``peak_minute``: requests of the fullest whole minute over the mean of all. ``follow``: requests that reuse more
    than a common beginning; ``follow_gap_s``: seconds since the request whose blocks they reuse. ``block_gap_s``: the
    same per block. ``turns``: requests per chain of such requests. ``session_turns``: requests per session, where the
    trace names sessions. ``pause_s``: seconds that followers wait after the answer before them, where they do
    (``after``).
    """

    name: str
    source: str
    requests: int
    duration_s: float
    rate_per_s: float | None
    input: Spread
    output: Spread
    interarrival_s: Spread | None
    zero_gaps: float | None
    peak_minute: float | None
    block_tokens: int
    blocks: int
    ideal_hit_ratio: float
    once_share: float
    top10_share: float
    follow: float
    follow_gap_s: Spread | None
    block_gap_s: Spread | None
    turns: Spread
    single_turn: float
    session_turns: Spread | None
    pause_s: Spread | None
    lru: tuple[Point, ...]
    classes: dict[str, int]


class Samples:
    """What a description condenses, for plots and comparisons."""

    def __init__(self, trace: Trace, block_tokens: int = BLOCK_TOKENS, *, partial: bool = True) -> None:
        if not trace.requests:
            raise ConfigError(f"trace {trace.header.name} has no requests to describe", subject=trace.header.name)
        self.trace = trace
        self.block_tokens = block_tokens
        self.arrival_s: Floats = np.array([r.arrival_s for r in trace.requests])
        self.input: Floats = np.array([r.n_prompt for r in trace.requests], dtype=np.float64)
        self.output: Floats = np.array([r.n_output for r in trace.requests], dtype=np.float64)
        self.interarrival_s: Floats = np.diff(self.arrival_s)
        self.reuse = reuses.find(block_ids.identify(trace.requests, block_tokens, partial=partial))
        self.parent = self.reuse.parents()
        follows = np.flatnonzero(self.parent >= 0)
        self.follow_gap_s: Floats = self.arrival_s[follows] - self.arrival_s[self.parent[follows]]
        self.block_gap_s: Floats = self.reuse.block_gaps(self.arrival_s)

    def lru(self, cache_tokens: Sequence[int]) -> list[float]:
        """Hit ratio of each cache."""
        return reuses.lru_hit_ratios(self.reuse, [tokens // self.block_tokens for tokens in cache_tokens])

    def turns(self) -> Floats:
        """Requests of each chain of requests that reuse one another's blocks."""
        root = np.arange(len(self.parent))
        for i in np.flatnonzero(self.parent >= 0).tolist():
            root[i] = root[self.parent[i]]
        return np.unique(root, return_counts=True)[1].astype(np.float64)


def spread(values: Floats) -> Spread:
    """Of one value or more."""
    mean = float(values.mean())
    p50, p75, p90, p99 = (float(x) for x in np.percentile(values, (50, 75, 90, 99)))
    return Spread(
        len(values), mean, float(values.std()) / mean if mean else 0.0, p50, p75, p90, p99, float(values.max())
    )


def describe(samples: Samples, cache_tokens: Sequence[int] = CACHE_TOKENS) -> Description:
    """All figures of a trace."""
    trace = samples.trace
    n, duration_s, turns = len(trace.requests), trace.duration_s, samples.turns()
    first_s = float(samples.arrival_s[0])
    minutes = int((duration_s - first_s) // MINUTE_S)
    counts = np.bincount(((samples.arrival_s - first_s) // MINUTE_S).astype(np.int64))[:minutes]
    gaps = samples.interarrival_s
    sessions = Counter(r.session for r in trace.requests if r.session)
    pauses = np.array([r.gap_s for r in trace.requests if r.after])
    return Description(
        name=trace.header.name,
        source=trace.header.source,
        requests=n,
        duration_s=duration_s,
        rate_per_s=(n - 1) / (duration_s - first_s) if duration_s > first_s else None,
        input=spread(samples.input),
        output=spread(samples.output),
        interarrival_s=spread(gaps) if len(gaps) else None,
        zero_gaps=float(np.mean(gaps == 0)) if len(gaps) else None,
        peak_minute=float(counts.max() / counts.mean()) if minutes and counts.any() else None,
        block_tokens=samples.block_tokens,
        blocks=samples.reuse.blocks.distinct,
        ideal_hit_ratio=samples.reuse.ideal_hit_ratio,
        once_share=samples.reuse.once_share(),
        top10_share=samples.reuse.top_share(),
        follow=float(np.mean(samples.parent >= 0)),
        follow_gap_s=spread(samples.follow_gap_s) if len(samples.follow_gap_s) else None,
        block_gap_s=spread(samples.block_gap_s) if len(samples.block_gap_s) else None,
        turns=spread(turns),
        single_turn=float(np.mean(turns == 1)),
        session_turns=spread(np.array(list(sessions.values()), dtype=np.float64)) if sessions else None,
        pause_s=spread(pauses) if len(pauses) else None,
        lru=tuple(map(Point, cache_tokens, samples.lru(cache_tokens))),
        classes=dict(sorted(Counter(r.slo_class for r in trace.requests if r.slo_class).items())),
    )


class Difference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the second trace differs from the first: relative errors of moments and percentiles (None where the
    first's is 0 or missing), Kolmogorov-Smirnov distances of distributions, hit ratios' differences in points.
    """

    relative: dict[str, float | None]
    ks: dict[str, float | None]
    hit_points: dict[str, float]


def compare(first: Samples, second: Samples, cache_tokens: Sequence[int] = CACHE_TOKENS) -> Difference:
    """Raises ``ConfigError`` when the two are taken at different block sizes."""
    if first.block_tokens != second.block_tokens:
        raise ConfigError(
            f"the two traces are described at different block sizes, {first.block_tokens} and {second.block_tokens}",
            subject="block_tokens",
        )
    a, b = figures(describe(first, cache_tokens)), figures(describe(second, cache_tokens))
    points = {k: 100 * (b[k] - a[k]) for k in a if is_share(k) and k in b}
    relative = {k: (b[k] / a[k] - 1 if k in b and a[k] else None) for k in a if k not in points}
    names = ("input", "output", "interarrival_s", "follow_gap_s", "block_gap_s")
    return Difference(relative, {n: ks(getattr(first, n), getattr(second, n)) for n in names}, points)


def is_share(name: str) -> bool:
    """Whether a figure is a share, which is compared by difference: 4 % against 5 % is a point, not a quarter."""
    return name in SHARES or name.startswith(SHARE_PREFIXES)


def figures(d: Description) -> dict[str, float]:
    """The description as flat names, without what it does not have: ``input_p50``, ``lru_512000``, ..."""
    out: dict[str, float] = {}
    for name in d.__struct_fields__:
        value = getattr(d, name)
        if isinstance(value, Spread):
            out |= {f"{name}_{part}": float(getattr(value, part)) for part in value.__struct_fields__ if part != "n"}
        elif isinstance(value, float | int) and name not in NO_FIGURES:
            out[name] = float(value)
    return out | {f"lru_{point.tokens}": point.hit_ratio for point in d.lru}


def ks(a: Floats, b: Floats) -> float | None:
    """Kolmogorov-Smirnov distance: the largest difference of two empirical distribution functions; None for no
    samples.
    """
    if not len(a) or not len(b):
        return None
    a, b = np.sort(a), np.sort(b)
    both = np.concatenate([a, b])
    below_a = np.searchsorted(a, both, "right") / len(a)
    below_b = np.searchsorted(b, both, "right") / len(b)
    return float(np.abs(below_a - below_b).max())
