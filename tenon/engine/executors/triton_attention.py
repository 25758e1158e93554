"""Multi-segment paged attention on CUDA (AsymCache §4.1, arXiv 2606.02964): one launch for all spans of a step.

A span is a run of positions of one sequence: a decode, a prefill chunk, an evicted hole being rebuilt; a sequence may
have several in one step. ``begin`` cuts them into tiles, each with the positions that it reads, in numpy and once for
all layers; ``attend`` writes the step's K and V (one launch) and then attends (one launch, one more where a tile's
positions were split). Spans with tree rows, or whose positions do not follow one another, are gathered as in
``TorchAttention``.

The kernels are Triton's (``triton_kernels.py``). On CPU tensors they run in Triton's interpreter, for tests:
``TRITON_INTERPRET=1`` must be in the environment before this module is imported.

Shapes: T rows, H query heads, G key/value heads, R = H / G, D head size, S spans; lanes are rows x R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenon.base.errors import IntegrityError
from tenon.engine.executors import triton_kernels as kernels
from tenon.engine.executors.attention import TorchAttention
from tenon.engine.step import I32, GroupStep, Step
from tenon.models.spec import KVGroup, ModelSpec

I64 = NDArray[np.int64]
TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
PART_TOKENS = 256
"""Positions of a part are at least these: below, joining costs as much as it saves."""
WRITE_ELEMENTS = 1024
JOIN_LANES = 16
FIELDS = kernels.FIELDS.value
ALIGN = 4
"""Arrays in the plan's one buffer begin at multiples of 16 bytes: Triton compiles once more for what does not."""


def uncovered(spec: ModelSpec, dtype: torch.dtype) -> str | None:
    """Why the kernels do not cover this model, or None."""
    if dtype not in TYPES:
        return f"type {dtype}"
    if spec.head_dim > MAX_HEAD_DIM:
        return f"head size {spec.head_dim}, which is more than {MAX_HEAD_DIM}"
    return None


@dataclass(frozen=True)
class Tiling:
    """Lanes and positions of a tile: K and V twice beside the queries fit 99 KiB of shared memory, and what a program
    keeps fits its registers (``tests/engine/triton_compiled.py`` compiles for two generations and looks)."""

    lanes: int
    positions: int

    @staticmethod
    def of(width: int, dtype: torch.dtype) -> Tiling:
        """``width``: the padded head size. fp32 is multiplied as it is, without tensor cores."""
        if dtype == torch.float32:
            return Tiling(32, 32 if width <= 64 else 16)
        return Tiling(128, 64) if width <= 128 else Tiling(64, 32)


def warps(lanes: int, width: int) -> int:
    """Warps of a program."""
    return 8 if lanes * width >= 8192 else 4


@dataclass
class Plan:
    """One group's arrays of a step on the device, and how many tiles, parts and joins they hold."""

    slot: Tensor
    table: Tensor
    items: Tensor
    joins: Tensor
    n_items: int
    n_parts: int
    n_joins: int


