"""The server under load: overload, one client that takes too much, and what HTTP costs.

Load is open-loop: requests go out when they are due, whatever has become of earlier ones, and latencies count from
that time. The load generator has one core to itself and the server (both of its processes) the others, where there are
two or more. In the first two cells the engine computes nothing: a step of its hash executor takes ``STEP_S``, so that
queues are measured and not arithmetic. ``SLOTS`` sequences run at once and an answer has ``N_OUTPUT`` tokens.

**overload**: a short sweep finds the peak, then a sample is one load without a pause: at the peak's rate (1x), at 3x,
at 10x, and back at 1x, with the same arrivals as the first time. What comes while a phase settles counts for nothing.

    goodput_*           answers per second within the SLO, SLO_FACTOR times what one takes on an idle server; counted by
                        the tokens that came in the phase, for whole answers end in bunches
    over_peak_*         goodput over the peak: the best that sweep and 1x have seen
    over_before         goodput after the load dropped, over that at 1x before it rose
    refused_p99_s       from when a refused request was due to the end of its 429
    unhinted            429 without Retry-After
    broken              requests that were neither answered nor refused with 429
    lag_p99_s           how late the load generator itself was

``bounded`` has ``--max-wait-s``, for a server cannot know which answers come too late to be of use; ``default`` has
the 512 sequences in flight that are the rule without it.

**tenants**: four ordinary clients at their share of the capacity each, and one abuser at ten times its share, each with
a key. ``quotas``: each key may send as much as its share; ``no quotas``: as much as it likes; ``alone``: without the
abuser. A quota holds a minute's worth, which the abuser may spend at once: the seconds after it begins (``onset``) are
told apart from the steady state that the checks are about.

    ttft_p99_s          of the ordinary clients, steady; ttft_onset_p99_s: in the abuser's first seconds
    of_share            their answers per second, steady and counted by tokens, over their share
    abuser_of_share     the same of the abuser

**http cost**: the embedded model, 16 streams of ids, the same prompts, greedy: the engine driven in its own process
(``engine``), and through ``tenon serve`` (``http``), on the same cores with as many threads.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.first_token import free_port
from tenon.base import clock
from tenon.base.result import Check, ContenderEntry, Result, at_least, at_most
from tenon.bench.child import THREAD_VARIABLES
from tenon.bench.claim import Cell
from tenon.workloads import arrivals
from tenon.workloads.load import Load, LoadOptions, find_server
from tenon.workloads.prompts import common_ids
from tenon.workloads.report import Outcome
from tenon.workloads.streaming import Patience, Target
from tenon.workloads.trace import Segment, Trace, TraceRequest, prompt_tokens

TITLE = "goodput under overload, a client that takes too much, and what HTTP costs"
BASELINE = "engine"
LIMITS = False

HTTP, OVERLOAD, DEFAULTS, TENANTS = "http cost", "overload", "overload, default limits", "tenants"
STEP_S = 0.040
SLOTS = 32
N_PROMPT, N_OUTPUT = 32, 32
E2E_S = N_OUTPUT * STEP_S
CAPACITY = SLOTS / E2E_S
"""Requests per second that steps of that length can finish: what is measured is a little less."""
SLO_FACTOR = 5.0
MAX_WAIT_S = 1.5
"""Of the ``bounded`` server; with its 1.3 s an answer then takes less than half of the SLO."""
PEAK_RATES = (0.8, 0.9, 1.0, 1.1)
N_CLIENTS = 5
SHARE = 0.1
"""Of the capacity, each client's: quotas that together take all of it would leave no room for chance."""
GREED = 10.0
EMBEDDED = "embedded"
KV_BYTES = 128 * 2**20
PATIENCE = Patience(silence_s=120.0, total_s=180.0)

# The claims.
AT_3X, AT_10X, AFTER, REFUSED_S, LAG_S = 0.90, 0.80, 0.95, 0.050, 0.010
TTFT_OVER_ALONE, OF_SHARE, HTTP_OVER_ENGINE = 1.5, 0.90, 0.90


@dataclass(frozen=True)
class Phase:
    """``rate`` requests per second; the first ``settle_s`` do not count. Equal seeds and rates: equal arrivals."""

    name: str
    rate: float
    settle_s: float
    measure_s: float
    seed: int

    @property
    def duration_s(self) -> float:
        return self.settle_s + self.measure_s


