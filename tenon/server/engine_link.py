"""The HTTP process's end of the engine: spawns the process, sends messages, hands on what comes back.

The socket lies in a folder that only this user can enter, and the peer's user is checked. The engine's end, however
it comes about, is reported once, as one sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from tenon.base.errors import ProtocolError
from tenon.engine import messages as m
from tenon.engine.config import EngineConfig
from tenon.server.peer import require_same_user
from tenon.server.pulse import Pulse

_READ_BYTES: Final = 1 << 18
_EXIT_WAIT_S: Final = 3.0


class EngineLink:
    """One engine process of one epoch.

    ``on_message`` gets each message in order; ``on_death(message, trace)`` is called once if the engine ends without
    having been asked to.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        epoch: int,
        on_message: Callable[[m.FromEngine], None],
        on_death: Callable[[str, str], None],
    ) -> None:
        self._config = config
        self._epoch = epoch
        self._on_message = on_message
        self._on_death = on_death
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._closing = False
        self._pulse = Pulse()
        self._killed_because = ""
        self._pending: list[m.ToEngine] = []
        self._flush_scheduled = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Spawn the process and wait until it has connected; loading goes on behind ``on_message``."""
        folder = Path(tempfile.mkdtemp(prefix="tenon-"))  # mode 0700
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                path = str(folder / "engine.sock")
                listener.bind(path)
                listener.listen(1)
                listener.setblocking(False)
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "tenon.server.engine_host", "--socket", path, "--epoch", str(self._epoch),
                    "--parent", str(os.getpid()), "--config", msgspec.json.encode(self._config).decode(),
                    "--pulse", str(self._pulse.fd), stdin=asyncio.subprocess.DEVNULL, process_group=0,
                    pass_fds=(self._pulse.fd,),
                )  # fmt: skip
                connected = await self._accept(listener)
        except OSError:
            self._closing = True
            self._pulse.close()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if connected is None:
            await self._report_death()
            return
        require_same_user(connected)
        reader, self._writer = await asyncio.open_unix_connection(sock=connected)
        self._reader_task = asyncio.create_task(self._read(reader))

    async def _accept(self, listener: socket.socket) -> socket.socket | None:
        """The engine's connection, or ``None`` if the process ends before it connects."""
        process = self._process
        if process is None:
            return None
        accept = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(listener))
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait({accept, ended}, return_when=asyncio.FIRST_COMPLETED)
            return accept.result()[0] if accept.done() else None
        finally:
            for task in (accept, ended):
                task.cancel()

    def send(self, message: m.ToEngine) -> None:
        """Queue a message; all messages of one turn of the event loop travel in one batch."""
        self._pending.append(message)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        pending, self._pending = self._pending, []
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(m.encode(m.EngineBatch(self._epoch, tuple(pending))))

    async def close(self) -> None:
        """End the process: the socket closes, which it takes as the end; killed if it does not go."""
        if not self._closing:
            self._pulse.close()
        self._closing = True
        self._flush()
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), _EXIT_WAIT_S)
            except TimeoutError:
                self.kill()
                await self._process.wait()
        if self._reader_task is not None:
            await asyncio.wait({self._reader_task})

    @property
    def beats(self) -> int:
        """The engine's pulse: grows while its process runs, from when it has begun to."""
        return 0 if self._closing else self._pulse.count()

    def kill(self, because: str = "") -> None:
        """SIGKILL, now; ``because`` is what its death is reported as. Does nothing where there is no process."""
        if self._process is not None and self._process.returncode is None:
            self._killed_because = because
            self._process.kill()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        frames = m.Frames()
        fatal: m.Fatal | None = None
        try:
            while data := await reader.read(_READ_BYTES):
                for body in frames.feed(data):
                    batch = m.decode_from_engine(body)
                    if batch.epoch != self._epoch:
                        continue
                    for message in batch.messages:
                        if isinstance(message, m.Fatal):
                            fatal = message
                        else:
                            self._on_message(message)
        except ProtocolError as error:
            self.kill()
            fatal = m.Fatal(f"the engine sent {error}")
        except OSError as error:
            fatal = m.Fatal(f"the connection to the engine broke: {error.strerror or error}")
        except Exception as error:  # a bug on this side: as fatal as one on the other, and never silent
            self.kill()
            fatal = m.Fatal(f"the server failed on a message of the engine: {error!r}", traceback.format_exc())
        await self._report_death(fatal)

    async def _report_death(self, fatal: m.Fatal | None = None) -> None:
        if self._closing or self._process is None:
            return
        self._closing = True
        self._pulse.close()
        if self._writer is not None:
            self._writer.close()
        if fatal is None and self._killed_because:
            fatal = m.Fatal(self._killed_because)
        if fatal is None:
            try:
                code = await asyncio.wait_for(self._process.wait(), _EXIT_WAIT_S)
                how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            except TimeoutError:
                self.kill()
                how = "closed its connection"
            fatal = m.Fatal(f"the engine process (pid {self._process.pid}) {how}")
        self._on_death(fatal.message, fatal.trace)
