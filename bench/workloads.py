"""Made traces against the published figures of their originals, and against the originals' files where they are at
hand.

A sample is a trace of another seed. ``made`` describes it; ``cited`` gives the figures of ``parameters.toml`` in
``tenon/workloads`` with their sources; ``file`` describes the original, if the folder ``$TENON_TRACES`` holds it:
``mooncake_conversation.jsonl`` and ``mooncake_synthetic.jsonl`` (kvcache-ai/Mooncake, Apache-2.0),
``azure_llm_2023_code.csv`` and ``azure_llm_2023_conv.csv`` (Azure/AzurePublicDataset, CC-BY 4.0). A cell says in its
parameters whether it was.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from tenon.base.result import Check, ContenderEntry, Result, Series, at_most
from tenon.bench.claim import Cell
from tenon.workloads.parameters import families

TITLE = "made request traces: moments, percentiles, reuse gaps and LRU curves against the originals' figures"
BASELINE = "cited"
LIMITS = False

FILES = {
    "mooncake-conversation": "mooncake_conversation.jsonl",
    "mooncake-synthetic": "mooncake_synthetic.jsonl",
    "azure-2023-code": "azure_llm_2023_code.csv",
    "azure-2023-conv": "azure_llm_2023_conv.csv",
}
# What a family is asked for where its own number is too small for its rarest figures.
ASKED: dict[str, dict[str, Any]] = {
    "burstgpt": {"requests": 20_000},
    "longbench": {"requests": 3_000},
    "loogle": {"requests": 3_000},
    "coding-agent": {"sessions": 200},
    "swe-agent": {"sessions": 400},
    "adaserve": {"requests": 5_000},
    "sharegpt": {"requests": 20_000},
    "lmsys": {"requests": 20_000},
}
# Seeds. One synthetic trace has few documents: its LRU curve varies by two points from seed to seed, others' by half
# of it.
ROUNDS = {"mooncake-synthetic": 21}
WITHIN = 0.10
LRU_POINTS = 2.0
KS_AT_MOST = 0.05
GAPS = ("follow_gap_s", "block_gap_s")
CURVE = "lru_curve_"
# Parameters that had to be solved for were solved on traces of small seeds; what is measured here was not looked at
# then.
FIRST_SEED = 2000


def original(family: str) -> Path | None:
    """The original's file, if there is one and it is at hand."""
    folder = os.environ.get("TENON_TRACES")
    path = Path(folder) / FILES[family] if folder and family in FILES else None
    return path if path is not None and path.exists() else None


class Made:
    """Makes and describes a trace; each sample has the next seed."""

    def setup(self, cell: dict[str, Any]) -> None:
        from tenon.workloads import readers
        from tenon.workloads.describe import Samples

        self._cell, self._seed = cell, FIRST_SEED
        path = original(cell["family"])
        self._file = Samples(readers.read(path)) if path else None

    def sample(self) -> dict[str, float]:
        import numpy as np

        from tenon.workloads.describe import Samples, ks
        from tenon.workloads.figures import measure
        from tenon.workloads.generator import make

        family = families()[self._cell["family"]]
        samples = Samples(make(self._cell["family"], seed=self._seed, **self._cell["asked"]))
        self._seed += 1
        found = measure(samples)
        metrics = {name: found[name] for name in family.figures}
        for name, curve in family.curves.items():
            x, y = (np.array(column, dtype=np.float64) for column in zip(*curve.value, strict=True))
            if name == "lru":
                sizes = x.astype(int).tolist()
                hits = samples.lru(sizes)
                metrics |= {f"{CURVE}{size}": hit for size, hit in zip(sizes, hits, strict=True)}
                metrics["lru_worst_points"] = 100 * float(np.abs(np.array(hits) - y).max())
            else:
                # Against the distribution's cited quantiles: the largest difference at any of them.
                values, at = np.sort(getattr(samples, name)), y > 0
                below = np.searchsorted(values, y[at], "right") / len(values)
                metrics[f"{name}_ks"] = float(np.abs(below - x[at] / 100).max())
        if self._file is not None:
            for name in ("input", "output", *GAPS):
                distance = ks(getattr(self._file, name), getattr(samples, name))
                if distance is not None:
                    metrics[f"{name}_ks_to_file"] = distance
        return metrics

    def close(self) -> None:
        del self._file


