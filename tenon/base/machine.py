"""What this machine is, as far as a measurement's reader needs to know."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

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


def free_memory() -> int:
    """Bytes that this machine, or the container's limit, has left. Raises ``ResourceError`` if it cannot tell."""
    free: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    except OSError:
        free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    if not free or min(free) <= 0:
        raise ResourceError("the free memory of this machine cannot be determined; set kv_bytes")
    return min(free)
