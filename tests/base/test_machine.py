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


def group(folder: Path, version: int, limit: str, used: int, cache: int) -> None:
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


def proc(tmp_path: Path, groups: str) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  4000 kB\nMemFree:  1 kB\nMemAvailable:  1000 kB\nOdd\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    return tmp_path / "proc"


MACHINE = machine.MemoryBound(4000 * 1024, 3000 * 1024, machine.MACHINE)


def test_every_group_above_bounds_the_memory(tmp_path: Path) -> None:
    where, root = proc(tmp_path, "0::/a.slice/b.service\n"), tmp_path / "cgroup"
    group(root / "a.slice", 2, "3000000", 900_000, 0)
    group(root / "a.slice" / "b.service", 2, "2000000", 800_000, 300_000)
    assert machine.memory_bounds(where, root) == [
        MACHINE,
        machine.MemoryBound(2_000_000, 500_000, str(root / "a.slice" / "b.service")),
        machine.MemoryBound(3_000_000, 900_000, str(root / "a.slice")),
    ]


def test_groups_of_version_1_and_without_a_limit(tmp_path: Path) -> None:
    where, root = proc(tmp_path, "9:name=systemd:/\n4:cpu,memory:/x/y\n0::/\n"), tmp_path / "cgroup"
    group(root / "memory" / "x" / "y", 1, "9223372036854771712", 70, 0)
    group(root / "memory" / "x", 1, "2000000", 1_500_000, 2_000_000)
    group(root, 2, "max", 70, 0)
    named = str(root / "memory" / "x")
    assert machine.memory_bounds(where, root) == [MACHINE, machine.MemoryBound(2_000_000, 0, named)]


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    where, root = proc(tmp_path, "0::/docker/1234\n"), tmp_path / "cgroup"
    group(root, 2, "1000000", 400_000, 100_000)
    assert machine.memory_bounds(where, root) == [MACHINE, machine.MemoryBound(1_000_000, 300_000, str(root))]


def test_this_machine_has_memory_left() -> None:
    bounds = machine.memory_bounds()
    assert 0 < machine.free_memory() < bounds[0].limit
