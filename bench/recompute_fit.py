"""What it takes to fill a hole, against what the cost model says it takes.

The real executor of this machine computes holes of k blocks at position p of a context of up to 8192 tokens, in a model
of eight layers, d = 256, with random weights: attention costs as much as everything else at about 1.5K tokens there, so
that a block's position shows. Three say what a hole costs:

    law       seconds = a + b tokens + c pairs, by least squares on the holes named `fit` (AsymCache, arXiv 2606.02964,
              Eq. 7, with pairs counted causally), judged on the holes named `held`
    model     the cost model as `tenon device local --calibrate`, to be run just before, fitted it to other models
    policies  the sum of what eviction policies are told of the hole's blocks, up to one line

Holes named `held` are drawn from a seed, log-uniform in k and uniform in p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenon.base.result import Check, ContenderEntry, Result, at_least, at_most
from tenon.bench.claim import Cell

TITLE = "seconds to fill a hole of k blocks at position p: predicted and measured"
BASELINE = "executor"
LIMITS = False

BLOCK = 16
CONTEXT = 8192
SEED = 23
R2, MAPE = 0.99, 0.15
BLOCKS, POSITIONS = (2, 8, 24, 64), (0, 1024, 2048, 4096, 7168)
FEW_BLOCKS, FEW_POSITIONS = (4, 32), (0, 2048, 6144)

Hole = tuple[int, int]
"""Blocks, and the position of the first one's first token."""


def spec() -> Any:
    from tenon.models.spec import ModelSpec

    return ModelSpec("llama", 4096, 256, 8, 8, 8, 32, 704, 2 * CONTEXT, dtype="bfloat16")


def holes(cell: dict[str, Any]) -> dict[str, Hole]:
    """By name; the same for every contender."""
    rng = np.random.default_rng(SEED)
    found = {f"fit {k} at {p}": (k, p) for k in cell["blocks"] for p in cell["positions"]}
    while len(found) < len(cell["blocks"]) * len(cell["positions"]) + cell["held"]:
        k = int(np.exp(rng.uniform(np.log(2), np.log(65))))
        p = BLOCK * int(rng.integers(0, CONTEXT // BLOCK - k + 1))
        found[f"held {k} at {p}"] = (k, p)
    return found


def pairs(hole: Hole) -> int:
    """(row, visible position) pairs of a hole's rows."""
    n, p = hole[0] * BLOCK, hole[1]
    return n * p + n * (n + 1) // 2


class Model:
    """The calibrated cost model."""

    def setup(self, cell: dict[str, Any]) -> None:
        from tenon.cost.device import find
        from tenon.cost.price import seconds
        from tenon.cost.work import prefill_shape
        from tenon.models.spec import step_work

        model, local = spec(), find("local")
        self._seconds = {
            name: seconds(step_work(model, prefill_shape(p, k * BLOCK, outputs=0)), local, host=False)
            for name, (k, p) in holes(cell).items()
        }

    def sample(self) -> dict[str, float]:
        return dict(self._seconds)

    def close(self) -> None:
        del self._seconds


class Policies:
    """The sum of what eviction policies are told of a hole's blocks."""

    def setup(self, cell: dict[str, Any]) -> None:
        from tenon.cost.device import find
        from tenon.engine.recompute import recompute_cost

        cost_of = recompute_cost(spec(), BLOCK, device=find("local"))
        self._seconds = {name: sum(cost_of(p + i * BLOCK) for i in range(k)) for name, (k, p) in holes(cell).items()}

    def sample(self) -> dict[str, float]:
        return dict(self._seconds)

    def close(self) -> None:
        del self._seconds


class Executor:
    """The real executor on a cache that is filled, by the clock."""

    def setup(self, cell: dict[str, Any]) -> None:
        import torch

        from tenon.base.errors import ConfigError
        from tenon.cost import calibration
        from tenon.engine.executors import probe

        calibrated = calibration.load().measured.threads
        if calibrated != torch.get_num_threads():
            raise ConfigError(f"calibrated for {calibrated} threads, asked to run with {torch.get_num_threads()}")
        self._plans = [
            probe.StepPlan(name, "hole", (probe.SpanPlan(0, p, k * BLOCK, samples=False),))
            for name, (k, p) in holes(cell).items()
        ]
        self._rig = probe.Rig(spec(), CONTEXT, threads=torch.get_num_threads())

    def sample(self) -> dict[str, float]:
        from tenon.engine.executors import probe

        points = probe.time_steps({"model": (self._rig, self._plans)}, rounds=1)
        return {plan.name: point.seconds for plan, point in zip(self._plans, points, strict=True)}

    def close(self) -> None:
        self._rig.close()


CONTENDERS = {
    "model": ContenderEntry("bench.recompute_fit:Model", {}),
    "policies": ContenderEntry("bench.recompute_fit:Policies", {}),
    "executor": ContenderEntry("bench.recompute_fit:Executor", {}),
    "again": ContenderEntry("bench.recompute_fit:Executor", {}),
}


def cells(quick: bool) -> list[Cell]:
    params = {"blocks": BLOCKS, "positions": POSITIONS, "held": 20}
    few = {"blocks": FEW_BLOCKS, "positions": FEW_POSITIONS, "held": 4}
    # A sample warms every hole up by itself.
    return [Cell("holes", few, 2, 0, sample_s=3.0) if quick else Cell("holes", params, 9, 0, sample_s=10.0)]


def r_squared(found: NDArray[np.float64], predicted: NDArray[np.float64]) -> float:
    return float(1 - ((found - predicted) ** 2).sum() / ((found - found.mean()) ** 2).sum())


def error(found: NDArray[np.float64], predicted: NDArray[np.float64]) -> float:
    """Mean of |predicted / found - 1|."""
    return float(np.abs(predicted / found - 1).mean())


def terms(of: Sequence[Hole]) -> NDArray[np.float64]:
    """(n, 3): of each hole one, its tokens, its pairs."""
    return np.array([(1.0, k * BLOCK, pairs((k, p))) for k, p in of])


def least_squares(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients with the least relative error: small holes count as much as large ones."""
    return np.asarray(np.linalg.lstsq(x / y[:, None], np.ones(len(y)), rcond=None)[0])


def checks(result: Result) -> list[Check]:
    of = holes(cells(result.settings["quick"])[0].params)

    def seconds(contender: str, kind: str = "") -> NDArray[np.float64]:
        return np.array([result.median("holes", contender, name) for name in of if name.startswith(kind)])

    fit, held = ([hole for name, hole in of.items() if name.startswith(kind)] for kind in ("fit", "held"))
    measured_fit, measured_held, measured = (seconds("executor", kind) for kind in ("fit", "held", ""))
    law = least_squares(terms(fit), measured_fit)
    told = np.stack([np.ones(len(of)), seconds("policies")], axis=1)
    line = told @ np.linalg.lstsq(told, measured, rcond=None)[0]
    return [
        at_least("law, R2 of the holes it was fitted to", r_squared(measured_fit, terms(fit) @ law), R2),
        at_most("law, mean error of the holes held out", error(measured_held, terms(held) @ law), MAPE),
        at_least("law, R2 of the holes held out", r_squared(measured_held, terms(held) @ law), R2),
        at_most("model, mean error of the holes held out", error(measured_held, seconds("model", "held")), MAPE),
        at_most("model, mean error of all holes", error(measured, seconds("model")), MAPE),
        at_least("policies, R2 of a line through what they are told", r_squared(measured, line), R2),
        at_most("two measurements' mean difference", error(measured, seconds("again")), MAPE / 2),
    ]
