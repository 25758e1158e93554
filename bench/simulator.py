"""How many steps a second the simulator takes on one core: the scheduler at every step, and with fast-forward.

Each sample serves a whole trace in virtual time, prompts, prefills and outcomes included: 64 sequences that decode
together, and chat-like requests that come and go at about as many. Steps are priced as Llama-3.1-8B's on an H100.
``every_step`` is fast-forward with somebody who wants every ``Step``'s arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tenon.base import clock
from tenon.base.result import Check, ContenderEntry, Result, at_least
from tenon.bench.claim import Cell

TITLE = "simulated steps per second on one core"
BASELINE = "plain"
LIMITS = False

MODEL, DEVICE = "Llama-3.1-8B", "H100"
PLAIN_AT_LEAST = 5_000
FORWARD_AT_LEAST = 20_000


class Simulator:
    """Serves the cell's trace in virtual time."""

    def __init__(self, forward: bool, every_step: bool) -> None:
        self._forward, self._every_step = forward, every_step

    def setup(self, cell: dict[str, Any]) -> None:
        from tenon.workloads.trace import Segment, Trace, TraceRequest

        random = np.random.default_rng(0)
        lengths = random.integers(16, 128, cell["requests"])
        n_outputs = np.full(cell["requests"], cell["output"])
        if cell["rate"]:
            n_outputs = 1 + random.geometric(1 / cell["output"], cell["requests"])
        gaps_s = random.exponential(1 / cell["rate"], cell["requests"]) if cell["rate"] else np.zeros(cell["requests"])
        requests = zip(np.cumsum(gaps_s).tolist(), lengths.tolist(), n_outputs.tolist(), strict=True)
        self._trace = Trace.make(
            "decoding",
            "this bench",
            (
                TraceRequest(f"r{i}", at_s, (Segment(i + 1, n_prompt),), n_output)
                for i, (at_s, n_prompt, n_output) in enumerate(requests)
            ),
        )

    def sample(self) -> dict[str, float]:
        from tenon.cost.device import find as find_device
        from tenon.engine.config import EngineConfig
        from tenon.engine.simulate import Marks, Simulation, device_cost, free_bytes
        from tenon.models.shapes import find as find_model

        model, device = find_model(MODEL), find_device(DEVICE)
        simulation = Simulation(
            EngineConfig(max_sequences=64, max_waiting=1 << 30),
            model,
            device_cost(model, device, model.dtype),
            Marks(MODEL, DEVICE, "bench"),
            memory_bytes=free_bytes(model, device, model.dtype),
            forward=self._forward,
            watch=(lambda step: None) if self._every_step else None,
        )
        start_s = clock.SYSTEM.now_s()
        result = simulation.run(self._trace)
        spent_s = clock.SYSTEM.now_s() - start_s
        running = sum(stats.running for stats in result.stats) / len(result.stats)
        return {"steps_per_s": len(result.steps) / spent_s, "sequences": running}

    def close(self) -> None:
        del self._trace


CONTENDERS = {
    "forward": ContenderEntry("bench.simulator:Simulator", {"forward": True, "every_step": False}),
    "every_step": ContenderEntry("bench.simulator:Simulator", {"forward": True, "every_step": True}),
    "plain": ContenderEntry("bench.simulator:Simulator", {"forward": False, "every_step": False}),
}


def cells(quick: bool) -> list[Cell]:
    rounds = 3 if quick else 10
    together = {"requests": 64, "output": 3000, "rate": 0.0}
    chat = {"requests": 1000, "output": 250, "rate": 35.0}
    return [
        Cell("64 decoding", together, rounds, 1, sample_s=1.0, limit_s=120),
        Cell("chat", chat, rounds, 1, sample_s=2.0, limit_s=120),
    ]


def checks(result: Result) -> list[Check]:
    cell = "64 decoding"
    plain = result.median(cell, "plain", "steps_per_s")
    forward = result.median(cell, "forward", "steps_per_s")
    return [
        at_least("steps/s at 64 sequences, the scheduler at every step", plain, PLAIN_AT_LEAST),
        at_least("steps/s at 64 sequences, with fast-forward", forward, FORWARD_AT_LEAST),
    ]
