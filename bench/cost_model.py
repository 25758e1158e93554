"""The cost model against this machine's executor, and against figures that others published for GPUs.

Here: `tenon device local --calibrate`, to be run just before, fits the model to steps of four shapes. This bench times
*other* steps of two of them and of a shape that the fit has never seen, in five kinds: decode, prefill, mixed, tree,
hole. Contexts, batches and runs are drawn from a seed. `again` is the executor once more in another process: how far
two measurements lie apart.

Elsewhere: the catalogue's spec sheets with its default shares, as they are, against decode and prefill times from
papers and repositories. Figures of which something went into the catalogue's assumptions are marked as fitted and not
counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tenon.base.result import Check, ContenderEntry, Result, at_least, at_most
from tenon.bench.claim import Cell

TITLE = "predicted against measured seconds of a step; spec sheets against published figures"
BASELINE = "executor"
LIMITS = False

HERE = ("model", "executor", "again")
KINDS = {"decode": 7, "prefill": 5, "mixed": 4, "tree": 4, "hole": 4}
FEW = {"decode": 5, "prefill": 3, "mixed": 2, "tree": 2, "hole": 2}
QUICK = {"decode": 2, "prefill": 1, "mixed": 1, "tree": 1, "hole": 1}
# Model: most sequences, longest context, most rows of a run. The last was not part of the calibration.
SHAPES = {"embedded": (64, 2000, 900), "SmolLM2-135M": (24, 4000, 160), "Qwen3-0.6B": (6, 1600, 40)}
UNSEEN = "Qwen3-0.6B"
SEED = 11
MEDIAN_ERROR, P95_ERROR = 0.10, 0.25


def plans(cell: dict[str, Any]) -> list[Any]:
    """The steps of a cell: log-uniform in every size, the same for every contender."""
    from tenon.engine.executors import probe

    rng = np.random.default_rng([SEED, *cell["model"].encode()])
    sequences, longest, rows = SHAPES[cell["model"]]

    def size(low: int, high: int) -> int:
        return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))

    def one(kind: str) -> Any:
        # Few sequences may be long, many must be short: the cache is bounded.
        batch = size(1, sequences)
        context = size(33, max(34, min(longest, 2 * sequences * longest // (5 * batch))))
        if kind == "decode":
            return probe.decode(batch, context)
        if kind == "prefill":
            n = size(2, rows)
            return probe.prefill(n, size(1, longest - n) - 1)
        if kind == "mixed":
            n = size(8, rows)
            return probe.mixed(batch, context, n, size(1, longest - n) - 1)
        batch = max(1, batch // 4)
        if kind == "tree":
            return probe.tree(batch, min(context, longest - 40), size(3, 24), int(rng.integers(1, 4)))
        context = max(context, 200)
        return probe.hole(batch, context, int(rng.integers(1, 4)), size(4, context // 10))

    found = {plan.name: plan for kind, n in cell["kinds"].items() for plan in (one(kind) for _ in range(n))}
    return list(found.values())


@dataclass(frozen=True)
class Published:
    """A step's time that somebody measured: ``batch`` rows at ``context`` (or one run of ``prefill`` rows) of ``model``
    on ``devices`` x ``device``. ``host``: whether an engine's own time is part of it."""

    name: str
    source: str
    device: str
    model: str
    seconds: float
    devices: int = 1
    batch: int = 1
    context: int = 100
    prefill: int = 0
    dtype: str = "bfloat16"
    host: bool = False
    fitted: bool = False


MSAROUFIM = "msaroufim/megakernels-vs-cuda-graphs, 2026-09: CUDA graphs and programmatic launches"
HAZY = "Hazy Research, Llama-1B megakernel: the 600 us of a step on B200"
MPK = "MPK, arXiv 2512.22219: best of vLLM and SGLang, floor of 10 ms, which is the bandwidth of the 40 GB model"
GPT_FAST = "gpt-fast, README: A100-80GB limited to 330 W, five prompt tokens, batch 1"
ADASERVE = "AdaServe (EuroSys), artifact's latency table of verification and its measured baseline"
LLAMA_CPP = "XiongjieDai/GPU-Benchmarks-on-LLM-Inference, llama.cpp, f16"
L40S = "openllmbenchmarks.com on XiongjieDai's data, llama.cpp, f16"


