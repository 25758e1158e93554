"""``tenon bench list | run NAME | verify NAME | compare A.json B.json``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from tenon.base import result as results
from tenon.base.errors import ConfigError
from tenon.bench import claim, plot, render, runner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="where the benches are (default: ./bench)")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="name the benches and what is committed of them")
    run_parser = actions.add_parser("run", help="measure one bench and write its result")
    run_parser.add_argument("name", metavar="NAME", type=_name)
    run_parser.add_argument("--quick", action="store_true", help="few cells; the result stays under runs/")
    run_parser.add_argument("--fresh", action="store_true", help="forget the cells of an unfinished run")
    run_parser.add_argument("--threads", type=int, default=0, help="threads of each contender (default: all cores)")
    run_parser.add_argument("--seed", type=int, default=0, help="seed of the order in which contenders are sampled")
    run_parser.add_argument("--plot", action="store_true", help="also write an SVG beside the result")
    verify_parser = actions.add_parser("verify", help="judge the committed result's checks again")
    verify_parser.add_argument("name", metavar="NAME", type=_name)
    compare_parser = actions.add_parser("compare", help="medians of two results side by side")
    compare_parser.add_argument("before", type=Path, metavar="A.json")
    compare_parser.add_argument("after", type=Path, metavar="B.json")


def _name(said: str) -> str:
    """A bench is named as its script is; kv-policies is taken for kv_policies."""
    return said.replace("-", "_")


def run(args: argparse.Namespace) -> int:
    """0; 1 when a check fails or the result does not count."""
    console = Console()
    match args.action:
        case "list":
            return _list(args.folder, console)
        case "run":
            return _run(args, console)
        case "verify":
            return _verify(args.folder, args.name, console)
        case "compare":
            render.compare(results.load(args.before), results.load(args.after), console)
            return 0
        case other:
            raise ConfigError(f"bench knows list, run, verify and compare, not {other!r}", subject="action")


def committed(folder: Path, name: str) -> Path:
    """Where a bench's result is committed."""
    return folder / "results" / f"{name}.json"


def _list(folder: Path, console: Console) -> int:
    for name in claim.names(folder):
        bench = claim.load(folder, name)
        path = committed(folder, name)
        console.print(f"[bold]{name}[/]: {bench.title}", highlight=False)
        console.print(f"  {_state(results.load(path)) if path.exists() else 'no committed result'}", highlight=False)
    return 0


def _state(result: results.Result) -> str:
    passed = sum(check.passed for check in result.checks)
    counted = "" if result.counts else ", does not count"
    return f"{result.created}: {passed} of {len(result.checks)} checks pass{counted}"


def _run(args: argparse.Namespace, console: Console) -> int:
    bench = claim.load(args.folder, args.name)
    root = args.folder.resolve().parent
    setting = runner.Setting(root, root / "runs", args.quick, args.seed, args.threads, args.fresh)
    with render.TerminalProgress(console) as progress:
        result = runner.run(bench, setting, progress)
    quick_path = setting.folder(bench.name) / "result.json"
    path = quick_path if args.quick else committed(args.folder, args.name)
    results.save(result, path)
    render.show(result, console)
    console.print(f"written to {path}", highlight=False)
    if args.plot:
        plot.save(result, path.with_suffix(".svg"))
    return _verdict(result)


def _verify(folder: Path, name: str, console: Console) -> int:
    """Load (which recomputes medians and ratios from the samples), then judge the script's checks of today."""
    bench = claim.load(folder, name)
    path = committed(folder, name)
    result = results.load(path)
    checks = tuple(bench.checks(result))
    render.show_checks(checks, console)
    if checks != result.checks:
        raise ConfigError(f"{path} was judged by other checks than {name}'s of today; run it again", subject=str(path))
    if not result.counts:
        console.print("this result does not count: " + "; ".join(result.notes), highlight=False)
    return _verdict(result)


def _verdict(result: results.Result) -> int:
    return 0 if result.counts and all(check.passed for check in result.checks) else 1
