"""What a block of keys and values costs to compute once more: the marginal cost of its rows in a prefill.

With causal counting that is additive over tokens and does not depend on which other blocks are resident: exactly linear
in the position for full attention (AsymCache, arXiv 2606.02964, Eq. 7, without its approximation), flat beyond a
window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tenon.cost.device import Device
from tenon.cost.price import seconds
from tenon.cost.work import prefill_shape
from tenon.models.spec import CostShape, ModelSpec, step_work

CHUNK_ROWS: Final = 1024
"""A hole is priced as its share of so many rows, computed together: that is how holes are filled."""

CostOf = Callable[[int], float]
"""Of a block by the position of its first token."""


def alike(position: int) -> float:
    """Every block costs the same."""
    return 1.0


def recompute_cost(
    model: ModelSpec | CostShape,
    block_tokens: int,
    dtype: str | None = None,
    device: Device | None = None,
    n_devices: int = 1,
) -> CostOf:
    """Seconds on ``device``, or FLOPs where none is known: policies only compare. Raises as ``seconds`` does."""
    windows = tuple(model.cost.layers_by_window())
    known: dict[int, float] = {}

    def price(position: int) -> float:
        shape = prefill_shape(position, CHUNK_ROWS if device else block_tokens, windows, outputs=0)
        work = step_work(model, shape, dtype, tensor_parallel=n_devices)
        if device is None:
            return work.flops
        return seconds(work, device, host=False) * block_tokens / CHUNK_ROWS

    def cost_of(position: int) -> float:
        cost = known.get(position)
        if cost is None:
            cost = known[position] = price(position)
        return cost

    return cost_of
