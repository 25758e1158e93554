"""Traces: sorted, checked, written and read back byte for byte; contents that begin alike."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.base.errors import ConfigError
from tenon.workloads import trace
from tenon.workloads.trace import Segment, Trace, TraceRequest


def request(name: str = "a", arrival_s: float = 0.0, **fields: object) -> TraceRequest:
    return msgspec.structs.replace(TraceRequest(name, arrival_s, (Segment(1, 5),), 3), **fields)


requests = st.lists(
    st.builds(
        TraceRequest,
        id=st.uuids().map(str),
        arrival_s=st.floats(0, 1e6),
        prompt=st.lists(st.builds(Segment, st.integers(0, 2**52), st.integers(1, 10**6)), min_size=1, max_size=4).map(
            tuple
        ),
        n_output=st.integers(1, 10**6),
        session=st.text(max_size=3),
        turn=st.integers(0, 9),
        slo_class=st.text(max_size=3),
    ),
    max_size=8,
    unique_by=lambda r: r.id,
)


@given(requests)
def test_a_trace_is_sorted_keeps_its_tokens_and_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, given_: list
) -> None:
    made = Trace.make("t", "hypothesis", given_, seed=1)
    assert [r.arrival_s for r in made.requests] == sorted(r.arrival_s for r in given_)
    assert sum(r.n_prompt for r in made.requests) == sum(r.n_prompt for r in given_)
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    trace.save(made, path)
    assert trace.load(path) == made
    assert path.read_bytes() == trace.dump(made)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([request(""), request("b")], "line 2: id must be set"),
        ([request(), request()], "line 3: id must be set, and the trace's only one"),
        ([request(arrival_s=-1.0)], "arrival_s must be at least 0, got -1.0"),
        ([request(arrival_s=float("nan"))], "arrival_s must be at least 0, got nan"),
        ([request(gap_s=-0.5)], "gap_s must be at least 0"),
        ([request(n_output=0)], "n_output must be at least 1, got 0"),
        ([request(prompt=())], "prompt must be segments"),
        ([request(prompt=(Segment(1, 0),))], "prompt must be segments"),
        ([request(after="z")], "after must be the id of an earlier request, got 'z'"),
        ([request("a"), request("b", after="b")], "line 3: after must be"),
    ],
)
def test_what_cannot_be_is_refused_with_line_and_field(bad: list[TraceRequest], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Trace.make("t", "test", bad)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: lines[1:], "line 1"),
        (
            lambda lines: [lines[0].replace(b'"version":1', b'"version":7'), *lines[1:]],
            "version 7; this reader knows 1",
        ),
        (lambda lines: [*lines[:2], b"{", *lines[2:]], "line 3"),
        (
            lambda lines: [lines[0], lines[1].replace(b'"n_output":3', b'"n_output":"x"'), *lines[2:]],
            "line 2.*n_output",
        ),
        (lambda lines: [lines[0], lines[1].replace(b'"id"', b'"is"'), *lines[2:]], "line 2"),
        (lambda lines: [lines[0], lines[2], lines[1]], "in the order of arrival_s"),
        (lambda lines: [], "line 1"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path, damage: object, said: str) -> None:
    path = tmp_path / "t.jsonl"
    lines = trace.dump(Trace.make("t", "test", [request("a"), request("b", 1.0)])).splitlines()
    path.write_bytes(b"\n".join(damage(lines)))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=said):
        trace.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing\.jsonl"):
        trace.load(tmp_path / "nothing.jsonl")


@given(st.integers(0, 2**52), st.integers(0, 300), st.integers(0, 300), st.integers(2, 200_000))
def test_longer_runs_of_a_content_begin_with_shorter_ones(content: int, n: int, more: int, vocab: int) -> None:
    short, long = (trace.content_tokens(content, k, vocab, first=1) for k in (n, n + more))
    np.testing.assert_array_equal(short, long[:n])
    assert ((long >= 1) & (long < vocab)).all()


def test_two_contents_differ_and_a_prompt_is_its_segments() -> None:
    one = request(prompt=(Segment(1, 40), Segment(2, 30)))
    tokens = trace.prompt_tokens(one, 50_000)
    assert len(tokens) == one.n_prompt == 70
    np.testing.assert_array_equal(tokens[:40], trace.content_tokens(1, 40, 50_000))
    assert (trace.content_tokens(1, 30, 50_000) != trace.content_tokens(2, 30, 50_000)).any()
