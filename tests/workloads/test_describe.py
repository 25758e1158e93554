"""Descriptions of traces that can be checked by hand, comparisons, figures, plots."""

import json
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.base.errors import ConfigError
from tenon.workloads import plots
from tenon.workloads.describe import Description, Samples, compare, describe, figures, ks, spread
from tenon.workloads.figures import measure
from tenon.workloads.generator import make
from tenon.workloads.trace import Segment, Trace, TraceRequest


def small() -> Trace:
    rows = [
        TraceRequest("a", 0.0, (Segment(1, 8),), 2, output=2, session="x", slo_class="chat"),
        TraceRequest("b", 0.0, (Segment(5, 4),), 4, slo_class="code"),
        TraceRequest(
            "c", 30.0, (Segment(1, 8), Segment(2, 2), Segment(3, 2)), 6, after="a", gap_s=5.0, session="x", turn=1
        ),
        TraceRequest("d", 130.0, (Segment(5, 4),), 8),
    ]
    return Trace.make("small", "by hand", rows)


def test_a_trace_by_hand() -> None:
    d = describe(Samples(small(), 4), cache_tokens=(4, 8, 12, 16, 400))
    assert (d.requests, d.duration_s, d.rate_per_s) == (4, 130.0, pytest.approx(3 / 130))
    assert (d.input.mean, d.input.p50, d.input.max) == (7.0, 6.0, 12.0)
    assert (d.output.mean, d.output.p50) == (5.0, 5.0)
    assert d.interarrival_s is not None
    assert (d.interarrival_s.n, d.interarrival_s.mean, d.zero_gaps) == (3, pytest.approx(130 / 3), pytest.approx(1 / 3))
    assert d.peak_minute == pytest.approx(3 / 1.5)
    # Accesses: A0 A1 | B | A0 A1 C | B.
    assert (d.blocks, d.ideal_hit_ratio, d.once_share) == (4, 3 / 7, 1 / 4)
    assert (d.follow, d.single_turn, d.turns.mean) == (0.5, 0.0, 2.0)
    assert d.follow_gap_s is not None
    assert (d.follow_gap_s.mean, d.follow_gap_s.max) == (80.0, 130.0)
    assert d.block_gap_s is not None
    assert d.block_gap_s.mean == pytest.approx((30 + 30 + 130) / 3)
    assert d.session_turns is not None
    assert d.session_turns.mean == 2
    assert d.pause_s is not None
    assert d.pause_s.mean == 5
    # Before c: B A0 A1. Before d: A0 A1 C B.
    assert [p.hit_ratio for p in d.lru] == pytest.approx([0, 1 / 7, 2 / 7, 3 / 7, 3 / 7])
    assert d.classes == {"chat": 1, "code": 1}


def test_what_a_short_trace_does_not_have_is_none_and_json_keeps_it() -> None:
    d = describe(Samples(Trace.make("one", "by hand", [TraceRequest("a", 7.0, (Segment(1, 3),), 1)])))
    missing = ("rate_per_s", "interarrival_s", "zero_gaps", "peak_minute", "follow_gap_s", "block_gap_s", "pause_s")
    assert [getattr(d, name) for name in missing] == [None] * len(missing)
    text = msgspec.json.encode(d)
    assert msgspec.json.decode(text, type=Description) == d
    assert "NaN" not in text.decode()
    assert set(figures(d)).isdisjoint(missing)


def test_no_requests_cannot_be_described() -> None:
    with pytest.raises(ConfigError, match="trace none has no requests to describe"):
        Samples(Trace.make("none", "by hand", []))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_a_spread_is_numpys(values: list[float]) -> None:
    array = np.array(values)
    found = spread(array)
    assert [found.p50, found.p75, found.p90, found.p99] == pytest.approx(
        np.percentile(array, [50, 75, 90, 99]).tolist()
    )
    assert found.mean == pytest.approx(array.mean())


values = st.lists(st.integers(0, 20).map(float), min_size=1, max_size=40)


@given(values, values)
def test_ks_is_the_largest_distance_of_the_distribution_functions(a: list[float], b: list[float]) -> None:
    expected = max(abs(np.mean([x <= at for x in a]) - np.mean([x <= at for x in b])) for at in (*a, *b))
    assert ks(np.array(a), np.array(b)) == pytest.approx(expected)
    assert ks(np.array(a), np.array(a)) == 0
    assert ks(np.array(a), np.zeros(0)) is None


def test_a_trace_does_not_differ_from_itself_and_a_stretched_one_does() -> None:
    one = Samples(small(), 4)
    same = compare(one, one)
    assert set(same.relative.values()) <= {0.0, None}
    assert set(same.hit_points.values()) == {0.0}
    assert set(same.ks.values()) == {0.0}
    slower = [msgspec.structs.replace(r, arrival_s=2 * r.arrival_s) for r in small().requests]
    difference = compare(one, Samples(Trace.make("slower", "by hand", slower), 4))
    assert difference.relative["follow_gap_s_mean"] == pytest.approx(1.0)
    assert difference.relative["rate_per_s"] == pytest.approx(-0.5)
    assert difference.relative["input_mean"] == 0
    assert difference.ks["follow_gap_s"] == 0.5


def test_block_sizes_are_not_mixed() -> None:
    with pytest.raises(ConfigError, match="different block sizes, 4 and 8"):
        compare(Samples(small(), 4), Samples(small(), 8))


def test_measured_properties_of_sessions() -> None:
    found = measure(Samples(small(), 4))
    assert found["session_turns_p50"] == 2
    # Of c's twelve tokens ten are a's prompt and its answer.
    assert found["prefix_p50"] == 10
    assert found["session_input_p50"] == 12
    assert (found["class_chat"], found["class_code"]) == (0.25, 0.25)
    assert (found["hit_none"], found["hit_most"]) == (0.5, 0.25)


def test_a_plot_is_svg_and_the_same_bytes_for_the_same_traces() -> None:
    samples = [Samples(make("mooncake-conversation", seed=seed, requests=200)) for seed in (0, 1)]
    drawn = plots.svg(samples)
    assert drawn == plots.svg(samples)
    root = ElementTree.fromstring(drawn)  # noqa: S314
    assert root.tag.endswith("svg")
    assert drawn.count(b"mooncake-conversation") >= 2


def test_a_plot_of_a_trace_without_reuse_is_drawn() -> None:
    made = Trace.make("single", "by hand", [TraceRequest("a", 0.0, (Segment(1, 3),), 1)])
    ElementTree.fromstring(plots.svg([Samples(made)]))  # noqa: S314


def test_lru_points_of_a_plot_rise_to_the_ideal() -> None:
    one = Samples(make("mooncake-conversation", requests=400))
    sizes, ratios = plots.lru(one)
    assert (np.diff(sizes) > 0).all()
    assert (np.diff(ratios) >= 0).all()
    assert ratios[-1] == pytest.approx(one.reuse.ideal_hit_ratio, abs=1e-3)


def test_json_of_a_difference_has_no_number_that_is_none() -> None:
    text = msgspec.json.encode(compare(Samples(small(), 4), Samples(small(), 4)))
    assert json.loads(text)["ks"]["input"] == 0