class Cited:
    """The figures themselves."""

    def setup(self, cell: dict[str, Any]) -> None:
        self._figures = families()[cell["family"]].figures

    def sample(self) -> dict[str, float]:
        return {name: figure.value for name, figure in self._figures.items()}

    def close(self) -> None:
        del self._figures


class File:
    """The original, described by the same code."""

    def setup(self, cell: dict[str, Any]) -> None:
        from tenon.workloads import readers
        from tenon.workloads.describe import Samples
        from tenon.workloads.figures import measure

        path = original(cell["family"])
        if path is None:
            raise FileNotFoundError(f"$TENON_TRACES no longer holds {FILES[cell['family']]}")
        found = measure(Samples(readers.read(path)))
        self._metrics = {name: found[name] for name in families()[cell["family"]].figures}

    def sample(self) -> dict[str, float]:
        return self._metrics

    def close(self) -> None:
        del self._metrics


CONTENDERS = {
    "made": ContenderEntry("bench.workloads:Made", {}),
    "cited": ContenderEntry("bench.workloads:Cited", {}),
    "file": ContenderEntry("bench.workloads:File", {}),
}


def cells(quick: bool) -> list[Cell]:
    out = []
    for name, family in families().items():
        if not family.figures or (quick and name not in ("mooncake-conversation", "adaserve")):
            continue
        path = original(name)
        params: dict[str, Any] = {"family": name, "asked": ASKED.get(name, {})}
        if name in FILES:
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path else ""
            params["file"] = f"{FILES[name]}, sha256 {digest}" if path else f"absent: $TENON_TRACES/{FILES[name]}"
        who = ("made", "cited", "file") if path else ("made", "cited")
        out.append(Cell(name, params, 3 if quick else ROUNDS.get(name, 7), 0, who, 2.0, 300))
    return out


def checks(result: Result) -> list[Check]:
    """Medians over seeds against the figures, and the LRU curve's medians against the curve."""
    out: list[Check] = []
    for cell in result.cells:
        made = {one.metric: one for one in result.series if one.cell == cell and one.contender == "made"}
        for name, one in made.items():
            if name.endswith("_ks"):
                out.append(at_most(f"{cell}: {name.removesuffix('_ks')}, KS to the cited", one.median, KS_AT_MOST))
            elif name.removesuffix("_ks_to_file") in GAPS:
                short = name.removesuffix("_ks_to_file")
                out.append(at_most(f"{cell}: {short}, KS to the file", one.median, KS_AT_MOST))
            elif name in families()[cell].figures:
                cited = result.median(cell, "cited", name)
                if name.startswith("lru_"):
                    off = 100 * abs(one.median - cited)
                    out.append(at_most(f"{cell}: {name}, points off", off, LRU_POINTS))
                else:
                    out.append(at_most(f"{cell}: {name}, relative error", error(one, cited), WITHIN))
        curve = families()[cell].curves.get("lru")
        if curve is not None:
            off = max(100 * abs(made[f"{CURVE}{size}"].median - hit) for size, hit in curve.value)
            out.append(at_most(f"{cell}: LRU curve, points off at worst", off, LRU_POINTS))
    return out


def error(one: Series, cited: float) -> float:
    """Relative error of the median; where that is too large, 0 if the cited figure is inside the bootstrap interval."""
    relative = abs(one.median / cited - 1)
    return 0.0 if relative > WITHIN and one.low <= cited <= one.high else relative