class TritonAttention(TorchAttention):
    """The kernels over a cache [slot, G, D].

    ``programs``: where a step has fewer tiles than these, their positions are split over several programs; None is
    twice the device's multiprocessors, 0 never splits. ``fixed`` takes one height of tiles and never splits, so that a
    row's attention does not depend on what else is in the step; otherwise both follow the step.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        programs: int | None = None,
        fixed: bool = False,
    ) -> None:
        super().__init__(spec, dtype, device)
        if (why := uncovered(spec, dtype)) is not None:
            raise IntegrityError(f"the Triton kernels do not cover {why}")
        self._ratio = spec.n_heads // spec.n_kv_heads
        self._width = max(16, 1 << (spec.head_dim - 1).bit_length())
        self._tiling, self._fixed = Tiling.of(self._width, dtype), fixed
        if programs is None:
            cuda = device.type == "cuda"
            programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count if cuda else 0
        self._programs = 0 if fixed else programs
        self._precision = "ieee" if dtype == torch.float32 else "tf32"
        # The interpreter multiplies bf16's bits as integers; a product of two bf16 is exact in fp32.
        self._wide = device.type == "cpu" and dtype == torch.bfloat16
        self._parts = torch.empty(0, dtype=torch.float32, device=device)

    def compile(self) -> None:
        """Compile and run the smallest kernel, so that a machine that cannot is known before it serves.

        Raises ``RuntimeError``, ``OSError`` or ``subprocess.SubprocessError``, as Triton does without a C compiler.
        """
        shape = (1, self._spec.n_kv_heads, self._spec.head_dim)
        k, cache = self._like.new_zeros(shape), self._like.new_zeros(shape)
        slot = torch.zeros(1, dtype=torch.int32, device=self._like.device)
        with torch.cuda.device_of(k):
            self._write(k, k, cache, cache, slot)

    def allocate(self, groups: tuple[KVGroup, ...], n_blocks: int) -> None:
        """Zeroed cache memory. Raises ``ResourceError``."""
        super().allocate(groups, n_blocks)
        self._windows = [group.window or 0 for group in groups]

    def begin(self, step: Step) -> None:
        """Take over a step's arrays and carry out its moves; valid until the next ``begin``."""
        chained, others = split_spans(step)
        self._gather(step, others)
        n = np.diff(step.q_start)[chained] * self._ratio
        longest = int(n.max(initial=1))
        most = self._tiling.lanes
        self._lanes = most if self._fixed else min(most, max(16, 1 << (longest - 1).bit_length()))
        windows = zip(step.groups, self._windows, strict=True)
        self._plans = [self._plan(step, chained, group, window) for group, window in windows]
        size = max((plan.n_parts for plan in self._plans), default=0) * self._spec.n_kv_heads * self._lanes
        if len(self._parts) < size * (self._width + 2):
            self._parts = torch.empty(size * (self._width + 2), dtype=torch.float32, device=self._like.device)
        self._part_rows = size
        self._move(step)

    def _plan(self, step: Step, spans: I64, group: GroupStep, window: int) -> Plan:
        """Tiles of all spans, the longest first so that none is left over at the end, and their parts."""
        items = cut(step, spans, group, window, self._ratio, self._lanes, self._tiling.positions)
        joins = np.zeros((0, FIELDS), np.int32)
        if len(items) * self._spec.n_kv_heads < self._programs:
            items, joins = split(items, self._spec.n_kv_heads, self._programs, self._tiling.positions)
        n_parts = int(items[:, 7].max(initial=-1)) + 1
        arrays = [group.slot, group.table, items.ravel(), joins.ravel()]
        padded = [-(-len(a) // ALIGN) * ALIGN for a in arrays]
        buffer = np.zeros(sum(padded), np.int32)
        starts = np.cumsum([0, *padded]).tolist()
        for array, start in zip(arrays, starts, strict=False):
            buffer[start : start + len(array)] = array
        on_device = torch.from_numpy(buffer).to(self._like.device)
        slot, table, at_items, at_joins = (
            on_device[start : start + len(array)] for array, start in zip(arrays, starts, strict=False)
        )
        return Plan(slot, table, at_items, at_joins, len(items), n_parts, len(joins))

    def _write(self, k_TGD: Tensor, v_TGD: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor) -> None:
        T, G, D = k_TGD.shape
        n = T * G * D
        kernels.write[(math.ceil(n / WRITE_ELEMENTS),)](
            k_TGD, v_TGD, k_cache, v_cache, slot, n, k_TGD.stride(0), k_TGD.stride(1), v_TGD.stride(0),
            v_TGD.stride(1), G, D, WRITE_ELEMENTS,
        )  # fmt: skip

    def attend(self, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layer: int, scale: float, window: int) -> Tensor:
        """Write the layer's K and V, then attend by the step's rules. Returns (T, H, D)."""
        cache = self._layers[layer]
        if window != self._windows[cache.group]:
            raise IntegrityError(f"layer {layer} has a window of {window}, its group {self._windows[cache.group]}")
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THD, k_TGD, v_TGD))
        plan, (T, H, D), G = self._plans[cache.group], q.shape, self._spec.n_kv_heads
        out_THD = torch.empty((T, H, D), dtype=q.dtype, device=q.device)
        if not T:
            return out_THD
        with torch.cuda.device_of(q):  # Triton launches on the current device
            self._write(k, v, cache.k, cache.v, plan.slot)
            sums, stats = self._parts[: self._part_rows * self._width], self._parts[self._part_rows * self._width :]
            if plan.n_items:
                kernels.attend[plan.n_items, G](
                    q, cache.k, cache.v, out_THD, sums, stats, plan.items, plan.table, scale * math.log2(math.e),
                    q.stride(0), q.stride(1), out_THD.stride(0), out_THD.stride(1), G, self._ratio, D, self._width,
                    self._lanes, self._tiling.positions, self._block_tokens, window, plan.n_parts > 0, self._wide,
                    self._precision, num_warps=warps(self._lanes, self._width), num_stages=2,
                )  # fmt: skip
            if plan.n_joins:
                kernels.join[plan.n_joins, G, self._lanes // JOIN_LANES](
                    out_THD, sums, stats, plan.joins, out_THD.stride(0), out_THD.stride(1), G, self._ratio, D,
                    self._width, self._lanes, JOIN_LANES,
                )  # fmt: skip
        self._attend_gathered(q_THD, out_THD, cache, scale, window)
        return out_THD


