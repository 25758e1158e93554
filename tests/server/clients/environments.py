"""Environments for clients that need other packages than ours: made once, from a file that names every version."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parents[2] / ".clients"


def python_of(name: str) -> Path:
    """The interpreter of ``name``'s environment, which is made anew where ``name.txt`` has changed."""
    wanted = HERE / f"{name}.txt"
    folder = FOLDER / name
    python, stamp = folder / "bin" / "python", folder / "made-of"
    digest = hashlib.sha256(wanted.read_bytes() + sys.version.encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        venv.create(folder, clear=True, with_pip=True)
        command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(wanted)]
        subprocess.run(command, check=True)
        stamp.write_text(digest)
    return python
