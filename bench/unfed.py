"""An unfed simulation against the real engine: the same trace, the same cache, this machine as it was calibrated.

The real engine serves the embedded model in this process: requests are queued when they are due, steps follow one
another, times count from when a request was due. The simulation knows the trace, the calibration of `tenon device local
--calibrate`, to be run just before, and nothing of the real run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tenon.base import clock
from tenon.base.result import Check, ContenderEntry, Result, at_least, at_most
from tenon.bench.claim import Cell

TITLE = "mean TTFT and TPOT of a trace: simulated, and served by the real engine"
BASELINE = "engine"
LIMITS = False

KV_BYTES = 256 * 2**20
ALLOWED = 0.15
METRICS = ("ttft_s", "tpot_s")


def trace(cell: dict[str, Any]) -> Any:
    """Requests of chat-like lengths; half of them begin as some other did."""
    from tenon.workloads.trace import Segment, Trace, TraceRequest

    random = np.random.default_rng(cell["seed"])
    n = cell["requests"]
    at_s = np.cumsum(random.exponential(1 / cell["rate"], n)).tolist()
    n_own = np.exp(random.uniform(np.log(32), np.log(512), n)).astype(int).tolist()
    n_output = (1 + random.geometric(1 / cell["output"], n)).tolist()
    shared = [(Segment(1 + int(random.integers(8)), 128),) if random.random() < 0.5 else () for _ in range(n)]
    return Trace.make(
        "chat-like",
        "this bench",
        (TraceRequest(f"r{i}", at_s[i], (*shared[i], Segment(100 + i, n_own[i])), n_output[i]) for i in range(n)),
    )


def config(cell: dict[str, Any]) -> Any:
    from tenon.engine.config import EngineConfig

    return EngineConfig(kv_bytes=KV_BYTES, max_sequences=cell["sequences"], max_step_tokens=256)


class Simulated:
    """The trace in virtual time, by the calibration of this machine."""

    def setup(self, cell: dict[str, Any]) -> None:
        self._cell, self._trace = cell, trace(cell)

    def sample(self) -> dict[str, float]:
        from tenon.cost.device import find as find_device
        from tenon.engine.simulate import Marks, Simulation, device_cost
        from tenon.models.shapes import find as find_model

        model, device = find_model("embedded"), find_device("local")
        cost, marks = device_cost(model, device, model.dtype), Marks("embedded", "local", "calibrated")
        result = Simulation(config(self._cell), model, cost, marks, memory_bytes=0).run(self._trace)
        return _means([(outcome.intended_s, list(outcome.token_s)) for outcome in result.outcomes])

    def close(self) -> None:
        del self._trace


class Real:
    """The trace by the engine itself, in its own time."""

    def setup(self, cell: dict[str, Any]) -> None:
        from tenon.engine.build import build_engine
        from tenon.engine.messages import Add
        from tenon.workloads.trace import prompt_tokens

        self._engine = build_engine(config(cell), lambda *_: None)
        vocabulary = self._engine.identity.vocab_size
        self._due = [
            (one.arrival_s, Add(one.id, tuple(prompt_tokens(one, vocabulary).tolist()), one.n_output, 0,
                                temperature=0.0, ignore_eos=True))
            for one in trace(cell).requests
        ]  # fmt: skip

    def sample(self) -> dict[str, float]:
        engine, left = self._engine, list(reversed(self._due))
        engine.reset()
        due_s = {add.request_id: at_s for at_s, add in self._due}
        token_s: dict[str, list[float]] = {name: [] for name in due_s}
        start_s = clock.SYSTEM.now_s()
        while left or engine.has_work:
            now_s = clock.SYSTEM.now_s() - start_s
            while left and left[-1][0] <= now_s:
                engine.add(left.pop()[1])
            if not engine.has_work:
                clock.sleep_s(left[-1][0] - now_s)
                continue
            deltas = engine.tick(now_s)
            now_s = clock.SYSTEM.now_s() - start_s
            for delta in deltas:
                token_s[delta.request_id].append(now_s)
        return _means([(due_s[name], stamps) for name, stamps in token_s.items()])

    def close(self) -> None:
        self._engine.close()


def _means(served: list[tuple[float, list[float]]]) -> dict[str, float]:
    """Over requests: the first token's delay, and the time per token after it."""
    ttft_s = [stamps[0] - due_s for due_s, stamps in served]
    tpot_s = [(stamps[-1] - stamps[0]) / (len(stamps) - 1) for _, stamps in served if len(stamps) > 1]
    return {"ttft_s": float(np.mean(ttft_s)), "tpot_s": float(np.mean(tpot_s))}


CONTENDERS = {
    "simulated": ContenderEntry("bench.unfed:Simulated", {}),
    "engine": ContenderEntry("bench.unfed:Real", {}),
}


def cells(quick: bool) -> list[Cell]:
    def cell(name: str, rate: float) -> Cell:
        params = {"rate": rate, "requests": int(8 * rate), "output": 150, "sequences": 32, "seed": 5}
        return Cell(name, params, 3 if quick else 7, 1, sample_s=8.5, limit_s=120)

    made = [cell("light", 10.0), cell("busy", 20.0)]
    return made[:1] if quick else made


def checks(result: Result) -> list[Check]:
    out: list[Check] = []
    for cell in result.cells:
        for metric in METRICS:
            ratio = result.ratio(cell, "simulated", "engine", metric)
            out.append(at_most(f"{cell}: mean {metric}, simulated over real", ratio, 1 + ALLOWED))
            out.append(at_least(f"{cell}: mean {metric}, simulated over real", ratio, 1 - ALLOWED))
    return out
