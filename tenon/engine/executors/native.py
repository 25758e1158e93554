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
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenon.base.errors import ResourceError
from tenon.compiler import toolchain
from tenon.engine.sampling import UNKNOWN, WANTED
from tenon.engine.step import Step, guesses

SOURCES = ("attend.c", "linear.c", "rows.c", "sample.c", "stack.c")
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
Entry = dict[torch.dtype, Callable[..., int]]
Draws = NDArray[np.void]
DRAW: Final = np.dtype(
    [
        ("seed", np.uint64), ("temperature", np.float32), ("sample", np.uint32), ("position", np.uint32),
        ("guess_of", np.int32), ("guess", np.int32), ("begins", np.int32),
    ]
)  # fmt: skip
"""Mirror of ``draw`` in sample.c; keep the fields in its order."""


def draws(step: Step, n: int) -> Draws:
    """How the first ``n`` outputs are sampled."""
    params, index = step.params, step.params_index[:n]
    out = np.empty(n, DRAW)
    for name in ("seed", "temperature", "sample"):
        out[name] = getattr(params, name)[index]
    out["position"] = step.out_position[:n]
    out["guess_of"], out["guess"] = -1, step.tok[step.out_row[:n]]
    if len(guessed := guesses(step)):
        out["guess_of"][: len(guessed)] = guessed
    return out


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
        self._sample: Entry = {}
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
                (self._sample, "sample", (P, I, I, P, P), None),
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

    def sample(self, logits_RV: Tensor, draws: Draws, wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(R,) tokens of the ``wanted`` outputs by the one randomness rule without filters, REFUSED where no logit is
        finite or one is NaN, WRONG where the output's own token was a wrong guess; UNKNOWN of the others."""
        R, V = logits_RV.shape
        out = np.where(wanted, WANTED, UNKNOWN)
        self._sample[logits_RV.dtype](logits_RV.data_ptr(), R, V, draws.ctypes.data, out.ctypes.data)
        return out

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
