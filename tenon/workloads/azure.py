"""Azure's LLM inference traces: an hour of 2023 (code and conversation) and the week of 2024 with its days and nights.

Azure/AzurePublicDataset, ``AzureLLMInferenceTrace_{code,conv}.csv`` (Patel et al., Splitwise, ISCA'24, arXiv
2311.18677) and the 2024 week (Stojkovic et al., DynamoLLM, HPCA'25, arXiv 2408.00741). Prompts share nothing: the
files do not say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tenon.workloads import arrivals
from tenon.workloads.generator import Order
from tenon.workloads.trace import Segment, TraceRequest

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


def hour(order: Order) -> Iterator[TraceRequest]:
    """Gaps and lengths after the file's quantiles; short gaps stand together as long as in the file."""
    gaps, stream = order.given.quantiles("gap_s"), order.streams.of("arrivals")
    memory, run = order.given.share("gap_memory"), order.given.number("gap_run", low=1)
    return lengths_at(order, arrivals.measured(stream, gaps, order.rate, memory=memory, run=run))


def week(order: Order) -> Iterator[TraceRequest]:
    """A week from Monday 0:00 UTC: demand by the hour of working days and weekends, lengths as in 2023."""
    given = order.given
    curve = weekly(given.rows("weekday"), given.rows("weekend"))
    cv = given.number("cv", above=True)
    return lengths_at(order, arrivals.varying(order.streams.of("arrivals"), curve, order.rate, cv))


def weekly(weekday: list[list[float]], weekend: list[list[float]]) -> arrivals.RateCurve:
    """Five days of one curve and two of another; both are rows of (hour, demand)."""
    days = [weekday] * 5 + [weekend] * 2
    points = [[day * DAY_S + hour * HOUR_S, rate] for day, rows in enumerate(days) for hour, rate in rows]
    return arrivals.RateCurve(points, 7 * DAY_S)


def lengths_at(order: Order, times: Iterable[float]) -> Iterator[TraceRequest]:
    """A request of its own at each time, lengths independent (the files' logarithms correlate by -0.00 and 0.09)."""
    inputs, outputs = order.given.quantiles("input_tokens"), order.given.quantiles("output_tokens")
    in_stream, out_stream = order.streams.of("inputs"), order.streams.of("outputs")
    for number, at_s in enumerate(times):
        n_input = max(1, round(inputs.at(float(in_stream.random()))))
        n_output = max(1, round(outputs.at(float(out_stream.random()))))
        yield TraceRequest(f"{number}", round(at_s, 6), (Segment(order.contents.new(), n_input),), n_output)
