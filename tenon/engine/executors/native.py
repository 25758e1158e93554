"""The C kernels of the torch executor on CPU: whole layers, their parts, sampling noise.

Tensors go in as pointers; layouts are in ``compiler/csrc/attend_body.h``. Without a C compiler ``load`` raises
and the executor goes on in torch alone, saying so once.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenon.base.errors import ResourceError
from tenon.compiler import toolchain

SOURCES = ("attend.c", "linear.c", "rows.c", "sample.c", "stack.c")
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
Entry = dict[torch.dtype, Callable[..., int]]


class AttendStep(ctypes.Structure):
    """Mirror of ``attend_step`` in attend.h; keep the fields in its order."""

    _fields_ = [
        *((name, c_int64) for name in ("n_rows", "n_items", "n_heads", "n_kv_heads", "head_dim")),
        *((name, c_int64) for name in ("n_blocks", "block_tokens", "window")),
        *((name, c_void_p) for name in ("pos", "base", "parent", "slot", "table")),
        *((name, c_void_p) for name in ("item_row", "item_n", "item_table")),
    ]  # fmt: skip


class Native:
    """Typed entry points of the shared object. The parts of ``stack`` are entries of their own, to be judged apart."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        P, I, F = c_void_p, c_int64, c_float
        self.attend: Entry = {}
        self.move: Entry = {}
        self.norm: Entry = {}
        self.add_norm: Entry = {}
        self.heads: Entry = {}
        self.swiglu: Entry = {}
        self.linear: Entry = {}
        self.pack: Entry = {}
        self.stack: Entry = {}
        self.stack_scratch: Entry = {}
        self._argmax: Entry = {}
        for dtype, suffix in SUFFIX.items():
            for table, name, arguments, result in (
                (self.attend, "attend", (P, F, P, P, P, P, P, P), c_int32),
                (self.move, "move", (P, I, P, I, P, P), c_int32),
                (self.norm, "norm", (P, P, F, I, I, P), None),
                (self.add_norm, "add_norm", (P, P, P, F, I, I, P), None),
                (self.heads, "heads", (P, P, P, F, P, P, I, I, I, I, P, P, P), None),
                (self.swiglu, "swiglu", (P, I, I, P), None),
                (self.linear, "linear", (P, P, P, I, I, I, P), c_int32),
                (self.pack, "pack", (P, I, I, P), None),
                (self.stack, "stack", (P, P, I, P, P, P, P, P), c_int32),
                (self.stack_scratch, "stack_scratch", (P, I), I),
                (self._argmax, "argmax", (P, I, I, P), None),
            ):
                function = lib[f"tenon_{name}_{suffix}"]
                function.argtypes, function.restype = arguments, result
                table[dtype] = function
        lanes, bf16_group = c_int64(), c_int64()
        lib["tenon_layout"](ctypes.byref(lanes), ctypes.byref(bf16_group))
        self.lanes = lanes.value
        """Outputs of a linear layer that lie side by side: as many as a register of this processor holds."""
        self.group = {torch.float32: 1, torch.bfloat16: bf16_group.value}
        """Neighbouring elements that are multiplied as one, and so lie together in packed weights and caches."""
        self._noise = lib["tenon_noise"]
        self._noise.argtypes, self._noise.restype = (c_uint64, c_uint32, c_uint32, P, I, P), None
        self._choose = lib["tenon_choose"]
        self._choose.argtypes, self._choose.restype = (P, I, F, c_uint64, c_uint32, c_uint32), c_int64
        self._best = lib["tenon_best"]
        self._best.argtypes, self._best.restype = (P, I, I, F, c_uint64, c_uint32, c_uint32, P, P), c_int64

    def packed_size(self, n: int, k: int) -> int:
        """Elements of a packed weight [n, k]."""
        return math.ceil(n / self.lanes) * self.lanes * k

    def noise(self, seed: int, sample: int, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """:func:`tenon.base.philox.noise`, faster."""
        tokens = np.ascontiguousarray(tokens, np.int64)
        out = np.empty(len(tokens), np.float64)
        self._noise(seed, sample, position, tokens.ctypes.data, len(tokens), out.ctypes.data)
        return out

    def argmax(self, logits_RV: Tensor) -> NDArray[np.int64]:
        """(R,) best ids; -1 where a row has no finite value or a NaN."""
        R, V = logits_RV.shape
        out = np.empty(R, np.int64)
        self._argmax[logits_RV.dtype](logits_RV.data_ptr(), R, V, out.ctypes.data)
        return out

    def choose(self, logits_V: NDArray[np.float32], temperature: float, seed: int, sample: int, position: int) -> int:
        """Gumbel-max over all tokens, for requests without filters. Raises ``ValueError`` if no logit is finite."""
        token = self._choose(logits_V.ctypes.data, len(logits_V), temperature, seed, sample, position)
        if token < 0:
            raise ValueError("no token has a finite logit")
        return int(token)

    def best(
        self, logits_V: NDArray[np.float32], k: int, temperature: float, seed: int, sample: int, position: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """:func:`tenon.engine.sampling.best` without filters, faster, for at most 64."""
        ids, scores = np.empty(k, np.int32), np.empty(k, np.float64)
        n = self._best(
            logits_V.ctypes.data, len(logits_V), k, temperature, seed, sample, position, ids.ctypes.data,
            scores.ctypes.data,
        )  # fmt: skip
        return ids[:n], scores[:n]


@cache
def load() -> Native:
    """Compile (once per machine) and load. Raises ``ResourceError`` when there is no compiler, or it fails."""
    try:
        return Native(toolchain.load(toolchain.build("engine", [toolchain.CSRC / s for s in SOURCES])))
    except (AttributeError, OSError) as error:
        raise ResourceError(f"the engine's kernels could not be loaded: {error}") from error