def _published() -> list[Published]:
    rows = [
        Published("Llama-3.2-1B H100", MSAROUFIM, "H100", "Llama-3.2-1B", 979.5e-6),
        Published("Llama-3.2-1B H200", MSAROUFIM, "H200", "Llama-3.2-1B", 794.7e-6),
        Published("Llama-3.2-1B B200", HAZY, "B200", "Llama-3.2-1B", 600e-6),
        Published("Qwen3-8B A100-40", MPK, "A100-40", "Qwen3-8B", 14.5e-3, context=600, host=True),
        Published("Llama-2-7B A100", GPT_FAST, "A100-80", "Llama-2-7B", 1 / 104.9),
        Published("Llama-3-8B 4090", LLAMA_CPP, "RTX4090", "Llama-3.1-8B", 1 / 54.34, context=512, dtype="float16"),
        Published("Llama-2-7B A6000", LLAMA_CPP, "A6000", "Llama-2-7B", 1 / 44.01, context=512, dtype="float16"),
        Published(
            "Llama-3-8B M2 Ultra", LLAMA_CPP, "M2-Ultra", "Llama-3.1-8B", 1 / 36.25, context=512, dtype="float16"
        ),
        Published("Llama-3-8B L40S", L40S, "L40S", "Llama-3.1-8B", 1 / 43.42, context=512, dtype="float16"),
    ]
    rows += [
        Published(f"Llama-2-7B {n}xA100", GPT_FAST, "A100-80", "Llama-2-7B", 1 / rate, devices=n, fitted=True)
        for n, rate in ((2, 168.84), (4, 254.02), (8, 328.43))
    ]
    rows += [
        Published(f"Llama-2-70B {n}xA100", GPT_FAST, "A100-80", "Llama-2-70B", 1 / rate, devices=n)
        for n, rate in ((2, 21.32), (4, 38.01), (8, 62.50))
    ]
    for model, n, times in (
        ("Llama-3-70B", 4, {1: 30, 128: 55, 256: 85, 384: 105, 512: 125}),
        ("Qwen2.5-32B", 2, {1: 28, 128: 48, 256: 66, 384: 84, 512: 104, 640: 124, 768: 144, 1024: 188}),
    ):
        rows += [
            Published(
                f"{model} {n}xA100, {rows_} rows", ADASERVE, "A100-80", model, ms / 1e3, devices=n, batch=rows_,
                context=242, host=True,
            )
            for rows_, ms in times.items()
        ]  # fmt: skip
    # llama-bench computes a prompt in batches of 512 rows.
    rows += [
        Published(f"{model} {name} prompt", LLAMA_CPP, device, model, 512 / rate, prefill=512, dtype="float16")
        for model, name, device, rate in (
            ("Llama-3.1-8B", "4090", "RTX4090", 9382.00),
            ("Llama-2-7B", "A6000", "A6000", 3707.88),
            ("Llama-3.1-8B", "M2 Ultra", "M2-Ultra", 1175.40),
        )
    ]
    return rows


PUBLISHED = _published()


class Model:
    """What the cost model says; measures nothing."""

    def setup(self, cell: dict[str, Any]) -> None:
        from tenon.cost import price
        from tenon.cost.device import find
        from tenon.models import shapes
        from tenon.models.spec import step_work

        if cell["model"] == "published":
            self._seconds = {row.name: self._published_s(row) for row in PUBLISHED}
            return
        model, local = shapes.find(cell["model"]), find("local")
        windows = model.cost.group_windows()
        self._seconds = {
            plan.name: price.seconds(step_work(model, plan.shape(windows)), local, host=False) for plan in plans(cell)
        }

    @staticmethod
    def _published_s(row: Published) -> float:
        from tenon.cost import price
        from tenon.cost.device import find
        from tenon.cost.work import decode_shape, prefill_shape
        from tenon.models import shapes
        from tenon.models.spec import step_work

        shape = prefill_shape(0, row.prefill) if row.prefill else decode_shape([row.context] * row.batch)
        work = step_work(shapes.load(row.model), shape, row.dtype, tensor_parallel=row.devices)
        device = find(row.device)
        found = price.breakdown(work, device if row.host else device.with_use(step_s=0.0, sync_s=0.0))
        return found.total

    def sample(self) -> dict[str, float]:
        return dict(self._seconds)

    def close(self) -> None:
        del self._seconds


