"""``tenon workload list | make NAME | describe FILE [FILE2]``: request traces, made and looked at."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from tenon.base.errors import ConfigError
from tenon.workloads import plots, readers, trace
from tenon.workloads.describe import (
    BLOCK_TOKENS,
    CACHE_TOKENS,
    Description,
    Difference,
    Samples,
    Spread,
    compare,
    describe,
)
from tenon.workloads.generator import make
from tenon.workloads.parameters import families


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    list_parser = actions.add_parser("list", help="name the families; with NAME, its parameters and their sources")
    list_parser.add_argument("name", nargs="?", metavar="NAME")
    make_parser = actions.add_parser("make", help="write a trace")
    make_parser.add_argument("name", metavar="NAME", help="a family that `tenon workload list` names")
    make_parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    make_parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: 0)")
    make_parser.add_argument("--requests", type=int, help="how many at the most (default: the family's own number)")
    make_parser.add_argument("--duration", type=float, metavar="S", help="seconds after which no request arrives")
    make_parser.add_argument("--rate", type=float, help="requests per second on average (default: the family's own)")
    make_parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another value of a parameter; repeatable"
    )
    describe_parser = actions.add_parser("describe", help="figures of a trace, or of two side by side")
    describe_parser.add_argument("file", type=Path, metavar="FILE")
    describe_parser.add_argument("other", type=Path, nargs="?", metavar="FILE2", help="is compared with FILE")
    describe_parser.add_argument(
        "--format", default="auto", choices=("auto", *readers.FORMATS),
        help="of the files; auto tells tenon, mooncake and the CSVs apart by their first line (default: auto)",
    )  # fmt: skip
    describe_parser.add_argument("--block-tokens", type=int, default=BLOCK_TOKENS, help="(default: %(default)s)")
    describe_parser.add_argument(
        "--full-blocks",
        action="store_true",
        help="count only full blocks, as an engine's cache (default: all, as Mooncake)",
    )
    describe_parser.add_argument("--plot", type=Path, metavar="OUT.svg")
    describe_parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    console = Console()
    match args.action:
        case "list":
            return _list(args.name, console)
        case "make":
            return _make(args, console)
        case "describe":
            return _describe(args, console)
        case other:
            raise ConfigError(f"workload knows list, make and describe, not {other!r}", subject="action")


def settings(words: list[str]) -> dict[str, Any]:
    """``name=value`` words; a value is JSON where it can be read as such, else text. Raises ``ConfigError``."""
    found: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not (name and sign):
            raise ConfigError(f"--set takes name=value, got {word!r}", subject="set")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _list(name: str | None, console: Console) -> int:
    if name is None:
        for one, family in families().items():
            console.print(f"[bold]{one}[/]: {family.title}\n  {family.source}", highlight=False)
        return 0
    if name not in families():
        raise ConfigError(f"there is no workload {name!r}; there are {', '.join(families())}", subject=name)
    table = Table(title=name, title_justify="left")
    for column in ("parameter", "value", "how", "source"):
        table.add_column(column, overflow="fold")
    for key, parameter in families()[name].parameters.items():
        value = parameter.value
        shown = f"{len(value)} rows, {value[0]} to {value[-1]}" if isinstance(value, list) else f"{value}"
        table.add_row(key, shown.replace("[", r"\["), parameter.how, parameter.source)
    console.print(table)
    return 0


def _make(args: argparse.Namespace, console: Console) -> int:
    made = make(
        args.name, seed=args.seed, requests=args.requests, duration_s=args.duration, rate=args.rate,
        **settings(args.set),
    )  # fmt: skip
    trace.save(made, args.output)
    console.print(
        f"{len(made.requests)} requests over {made.duration_s:.1f} s written to {args.output}", highlight=False
    )
    return 0


def _describe(args: argparse.Namespace, console: Console) -> int:
    paths = [path for path in (args.file, args.other) if path is not None]
    samples = [
        Samples(readers.read(path, args.format), args.block_tokens, partial=not args.full_blocks) for path in paths
    ]
    found = [describe(one) for one in samples]
    difference = compare(samples[0], samples[1]) if len(samples) == 2 else None
    if args.plot:
        plots.save(samples, args.plot)
    if args.json:
        value: Any = found[0] if difference is None else {"traces": found, "difference": difference}
        print(msgspec.json.format(msgspec.json.encode(value), indent=1).decode())
        return 0
    for label, path, one in zip(LABELS, paths, found, strict=False):
        console.print(f"{label if len(found) > 1 else 'trace'}: {one.name} ({path}), {one.source}", highlight=False)
    console.print(_lengths(found))
    console.print(_properties(found, difference))
    if args.plot:
        console.print(f"written to {args.plot}", highlight=False)
    return 0


LABELS = ("A", "B")
SPREADS = {
    "input": "prompt, tokens", "output": "answer, tokens", "interarrival_s": "gap, s",
    "follow_gap_s": "continued, s", "block_gap_s": "block reused, s",
    "turns": "chain, requests", "session_turns": "session, requests", "pause_s": "pause, s",
}  # fmt: skip


def _lengths(found: list[Description]) -> Table:
    table = Table(title="distributions", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in ("n", "mean", "CV", "P50", "P75", "P90", "P99", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    for field, title in SPREADS.items():
        for label, one in zip(LABELS, found, strict=False):
            spread: Spread | None = getattr(one, field)
            if spread is None:
                continue
            figures = (spread.mean, spread.cv, spread.p50, spread.p75, spread.p90, spread.p99, spread.max)
            table.add_row(title if len(found) == 1 else f"{title} {label}", *map(_short, (spread.n, *figures)))
    return table


def _short(value: float) -> str:
    """Three digits: 0.294, 350, 12k, 1.23M."""
    for unit, sign in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g}{sign}"
    return f"{value:.3g}"


def _properties(found: list[Description], difference: Difference | None) -> Table:
    table = Table(title="properties", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("property")
    for label, _ in zip(LABELS, found, strict=False):
        table.add_column(label if len(found) > 1 else "", justify="right", no_wrap=True)
    if difference is not None:
        table.add_column("difference", justify="right")
    first = found[0]
    rows: list[tuple[str, str, str]] = [
        ("requests", "requests", "{:,.0f}"), ("duration, s", "duration_s", "{:,.1f}"),
        ("requests / s", "rate_per_s", "{:.4g}"), ("gaps of zero", "zero_gaps", "{:.1%}"),
        ("fullest minute over mean", "peak_minute", "{:.3g}"), ("distinct blocks", "blocks", "{:,.0f}"),
        ("ideal hit ratio", "ideal_hit_ratio", "{:.1%}"), ("blocks used once", "once_share", "{:.1%}"),
        ("reuses of the top tenth", "top10_share", "{:.1%}"), ("requests that continue one", "follow", "{:.1%}"),
        ("chains of one request", "single_turn", "{:.1%}"),
    ]  # fmt: skip
    for title, field, form in rows:
        values = [getattr(one, field) for one in found]
        cells = [form.format(value) if value is not None else "-" for value in values]
        table.add_row(title, *cells, *([_change(difference, field)] if difference else []))
    for i, tokens in enumerate(CACHE_TOKENS):
        cells = [f"{one.lru[i].hit_ratio:.1%}" for one in found]
        table.add_row(f"LRU hits, {tokens / 1e6:g} M tokens", *cells,
                      *([_change(difference, f"lru_{tokens}")] if difference else []))  # fmt: skip
    if difference is not None:
        for name, value in difference.ks.items():
            table.add_row(f"KS, {SPREADS[name]}", *[""] * len(found), "-" if value is None else f"{value:.3f}")
    for name in first.classes:
        table.add_row(f"class {name}", *(f"{one.classes.get(name, 0) / one.requests:.1%}" for one in found),
                      *([""] if difference else []))  # fmt: skip
    return table


def _change(difference: Difference, field: str) -> str:
    if field in difference.hit_points:
        return f"{difference.hit_points[field]:+.1f} points"
    value = difference.relative.get(field)
    return "-" if value is None else f"{value:+.1%}"
