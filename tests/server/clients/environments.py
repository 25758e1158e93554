"""Environments for clients that need other packages than ours: made once, from a file that names every version."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from tests.server.conftest import PATIENCE_S

HERE = Path(__file__).parent
FOLDER = HERE.parents[2] / ".clients"
OFFLINE = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}
"""What keeps clients from asking anybody but the server."""


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


def run(name: str, *words: str) -> str:
    """What Python prints in ``name``'s environment when started with ``words``; it sees none of our packages."""
    command = [str(python_of(name)), *words]
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S * 5, check=False, env=inherited | OFFLINE
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def told(name: str, *arguments: str) -> Any:
    """What ``name_client.py`` printed, run in its environment: JSON on the last line."""
    return json.loads(run(name, str(HERE / f"{name}_client.py"), *arguments).splitlines()[-1])
