"""Timelines as pictures and as Chrome's trace events."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tenon.sim.timeline import Series, Slice, Timeline, perfetto, save, svg

MADE = Timeline(
    "two & a <queue>",
    (
        Slice("gpu 0", "step <1>", 1.0, 1.5, "prefill", {"rows": 512}),
        Slice("gpu 1", "step 2", 1.25, 3.0, "decode"),
        Slice("gpu 0", "step 3", 1.5, 3.0, "decode"),
    ),
    (Series("waiting", (1.0, 2.0, 3.0), (0, 4, 1)),),
)
NS = "{http://www.w3.org/2000/svg}"


def test_perfetto_holds_every_slice_and_value_in_microseconds() -> None:
    events = json.loads(perfetto(MADE))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert [(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in slices] == [
        (s.track, s.name, s.start_s * 1e6, (s.end_s - s.start_s) * 1e6) for s in MADE.slices
    ]
    assert slices[0]["args"] == {"rows": 512}
    assert [(e["ts"], e["args"]["value"]) for e in events if e["ph"] == "C"] == [(1e6, 0), (2e6, 4), (3e6, 1)]


def test_the_picture_is_well_formed_and_to_scale() -> None:
    root = ElementTree.fromstring(svg(MADE))  # noqa: S314
    boxes = [rect for rect in root.iter(f"{NS}rect") if rect.find(f"{NS}title") is not None]
    widths = [float(box.attrib["width"]) for box in boxes]
    assert widths[1] / widths[0] == pytest.approx(1.75 / 0.5, rel=1e-3)
    assert float(boxes[2].attrib["x"]) == pytest.approx(float(boxes[0].attrib["x"]) + widths[0], abs=0.02)
    assert boxes[0].attrib["y"] == boxes[2].attrib["y"] != boxes[1].attrib["y"]
    assert boxes[0].attrib["fill"] != boxes[1].attrib["fill"] == boxes[2].attrib["fill"]
    said = [title.text for title in root.iter(f"{NS}title")]
    assert said[0] == "step <1>: 1 to 1.5 s"


def test_a_series_is_drawn_as_steps() -> None:
    root = ElementTree.fromstring(svg(MADE))  # noqa: S314
    (line,) = root.iter(f"{NS}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) == 6  # 0, up to 4, down to 1, and on to the end
    assert points[0][1] > points[2][1] < points[4][1]
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(points))


def test_slices_too_narrow_to_see_are_left_out_of_the_picture_only() -> None:
    made = Timeline("t", (Slice("a", "long", 0.0, 1000.0), Slice("a", "short", 1000.0, 1000.001)))
    assert b"short" not in svg(made)
    assert b"short" in perfetto(made)


def test_nothing_at_all_is_still_a_picture() -> None:
    made = Timeline("empty", (), (Series("none", (), ()),))
    assert ElementTree.fromstring(svg(made)).tag == f"{NS}svg"  # noqa: S314
    assert json.loads(perfetto(made))["traceEvents"][0]["args"] == {"name": "empty"}


@pytest.mark.parametrize(
    ("slices", "series", "said"),
    [
        ((Slice("a", "x", 2.0, 1.0),), (), "x on a lasts from 2.0 s to 1.0 s"),
        ((Slice("a", "x", 0.0, math.inf),), (), "x on a"),
        ((), (Series("q", (0.0, 1.0), (1,)),), "q has 2 times for 1 values"),
        ((), (Series("q", (1.0, 0.0), (1, 2)),), "the times of q run back"),
        ((), (Series("q", (0.0,), (math.nan,)),), "q has a value that is not finite"),
    ],
)
def test_what_cannot_be_is_refused(slices: tuple[Slice, ...], series: tuple[Series, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Timeline("t", slices, series)


def test_both_files_are_written_and_the_same_each_time(tmp_path: Path) -> None:
    save(MADE, tmp_path)
    assert (tmp_path / "timeline.svg").read_bytes() == svg(MADE)
    assert (tmp_path / "timeline.json").read_bytes() == perfetto(MADE)
