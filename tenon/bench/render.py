"""Results as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tenon.base.errors import ConfigError
from tenon.base.result import Check, Ratio, Result, Series
from tenon.bench.claim import Cell
from tenon.bench.runner import TWIN, Plan

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


class TerminalProgress:
    """Prints the plan, then one bar per cell. Use as a context manager around the run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> TerminalProgress:
        self._progress.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._progress.stop()

    def planned(self, plan: Plan) -> None:
        self._console.print(f"[bold]{plan.bench.name}[/]: {plan.bench.title}", highlight=False)
        self._console.print(f"contenders: {', '.join(plan.bench.contenders)}; ratios over {plan.bench.baseline}")
        for cell in plan.cells:
            state = "kept from an unfinished run" if cell.name in plan.kept else f"{cell.rounds} rounds"
            self._console.print(f"  {cell.name}: {state}", highlight=False)
        self._console.print(f"about {_minutes(plan.estimate_s)}", highlight=False)

    def kept(self, cell: Cell) -> None:
        """Said in the plan."""

    def began(self, cell: Cell, contenders: Sequence[str]) -> None:
        total = len(contenders) * (cell.rounds + cell.warmup)
        self._tasks[cell.name] = self._progress.add_task(cell.name, total=total)

    def sampled(self, cell: Cell, done: int, of: int) -> None:
        self._progress.update(self._tasks[cell.name], completed=done, total=of)


def show(result: Result, console: Console) -> None:
    """A table per metric with medians and intervals, then limits, checks and notes."""
    where = f"{result.machine.cpu}, {result.settings['threads']} threads, commit {result.commit or 'none'}"
    console.print(f"[bold]{result.name}[/]: {result.title}\n{result.created}, {where}", highlight=False)
    for metric in dict.fromkeys(one.metric for one in result.series):
        console.print(_metric_table(result, metric))
    if result.limits:
        table = Table(title="limits of this machine in this run", title_justify="left")
        table.add_column("limit")
        table.add_column("best", justify="right")
        for limit in result.limits:
            table.add_row(limit.name, amount(limit.value))
        console.print(table)
    show_checks(result.checks, console)
    for note in result.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)
    if not result.counts:
        console.print("[bold red]this result does not count[/]: see the notes", highlight=False)


def show_checks(checks: Sequence[Check], console: Console) -> None:
    for check in checks:
        sign = "<=" if check.direction == "at_most" else ">="
        word = "[green]pass[/]" if check.passed else "[red]FAIL[/]"
        console.print(f"{word} {check.name}: {check.value:.4g} {sign} {check.target:.4g}", highlight=False)


def compare(before: Result, after: Result, console: Console) -> None:
    """What changed between two results of one bench: medians side by side; disjoint intervals are marked.

    Raises ``ConfigError`` when they are of different benches or share nothing.
    """
    if before.name != after.name:
        raise ConfigError(f"these are results of two benches, {before.name} and {after.name}", subject=after.name)
    earlier = {(one.cell, one.contender, one.metric): one for one in before.series}
    both = [(earlier[key], one) for one in after.series if (key := (one.cell, one.contender, one.metric)) in earlier]
    if not both:
        raise ConfigError(f"the two results of {before.name} share no cell, contender and metric", subject=before.name)
    if before.machine.cpu != after.machine.cpu or before.settings != after.settings:
        console.print("[yellow]note[/] taken on different machines or settings", highlight=False)
    table = Table(title=f"{before.created} -> {after.created}", title_justify="left")
    for column in ("cell", "contender", "metric"):
        table.add_column(column)
    for column in ("before", "after", "after / before", ""):
        table.add_column(column, justify="right")
    for old, new in both:
        apart = new.low > old.high or new.high < old.low
        change = f"{new.median / old.median:.3f}" if old.median else "-"
        row = (new.cell, new.contender, new.metric, amount(old.median), amount(new.median), change)
        table.add_row(*row, "differs" if apart else "")
    console.print(table)


def amount(value: float) -> str:
    """Three significant digits with an SI prefix: ``12.3 m``, ``45.6 G``."""
    if value == 0:
        return "0"
    for scale, prefix in PREFIXES:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}".rstrip()
    return f"{value:.3g}"


def _metric_table(result: Result, metric: str) -> Table:
    ratios = {(one.cell, one.over): one for one in result.ratios if one.metric == metric}
    twins = {one.cell: one for one in result.a_a if one.metric == metric}
    table = Table(title=metric, title_justify="left")
    for column in ("cell", "contender"):
        table.add_column(column)
    for column in ("median", "95 %", "over baseline", "A/A"):
        table.add_column(column, justify="right")
    for one in result.series:
        if one.metric != metric or one.contender.endswith(TWIN):
            continue
        twin = twins.get(one.cell)
        same = f"{twin.median:.3f}" if twin and twin.over == one.contender else ""
        table.add_row(one.cell, one.contender, amount(one.median), _interval(one), _ratio(ratios, one), same)
    return table


def _interval(one: Series) -> str:
    return f"{amount(one.low)} .. {amount(one.high)}"


def _ratio(ratios: dict[tuple[str, str], Ratio], one: Series) -> str:
    ratio = ratios.get((one.cell, one.contender))
    return f"{ratio.median:.3f} ({ratio.low:.3f} .. {ratio.high:.3f})" if ratio else ""


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
