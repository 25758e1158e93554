"""Properties of a trace under the names that ``parameters.toml`` holds the originals' figures by."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np

from tenon.workloads.describe import CACHE_TOKENS, Samples, describe, figures, is_share
from tenon.workloads.parameters import Figure
from tenon.workloads.trace import TraceRequest

LONG_PROMPT = 400
MOST = 0.9


def error(name: str, value: float, figure: Figure) -> float:
    """How far a value is from a figure: relative, or the difference where both are shares."""
    return abs(value - figure.value) if is_share(name) else abs(value / figure.value - 1)


def measure(samples: Samples) -> dict[str, float]:
    """Every property that the trace is long and rich enough for."""
    requests = samples.trace.requests
    cache_tokens = sorted({*CACHE_TOKENS, *(10**i for i in range(5, 9))})
    found = figures(describe(samples, cache_tokens))
    for kind in {r.slo_class for r in requests if r.slo_class}:
        found[f"class_{kind}"] = float(np.mean([r.slo_class == kind for r in requests]))
    start = samples.reuse.blocks.start
    hits = np.concatenate([[0], np.cumsum(samples.reuse.before >= 0)])
    share = (hits[start[1:]] - hits[start[:-1]]) / np.diff(start)
    found |= {"hit_none": float(np.mean(share == 0)), "hit_most": float(np.mean(share > MOST))}
    sessions: dict[str, list[TraceRequest]] = defaultdict(list)
    for request in requests:
        if request.session:
            sessions[request.session].append(request)
    if sessions:
        found |= _percentiles("session_turns", [float(len(s)) for s in sessions.values()])
        found |= _percentiles("session_input", [float(s[-1].n_prompt) for s in sessions.values()])
        found |= _percentiles("prefix", [float(n) for s in sessions.values() for n in _prefixes(s)])
    for kind in ("person", "tool"):
        pauses = [r.gap_s for r in requests if r.after and r.slo_class == kind]
        found |= _percentiles(f"pause_{kind}", pauses)
    people = [sum(r.slo_class == "person" for r in s) for s in sessions.values()]
    if sum(people):
        found |= _percentiles("person_turns", [float(n) for n in people])
        found |= _percentiles("tool_steps", _tool_steps(sessions))
    long = samples.input > LONG_PROMPT
    if long.sum() > 1 and np.ptp(samples.input[long]) > 0:
        slope, base = np.polyfit(samples.input[long], samples.output[long], 1)
        found |= {"answer_slope": float(slope), "answer_base": float(base)}
    return found


def _percentiles(name: str, values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    points = np.percentile(values, (50, 90, 95, 99)).tolist()
    return {f"{name}_mean": float(np.mean(values))} | {
        f"{name}_p{p}": float(x) for p, x in zip((50, 90, 95, 99), points, strict=True)
    }


def _prefixes(session: list[TraceRequest]) -> list[int]:
    """Tokens of each prompt that were there before, answers included."""
    out = []
    for before, request in itertools.pairwise(session):
        shared = 0
        for a, b in zip((*before.prompt, None), request.prompt, strict=False):
            if a is None and b.content == before.output:
                shared += min(b.n, before.n_output)
            if a is None or a.content != b.content:
                break
            shared += min(a.n, b.n)
            if a.n != b.n:
                break
        out.append(shared)
    return out


def _tool_steps(sessions: dict[str, list[TraceRequest]]) -> list[float]:
    """Tool steps after each request of a person."""
    steps: list[float] = []
    for session in sessions.values():
        for request in session:
            if request.slo_class == "person":
                steps.append(0.0)
            elif steps:
                steps[-1] += 1
    return steps
