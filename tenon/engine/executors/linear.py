"""Linear layers for serving on CPU: weights reordered once into panels, multiplied by the C kernel.

The kernel computes each output in one order whatever it is computed beside, so a row's bits depend on the row alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenon.base.errors import ResourceError
from tenon.engine.executors.native import Native


class PackedLinear:
    """y = x W^T + b. ``memory`` takes the packed weight: at least ``native.packed_size(N, K)`` elements."""

    def __init__(self, native: Native, weight_NK: Tensor, bias_N: Tensor | None, memory: Tensor) -> None:
        self.N, self.K = weight_NK.shape
        weight_NK = weight_NK.detach().contiguous()
        self.memory, self.bias = memory, None if bias_N is None else bias_N.detach().contiguous()
        native.pack[weight_NK.dtype](weight_NK.data_ptr(), self.N, self.K, memory.data_ptr())
        self._product = native.linear[weight_NK.dtype]

    def __call__(self, x_TK: Tensor) -> Tensor:
        x_TK = x_TK.contiguous()
        T = x_TK.shape[0]
        out_TN = torch.empty((T, self.N), dtype=x_TK.dtype)
        bias = None if self.bias is None else self.bias.data_ptr()
        if self._product(x_TK.data_ptr(), self.memory.data_ptr(), bias, T, self.K, self.N, out_TN.data_ptr()):
            raise ResourceError("no memory for a linear layer's scratch")
        return out_TN
