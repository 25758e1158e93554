"""Paged attention behind one face: ``allocate`` makes the cache, ``begin`` reads a step's arrays once.

``TorchAttention`` runs anywhere torch does, by gathering. ``NativeAttention`` (CPU) plans for the C kernel, which reads
each KV byte in place, once per span.

Shapes: T rows, H query heads, G key/value heads, D head size, B tokens per block, S spans, L context length.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_void_p
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tenon.base.errors import ConfigError, IntegrityError, ResourceError
from tenon.engine.executors.memory import zeros
from tenon.engine.executors.native import AttendStep, Native
from tenon.engine.step import I32, GroupStep, Step
from tenon.models.spec import KVGroup, ModelSpec

MAX_DEPTH = 4096
"""Of a tree below its root: the C kernel keeps paths of this length for each row of an item."""
ITEM_ROWS = 16
"""Rows of one span that the C kernel takes through a tile of keys together."""
FEW_ROWS, FEW_ITEM_ROWS = 64, 4
"""In a step of so few rows an item has fewer, for there are more items than cores to be had."""


def roots(step: Step) -> I32:
    """(T,) the position up to which a row reads through its block table: its own, or its tree root's."""
    base = step.pos.copy()
    in_tree = np.flatnonzero(step.parent >= 0)
    if not len(in_tree):
        return base
    parent = step.parent[in_tree]
    wrong = (parent >= in_tree) | (step.pos[in_tree] != step.pos[parent] + 1)
    if wrong.any():
        raise IntegrityError(f"tree row {in_tree[wrong][0]} must follow its parent, one position further")
    # Mostly a tree stands right behind its root: the last chain row before it, if all parents have the same one.
    up = np.maximum.accumulate(np.where(step.parent < 0, np.arange(step.n_rows), 0))
    if not np.array_equal(up[in_tree], up[parent]):
        up = np.where(step.parent < 0, np.arange(step.n_rows), step.parent)
        while not np.array_equal(further := up[up], up):
            up = further
    base[in_tree] = step.pos[up[in_tree]]
    if step.n_rows > MAX_DEPTH and (deepest := int((step.pos - base).max())) > MAX_DEPTH:
        raise IntegrityError(f"a tree is {deepest} rows deep; the kernel takes {MAX_DEPTH}")
    return base


