"""The engine process: one engine behind one socket, ``python -m tenon.server.engine_host ...``.

The loop reads what has come, ticks, and sends one batch per step. With nothing to do it blocks on the socket. It
ends when the socket does, when its parent dies, after ``Drain``, or by ``Fatal``: the one case in which something
unexpected was raised.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from tenon.base.clock import SYSTEM, Clock
from tenon.base.errors import ConfigError, Overloaded, RequestError, TenonError
from tenon.engine import messages as m
from tenon.engine.config import EngineConfig
from tenon.server.peer import require_same_user
from tenon.server.pulse import Pulse

if TYPE_CHECKING:
    from tenon.engine.engine import Engine

STATS_EVERY_S: Final = 0.1
RESIDENCY_EVERY_S: Final = 1.0
TREES_EVERY_S: Final = 0.1
_READ_BYTES: Final = 1 << 18
_PR_SET_PDEATHSIG: Final = 1


class Wire:
    """The engine's end of the socket: frames in, batches out."""

    def __init__(self, sock: socket.socket, epoch: int) -> None:
        self._sock = sock
        self._epoch = epoch
        self._frames = m.Frames()
        self._buffer = memoryview(bytearray(_READ_BYTES))
        """One for all reads: a new one each time, cut to what came, would leave holes that nothing large fits in."""

    def receive(self, wait_s: float | None) -> list[m.ToEngine] | None:
        """All messages that have come, ``None`` when the other side is gone. Waits at most ``wait_s`` for the first of
        them, for ever if it is None.

        Raises ``ProtocolError``. Batches of another epoch are dropped: they were meant for a predecessor.
        """
        received: list[m.ToEngine] = []
        while select.select([self._sock], [], [], 0.0 if received else wait_s)[0]:
            n_bytes = self._sock.recv_into(self._buffer)
            if not n_bytes:
                return None
            for body in self._frames.feed(bytes(self._buffer[:n_bytes])):
                batch = m.decode_to_engine(body)
                if batch.epoch == self._epoch:
                    received.extend(batch.messages)
        return received

    def send(self, messages: Sequence[m.FromEngine]) -> None:
        if messages:
            self._sock.sendall(m.encode(m.ServerBatch(self._epoch, tuple(messages))))


