"""BurstGPT: a day of ChatGPT conversations at a regional Azure OpenAI service (Wang et al., arXiv 2401.17644).

Demand by the hour, Gamma bursts on top of it, prompts after a bounded Zipf law, answers that grow with the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tenon.workloads import arrivals
from tenon.workloads.azure import DAY_S, HOUR_S
from tenon.workloads.draws import LogNormal
from tenon.workloads.generator import Order
from tenon.workloads.trace import Segment, TraceRequest


def day(order: Order) -> Iterator[TraceRequest]:
    """Endless days, each as the others."""
    given, streams = order.given, order.streams
    curve = arrivals.RateCurve([[hour * HOUR_S, rate] for hour, rate in given.rows("hourly")], DAY_S)
    cv = given.number("cv", above=True)
    prompt = Zipf(given.number("zipf", above=True), given.count("max_prompt_tokens"))
    base, slope = given.number("answer_tokens", low=1), given.number("answer_per_prompt_token")
    longest = given.count("max_answer_tokens")
    noise = LogNormal.of_mean(streams.of("answers"), 1.0, given.number("answer_sigma"))
    prompts = streams.of("prompts")
    for number, at_s in enumerate(arrivals.varying(streams.of("arrivals"), curve, order.rate, cv)):
        n = prompt.at(float(prompts.random()))
        n_output = min(longest, max(1, round((base + slope * n) * noise.draw())))
        yield TraceRequest(f"{number}", round(at_s, 6), (Segment(order.contents.new(), n),), n_output)


class Zipf:
    """Whole numbers 1 .. ``high``, each k as likely as k to the power of minus ``exponent``."""

    def __init__(self, exponent: float, high: int) -> None:
        weights = np.arange(1, high + 1, dtype=np.float64) ** -exponent
        self._below = np.cumsum(weights) / weights.sum()

    def at(self, u: float) -> int:
        """The number below which a share ``u`` lies."""
        return min(len(self._below), int(np.searchsorted(self._below, u, "right")) + 1)
