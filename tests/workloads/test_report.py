"""Reports: definitions checked by other means, conservation, tiny inputs, what is written and read."""

from __future__ import annotations

import io
import json
import math
import tracemalloc
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tenon.base.errors import ConfigError
from tenon.workloads import percentiles, report_view
from tenon.workloads import report as reports
from tenon.workloads.report import Outcome, Slo, report_of
from tenon.workloads.trace import Segment, Trace, TraceRequest

times = st.floats(0, 1e4, allow_nan=False).map(lambda value: round(value, 6))


def outcome(name: str = "a", intended_s: float = 0.0, *token_s: float, **fields: Any) -> Outcome:
    """An answered request whose tokens came at these times."""
    end_s = token_s[-1] if token_s else intended_s
    given = {"sent_s": intended_s, "end_s": end_s, "n_prompt": 10, "token_s": token_s} | fields
    return Outcome(id=name, intended_s=intended_s, **given)


@st.composite
def outcomes(draw: st.DrawFn) -> list[Outcome]:
    found = []
    for number in range(draw(st.integers(0, 12))):
        at = sorted(draw(st.lists(times, min_size=3, max_size=9)))
        found.append(
            Outcome(
                id=str(number),
                intended_s=at[0],
                sent_s=at[1],
                end_s=at[-1],
                n_prompt=7,
                token_s=tuple(at[2:-1]),
                cached_tokens=draw(st.integers(0, 7)),
                slo_class=draw(st.sampled_from(["", "chat", "code"])),
                error=draw(st.sampled_from(["", "", "http 429: full", "connect: refused"])),
            )
        )
    return found


def plain_percentile(values: list[float], percent: float) -> float:
    """The definition, written out."""
    ordered = sorted(values)
    h = (len(ordered) - 1) * percent / 100
    k = math.floor(h)
    above = ordered[min(k + 1, len(ordered) - 1)]
    return ordered[k] + (h - k) * (above - ordered[k])


@given(st.lists(times, min_size=1, max_size=60))
def test_percentiles_are_those_of_the_definition_and_of_numpy(values: list[float]) -> None:
    summary = percentiles.summarise(np.array(values), "")
    for one in summary.percentiles:
        assert one.value == np.percentile(values, one.percent)
        assert one.value == pytest.approx(plain_percentile(values, one.percent), rel=1e-12, abs=1e-12)
    assert summary.curve[0] == min(values)
    assert summary.curve[-1] == summary.max == max(values)
    assert summary.mean == pytest.approx(float(np.mean(values)), rel=1e-12, abs=1e-12)
    assert summary.at(50) == pytest.approx(float(np.median(values)), rel=1e-12, abs=1e-12)


def exact_ranks(n: int, p: float) -> tuple[int | None, int | None]:
    """By the definition, with exact binomial coefficients."""
    pmf = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    low = max((rank for rank in range(1, n + 1) if sum(pmf[:rank]) <= 0.025), default=None)
    high = min((rank for rank in range(1, n + 1) if sum(pmf[rank:]) <= 0.025), default=None)
    return low, high


@pytest.mark.parametrize("percent", [50.0, 90.0, 95.0, 99.0])
def test_interval_ranks_are_the_binomials(percent: float) -> None:
    for n in (*range(1, 61), 100, 299, 500):
        assert percentiles.ranks(n, percent) == exact_ranks(n, percent / 100), n


def test_interval_ranks_of_the_median_are_the_textbooks() -> None:
    assert percentiles.ranks(5, 50.0) == (None, None)
    assert percentiles.ranks(6, 50.0) == (1, 6)
    assert percentiles.ranks(10, 50.0) == (2, 9)
    assert percentiles.ranks(100, 50.0) == (40, 61)


def test_intervals_hold_the_true_percentile_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    true, hits = -math.log(0.1), 0
    for _ in range(1000):
        p90 = percentiles.summarise(rng.exponential(1.0, 80), "").percentiles[1]
        assert p90.low is not None
        assert p90.high is not None
        hits += p90.low <= true <= p90.high
    assert hits >= 940


def test_a_missing_end_of_an_interval_says_why() -> None:
    p50, p90, _, p99 = percentiles.summarise(np.arange(40.0), "").percentiles
    assert None not in (p50.low, p50.high)
    assert not p50.why
    assert (p90.high, p90.why) == (39.0, "")
    assert p99.low is not None
    assert (p99.high, p99.why) == (None, "40 values are too few for its upper end")


def test_latencies_count_from_the_intended_time() -> None:
    late = Outcome(id="a", intended_s=1.0, sent_s=4.0, end_s=10.0, n_prompt=5, token_s=(6.0, 7.0, 9.0))
    report = report_of([late])
    assert (report.overall.ttft.max, report.overall.tpot.max, report.overall.e2e.max) == (5.0, 1.5, 9.0)
    assert (report.overall.gap.n, report.overall.gap.mean, report.overall.gap.max) == (2, 1.5, 2.0)
    assert report.lag.max == 3.0
    assert report.span_s == 9.0
    assert report.overall.output_tokens_per_s == 3 / 9


