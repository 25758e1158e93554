"""``tenon batch FILE``: answer every request of an OpenAI batch file, by a server of its own or one that runs.

The server is that of ``tenon serve``, on a free port of loopback, and is asked over HTTP as any client would: so the
answers, the errors and the limits are those of the API, and there is one way through the code for them.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tenon.base.clock import SYSTEM
from tenon.base.errors import ConfigError, ResourceError
from tenon.cli.load import INTERRUPTED, KEY_VARIABLE, REFRESH_S, read_key
from tenon.cli.serve import Screen, add_engine_arguments, engine_from
from tenon.engine.messages import Ready
from tenon.server.batch_lines import Check, Journal, Line, check_file, sound_lines
from tenon.server.batch_run import LEFT, Answer, BatchRun
from tenon.server.run import ServeConfig, Server, bind
from tenon.workloads.streaming import Client, Failed, Patience, Target

ANSWER_BYTES: Final = 256 * 2**20
OUTAGE_S: Final = 120.0
"""How long a server that has answered may be out of reach; one that never has is not waited for."""
RETRY_S: Final = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="requests, one JSON object a line")
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="where answers are appended; what it has is not asked again (default: FILE with .output before its end)",
    )  # fmt: skip
    parser.add_argument("--concurrency", type=int, default=128, help="requests at once (default: %(default)s)")
    parser.add_argument("--model", help="a folder, a hub name, or 'embedded' (default: the one that the lines name)")
    parser.add_argument("--served-name", help="what the lines call the model (default: its folder or hub name)")
    running = parser.add_argument_group("a server that runs already")
    running.add_argument("--url", help="its base URL, as http://127.0.0.1:8000/v1, instead of a server of its own")
    running.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"file with the API key (default: ${KEY_VARIABLE}, if set)"
    )
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """0; 1 where some requests failed, or the server; 130 when it was interrupted."""
    if args.concurrency < 1:
        raise ConfigError(f"concurrency must be at least 1, got {args.concurrency}", subject="concurrency")
    if args.url is not None and (args.model is not None or args.served_name is not None):
        raise ConfigError("model and served_name are for a server of its own, and url names another", subject="url")
    output = args.output or args.file.with_suffix(f".output{args.file.suffix}")
    if output.exists() and args.file.exists() and output.samefile(args.file):
        raise ConfigError(f"output must be another file than the requests, got {output} for both", subject="output")
    check = check_file(args.file, max_bad=1)
    if check.bad:
        raise ConfigError(f"{args.file} {check.bad[0]}", subject=str(args.file))
    console = Console(stderr=True)
    where = Target(args.url, read_key(args.api_key_file)) if args.url is not None else _config(args, check)
    with Journal(output) as journal:
        if unknown := next((name for name in journal.done if name not in check.ids), None):
            said = (
                f"{output} line {journal.done[unknown]} answers custom_id {unknown!r}, which {args.file} does not have"
            )
            raise ConfigError(f"{said}; give another --output", subject="output")
        work = Work(args.file, check, journal, args.concurrency, console)
        if work.n_left == 0:
            work.report(0.0)
            return 1 if journal.tally.failed else 0
        return asyncio.run(work.through(where) if isinstance(where, Target) else work.with_server(where))


def _config(args: argparse.Namespace, check: Check) -> ServeConfig:
    """A server for this file. Raises ``ConfigError`` where the lines do not say one model, or all say another."""
    named = list(check.models)
    if args.model is None:
        if len(named) != 1:
            said = " and ".join(f"{name!r} (line {check.models[name]})" for name in named[:2]) or "none"
            raise ConfigError(f"the lines must name one model, got {said}; say which with --model", subject="model")
        args.model = named[0]
    config = ServeConfig(engine_from(args), port=0, served_name=args.served_name, keeps_files=False)
    if named and config.model_name not in named:
        said = (
            f"the model is served as {config.model_name!r} and no line asks for that; the first asks for {named[0]!r}"
        )
        raise ConfigError(f"{said}: give --served-name {named[0]}", subject="served_name")
    return config


class Watch(Screen):
    """A server's start as ``tenon serve`` shows it; then the progress of the lines instead."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, warn_remote=False)
        self.is_ready = asyncio.Event()
        self.on_stop: Callable[[], None] | None = None

    def ready(self, url: str, model: str, ready: Ready) -> None:
        self._end_progress(complete=True)
        self.is_ready.set()

    def draining(self, n_running: int, drain_s: float) -> None:
        if self.on_stop is not None:
            self.on_stop()
            super().draining(n_running, drain_s)


