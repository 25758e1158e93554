"""Coding agents: a person's requests, each a loop of model steps and tools, and whole issues solved without a person.

``coding`` follows TraceLab (arXiv 2606.30560): requests a session, tool steps a request, tool latencies, human waits,
and compaction when the context is full. ``trajectories`` follows the published SWE trajectories: turns and final
lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tenon.workloads import arrivals
from tenon.workloads.dialogue import Dialogue, merged
from tenon.workloads.draws import LogNormal
from tenon.workloads.generator import Order
from tenon.workloads.trace import Segment, TraceRequest


class _Pace:
    """When the next step comes: after the answer, by an estimate for who only looks, and a pause."""

    def __init__(self, at_s: float, token_s: float) -> None:
        self.at_s, self.gap_s, self._token_s = at_s, 0.0, token_s

    def wait(self, n_output: int, gap_s: float) -> None:
        self.at_s, self.gap_s = self.at_s + self._token_s * n_output + gap_s, gap_s


def _starts(order: Order, rate: float) -> Iterator[float]:
    """When sessions begin: endless, or as many as the family makes whole."""
    limit = order.given.count("sessions") if order.whole else None
    return itertools.islice(arrivals.poisson(order.streams.of("arrivals"), rate), limit)


def coding(order: Order) -> Iterator[TraceRequest]:
    """A session is a person's requests; a request is a first step and its tool steps. ``slo_class`` says which a
    step is.
    """
    given, streams = order.given, order.streams
    requests, steps = given.quantiles("requests_per_session"), given.quantiles("tool_steps_per_request")
    human, tool = given.quantiles("human_wait_s"), given.quantiles("tool_latency_s")
    counts, waits = streams.of("counts"), streams.of("waits")
    system = Segment(order.contents.new(), given.count("system_tokens"))
    opening = LogNormal(streams.of("openings"), given.number("opening_tokens", low=1), given.number("opening_sigma"))
    append = LogNormal(streams.of("appends"), given.number("append_tokens", low=1), given.number("append_sigma"))
    output = LogNormal(streams.of("outputs"), given.number("output_tokens", low=1), given.number("output_sigma"))
    window, summary = given.count("context_tokens"), given.count("summary_tokens")
    token_s = given.number("estimate_s_per_token")
    room = window - system.n - summary

    def session(number: int, start_s: float) -> list[TraceRequest]:
        dialogue, pace = Dialogue(f"s{number}", order.contents, (system,)), _Pace(start_s, token_s)
        made: list[TraceRequest] = []
        for _ in range(int(requests.at(counts.random()))):
            for step in range(1 + int(steps.at(counts.random()))):
                new = min(room // 2, opening.tokens() if not made else append.tokens())
                n_output = min(room // 4, output.tokens())
                if dialogue.n_tokens + new + n_output > window:
                    # Compaction: a summary takes the place of all but the beginning that every session shares.
                    dialogue.keep(system.n)
                    dialogue.say(summary)
                dialogue.say(new)
                if made:
                    pause = tool if step else human
                    pace.wait(made[-1].n_output, pause.at(waits.random()))
                kind = "tool" if step else "person"
                made.append(dialogue.ask(pace.at_s, n_output, gap_s=pace.gap_s, slo_class=kind))
        return made

    starts = _starts(order, order.rate / (requests.mean() * (1 + steps.mean())))
    yield from merged(session(i, at_s) for i, at_s in enumerate(starts))


def trajectories(order: Order) -> Iterator[TraceRequest]:
    """A session is one issue: a first prompt, then a tool's output a turn until the last prompt has its drawn
    length.
    """
    given, streams = order.given, order.streams
    turns, final, tool = (
        given.quantiles("turns"),
        given.quantiles("max_input_tokens"),
        given.quantiles("tool_latency_s"),
    )
    counts, waits = streams.of("counts"), streams.of("waits")
    system = Segment(order.contents.new(), given.count("system_tokens"))
    issue = LogNormal(streams.of("issues"), given.number("issue_tokens", low=1), given.number("issue_sigma"))
    output = LogNormal(streams.of("outputs"), given.number("output_tokens", low=1), given.number("output_sigma"))
    parts, sigma = streams.of("parts"), given.number("append_sigma")
    token_s = given.number("estimate_s_per_token")

    def session(number: int, start_s: float) -> list[TraceRequest]:
        dialogue, pace = Dialogue(f"s{number}", order.contents, (system,)), _Pace(start_s, token_s)
        n, length = max(1, round(turns.at(counts.random()))), round(final.at(counts.random()))
        dialogue.say(max(1, min(issue.tokens(), length - system.n)))
        outputs = [output.tokens() for _ in range(n)]
        # Growth up to the last prompt is split over the turns; answers take at most their turn's share.
        weights = [LogNormal(parts, 1.0, sigma).draw() for _ in range(n - 1)]
        grow = max(0, length - dialogue.n_tokens)
        made: list[TraceRequest] = []
        for turn in range(n):
            share = int(grow * weights[turn] / sum(weights)) if turn < n - 1 else outputs[turn] + 1
            n_output = max(1, min(outputs[turn], share - 1))
            made.append(dialogue.ask(pace.at_s, n_output, gap_s=pace.gap_s))
            dialogue.say(max(1, share - n_output))
            pace.wait(n_output, tool.at(waits.random()))
        return made

    starts = _starts(order, order.rate / turns.mean())
    yield from merged(session(i, at_s) for i, at_s in enumerate(starts))
