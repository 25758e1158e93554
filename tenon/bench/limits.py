"""What the machine can do at best, measured as a contender like any other.

Reading: a buffer far beyond the last cache is read end to end with 1, 2, 4, ... threads. Matrix products: square,
large enough to be bound by arithmetic, per dtype, with all threads. Each is the best of several tries, for a limit
is what nothing on this machine exceeds.
"""

from __future__ import annotations

from typing import Any

import torch

from tenon.base import clock, machine

BUFFER_CACHES = 8
BUFFER_MIN_BYTES = 2**28
ROW = 4096
GEMM_SIZE = 2048
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
        generator = torch.Generator().manual_seed(0)
        square = torch.randn(self._gemm_size, self._gemm_size, generator=generator)
        self._squares = {name: square.to(dtype) for name, dtype in GEMM_DTYPES.items()}

    def sample(self) -> dict[str, float]:
        metrics = {}
        for threads in _powers(self._threads):
            torch.set_num_threads(threads)
            metrics[f"read_{threads}_threads_Bps"] = self._read_Bps()
        torch.set_num_threads(self._threads)
        for name, square in self._squares.items():
            seconds = _best_s(lambda a=square: torch.mm(a, a))
            metrics[f"gemm_{name}_flops_per_s"] = 2 * self._gemm_size**3 / seconds
        return metrics

    def close(self) -> None:
        del self._buffer_NR, self._squares

    def _read_Bps(self) -> float:
        """Bytes per second of the faster of two ways to read the buffer once: a sum and a matrix-vector product."""
        seconds = min(_best_s(self._buffer_NR.sum), _best_s(lambda: torch.mv(self._buffer_NR, self._vector_R)))
        return self._buffer_NR.numel() * 4 / seconds


def _powers(threads: int) -> list[int]:
    """1, 2, 4, ... and the number itself."""
    return sorted({2**i for i in range(threads.bit_length()) if 2**i <= threads} | {threads})


def _best_s(work: Any) -> float:
    best = float("inf")
    for _ in range(TRIES):
        start_s = clock.SYSTEM.now_s()
        work()
        best = min(best, clock.SYSTEM.now_s() - start_s)
    return best
