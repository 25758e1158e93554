"""What this machine's parts can do, each alone: reading, copying, products, attention's keys and values, dispatch.

On CPU products and attention are the C kernels that serve, so that their rates are what steps are made of; without a
compiler torch's stand in. Names carry units; ``_N_threads_`` is the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tenon.base import machine
from tenon.base.clock import SYSTEM, Clock
from tenon.base.errors import ResourceError
from tenon.bench.limits import gemm_flops_per_s, powers
from tenon.engine.executors import native
from tenon.engine.executors.attention import NativeAttention
from tenon.engine.executors.linear import PackedLinear
from tenon.engine.executors.memory import zeros
from tenon.engine.step import GroupStep, Params, Step
from tenon.models.spec import ModelSpec

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUFFER_CACHES: Final = 4
BUFFER_MIN_BYTES: Final = 2**27
TRIES: Final = 3
BLOCK_TOKENS: Final = 16
GRAPH_KERNELS: Final = 200
LONG_S: Final = 0.1
"""Seconds of a call beside which cold caches and a thread that wakes are nothing."""

Times = Callable[[Callable[[], object]], float]
"""Seconds that a call takes."""


def cpu_limits(threads: int, *, clock: Clock = SYSTEM, scale: float = 1.0) -> dict[str, float]:
    """Limits of the processor with up to ``threads`` threads; ``scale`` shrinks the sizes for a quick look."""

    def seconds(work: Callable[[], object]) -> float:
        work()
        return min(timed(work, clock) for _ in range(TRIES))

    size = int(scale * max(BUFFER_MIN_BYTES, BUFFER_CACHES * machine.last_level_cache_bytes()))
    rows = max(16, size // (4 * 4096))
    source, target = torch.ones(rows, 4096), torch.empty(rows, 4096)
    vector = torch.ones(4096)
    product = _products(scale)
    found: dict[str, float] = {}
    before = torch.get_num_threads()
    try:
        for n in powers(threads):
            torch.set_num_threads(n)
            read_s = min(seconds(source.sum), seconds(lambda: torch.mv(source, vector)))
            found[f"read_{n}_threads_Bps"] = source.nbytes / read_s
            found[f"copy_{n}_threads_Bps"] = 2 * source.nbytes / seconds(lambda: target.copy_(source))
            found[f"gemv_{n}_threads_Bps"] = product.gemv_Bps(seconds, size)
        found["gemv_Bps"] = found[f"gemv_{threads}_threads_Bps"]
        cached = max(2**16, machine.last_level_cache_bytes() // 4)
        found["gemv_cached_Bps"] = product.gemv_Bps(seconds, cached)
        for name in ("float32", "bfloat16"):
            found[f"gemm_{name}_flops_per_s"] = product.gemm_flops_per_s(seconds, DTYPES[name])
        if product.native is not None:
            found["attention_Bps"] = _attention_Bps(product.native, seconds, scale)
    finally:
        torch.set_num_threads(before)
    small = torch.ones(16)
    found["dispatch_s"] = seconds(lambda: [small.add_(0.0) for _ in range(1000)]) / 1000
    found["launch_s"] = product.call_s(seconds)
    return found


def cuda_limits(device: str, *, clock: Clock = SYSTEM, scale: float = 1.0) -> dict[str, float]:
    """Limits of a CUDA device: the same, and what a kernel's launch costs eagerly and in a graph."""

    def seconds(work: Callable[[], object]) -> float:
        work()
        torch.cuda.synchronize(device)

        def finished() -> None:
            work()
            torch.cuda.synchronize(device)

        return min(timed(finished, clock) for _ in range(TRIES))

    count = int(scale * 2**28)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    matrix_NK = torch.ones(8192, 8192, device=device, dtype=torch.bfloat16)
    vector_K = torch.ones(8192, device=device, dtype=torch.bfloat16)
    found = {
        "read_device_Bps": source.nbytes / seconds(source.sum),
        "copy_device_Bps": 2 * source.nbytes / seconds(lambda: target.copy_(source)),
        "gemv_Bps": matrix_NK.nbytes / seconds(lambda: torch.mv(matrix_NK, vector_K)),
    }
    n = max(256, int(8192 * scale))
    for name, dtype in DTYPES.items():
        square = torch.randn(n, n, device=device).to(dtype)
        found[f"gemm_{name}_flops_per_s"] = 2 * n**3 / seconds(lambda a=square: torch.mm(a, a))  # type: ignore[misc]
    small = torch.ones(16, device=device)

    def many() -> None:
        for _ in range(GRAPH_KERNELS):
            small.add_(0.0)

    found["launch_s"] = found["dispatch_s"] = seconds(many) / GRAPH_KERNELS
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    found["graph_launch_s"] = seconds(graph.replay) / GRAPH_KERNELS
    return found


def timed(work: Callable[[], object], clock: Clock) -> float:
    start_s = clock.now_s()
    work()
    return clock.now_s() - start_s


