"""What this machine is, as far as a measurement's reader needs to know."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Final

import msgspec

from tenon.base.errors import ResourceError

NOTED_FLAGS = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
NOTED_PACKAGES = ("torch", "numpy", "transformers")


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Processor, memory and software. ``memory_bytes`` is physical; ``cores`` those this process may use."""

    cpu: str
    cores: int
    memory_bytes: int
    last_level_cache_bytes: int
    flags: tuple[str, ...]
    os: str
    python: str
    packages: dict[str, str]
    load: float


def describe() -> Machine:
    """This machine now. Package versions are read from their metadata: nothing is imported."""
    cpu, flags = _cpuinfo()
    return Machine(
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        last_level_cache_bytes=last_level_cache_bytes(),
        flags=tuple(flag for flag in NOTED_FLAGS if flag in flags),
        os=f"{platform.system()} {platform.release()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        packages={name: version for name in NOTED_PACKAGES if (version := _version(name)) is not None},
        load=round(os.getloadavg()[0], 2),
    )


def last_level_cache_bytes() -> int:
    """Size of the largest cache that core 0 reads through; 0 where the kernel does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes)


def commit(folder: Path) -> str:
    """The git commit of the tree at ``folder``, with ``+dirty`` for uncommitted changes; "" outside a repository."""
    try:
        head = _git(folder, "rev-parse", "--verify", "HEAD")
        return head + ("+dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@cache
def _cpuinfo() -> tuple[str, frozenset[str]]:
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    path = Path("/proc/cpuinfo")
    if sys.platform != "linux" or not path.exists():
        return name, flags
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
            break
    return name, flags


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class MemoryBound:
    """What bounds this process's memory. ``used`` is by all that share the bound, less what the kernel can drop; ``of``
    is ``MACHINE`` or the control group's folder."""

    limit: int
    used: int
    of: str = ""

    @property
    def left(self) -> int:
        return self.limit - self.used


MACHINE: Final = "the machine"


def memory_bounds(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> list[MemoryBound]:
    """The machine's memory, and the limits of every control group (version 1 or 2) that this process is in, in bytes.

    What cannot be read is left out. A container's own group is the root of ``cgroups``, whatever ``proc`` calls it.
    """
    found: list[MemoryBound] = []
    try:
        told = _numbers(proc / "meminfo")
        total, available = told["MemTotal:"] * 1024, told["MemAvailable:"] * 1024
        found.append(MemoryBound(total, total - available, MACHINE))
    except (OSError, KeyError):
        with contextlib.suppress(OSError, ValueError):
            page, n_pages, n_free = map(os.sysconf, ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
            found.append(MemoryBound(n_pages * page, (n_pages - n_free) * page, MACHINE))
    most = found[0].limit if found else 2**60
    for folder, version in _groups(proc, cgroups):
        with contextlib.suppress(OSError, ValueError):
            bound = _group_bound(folder, version)
            if bound.limit < most:
                found.append(bound)
    return found


def _groups(proc: Path, cgroups: Path) -> list[tuple[Path, int]]:
    """Folders of this process's memory control groups, its own first, with their version."""
    found: list[tuple[Path, int]] = []
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root, version = cgroups, 2
        elif "memory" in controllers.split(","):
            root, version = cgroups / "memory", 1
        else:
            continue
        own = root / path.strip("/")
        found += [(folder, version) for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return found


def _group_bound(folder: Path, version: int) -> MemoryBound:
    """Raises ``OSError`` where the group has no memory controller, ``ValueError`` where it has no limit ("max")."""
    limit, used, cache = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    most, in_use = int((folder / limit).read_text()), int((folder / used).read_text())
    droppable = _numbers(folder / "memory.stat").get(cache, 0)
    return MemoryBound(most, max(0, in_use - droppable), str(folder))


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name, a number and perhaps a unit."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def free_memory() -> int:
    """Bytes that this machine, or the container's limit, has left. Raises ``ResourceError`` if it cannot tell."""
    free = [bound.left for bound in memory_bounds()]
    if not free or min(free) <= 0:
        raise ResourceError("the free memory of this machine cannot be determined; set kv_bytes")
    return min(free)
