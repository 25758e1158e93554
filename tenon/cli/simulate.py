"""``tenon simulate``: a trace served by a model on a device that need not be here, in virtual time."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tenon.base.clock import SYSTEM
from tenon.base.errors import ConfigError
from tenon.cost.device import LOCAL, Device
from tenon.cost.device import find as find_device
from tenon.cost.work import decode_shape
from tenon.engine.config import EngineConfig
from tenon.engine.promises import Slo
from tenon.engine.simulate import Marks, Simulated, Simulation, device_cost, free_bytes
from tenon.engine.simulated_view import timeline
from tenon.engine.speculation.measure import CONTEXT
from tenon.engine.speculation.simulated import Agreement, SimulatedDraft
from tenon.models.shapes import find as find_model
from tenon.sim import timeline as timelines
from tenon.workloads import generator, readers, report_view
from tenon.workloads import report as reports
from tenon.workloads.trace import Trace
from tenon.workloads.trace import load as load_trace

SETTINGS: Final = (
    "dtype", "block_tokens", "kv_bytes", "max_model_len", "max_step_tokens", "max_sequences", "max_waiting",
    "max_preemptions", "prefix_cache", "reuse", "pending", "evict", "chunk", "tpot_ms", "min_chunk_tokens", "prompts",
    "order", "speculative_policy", "speculative_depth", "speculative_nodes", "speculative_budget",
)  # fmt: skip
"""What of an ``EngineConfig`` decides about steps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="embedded", help="a folder, 'embedded', or a known shape's name")
    parser.add_argument("--device", default=LOCAL, help=f"of `tenon device`, or '{LOCAL}' (default: this machine)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="divide the model among so many of them")
    parser.add_argument(
        "--trace",
        required=True,
        metavar="FILE|NAME",
        help="a trace, a server's events.jsonl, or one of `tenon workload list`",
    )
    parser.add_argument("--requests", type=int, metavar="N", help="the first N requests only")
    parser.add_argument("--rate", type=float, help="requests per second, of a trace made by name")
    parser.add_argument("--seed", type=int, default=0, help="of the trace made by name (default: %(default)s)")
    parser.add_argument(
        "--config", action="append", default=[], metavar="K=V", help=f"an engine setting: {', '.join(SETTINGS)}"
    )
    parser.add_argument(
        "--text-ms", type=float, default=0.0, metavar="MS",
        help="between a caller and the engine, each way: HTTP, templates, token ids (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--slo", action="append", default=[], metavar="[CLASS:]ttft=0.5,tpot=50ms,e2e=10",
        help="bounds to attain, for all classes or one (default: the trace's own); policies know them",
    )  # fmt: skip
    parser.add_argument(
        "--draft", metavar="MODEL",
        help="guess ahead with a draft model of this shape on the same device; how often it is right is made up "
        "(docs/simulator.md)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write report.svg, timeline.svg and timeline.json")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR",
        help="where the run's events.jsonl goes, in a folder of its own (default: ./%(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """0; 1 when no request was answered. Raises ``ConfigError`` for what does not exist or cannot be."""
    model, device, config = find_model(args.model), find_device(args.device), config_from(args.config)
    if args.devices < 1:
        raise ConfigError(f"--devices must be at least 1, got {args.devices}", subject="devices")
    if not (math.isfinite(args.text_ms) and args.text_ms >= 0):
        raise ConfigError(f"--text-ms must be at least 0, got {args.text_ms:g}", subject="text_ms")
    trace = trace_from(args)
    slos = reports.slos_from(args.slo, trace)
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    on = device.name if args.devices == 1 else f"{args.devices} x {device.name}"
    marks = Marks(model=Path(args.model).name, device=on, cost=source_of(device))
    cost = device_cost(model, device, dtype, args.devices)
    draft, memory_bytes = None, free_bytes(model, device, dtype, args.devices)
    if args.draft is not None:
        memory_bytes -= int(find_model(args.draft).weights_bytes())
        config = replace(config, speculative=args.draft)
        draft = drafting(args.draft, device, args.devices)
    promised = {name: Slo(slo.ttft_s, slo.tpot_s) for name, slo in slos.items()}
    folder = args.runs / f"simulate-{int(SYSTEM.wall_s())}-{os.getpid()}"
    simulation = Simulation(
        config,
        model,
        cost,
        marks,
        memory_bytes=memory_bytes,
        text_s=args.text_ms / 1e3,
        seed=args.seed,
        records=folder,
        slos=promised,
        draft=draft,
    )
    start_s = SYSTEM.now_s()
    result = _run(simulation, trace)
    about = {
        "title": f"simulated: {trace.header.name}, {marks.model} on {on}",
        "simulated": True,
        "model": marks.model,
        "device": on,
        "kv_tokens": simulation.memory.tokens,
        "steps": len(result.steps),
        **({"text_ms": args.text_ms} if args.text_ms else {}),
        **_changed(config),
    }
    notes = [f"simulated: no model ran, the times of steps are a cost model's ({marks.cost})"]
    if simulation.scheduler.speculation is not None:
        guesses = simulation.scheduler.speculation.guesses()
        each = guesses.accepted / guesses.trees if guesses.trees else 0.0
        made_up = "how right a draft is, is made up"
        notes.append(f"guesses: {guesses.trees} trees, {each:.2f} of each came true; {made_up}")
    report = reports.report_of(result.outcomes, slos, notes, **about)
    if args.json:
        print(reports.dump(report).decode(), end="")
    else:
        console, spent_s = Console(), SYSTEM.now_s() - start_s
        report_view.show(report, console)
        said = f"{len(result.steps)} steps, {result.end_s:.1f} s of virtual time, took {spent_s:.1f} s"
        console.print(escape(f"{said}; events are in {folder}"), highlight=False)
    if args.plot is not None:
        _plot(args.plot, result, report)
    return 0 if report.overall.n_answered else 1


def drafting(name: str, device: Device, n_devices: int) -> SimulatedDraft:
    """A draft model by its shape, in contexts of 256 tokens, as often right as ``Agreement`` says. Raises
    ``ConfigError`` for a shape that is not known or cannot be priced."""
    model = find_model(name)
    cost = device_cost(model, device, model.dtype, n_devices)
    windows = model.cost.group_windows()
    return SimulatedDraft(lambda rows: cost(decode_shape([CONTEXT] * rows, windows)), {"": Agreement()})


def config_from(words: list[str]) -> EngineConfig:
    """``k=v`` settings as a config. Raises ``ConfigError`` naming the setting."""
    given: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in SETTINGS:
            raise ConfigError(f"--config takes K=V with K one of {', '.join(SETTINGS)}, got {word!r}", subject=name)
        given[name] = value
    try:
        return msgspec.convert(given, EngineConfig, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--config: {error}", subject="config") from error


def trace_from(args: argparse.Namespace) -> Trace:
    """A trace's file, or a family's name. Raises ``ConfigError`` for what is neither."""
    if args.requests is not None and args.requests < 1:
        raise ConfigError(f"--requests must be at least 1, got {args.requests}", subject="requests")
    if args.trace in generator.GENERATORS:
        return generator.make(args.trace, seed=args.seed, requests=args.requests, rate=args.rate)
    path = Path(args.trace)
    if not path.is_file():
        names = ", ".join(generator.GENERATORS)
        raise ConfigError(f"there is no file and no workload {args.trace!r}; workloads: {names}", subject="trace")
    if args.rate is not None:
        raise ConfigError("--rate is for traces made by name; a file has its own times", subject="rate")
    trace = readers.read(path, "server") if is_record(path) else load_trace(path)
    return Trace(trace.header, trace.requests[: args.requests])


def is_record(path: Path) -> bool:
    """Whether a server wrote it."""
    with path.open("rb") as file:
        return file.read(64).startswith(b'{"kind":"run"')


def source_of(device: Device) -> str:
    """Where the cost model's figures are from, and how far off it is known to be."""
    if device.name != LOCAL:
        return f"data sheet times assumed shares: {device.use.source}; see docs/cost.md for its error"
    from tenon.cost import calibration

    error = calibration.load().error
    return (
        f"calibrated {device.use.date}; on steps held out of the fit its median error is "
        f"{error.held_out_median:.1%}, the 95th percentile {error.held_out_p95:.1%}"
    )


def _changed(config: EngineConfig) -> dict[str, Any]:
    before, now = asdict(EngineConfig()), asdict(config)
    return {name: value for name, value in now.items() if value != before[name]}


def _run(simulation: Simulation, trace: Trace) -> Simulated:
    """With a bar on a terminal's standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("simulating", total=len(trace.requests))

        def on_progress(done: int, _: int, now_s: float) -> None:
            bar.update(task, completed=done, description=f"at {now_s:.0f} s")

        return simulation.run(trace, on_progress)


def _plot(folder: Path, result: Simulated, report: reports.Report) -> None:
    report_view.save_svg(report, folder / "report.svg")
    timelines.save(timeline(result, str(report.about["title"])), folder)
