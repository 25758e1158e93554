"""Results as figures: a row a cell, a bar a contender, as long as its median over the baseline's.

Cells differ by orders of magnitude, so bars are ratios and carry the measured median as text; the 95 % interval is
drawn at the bar's end. A metric that the baseline does not have gets bars of the medians themselves.
"""

from __future__ import annotations

import io
from pathlib import Path

from tenon.base import files
from tenon.base.errors import ConfigError
from tenon.base.result import Result
from tenon.bench.render import amount
from tenon.bench.runner import TWIN

WIDTH_IN = 7.0
ROW_IN = 0.17
PANEL_IN = 0.75
BAR_SPAN = 0.84


def svg(result: Result) -> bytes:
    """The figure as SVG, the same bytes for the same result. Needs matplotlib (the ``plot`` extra)."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        raise ConfigError("figures need matplotlib: pip install 'tenon[plot]'", subject="plot") from error
    metrics = list(dict.fromkeys(one.metric for one in result.series))
    present = {one.contender for one in result.series}
    contenders = [name for name in result.contenders if name in present and not name.endswith(TWIN)]
    baseline = next((ratio.under for ratio in result.ratios), "")
    colour = {name: f"C{i}" for i, name in enumerate(contenders)}
    cells = {m: list(dict.fromkeys(one.cell for one in result.series if one.metric == m)) for m in metrics}
    heights = [PANEL_IN + ROW_IN * len(cells[m]) * len(contenders) for m in metrics]
    with matplotlib.rc_context({"svg.hashsalt": result.name, "font.size": 8}):
        figure = Figure(figsize=(WIDTH_IN, sum(heights) + 0.5), layout="constrained")
        axes = figure.subplots(len(metrics), 1, squeeze=False, height_ratios=heights)[:, 0]
        width = BAR_SPAN / max(1, len(contenders))
        for axis, metric in zip(axes, metrics, strict=True):
            found = [one for one in result.series if one.metric == metric and one.contender in colour]
            base = {one.cell: one.median for one in found if one.contender == baseline}
            for one in found:
                unit = base.get(one.cell, 1.0)
                y = cells[metric].index(one.cell) + (contenders.index(one.contender) + 0.5) * width - BAR_SPAN / 2
                low, high = (one.median - one.low) / unit, (one.high - one.median) / unit
                axis.barh(y, one.median / unit, width * 0.9, xerr=[[low], [high]], color=colour[one.contender])
                axis.text(one.high / unit, y, f"  {amount(one.median)}", va="center", fontsize=7)
            axis.set_yticks(range(len(cells[metric])), cells[metric])
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.set_title(f"{metric}, over {baseline}" if base else metric, loc="left", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        handles = [Patch(color=colour[name], label=name) for name in contenders]
        axes[0].legend(handles=handles, frameon=False, loc="lower right")
        figure.suptitle(f"{result.title}\n{result.machine.cpu}, {result.settings['threads']} threads", fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def save(result: Result, path: Path) -> None:
    files.write_bytes(path, svg(result))
