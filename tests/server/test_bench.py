"""The bench of the server under load: what it sends, how it counts, and that its claims can fail."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from bench import server_load as bench
from tenon.base import machine, result
from tenon.base.result import Result
from tenon.bench import claim, stats
from tenon.server.keys import read_keys
from tenon.workloads.report import Outcome

ROOT = Path(__file__).parents[2]
REFUSED = "http 429: 512 sequences are in flight and the limit is 512; try again later"


def outcome(due_s: float, first_s: float, *, error: str = "", end_s: float | None = None) -> Outcome:
    """An answer with its tokens a hundredth of a second apart, or a failure."""
    stamps = () if error else tuple(first_s + 0.01 * i for i in range(bench.N_OUTPUT))
    last_s = end_s if end_s is not None else stamps[-1]
    return Outcome(f"r{due_s}-{first_s}", due_s, due_s, last_s, bench.N_PROMPT, stamps, error=error)


def test_a_phase_sends_exactly_what_its_rate_says_and_the_same_again() -> None:
    phase = bench.Phase("x", 25.0, 2.0, 6.0, seed=3)
    times = bench.due_times(phase)
    assert len(times) == 200
    assert times[0] == 0.0
    assert times[-1] < 8.0
    assert times == bench.due_times(bench.Phase("later", 25.0, 2.0, 6.0, seed=3))
    gaps = [b - a for a, b in pairwise(times)]
    assert max(gaps) > 3 / 25  # it is no metronome


def test_phases_follow_one_another_and_share_no_prompt() -> None:
    cell = {"settle_s": 2.0, "measure_s": 3.0}
    trace, windows = bench.load_of(bench.factors(cell, 10.0), "up and down", 7)
    assert windows == {"1x": (2.0, 5.0), "3x": (7.0, 10.0), "10x": (12.0, 15.0), "after": (17.0, 20.0)}
    assert len(trace.requests) == 50 * (1 + 3 + 10 + 1)
    assert len({one.prompt[0].content for one in trace.requests}) == len(trace.requests)
    before = [one.arrival_s for one in trace.requests if one.arrival_s < 5.0]
    after = [one.arrival_s - 15.0 for one in trace.requests if one.arrival_s >= 15.0]
    assert after == pytest.approx(before)


def test_goodput_counts_tokens_in_the_window_of_answers_in_time() -> None:
    n = bench.N_OUTPUT
    inside = outcome(0.0, 1.0)
    half = outcome(0.0, 2.0 - n / 2 * 0.01 + 0.005)
    late, failed = outcome(-9.0, 1.0), outcome(0.5, 0.0, error="http 500: no", end_s=1.1)
    assert bench.goodput([inside, half, late, failed], (0.0, 2.0), 3.0) == pytest.approx(1.5 / 2)
    assert bench.goodput([inside, half, late, failed], (0.0, 2.0)) == pytest.approx(2.5 / 2)


def test_a_request_without_a_token_has_waited_until_its_end() -> None:
    found = [outcome(0.0, 0.25), outcome(0.0, 0.0, error="timeout: no", end_s=60.0), outcome(9.0, 99.0)]
    assert bench.ttft_p99_s(found[:1], (0.0, 1.0)) == pytest.approx(0.25)
    assert bench.ttft_p99_s(found, (0.0, 1.0)) > 50
    assert bench.p99([]) == 0.0


def test_figures_of_an_overload_tell_refused_from_broken() -> None:
    windows = {"1x": (0.0, 2.0), "3x": (2.0, 4.0), "10x": (4.0, 6.0), "after": (6.0, 8.0)}
    found = [outcome(at_s, at_s + 0.1) for at_s in (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0)]
    found += [
        outcome(4.5, 0.0, error=f"{REFUSED} (retry after 2 s)", end_s=4.52),
        outcome(4.6, 0.0, error=REFUSED, end_s=4.62),
        outcome(4.7, 0.0, error="http 503: not ready (retry after 1 s)", end_s=4.72),
    ]
    figures = bench.overload_figures(found, windows, 1.0, peak=0.8)
    assert figures["peak"] == pytest.approx(1.0)  # the load itself did better than the sweep
    assert figures["over_peak_3x"] == pytest.approx(1.0)
    assert figures["over_peak_10x"] == pytest.approx(0.5)
    assert figures["over_before"] == pytest.approx(1.0)
    assert (figures["refused"], figures["unhinted"], figures["broken"]) == (2, 1, 1)
    assert figures["refused_p99_s"] == pytest.approx(0.02)


def test_every_client_has_a_key_and_its_quota(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    for quota in (150, None):
        path.write_text(bench.key_file(quota))
        assert [key.requests_per_minute for key in read_keys(path)] == [quota] * bench.N_CLIENTS


def test_the_bench_loads_and_a_quick_run_has_the_cells_of_all_claims() -> None:
    loaded = claim.load(ROOT / "bench", "server_load")
    quick, whole = ({cell.name for cell in loaded.cells(quick)} for quick in (True, False))
    assert quick == {bench.HTTP, bench.OVERLOAD, bench.TENANTS}
    assert whole == quick | {bench.DEFAULTS}
    assert all(set(cell.contenders) <= set(loaded.contenders) for cell in loaded.cells(False))


def judged(**changed: float) -> Result:
    """A result of which all claims hold, save where something is changed."""
    good = {
        "over_peak_3x": 1.0, "over_peak_10x": 0.9, "over_before": 1.0, "refused_p99_s": 0.01, "unhinted": 0.0,
        "broken": 0.0, "lag_p99_s": 0.002, "ttft_p99_s": 0.1, "of_share": 0.97, "others_failed": 0.0, "http": 95.0,
    } | changed  # fmt: skip

    def series(cell: str, contender: str, metric: str, value: float) -> result.Series:
        return stats.series(cell, contender, metric, [value] * 3)

    overload = ("over_peak_3x", "over_peak_10x", "over_before", "refused_p99_s", "unhinted", "broken", "lag_p99_s")
    found = [series(bench.OVERLOAD, "bounded", name, good[name]) for name in overload]
    found += [series(bench.TENANTS, "quotas", name, good[name]) for name in ("ttft_p99_s", "of_share", "others_failed")]
    found += [series(bench.TENANTS, "alone", "ttft_p99_s", 0.09)]
    found += [
        series(bench.HTTP, "http", "tokens_per_s", good["http"]),
        series(bench.HTTP, "engine", "tokens_per_s", 100.0),
    ]
    empty: dict[str, object] = {"ratios": (), "a_a": (), "limits": (), "checks": (), "counts": True, "notes": ()}
    return Result(
        version=result.VERSION, name="server_load", title="", created="", commit="", machine=machine.describe(),
        settings={}, cells={}, contenders=bench.CONTENDERS, series=tuple(found), **empty,  # type: ignore[arg-type]
    )  # fmt: skip


def test_claims_hold_and_each_can_fail() -> None:
    assert all(check.passed for check in bench.checks(judged()))
    bad = {
        "over_peak_3x": 0.89, "over_peak_10x": 0.79, "over_before": 0.94, "refused_p99_s": 0.06, "unhinted": 1.0,
        "broken": 1.0, "lag_p99_s": 0.02, "ttft_p99_s": 0.2, "of_share": 0.89, "others_failed": 1.0, "http": 89.0,
    }  # fmt: skip
    for name, value in bad.items():
        failed = [check for check in bench.checks(judged(**{name: value})) if not check.passed]
        assert len(failed) == 1, name