def cut(step: Step, base: I32) -> tuple[I32, I32, I32]:
    """The step in items for the C kernel: span, first row and number of rows of each. An item is a run of chain rows
    of one span, or of rows of one tree: those whose ``base`` is the same, the root that stands before them included."""
    most = FEW_ITEM_ROWS if step.n_rows <= FEW_ROWS else ITEM_ROWS
    chains, n_rows = bool((step.parent < 0).all()), np.diff(step.q_start)
    if ((n_rows > 0) & (n_rows <= most)).all():
        starts = step.q_start[:-1]
        if chains or np.array_equal(base, np.repeat(base[starts], n_rows)):  # each span is one item
            return np.arange(len(starts), dtype=np.int32), starts, n_rows
    if chains:
        n_items = -(-n_rows // most)
        span = np.repeat(np.arange(len(n_items), dtype=np.int32), n_items)
        first = np.repeat(np.cumsum(n_items) - n_items, n_items)
        row = step.q_start[span] + (np.arange(len(span), dtype=np.int32) - first) * most
        return span, row.astype(np.int32), np.minimum(step.q_start[span + 1] - row, most).astype(np.int32)
    # An item begins where a span does, where a tree does or ends, and every few rows of a run.
    below = step.parent >= 0
    same = base[1:] == base[:-1]
    in_tree = below.copy()
    in_tree[:-1] |= below[1:] & same
    begins = np.ones(step.n_rows, bool)
    begins[1:] = np.where(in_tree[1:], ~(in_tree[:-1] & same), in_tree[:-1])
    begins[step.q_start[:-1]] = True
    at = np.flatnonzero(begins)
    length = np.diff(np.append(at, step.n_rows))
    n_items = -(-length // most)
    first = np.repeat(np.cumsum(n_items) - n_items, n_items)
    offset = (np.arange(len(first)) - first) * most
    row = np.repeat(at, n_items) + offset
    n = np.minimum(np.repeat(length, n_items) - offset, most)
    span = np.searchsorted(step.q_start, row, side="right") - 1
    return span.astype(np.int32), row.astype(np.int32), n.astype(np.int32)


@dataclass
class Cache:
    """K and V of one layer, and which group's arrays say where."""

    k: Tensor
    v: Tensor
    group: int


def _allocate(
    groups: tuple[KVGroup, ...], shapes: tuple[tuple[int, ...], tuple[int, ...]], like: Tensor
) -> list[Cache]:
    """Every layer's cache, out of one piece of memory."""
    owner = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    sizes = [math.prod(shape) for shape in shapes]
    memory = zeros((len(owner), sum(sizes)), like, "the KV cache")
    parts = [[part.view(shape) for part, shape in zip(row.split(sizes), shapes, strict=True)] for row in memory]
    return [Cache(k, v, owner[layer]) for layer, (k, v) in enumerate(parts)]


class TorchAttention:
    """Gathers each span's context and calls scaled_dot_product_attention: one call for all single-row spans, one
    for each longer span. K and V lie as [slot, G, D]."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._spec, self._like = spec, torch.empty(0, dtype=dtype, device=device)

    def allocate(self, groups: tuple[KVGroup, ...], n_blocks: int) -> None:
        """Zeroed cache memory. Raises ``ResourceError``."""
        self._block_tokens = groups[0].block_tokens
        shape = (n_blocks * self._block_tokens, self._spec.n_kv_heads, self._spec.head_dim)
        self._layers = _allocate(groups, (shape, shape), self._like)

    def begin(self, step: Step) -> None:
        """Take over a step's arrays and carry out its moves; valid until the next ``begin``."""
        device = self._like.device
        self._slot = [torch.from_numpy(g.slot.astype(np.int64)).to(device) for g in step.groups]
        self._gather(step, np.arange(len(step.seq)))
        self._move(step)

    def _gather(self, step: Step, spans: np.ndarray) -> None:
        """What these spans read and see."""
        device = self._like.device
        self._gathered: list[tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]] = []
        if not len(spans):
            return
        base = roots(step)
        n_rows = np.diff(step.q_start)[spans]
        ones = spans[n_rows == 1]
        batches = [ones] if len(ones) else []
        batches += [np.array([s]) for s in spans[n_rows > 1]]
        for spans in batches:
            rows = np.stack([np.arange(step.q_start[s], step.q_start[s + 1]) for s in spans])
            per_group = [self._reads(step, group, spans, rows, base) for group in step.groups]
            slots = [torch.from_numpy(r[0]).to(device) for r in per_group]
            seen_pos = torch.from_numpy(per_group[0][1]).to(device)
            visible = torch.from_numpy(per_group[0][2]).to(device)
            row_pos = torch.from_numpy(step.pos[rows].astype(np.int64)).to(device)
            self._gathered.append((torch.from_numpy(rows).to(device), slots, seen_pos, visible, row_pos))

    def _move(self, step: Step) -> None:
        """Copy what a step copies before anything is written."""
        device = self._like.device
        for layer in self._layers:
            moves = step.groups[layer.group].moves
            if len(moves):
                source, target = (torch.from_numpy(moves[:, i].astype(np.int64)).to(device) for i in (0, 1))
                layer.k[target], layer.v[target] = layer.k[source], layer.v[source]

    def _reads(
        self, step: Step, group: GroupStep, spans: np.ndarray, rows: np.ndarray, base: I32
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slots (n, L) that the spans read, their positions (n, L), and who sees what before windows (n, rows, L).

        Columns are the table's positions up to the span's last root, then the span's own tree rows.
        """
        size = self._block_tokens
        longest = int(base[rows].max()) + 1
        tree = [np.array([r for r in row if step.parent[r] >= 0], np.int64) for row in rows]
        width = longest + max(len(t) for t in tree)
        slots = np.zeros((len(spans), width), np.int64)
        seen_pos = np.zeros((len(spans), width), np.int64)
        visible = np.zeros((len(spans), rows.shape[1], width), bool)
        for i, s in enumerate(spans):
            table = group.table[group.table_start[s] : group.table_start[s + 1]].astype(np.int64)
            p = np.arange(min(longest, len(table) * size))
            slots[i, : len(p)] = table[p // size] * size + p % size
            seen_pos[i, :longest] = np.arange(longest)
            visible[i, :, :longest] = np.arange(longest) <= base[rows[i]][:, None]
            where = {int(r): longest + j for j, r in enumerate(tree[i])}
            for r, column in where.items():
                slots[i, column], seen_pos[i, column] = group.slot[r], step.pos[r]
                up = r
                while up in where:
                    visible[i, r - rows[i, 0], where[up]] = True
                    up = int(step.parent[up])
        # What no row of a span sees is gathered all the same, and times 0 a NaN that somebody left there stays one.
        return np.where(visible.any(1), slots, slots[:, :1]), seen_pos, visible

    def attend(self, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layer: int, scale: float, window: int) -> Tensor:
        """Write the layer's K and V, then attend by the step's rules. Returns (T, H, D)."""
        cache = self._layers[layer]
        slot = self._slot[cache.group]
        cache.k[slot], cache.v[slot] = k_TGD, v_TGD
        out_THD = torch.empty_like(q_THD)
        self._attend_gathered(q_THD, out_THD, cache, scale, window)
        return out_THD

    def _attend_gathered(self, q_THD: Tensor, out_THD: Tensor, cache: Cache, scale: float, window: int) -> None:
        """Fill in the gathered spans' rows; K and V are written."""
        for rows, slots, seen_pos, visible, row_pos in self._gathered:
            mask = visible
            if window:
                mask = mask & (seen_pos[:, None, :] > row_pos[:, :, None] - window)
            q, k, v = q_THD[rows].transpose(1, 2), cache.k[slots[cache.group]], cache.v[slots[cache.group]]
            o = F.scaled_dot_product_attention(
                q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None], scale=scale, enable_gqa=True
            )
            out_THD[rows] = o.transpose(1, 2)


class NativeAttention:
    """What the C kernel reads: caches K [G, block, D / P, B, P] and V [G, block, B / P, D, P], P elements being
    multiplied as one (``native.group``), and a plan of the step for each group."""

    layers: list[Cache]
    plans: ctypes.Array[AttendStep]

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, native: Native) -> None:
        self._spec, self._dtype, self._native, self._group = spec, dtype, native, native.group[dtype]

    def allocate(self, groups: tuple[KVGroup, ...], n_blocks: int) -> None:
        """Zeroed cache memory. Raises ``ResourceError``, and ``ConfigError`` where blocks would split a group of P."""
        size = self._size = groups[0].block_tokens
        G, D = self._spec.n_kv_heads, self._spec.head_dim
        P = self._group
        if size % P:
            raise ConfigError(
                f"block_tokens of {size} is not served in {str(self._dtype).removeprefix('torch.')} on this processor, "
                f"which takes positions in groups of {P}; use a multiple of {P}, or dtype 'float32'",
                subject="block_tokens",
            )
        shapes = ((G, n_blocks, D // P, size, P), (G, n_blocks, size // P, D, P))
        self._n_blocks = n_blocks
        self.layers = _allocate(groups, shapes, torch.empty(0, dtype=self._dtype))
        self._windows = [group.window or 0 for group in groups]
        self._places = [self._pointers(index) for index in range(len(groups))]

    def _pointers(self, group: int) -> tuple[int, ctypes.Array[c_void_p], ctypes.Array[c_void_p]]:
        """How many layers the group has, and where their K and V lie."""
        caches = [layer for layer in self.layers if layer.group == group]
        array = c_void_p * len(caches)
        return len(caches), array(*(c.k.data_ptr() for c in caches)), array(*(c.v.data_ptr() for c in caches))

    def begin(self, step: Step) -> None:
        """Take over a step's arrays and carry out its moves; valid until the next ``begin``."""
        self._base = roots(step)
        self._pos, self._parent = np.ascontiguousarray(step.pos), np.ascontiguousarray(step.parent)
        self._keep: list[np.ndarray] = []
        items = cut(step, self._base)
        windows = zip(step.groups, self._windows, strict=True)
        plans = [self._plan(step, items, group, window) for group, window in windows]
        self.plans = (AttendStep * len(plans))(*plans)
        for plan, group, places in zip(self.plans, step.groups, self._places, strict=True):
            n = len(group.moves)
            if n:
                moves = np.ascontiguousarray(group.moves, np.int32)
                if self._native.move[self._dtype](ctypes.byref(plan), n, moves.ctypes.data, *places):
                    raise ResourceError(f"no memory for the scratch of {n} moves")

    def _plan(self, step: Step, items: tuple[I32, I32, I32], group: GroupStep, window: int) -> AttendStep:
        span, row, n = items
        arrays = [np.ascontiguousarray(group.slot, np.int32), np.ascontiguousarray(group.table, np.int32)]
        arrays += [row, n, group.table_start[span]]
        self._keep += arrays
        slot, blocks, item_row, item_n, item_table = (a.ctypes.data for a in arrays)
        spec = self._spec
        return AttendStep(
            step.n_rows, len(row), spec.n_heads, spec.n_kv_heads, spec.head_dim, self._n_blocks, self._size, window,
            self._pos.ctypes.data, self._base.ctypes.data, self._parent.ctypes.data,
            slot, blocks, item_row, item_n, item_table,
        )  # fmt: skip