def split_spans(step: Step) -> tuple[I64, I64]:
    """Spans of chain rows at positions that follow one another, and the other spans that have rows."""
    n = np.diff(step.q_start)
    odd = step.parent >= 0
    starts = np.zeros(step.n_rows, bool)
    starts[step.q_start[:-1][n > 0]] = True
    odd[1:] |= (np.diff(step.pos) != 1) & ~starts[1:]
    n_odd = np.diff(np.concatenate([[0], np.cumsum(odd)])[step.q_start])
    return np.flatnonzero((n > 0) & (n_odd == 0)), np.flatnonzero(n_odd > 0)


def cut(step: Step, spans: I64, group: GroupStep, window: int, ratio: int, lanes: int, positions: int) -> I32:
    """(n, FIELDS) the tiles of ``spans``, the longest first. A tile reads from its lowest row's first visible position,
    down to a multiple of ``positions``, to its highest row's own."""
    n_lanes = np.diff(step.q_start)[spans].astype(np.int64) * ratio
    n_tiles = -(-n_lanes // lanes)
    which = np.repeat(np.arange(len(spans)), n_tiles)
    first = (np.arange(len(which)) - np.repeat(np.cumsum(n_tiles) - n_tiles, n_tiles)) * lanes
    row = step.q_start[spans][which]
    pos = step.pos[row].astype(np.int64)
    low = pos + first // ratio
    end = pos + (np.minimum(first + lanes, n_lanes[which]) - 1) // ratio + 1
    begin = np.maximum(0, low - window + 1) // positions * positions if window else np.zeros_like(low)
    table = group.table_start[spans][which]
    items = np.stack([row, n_lanes[which], first, table, pos, begin, end, np.full_like(row, -1)], 1)
    return items[np.argsort(begin - end, kind="stable")].astype(np.int32)


def split(items: I32, n_kv_heads: int, programs: int, positions: int) -> tuple[I32, I32]:
    """Items whose positions are shared out so that about ``programs`` run, and the (n, FIELDS) tiles to join."""
    n = -(-(items[:, 6] - items[:, 5]).astype(np.int64) // positions)
    share = max(PART_TOKENS // positions, -(-int(n.sum()) * n_kv_heads // programs))
    n_parts = -(-n // share)
    made = items[np.repeat(np.arange(len(items)), n_parts)]
    index = np.arange(len(made)) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
    made[:, 5] += (index * share * positions).astype(np.int32)
    made[:, 6] = np.minimum(made[:, 6], made[:, 5] + share * positions)
    shared = np.repeat(n_parts > 1, n_parts)
    made[shared, 7] = np.arange(shared.sum())
    several = n_parts > 1
    joins = np.zeros((int(several.sum()), FIELDS), np.int32)
    joins[:, :3] = items[several, :3]
    joins[:, 4] = n_parts[several]
    joins[:, 3] = np.cumsum(joins[:, 4]) - joins[:, 4]
    return made, joins