def due_times(phase: Phase) -> list[float]:
    """A Poisson process's times from 0, stretched a little so that their number is exactly what the rate says."""
    n = max(2, round(phase.rate * phase.duration_s))
    drawn = itertools.islice(arrivals.poisson(np.random.default_rng(phase.seed), phase.rate), n)
    return arrivals.rescaled(drawn, phase.rate)


def load_of(phases: Sequence[Phase], name: str, first_content: int) -> tuple[Trace, dict[str, tuple[float, float]]]:
    """The phases one after another, and from when to when each counts. No two prompts share anything."""
    requests: list[TraceRequest] = []
    windows: dict[str, tuple[float, float]] = {}
    start_s = 0.0
    for phase in phases:
        for at_s in due_times(phase):
            number = len(requests)
            prompt = (Segment(first_content + number, N_PROMPT),)
            requests.append(TraceRequest(f"{name}-{number}", start_s + at_s, prompt, N_OUTPUT))
        windows[phase.name] = (start_s + phase.settle_s, start_s + phase.duration_s)
        start_s += phase.duration_s
    return Trace.make(name, "this bench", requests), windows


def goodput(outcomes: Iterable[Outcome], window: tuple[float, float], slo_s: float = math.inf) -> float:
    """Answers per second in the window, of those that took at most ``slo_s``, as so many tokens."""
    good = (one for one in outcomes if not one.error and one.end_s - one.intended_s <= slo_s)
    n = sum(window[0] <= at_s < window[1] for one in good for at_s in one.token_s)
    return n / N_OUTPUT / (window[1] - window[0])


def is_refused(outcome: Outcome) -> bool:
    return outcome.error.startswith("http 429")


def is_hinted(outcome: Outcome) -> bool:
    """Whether a refusal says when to try again."""
    return "(retry after " in outcome.error


def p99(values: Iterable[float]) -> float:
    """0 where there are none."""
    found = list(values)
    return float(np.quantile(found, 0.99)) if found else 0.0


def ttft_p99_s(outcomes: Iterable[Outcome], window: tuple[float, float]) -> float:
    """Of requests due in the window. One without a first token waited until its end, at least."""
    due = [one for one in outcomes if window[0] <= one.intended_s < window[1]]
    return p99((one.token_s[0] if one.token_s else one.end_s) - one.intended_s for one in due)


# The server, and who is on which core.


def cores() -> tuple[set[int], set[int]]:
    """The load generator's, and the server's: apart where there are two or more."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return ({usable[0]}, set(usable[1:])) if len(usable) > 1 else (set(usable), set(usable))


def pin(to: set[int]) -> None:
    """This process, and what it starts from now on."""
    if to:
        os.sched_setaffinity(0, to)


class Server:
    """``tenon serve`` on its cores; this process goes to the other one."""

    def __init__(self, *options: str) -> None:
        ours, its = cores()
        threads = max(1, len(its))
        self.port = free_port()
        command = [sys.executable, "-m", "tenon", "serve", EMBEDDED, "--port", str(self.port)]
        command += ["--kv-bytes", str(KV_BYTES), "--threads", str(threads), *options]
        pin(its)
        self._process = subprocess.Popen(command, env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads)))
        pin(ours)
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._wait_ready(120.0)

    def _wait_ready(self, limit_s: float) -> None:
        end_s = clock.SYSTEM.now_s() + limit_s
        while clock.SYSTEM.now_s() < end_s:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self._process.returncode}")
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            try:
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass  # not listening yet
            finally:
                connection.close()
            clock.sleep_s(0.05)
        self.close()
        raise RuntimeError(f"the server was not ready within {limit_s:.0f} s")

    def vocab_size(self, key: str = "") -> int:
        return asyncio.run(find_server(Target(self.url, key), EMBEDDED, patience=PATIENCE)).vocab_size

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


HASH = ("--executor", "hash", "--step-ms", f"{STEP_S * 1e3:g}", "--max-sequences", str(SLOTS))


def send(*loads: tuple[Trace, Target], vocab_size: int) -> list[list[Outcome]]:
    """Each trace to its target, all at once; the outcomes of each."""
    found: list[list[Outcome]] = [[] for _ in loads]

    async def run() -> None:
        runs = []
        for (trace, target), outcomes in zip(loads, found, strict=True):
            extra = {"temperature": 0}
            options = LoadOptions(target, EMBEDDED, vocab_size=vocab_size, ignore_eos=True, extra=extra,
                                  patience=PATIENCE)  # fmt: skip
            runs.append(Load(trace, options, outcomes.append).run())
        await asyncio.gather(*runs)

    asyncio.run(run())
    return found


# Overload.


def factors(cell: dict[str, Any], peak: float) -> list[Phase]:
    """One sample's load: up and down again."""
    settle_s, measure_s = cell["settle_s"], cell["measure_s"]
    steps = (("1x", 1.0, 1), ("3x", 3.0, 2), ("10x", 10.0, 3), ("after", 1.0, 1))
    return [Phase(name, peak * factor, settle_s, measure_s, seed) for name, factor, seed in steps]


