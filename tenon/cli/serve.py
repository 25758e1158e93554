"""``tenon serve [MODEL]``: an OpenAI-compatible server with a page, for one model."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from tenon.engine.config import MAX_NODES, EngineConfig
from tenon.engine.messages import Ready
from tenon.engine.policies.chunk import CHUNKS
from tenon.engine.policies.forest import MAX_DEPTH
from tenon.engine.policies.order import ORDERS
from tenon.engine.policies.speculate import BUDGET
from tenon.engine.policies.table import BUDGETED, POLICIES, SPECULATES
from tenon.server.limits import Limits
from tenon.server.logs import FORMATS, LEVELS, LogConsole
from tenon.server.run import ServeConfig, serve
from tenon.server.slo import classes_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    server = ServeConfig(EngineConfig())
    parser.add_argument(
        "model", nargs="?", default=server.engine.model, help="folder, hub name, or 'embedded' (default: %(default)s)"
    )
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default=server.host, help="address to listen on (default: %(default)s)")
    http.add_argument("--port", type=int, default=server.port, help="port; 0 takes a free one (default: %(default)s)")
    http.add_argument(
        "--allow-remote", action="store_true", help="allow a host beyond loopback: whoever reaches the port is served"
    )
    http.add_argument("--keys", type=Path, metavar="FILE", help="who may use the server: TOML, keys and quotas")
    http.add_argument(
        "--admin", metavar="ADDRESS", help="where administrators come in: a Unix socket's path, or a port on 127.0.0.1"
    )
    http.add_argument("--config", type=Path, metavar="FILE", help="limits that a reload changes: TOML")
    http.add_argument("--served-name", help="what clients call the model (default: its folder or hub name)")
    http.add_argument(
        "--drain-s", type=float, default=server.drain_s,
        help="seconds that requests in flight get to finish at the end (default: %(default)s)",
    )  # fmt: skip
    http.add_argument(
        "--replays", type=int, default=server.limits.replays,
        help="engines that may die under a request before it is given up (default: %(default)s)",
    )  # fmt: skip
    http.add_argument(
        "--max-wait-s", type=float, default=server.limits.max_wait_s, metavar="SECONDS",
        help="refuse with 429 what would wait longer than so for its turn (default: no bound but 512 in flight)",
    )  # fmt: skip
    http.add_argument(
        "--slo", action="append", default=[], metavar="[CLASS:]ttft=0.5,tpot=50ms,weight=2",
        help="what requests of a class are promised, or, without one, those that name none; may be repeated",
    )  # fmt: skip
    http.add_argument(
        "--store", type=Path, metavar="DIR", help="files and batches of clients (default: in the state folder)"
    )
    http.add_argument("--log-format", default=server.log_format, choices=FORMATS, help="(default: %(default)s)")
    http.add_argument("--log-level", choices=LEVELS, help="(default: warning; with JSON info, a line per request)")
    http.add_argument("--traces", metavar="URL", help="an OpenTelemetry collector, as http://127.0.0.1:4318/v1/traces")
    http.add_argument("--record", type=Path, metavar="DIR", help="also write events to DIR/<run>/events.jsonl")
    add_engine_arguments(parser)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    engine = EngineConfig()
    group = parser.add_argument_group("engine")
    group.add_argument("--dtype", default=engine.dtype, choices=("auto", "float32", "bfloat16", "float16"))
    group.add_argument("--device", default=engine.device, help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    group.add_argument("--numerics", default=engine.numerics, choices=("fast", "invariant"))
    group.add_argument("--executor", default=engine.executor, choices=("torch", "hash"), help=argparse.SUPPRESS)
    group.add_argument("--step-ms", type=float, help=argparse.SUPPRESS)
    group.add_argument("--max-model-len", type=int, help="longest context in tokens (default: what the model has)")
    group.add_argument("--kv-bytes", type=int, help="memory for keys and values (default: from what is free)")
    group.add_argument("--block-tokens", type=int, default=engine.block_tokens)
    group.add_argument("--max-sequences", type=int, default=engine.max_sequences, help="computed at once")
    group.add_argument("--max-step-tokens", type=int, default=engine.max_step_tokens, help="rows of one step")
    group.add_argument(
        "--chunk", default=engine.chunk, choices=tuple(CHUNKS), help="rule for rows of prompts in a step"
    )
    group.add_argument("--tpot-ms", type=float, help="time between two tokens that '--chunk adaptive' keeps to")
    group.add_argument(
        "--min-chunk-tokens", type=int, default=engine.min_chunk_tokens, help="rows of prompts that no rule goes under"
    )
    group.add_argument("--max-waiting", type=int, default=engine.max_waiting, help="more are refused with 429")
    group.add_argument("--no-prefix-cache", action="store_true", help="do not reuse the KV of equal prompt beginnings")
    group.add_argument(
        "--order", default=engine.order, choices=tuple(ORDERS), help="who of those who wait comes in first"
    )
    group.add_argument("--evict", default=engine.evict, choices=tuple(POLICIES), help="which cached block gives way")
    group.add_argument("--threads", type=int, help="CPU threads of the engine (default: the machine's cores)")
    _add_speculation(parser, engine)


def _add_speculation(parser: argparse.ArgumentParser, engine: EngineConfig) -> None:
    group = parser.add_argument_group("speculation: several tokens a step, the same answers")
    group.add_argument(
        "--speculative", default=engine.speculative, metavar="NAMES",
        help="who guesses ahead, separated by commas: ngram, suffix, a draft model's folder or hub name "
        "(default: nobody)",
    )  # fmt: skip
    group.add_argument(
        "--speculative-policy", default=engine.speculative_policy, choices=tuple(SPECULATES),
        help="which guesses a step verifies (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--speculative-depth", type=int, default=engine.speculative_depth, metavar="N",
        help=f"tokens ahead at most, up to {MAX_DEPTH} (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--speculative-nodes", type=int, default=engine.speculative_nodes, metavar="N",
        help=f"guesses of a sequence in a step at most, up to {MAX_NODES} (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--speculative-budget", type=int, metavar="N",
        help=f"rows of a step in all, of the policies {', '.join(BUDGETED)} (default: {BUDGET})",
    )  # fmt: skip


def config_from(args: argparse.Namespace) -> ServeConfig:
    """The arguments as one config. Raises ``ConfigError`` naming what is wrong."""
    return ServeConfig(
        engine=engine_from(args),
        host=args.host,
        port=args.port,
        allow_remote=args.allow_remote,
        keys=args.keys,
        admin=args.admin,
        config_file=args.config,
        served_name=args.served_name,
        drain_s=args.drain_s,
        record_folder=args.record,
        log_format=args.log_format,
        log_level=args.log_level,
        traces=args.traces,
        store=args.store,
        classes=classes_from(args.slo),
        limits=Limits(replays=args.replays, max_wait_s=args.max_wait_s),
    )


def engine_from(args: argparse.Namespace) -> EngineConfig:
    """Raises ``ConfigError``."""
    return EngineConfig(
        model=args.model,
        executor=args.executor,
        step_ms=args.step_ms,
        dtype=args.dtype,
        device=args.device,
        numerics=args.numerics,
        block_tokens=args.block_tokens,
        kv_bytes=args.kv_bytes,
        max_model_len=args.max_model_len,
        max_step_tokens=args.max_step_tokens,
        max_sequences=args.max_sequences,
        chunk=args.chunk,
        tpot_ms=args.tpot_ms,
        min_chunk_tokens=args.min_chunk_tokens,
        max_waiting=args.max_waiting,
        prefix_cache=not args.no_prefix_cache,
        evict=args.evict,
        order=args.order,
        threads=args.threads,
        speculative=args.speculative,
        speculative_policy=args.speculative_policy,
        speculative_depth=args.speculative_depth,
        speculative_nodes=args.speculative_nodes,
        speculative_budget=args.speculative_budget,
    )


def run(args: argparse.Namespace) -> int:
    config = config_from(args)
    keyed = config.keys is not None
    if config.log_format == "json":
        return serve(config, LogConsole())
    screen = Screen(
        Console(stderr=True), warn_remote=config.allow_remote and not keyed, keyed=keyed, hint=hint_for(config)
    )
    return serve(config, screen)


def hint_for(config: ServeConfig) -> str:
    """What somebody who defines classes might want besides."""
    engine = config.engine
    lacking = [] if engine.chunk == "patient" else ["--chunk patient"]
    if engine.speculative and engine.speculative_policy not in ("slack", "paper"):
        lacking.append("--speculative-policy slack")
    if not config.classes or not lacking:
        return ""
    return f"What classes are promised is forecast, told and counted; to serve by it too: {' '.join(lacking)}"


class Screen:
    """Start-up with a bar per phase on a terminal, a line per phase elsewhere; then how to use the server."""

    def __init__(self, console: Console, *, warn_remote: bool, keyed: bool = False, hint: str = "") -> None:
        self._console = console
        self._warn_remote, self._keyed, self._hint = warn_remote, keyed, hint
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def phase(self, name: str, fraction: float, detail: str) -> None:
        known = name in self._tasks
        if not self._console.is_terminal:
            if not known:
                self._tasks[name] = TaskID(0)
                self._console.print(f"{name}: {detail}" if detail else name, markup=False, highlight=False)
            return
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(finished_text="[green]✓[/]"), TextColumn("{task.description:<10}"), BarColumn(28),
                TimeElapsedColumn(), TextColumn("[dim]{task.fields[detail]}[/]"), console=self._console,
            )  # fmt: skip
            self._progress.start()
        if not known:
            for earlier in self._tasks.values():
                self._progress.update(earlier, completed=1.0)
            self._tasks[name] = self._progress.add_task(name, total=1.0, detail="")
        self._progress.update(self._tasks[name], completed=fraction, detail=escape(detail))

    def ready(self, url: str, model: str, ready: Ready) -> None:
        self._end_progress(complete=True)
        out, name = self._console, escape(model)
        facts = [ready.description.get(key, "") for key in ("device", "dtype", "executor")]
        facts += [f"context {ready.max_model_len:,}", f"KV {ready.kv_bytes / 2**20:,.0f} MiB"]
        out.print(f"\n[bold]{name}[/] is ready  [dim]{' · '.join(fact for fact in facts if fact)}[/]", highlight=False)
        out.print(f"  page      [bold]{url}/[/]", highlight=False)
        out.print(f"  endpoint  [bold]{url}/v1[/]\n", highlight=False)
        body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        key = "-H 'authorization: Bearer KEY' " if self._keyed else ""
        curl = f"curl {url}/v1/chat/completions {key}-H 'content-type: application/json' \\\n    -d '{body}'"
        api_key = "KEY" if self._keyed else "none"
        snippet = (
            f'from openai import OpenAI\nclient = OpenAI(base_url="{url}/v1", api_key="{api_key}")\n'
            f'stream = client.chat.completions.create(model="{model}", stream=True,\n'
            '    messages=[{"role": "user", "content": "Hello"}])\n'
            'for chunk in stream:\n    print(chunk.choices[0].delta.content or "", end="", flush=True)'
        )
        for text in (curl, snippet):
            indented = "\n".join("  " + line for line in text.splitlines())
            out.print(indented, markup=False, highlight=False, soft_wrap=True)
            out.print()
        if self._hint:
            out.print(self._hint + "\n", markup=False, highlight=False, soft_wrap=True)
        if self._warn_remote:
            out.print(
                "[bold red]Anyone who reaches this port can use the model: there are no keys.[/] "
                "Put it behind a firewall or a proxy that asks for one.\n",
                highlight=False,
            )

    def draining(self, n_running: int, drain_s: float) -> None:
        self._end_progress(complete=False)
        waiting = f"up to {drain_s:g} s for {n_running} requests" if n_running else "nothing in flight"
        self._console.print(f"stopping: {waiting}; once more to stop now", highlight=False)

    def failed(self, message: str, trace: str) -> None:
        self._end_progress(complete=False)
        if trace:
            self._console.print(trace.rstrip(), markup=False, highlight=False, soft_wrap=True)
        self._console.print(f"tenon: {message}", markup=False, highlight=False, soft_wrap=True)

    def _end_progress(self, *, complete: bool) -> None:
        if self._progress is not None:
            if complete:
                for task in self._tasks.values():
                    self._progress.update(task, completed=1.0)
            self._progress.stop()
            self._progress = None
