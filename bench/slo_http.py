"""Requests with objectives for the time between tokens, for real: the embedded pair behind ``tenon serve``.

Editors, chats and summaries over held-out code, open loop over HTTP, 60, 20 and 20 percent; the load generator has one
core to itself and the server the others. An objective is so many times what a token takes in a sequence alone, without
guesses, on the same server right before each load (``alone_ms``): 2, 3 and 8. AdaServe's (EuroSys'26, arXiv 2501.12162)
are 1.2, 1.67 and 5, on devices where a second sequence and a prompt's rows cost less beside a token than here. A cell
is a load in requests a second; all contenders get the same requests at the same times, by the same seeds; a round has
new ones.

    none            no guesses, prompts beside decodes
    chain-K         the draft model's chains, as most engines guess
    throughput      the likeliest guesses of all up to a budget: no objectives
    paper           AdaServe's algorithm 2, the same budget
    ours            ``slack`` and ``--chunk patient``, the draft model
    ours, suffixes  likewise, by suffixes: no model looks ahead

Metrics are those of ``slo.py``, on the client's clock, tails at the 95th percentile; ``lag99`` ms: how late the load
generator itself was; ``broken``: requests that came to nothing."""

from __future__ import annotations

import asyncio
import itertools
from statistics import fmean, median
from typing import Any

import numpy as np

from bench.server_load import EMBEDDED, PATIENCE, Phase, Server, due_times, p99
from bench.slo import CLASSES, figures, least
from bench.speculation import prompts
from tenon.base.result import Check, ContenderEntry, Result, at_least, at_most
from tenon.bench.claim import Cell
from tenon.workloads.load import Load, LoadOptions
from tenon.workloads.report import Outcome
from tenon.workloads.streaming import Target
from tenon.workloads.trace import Segment, Trace, TraceRequest

TITLE = "objectives for the time between tokens, over HTTP with the embedded pair: who is served in time"
BASELINE = "none"
LIMITS = False

TIMES = dict(zip(CLASSES, (2.0, 3.0, 8.0), strict=True))
SHARES = (0.6, 0.2, 0.2)
CHARS = dict(zip(CLASSES, (240, 120, 800), strict=True))
"""Of prompts, in the mean."""
TOKENS = dict(zip(CLASSES, (128, 160, 96), strict=True))
"""Of answers, in the mean."""
TEMPERATURES = dict(zip(CLASSES, (0.2, 0.7, 0.3), strict=True))
WARM_S = 4.0
N_TEXTS = 64
ALONE_TOKENS, ALONE_TIMES = 128, 5
BUDGET = 32
"""Of policies that have one: about where a step takes twice as long as with one row on two CPU cores."""
Fields = dict[str, dict[str, Any]]
"""Of bodies, by the request's id."""
PAIR = ("--speculative", "embedded-draft", "--speculative-policy")


class Served:
    """A server with these options."""

    def __init__(self, options: list[str]) -> None:
        self._options = options

    def setup(self, cell: dict[str, Any]) -> None:
        self._cell, self._seed = cell, 0
        self._texts = prompts(N_TEXTS)
        self._server = Server("--max-sequences", "64", *self._options)
        alone_s(self._server.url, self._texts[0])

    def sample(self) -> dict[str, float]:
        self._seed += 1
        taken_s = alone_s(self._server.url, self._texts[0])
        bounds = {name: times * taken_s for name, times in TIMES.items()}
        trace, fields = load_of(self._cell["rate"], self._cell["duration_s"], self._seed, self._texts, bounds)
        outcomes = send(self._server.url, trace, fields)
        ends_s = [one.end_s for one in outcomes]
        return figures(outcomes, bounds, WARM_S, max(ends_s), tail=95) | {
            "alone_ms": 1e3 * taken_s,
            "lag99": 1e3 * p99(one.sent_s - one.intended_s for one in outcomes),
            "broken": float(sum(bool(one.error) for one in outcomes)),
        }

    def close(self) -> None:
        self._server.close()


def alone_s(url: str, text: str) -> float:
    """What a token takes in a sequence alone, without guesses."""
    body = {"prompt": text[:400], "speculative": {"enabled": False}, "temperature": 0}
    taken_s = []
    for i in range(ALONE_TIMES):
        request = TraceRequest(f"alone{i}", 0.0, (Segment(1, 1),), ALONE_TOKENS)
        (one,) = send(url, Trace.make("alone", "this bench", [request]), {request.id: body})
        taken_s.append((one.token_s[-1] - one.token_s[0]) / (len(one.token_s) - 1))
    return median(taken_s)