def overload_figures(
    outcomes: Sequence[Outcome], windows: dict[str, tuple[float, float]], slo_s: float, peak: float
) -> dict[str, float]:
    """``peak``: the best goodput of the sweep."""
    good = {name: goodput(outcomes, window, slo_s) for name, window in windows.items()}
    best = max(peak, good["1x"])
    refused = [one for one in outcomes if is_refused(one)]
    return {f"goodput_{name}": value for name, value in good.items()} | {
        "peak": best,
        "over_peak_3x": good["3x"] / best,
        "over_peak_10x": good["10x"] / best,
        "over_before": good["after"] / good["1x"] if good["1x"] else 0.0,
        "slo_s": slo_s,
        "refused": len(refused),
        "refused_p99_s": p99(one.end_s - one.intended_s for one in refused),
        "unhinted": sum(not is_hinted(one) for one in refused),
        "broken": sum(bool(one.error) and not is_refused(one) for one in outcomes),
        "lag_p99_s": p99(one.sent_s - one.intended_s for one in outcomes),
    }


class Overload:
    """A server, with a bound on waiting or without, under more than it can do."""

    def __init__(self, max_wait_s: float = 0.0) -> None:
        self._options = ("--max-wait-s", str(max_wait_s)) if max_wait_s else ()

    def setup(self, cell: dict[str, Any]) -> None:
        self._cell, self._content = cell, 1
        self._server = Server(*HASH, *self._options)
        self._vocab_size = self._server.vocab_size()
        idle = [self._send([Phase("idle", 1.0, 0.0, 2.0, 0)])[0] for _ in range(2)][-1]
        self._slo_s = SLO_FACTOR * float(np.median([one.end_s - one.intended_s for one in idle]))
        self._peak = 0.0
        for factor in cell["sweep"]:
            phase = Phase("sweep", factor * CAPACITY, cell["settle_s"], cell["sweep_s"], 4)
            outcomes, windows = self._send([phase])
            self._peak = max(self._peak, goodput(outcomes, windows["sweep"], self._slo_s))
        if not self._peak:
            raise RuntimeError(f"no request of the sweep was answered within {self._slo_s:.2f} s")

    def _send(self, phases: Sequence[Phase]) -> tuple[list[Outcome], dict[str, tuple[float, float]]]:
        trace, windows = load_of(phases, "overload", self._content)
        self._content += len(trace.requests)
        (outcomes,) = send((trace, Target(self._server.url)), vocab_size=self._vocab_size)
        return outcomes, windows

    def sample(self) -> dict[str, float]:
        outcomes, windows = self._send(factors(self._cell, self._peak))
        return overload_figures(outcomes, windows, self._slo_s, self._peak)

    def close(self) -> None:
        self._server.close()


# Tenants.


def secret(client: int) -> str:
    return f"key-of-client-number-{client}"


def key_file(per_minute: int | None) -> str:
    """Keys of all clients; the last is the abuser's."""
    entries = []
    for client in range(N_CLIENTS):
        quota = f"requests_per_minute = {per_minute}\n" if per_minute else ""
        entries.append(f'[[key]]\nname = "client{client}"\nkey = "{secret(client)}"\n{quota}')
    return "\n".join(entries)


