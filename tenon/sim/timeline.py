"""What happened when, for the eye: slices on tracks and quantities over time, as SVG or for Perfetto.

A timeline is data. :func:`perfetto` writes the Chrome trace event format, which https://ui.perfetto.dev and
``chrome://tracing`` read; :func:`svg` draws a picture that needs nothing but a browser. Equal timelines give equal
bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

from tenon.base import files

PALETTE: Final = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#9d755d")
WIDTH: Final = 1000
LABEL: Final = 140
ROW: Final = 16
COUNTER_ROW: Final = 48
MARGIN: Final = 12
TICKS: Final = 8


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that took time on a track. ``kind`` decides its colour; ``args`` are shown when it is looked at."""

    track: str
    name: str
    start_s: float
    end_s: float
    kind: str = ""
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Series:
    """A quantity that keeps each value until the next time. ``at_s`` ascend."""

    name: str
    at_s: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Timeline:
    """Raises ``ValueError`` when made of a slice that ends before it starts, a series that runs back, or a NaN."""

    title: str
    slices: tuple[Slice, ...]
    series: tuple[Series, ...] = ()

    def __post_init__(self) -> None:
        for one in self.slices:
            if not (math.isfinite(one.start_s) and math.isfinite(one.end_s) and one.start_s <= one.end_s):
                raise ValueError(f"{one.name} on {one.track} lasts from {one.start_s} s to {one.end_s} s")
        for line in self.series:
            if len(line.at_s) != len(line.values):
                raise ValueError(f"{line.name} has {len(line.at_s)} times for {len(line.values)} values")
            if any(not math.isfinite(x) for x in (*line.at_s, *line.values)):
                raise ValueError(f"{line.name} has a value that is not finite")
            if any(a > b for a, b in zip(line.at_s, line.at_s[1:], strict=False)):
                raise ValueError(f"the times of {line.name} run back")

    @property
    def tracks(self) -> list[str]:
        """In the order in which they first have a slice."""
        return list(dict.fromkeys(one.track for one in self.slices))

    @property
    def extent_s(self) -> tuple[float, float]:
        """From the first start to the last end; (0, 0) when nothing happened."""
        starts = [one.start_s for one in self.slices] + [line.at_s[0] for line in self.series if len(line.at_s)]
        ends = [one.end_s for one in self.slices] + [line.at_s[-1] for line in self.series if len(line.at_s)]
        return (min(starts), max(ends)) if starts else (0.0, 0.0)


def perfetto(timeline: Timeline) -> bytes:
    """Chrome's trace event JSON: complete events ("X"), counters ("C"), names of process and threads ("M").

    Times are microseconds. Slices of a track must nest or follow one another to be drawn as meant.
    """
    number = {track: i for i, track in enumerate(timeline.tracks, 1)}
    events: list[dict[str, Any]] = [_named("process_name", 0, timeline.title)]
    events += [_named("thread_name", tid, track) for track, tid in number.items()]
    events += [
        {
            "ph": "X", "pid": 1, "tid": number[one.track], "name": one.name, "cat": one.kind or "slice",
            "ts": one.start_s * 1e6, "dur": (one.end_s - one.start_s) * 1e6, "args": one.args,
        }
        for one in timeline.slices
    ]  # fmt: skip
    events += [
        {"ph": "C", "pid": 1, "name": line.name, "ts": at_s * 1e6, "args": {"value": value}}
        for line in timeline.series
        for at_s, value in zip(line.at_s, line.values, strict=True)
    ]
    whole = {"displayTimeUnit": "ms", "traceEvents": events}
    return json.dumps(whole, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _named(what: str, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": tid, "name": what, "args": {"name": name}}


def svg(timeline: Timeline) -> bytes:
    """A row per track, a panel per series, one time axis. Slices narrower than a tenth of a pixel are left out."""
    begin_s, end_s = timeline.extent_s
    scale = (WIDTH - LABEL - MARGIN) / (end_s - begin_s) if end_s > begin_s else 0.0
    kinds = list(dict.fromkeys(one.kind for one in timeline.slices))
    colour = {kind: PALETTE[i % len(PALETTE)] for i, kind in enumerate(kinds)}
    top = {track: 40 + i * ROW for i, track in enumerate(timeline.tracks)}
    below = 40 + len(top) * ROW + MARGIN
    height = below + len(timeline.series) * (COUNTER_ROW + MARGIN) + 24

    def x(at_s: float) -> float:
        return LABEL + (at_s - begin_s) * scale

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="10"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="14" font-size="12">{escape(timeline.title)}</text>',
    ]
    for i, kind in enumerate(k for k in kinds if k):
        left = LABEL + i * 110
        out.append(f'<rect x="{left}" y="20" width="9" height="9" fill="{colour[kind]}"/>')
        out.append(f'<text x="{left + 13}" y="28">{escape(kind)}</text>')
    for track, y in top.items():
        out.append(f'<text x="{LABEL - 6}" y="{y + 11}" text-anchor="end">{escape(track)}</text>')
    for one in timeline.slices:
        width = (one.end_s - one.start_s) * scale
        if width < 0.1:
            continue
        said = escape(f"{one.name}: {one.start_s:.6g} to {one.end_s:.6g} s")
        out.append(
            f'<rect x="{x(one.start_s):.2f}" y="{top[one.track] + 1}" width="{width:.2f}" height="{ROW - 3}" '
            f'fill="{colour[one.kind]}"><title>{said}</title></rect>'
        )
    for i, line in enumerate(timeline.series):
        out += _panel(line, below + i * (COUNTER_ROW + MARGIN), x, end_s)
    for i in range(TICKS + 1):
        at_s = begin_s + (end_s - begin_s) * i / TICKS
        out.append(f'<text x="{x(at_s):.2f}" y="{height - 8}" text-anchor="middle">{at_s:.4g} s</text>')
    out.append("</svg>\n")
    return "\n".join(out).encode()


def _panel(line: Series, y: float, x: Any, end_s: float) -> list[str]:
    """A stepped line between its own zero and its largest value."""
    most = max((abs(v) for v in line.values), default=0.0) or 1.0
    points: list[str] = []
    previous = ""
    for at_s, value in zip(line.at_s, line.values, strict=True):
        level = f"{y + COUNTER_ROW * (1 - value / most):.2f}"
        if level == previous:
            continue  # a step back to where the line is draws nothing
        if previous:
            points.append(f"{x(at_s):.2f},{previous}")
        points.append(f"{x(at_s):.2f},{level}")
        previous = level
    if previous:
        points.append(f"{x(end_s):.2f},{previous}")
    return [
        f'<text x="{LABEL - 6}" y="{y + COUNTER_ROW / 2:.0f}" text-anchor="end">{escape(line.name)}</text>',
        f'<text x="{LABEL - 6}" y="{y + 9:.0f}" text-anchor="end" fill="#777">{most:.6g}</text>',
        f'<polyline fill="none" stroke="{PALETTE[0]}" points="{" ".join(points)}"/>',
    ]


def save(timeline: Timeline, folder: Path) -> None:
    """Write ``timeline.svg`` and ``timeline.json`` (for Perfetto) into ``folder``. Raises ``ResourceError``."""
    files.write_bytes(folder / "timeline.svg", svg(timeline))
    files.write_bytes(folder / "timeline.json", perfetto(timeline))
