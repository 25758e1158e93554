"""What numerics="invariant" costs: the same engine, prompts and weights in both modes, decode and prefill.

On CPU both run the same kernels, whose rows stand alone anyway: the ratio should be one, and a check holds it there.
"""

from __future__ import annotations

from typing import Any

from bench.offline import Tenon
from tenon.base.result import Check, ContenderEntry, Result, at_least
from tenon.bench.claim import Cell

TITLE = "the cost of invariant numerics against fast ones, bf16, random weights"
BASELINE = "fast"
LIMITS = False

CONTENDERS = {
    "invariant": ContenderEntry("bench.numerics:Mode", {"numerics": "invariant"}),
    "fast": ContenderEntry("bench.numerics:Mode", {"numerics": "fast"}),
}


class Mode(Tenon):
    """The offline bench's engine in one of the two modes; rates only."""

    def sample(self) -> dict[str, float]:
        return {name: value for name, value in super().sample().items() if name.endswith("_per_s")}


def cells(quick: bool) -> list[Cell]:
    def cell(shape: str, batch: int, new: int, sample_s: float) -> Cell:
        params: dict[str, Any] = {
            "shape": shape, "dtype": "bfloat16", "context": 256, "batch": batch, "new": new,
            "shared": False, "bookkeeping": False,
        }  # fmt: skip
        return Cell(f"{shape} 256 x{batch}", params, 3 if quick else 9, 1, (), sample_s, 300)

    embedded = [cell("embedded", 1, 768, 0.8), cell("embedded", 16, 192, 1.2)]
    return embedded if quick else [*embedded, cell("smollm2-135m", 1, 128, 1.5)]


def checks(result: Result) -> list[Check]:
    """The promise costs nothing, up to what two runs of the same code may differ by."""
    return [
        at_least(
            f"{name}: invariant over fast, decode", result.ratio(name, "invariant", "fast", "decode_tokens_per_s"), 0.95
        )
        for name in result.cells
    ]
