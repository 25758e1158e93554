"""The Triton kernels compiled for two generations of GPUs, without one: that they compile, and what a program needs.

The interpreter takes Python that the compiler refuses, so ``test_triton_attention.py`` runs this file beside the cases.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tenon.engine.executors import triton_kernels as kernels
from tenon.engine.executors.triton_attention import JOIN_LANES, WRITE_ELEMENTS, Tiling, warps

pytestmark = pytest.mark.torch
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    "q", "k", "v", "out", "k_cache", "v_cache", "slot", "items", "tables", "joins", "part_acc", "part_stats",
}  # fmt: skip
INTS = {"slot", "items", "tables", "joins"}
SUMS = {"part_acc", "part_stats"}
SHARED_BYTES = 99 * 1024
"""What a program may take on the smallest of the generations that have bf16 (sm_86, sm_89)."""


def build(kernel: Any, dtype: str, capability: int, constants: dict[str, Any], **options: int) -> Any:
    names = kernel.arg_names
    kinds = {n: "i32" if n in INTS else "fp32" if n in SUMS else dtype for n in POINTERS}
    signature = {n: f"*{kinds[n]}" if n in POINTERS else "fp32" if n == "scale" else "i32" for n in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n not in {*constants, "scale"}}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def attend(dtype: str, capability: int, D: int, lanes: int | None, window: int, parts: bool) -> Any:
    P = max(16, 1 << (D - 1).bit_length())
    tiling = Tiling.of(P, TYPES[dtype])
    M = lanes or tiling.lanes
    constants = {
        "G": 8, "R": 4, "D": D, "P": P, "M": M, "N": tiling.positions, "B": 16, "WINDOW": window, "PARTS": parts,
        "WIDE": False, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    return build(kernels.attend, dtype, capability, constants, num_warps=warps(M, P), num_stages=2)


def stack_bytes(built: Any, folder: Path) -> int:
    """Memory a thread needs beside its registers."""
    (folder / "kernel.cubin").write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", report))


def test_every_kernel_compiles() -> None:
    attend("bf16", 90, 80, 16, 37, True)
    build(kernels.write, "bf16", 90, {"G": 8, "D": 80, "E": WRITE_ELEMENTS})
    sizes = {"G": 8, "R": 4, "D": 80, "P": 128, "M": 16, "J": JOIN_LANES}
    build(kernels.join, "bf16", 90, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "D", "spill"),
    [("bf16", 64, 0), ("bf16", 128, 80), ("fp16", 256, 0), ("fp32", 64, 32), ("fp32", 128, 320), ("fp32", 256, 64)],
)
def test_tiles_fit_shared_memory_and_registers(dtype: str, D: int, spill: int, capability: int, tmp_path: Path) -> None:
    for window, parts in (0, False), (4096, True):
        built = attend(dtype, capability, D, None, window, parts)
        assert built.metadata.shared <= SHARED_BYTES
        assert stack_bytes(built, tmp_path) <= spill


@pytest.mark.slow
def test_products_run_on_tensor_cores() -> None:
    built = attend("bf16", 90, 128, None, 0, False)
    assert "wgmma.mma_async" in built.asm["ptx"]
    assert "cp.async" in built.asm["ptx"]
    assert "mma.sync" in attend("bf16", 80, 128, None, 0, False).asm["ptx"]
