"""From a command to the first streamed token: `tenon serve` installed, `make serve` in a fresh clone, and a script.

The rival is what one would write without a server: a new Python process that loads the same checkpoint in transformers
and generates one token. The clone's time includes making the virtual environment and installing every package from
wherever pip finds them.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tenon.base import clock
from tenon.base.result import Check, ContenderEntry, Result, at_most
from tenon.bench.claim import Cell

TITLE = "seconds from a command to the first token of the embedded model"
BASELINE = "script"
LIMITS = False
ROOT = Path(__file__).resolve().parents[1]
INSTALLED_S, CLONE_S = 10.0, 90.0
SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("def add(a, b):", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_token(port: int, server: subprocess.Popen[bytes], limit_s: float) -> None:
    """Ask for a stream until one token has come. Raises ``RuntimeError`` when the server ends or time runs out."""
    body = json.dumps({"model": "embedded", "prompt": "def add(a, b):", "max_tokens": 1, "stream": True})
    end_s = clock.SYSTEM.now_s() + limit_s
    while clock.SYSTEM.now_s() < end_s:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            if answer.status == 200 and answer.readline().startswith(b"data: "):
                return
        except OSError:
            pass  # not listening yet
        finally:
            connection.close()
        clock.sleep_s(0.05)
    raise RuntimeError(f"no token within {limit_s:.0f} s")


class Serve:
    """``tenon serve`` here, or ``make serve`` in a clone with an empty HOME."""

    def setup(self, cell: dict[str, Any]) -> None:
        self._clone = cell["clone"]

    def sample(self) -> dict[str, float]:
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            command, where = [sys.executable, "-m", "tenon", "serve", "--port", str(port)], ROOT
            environment = dict(os.environ)
            start_s = clock.SYSTEM.now_s()
            if self._clone:
                where = Path(folder) / "tenon"
                subprocess.run(["git", "clone", "-q", str(ROOT), str(where)], check=True)
                command = ["make", "serve", f"ARGS=--port {port}"]
                kept = {name: value for name, value in os.environ.items() if name == "PATH" or name.startswith("PIP_")}
                environment = {**kept, "HOME": folder}
            server = subprocess.Popen(
                command,
                cwd=where,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                wait_for_token(port, server, 300)
                return {"seconds": clock.SYSTEM.now_s() - start_s}
            finally:
                os.killpg(server.pid, signal.SIGTERM)
                server.wait(timeout=60)

    def close(self) -> None:
        del self._clone


class Script:
    def setup(self, cell: dict[str, Any]) -> None:
        self._folder = ROOT / "tenon" / "models" / "embedded" / "target"

    def sample(self) -> dict[str, float]:
        start_s = clock.SYSTEM.now_s()
        subprocess.run([sys.executable, "-c", SCRIPT, str(self._folder)], stdout=subprocess.DEVNULL, check=True)
        return {"seconds": clock.SYSTEM.now_s() - start_s}

    def close(self) -> None:
        del self._folder


CONTENDERS = {
    "tenon": ContenderEntry("bench.first_token:Serve", {}),
    "script": ContenderEntry("bench.first_token:Script", {}),
}


def cells(quick: bool) -> list[Cell]:
    installed = Cell("installed", {"clone": False}, 3 if quick else 9, 1, (), 5, 120)
    clone = Cell("fresh clone", {"clone": True}, 2, 0, ("tenon",), 60, 600)
    return [installed] if quick else [installed, clone]


def checks(result: Result) -> list[Check]:
    wanted = {"installed": INSTALLED_S, "fresh clone": CLONE_S}
    return [
        at_most(f"{name}: seconds to the first token", result.median(name, "tenon", "seconds"), wanted[name])
        for name in result.cells
    ]
