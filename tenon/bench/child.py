"""The parent's handle on a contender's process."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tenon.base import clock as clocks
from tenon.base.errors import ProtocolError, ResourceError, TenonError
from tenon.base.result import ContenderEntry

QUIT_S = 20.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class ContenderError(TenonError):
    """A contender failed, hung or gave no metrics; ``subject`` is its name, ``trace`` its own traceback."""

    def __init__(self, message: str, *, subject: str, trace: str = "") -> None:
        super().__init__(message, subject=subject)
        self.trace = trace


class Child:
    """One contender in a process of its own, run from ``root`` with ``threads`` threads; stderr goes to ``log``."""

    def __init__(
        self,
        name: str,
        entry: ContenderEntry,
        *,
        root: Path,
        threads: int,
        log: Path,
        clock: clocks.Clock = clocks.SYSTEM,
    ) -> None:
        self.name = name
        self._log = log
        self._clock = clock
        self._buffer = b""
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": _python_path(root)}
        command = [sys.executable, "-m", "tenon.bench.contender", entry.entry, json.dumps(entry.options)]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as stderr:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=root, env=environment
                )
        except OSError as error:
            raise ResourceError(f"cannot start contender {name}: {error}", subject=name) from error

    def setup(self, cell: dict[str, Any], *, limit_s: float) -> None:
        """Raises ``ContenderError`` when the contender fails or takes longer than ``limit_s``."""
        self._ask({"do": "setup", "cell": cell}, limit_s)

    def sample(self, *, limit_s: float) -> dict[str, float]:
        """One sample's metrics. Raises as ``setup`` does, and ``ProtocolError`` for metrics that are not numbers."""
        metrics = self._ask({"do": "sample"}, limit_s)
        if not metrics or not all(isinstance(value, int | float) for value in metrics.values()):
            raise ProtocolError(f"contender {self.name} gave {metrics!r}; a sample is metrics of numbers")
        return {name: float(value) for name, value in metrics.items()}

    def close(self) -> None:
        """Ask it to quit; kill it when it does not within ``QUIT_S``."""
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise ProtocolError(f"contender {self.name} was started without pipes")
        try:
            process.stdin.write(b'{"do": "quit"}\n')
            process.stdin.close()
        except BrokenPipeError:
            process.kill()  # it is gone already, and has said why
        try:
            process.wait(QUIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            self._process.kill()
        self.close()

    def _ask(self, message: dict[str, Any], limit_s: float) -> dict[str, Any]:
        stdin = self._process.stdin
        if stdin is None:
            raise ProtocolError(f"contender {self.name} was started without pipes")
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            # It ended before it was asked; what it said last is still in the pipe and read below.
            limit_s = min(limit_s, QUIT_S)
        answer = json.loads(self._line(message["do"], limit_s))
        if "error" in answer:
            raise ContenderError(
                f"contender {self.name} failed at {message['do']}: {answer['error']} (traceback in {self._log})",
                subject=self.name,
                trace=answer.get("trace", ""),
            )
        result: dict[str, Any] = answer["ok"]
        return result

    def _line(self, doing: str, limit_s: float) -> bytes:
        stdout = self._process.stdout
        if stdout is None:
            raise ProtocolError(f"contender {self.name} was started without pipes")
        deadline_s = self._clock.now_s() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline_s - self._clock.now_s())):
                    raise ContenderError(
                        f"contender {self.name} took longer than {limit_s:g} s at {doing}", subject=self.name
                    )
                read = os.read(stdout.fileno(), 65536)
                if not read:
                    code = self._process.wait()
                    raise ContenderError(
                        f"contender {self.name} ended with status {code} at {doing}; see {self._log}", subject=self.name
                    )
                self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _python_path(root: Path) -> str:
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(root), *([inherited] if inherited else [])])
