"""Linear layers for serving on CPU: weights reordered once for oneDNN, and a form whose rows stand alone.

Both stand in for a decoder's ``torch.nn.Linear`` modules; the original weights are let go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE_ROWS = 16
linear_pointwise = torch.ops.mkldnn._linear_pointwise.default


Product = Callable[[Tensor], Tensor]


class PackedLinear:
    """y = x W^T + b with W in oneDNN's blocked order. Inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self._bias = linear.bias

    def __call__(self, x_TK: Tensor) -> Tensor:
        return cast(Tensor, linear_pointwise(x_TK, self._packed, self._bias, "none", [], ""))


class TiledLinear:
    """Rows in tiles of 16, padded: each product has one shape, so a row's bits do not depend on its company.

    Costs up to 16 times the arithmetic of a single row; see the measured cost in the documentation.
    """

    def __init__(self, inner: Product) -> None:
        self._inner = inner

    def __call__(self, x_TK: Tensor) -> Tensor:
        return in_tiles(self._inner, x_TK)


def in_tiles(product: Product, x_TK: Tensor) -> Tensor:
    """``product`` over ``x`` in tiles of exactly ``TILE_ROWS`` rows, the last one padded with zeros."""
    T = x_TK.shape[0]
    padded = F.pad(x_TK, (0, 0, 0, -T % TILE_ROWS))
    return torch.cat([product(tile) for tile in padded.split(TILE_ROWS)])[:T]


def prepare(model: nn.Module, *, pack: bool, tiled: bool, on_layer: Callable[[int, int], None]) -> None:
    """Replace every ``Linear`` of ``model``. ``on_layer(done, total)`` hears about progress.

    What is put in its place is a plain callable, not a module: at batch 1 a module's call costs as much as a small
    layer's arithmetic.
    """
    found = [
        (parent, name) for parent in model.modules() for name, m in parent.named_children() if type(m) is nn.Linear
    ]
    for i, (parent, name) in enumerate(found):
        linear: Product = getattr(parent, name)
        if pack:
            linear = PackedLinear(cast(nn.Linear, linear))
        if tiled:
            linear = TiledLinear(linear)
        if not isinstance(linear, nn.Module):
            delattr(parent, name)
        setattr(parent, name, linear)
        on_layer(i + 1, len(found))
