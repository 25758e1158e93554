"""Generators: the same seed gives the same bytes, sessions hold together, and the cited figures come out."""

import itertools
from collections import defaultdict

import numpy as np
import pytest

from tenon.base.errors import ConfigError
from tenon.workloads import trace
from tenon.workloads.describe import Samples
from tenon.workloads.dialogue import merged
from tenon.workloads.figures import error, measure
from tenon.workloads.fit import LENGTHS, conversation
from tenon.workloads.generator import GENERATORS, make
from tenon.workloads.parameters import Figure, families
from tenon.workloads.readers import read
from tenon.workloads.trace import Segment, TraceRequest

WITHOUT_SESSIONS = {"azure-2023-code", "azure-2023-conv", "azure-2024-code", "azure-2024-conv", "burstgpt", "adaserve"}


@pytest.mark.parametrize("name", GENERATORS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(name: str) -> None:
    one, again, other = (trace.dump(make(name, seed=seed, requests=60)) for seed in (3, 3, 4))
    assert one == again
    assert one != other


@pytest.mark.parametrize("name", GENERATORS)
def test_the_first_requests_do_not_depend_on_how_many_are_made(name: str) -> None:
    few, many = (make(name, seed=1, requests=n).requests for n in (40, 150))
    assert few == many[:40]


@pytest.mark.parametrize("name", GENERATORS)
def test_a_duration_ends_the_trace(name: str) -> None:
    longer = make(name, seed=2, requests=100)
    cut_s = longer.requests[60].arrival_s
    cut = make(name, seed=2, duration_s=cut_s)
    assert cut.requests == tuple(itertools.takewhile(lambda r: r.arrival_s <= cut_s, cut.requests))
    assert cut.requests[:60] == longer.requests[:60]
    assert len(cut.requests) >= 60


@pytest.mark.parametrize("name", GENERATORS)
def test_two_seeds_share_no_content(name: str) -> None:
    contents = [{s.content for r in make(name, seed=seed, requests=80).requests for s in r.prompt} for seed in (0, 1)]
    assert not contents[0] & contents[1]


@pytest.mark.parametrize(
    ("name", "rate", "tolerance"),
    [
        ("mooncake-conversation", 2.0, 0.05),
        ("mooncake-synthetic", 2.0, 0.1),
        ("mooncake-toolagent", 2.0, 0.05),
        ("azure-2023-code", 2.0, 0.5),
        ("azure-2023-conv", 2.0, 0.35),
        ("sharegpt", 0.5, 0.1),
        ("lmsys", 0.5, 0.1),
        ("longbench", 0.05, 0.1),
        ("loogle", 0.05, 0.15),
        ("adaserve", 2.0, 0.1),
    ],
)
def test_the_rate_is_the_one_asked_for(name: str, rate: float, tolerance: float) -> None:
    """Bursts take their time to even out, and sessions to overlap as much as they will."""
    made = make(name, seed=5, requests=6000, rate=rate)
    assert len(made.requests) / made.duration_s == pytest.approx(rate, rel=tolerance)


@pytest.mark.parametrize("name", ["azure-2024-code", "azure-2024-conv", "burstgpt"])
def test_whole_weeks_have_the_mean_rate(name: str) -> None:
    made = make(name, seed=5, duration_s=14 * 86400.0, rate=0.01)
    assert len(made.requests) / (14 * 86400) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("name", sorted(set(GENERATORS) - WITHOUT_SESSIONS))
def test_a_session_grows_out_of_what_was_said(name: str) -> None:
    sessions: dict[str, list[TraceRequest]] = defaultdict(list)
    for request in make(name, seed=1, requests=1500).requests:
        sessions[request.session].append(request)
    followers = 0
    for session in sessions.values():
        assert [r.turn - session[0].turn for r in session] == list(range(len(session)))
        for before, request in itertools.pairwise(session):
            followers += 1
            assert before.prompt[0].content == request.prompt[0].content
            assert request.arrival_s >= before.arrival_s
            assert request.after in ("", before.id)
            said = (*before.prompt, Segment(before.output, before.n_output))
            if name in ("sharegpt", "lmsys", "longbench", "loogle", "swe-agent"):
                assert request.prompt[: len(said)] == said
                assert request.after == before.id
    assert followers > 0 or name == "mooncake-toolagent"


@pytest.mark.parametrize(
    ("name", "asked", "tolerance"),
    [
        ("mooncake-conversation", {}, {}),
        (
            "mooncake-synthetic",
            {},
            {
                "input_p50": 0.3,
                "input_p99": 0.2,
                "output_p50": 0.2,
                "block_gap_s_p50": 0.2,
                "follow_gap_s_p50": 0.2,
                "follow_gap_s_p99": 0.2,
            },
        ),
        ("mooncake-toolagent", {"requests": 6000}, {}),
        ("azure-2023-code", {}, {"interarrival_s_cv": 0.3, "peak_minute": 0.4, "rate_per_s": 0.3}),
        ("azure-2023-conv", {"requests": 10_000}, {"peak_minute": 0.3}),
        ("azure-2024-code", {"requests": 8000}, {}),
        ("azure-2024-conv", {"requests": 8000}, {}),
        ("burstgpt", {"requests": 15_000}, {"answer_base": 0.2}),
        ("sharegpt", {"requests": 8000}, {}),
        ("lmsys", {"requests": 8000}, {}),
        ("longbench", {"requests": 1500}, {}),
        ("loogle", {"requests": 2500}, {}),
        (
            "swe-agent",
            {"sessions": 120},
            {"session_input_p95": 0.2, "session_input_p50": 0.4, "session_turns_p50": 0.2},
        ),
        ("adaserve", {"requests": 4000}, {}),
    ],
)
def test_a_made_trace_has_the_cited_figures(name: str, asked: dict, tolerance: dict[str, float]) -> None:
    """Within 10 %, but for the figures whose sample of one trace varies more; the bench takes the median of many."""
    found = measure(Samples(make(name, seed=0, **asked)))
    wrong = {
        key: (found[key], figure.value)
        for key, figure in families()[name].figures.items()
        if error(key, found[key], figure) > tolerance.get(key, 0.02 if key.startswith("lru_") else 0.1)
    }
    assert not wrong


def test_coding_agents_have_the_cited_figures() -> None:
    made = make("coding-agent", seed=2, sessions=60)
    found = measure(Samples(made, 4096))
    # Half of the sessions are a single request and 1 in 100 has 137: means of sixty sessions say little.
    for key in ("prefix_p50", "output_p50", "pause_tool_p50", "pause_tool_p90", "tool_steps_mean", "pause_person_p50"):
        assert error(key, found[key], families()["coding-agent"].figures[key]) < 0.25, key


def test_a_full_context_is_compacted_to_what_all_share_and_a_summary() -> None:
    made = make("coding-agent", seed=1, requests=2000, context_tokens=40_000, summary_tokens=5000, system_tokens=1000)
    compacted = 0
    last: dict[str, TraceRequest] = {}
    for request in made.requests:
        before = last.get(request.session)
        assert request.n_prompt + request.n_output <= 40_000
        if before is not None and request.prompt[: len(before.prompt)] != before.prompt:
            assert request.prompt[0] == before.prompt[0] == made.requests[0].prompt[0]
            assert request.prompt[1].n == 5000
            assert len(request.prompt) == 3
            compacted += 1
        last[request.session] = request
    assert compacted > 10


def test_the_reuse_gaps_and_the_lru_curve_are_those_of_the_released_conversation_trace() -> None:
    samples = Samples(make("mooncake-conversation", seed=1))
    for name in ("follow_gap_s", "block_gap_s"):
        rows = np.array(families()["mooncake-conversation"].curves[name].value, dtype=float)
        rows = rows[rows[:, 1] > 0]
        below = np.searchsorted(np.sort(getattr(samples, name)), rows[:, 1], "right") / len(getattr(samples, name))
        assert np.abs(below - rows[:, 0] / 100).max() <= 0.05
    rows = np.array(families()["mooncake-conversation"].curves["lru"].value)
    assert np.abs(np.array(samples.lru(rows[:, 0].astype(int).tolist())) - rows[:, 1]).max() <= 0.02


def test_fitting_a_made_trace_gives_its_parameters_back() -> None:
    given = families()["mooncake-conversation"].parameters
    found = conversation(make("mooncake-conversation", seed=7))
    assert set(found) == set(given) - {"every_s", "common_tokens"}
    for key in ("text_memory", "gap_memory", "repeat_first"):
        assert found[key] == pytest.approx(given[key].value, abs=0.06), key
    for key in ("first_tokens", "output_tokens", "gap_s"):
        middle = {row[0]: row[1] for row in found[key]}[50]
        assert middle == pytest.approx({row[0]: row[1] for row in given[key].value}[50], rel=0.08), key
    chances = {row[0]: row[1] for row in given["again_first"].value}
    for length, chance in found["again_first"]:
        assert chance == pytest.approx(chances[length], abs=0.1)
    assert [row[0] for row in found["again_first"]] == list(LENGTHS)


@pytest.mark.parametrize(
    ("name", "dispersion", "median_s"), [("loogle", "low", 705), ("loogle", "high", 1142), ("longbench", "low", 705)]
)
def test_dispersion_sets_how_far_apart_turns_are(name: str, dispersion: str, median_s: float) -> None:
    made = make(name, seed=1, requests=800, dispersion=dispersion)
    assert float(np.median(Samples(made).follow_gap_s)) == pytest.approx(median_s, rel=0.05)


def test_objectives_stand_in_the_header_and_can_be_set() -> None:
    made = make("adaserve", requests=50, slo_chat_tpot_s=0.02)
    assert made.header.parameters["slo"] == {
        "coding": {"tpot_s": 0.036}, "chat": {"tpot_s": 0.02}, "summary": {"tpot_s": 0.15}
    }  # fmt: skip
    assert {r.slo_class for r in made.requests} == {"coding", "chat", "summary"}
    assert max(r.n_output for r in made.requests) <= 256


def test_demand_is_that_of_the_hours_and_days() -> None:
    made = make("azure-2024-code", seed=1, requests=30_000)
    days = np.bincount([int(r.arrival_s // 86400) for r in made.requests])[:7]
    assert days[:5].min() > 3 * days[5:7].max() * 0.7
    noon = np.mean([14 * 3600 < r.arrival_s % 86400 < 20 * 3600 for r in made.requests])
    night = np.mean([2 * 3600 < r.arrival_s % 86400 < 8 * 3600 for r in made.requests])
    assert noon > 2.5 * night


def test_the_header_says_what_was_given() -> None:
    parameters = make("lmsys", seed=9, requests=5, rate=0.5, turns=4.0).header.parameters
    assert parameters == {"seed": 9, "requests": 5, "rate": 0.5, "turns": 4.0}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"name": "mooncake"}, "there is no workload 'mooncake'; there are mooncake-conversation, "),
        ({"seed": -1}, "seed must be at least 0"),
        ({"requests": 0}, "requests must be at least 1, got 0"),
        ({"duration_s": -1.0}, "duration_s must be more than 0, got -1.0"),
        ({"rate": float("nan")}, "rate must be more than 0, got nan"),
        ({"duration_s": 1e-9, "rate": 0.001}, "no request within 1e-09 s at 0.001/s"),
        ({"turns": 0.5}, "turns must be at least 1, got 0.5"),
        ({"share_chat": 1.0}, "has no parameter 'share_chat'"),
    ],
)
def test_what_cannot_be_made_is_refused(asked: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(**{"name": "lmsys", **asked})


def test_classes_need_a_share() -> None:
    with pytest.raises(ConfigError, match="share_coding, share_chat and share_summary"):
        make("adaserve", share_coding=0, share_chat=0, share_summary=0)


def test_merging_sorts_and_is_lazy() -> None:
    def session(number: int) -> list[TraceRequest]:
        return [TraceRequest(f"{number}.{i}", number + 0.7 * i, (Segment(1, 1),), 1) for i in range(number % 4)]

    taken = list(itertools.islice(merged(session(i) for i in itertools.count()), 200))
    assert [r.arrival_s for r in taken] == sorted(r.arrival_s for r in taken)
    assert len({r.id for r in taken}) == 200
    ended = list(merged(session(i) for i in range(8)))
    assert len(ended) == sum(i % 4 for i in range(8))


def test_a_figure_that_is_a_share_is_compared_by_difference() -> None:
    assert error("lru_512000", 0.05, Figure(0.04, "cited", "")) == pytest.approx(0.01)
    assert error("input_mean", 5.0, Figure(4.0, "cited", "")) == pytest.approx(0.25)


def test_a_trace_that_is_written_is_read_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    made = make("coding-agent", seed=1, requests=200)
    trace.save(made, tmp_path / "t.jsonl")
    assert read(tmp_path / "t.jsonl") == made
