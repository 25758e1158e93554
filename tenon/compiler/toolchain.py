"""From C sources to a loaded shared object, compiled once per machine and kept in the state folder.

The object's name is a hash of sources, flags, compiler and processor, so that nothing stale is ever loaded.
OpenMP symbols are left open at link time and bound to the runtime that the process has already (torch's own):
two thread pools on the same cores would wait for each other.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tenon.base.errors import ResourceError
from tenon.base.files import state_folder

CSRC = Path(__file__).parent / "csrc"
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-ffp-contract=off", "-w")


def find_compiler() -> str:
    """The C compiler's path: $CC, else cc, gcc, clang. Raises ``ResourceError`` naming what to install."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    raise ResourceError("no C compiler was found (looked for $CC, cc, gcc, clang); install gcc", subject="CC")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _key(compiler: str, sources: Sequence[Path]) -> str:
    h = hashlib.blake2b(digest_size=16)
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    for part in (version, " ".join(FLAGS).encode(), _processor().encode()):
        h.update(len(part).to_bytes(8, "little") + part)
    for path in sorted({*sources, *CSRC.glob("*.h")}):
        h.update(path.name.encode() + path.read_bytes())
    return h.hexdigest()


def build(name: str, sources: Sequence[Path]) -> Path:
    """Compile ``sources`` into one shared object, or find it built. Raises ``ResourceError``."""
    compiler = find_compiler()
    folder = state_folder() / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / f"{name}-{_key(compiler, sources)}.so"
    if target.exists():
        return target
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=folder) as work:
            objects = []
            for source in sources:
                out = Path(work) / f"{source.stem}.o"
                _run([compiler, *FLAGS, "-c", str(source), "-o", str(out)])
                objects.append(str(out))
            shared = Path(work) / target.name
            _run([compiler, "-shared", *objects, "-lm", "-o", str(shared)])
            os.replace(shared, target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = done.stderr.strip() or f"exit status {done.returncode}"
        raise ResourceError(f"{' '.join(command)} failed: {message[:2000]}", subject=command[0])


def load(path: Path) -> ctypes.CDLL:
    """Load a built object, its OpenMP calls bound to the runtime of this process. Raises ``ResourceError``."""
    try:
        ctypes.CDLL(_openmp_runtime(), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ResourceError(f"cannot load {path.name}: {error}", subject=str(path)) from error


def _openmp_runtime() -> str:
    """The OpenMP library that is mapped already, else the compiler's own by name."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    except OSError:
        mapped = set()
    for stem in ("libgomp", "libiomp5", "libomp"):
        for path in sorted(mapped):
            if Path(path).name.startswith(stem):
                return path
    return "libgomp.so.1"