def test_counts_rates_and_errors_by_kind() -> None:
    given = [
        outcome("a", 0.0, 1.0, 2.0, slo_class="chat", cached_tokens=4, n_chunks=1),
        outcome("b", 1.0, 5.0, slo_class="code", n_chunks=1),
        outcome("c", 2.0, slo_class="chat", end_s=3.0, error="http 429: the queue is full: 512"),
        outcome("d", 3.0, 4.0, slo_class="chat", end_s=11.0, error="broken stream: reset"),
        outcome("e", 3.0, slo_class="code", end_s=4.0, error="http 429: later"),
    ]
    report = report_of(given)
    overall = report.overall
    assert (overall.n, overall.n_answered, overall.errors) == (5, 2, {"broken stream": 1, "http 429": 2})
    assert (overall.prompt_tokens, overall.cached_tokens, overall.output_tokens, overall.chunks) == (20, 4, 3, 2)
    assert overall.requests_per_s == 2 / 11
    assert report.offered_per_s == 4 / 3
    chat, code = report.classes
    assert (chat.slo_class, chat.n, chat.errors) == ("chat", 3, {"broken stream": 1, "http 429": 1})
    assert (code.slo_class, code.n, code.errors, code.ttft.max) == ("code", 2, {"http 429": 1}, 4.0)


def test_attainment_and_goodput_by_hand() -> None:
    slos = {"chat": Slo(ttft_s=1.0, tpot_s=0.5), "": Slo(e2e_s=3.0)}
    given = [
        outcome("meets all", 0.0, 1.0, 1.5, slo_class="chat"),
        outcome("slow tokens", 0.0, 1.0, 2.0, slo_class="chat"),
        outcome("late", 0.0, 2.0, 2.1, slo_class="chat"),
        outcome("one token", 0.0, 0.5, slo_class="chat"),
        outcome("no token", 0.0, slo_class="chat", end_s=0.1),
        outcome("failed", 0.0, slo_class="chat", end_s=0.1, error="connect: refused"),
        outcome("in time", 0.0, 1.0, 3.0, slo_class="other"),
        outcome("too long", 0.0, 1.0, 4.0),
    ]
    report = report_of(given, slos)
    _, chat, other = report.classes
    assert chat.attainment is not None
    assert (chat.attainment.n, chat.attainment.met) == (6, 2 / 6)
    assert (chat.attainment.ttft, chat.attainment.tpot, chat.attainment.e2e) == (3 / 6, 3 / 6, None)
    assert (chat.attainment.requests_per_s, chat.attainment.tokens_per_s) == (2 / 4, 3 / 4)
    assert other.attainment is not None
    assert (other.attainment.met, other.attainment.e2e, other.attainment.ttft) == (1.0, 1.0, None)
    assert report.overall.attainment is not None
    assert (report.overall.attainment.n, report.overall.attainment.met) == (8, 3 / 8)


def test_requests_without_an_slo_are_not_judged() -> None:
    given = [outcome("a", 0.0, 1.0, slo_class="chat"), outcome("b", 0.0, 9.0)]
    report = report_of(given, {"chat": Slo(ttft_s=2.0)})
    assert report.overall.attainment is not None
    assert (report.overall.attainment.n, report.overall.attainment.met) == (1, 1.0)
    assert report.classes[0].attainment is None
    assert report_of(given).overall.attainment is None


@given(outcomes(), st.randoms(use_true_random=False))
def test_the_order_of_outcomes_does_not_matter(given: list[Outcome], random: Any) -> None:
    slos = {"": Slo(ttft_s=100.0), "code": Slo(e2e_s=5000.0)}
    shuffled = list(given)
    random.shuffle(shuffled)
    assert reports.dump(report_of(given, slos)) == reports.dump(report_of(shuffled, slos))


@given(outcomes())
def test_nothing_is_lost_between_classes_answers_and_errors(given: list[Outcome]) -> None:
    report = report_of(given, {"": Slo(ttft_s=100.0)})
    for group in (report.overall, *report.classes):
        assert group.n == group.n_answered + sum(group.errors.values())
    assert report.overall.n == len(given) == sum(one.n for one in report.timeline)
    if report.classes:
        for field in ("n", "n_answered", "prompt_tokens", "cached_tokens", "output_tokens"):
            assert getattr(report.overall, field) == sum(getattr(group, field) for group in report.classes)
        assert report.overall.gap.n == sum(group.gap.n for group in report.classes)


