"""Reports for people: tables in a terminal, figures as SVG. Both read the report alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tenon.base import files
from tenon.base.errors import ConfigError
from tenon.workloads.percentiles import PERCENTILES, Percentile, Summary
from tenon.workloads.report import Group, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS: Final = {
    "ttft": ("TTFT", "time to first token"),
    "tpot": ("TPOT", "time per output token"),
    "gap": ("gap", "gap between tokens"),
    "e2e": ("E2E", "end to end"),
}
WIDTH_IN: Final = 8.0
HEIGHT_IN: Final = 8.0
LEAST_S: Final = 1e-5
"""What is shorter is drawn here: a logarithmic axis has no 0."""


def show(report: Report, console: Console) -> None:
    """What was run, latencies with their 95 % intervals, then counts, errors and notes."""
    about = dict(report.about)
    console.print(f"[bold]{escape(str(about.pop('title', 'report')))}[/]", highlight=False)
    if about:
        console.print(escape(", ".join(f"{key}={value}" for key, value in about.items())), style="dim", highlight=False)
    console.print(_latencies(report))
    console.print(_counts(report))
    for kind, count in report.overall.errors.items():
        console.print(f"[red]failed[/] {count} x {escape(kind)}", highlight=False)
    for note in report.notes:
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False)


def milliseconds(seconds: float | None) -> str:
    """Three significant digits, whole ones above; a dash for ``None``."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _latencies(report: Report) -> Table:
    table = _table("latency from the intended send time in ms, with 95 % intervals")
    for column in ("", "class"):
        table.add_column(column)
    for column in ("n", "mean", *(f"p{percent:g}" for percent in PERCENTILES), "max"):
        table.add_column(column, justify="right")
    for key, (title, _) in METRICS.items():
        for group in _groups(report):
            summary: Summary = getattr(group, key)
            names = (title if group is report.overall else "", _class(group))
            if not summary.n:
                table.add_row(*names, "0", f"[dim]{escape(summary.why)}[/]")
                continue
            values = (milliseconds(summary.mean), *map(_percentile, summary.percentiles), milliseconds(summary.max))
            table.add_row(*names, str(summary.n), *values)
    return table


def _percentile(one: Percentile) -> str:
    if one.low is None and one.high is None:
        return milliseconds(one.value)
    low, high = (milliseconds(end) if end is not None else "?" for end in (one.low, one.high))
    return f"{milliseconds(one.value)}\n[dim]{low}..{high}[/]"


def _counts(report: Report) -> Table:
    groups = _groups(report)
    due = f"{_number(report.offered_per_s)} requests/s due"
    table = _table(f"over {report.span_s:.1f} s, {due}")
    table.add_column("")
    for group in groups:
        table.add_column(_class(group), justify="right")

    def row(name: str, values: Sequence[str]) -> None:
        table.add_row(name, *values)

    row("requests", [str(group.n) for group in groups])
    row("answered", [str(group.n_answered) for group in groups])
    row("answered/s", [_number(group.requests_per_s) for group in groups])
    row("output tokens/s", [_number(group.output_tokens_per_s) for group in groups])
    row("prompt tokens/s", [_number(group.prompt_tokens_per_s) for group in groups])
    row("prompt tokens cached", [_part(group.cached_tokens, group.prompt_tokens) for group in groups])
    if any(group.chunks for group in groups):
        per_chunk = [group.output_tokens / group.chunks if group.chunks else None for group in groups]
        row("tokens a chunk", [_number(value) for value in per_chunk])
    if any(group.attainment for group in groups):
        for field, name in (("met", "SLO met"), ("ttft", "  TTFT"), ("tpot", "  TPOT"), ("e2e", "  E2E")):
            parts = [getattr(group.attainment, field, None) for group in groups]
            if any(part is not None for part in parts):
                row(name, ["-" if part is None else f"{part:.1%}" for part in parts])
        for field, name in (("requests_per_s", "goodput, requests/s"), ("tokens_per_s", "goodput, tokens/s")):
            row(name, [_number(getattr(group.attainment, field, None)) for group in groups])
    return table


def _table(title: str) -> Table:
    """Narrow enough for 80 columns."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)


def _groups(report: Report) -> tuple[Group, ...]:
    return (report.overall, *report.classes)


def _class(group: Group) -> str:
    return escape(group.slo_class) or "all"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _part(count: int, of: int) -> str:
    return f"{count / of:.1%}" if of else "-"


def svg(report: Report) -> bytes:
    """Distributions per class and TTFT over time, the same bytes for the same report. Needs matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("figures need matplotlib: pip install 'tenon[plot]'", subject="plot") from error
    title = str(report.about.get("title", "report"))
    with matplotlib.rc_context({"svg.hashsalt": title, "font.size": 8}):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
        grid = figure.add_gridspec(3, 2)
        for number, (key, (_, name)) in enumerate(METRICS.items()):
            axis = figure.add_subplot(grid[number // 2, number % 2])
            _draw_distribution(axis, [(_class(group), getattr(group, key)) for group in _groups(report)], name)
        _draw_timeline(figure.add_subplot(grid[2, :]), report)
        figure.suptitle(title, fontsize=9)
        out = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None}
        figure.savefig(out, format="svg", metadata=metadata)
    return out.getvalue()


def save_svg(report: Report, path: Path) -> None:
    """Write the figure atomically. Raises ``ConfigError`` without matplotlib, ``ResourceError`` from the disk."""
    files.write_bytes(path, svg(report))


def _draw_distribution(axis: Axes, curves: Sequence[tuple[str, Summary]], name: str) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    for label, summary in curves:
        if summary.n:
            part = [point / (len(summary.curve) - 1) for point in range(len(summary.curve))]
            axis.plot([max(value, LEAST_S) * 1e3 for value in summary.curve], part, label=label, linewidth=1.2)
    values = [max(value, LEAST_S) * 1e3 for _, summary in curves for value in summary.curve]
    if values:  # an axis needs some width, also where all values are one
        axis.set_xlim(min(values) / 1.5, max(values) * 1.5)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(0, 1.01)
    axis.set_title(f"{name}: part of its values below", loc="left", fontsize=8)
    axis.set_xlabel("ms")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if len(axis.lines) > 1:
        axis.legend(frameon=False, loc="upper left")


def _draw_timeline(axis: Axes, report: Report) -> None:
    median = [(one.start_s, one.ttft_p50) for one in report.timeline if one.ttft_p50 is not None]
    longest = [(one.start_s, one.ttft_max) for one in report.timeline if one.ttft_max is not None]
    axis.plot([at for at, _ in median], [value for _, value in median], label="median", linewidth=1.2)
    axis.plot([at for at, _ in longest], [value for _, value in longest], label="longest", linewidth=0.8, alpha=0.7)
    failed = [one.start_s for one in report.timeline if one.n_failed]
    axis.plot(failed, [0.0] * len(failed), marker="x", color="C3", label="some failed", linestyle="none")
    axis.set_title("time to first token, by the time at which requests were due", loc="left", fontsize=8)
    axis.set_xlabel("s since the start")
    axis.set_ylabel("s")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper right")