class _products:
    """Matrix products by the C kernels, or by torch where there is no compiler."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self.native: native.Native | None
        try:
            self.native = native.load()
        except ResourceError:
            self.native = None

    def _linear(self, n: int, k: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        weight_NK = torch.full((n, k), 0.01, dtype=dtype)
        if self.native is None:
            return lambda x_TK: torch.nn.functional.linear(x_TK, weight_NK)
        memory = zeros((self.native.packed_size(n, k),), weight_NK, "a matrix")
        return PackedLinear(self.native, weight_NK, None, memory)

    def gemv_Bps(self, seconds: Times, size: int) -> float:
        """One row against a bf16 matrix of ``size`` bytes, in matrices of a layer's size."""
        k = 1024
        n = max(16, min(4096, size // (2 * k)))
        layers = [self._linear(n, k, torch.bfloat16) for _ in range(max(1, size // (2 * n * k)))]
        x_TK = torch.ones(1, k, dtype=torch.bfloat16)
        return len(layers) * 2 * n * k / seconds(lambda: [layer(x_TK) for layer in layers])

    def gemm_flops_per_s(self, seconds: Times, dtype: torch.dtype) -> float:
        """The better of the serving kernel and torch."""
        n = max(64, int(1024 * self._scale))
        torchs = gemm_flops_per_s(dtype, n, seconds)
        if self.native is None:
            return torchs
        x_TK = torch.full((n, n), 0.01, dtype=dtype)
        linear = self._linear(n, n, dtype)
        return max(torchs, 2 * n**3 / seconds(lambda: linear(x_TK)))

    def call_s(self, seconds: Times) -> float:
        """A product too small to take time: what is paid for calling it with all threads."""
        k = 256
        linear = self._linear(512, k, torch.bfloat16)
        x_TK = torch.ones(2, k, dtype=torch.bfloat16)
        return seconds(lambda: [linear(x_TK) for _ in range(200)]) / 200


def _attention_Bps(kernels: native.Native, seconds: Times, scale: float) -> float:
    """Bytes of keys and values a second, decoding eight sequences whose cache is beyond the processor's."""
    spec = ModelSpec("llama", 256, 512, 1, 8, 4, 64, 512, 1 << 17)
    S, context = 8, max(64, int(8192 * scale))
    attention = NativeAttention(spec, torch.bfloat16, kernels)
    per_span = context // BLOCK_TOKENS
    attention.allocate(spec.kv_groups("probe", BLOCK_TOKENS, 2), S * per_span + 1)
    cache = attention.layers[0]
    cache.k.fill_(0.01), cache.v.fill_(0.01)
    order = np.random.default_rng(0).permutation(np.arange(1, S * per_span + 1)).astype(np.int32)
    starts = np.arange(0, S * per_span + 1, per_span, dtype=np.int32)
    slot = order[starts[1:] - 1] * BLOCK_TOKENS + BLOCK_TOKENS - 1
    group = GroupStep(slot.astype(np.int32), starts, order)
    pos = np.full(S, per_span * BLOCK_TOKENS - 1, np.int32)
    attention.begin(plain_step(pos, np.arange(S + 1, dtype=np.int32), np.arange(S), (group,)))
    q = torch.full((S, spec.n_heads, spec.head_dim), 0.1, dtype=torch.bfloat16)
    k = torch.full((S, spec.n_kv_heads, spec.head_dim), 0.1, dtype=torch.bfloat16)
    out = torch.empty_like(q)
    pointers = [t.data_ptr() for t in (q, k, k, cache.k, cache.v, out)]
    read = S * per_span * BLOCK_TOKENS * 2 * spec.kv_size * 2
    plan = ctypes.addressof(attention.plans)
    return read / seconds(lambda: kernels.attend[torch.bfloat16](plan, spec.head_dim**-0.5, *pointers))


def plain_step(
    pos: np.ndarray,
    q_start: np.ndarray,
    seq: np.ndarray,
    groups: tuple[GroupStep, ...],
    *,
    step_id: int = 0,
    tok: np.ndarray | None = None,
    parent: np.ndarray | None = None,
    out_row: np.ndarray | None = None,
) -> Step:
    """A greedy step from its arrays, without edits or masks; outputs belong to the spans of their rows."""
    T, S = len(pos), len(q_start) - 1
    rows = np.zeros(0, np.int32) if out_row is None else out_row.astype(np.int32)
    R = len(rows)
    span = np.searchsorted(q_start, rows, side="right") - 1
    params = Params(
        np.zeros(R, np.float32), np.zeros(R, np.int32), np.ones(R, np.float32), np.zeros(R, np.float32),
        np.zeros(R, np.uint64), np.zeros(R, np.int32), np.full(R, -1, np.int32),
    )  # fmt: skip
    return Step(
        id=step_id, model="probe", weights_version=0, bucket_T=T, bucket_S=S, n_steps=1, seq=seq.astype(np.int64),
        q_start=q_start.astype(np.int32), tok=np.zeros(T, np.int32) if tok is None else tok, pos=pos.astype(np.int32),
        parent=np.full(T, -1, np.int32) if parent is None else parent, groups=groups, out_row=rows,
        out_seq=seq[span].astype(np.int64), out_position=np.zeros(R, np.int32), want=np.ones(R, np.uint8),
        params_index=np.arange(R, dtype=np.int32), bitmask_index=np.full(R, -1, np.int32), params=params,
        bitmask=np.zeros((0, 0), np.uint32), edit_start=np.zeros(R + 1, np.int32), edit_token=np.zeros(0, np.int32),
        edit_kind=np.zeros(0, np.uint8), edit_value=np.zeros(0, np.float32), score_start=np.zeros(R + 1, np.int32),
        score_token=np.zeros(0, np.int32),
    )  # fmt: skip


def least(work: Callable[[], object], clock: Clock, *, at_least: int, budget_s: float) -> tuple[float, int]:
    """The least seconds of a call, and how often it ran: ``at_least`` times after one that is not counted, and more
    while they fit into ``budget_s``; once where it takes longer than ``LONG_S``."""
    first_s = timed(work, clock)
    if first_s > LONG_S:
        return first_s, 1
    samples = [timed(work, clock)]
    most = max(at_least, int(budget_s / max(samples[0], 1e-6)))
    samples += [timed(work, clock) for _ in range(min(most, 50) - 1)]
    return min(samples), len(samples)
