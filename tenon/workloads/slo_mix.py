"""AdaServe's mix of three classes with their objectives for the time per output token (EuroSys'26, arXiv 2501.12162).

Coding assistants (HumanEval), chat (Alpaca) and summaries (CNN/DailyMail); arrivals as in Azure's traces, rescaled. The
objectives stand in the trace's header under ``slo``.
"""

from __future__ import annotations

from collections.abc import Iterator

from tenon.base.errors import ConfigError
from tenon.workloads import arrivals
from tenon.workloads.draws import LogNormal, pick
from tenon.workloads.generator import Order
from tenon.workloads.trace import Segment, TraceRequest

CLASSES = ("coding", "chat", "summary")


def mix(order: Order) -> Iterator[TraceRequest]:
    given, streams = order.given, order.streams
    weights = [given.number(f"share_{one}") for one in CLASSES]
    if not sum(weights) > 0:
        names = "share_coding, share_chat and share_summary"
        raise ConfigError(f"workload {order.name}: one of {names} must be more than 0", subject="share_coding")
    choices, longest = streams.of("classes"), given.count("max_output_tokens")
    lengths = {
        one: (
            LogNormal.of_mean(streams.of(f"{one} inputs"), given.number(f"input_{one}_tokens", low=1),
                              given.number("input_sigma")),
            LogNormal.of_mean(streams.of(f"{one} outputs"), given.number(f"output_{one}_tokens", low=1),
                              given.number("output_sigma"), longest),
        )
        for one in CLASSES
    }  # fmt: skip
    times = arrivals.renewal(streams.of("arrivals"), order.rate, given.number("cv", above=True))
    for number, at_s in enumerate(times):
        kind = CLASSES[pick(choices, weights)]
        n_input, n_output = (draw.tokens() for draw in lengths[kind])
        prompt = (Segment(order.contents.new(), n_input),)
        yield TraceRequest(f"{number}", round(at_s, 6), prompt, n_output, slo_class=kind)
