"""The Triton kernels run in Triton's interpreter and compile, anywhere; on a CUDA device they run compiled.

Triton reads ``TRITON_INTERPRET`` when kernels are imported, for the whole process, so each run is a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it has wheels for Linux on x86_64)"
)


def run(file: str, cache: Path, *arguments: str, interpret: bool = False) -> None:
    """The tests of a file beside this one. Fails with their report unless all of them ran and passed."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": str(cache)}
    environment["OMP_NUM_THREADS"] = "1"
    program = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name(file)),
        *arguments,
    ]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.torch
def test_the_kernels_equal_gathering_in_the_interpreter(tmp_path: Path) -> None:
    run("triton_cases.py", tmp_path, interpret=True)


@needs_triton
@pytest.mark.torch
def test_the_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    run("triton_compiled.py", tmp_path)


@needs_triton
@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tiles_fit_the_gpus(tmp_path: Path) -> None:
    run("triton_compiled.py", tmp_path, "-m", "slow")


@needs_triton
@pytest.mark.torch
@pytest.mark.slow
def test_the_bench_of_the_kernels_runs_dry() -> None:
    program = [sys.executable, str(ROOT / "bench" / "gpu_segments.py"), "--dry-run", "--quick"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "holes" in done.stdout


@needs_triton
@pytest.mark.gpu
def test_the_kernels_equal_gathering_on_the_device(tmp_path: Path) -> None:
    run("triton_cases.py", tmp_path)


def test_the_executor_on_cpu_never_loads_triton() -> None:
    program = (
        "import sys, torch; from tenon.engine.executors import torch as module; "
        "print([m for m in sys.modules if m.startswith(('triton', 'tenon.engine.executors.triton'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
