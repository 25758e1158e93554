"""Traces as figures: lengths, demand over time, reuse gaps, LRU hit ratios; several traces in one frame."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenon.base import files
from tenon.base.errors import ConfigError
from tenon.workloads.describe import Samples

SIZE_IN = (9.0, 5.6)
BINS = 60
CURVE_POINTS = 60
# A distribution is drawn by this many of its quantiles: a figure need not grow with the trace.
DRAWN = 400


def svg(samples: Sequence[Samples]) -> bytes:
    """One line a trace; the same bytes for the same traces. Needs matplotlib (the ``plot`` extra).

    Raises ``ConfigError`` without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("figures need matplotlib: pip install 'tenon[plot]'", subject="plot") from error
    names = [one.trace.header.name for one in samples]
    if len(names) > 1:
        names = [f"{label}: {name}" for label, name in zip(ascii_uppercase, names, strict=False)]
    with matplotlib.rc_context({"svg.hashsalt": "/".join(names), "font.size": 8}):
        figure = Figure(figsize=SIZE_IN, layout="constrained")
        axes = figure.subplots(2, 3)
        panels: list[tuple[str, str, Any]] = [
            ("prompt, tokens", "share of requests", lambda one: cdf(one.input)),
            ("answer, tokens", "share of requests", lambda one: cdf(one.output)),
            ("time, s", "requests / s", demand),
            ("gap between requests, s", "share", lambda one: cdf(one.interarrival_s)),
            ("seconds until a prompt is continued", "share", lambda one: cdf(one.follow_gap_s)),
            ("LRU cache, tokens", "share of blocks hit", lru),
        ]
        for axis, (x_name, y_name, points) in zip(axes.flat, panels, strict=True):
            for i, one in enumerate(samples):
                x, y = points(one)
                axis.plot(x, y, color=f"C{i}", lw=1, label=names[i], drawstyle="default")
            axis.set_xlabel(x_name)
            axis.set_ylabel(y_name)
            if points is not demand:
                axis.set_xscale("symlog" if "gap" in x_name or "until" in x_name else "log")
            axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes.flat[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def save(samples: Sequence[Samples], path: Path) -> None:
    """Raises ``ConfigError`` without matplotlib, ``ResourceError`` when the disk refuses."""
    files.write_bytes(path, svg(samples))


def cdf(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A distribution function's points; none for no values."""
    if not len(values):
        return np.zeros(0), np.zeros(0)
    share = np.linspace(0, 1, DRAWN)
    return np.quantile(values, share, method="inverted_cdf"), share


def demand(one: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Requests per second in equal parts of the trace's time."""
    last_s = max(float(one.arrival_s[-1]), 1e-9)
    counts, edges = np.histogram(one.arrival_s, bins=BINS, range=(0.0, last_s))
    return (edges[1:] + edges[:-1]) / 2, counts / (last_s / BINS)


def lru(one: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Hit ratios from caches of a few blocks to one that holds all."""
    all_tokens = max(2, one.reuse.blocks.distinct) * one.block_tokens
    sizes = np.geomspace(one.block_tokens, all_tokens, CURVE_POINTS)
    return sizes, np.array(one.lru([int(size) for size in sizes]))