@dataclass
class Work:
    """One file, its journal, and what is left between them."""

    path: Path
    check: Check
    journal: Journal
    n_at_once: int
    console: Console

    @property
    def n_left(self) -> int:
        return len(self.check.ids) - len(self.journal.done)

    async def with_server(self, config: ServeConfig) -> int:
        """Serve, ask, and stop."""
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        watch = Watch(self.console)
        sock = bind(config.host, config.port)
        url = f"http://{config.host}:{sock.getsockname()[1]}/v1"
        # As many as the server lets in flight: more would only be refused.
        n_at_once = min(self.n_at_once, config.limits.max_in_flight)
        server = Server(config, watch)
        serving = asyncio.create_task(server.run(sock))
        ready = asyncio.create_task(watch.is_ready.wait())
        await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            ready.cancel()
            return serving.result() or INTERRUPTED  # it says itself why it could not start
        async with _asking(Target(url), self, n_at_once) as batch:
            watch.on_stop = batch.stop
            asking = asyncio.create_task(self._drive(batch))
            try:
                await asyncio.wait({serving, asking}, return_when=asyncio.FIRST_COMPLETED)
                batch.stop()
                watch.on_stop = None  # what is left to end is ours
                server.stop()
                status = await serving
            finally:
                asking_done = await _settled(asking)
        if not asking_done or self.n_left:
            return status or INTERRUPTED
        return status or self._status()

    async def through(self, target: Target) -> int:
        """Ask a server that runs. The first Ctrl-C waits for what has been asked, the second ends it."""
        loop = asyncio.get_running_loop()
        async with _asking(target, self, self.n_at_once) as batch:
            asking = asyncio.create_task(self._drive(batch))

            def interrupt() -> None:
                if not batch.stopping:
                    self.console.print(f"stopping: {batch.n_running} requests are waited for; once more to stop now")
                    batch.stop()
                else:
                    asking.cancel()

            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, interrupt)
            try:
                await asking
            except asyncio.CancelledError:
                return INTERRUPTED
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.remove_signal_handler(number)
        return INTERRUPTED if self.n_left else self._status()

    def _status(self) -> int:
        return 1 if self.journal.tally.failed else 0

    async def _drive(self, batch: BatchRun) -> None:
        """Ask, show how it goes, and tell what came of it, however it ends."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        progress = Progress(*columns, TimeElapsedColumn(), console=self.console, auto_refresh=False, transient=True)
        before, start_s = replace(self.journal.tally), SYSTEM.now_s()
        if self.journal.done:
            self.console.print(f"{len(self.journal.done)} of {len(self.check.ids)} requests have been answered before")
        try:
            with progress if self.console.is_terminal else nullcontext():
                painter = asyncio.create_task(self._paint(batch, progress)) if self.console.is_terminal else None
                try:
                    await batch.run()
                finally:
                    if painter is not None:
                        painter.cancel()
        finally:
            n_new = self.journal.tally.output_tokens - before.output_tokens
            self.report(n_new / max(1e-9, SYSTEM.now_s() - start_s))

    async def _paint(self, batch: BatchRun, progress: Progress) -> None:
        task = progress.add_task("", total=len(self.check.ids))
        while True:
            tally = self.journal.tally
            failed = f", [red]{tally.failed} failed[/]" if tally.failed else ""
            said = f", waiting: {batch.waiting_because}" if batch.waiting_because else ""
            said = f"{batch.n_running} running{failed}{said}"
            progress.update(task, description=said, completed=len(self.journal.done), refresh=True)
            await asyncio.sleep(REFRESH_S)

    def report(self, tokens_per_s: float) -> None:
        tally, left = self.journal.tally, f", {self.n_left} not answered" if self.n_left else ""
        said = f"{tally.completed} done, {tally.failed} failed{left}; "
        said += f"{tally.prompt_tokens:,} prompt and {tally.output_tokens:,} output tokens"
        said += f", {tokens_per_s:,.0f} output tokens/s" if tokens_per_s else ""
        self.console.print(f"{said}\n{self.journal.path}", highlight=False, soft_wrap=True, markup=False)
        if self.n_left:
            self.console.print("the same command goes on from here", highlight=False)


async def _settled(task: asyncio.Task[None]) -> bool:
    """Wait for it; whether it ended by itself. Raises what it failed with."""
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True


@asynccontextmanager
async def _asking(target: Target, work: Work, n_at_once: int) -> AsyncIterator[BatchRun]:
    """The file's lines, asked of this server."""
    client = Client(target, Patience(silence_s=3600.0), SYSTEM, ANSWER_BYTES)
    asker = Asker(client)
    try:
        yield BatchRun(sound_lines(work.path), asker.ask, work.journal, n_at_once=n_at_once)
    finally:
        await client.close()


class Asker:
    """Asks over HTTP. A server that is out of reach may be starting again."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._has_answered = False
        self._lost_s: float | None = None
        """Since when nothing comes."""

    async def ask(self, line: Line) -> Answer:
        """Raises ``ResourceError`` where nothing has come for too long."""
        try:
            reply = await self._client.send("POST", line.url.removeprefix("/v1"), line.body)
            msgspec.json.decode(reply.body)
        except (Failed, msgspec.DecodeError) as failed:
            now_s = SYSTEM.now_s()
            self._lost_s = now_s if self._lost_s is None else self._lost_s
            if not self._has_answered or now_s - self._lost_s > OUTAGE_S:
                said = f"{self._client.target.url} does not answer ({failed})"
                raise ResourceError(f"{said}; what has been answered is kept", subject="url") from failed
            return Answer(LEFT, "", b"{}", RETRY_S)
        self._has_answered, self._lost_s = True, None
        retry_after = reply.headers.get("retry-after", "")
        after_s = float(retry_after) if retry_after.isdecimal() else None
        return Answer(reply.status, reply.headers.get("x-request-id", ""), reply.body, after_s)
