"""A process that answers one JSON line after another and may be killed at any moment: for what strangers wrote."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tenon.base.clock import Clock
from tenon.base.errors import ResourceError

_HELLO_BYTES: Final = 1 << 12


class LineWorker:
    """One worker process at a time, started when it is first needed. Used by one thread at a time.

    ``ask`` waits for the answer. ``send`` and ``receive`` are its halves, for who has something else to do meanwhile.
    Requests are numbered, answers repeat the number (``"number"``), and one to another request is never handed out: its
    worker is killed.
    """

    def __init__(
        self, what: str, program: str, arguments: Sequence[str] = (), *, hello: Mapping[str, Any], clock: Clock,
        keep: Sequence[int] = (), start_s: float = 60.0,
    ) -> None:  # fmt: skip
        """``program``: path of a Python file. ``hello``: what a new worker is asked first, to see that it lives; it has
        ``start_s`` to answer. ``keep``: descriptors that it inherits."""
        self._what, self._command = what, [sys.executable, "-P", program, *arguments]
        self._hello, self._clock, self._keep, self._start_s = hello, clock, tuple(keep), start_s
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = memoryview(b"")
        """What is still to be written."""
        self._reply = bytearray()
        self.n_started = 0
        """Processes so far: another number, another process, which knows nothing of what the one before was told."""
        self._number = 0
        """Of the last request."""
        self._greeting_until_s: float | None = None
        """Until when a worker that has not answered the hello may do so."""

    def begin(self) -> None:
        """Start the process if there is none, without waiting for it. Raises ``ResourceError``."""
        if self._process is None or self._process.poll() is not None:
            self.kill()
            self._start()

    def ask(self, request: Mapping[str, Any], wall_s: float, max_reply: int) -> dict[str, Any] | None:
        """The reply; ``None`` when the worker had to be killed or died. Raises ``ResourceError`` if none starts."""
        self.send(request)
        until_s = self._clock.now_s() + wall_s
        while (reply := self.receive(max(0.0, until_s - self._clock.now_s()), max_reply)) is None:
            if self._process is None:
                return None
            if self._greeting_until_s is not None:
                until_s = self._clock.now_s() + wall_s  # its time begins when the worker is there
            elif self._clock.now_s() >= until_s:
                self.kill()
                return None
        return reply

    def send(self, request: Mapping[str, Any]) -> None:
        """Begin to ask. Raises ``ResourceError`` if no worker can be started."""
        self.begin()
        self._number += 1
        line = json.dumps({**request, "number": self._number}).encode() + b"\n"
        self._rest = memoryview(bytes(self._rest) + line)

    def receive(self, wait_s: float, max_reply: int) -> dict[str, Any] | None:
        """The reply to what was sent, if it is there within ``wait_s``; ``None`` also where the worker has died, which
        ``is_alive`` tells. Raises ``ResourceError`` for one that does not start."""
        until_s = self._clock.now_s() + wait_s
        while self._process is not None:
            soon_s = until_s if self._greeting_until_s is None else min(until_s, self._greeting_until_s)
            alive = self._pump(max(0.0, soon_s - self._clock.now_s()))
            if self._greeting_until_s is not None:
                self._greet(alive)
            if not alive or len(self._reply) > max_reply:
                self.kill()
                return None
            if self._greeting_until_s is None and self._reply.endswith(b"\n"):
                answer: dict[str, Any] = json.loads(bytes(self._reply))
                self._reply.clear()
                if answer.pop("number") == self._number:
                    return answer
                self.kill()
                return None
            if self._clock.now_s() >= until_s:
                return None
        return None

    @property
    def is_alive(self) -> bool:
        return self._process is not None

    @property
    def is_starting(self) -> bool:
        """Whether it has still to answer the hello."""
        return self._greeting_until_s is not None

    def kill(self) -> None:
        """End the process, and its children with it; the next ``send`` or ``ask`` starts another."""
        if self._process is None:
            return
        process, self._process = self._process, None
        self._rest, self._greeting_until_s = memoryview(b""), None
        self._reply.clear()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={"LC_ALL": "C.UTF-8", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # an interrupt at the terminal is the parent's to handle
                pass_fds=self._keep,
            )
        except OSError as error:
            raise ResourceError(f"cannot start a {self._what}: {error.strerror or error}") from error
        self.n_started += 1
        self._rest = memoryview(json.dumps(self._hello).encode() + b"\n")
        self._greeting_until_s = self._clock.now_s() + self._start_s

    def _greet(self, alive: bool) -> None:
        """Look whether the worker has answered the hello. Raises ``ResourceError`` for one that has not in time, or
        says why it cannot."""
        why = None
        line, end, rest = bytes(self._reply).partition(b"\n")
        if end:
            reply, self._reply = json.loads(line), bytearray(rest)
            self._greeting_until_s = None
            if "refused" not in reply:
                return
            why = f"cannot start: {reply['refused']}"
        elif not alive or len(self._reply) > _HELLO_BYTES:
            why = "died at its start"
        elif self._greeting_until_s is not None and self._clock.now_s() >= self._greeting_until_s:
            why = f"took over {self._start_s:g} s to start"
        if why is not None:
            self.kill()
            raise ResourceError(f"a {self._what} {why}")

    def _pump(self, wait_s: float) -> bool:
        """Send and receive what goes at once, so that neither full pipe stops the other; returns when something came or
        could be written, or after ``wait_s``. False when the worker has died."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return False
        source, sink = process.stdout.fileno(), process.stdin.fileno()
        poll = select.poll()
        poll.register(source, select.POLLIN)
        if self._rest:
            poll.register(sink, select.POLLOUT)
        ready = dict(poll.poll(wait_s * 1000))
        if source in ready:
            piece = process.stdout.read(1 << 16)
            if not piece:
                return False
            self._reply += piece
        if sink in ready:
            try:
                self._rest = self._rest[process.stdin.write(self._rest[: select.PIPE_BUF]) :]
            except BrokenPipeError:
                return False
        return True
