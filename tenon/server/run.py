"""One server from start to end: socket, engine process, signals, drain.

loading --> ready --> draining --> exit 0          SIGTERM or SIGINT; a second one exits at once
   |         ^ |
   |         | +--> restarting --+                 the engine ended: the next one takes over what is in flight
   |         +-------------------+
   +--> dead --> exit 1                            no engine has ever served
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Final, Protocol

import uvicorn

from tenon.base.clock import SYSTEM
from tenon.base.errors import ConfigError, ResourceError, TenonError
from tenon.base.files import state_folder
from tenon.engine import messages as m
from tenon.engine.config import EngineConfig
from tenon.engine.promises import Slo
from tenon.models.hub import resolve
from tenon.server.admin import Admin, Controls, Door
from tenon.server.admission import MemoryWatch
from tenon.server.app import build_app
from tenon.server.batches import Batches
from tenon.server.completions import Completions
from tenon.server.events import EventHub
from tenon.server.failures import Refusal
from tenon.server.files import Store
from tenon.server.keys import Caller, KeyRing, read_keys
from tenon.server.limits import Limits, guarded_protocol
from tenon.server.listener import Listener
from tenon.server.logs import FORMATS, LEVELS, Log, log_request
from tenon.server.model_text import load_model_text
from tenon.server.service import Service, State
from tenon.server.settings import Settings, changes, read_settings
from tenon.server.slo import Objectives
from tenon.server.supervisor import Supervisor

if TYPE_CHECKING:
    from tenon.server.tracing import Tracer

LAST_WORDS_S: Final = 2.0
"""How long answers to broken or cut requests may take to leave."""

_log = logging.getLogger("tenon.server")


@dataclass(frozen=True)
class ServeConfig:
    """One server. ``keys`` is a file (:mod:`tenon.server.keys`); without one, ``allow_remote`` must be said to listen
    beyond loopback, for whoever reaches the port may use the model. ``admin`` is a Unix socket's path or a port
    (:mod:`tenon.server.admin`), ``config_file`` has what can change later (:mod:`tenon.server.settings`). Raises
    ``ConfigError`` naming the field.
    """

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 8000
    allow_remote: bool = False
    keys: Path | None = None
    admin: str | None = None
    config_file: Path | None = None
    served_name: str | None = None
    drain_s: float = 30.0
    record_folder: Path | None = None
    log_format: str = "text"
    log_level: str | None = None
    """``info``, ``warning`` or ``error``; by default warnings as text, all as JSON."""
    traces: str | None = None
    """URL of an OpenTelemetry collector that spans are sent to (:mod:`tenon.server.tracing`)."""
    store: Path | None = None
    """Where files and batches are kept; by default in the state folder, unless another server keeps its there."""
    keeps_files: bool = True
    classes: Mapping[str, Slo] = field(default_factory=dict)
    """What is promised by class (:mod:`tenon.server.slo`)."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 (any free one) to 65535, got {self.port}", subject="port")
        if self.drain_s < 0:
            raise ConfigError(f"drain_s must be at least 0, got {self.drain_s}", subject="drain_s")
        for name, value, known in (("log_format", self.log_format, FORMATS), ("log_level", self.log_level, LEVELS)):
            if value not in known and value is not None:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}", subject=name)
        if self.traces is not None and not self.traces.startswith(("http://", "https://")):
            said = f"traces must be a URL like http://127.0.0.1:4318/v1/traces, got {self.traces!r}"
            raise ConfigError(said, subject="traces")
        if self.limits.replays < 0:
            raise ConfigError(f"replays must be at least 0, got {self.limits.replays}", subject="replays")
        if not self.limits.max_wait_s > 0:
            raise ConfigError(f"max_wait_s must be above 0, got {self.limits.max_wait_s}", subject="max_wait_s")
        if not self.allow_remote and self.keys is None and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host} is reachable from other machines and there are no keys: whoever reaches the port "
                f"can use the model; give --keys FILE, or add --allow-remote if that is meant",
                subject="host",
            )

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        if self.served_name is not None:
            return self.served_name
        path = Path(self.engine.model).expanduser()
        return path.resolve().name if path.is_dir() else self.engine.model


_OPTIONS: Final = frozenset(option.name for option in fields(ServeConfig))


