"""The tests of what must not be got around, once more where no ``assert`` is executed: ``python -O``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    "tests/server/test_frames.py", "tests/server/test_keys.py", "tests/server/test_limits.py",
    "tests/server/test_orphans.py", "tests/server/test_routes.py", "tests/server/test_validation.py",
    "tests/models/test_checkpoint.py", "tests/models/test_safetensors_file.py", "tests/models/test_template.py",
    "tests/engine/test_blocks.py",
]  # fmt: skip


def optimised(*words: str) -> subprocess.CompletedProcess[str]:
    """pytest under ``-O``, in this process and all that it starts. It turns the asserts of tests into other statements,
    and warns of those that it does not."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONOPTIMIZE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    ignored = ["-W", "ignore:assertions not in test modules", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *ignored, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_tests_still_fail_where_asserts_are_not_executed(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert not __debug__\n    assert 1 == 2\n")
    done = optimised(str(tmp_path / "test_it.py"))
    assert done.returncode == 1
    assert "assert 1 == 2" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_security_holds_without_asserts() -> None:
    done = optimised(*FILES)
    assert done.returncode == 0, done.stdout[-5000:]
