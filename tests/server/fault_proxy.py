"""An engine behind a bad line: stands in for the Python that the server starts its engines with.

The real engine is started, and its socket is led through a proxy that does to each epoch what the file named in
``TENON_FAULTS`` says: ``{"1": {...}, "2": {...}}``, one ``Fault`` each; other epochs have a good line. Whatever else
is started by this Python runs as it would.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

ENGINE: Final = "tenon.server.engine_host"
LOOK_S: Final = 0.005


@dataclass(frozen=True)
class Fault:
    """``at``: bytes of the engine's that pass before it happens; None: it never does.

    ``end``: "cut" closes both sides, "half" the server's alone while the engine lives on, "reset" the server's with
    what it has sent still unread, "garbage" puts bytes between, "stall" holds everything back for ``stall_s``.
    """

    end: str = "cut"
    at: int | None = None
    delay_s: float = 0.0
    """Each piece, both ways, comes so much later."""
    shred: bool = False
    """Pieces are of one to nine bytes."""
    stall_s: float = 0.0


class Line:
    """One connection led through: two pumps, and what is done to them."""

    def __init__(self, fault: Fault, server: socket.socket, engine: socket.socket) -> None:
        self.fault, self.server, self.engine = fault, server, engine
        self._loop = asyncio.get_running_loop()
        self._random = random.Random(0)
        self._passed = 0
        self._open = asyncio.Event()
        self._open.set()
        self._deaf = self._happened = False

    async def run(self) -> None:
        """Until either side closes, or the fault does it."""
        pumps = {asyncio.ensure_future(self._down()), asyncio.ensure_future(self._up())}
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        self.server.close()
        if self.fault.end == "half" and self._happened:
            await asyncio.Event().wait()  # the engine stays, and so does this process, until it is killed
        self.engine.close()

    async def _up(self) -> None:
        """From the server to the engine."""
        while True:
            while self._deaf:
                if _waits(self.server):
                    return
                await asyncio.sleep(LOOK_S)
            data = await self._loop.sock_recv(self.server, 1 << 16)
            if not data:
                return
            await self._send(self.engine, data)

    async def _down(self) -> None:
        """From the engine to the server."""
        while data := await self._loop.sock_recv(self.engine, 1 << 16):
            if self._happened or self.fault.at is None or self._passed + len(data) < self.fault.at:
                await self._send(self.server, data)
                self._passed += len(data)
                continue
            self._happened = True
            before = self.fault.at - self._passed
            await self._send(self.server, data[:before])
            self._passed += before
            match self.fault.end:
                case "garbage":
                    await self._send(self.server, b"\xff" * 8)
                case "stall":
                    self._open.clear()
                    self._loop.call_later(self.fault.stall_s, self._open.set)
                case "reset":
                    self._deaf = True
                case _:
                    return
            await self._send(self.server, data[before:])
            self._passed += len(data)

    async def _send(self, to: socket.socket, data: bytes) -> None:
        while data:
            n = self._random.randint(1, 9) if self.fault.shred else len(data)
            await self._open.wait()
            await self._loop.sock_sendall(to, data[:n])
            data = data[n:]
        if self.fault.delay_s:
            await asyncio.sleep(self._random.random() * 2 * self.fault.delay_s)


def _waits(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


async def lead(words: list[str], fault: Fault) -> int:
    """Start the engine with these words, its socket led through; its exit status."""

    def option(name: str) -> str:
        return words[words.index(name) + 1]

    with tempfile.TemporaryDirectory(prefix="faults-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(folder) / "engine.sock")
        listener.bind(path)
        listener.listen(1)
        listener.setblocking(False)
        server = socket.socket(socket.AF_UNIX)
        server.connect(option("--socket"))
        server.setblocking(False)
        words = list(words)
        words[words.index("--socket") + 1] = path
        words[words.index("--parent") + 1] = str(os.getpid())
        process = await asyncio.create_subprocess_exec(sys.executable, *words, pass_fds=(int(option("--pulse")),))
        engine, _ = await asyncio.get_running_loop().sock_accept(listener)
    await Line(fault, server, engine).run()
    return await process.wait()


def main() -> None:
    words = sys.argv[1:]
    if ENGINE not in words:
        os.execv(sys.executable, [sys.executable, *words])  # noqa: S606 - there is no shell to be wanted
    faults = json.loads(Path(os.environ["TENON_FAULTS"]).read_text())
    fault = Fault(**faults.get(words[words.index("--epoch") + 1], {}))
    status = asyncio.run(lead(words, fault))
    sys.exit(status if status >= 0 else 1)


def python_behind(faults: dict[int, Fault], folder: Path) -> tuple[Path, Path]:
    """An executable to be used as the server's Python, and the file for ``TENON_FAULTS``."""
    program, told = folder / "python", folder / "faults.json"
    program.write_text(f"#!{sys.executable}\nfrom tests.server.fault_proxy import main\nmain()\n")
    program.chmod(0o755)
    told.write_text(json.dumps({epoch: asdict(fault) for epoch, fault in faults.items()}))
    return program, told