@given(outcomes())
@settings(max_examples=50)
def test_a_report_comes_back_from_its_json_which_has_no_nan(given: list[Outcome]) -> None:
    report = report_of(given, {"chat": Slo(tpot_s=0.1)}, ["a note"], title="x")
    data = reports.dump(report)
    assert msgspec.json.decode(data, type=reports.Report) == report
    json.loads(data, parse_constant=lambda word: pytest.fail(word))


def test_empty_and_tiny_inputs_have_nulls_with_their_reasons() -> None:
    empty = report_of([])
    assert (empty.overall.n, empty.overall.ttft.mean, empty.overall.requests_per_s) == (0, None, None)
    assert empty.overall.ttft.why == "no request was answered"
    assert empty.timeline == ()
    tokenless = report_of([outcome("a", 1.0)]).overall
    assert (tokenless.n_answered, tokenless.ttft.why) == (1, "no answer has a token")
    one = report_of([outcome("a", 1.0, 2.0)])
    assert (one.overall.ttft.at(99), one.overall.tpot.why) == (1.0, "no answer has two tokens")
    assert one.overall.ttft.percentiles[0].why == "1 values are too few for its lower and upper end"
    assert one.offered_per_s is None


def test_gaps_get_no_interval_and_say_why() -> None:
    p50 = report_of([outcome("a", 0.0, *np.arange(1.0, 99.0))]).overall.gap.percentiles[0]
    assert (p50.value, p50.low, p50.high) == (1.0, None, None)
    assert p50.why == "the gaps of one answer depend on each other"


def test_the_timeline_shows_when_it_was_slow_and_when_it_failed() -> None:
    given = [outcome(str(i), float(i), i + (5.0 if 60 <= i < 80 else 1.0)) for i in range(121)]
    given[30] = outcome("30", 30.0, error="connect: refused")
    timeline = report_of(given).timeline
    assert len(timeline) == reports.BINS
    assert [one.start_s for one in timeline] == [2.0 * i for i in range(60)]
    assert [one.ttft_max for one in timeline] == [5.0 if 30 <= i < 40 else 1.0 for i in range(60)]
    assert [i for i, one in enumerate(timeline) if one.n_failed] == [15]
    assert timeline[-1].n == 3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"intended_s": -1.0}, "intended_s must be at least 0, got -1.0"),
        ({"intended_s": math.nan}, "intended_s must be at least 0, got nan"),
        ({"sent_s": 0.5}, "sent_s must be at least 1, got 0.5"),
        ({"end_s": 1.0}, "end_s must be at least 2, got 1.0"),
        ({"end_s": math.inf}, "end_s must be at least 2, got inf"),
        ({"token_s": (4.0, 3.0)}, "token_s must be in order, between sent_s and end_s, got 3.0"),
        ({"token_s": (1.0,)}, "token_s must be in order, between sent_s and end_s, got 1.0"),
        ({"token_s": (3.0, 9.0)}, "token_s must be in order, between sent_s and end_s, got 9.0"),
        ({"token_s": (3.0, math.nan, 4.0)}, "token_s must be in order, between sent_s and end_s, got nan"),
        ({"cached_tokens": 8}, r"cached_tokens must be between 0 and n_prompt \(7\), got 8"),
    ],
)
def test_an_outcome_that_cannot_be_is_named(fields: dict[str, Any], said: str) -> None:
    right: dict[str, Any] = {"intended_s": 1.0, "sent_s": 2.0, "end_s": 5.0, "n_prompt": 7, "token_s": (3.0, 4.0)}
    with pytest.raises(ConfigError, match=f"outcome 'x': {said}"):
        report_of([Outcome(id="x", **right | fields)])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ttft=0.5", ("", Slo(ttft_s=0.5))),
        ("ttft=500ms, tpot=50ms,e2e=10s", ("", Slo(0.5, 0.05, 10.0))),
        ("chat:tpot=0.1", ("chat", Slo(tpot_s=0.1))),
        ("a:b:e2e=2", ("a:b", Slo(e2e_s=2.0))),
    ],
)
def test_slos_are_read(text: str, found: tuple[str, Slo]) -> None:
    assert reports.slo_from(text) == found


@pytest.mark.parametrize("text", ["", "ttft", "ttft=0", "ttft=-1", "ttft=x", "ttft=nan", "ttf=1", "chat:", ":ttft=1"])
def test_a_wrong_slo_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"an SLO is written \[CLASS:\]ttft|names an empty class"):
        reports.slo_from(text)


def trace_with(**parameters: Any) -> Trace:
    requests = [TraceRequest(name, 0.0, (Segment(1, 1),), 1, slo_class=name) for name in ("chat", "code")]
    return Trace.make("t", "test", requests, **parameters)


