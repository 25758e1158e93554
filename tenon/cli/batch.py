"""``tenon batch FILE``: answer a file of requests (OpenAI's batch format) into another.

The requests go to a server over HTTP, so that they are answered as any client's: to the one that ``--url`` names, or to
one of its own that ends with the job.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tenon.base.clock import SYSTEM, sleep_s
from tenon.base.errors import ConfigError, RequestError, ResourceError
from tenon.server.batch import Answers, Line, Reply, answer_all, read_lines

START_S = 600.0
ANSWER_S = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="requests, a JSON object a line: custom_id, url, body")
    parser.add_argument(
        "--output", type=Path, help="answers; gone on with if it is there (default: FILE.answers.jsonl)"
    )
    parser.add_argument(
        "--model", default="embedded", help="what to serve where no --url is given (default: %(default)s)"
    )
    parser.add_argument("--url", help="a server that runs already, such as http://127.0.0.1:8000")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="a file that holds the server's key")
    parser.add_argument("--at-once", type=int, default=16, help="requests in flight (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    if args.at_once < 1:
        raise ConfigError(f"--at-once must be at least 1, got {args.at_once}", subject="at_once")
    lines = _lines(args.file)
    output = args.output or args.file.with_suffix(".answers.jsonl")
    if output.resolve() == args.file.resolve():
        raise ConfigError(f"--output {output} is the file of requests itself", subject="output")
    key = args.key_file.read_text().strip() if args.key_file is not None else None
    console = Console(stderr=True)
    with Answers(output) as answers:
        n_before = len(answers.done)
        if n_before:
            console.print(f"{output}: {n_before} of {len(lines)} requests are answered already")
        if all(line.custom_id in answers.done for line in lines):
            console.print("nothing is left to do")
            return int(answers.n_failed > 0)
        with contextlib.ExitStack() as stack:
            url = args.url or stack.enter_context(_own_server(args.model, console))
            begin_s = SYSTEM.now_s()
            n_tokens = _answer(lines, answers, url, key, args.at_once, console)
            spent_s = SYSTEM.now_s() - begin_s
        n_new = len(answers.done) - n_before
        console.print(
            f"{output}: {n_new} requests in {spent_s:.1f} s, {n_tokens} tokens, {n_tokens / max(spent_s, 1e-9):.0f}"
            f" tokens/s; {answers.n_failed} of {len(answers.done)} failed"
        )
        return int(answers.n_failed > 0)


def _lines(path: Path) -> list[Line]:
    try:
        return read_lines(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", subject="file") from error
    except RequestError as error:
        raise ConfigError(f"{path}: {error}", subject="file") from error


def _answer(lines: list[Line], answers: Answers, url: str, key: str | None, at_once: int, console: Console) -> int:
    """Tokens of the answers."""
    n_tokens = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress, ThreadPoolExecutor(at_once) as threads:
        task = progress.add_task("requests", total=len(lines), completed=len(answers.done))

        async def ask(line: Line) -> Reply:
            return await asyncio.get_running_loop().run_in_executor(threads, _send, url, key, line)

        def on_answer(line: Line, reply: Reply) -> None:
            nonlocal n_tokens
            usage = reply.body.get("usage") or {} if isinstance(reply.body, dict) else {}
            n_tokens += usage.get("completion_tokens", usage.get("output_tokens", 0)) or 0
            progress.update(task, advance=1, description=f"requests, {n_tokens} tokens, {answers.n_failed} failed")

        try:
            asyncio.run(answer_all(lines, ask, answers, at_once=at_once, on_answer=on_answer))
        except* OSError as group:
            error = group.exceptions[0]
            said = f"the server at {url} does not answer: {error}; the same command goes on where this one ended"
            raise ResourceError(said, subject="url") from error
    return n_tokens


def _send(url: str, key: str | None, line: Line) -> Reply:
    where = urlsplit(url)
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    connection = kind(where.hostname or "127.0.0.1", where.port, timeout=ANSWER_S)
    try:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        connection.request("POST", where.path.rstrip("/") + line.url, line.body, headers)
        response = connection.getresponse()
        raw = response.read()
        try:
            body = json.loads(raw)
        except ValueError:
            body = raw.decode(errors="replace")
        wait = response.getheader("retry-after")
        after_s = float(wait) if wait is not None and wait.isdecimal() else None
        return Reply(response.status, response.getheader("x-request-id") or "", body, after_s)
    finally:
        connection.close()


@contextlib.contextmanager
def _own_server(model: str, console: Console) -> Iterator[str]:
    """A server of this job's own, ended with it. Raises ``ResourceError`` where it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "tenon.cli", "serve", model, "--port", str(port), "--served-name", model]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log)
        try:
            with console.status(f"loading {model}"):
                _wait_ready(process, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _wait_ready(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    end_s = SYSTEM.now_s() + START_S
    while SYSTEM.now_s() < end_s:
        if process.poll() is not None:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines() or ["no reason"]
            raise ResourceError(f"the server ended before it was ready: {said[-1]}", subject="model")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError):  # it may not listen yet
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        sleep_s(0.05)
    raise ResourceError(f"the server was not ready within {START_S:g} s", subject="model")
