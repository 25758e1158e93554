"""Compiling kernels: once, safely in parallel, and what happens where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tenon.base.errors import ResourceError
from tenon.compiler import toolchain

Env = Callable[[str, str], None]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of this test alone."""
    monkeypatch.setenv("TENON_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def test_a_source_is_compiled_once_and_loads(state: Path, source: Path) -> None:
    built = toolchain.build("answer", [source])
    first = built.stat().st_mtime_ns
    assert toolchain.load(built).answer() == 42
    assert toolchain.build("answer", [source]) == built
    assert built.stat().st_mtime_ns == first
    assert built.parent.stat().st_mode & 0o777 == 0o700


def test_another_source_is_another_object(state: Path, source: Path) -> None:
    first = toolchain.build("answer", [source])
    source.write_text("int answer(void) { return 43; }\n")
    second = toolchain.build("answer", [source])
    assert first != second
    assert toolchain.load(second).answer() == 43


def test_without_a_compiler_the_error_says_what_to_install(
    state: Path, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ResourceError, match="install gcc"):
        toolchain.build("answer", [source])


def test_a_compiler_s_complaint_is_passed_on(state: Path, source: Path) -> None:
    source.write_text("int answer(void) { return nonsense; }\n")
    with pytest.raises(ResourceError, match="nonsense"):
        toolchain.build("answer", [source])
    assert not list((state / "native").glob("*.so"))


def test_processes_that_build_at_once_all_get_a_whole_object(state: Path, source: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tenon.compiler import toolchain; "
        "print(toolchain.load(toolchain.build('answer', [Path(sys.argv[1])])).answer())"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(source)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [process.communicate()[0].strip() for process in started] == ["42"] * 4
    assert len(list((state / "native").glob("*.so"))) == 1


@pytest.mark.torch
def test_the_executor_goes_on_without_a_compiler_and_says_so(tmp_path: Path) -> None:
    program = """
from tenon.base.errors import ConfigError
from tenon.engine.config import EngineConfig
from tenon.engine.executors.attention import TorchAttention
from tenon.engine.executors.torch import TorchExecutor
from tenon.models.checkpoint import random_decoder
from tenon.models.spec import ModelSpec
from tests.engine.build import Add, engine, run

spec = ModelSpec("qwen3", 97, 64, 2, 4, 2, 32, 96, 256, qk_norm=True, dtype="float32")
executor = TorchExecutor(random_decoder(spec, 1), EngineConfig(), on_phase=lambda *_: None)
made = engine(executor, spec.kv_groups("m", 16, 4), 20, 97, EngineConfig(max_step_tokens=9))
print(len(run(made, [Add("a", (1, 2, 3) * 9, 5, 0)])["a", 0]))
print(executor.caps.notes)
try:
    TorchExecutor(random_decoder(spec, 1), EngineConfig(numerics="invariant"), on_phase=lambda *_: None)
except ConfigError as error:
    print(error)
"""
    env = {name: value for name, value in os.environ.items() if name != "CC"}
    env |= {"PATH": str(tmp_path), "TENON_STATE": str(tmp_path / "state")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=env,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    n_tokens, notes, refused = done.stdout.splitlines()
    assert n_tokens == "5"
    assert "install gcc" in notes
    assert "C compiler" in refused