def test_slos_come_from_the_user_else_from_the_trace() -> None:
    own = trace_with(slo={"chat": {"ttft_s": 1.0}, "": {"e2e_s": 9.0}})
    assert reports.slos_from([], own) == {"chat": Slo(ttft_s=1.0), "": Slo(e2e_s=9.0)}
    assert reports.slos_from(["code:tpot=1", "e2e=5"], own) == {"code": Slo(tpot_s=1.0), "": Slo(e2e_s=5.0)}
    assert reports.slos_from([], trace_with()) == {}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["ttft=1", "tpot=1"], "two SLOs are given for all classes"),
        (["chat:ttft=1", "chat:tpot=1"], "two SLOs are given for chat"),
        (["batch:ttft=1"], "an SLO names the class 'batch'; this trace's classes: chat, code"),
        ([], r"the trace 't' has no SLOs under slo: .*speed"),
    ],
)
def test_slos_that_fit_no_trace_are_refused(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        reports.slos_from(texts, trace_with(slo={"chat": {"speed": 1.0}}))


def test_reports_are_saved_and_loaded(tmp_path: Path) -> None:
    report = report_of([outcome("a", 0.0, 1.0, 2.0, slo_class="chat")], {"": Slo(ttft_s=2.0)}, ["n"], title="t")
    reports.save(report, tmp_path / "r.json")
    assert reports.load(tmp_path / "r.json") == report


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw | {"version": 2}, "is a report of version 2; this reader knows 1"),
        (lambda raw: {k: v for k, v in raw.items() if k != "overall"}, "is not a report: .*`overall`"),
        (lambda raw: raw | {"span_s": "x"}, r"is not a report: .*\$.span_s"),
        (lambda raw: raw | {"speed": 1}, "is not a report: .*`speed`"),
        (lambda raw: [], "is not a report"),
    ],
)
def test_a_file_that_is_no_report_of_ours_is_told_in_one_sentence(tmp_path: Path, change: Any, said: str) -> None:
    raw = json.loads(reports.dump(report_of([])))
    (tmp_path / "r.json").write_text(json.dumps(change(raw)))
    with pytest.raises(ConfigError, match=said):
        reports.load(tmp_path / "r.json")


def test_a_missing_report_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.json"):
        reports.load(tmp_path / "none.json")


def test_ten_thousand_outcomes_take_eight_bytes_a_token_and_a_report_of_fixed_size() -> None:
    n, n_tokens = 10_000, 100
    tokens = tuple(1e6 + 0.01 * i for i in range(n_tokens))
    tally = reports.Tally({"": Slo(ttft_s=1e6)})
    tracemalloc.start()
    try:
        for i in range(n):
            tally.add(Outcome(str(i), float(i), float(i), 2e6, 5, tokens, slo_class="abc"[i % 3]))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1.3 * 8 * n * (n_tokens + 11)  # growing arrays keep a sixteenth to spare
    report = tally.report()
    assert (report.overall.n, report.overall.gap.n) == (n, n * (n_tokens - 1))
    assert len(reports.dump(report)) < 100_000


def shown(report: reports.Report) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    report_view.show(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_shows_figures_intervals_errors_and_notes() -> None:
    given = [outcome(str(i), float(i), i + 0.5, i + 0.6, slo_class="[red]x") for i in range(20)]
    given.append(outcome("f", 20.0, slo_class="chat", error="http 429: full"))
    said = shown(report_of(given, {"": Slo(ttft_s=1.0)}, ["mind [this]"], title="T", model="m"))
    assert "model=m" in said
    assert "500..500" in said
    assert "500..?" in said
    assert "failed 1 x http 429" in said
    assert "note mind [this]" in said
    assert "95.2%" in said
    assert "[red]x" in said
    assert "no request was answered" in said


def test_an_empty_report_is_shown_too() -> None:
    assert "no request was answered" in shown(report_of([]))


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "-"), (0.0, "0"), (12.3456, "12346"), (0.8123, "812"), (0.01014, "10.1"), (2e-6, "0.002")],
)
def test_times_are_written_in_milliseconds(value: float | None, said: str) -> None:
    assert report_view.milliseconds(value) == said


@pytest.mark.parametrize("n", [0, 1, 40])
def test_figures_are_svg_and_the_same_bytes_again(n: int, tmp_path: Path) -> None:
    given = [outcome(str(i), float(i), i + 0.5, i + 0.5, i + 0.7, slo_class="ab"[i % 2]) for i in range(n)]
    given += [outcome("f", 1.0, error="connect: refused")] * min(n, 1)
    report = report_of(given, title="T")
    report_view.save_svg(report, tmp_path / "x.svg")
    data = (tmp_path / "x.svg").read_bytes()
    assert ET.fromstring(data).tag.endswith("svg")  # noqa: S314  our own bytes
    assert data == report_view.svg(report)