def send(url: str, trace: Trace, fields: Fields) -> list[Outcome]:
    """What became of the requests whose bodies have these fields."""
    found: list[Outcome] = []
    options = LoadOptions(Target(url), EMBEDDED, ignore_eos=True, fields=fields, patience=PATIENCE)
    asyncio.run(Load(trace, options, found.append).run())
    return found


def load_of(
    rate: float, duration_s: float, seed: int, texts: list[str], bounds: dict[str, float]
) -> tuple[Trace, Fields]:
    """The requests of one seed, and the fields of each one's body."""
    rng = np.random.default_rng(seed)
    times = due_times(Phase("load", rate, WARM_S, duration_s - WARM_S, seed))
    requests: list[TraceRequest] = []
    fields: Fields = {}
    for i, at_s in enumerate(times):
        name = CLASSES[int(rng.choice(len(CLASSES), p=SHARES))]
        n_chars, n_tokens = (int(mean * rng.uniform(0.5, 1.5)) for mean in (CHARS[name], TOKENS[name]))
        text = texts[int(rng.integers(len(texts)))]
        first = int(rng.integers(max(1, len(text) - n_chars)))
        one = TraceRequest(f"{seed}-{i}", at_s, (Segment(i + 1, max(1, n_chars // 4)),), n_tokens, slo_class=name)
        requests.append(one)
        fields[one.id] = {
            "prompt": text[first : first + n_chars], "temperature": TEMPERATURES[name], "seed": i,
            "slo": {"tpot_ms": 1e3 * bounds[name]},
        }  # fmt: skip
    return Trace.make("objectives", "this bench", requests), fields


def _served(*options: str) -> ContenderEntry:
    return ContenderEntry("bench.slo_http:Served", {"options": list(options)})


OURS = ("ours", "ours, suffixes")
CONTENDERS = {
    "ours": _served(*PAIR, "slack", "--chunk", "patient"),
    "ours, suffixes": _served("--speculative", "suffix", "--speculative-policy", "slack", "--chunk", "patient"),
    "none": _served(),
    "chain-2": _served(*PAIR, "chain-2"),
    "chain-4": _served(*PAIR, "chain-4"),
    "throughput": _served(*PAIR, "throughput", "--speculative-budget", str(BUDGET)),
    "paper": _served(*PAIR, "paper", "--speculative-budget", str(BUDGET)),
}
RATES = (2.0, 4.0, 8.0)


def cells(quick: bool) -> list[Cell]:
    """Rising load."""
    duration_s, rounds = (14.0, 1) if quick else (24.0, 3)
    rates = RATES[1:2] if quick else RATES
    return [
        Cell(f"{rate:g} a second", {"rate": rate, "duration_s": duration_s}, rounds, 0, (), duration_s + 3.0, 300)
        for rate in rates
    ]


def checks(result: Result) -> list[Check]:
    def samples(cell: str, who: str, metric: str = "met") -> tuple[float, ...]:
        return result.find(cell, who, metric).samples

    found: list[Check] = []
    for cell in result.cells:
        there = {one.contender for one in result.series if one.cell == cell}
        rivals = sorted(there - set(OURS))
        ours = max(there & set(OURS), key=lambda who: fmean(samples(cell, who)))
        best = max(rivals, key=lambda who: fmean(samples(cell, who)))
        if len(samples(cell, ours)) > 1:
            less = least(samples(cell, ours), samples(cell, best))
            found.append(at_least(f"{cell}: {ours} less {best}, the best, 95 %", less, -0.5))
        for who in sorted(there & set(OURS)):
            apart = fmean(samples(cell, who, "lateness")) - fmean(samples(cell, "paper", "lateness"))
            found.append(at_most(f"{cell}: {who} less the paper, lateness", apart, 0))
        lag = max(itertools.chain.from_iterable(samples(cell, who, "lag99") for who in there))
        found.append(at_most(f"{cell}: the load generator's lag, ms", lag, 10))
        broken = max(itertools.chain.from_iterable(samples(cell, who, "broken") for who in there))
        found.append(at_most(f"{cell}: requests that came to nothing", broken, 0))
    return found