class Executor:
    """The real executor on the same steps, by the clock."""

    def setup(self, cell: dict[str, Any]) -> None:
        import torch

        from tenon.base.errors import ConfigError
        from tenon.cost import calibration
        from tenon.engine.executors import probe
        from tenon.models import shapes
        from tenon.models.spec import ModelSpec

        self._plans, self._model = plans(cell), cell["model"]
        calibrated = calibration.load().measured.threads
        if calibrated != torch.get_num_threads():
            raise ConfigError(f"calibrated for {calibrated} threads, asked to run with {torch.get_num_threads()}")
        spec = shapes.find(self._model)
        if not isinstance(spec, ModelSpec):
            raise TypeError(f"{self._model} is known by its costs alone")
        self._rig = probe.Rig(spec, probe.needed(self._plans), threads=torch.get_num_threads())

    def sample(self) -> dict[str, float]:
        from tenon.engine.executors import probe

        points = probe.time_steps({self._model: (self._rig, self._plans)}, rounds=1)
        return {plan.name: point.seconds for plan, point in zip(self._plans, points, strict=True)}

    def close(self) -> None:
        self._rig.close()


class Papers:
    """What was published."""

    def setup(self, cell: dict[str, Any]) -> None:
        del cell  # there is one

    def sample(self) -> dict[str, float]:
        return {row.name: row.seconds for row in PUBLISHED}

    def close(self) -> None:
        """Nothing was taken."""


CONTENDERS = {
    "model": ContenderEntry("bench.cost_model:Model", {}),
    "executor": ContenderEntry("bench.cost_model:Executor", {}),
    "again": ContenderEntry("bench.cost_model:Executor", {}),
    "papers": ContenderEntry("bench.cost_model:Papers", {}),
}


def cells(quick: bool) -> list[Cell]:
    found = [Cell("published", {"model": "published"}, 1, 0, ("model", "papers"), 0.1, 60)]
    if quick:
        return [*found, Cell("embedded", {"model": "embedded", "kinds": QUICK}, 2, 0, HERE, 1.0, 300)]
    # A sample warms every step up by itself.
    return found + [
        Cell(model, {"model": model, "kinds": FEW if model == UNSEEN else KINDS}, 3, 0, HERE, 4.0, 300)
        for model in SHAPES
    ]


def errors(result: Result, cell: str, contender: str, against: str) -> dict[str, float]:
    """|contender / against - 1| of the medians of every step."""
    names = [s.metric for s in result.series if (s.cell, s.contender) == (cell, against)]
    return {name: abs(result.median(cell, contender, name) / result.median(cell, against, name) - 1) for name in names}


def checks(result: Result) -> list[Check]:
    here = {
        (cell, name): e for cell in result.cells if cell in SHAPES for name, e in _here(result, cell, "model").items()
    }
    again = [e for cell in result.cells if cell in SHAPES for e in _here(result, cell, "again").values()]
    out = [
        at_least("steps of this machine", len(here), 5 if result.settings["quick"] else 60),
        at_most("error on this machine, median", float(np.median(list(here.values()))), MEDIAN_ERROR),
        at_most("error on this machine, 95th percentile", float(np.quantile(list(here.values()), 0.95)), P95_ERROR),
    ]
    out += [
        at_most(f"error on this machine, {kind}, median", float(np.median(found)), MEDIAN_ERROR * 1.5)
        for kind in KINDS
        if (found := [e for (_, name), e in here.items() if name.startswith(kind)])
    ]
    out.append(at_most("two measurements' difference, median", float(np.median(again)), MEDIAN_ERROR))
    published = errors(result, "published", "model", "papers")
    counted = {row.name: row for row in PUBLISHED if not row.fitted}
    found = [published[name] for name in counted]
    out += [
        at_least("published figures", len(found), 8),
        at_least("types of GPU among them", len({row.device for row in counted.values()}), 4),
        at_most("error on published figures, median", float(np.median(found)), 0.2),
        at_most("error on published figures, 95th percentile", float(np.quantile(found, 0.95)), 0.5),
    ]
    return out


def _here(result: Result, cell: str, contender: str) -> dict[str, float]:
    return errors(result, cell, contender, "executor")
