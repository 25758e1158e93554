"""What ``/v1/estimate`` says against what comes: the time to the first token, and between those after it.

Requests with objectives are told on arrival what a question would have been told; what came stands beside it. An hour
of AdaServe's mix (EuroSys'26, arXiv 2501.12162) is simulated with and without guesses (``slo.py`` says how), at loads
that each of them keeps up with; ten minutes are real: ``slo_http.py``'s requests to a server of the embedded model.

Metrics: ``ttft_off``, ``tpot_off``, percent by which the median forecast is off what came, ``ttft_off90``,
``tpot_off90``, the 90th percentile; ``within``, percent of forecasts of both kinds that are no more than a fifth off;
``told``, how many there were; ``met``, percent of requests that kept their time per token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.server_load import Server
from bench.slo import PLAIN, figures, prepared
from bench.slo_http import TIMES, alone_s, load_of, send
from bench.speculation import prompts
from tenon.base import records
from tenon.base.result import Check, ContenderEntry, Result, at_most
from tenon.bench.claim import Cell
from tenon.engine.policies.forecast import Learned

TITLE = "what was expected of requests against what came of them"
BASELINE = "simulated"
LIMITS = False
MOST_OFF = 20.0
Pairs = Sequence[tuple[float, float]]
"""What was told, and what came, in seconds."""


def off(ttft: Pairs, tpot: Pairs) -> dict[str, float]:
    found: dict[str, float] = {}
    both = []
    for name, pairs in (("ttft", ttft), ("tpot", tpot)):
        told_s, came_s = np.array(pairs).T
        shares = np.abs(told_s / came_s - 1)
        found |= {
            f"{name}_off": 100 * float(np.median(shares)),
            f"{name}_off90": 100 * float(np.percentile(shares, 90)),
        }
        both.append(shares)
    return found | {"within": 100 * float((np.concatenate(both) <= 0.2).mean()), "told": float(len(ttft))}


class Told(Learned):
    """Learns as any does, and keeps what it learns from."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[float, float]] = []

    def hear(self, told_s: float, factor: float, came_s: float) -> None:
        if came_s > 0:
            self.pairs.append((told_s, came_s))
        super().hear(told_s, factor, came_s)


class Simulated:
    def setup(self, cell: dict[str, Any]) -> None:
        self._cell = cell

    def sample(self) -> dict[str, float]:
        simulation, trace, bounds = prepared(self._cell, self._cell["policy"], seed=0)
        forecasts = simulation.scheduler.forecasts
        ttft, tpot = Told(), Told()
        forecasts.ttft, forecasts.tpot = ttft, tpot
        result = simulation.run(trace)
        return off(ttft.pairs, tpot.pairs) | {"met": figures(result.outcomes, bounds, 0.0, result.end_s)["met"]}

    def close(self) -> None:
        del self._cell


class Real:
    def setup(self, cell: dict[str, Any]) -> None:
        self._cell, self._texts = cell, prompts(64)
        self._folder = tempfile.TemporaryDirectory()
        self._server = Server("--record", self._folder.name, *cell["options"])
        self._alone_s = alone_s(self._server.url, self._texts[0])

    def sample(self) -> dict[str, float]:
        cell = self._cell
        bounds = {name: times * self._alone_s for name, times in TIMES.items()}
        trace, fields = load_of(cell["rate"], cell["duration_s"], 1, self._texts, bounds)
        outcomes = send(self._server.url, trace, fields)
        (run,) = Path(self._folder.name).iterdir()
        promised = [one["slo"] for one in records.read_records(run) if one["kind"] == "finished" and one.get("slo")]
        pairs: dict[str, list[tuple[float, float]]] = {"ttft_ms": [], "tpot_ms": []}
        for slo in promised:
            for name, found in pairs.items():
                if slo["forecast"] and slo["actual"][name]:
                    found.append((slo["forecast"][name] / 1e3, slo["actual"][name] / 1e3))
        met = figures(outcomes, bounds, 0.0, max(one.end_s for one in outcomes))["met"]
        return off(pairs["ttft_ms"], pairs["tpot_ms"]) | {"met": met}

    def close(self) -> None:
        self._server.close()
        self._folder.cleanup()


CONTENDERS = {
    "simulated": ContenderEntry("bench.forecasts:Simulated", {}),
    "real": ContenderEntry("bench.forecasts:Real", {}),
}


def cells(quick: bool) -> list[Cell]:
    hour_s, real_s = (300.0, 60.0) if quick else (3600.0, 600.0)
    simulated = [
        ("llama, no guesses", {"steps": "llama", "rate": 2.0, "policy": "sarathi"}),
        ("llama, guesses", {"steps": "llama", "rate": 4.0, "policy": "ours"}),
        ("h200, no guesses", {"steps": "h200", "rate": 6.0, "policy": "sarathi"}),
        ("h200, guesses", {"steps": "h200", "rate": 6.0, "policy": "ours"}),
    ]
    guesses = ["--speculative", "suffix", "--speculative-policy", "slack", "--chunk", "patient"]
    real = {"rate": 3.0, "duration_s": real_s, "options": ["--max-sequences", "64", *guesses]}
    return [
        *(
            Cell(f"{name}, simulated", PLAIN | what | {"duration_s": hour_s}, 1, 0, ("simulated",), hour_s / 40, 900)
            for name, what in (simulated[:2] if quick else simulated)
        ),
        Cell("over HTTP", real, 1, 0, ("real",), real_s + 5, 900),
    ]


def checks(result: Result) -> list[Check]:
    return [
        at_most(f"{cell}: {metric}", result.median(cell, who, metric), MOST_OFF)
        for cell in result.cells
        for who in ("simulated", "real")
        if any(one.cell == cell and one.contender == who for one in result.series)
        for metric in ("ttft_off", "tpot_off")
    ]
