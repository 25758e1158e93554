"""Counters, gauges and histograms in Prometheus' text format, for one process and one event loop.

Gauges are read from the state when scraped, so they cannot go stale. At any moment
``requests_started == sum(requests_finished) + requests_running``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

LATENCY_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)
STEP_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Counter:
    """Grows only; one series per value of its one label, or a single one."""

    kind = "counter"

    def __init__(self, name: str, help_text: str, label: str | None = None, values: Sequence[str] = ()) -> None:
        self.name, self.help_text, self._label = name, help_text, label
        self._series: dict[str, float] = dict.fromkeys(values if label else ("",), 0.0)

    def add(self, amount: float = 1.0, label: str = "") -> None:
        self._series[label] = self._series.get(label, 0.0) + amount

    @property
    def total(self) -> float:
        return sum(self._series.values())

    def lines(self) -> Iterable[str]:
        for value, amount in self._series.items():
            yield f"{self.name}{_labels({self._label: value} if self._label else {})} {_number(amount)}"


class Histogram:
    """Cumulative buckets with sum and count; ``bounds`` ascend, in the metric's unit."""

    kind = "histogram"

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self.name, self.help_text, self._bounds = name, help_text, tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self) -> Iterable[str]:
        running = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            running += count
            le = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield f'{self.name}_bucket{{le="{le}"}} {running}'
        yield f"{self.name}_sum {_number(self._sum)}"
        yield f"{self.name}_count {running}"


class Reading:
    """A value read elsewhere at the scrape: a gauge, or with ``kind="counter"`` a count that the engine keeps."""

    def __init__(self, name: str, help_text: str, value: float, *, kind: str = "gauge") -> None:
        self.name, self.help_text, self.kind, self._value = name, help_text, kind, value

    def lines(self) -> Iterable[str]:
        yield f"{self.name} {_number(self._value)}"


class Readings:
    """Counts that the engine keeps by one label."""

    kind = "counter"

    def __init__(self, name: str, help_text: str, label: str, values: Mapping[str, float]) -> None:
        self.name, self.help_text, self._label, self._values = name, help_text, label, values

    def lines(self) -> Iterable[str]:
        for value, count in self._values.items():
            yield f"{self.name}{_labels({self._label: value})} {_number(count)}"


Family = Counter | Histogram | Reading | Readings


def render(metrics: Iterable[Family]) -> str:
    """The exposition; every family has its HELP and TYPE."""
    out: list[str] = []
    for metric in metrics:
        out.append(f"# HELP {metric.name} {metric.help_text}")
        out.append(f"# TYPE {metric.name} {metric.kind}")
        out.extend(metric.lines())
    return "\n".join(out) + "\n"


OUTCOMES: Final = ("stop", "length", "abort", "rejected", "error")


class ServerMetrics:
    """What the HTTP process counts itself. A request is one prompt: a body with several prompts counts as several."""

    def __init__(self) -> None:
        self.started = Counter("tenon_requests_started_total", "Requests handed to the engine.")
        self.finished = Counter(
            "tenon_requests_finished_total", "Requests that ended, by how they ended.", "reason", OUTCOMES
        )
        self.refused = Counter(
            "tenon_http_refused_total", "Requests refused before the engine, by HTTP status.", "status"
        )
        self.prompt_tokens = Counter("tenon_prompt_tokens_total", "Prompt tokens of accepted requests.")
        self.output_tokens = Counter("tenon_output_tokens_total", "Tokens generated.")
        self.ttft = Histogram("tenon_ttft_seconds", "From a request's arrival to its first token.", LATENCY_S)
        self.tpot = Histogram("tenon_tpot_seconds", "Time per output token after the first, per request.", TOKEN_S)
        self.e2e = Histogram("tenon_e2e_seconds", "From a request's arrival to its end.", LATENCY_S)
        self.step = Histogram("tenon_step_seconds", "Duration of engine steps, as sampled by its reports.", STEP_S)

    def families(self) -> list[Family]:
        return [
            self.started, self.finished, self.refused, self.prompt_tokens, self.output_tokens,
            self.ttft, self.tpot, self.e2e, self.step,
        ]  # fmt: skip


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    quoted = ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())
    return f"{{{quoted}}}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
