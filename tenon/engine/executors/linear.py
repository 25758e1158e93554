"""Linear layers for serving on CPU: weights reordered once for oneDNN, and a form whose rows stand alone.

Both replace ``torch.nn.Linear`` modules of a decoder in place; the original weights are let go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE_ROWS = 16
linear_pointwise = torch.ops.mkldnn._linear_pointwise.default


class PackedLinear(nn.Module):
    """y = x W^T + b with W in oneDNN's blocked order. Inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def forward(self, x_TK: Tensor) -> Tensor:
        return cast(Tensor, linear_pointwise(x_TK, self.packed, self.bias, "none", [], ""))


class TiledLinear(nn.Module):
    """Rows in tiles of 16, padded: each product has one shape, so a row's bits do not depend on its company.

    Costs up to 16 times the arithmetic of a single row; see the measured cost in the documentation.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_TK: Tensor) -> Tensor:
        return in_tiles(self.inner, x_TK)


def in_tiles(product: Callable[[Tensor], Tensor], x_TK: Tensor) -> Tensor:
    """``product`` over ``x`` in tiles of exactly ``TILE_ROWS`` rows, the last one padded with zeros."""
    T = x_TK.shape[0]
    padded = F.pad(x_TK, (0, 0, 0, -T % TILE_ROWS))
    return torch.cat([product(tile) for tile in padded.split(TILE_ROWS)])[:T]


def prepare(model: nn.Module, *, pack: bool, tiled: bool, on_layer: Callable[[int, int], None]) -> None:
    """Replace every ``Linear`` of ``model``. ``on_layer(done, total)`` hears about progress."""
    found = [
        (parent, name) for parent in model.modules() for name, m in parent.named_children() if isinstance(m, nn.Linear)
    ]
    for i, (parent, name) in enumerate(found):
        module: nn.Module = getattr(parent, name)
        if pack:
            module = PackedLinear(cast(nn.Linear, module))
        setattr(parent, name, TiledLinear(module) if tiled else module)
        on_layer(i + 1, len(found))
