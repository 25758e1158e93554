"""What the machine can do at best, measured as a contender like any other.

Reading: a buffer far beyond the last cache is read end to end with 1, 2, 4, ... threads. Matrix products: square, per
dtype, with all threads, large enough to be bound by arithmetic where a second suffices for that. Each is the best of
several tries, for a limit is what nothing on this machine exceeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tenon.base import clock, machine

BUFFER_CACHES = 8
BUFFER_MIN_BYTES = 2**28
ROW = 4096
GEMM_SIZE = 2048
GEMM_MIN_SIZE = 256
GEMM_LIMIT_S = 1.0
TRIES = 3
GEMM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MachineLimits:
    """Metrics ``read_N_threads_Bps`` and ``gemm_DTYPE_flops_per_s``."""

    def __init__(self, gemm_size: int = GEMM_SIZE, buffer_bytes: int = 0) -> None:
        self._gemm_size = gemm_size
        self._buffer_bytes = buffer_bytes or max(BUFFER_MIN_BYTES, BUFFER_CACHES * machine.last_level_cache_bytes())

    def setup(self, cell: dict[str, Any]) -> None:
        del cell  # the limits have no parameters
        self._threads = torch.get_num_threads()
        rows = self._buffer_bytes // (4 * ROW)
        self._buffer_NR = torch.ones(rows, ROW)
        self._vector_R = torch.ones(ROW)

    def sample(self) -> dict[str, float]:
        metrics = {}
        for threads in powers(self._threads):
            torch.set_num_threads(threads)
            metrics[f"read_{threads}_threads_Bps"] = self._read_Bps()
        torch.set_num_threads(self._threads)
        for name, dtype in GEMM_DTYPES.items():
            metrics[f"gemm_{name}_flops_per_s"] = gemm_flops_per_s(dtype, self._gemm_size, _best_s)
        return metrics

    def close(self) -> None:
        del self._buffer_NR

    def _read_Bps(self) -> float:
        """Bytes per second of the faster of two ways to read the buffer once: a sum and a matrix-vector product."""
        seconds = min(_best_s(self._buffer_NR.sum), _best_s(lambda: torch.mv(self._buffer_NR, self._vector_R)))
        return self._buffer_NR.numel() * 4 / seconds


def gemm_flops_per_s(dtype: torch.dtype, size: int, seconds: Callable[[Callable[[], object]], float]) -> float:
    """Rate of torch's square products of ``size``, or of the largest half, quarter, ... of it that is done in time.

    Processors without products of a type have them emulated, a thousand times slower: such a size would take minutes.
    """
    generator = torch.Generator().manual_seed(0)
    n = min(size, GEMM_MIN_SIZE)
    while True:
        square = torch.randn(n, n, generator=generator).to(dtype)
        spent_s = seconds(lambda a=square: torch.mm(a, a))  # type: ignore[misc]
        if 2 * n > size or 8 * spent_s > GEMM_LIMIT_S:
            return 2 * n**3 / spent_s
        n *= 2


def powers(threads: int) -> list[int]:
    """1, 2, 4, ... and the number itself."""
    return sorted({2**i for i in range(threads.bit_length()) if 2**i <= threads} | {threads})


def _best_s(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(TRIES):
        start_s = clock.SYSTEM.now_s()
        work()
        best = min(best, clock.SYSTEM.now_s() - start_s)
    return best