class Console(Protocol):
    """Where a person watches the server start and end."""

    def phase(self, name: str, fraction: float, detail: str) -> None: ...

    def ready(self, url: str, model: str, ready: m.Ready) -> None: ...

    def draining(self, n_running: int, drain_s: float) -> None: ...

    def failed(self, message: str, trace: str) -> None: ...


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name counts as loopback if it is ``localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ``ResourceError`` saying what is in the way."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # TCP is named, for asyncio sends small pieces at once (TCP_NODELAY) only where it knows that it is TCP: 40 ms each.
    sock = Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        if isinstance(error, socket.gaierror):
            raise ResourceError(f"host {host!r} is no address of this machine", subject="host") from error
        reason = "is taken" if error.errno == 98 else f"cannot be used ({error.strerror})"
        raise ResourceError(f"port {port} on {host} {reason}; choose another with --port", subject="port") from error
    return sock


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handling: draining is decided here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """The parts of one running server and the order in which they start and end."""

    def __init__(self, config: ServeConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._base = Settings(config.limits, config.drain_s)
        self._settings = (
            self._base if config.config_file is None else read_settings(config.config_file, self._base, _OPTIONS)
        )
        limits = self._settings.limits
        folder = None
        if config.record_folder is not None:
            folder = config.record_folder / f"serve-{int(SYSTEM.wall_s())}-{os.getpid()}"
        self._events = EventHub(SYSTEM, bound=limits.queued_events, record_folder=folder)
        self._service = Service(model=config.model_name, limits=limits, clock=SYSTEM, events=self._events)
        self._service.on_end.append(log_request)
        self._tracer = _tracer(config.traces, config.model_name) if config.traces is not None else None
        if self._tracer is not None:
            self._service.on_end.append(self._tracer)
        self._completions = Completions(self._service, Objectives(config.classes))
        self._supervisor: Supervisor | None = None
        self._stop = asyncio.Event()
        self._signalled = False
        self._death: tuple[str, str] | None = None
        self._keys = None
        if config.keys is not None:
            self._keys = KeyRing(config.keys, SYSTEM)
            self._completions.objectives.check_keys(self._keys.keys)
        self._anybody = Caller(None, SYSTEM)
        self._batches, no_store = _batches(config, self._service, self._caller_of)
        app = build_app(
            self._service, self._completions, loopback_only=is_loopback(config.host), keys=self._keys,
            batches=self._batches, no_store=no_store,
        )  # fmt: skip
        self._protocol = guarded_protocol(limits)
        self._http = _HttpServer(
            uvicorn.Config(
                app, http=self._protocol, ws="none", lifespan="off", log_config=None, access_log=False,
                server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=int(LAST_WORDS_S),
                limit_concurrency=limits.max_connections,
            )
        )  # fmt: skip

    async def run(self, sock: socket.socket, door: Door | None = None) -> int:
        """Serve until told to stop or the engine ends; the exit status. ``door``: where administrators come in."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        controls = Controls(self._service, lambda: self._supervisor, self._in_effect, self._stop.set, self._reload)
        admin = Admin(controls, door) if door is not None else None
        if admin is not None:
            admin.start()
        serving = asyncio.create_task(self._http.serve(sockets=[sock]))
        loading = asyncio.create_task(self._load(_url(self._config.host, sock)))
        if self._batches is not None:
            self._batches.start()
        watching = asyncio.create_task(MemoryWatch(self._service.admission, self._drop).run())
        try:
            await self._stop.wait()
            if self._death is None:
                await self._drain()
        finally:
            loading.cancel()
            watching.cancel()
            if self._batches is not None:
                await self._batches.close()
            self._service.close()
            self._http.should_exit = True
            await serving
            if self._supervisor is not None:
                await self._supervisor.close()
            if self._completions.model_text is not None:
                self._completions.model_text.close()
            if admin is not None:
                await admin.close()
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)
        if self._death is None:
            return 0
        self._console.failed(*self._death)
        return 1

    def stop(self) -> None:
        """As SIGTERM does."""
        self._stop.set()

    def _caller_of(self, key: str | None) -> Caller | None:
        """Who has the key of this name; anybody (None) where there are no keys."""
        if self._keys is None:
            return self._anybody if key is None else None
        return None if key is None else self._keys.named(key)

    async def _load(self, url: str) -> None:
        """Find the model, read its text side, start the engine; tell when it is ready."""
        try:
            self._on_message(m.Phase("model", 0.0, self._config.engine.model))
            folder = await _abandonable(partial(resolve, self._config.engine.model))
            self._supervisor = Supervisor(
                replace(self._config.engine, model=str(folder)),
                self._service,
                clock=SYSTEM,
                on_message=self._on_message,
                on_failure=self._on_failure,
            )
            await self._supervisor.start()
            self._completions.model_text = text = await asyncio.to_thread(load_model_text, folder)
            self._service.text_loaded(text.token_text)
        except TenonError as error:
            self._on_failure(str(error), "")
            return
        except OSError as error:
            self._on_failure(f"the engine cannot be started: {error.strerror or error}", "")
            return
        await self._service.settled.wait()
        if self._service.ready is not None and self._death is None:
            self._console.ready(url, self._config.model_name, self._service.ready)

    def _drop(self) -> None:
        """What is kept for later goes: memory is short."""
        if self._completions.model_text is not None:
            self._completions.model_text.grammars.forget()

    async def _drain(self) -> None:
        self._service.drain()
        drain_s = self._settings.drain_s
        self._console.draining(self._service.n_running, drain_s)
        try:
            await asyncio.wait_for(self._service.idle(), drain_s)
        except TimeoutError:
            _log.warning("%d requests did not finish within %g s", self._service.n_running, drain_s)
            self._service.abort_all(Refusal("the server is shutting down", status=503, code="draining"))

    def _on_message(self, message: m.FromEngine) -> None:
        if isinstance(message, m.Phase) and self._service.state is State.LOADING:  # a later engine's are events alone
            self._console.phase(message.name, message.fraction, message.detail)
        self._service.receive(message)

    def _on_failure(self, message: str, trace: str) -> None:
        if self._death is None:
            self._death = (message, trace)
            self._service.engine_died(message)
            self._stop.set()

    def _reload(self) -> dict[str, Any]:
        """Key file and config file again, both or neither; what has changed. Raises ``ConfigError``: nothing has.

        It reads and changes in one go, so that of two reloads the later one's files are what stays.
        """
        if self._keys is None and self._config.config_file is None:
            raise ConfigError("there is nothing to reload: the server was given neither --keys nor --config")
        settings, changed = self._settings, dict[str, Any]()
        if self._config.config_file is not None:
            settings = read_settings(self._config.config_file, self._base, _OPTIONS)
            changed["config"] = changes(self._settings, settings)
        if self._keys is not None:
            keys = read_keys(self._keys.path)
            self._completions.objectives.check_keys(keys)
            changed["keys"] = self._keys.use(keys)
        self._settings = settings
        self._service.admission.limits = self._protocol.limits = settings.limits
        self._events.bound = settings.limits.queued_events
        _log.info("reloaded: %s", changed)
        return changed

    def _on_hangup(self) -> None:
        try:
            self._reload()
        except ConfigError as error:
            _log.error("nothing is reloaded: %s", error)

    def _in_effect(self) -> dict[str, Any]:
        """The configuration that administrators see: names of keys, never keys."""
        shown = asdict(self._config) | {"drain_s": self._settings.drain_s, "key_names": None}
        del shown["limits"]  # told by themselves, as they are now
        if self._keys is not None:
            shown["key_names"] = self._keys.names
        return {name: str(value) if isinstance(value, Path) else value for name, value in shown.items()}

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._signalled and self._death is None:  # the first one, also after an administrator's drain
            self._signalled = True
            self._stop.set()
            return
        if self._supervisor is not None:
            self._supervisor.kill()
        os._exit(128 + number)


async def _abandonable(call: Callable[[], Path]) -> Path:
    """``call`` in a daemon thread: unlike the executor's, it does not keep the process from ending, and a download may
    take hours."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Path] = loop.create_future()

    def settle(result: Path | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    def work() -> None:
        try:
            outcome: tuple[Path | None, BaseException | None] = (call(), None)
        except BaseException as error:
            outcome = (None, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *outcome)

    Thread(target=work, name="resolve", daemon=True).start()
    return await future


def _batches(
    config: ServeConfig, service: Service, caller_of: Callable[[str | None], Caller | None]
) -> tuple[Batches | None, str]:
    """What is stored, or why nothing is. Raises ``ResourceError`` where the folder that was named cannot be had."""
    if not config.keeps_files:
        return None, "it answers one batch alone"
    try:
        folder = config.store or state_folder() / "store"
        return Batches(Store(folder, config.limits, SYSTEM), service, config.limits, SYSTEM, caller_of), ""
    except ResourceError as error:
        if config.store is not None:
            raise
        return None, str(error)


def _tracer(endpoint: str, model: str) -> Tracer:
    """Raises ``ConfigError`` where what it needs is not installed."""
    try:
        from tenon.server.tracing import Tracer
    except ImportError as error:
        said = f"traces needs OpenTelemetry: pip install 'tenon[otel]' ({error})"
        raise ConfigError(said, subject="traces") from error
    return Tracer(endpoint, model, SYSTEM)


def _url(host: str, sock: socket.socket) -> str:
    port = sock.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(config: ServeConfig, console: Console) -> int:
    """Run one server in this process until it ends; the exit status.

    Raises ``ResourceError`` before anything is started where the port or the admin's socket cannot be had.
    """
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    log = Log(config.log_format, config.log_level)
    log.start()
    try:
        return _serve(config, console)
    finally:
        log.close()


def _serve(config: ServeConfig, console: Console) -> int:
    door = Door(config.admin) if config.admin is not None else None

    async def main() -> int:
        return await Server(config, console).run(sock, door)

    try:
        sock = bind(config.host, config.port)
        return asyncio.run(main())
    finally:
        if door is not None:
            door.close()