def tenant_figures(
    others: Sequence[Outcome], abuser: Sequence[Outcome], windows: dict[str, tuple[float, float]], share: float
) -> dict[str, float]:
    """``share``: each client's, in requests per second."""
    steady = windows["steady"]
    return {
        "ttft_p99_s": ttft_p99_s(others, steady),
        "ttft_onset_p99_s": ttft_p99_s(others, windows["onset"]),
        "of_share": goodput(others, steady) / ((N_CLIENTS - 1) * share),
        "abuser_of_share": goodput(abuser, steady) / share,
        "others_failed": sum(bool(one.error) for one in others),
        "unhinted": sum(is_refused(one) and not is_hinted(one) for one in abuser),
        "lag_p99_s": p99(one.sent_s - one.intended_s for one in (*others, *abuser)),
    }


class Tenants:
    """A server with a key for each client."""

    def __init__(self, abuser: bool, quotas: bool) -> None:
        self._has_abuser, self._has_quotas = abuser, quotas

    def setup(self, cell: dict[str, Any]) -> None:
        self._cell, self._content = cell, 1
        self._share = SHARE * CAPACITY
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "keys.toml"
        path.write_text(key_file(math.ceil(60 * self._share) if self._has_quotas else None))
        self._server = Server(*HASH, "--keys", str(path))
        self._vocab_size = self._server.vocab_size(secret(0))

    def sample(self) -> dict[str, float]:
        loads, windows = [], {}
        for client in range(N_CLIENTS if self._has_abuser else N_CLIENTS - 1):
            rate = self._share * (GREED if client == N_CLIENTS - 1 else 1)
            phases = [
                Phase("onset", rate, 0.0, self._cell["onset_s"], 10 + client),
                Phase("steady", rate, 0.0, self._cell["steady_s"], 20 + client),
            ]
            trace, windows = load_of(phases, f"client{client}", self._content)
            self._content += len(trace.requests)
            loads.append((trace, Target(self._server.url, secret(client))))
        outcomes = send(*loads, vocab_size=self._vocab_size)
        others = [one for found in outcomes[: N_CLIENTS - 1] for one in found]
        abuser = outcomes[N_CLIENTS - 1] if self._has_abuser else []
        return tenant_figures(others, abuser, windows, self._share)

    def close(self) -> None:
        self._server.close()
        self._folder.cleanup()


# What HTTP costs.


def streams(cell: dict[str, Any], sample: int) -> Trace:
    """All due at once. Prompts are the same for every contender and never come again."""
    first = 1 + sample * cell["streams"]
    requests = [
        TraceRequest(f"s{first + i}", 0.0, (Segment(first + i, cell["prompt"]),), cell["output"])
        for i in range(cell["streams"])
    ]
    return Trace.make("streams", "this bench", requests)


class Http:
    def setup(self, cell: dict[str, Any]) -> None:
        self._cell, self._sample = cell, 0
        self._server = Server()
        self._vocab_size = self._server.vocab_size()

    def sample(self) -> dict[str, float]:
        trace = streams(self._cell, self._sample)
        self._sample += 1
        (outcomes,) = send((trace, Target(self._server.url)), vocab_size=self._vocab_size)
        n = sum(len(one.token_s) for one in outcomes)
        if n != self._cell["streams"] * self._cell["output"]:
            raise RuntimeError(f"{n} tokens came; errors: {sorted({one.error for one in outcomes})}")
        return {"tokens_per_s": n / max(one.end_s for one in outcomes)}

    def close(self) -> None:
        self._server.close()


class InProcess:
    """The engine that ``LLM`` drives, without text."""

    def setup(self, cell: dict[str, Any]) -> None:
        _, its = cores()
        pin(its)
        threads = max(1, len(its))
        os.environ |= dict.fromkeys(THREAD_VARIABLES, str(threads))
        from tenon.engine.build import build_engine
        from tenon.engine.config import EngineConfig

        self._cell, self._sample = cell, 0
        self._engine = build_engine(EngineConfig(EMBEDDED, kv_bytes=KV_BYTES, threads=threads), lambda *_: None)

    def sample(self) -> dict[str, float]:
        from tenon.engine.messages import Add

        engine, n = self._engine, 0
        first, end = common_ids(engine.identity.vocab_size)
        adds = []
        for one in streams(self._cell, self._sample).requests:
            ids = tuple(prompt_tokens(one, end, first).tolist())
            adds.append(Add(one.id, ids, one.n_output, 0, temperature=0.0, ignore_eos=True))
        self._sample += 1
        start_s = clock.SYSTEM.now_s()
        for add in adds:
            engine.add(add)
        while engine.has_work:
            n += sum(len(delta.ids) for delta in engine.tick(clock.SYSTEM.now_s()))
        return {"tokens_per_s": n / (clock.SYSTEM.now_s() - start_s)}

    def close(self) -> None:
        self._engine.close()


