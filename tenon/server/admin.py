"""The admin side: a listener of its own that public clients cannot reach, with routes that are nowhere else.

GET  /livez            the process and what watches the engine are alive
GET  /readyz           as the public one; 503 also while the main loop stands still
GET  /metrics, /state  Prometheus text; everything about the server's state as JSON
POST /drain            as SIGTERM, but asking again changes nothing
POST /reload           key file and config file again, both or neither
POST /restart-engine   end the engine; the next one takes over what is in flight
POST /forget-cache     the engine forgets what is cached and held by no request

It runs in a thread with an event loop of its own. Probes read plain attributes, so they answer whatever the main loop
does; all else is done on the main loop, or refused if that does not come to it in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Final, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tenon.base.errors import ConfigError, ResourceError, TenonError
from tenon.server.app import Doorman
from tenon.server.failures import Refusal, body_of, status_of
from tenon.server.flights import Flight
from tenon.server.limits import Limits, error_body, guarded_protocol
from tenon.server.metrics import CONTENT_TYPE
from tenon.server.service import Service
from tenon.server.storage_api import Json
from tenon.server.supervisor import Supervisor

DEADLINE_S: Final = 2.0
"""How long the main loop may take to come to what it is asked."""
TURN_EVERY_S: Final = 0.25
MAX_CONNECTIONS: Final = 64
_CLOSE_S: Final = 5.0
_T = TypeVar("_T")

_log = logging.getLogger("tenon.server")


@dataclass(frozen=True)
class Controls:
    """What there is to administer. All are called on the main loop, save ``supervisor``."""

    service: Service
    supervisor: Callable[[], Supervisor | None]
    config: Callable[[], dict[str, Any]]
    """What is in effect, without secrets."""
    drain: Callable[[], None]
    reload: Callable[[], dict[str, Any]]
    """What it changed. Raises ``ConfigError``; then nothing has changed."""


class Door:
    """Where the admin side listens: a Unix socket that only this user can open, or a port on 127.0.0.1.

    Raises ``ConfigError`` for an address that is neither, ``ResourceError`` saying what is in the way.
    """

    def __init__(self, address: str) -> None:
        self.is_unix = not address.isdecimal()
        self._made: tuple[int, int] | None = None
        self._path = Path(address)
        self.socket = self._unix() if self.is_unix else _tcp(address)

    def _unix(self) -> socket.socket:
        path = self._path
        if not path.parent.is_dir():
            raise ResourceError(f"admin socket {path}: there is no folder {path.parent}", subject="admin")
        _clear(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)  # from its first moment on nobody else may open it
        try:
            sock.bind(str(path))
            sock.listen(128)
        except OSError as error:
            sock.close()
            raise ResourceError(f"admin socket {path} cannot be made: {error.strerror or error}") from error
        finally:
            os.umask(before)
        self._made = _identity(path)
        return sock

    def close(self) -> None:
        """Stop listening; a Unix socket's file goes, unless another server has made it its own."""
        self.socket.close()
        if self._made is not None and self._made == _identity(self._path):
            self._path.unlink(missing_ok=True)


