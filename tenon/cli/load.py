"""``tenon load TRACE --url URL``: send a trace to a server at its own times, and report what became of it."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tenon.base.clock import SYSTEM
from tenon.base.errors import ConfigError, ResourceError
from tenon.workloads import report as reports
from tenon.workloads import report_view, trace
from tenon.workloads.load import Load, LoadOptions, ServerModel, find_server
from tenon.workloads.streaming import Patience, Target

KEY_VARIABLE: Final = "TENON_API_KEY"
REFRESH_S: Final = 0.25
INTERRUPTED: Final = 130
ASK_S: Final = 30.0
"""Patience with the list of models, before the load."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    patience = Patience()
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a trace as `tenon workload make` writes it")
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:8000/v1", help="its base URL (default: %(default)s)")
    server.add_argument("--model", default="", help="the model's name (default: the first that the server lists)")
    server.add_argument("--endpoint", default="completions", choices=("completions", "chat"))
    server.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"file with the API key (default: ${KEY_VARIABLE}, if set)"
    )
    what = parser.add_argument_group("what is sent")
    what.add_argument(
        "--prompts", default="auto", choices=("auto", "tokens", "text"),
        help="token ids or text; auto: ids where the server's vocabulary is known (default: %(default)s)",
    )  # fmt: skip
    what.add_argument("--vocab-size", type=int, default=0, help="the model's vocabulary, where the server does not say")
    what.add_argument("--ignore-eos", action="store_true", help="answers as long as the trace's")
    what.add_argument(
        "--feed-answers", action="store_true",
        help="put what the server really answered where a later prompt contains it (text prompts)",
    )  # fmt: skip
    what.add_argument("--chunk-usage", action="store_true", help="ask for usage in every chunk: exact times of tokens")
    what.add_argument("--body", default="{}", metavar="JSON", help='more fields of each body, as {"temperature": 0}')
    what.add_argument(
        "--send-classes", action="store_true",
        help="tell the server each request's class as the trace has it (slo.class in its body)",
    )  # fmt: skip
    how = parser.add_argument_group("how it is sent")
    how.add_argument("--rate-scale", type=float, default=1.0, help="arrivals so many times as fast; pauses stay")
    how.add_argument("--limit", type=int, help="the first so many requests only")
    how.add_argument("--warmup", type=int, default=0, help="so many first requests do not count")
    how.add_argument("--concurrency-limit", type=int, help="at most so many at once: no open loop where it binds")
    how.add_argument("--connect-s", type=float, default=patience.connect_s, help="patience with a connection")
    how.add_argument("--silence-s", type=float, default=patience.silence_s, help="patience without a byte")
    how.add_argument("--timeout-s", type=float, default=patience.total_s, help="patience with a whole answer")
    out = parser.add_argument_group("report")
    out.add_argument(
        "--slo", action="append", default=[], metavar="[CLASS:]ttft=0.5,tpot=50ms,e2e=10",
        help="bounds to attain, for all classes or one; may be repeated (default: those in the trace)",
    )  # fmt: skip
    out.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    out.add_argument("--plot", type=Path, metavar="FILE", help="write its figures as SVG")
    out.add_argument("--outcomes", type=Path, metavar="FILE", help="write outcomes, one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """0; 1 when no request was answered; 130 when it was interrupted, after the report of what ran."""
    console = Console()
    extra = _extra(args.body)
    target = Target(args.url, read_key(args.api_key_file))
    patience = Patience(args.connect_s, args.silence_s, args.timeout_s)
    requests = trace.load(args.trace)
    slos = reports.slos_from(args.slo, requests)
    asked = Patience(patience.connect_s, min(patience.silence_s, ASK_S), ASK_S)
    found = asyncio.run(find_server(target, args.model, patience=asked))
    options = LoadOptions(
        target=target,
        model=found.name,
        endpoint=args.endpoint,
        vocab_size=_vocab_size(args, found),
        rate_scale=args.rate_scale,
        limit=args.limit,
        warmup=args.warmup,
        concurrency_limit=args.concurrency_limit,
        ignore_eos=args.ignore_eos,
        feed_answers=args.feed_answers,
        chunk_usage=args.chunk_usage,
        extra=extra,
        fields=_classes(requests) if args.send_classes else {},
        patience=patience,
    )
    _allow_sockets()
    tally = reports.Tally(slos)
    with ExitStack() as stack:
        write = stack.enter_context(OutcomeWriter(args.outcomes)).write if args.outcomes else None

        def receive(outcome: reports.Outcome) -> None:
            tally.add(outcome)
            if write is not None:
                write(outcome)

        load = Load(requests, options, receive)
        at_s = SYSTEM.wall_s()
        notes, interrupted = asyncio.run(_drive(load, console))
    title = f"{requests.header.name} at {args.url}"
    report = tally.report(notes, title=title, at_s=round(at_s), **_about(args, options))
    report_view.show(report, console)
    if args.json:
        reports.save(report, args.json)
    if args.plot:
        report_view.save_svg(report, args.plot)
    if interrupted:
        return INTERRUPTED
    return 0 if report.overall.n_answered else 1


class OutcomeWriter:
    """Appends outcomes to a file as they end, so that a long load keeps what it has. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises ``ResourceError`` where the file cannot be written."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        except OSError as error:
            raise ResourceError(f"cannot write {path}: {error.strerror or error}", subject=str(path)) from error

    def write(self, outcome: reports.Outcome) -> None:
        try:
            self._file.write(msgspec.json.encode(outcome) + b"\n")
            self._file.flush()
        except OSError as error:
            said = f"cannot write {self._path}: {error.strerror or error}"
            raise ResourceError(said, subject=str(self._path)) from error

    def __enter__(self) -> OutcomeWriter:
        return self

    def __exit__(self, *ended: object) -> None:
        self._file.close()


async def _drive(load: Load, console: Console) -> tuple[tuple[str, ...], bool]:
    """Run with a progress line. The first Ctrl-C stops the load and keeps its report; the second ends the program."""
    loop = asyncio.get_running_loop()
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        loop.remove_signal_handler(signal.SIGINT)
        load.stop()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    # Not refreshed by a thread of its own: that would take the interpreter from what is due.
    progress = Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False, transient=True)
    with progress if console.is_terminal else nullcontext():
        painter = asyncio.create_task(_paint(load, progress)) if console.is_terminal else None
        try:
            return await load.run(), interrupted
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            if painter is not None:
                painter.cancel()


