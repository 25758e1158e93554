"""A calibration as a figure: the machine's roofline, and every timed step with what the model says of it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from tenon.base import files
from tenon.base.errors import ConfigError
from tenon.cost import price
from tenon.cost.calibration import Calibration

WIDTH_IN, HEIGHT_IN = 7.0, 4.6


def svg(calibration: Calibration) -> bytes:
    """Left: operations per second over operations per byte. Right: predicted over measured seconds. The same bytes for
    the same calibration. Needs matplotlib (the ``plot`` extra)."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("figures need matplotlib: pip install 'tenon[plot]'", subject="plot") from error
    device, points = calibration.device(), calibration.measured.points
    dtype = calibration.measured.dtype
    peak, bandwidth = device.peak(dtype), device.bandwidth_Bps.value
    kinds = list(dict.fromkeys(point.kind for point in points))
    with matplotlib.rc_context({"svg.hashsalt": "calibration", "font.size": 8}):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
        roof, ratio = figure.subplots(1, 2)
        intensity = np.array([p.work.flops / p.work.bytes for p in points])
        x = np.geomspace(intensity.min() / 2, intensity.max() * 2, 100)
        roof.loglog(x, np.minimum(peak, x * bandwidth) / 1e9, color="0.4", label="roof")
        for i, kind in enumerate(kinds):
            chosen = [p for p in points if p.kind == kind]
            at = [p.work.flops / p.work.bytes for p in chosen]
            measured = np.array([p.seconds for p in chosen])
            predicted = np.array([price.seconds(p.work, device, host=False) for p in chosen])
            flops = np.array([p.work.flops for p in chosen])
            roof.loglog(at, flops / measured / 1e9, "o", color=f"C{i}", markersize=4, label=kind)
            roof.loglog(at, flops / predicted / 1e9, "o", color=f"C{i}", markersize=6, fillstyle="none")
            ratio.loglog(measured * 1e3, predicted / measured, "o", color=f"C{i}", markersize=4)
        roof.set(xlabel="FLOP per byte", ylabel="GFLOP/s (rings: predicted)", title=f"{dtype} steps")
        roof.legend(frameon=False)
        ratio.axhspan(0.9, 1.1, color="0.9", zorder=0)
        ratio.axhline(1.0, color="0.4", linewidth=0.8)
        ratio.set(xlabel="measured ms", ylabel="predicted / measured", title="band: 10 %")
        ratio.set_yscale("linear")
        for axis in (roof, ratio):
            axis.spines[["top", "right"]].set_visible(False)
        found = calibration.error
        figure.suptitle(
            f"{device.title}, {calibration.created[:10]}: error of steps held out: median {found.held_out_median:.1%}, "
            f"95th percentile {found.held_out_p95:.1%}",
            fontsize=8,
        )
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def save(calibration: Calibration, path: Path) -> None:
    """Write the figure. Raises ``ResourceError``, and ``ConfigError`` without matplotlib."""
    files.write_bytes(path, svg(calibration))