def _tcp(address: str) -> socket.socket:
    port = int(address)
    if not 1 <= port <= 65535:
        raise ConfigError(f"admin must be a path or a port from 1 to 65535, got {address}", subject="admin")
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        said = f"admin port {port} on 127.0.0.1 cannot be used ({error.strerror}); choose another with --admin"
        raise ResourceError(said, subject="admin") from error
    return sock


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat(follow_symlinks=False)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _clear(path: Path) -> None:
    """Remove a socket that nobody listens at any more. Raises ``ResourceError`` for whatever else is there."""
    try:
        mode = path.stat(follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ResourceError(f"admin socket {path} cannot be made: {error.strerror}", subject="admin") from error
    if not stat.S_ISSOCK(mode):
        raise ResourceError(f"admin socket {path}: something that is no socket is there", subject="admin")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ResourceError(f"admin socket {path} cannot be replaced: {error.strerror or error}") from error
    raise ResourceError(f"admin socket {path} belongs to a server that runs; choose another with --admin")


class Admin:
    """The listener's thread, from ``start`` to ``close``, both on the main loop."""

    def __init__(self, controls: Controls, door: Door) -> None:
        self._controls, self._service, self._door = controls, controls.service, door
        self._main = asyncio.get_running_loop()
        self._clock = controls.service.clock
        self._turned_s = self._clock.now_s()
        """When the main loop last came round."""
        self._turning: asyncio.Task[None] | None = None
        self._http = uvicorn.Server(
            uvicorn.Config(
                self._app(), http=guarded_protocol(Limits()), ws="none", lifespan="off", log_config=None,
                access_log=False, server_header=False, timeout_graceful_shutdown=1, limit_concurrency=MAX_CONNECTIONS,
            )
        )  # fmt: skip
        self._thread = Thread(target=self._run, name="admin", daemon=True)

    def start(self) -> None:
        self._turning = asyncio.create_task(self._turn())
        self._thread.start()

    async def close(self) -> None:
        self._http.should_exit = True
        await asyncio.to_thread(self._thread.join, _CLOSE_S)
        if self._turning is not None:
            self._turning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._turning

    def _run(self) -> None:
        asyncio.run(self._http.serve(sockets=[self._door.socket]))

    async def _turn(self) -> None:
        while True:
            self._turned_s = self._clock.now_s()
            await asyncio.sleep(TURN_EVERY_S)

    def _app(self) -> Starlette:
        get, post = ["GET"], ["POST"]
        doorman = Middleware(Doorman, loopback_only=not self._door.is_unix, keys=None, clock=self._clock)
        return Starlette(
            routes=[
                Route("/livez", self.livez, methods=get),
                Route("/readyz", self.readyz, methods=get),
                Route("/metrics", self.metrics, methods=get),
                Route("/state", self.state, methods=get),
                Route("/drain", self.drain, methods=post),
                Route("/reload", self.reload, methods=post),
                Route("/restart-engine", self.restart_engine, methods=post),
                Route("/forget-cache", self.forget_cache, methods=post),
            ],
            middleware=[doorman],
            exception_handlers={HTTPException: _failed, TenonError: _failed, Exception: _failed},
        )

    # Read in this thread.

    async def livez(self, request: Request) -> Response:
        supervisor = self._controls.supervisor()
        if supervisor is not None and not supervisor.is_watching:
            return Json({"status": "dead", "reason": "nothing watches the engine any more"}, status_code=503)
        return Json({"status": "alive", "main_loop_silent_s": self._silent_s()})

    async def readyz(self, request: Request) -> Response:
        reason, silent_s = self._service.unready_because(), self._silent_s()
        if reason is None and silent_s > self._service.limits.stall_s:
            reason = f"the main loop has stood still for {silent_s:.0f} s"
        if reason is None:
            return Json({"status": "ready"})
        return Json({"status": str(self._service.state), "reason": reason, "phase": self._phase()}, status_code=503)

    def _silent_s(self) -> float:
        return round(max(0.0, self._clock.now_s() - self._turned_s), 3)

    def _phase(self) -> dict[str, Any]:
        phase = self._service.phase
        return {"name": phase.name, "fraction": phase.fraction, "detail": phase.detail}

    # Done by the main loop.

    async def metrics(self, request: Request) -> Response:
        text = await self._on_main(self._service.exposition)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def state(self, request: Request) -> Response:
        return Json(await self._on_main(self._state))

    def _state(self) -> dict[str, Any]:
        service, supervisor = self._service, self._controls.supervisor()
        return {
            "state": service.state,
            "reason": service.reason,
            "model": service.model,
            "phase": self._phase(),
            "engine": supervisor.engine() if supervisor is not None else None,
            "in_flight": in_flight(service.flights),
            "limits": asdict(service.limits),
            "config": self._controls.config(),
        }

    async def drain(self, request: Request) -> Response:
        _log.warning("an administrator drains the server")
        await self._on_main(self._controls.drain)
        return Json({"status": "draining"}, status_code=202)

    async def reload(self, request: Request) -> Response:
        try:
            return Json({"changed": await self._on_main(self._controls.reload)})
        except ConfigError as error:
            raise Refusal(str(error), status=400, code="bad_config", param=error.subject) from error

    async def restart_engine(self, request: Request) -> Response:
        ended = await self._on_main(lambda: self._supervisor().restart())
        return Json({"ended": ended}, status_code=202)

    async def forget_cache(self, request: Request) -> Response:
        await self._on_main(lambda: self._supervisor().forget())
        return Json({"status": "the engine was told"}, status_code=202)

    def _supervisor(self) -> Supervisor:
        supervisor = self._controls.supervisor()
        if supervisor is None:
            raise Refusal(f"there is no engine: {self._service.reason}", status=409, code="no_engine")
        return supervisor

    async def _on_main(self, call: Callable[[], _T]) -> _T:
        """What ``call`` returns on the main loop. Raises ``Refusal`` (503) where that does not come to it in time; then
        it will not be called any more, unless it is being called just then."""
        done: Future[_T] = Future()

        def work() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(call())
            except Exception as error:
                done.set_exception(error)

        try:
            self._main.call_soon_threadsafe(work)
        except RuntimeError as error:  # its loop is closed
            raise Refusal("the server has ended", status=503, code="ended") from error
        waited = asyncio.wrap_future(done)
        await asyncio.wait({waited}, timeout=DEADLINE_S)
        if waited.done():
            return waited.result()
        so = "nothing was done" if done.cancel() else "it may still be done"
        said = f"the server's main loop did not answer within {DEADLINE_S:g} s; {so}"
        raise Refusal(said, status=503, code="main_loop_busy", retry_after_s=DEADLINE_S)


def in_flight(flights: Iterable[Flight]) -> dict[str, dict[str, int]]:
    """Requests of each tenant ("" where there are no keys) by state: "sent" to the engine, "waiting" there for its
    turn, "running" once it has got a token."""
    counts: dict[str, Counter[str]] = {}
    for flight in flights:
        state = "running" if flight.first_s is not None else "waiting" if flight.accepted else "sent"
        counts.setdefault(flight.caller.tenant, Counter(sent=0, waiting=0, running=0))[state] += 1
    return {tenant: dict(states) for tenant, states in counts.items()}


async def _failed(request: Request, error: Exception) -> Response:
    """Every failure's answer."""
    if isinstance(error, HTTPException):
        said = {404: f"there is nothing at {request.scope['path']}", 405: f"{request.method} is not allowed here"}
        return Json(error_body(said.get(error.status_code, error.detail)), status_code=error.status_code)
    if isinstance(error, TenonError):
        return Json(body_of(error), status_code=status_of(error))
    return Json(error_body("the server failed on this request", kind="server_error"), status_code=500)