CONTENDERS = {
    "http": ContenderEntry("bench.server_load:Http", {}),
    "engine": ContenderEntry("bench.server_load:InProcess", {}),
    "bounded": ContenderEntry("bench.server_load:Overload", {"max_wait_s": MAX_WAIT_S}),
    "default": ContenderEntry("bench.server_load:Overload", {}),
    "alone": ContenderEntry("bench.server_load:Tenants", {"abuser": False, "quotas": True}),
    "quotas": ContenderEntry("bench.server_load:Tenants", {"abuser": True, "quotas": True}),
    "no quotas": ContenderEntry("bench.server_load:Tenants", {"abuser": True, "quotas": False}),
}


def cells(quick: bool) -> list[Cell]:
    apart = {"cores": "one for the load, the others for the server" if cores()[0] != cores()[1] else "shared"}
    engine = {"step_s": STEP_S, "slots": SLOTS, "prompt": N_PROMPT, "output": N_OUTPUT}
    http_cost = {"streams": 16, "prompt": 32, "output": 128 if quick else 768} | apart
    sweep = PEAK_RATES[2:] if quick else PEAK_RATES
    overload = {"sweep": sweep, "sweep_s": 4.0 if quick else 6.0, "settle_s": 2.0 if quick else 4.0,
                "measure_s": 4.0 if quick else 10.0} | engine | apart  # fmt: skip
    tenants = {"clients": N_CLIENTS, "share": SHARE, "onset_s": 14.0, "steady_s": 6.0 if quick else 20.0}
    tenants |= engine | apart
    once_s = 4 * (overload["settle_s"] + overload["measure_s"]) + 2
    waited_s = tenants["onset_s"] + tenants["steady_s"] + 4
    swept_s = len(sweep) * (overload["settle_s"] + overload["sweep_s"] + 2)
    rounds = 1 if quick else 5
    found = [
        Cell(HTTP, http_cost, 2 if quick else 7, 1, ("http", "engine"), 2.0 if quick else 5.0, 300),
        Cell(OVERLOAD, overload, rounds, 0, ("bounded",), once_s + swept_s / rounds, 600),
        Cell(TENANTS, tenants, 1 if quick else 3, 0, ("alone", "quotas", "no quotas"), waited_s, 600),
    ]
    if not quick:
        found.append(Cell(DEFAULTS, overload, 2, 0, ("default",), once_s + swept_s / 2 + 20, 600))
    return found


def checks(result: Result) -> list[Check]:
    def median(metric: str) -> float:
        return result.median(OVERLOAD, "bounded", metric)

    def worst(cell: str, contender: str, metric: str) -> float:
        return max(result.find(cell, contender, metric).samples)

    ttft = result.ratio(TENANTS, "quotas", "alone", "ttft_p99_s")
    share = result.median(TENANTS, "quotas", "of_share")
    http_ratio = result.ratio(HTTP, "http", "engine", "tokens_per_s")
    return [
        at_least("goodput at 3x over the peak", median("over_peak_3x"), AT_3X),
        at_least("goodput at 10x over the peak", median("over_peak_10x"), AT_10X),
        at_least("goodput within 10 s after the load drops, over that before", median("over_before"), AFTER),
        at_most("p99 of a refusal, seconds", median("refused_p99_s"), REFUSED_S),
        at_most("refusals without Retry-After", worst(OVERLOAD, "bounded", "unhinted"), 0),
        at_most("requests neither answered nor refused", worst(OVERLOAD, "bounded", "broken"), 0),
        at_most("p99 of the load generator's lag, seconds", median("lag_p99_s"), LAG_S),
        at_most("p99 TTFT beside an abuser with quotas, over that without the abuser", ttft, TTFT_OVER_ALONE),
        at_least("throughput beside an abuser with quotas, over the share", share, OF_SHARE),
        at_most("requests of others that failed beside it", worst(TENANTS, "quotas", "others_failed"), 0),
        at_least("tokens per second over HTTP, over the engine's own", http_ratio, HTTP_OVER_ENGINE),
    ]