class EngineHost:
    """Routes between the wire and the engine; knows neither models nor HTTP."""

    def __init__(self, engine: Engine, wire: Wire, clock: Clock) -> None:
        self._engine = engine
        self._engine.stop_kv_events()
        self._wire = wire
        self._clock = clock
        self._draining = False
        self._watch = m.Watch()
        self._looked_at = True
        """Whether the residency was sent as it is now."""
        self._residency_at_s = float("-inf")
        self._trees_at_s = float("-inf")
        self._stats_at_s = float("-inf")
        self._step = 0

    def run(self) -> None:
        """Serve until the other side closes or a drain is complete."""
        while True:
            received = self._wire.receive(0.0 if self._engine.has_work else self._rest_s())
            if received is None:
                return
            self._looked_at = self._looked_at and not received
            self._wire.send([reply for message in received if (reply := self._handle(message)) is not None])
            if self._engine.has_work:
                self._tick()
            elif received:
                self._send_kv_events()
                self._wire.send([*self._engine.take_ledgers(), self._stats(self._clock.now_s())])
            self._send_residency()
            self._send_trees()
            if self._draining and not self._engine.has_work:
                return

    def _tick(self) -> None:
        deltas = self._engine.tick(self._clock.now_s())
        now_s = self._clock.now_s()
        self._step += 1
        self._looked_at = False
        batch: list[m.FromEngine] = [*self._engine.take_misses()]
        batch += self._engine.take_prompt_scores()
        batch += self._engine.take_ledgers()  # before what their sequences end with
        batch += self._engine.take_embedded()
        batch.append(m.Outputs(self._step, tuple(deltas)))
        if now_s - self._stats_at_s >= STATS_EVERY_S or not self._engine.has_work:
            batch.append(self._stats(now_s))
        self._wire.send(batch)
        self._send_kv_events()

    def _send_kv_events(self) -> None:
        """All there are, a batch of bounded size after another."""
        while self._watch.kv and (events := self._engine.take_kv_events()).events:
            self._wire.send([events])

    def _rest_s(self) -> float | None:
        """How long to wait for messages with nothing to do: until the residency may be sent that has changed."""
        if self._looked_at or not self._watch.residency:
            return None
        return max(0.0, self._residency_at_s + RESIDENCY_EVERY_S - self._clock.now_s())

    def _send_residency(self) -> None:
        """If someone watches, something has changed, and not more often than it may be."""
        now_s = self._clock.now_s()
        if self._watch.residency and not self._looked_at and now_s >= self._residency_at_s + RESIDENCY_EVERY_S:
            self._looked_at, self._residency_at_s = True, now_s
            self._wire.send([self._engine.residency(now_s)])

    def _send_trees(self) -> None:
        """If someone watches and there are any, and not more often than they may be while the engine works."""
        if not self._watch.trees:
            return
        now_s = self._clock.now_s()
        if self._engine.has_work and now_s < self._trees_at_s + TREES_EVERY_S:
            return
        if (found := self._engine.take_trees()).trees:
            self._trees_at_s = now_s
            self._wire.send([found])

    def _stats(self, now_s: float) -> m.Stats:
        self._stats_at_s = now_s
        return self._engine.stats(now_s)

    def _handle(self, message: m.ToEngine) -> m.FromEngine | None:
        match message:
            case m.Add():
                try:
                    return self._engine.add(message)
                except RequestError as error:
                    return rejection(message.request_id, error)
            case m.Estimate():
                return self._estimated(message.add)
            case m.Abort():
                self._engine.abort(message.request_id, message.index)
            case m.Reset():
                self._engine.reset()
            case m.Forget():
                self._engine.forget_idle()
            case m.Expect():
                self._engine.expect_grammars()
            case m.Watch():
                self._watch = message
                self._engine.watch_victims(message.victims)
                if message.kv:
                    self._engine.restart_kv_events()
                else:
                    self._engine.stop_kv_events()
                if message.trees:
                    self._engine.restart_trees()
            case m.Drain():
                self._draining = True
                self._engine.drain()
            case m.LoadWeights():
                self._engine.load_weights(message.path, message.version)
        return None

    def _estimated(self, add: m.Add) -> m.Estimated:
        try:
            forecast, refused = self._engine.estimate(add), None
        except RequestError as error:
            forecast, refused = None, rejection(add.request_id, error)
        scheduler = self._engine.scheduler
        return m.Estimated(add.request_id, forecast, refused, len(scheduler.running), len(scheduler.waiting))


def rejection(request_id: str, error: RequestError) -> m.Rejected:
    """The message for one request that cannot be served, with the HTTP status that fits."""
    status, retry_after_s = 400, None
    if isinstance(error, Overloaded):
        status, retry_after_s = 429, error.retry_after_s
    elif error.code == "draining":
        status = 503
    return m.Rejected(request_id, str(error), status, error.code, error.param, retry_after_s)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies; ends it now if that has happened already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        sys.exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tenon.server.engine_host", description="The engine process of `tenon serve`."
    )
    parser.add_argument("--socket", required=True, help="path of the server's Unix socket")
    parser.add_argument("--epoch", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="process id of the server")
    parser.add_argument("--pulse", type=int, required=True, help="descriptor of the memory in which it counts")
    parser.add_argument("--config", required=True, help="an EngineConfig as JSON")
    args = parser.parse_args(argv)
    die_with_parent(args.parent)
    Pulse(args.pulse).beat()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(args.socket)
        require_same_user(sock)
        wire = Wire(sock, args.epoch)
        try:
            _serve(wire, msgspec.json.decode(args.config, type=EngineConfig))
        except (BrokenPipeError, ConnectionResetError):
            return 1  # the server is gone: there is nobody left to tell
        except TenonError as error:
            wire.send([m.Fatal(str(error), "" if isinstance(error, ConfigError) else traceback.format_exc())])
            return 1
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else "no message"
            wire.send([m.Fatal(f"the engine stopped on {type(error).__name__}: {said}", traceback.format_exc())])
            return 1
    return 0


def _serve(wire: Wire, config: EngineConfig) -> None:
    wire.send([m.Phase("engine", 0.0, "starting the engine process")])
    from tenon.engine.build import build_engine

    def on_phase(name: str, fraction: float, detail: str) -> None:
        wire.send([m.Phase(name, fraction, detail)])

    engine = build_engine(config, on_phase)
    try:
        wire.send([engine.ready(), engine.stats(SYSTEM.now_s())])
        EngineHost(engine, wire, SYSTEM).run()
    finally:
        engine.close()


if __name__ == "__main__":
    sys.exit(main())
