"""The description of the machine."""

import os
import subprocess
from pathlib import Path

from tenon.base import machine


def test_the_description_is_of_this_machine() -> None:
    here = machine.describe()
    assert here.cpu
    assert here.cores == len(os.sched_getaffinity(0))
    assert here.memory_bytes > 2**27
    assert "numpy" in here.packages


def test_commit_is_empty_outside_a_repository(tmp_path: Path) -> None:
    assert machine.commit(tmp_path) == ""


def test_commit_says_when_the_tree_differs_from_it(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert machine.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert machine.commit(tmp_path) == head + "+dirty"
