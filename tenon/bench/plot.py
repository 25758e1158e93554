"""Results as figures: one panel a metric, cells along x, a bar with its 95 % interval per contender."""

from __future__ import annotations

import io
from pathlib import Path

from tenon.base import files
from tenon.base.errors import ConfigError
from tenon.base.result import Result
from tenon.bench.runner import TWIN

WIDTH_IN = 7.0
PANEL_IN = 2.6
BAR_SPAN = 0.8


def svg(result: Result) -> bytes:
    """The figure as SVG, the same bytes for the same result. Needs matplotlib (the ``plot`` extra)."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("figures need matplotlib: pip install 'tenon[plot]'", subject="plot") from error
    metrics = list(dict.fromkeys(one.metric for one in result.series))
    contenders = [name for name in result.contenders if not name.endswith(TWIN)]
    cells = list(result.cells)
    with matplotlib.rc_context({"svg.hashsalt": result.name, "font.size": 8}):
        figure = Figure(figsize=(WIDTH_IN, PANEL_IN * len(metrics) + 0.6), layout="constrained")
        axes = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
        width = BAR_SPAN / max(1, len(contenders))
        for axis, metric in zip(axes, metrics, strict=True):
            for i, contender in enumerate(contenders):
                found = [one for one in result.series if (one.metric, one.contender) == (metric, contender)]
                x = [cells.index(one.cell) + (i - (len(contenders) - 1) / 2) * width for one in found]
                errors = [[one.median - one.low for one in found], [one.high - one.median for one in found]]
                axis.bar(x, [one.median for one in found], width * 0.92, yerr=errors, capsize=2, label=contender)
            axis.set_xticks(range(len(cells)), cells)
            axis.set_ylabel(metric)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].legend(frameon=False, ncols=4)
        figure.suptitle(f"{result.title}\n{result.machine.cpu}, {result.settings['threads']} threads", fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def save(result: Result, path: Path) -> None:
    files.write_bytes(path, svg(result))
