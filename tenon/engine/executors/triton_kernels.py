"""Triton kernels of multi-segment paged attention: write a step's K and V, attend for all its spans, join parts.

Caches lie as [slot, G, D]. A program of ``attend`` takes M *lanes* of one span and one KV head. A span's lanes are its
rows times the R query heads of the group, row by row, so that lane f is row f // R, head f % R: tiles are full whatever
R is. Absolute positions are walked in tiles of N, each at a multiple of N: a lane adds up its positions in one order
wherever its tile begins, and a tile that it sees nothing of changes no bit of it.

Names: T rows, H = G x R query heads, G key/value heads, D head size and P the power of two that holds it, B tokens per
block, M lanes, N positions of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(8)
"""Numbers of a line of ``items``: first row and number of lanes of the span, first lane of the tile, start of the block
table, position of the span's first row, first and last-plus-one position to read, part (-1: the item is all of its
tile). Of a line of ``joins``: first row, number of lanes, first lane, first part, number of parts; three unused."""


@triton.jit
def write(
    k, v, k_cache, v_cache, slot, n, k_stride_t, k_stride_g, v_stride_t,
    v_stride_g, G: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """K and V of all rows into their slots: ``n`` = T x G x D elements each, E a program."""
    i = tl.program_id(0).to(tl.int64) * E + tl.arange(0, E)
    inside = i < n
    row, e = i // (G * D), i % (G * D)
    g, d = e // D, e % D
    to = tl.load(slot + row, mask=inside, other=0).to(tl.int64) * (G * D) + e
    tl.store(k_cache + to, tl.load(k + row * k_stride_t + g * k_stride_g + d, mask=inside), mask=inside)
    tl.store(v_cache + to, tl.load(v + row * v_stride_t + g * v_stride_g + d, mask=inside), mask=inside)


@triton.jit
def _gather(cache, at_N, inside_N, D: tl.constexpr, P: tl.constexpr, MASKED: tl.constexpr):
    """(N, P) of a cache. What is not ``inside`` is never read: it may not have been written yet."""
    d = tl.arange(0, P)
    where = cache + at_N[:, None] + d[None, :]
    if MASKED:
        x = tl.load(where, mask=inside_N[:, None] & (d < D)[None, :], other=0.0)
    elif D != P:
        x = tl.load(where, mask=(d < D)[None, :], other=0.0)
    else:
        x = tl.load(where)
    return x


@triton.jit
def _absorb(
    acc_MP, top_M, sum_M, q_MP, k_cache, v_cache, table, first, end,
    low, pos_M, head, scale, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    B: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of positions into the running softmax. Not ``MASKED``: every lane sees every position of the tile."""
    p = first + tl.arange(0, N)
    inside = p < end
    if WINDOW > 0:
        inside = inside & (p > low - WINDOW)
    if MASKED:
        block = tl.load(table + p // B, mask=inside, other=0)
    else:
        block = tl.load(table + p // B)
    at = ((block.to(tl.int64) * B + p % B) * G + head) * D
    k = _gather(k_cache, at, inside, D, P, MASKED)
    v = _gather(v_cache, at, inside, D, P, MASKED)
    if WIDE:
        k, v = k.to(tl.float32), v.to(tl.float32)
    s = tl.dot(q_MP, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        visible = inside[None, :] & (p[None, :] <= pos_M[:, None])
        if WINDOW > 0:
            visible = visible & (p[None, :] > pos_M[:, None] - WINDOW)
        s = tl.where(visible, s, float("-inf"))
    new_top = tl.maximum(top_M, tl.max(s, 1))
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a lane that has seen nothing yet
    weight = tl.exp2(s - base[:, None])
    kept = tl.exp2(top_M - base)
    sum_M = sum_M * kept + tl.sum(weight, 1)
    acc_MP = tl.dot(weight.to(v.dtype), v, acc_MP * kept[:, None], input_precision=PRECISION)
    return acc_MP, new_top, sum_M


@triton.jit
def attend(
    q, k_cache, v_cache, out, part_acc, part_stats, items, tables, scale,
    q_stride_t, q_stride_h, out_stride_t, out_stride_h, G: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, B: tl.constexpr, WINDOW: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Item ``program_id(0)`` for KV head ``program_id(1)``. ``scale`` is the softmax's times log2(e). With ``PARTS``
    an item may be one part of a tile's positions; it then leaves its unnormalised sums for ``join``."""
    item = items + tl.program_id(0) * FIELDS
    head = tl.program_id(1)
    row, n_lanes, lane = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    table = tables + tl.load(item + 3)
    pos, begin, end, part = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)
    low = pos + lane // R
    high = pos + (tl.minimum(lane + M, n_lanes) - 1) // R
    f = lane + tl.arange(0, M)
    real = f < n_lanes
    pos_M = tl.minimum(pos + f // R, high)  # lanes past the end see what the last one sees, and are not stored
    row_M, head_M = (row + f // R).to(tl.int64), head * R + f % R
    d = tl.arange(0, P)
    mask_MP = real[:, None] & (d < D)[None, :]
    q_MP = tl.load(q + row_M[:, None] * q_stride_t + head_M[:, None] * q_stride_h + d[None, :], mask=mask_MP, other=0.0)
    if WIDE:
        q_MP = q_MP.to(tl.float32)

    # begin .. whole .. edge .. end: a window's edge runs through the tiles before ``whole``, the diagonal through those
    # from ``edge`` on; between them every lane sees everything.
    whole = begin
    if WINDOW > 0:
        whole = tl.minimum(tl.maximum(begin, (tl.maximum(high - WINDOW + 1, 0) + N - 1) // N * N), end)
    edge = tl.maximum(whole, tl.minimum(end, (low + 1) // N * N))
    acc_MP = tl.zeros([M, P], dtype=tl.float32)
    top_M = tl.full([M], float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros([M], dtype=tl.float32)
    if WINDOW > 0:
        for first in range(begin, whole, N):
            acc_MP, top_M, sum_M = _absorb(
                acc_MP, top_M, sum_M, q_MP, k_cache, v_cache, table, first, end, low, pos_M, head, scale,
                G, D, P, N, B, WINDOW, True, WIDE, PRECISION,
            )  # fmt: skip
    for first in range(whole, edge, N):
        acc_MP, top_M, sum_M = _absorb(
            acc_MP, top_M, sum_M, q_MP, k_cache, v_cache, table, first, end, low, pos_M, head, scale,
            G, D, P, N, B, WINDOW, False, WIDE, PRECISION,
        )  # fmt: skip
    for first in range(edge, end, N):
        acc_MP, top_M, sum_M = _absorb(
            acc_MP, top_M, sum_M, q_MP, k_cache, v_cache, table, first, end, low, pos_M, head, scale,
            G, D, P, N, B, WINDOW, True, WIDE, PRECISION,
        )  # fmt: skip

    to = out + row_M[:, None] * out_stride_t + head_M[:, None] * out_stride_h + d[None, :]
    if PARTS:
        if part >= 0:
            at = (part * G + head) * M + tl.arange(0, M)
            tl.store(part_acc + at[:, None] * P + d[None, :], acc_MP)
            tl.store(part_stats + at * 2, top_M)
            tl.store(part_stats + at * 2 + 1, sum_M)
        else:
            tl.store(to, (acc_MP / sum_M[:, None]).to(out.dtype.element_ty), mask=mask_MP)
    else:
        tl.store(to, (acc_MP / sum_M[:, None]).to(out.dtype.element_ty), mask=mask_MP)


@triton.jit
def join(
    out, part_acc, part_stats, joins, out_stride_t, out_stride_h, G: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """The parts of tile ``program_id(0)`` for KV head ``program_id(1)``, J of its lanes a program, in part order."""
    tile = joins + tl.program_id(0) * FIELDS
    head, start = tl.program_id(1), tl.program_id(2) * J
    row, n_lanes, lane = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    first, n_parts = tl.load(tile + 3), tl.load(tile + 4)
    d, j = tl.arange(0, P), start + tl.arange(0, J)
    acc_JP = tl.zeros([J, P], dtype=tl.float32)
    top_J = tl.full([J], float("-inf"), dtype=tl.float32)
    sum_J = tl.zeros([J], dtype=tl.float32)
    for part in range(first, first + n_parts):
        at = (part * G + head) * M + j
        top, total = tl.load(part_stats + at * 2), tl.load(part_stats + at * 2 + 1)
        new_top = tl.maximum(top_J, top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        kept, weight = tl.exp2(top_J - base), tl.exp2(top - base)
        sum_J = sum_J * kept + total * weight
        acc = tl.load(part_acc + at[:, None] * P + d[None, :])
        acc_JP = acc_JP * kept[:, None] + acc * weight[:, None]
        top_J = new_top
    f = lane + j
    to = out + (row + f // R).to(tl.int64)[:, None] * out_stride_t + (head * R + f % R)[:, None] * out_stride_h
    mask_JP = (f < n_lanes)[:, None] & (d < D)[None, :]
    tl.store(to + d[None, :], (acc_JP / sum_J[:, None]).to(out.dtype.element_ty), mask=mask_JP)
