"""How long Tenon takes to say something: `import tenon`, `tenon --version`, `tenon --help`, over an empty Python.

Each sample starts a new interpreter and waits for it to end.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from tenon.base import clock
from tenon.base.result import Check, ContenderEntry, Result, at_most
from tenon.bench.claim import Cell

TITLE = "wall time of a new process: import tenon, tenon --version, tenon --help, against an empty Python"
BASELINE = "python"
LIMITS = False

COMMANDS = {
    "import": ["-c", "import tenon"],
    "version": ["-m", "tenon", "--version"],
    "help": ["-m", "tenon", "--help"],
}
EMPTY = ["-c", "pass"]
IMPORT_TARGET_S = 0.3


class Command:
    """Runs the cell's command of Tenon, or an empty Python program."""

    def __init__(self, empty: bool) -> None:
        self._empty = empty

    def setup(self, cell: dict[str, Any]) -> None:
        self._command = [sys.executable, *(EMPTY if self._empty else COMMANDS[cell["command"]])]

    def sample(self) -> dict[str, float]:
        start_s = clock.SYSTEM.now_s()
        subprocess.run(self._command, stdout=subprocess.DEVNULL, check=True)
        return {"seconds": clock.SYSTEM.now_s() - start_s}

    def close(self) -> None:
        del self._command


CONTENDERS = {
    "tenon": ContenderEntry("bench.startup:Command", {"empty": False}),
    "python": ContenderEntry("bench.startup:Command", {"empty": True}),
}


def cells(quick: bool) -> list[Cell]:
    rounds = 5 if quick else 40
    return [Cell(name, {"command": name}, rounds=rounds, warmup=2, sample_s=0.1, limit_s=30) for name in COMMANDS]


def checks(result: Result) -> list[Check]:
    return [
        at_most(f"tenon {name}: seconds", result.median(name, "tenon", "seconds"), IMPORT_TARGET_S)
        for name in result.cells
    ]