async def _paint(load: Load, progress: Progress) -> None:
    task = progress.add_task("", total=load.n_total)
    while True:
        failed = f", [red]{load.n_failed} failed[/]" if load.n_failed else ""
        said = f"{load.n_sent} sent, {load.n_running} running{failed}"
        progress.update(task, description=said, completed=load.n_answered + load.n_failed, refresh=True)
        await asyncio.sleep(REFRESH_S)


def read_key(path: Path | None) -> str:
    """The API key from a file, else from the environment; "" for none. Its text is never part of an error."""
    if path is None:
        return os.environ.get(KEY_VARIABLE, "").strip()
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API key from {path}: {type(error).__name__}", subject=str(path)) from error
    if not key:
        raise ConfigError(f"the API key's file {path} is empty", subject=str(path))
    return key


def _classes(requests: trace.Trace) -> dict[str, dict[str, Any]]:
    """The field of each request's body that names its class."""
    return {one.id: {"slo": {"class": one.slo_class}} for one in requests.requests if one.slo_class}


def _extra(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text.encode(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise ConfigError(f"--body must be a JSON object, got {text!r}: {error}", subject="body") from error


def _vocab_size(args: argparse.Namespace, found: ServerModel) -> int:
    """The vocabulary that prompts are drawn from, 0 for text."""
    if args.vocab_size < 0:
        raise ConfigError(f"--vocab-size must be at least 16, got {args.vocab_size}", subject="vocab_size")
    known = int(args.vocab_size or found.vocab_size)
    if args.prompts == "tokens":
        if not known:
            raise ConfigError(
                "token prompts need the model's vocabulary, and this server does not say it; give --vocab-size",
                subject="vocab_size",
            )
        return known
    wants_text = args.prompts == "text" or args.endpoint == "chat" or args.feed_answers
    return 0 if wants_text else known


def _about(args: argparse.Namespace, options: LoadOptions) -> dict[str, Any]:
    about: dict[str, Any] = {"trace": str(args.trace), "url": args.url, "model": options.model}
    about |= {"endpoint": options.endpoint, "prompts": "tokens" if options.vocab_size else "text"}
    for name in ("rate_scale", "limit", "warmup", "concurrency_limit", "ignore_eos", "feed_answers", "chunk_usage"):
        value = getattr(options, name)
        if value != LoadOptions.__dataclass_fields__[name].default:
            about[name] = value
    return about | ({"body": options.extra} if options.extra else {})


def _allow_sockets() -> None:
    """As many open connections as the system lets this process have: an open loop has no other bound."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
