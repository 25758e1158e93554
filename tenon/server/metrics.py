"""Counters, gauges and histograms in Prometheus' text format, for one process and one event loop.

Gauges are read from the state when scraped, so they cannot go stale. At any moment
``requests_started == sum(requests_finished) + requests_running``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from tenon.engine.messages import Guesses, Stats

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

LATENCY_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)
STEP_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

SHARES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)


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
        self.restarts = Counter("tenon_engine_restarts_total", "Engines that ended and were followed by another.")
        self.replays = Counter("tenon_requests_replayed_total", "Requests taken over from an engine that had ended.")
        self.slo_requests = Counter(
            "tenon_slo_requests_total", "Served requests that were promised something, by class.", "class", ("",)
        )
        self.slo_attained = Counter(
            "tenon_slo_attained_total", "Requests that got what they were promised, by class.", "class", ("",)
        )
        self.downgraded = Counter(
            "tenon_slo_downgraded_total", "Requests served as well as can be: their promise could not be kept."
        )
        self.goodput = Counter("tenon_goodput_tokens_total", "Tokens of requests that got what they were promised.")
        self.severity = Histogram(
            "tenon_slo_severity", "By what share of it promises that were not kept were missed.", SHARES
        )
        self.ttft = Histogram("tenon_ttft_seconds", "From a request's arrival to its first token.", LATENCY_S)
        self.tpot = Histogram("tenon_tpot_seconds", "Time per output token after the first, per request.", TOKEN_S)
        self.e2e = Histogram("tenon_e2e_seconds", "From a request's arrival to its end.", LATENCY_S)
        self.step = Histogram("tenon_step_seconds", "Duration of engine steps, as sampled by its reports.", STEP_S)

    def families(self) -> list[Family]:
        return [
            self.started, self.finished, self.refused, self.prompt_tokens, self.output_tokens,
            self.restarts, self.replays, self.slo_requests, self.slo_attained, self.downgraded, self.goodput,
            self.severity, self.ttft, self.tpot, self.e2e, self.step,
        ]  # fmt: skip


def engine_readings(stats: Stats) -> list[Reading | Readings]:
    return [
        Reading("tenon_engine_running", "Sequences being computed.", stats.running),
        Reading("tenon_engine_waiting", "Sequences that wait in the engine.", stats.waiting),
        Reading("tenon_kv_blocks", "Blocks of the KV cache.", stats.blocks_total),
        Reading("tenon_kv_blocks_used", "Blocks held by sequences.", stats.blocks_held),
        Reading("tenon_kv_blocks_cached", "Blocks kept for prefix reuse alone.", stats.blocks_cached),
        *_cache_readings(stats),
        *(_guess_readings(stats.guesses) if stats.guesses is not None else ()),
        Reading("tenon_engine_steps_total", "Steps of the engine.", stats.steps, kind="counter"),
        Reading("tenon_preemptions_total", "Sequences preempted.", stats.preemptions, kind="counter"),
    ]


def counted(name: str, help_text: str, value: float) -> Reading:
    """A count that the engine keeps."""
    return Reading(name, help_text, value, kind="counter")


def _cache_readings(stats: Stats) -> list[Reading | Readings]:
    """Of prompts as the engine took them up, once each; blocks are positions' blocks."""
    missed = {kind: float(stats.missed_tokens.get(kind, 0)) for kind in ("new", "evicted", "skipped")}
    return [
        counted("tenon_prefix_query_tokens_total", "Tokens of prompts taken up by the engine.", stats.prompt_tokens),
        counted("tenon_prefix_hit_tokens_total", "Prompt tokens found in cache.", stats.cached_tokens),
        Readings("tenon_prefix_miss_tokens_total", "Tokens looked up in vain, by reason.", "reason", missed),
        counted("tenon_prefix_query_blocks_total", "Full blocks of prompts looked up in cache.", stats.lookup_blocks),
        counted("tenon_prefix_hit_blocks_total", "Blocks of prompts found in cache.", stats.hit_blocks),
        counted("tenon_prompt_flops_total", "FLOPs of all prompts, had nothing been cached.", stats.prompt_flops),
        counted("tenon_prompt_flops_saved_total", "FLOPs of prompts that the cache saved.", stats.saved_flops),
        counted("tenon_prompt_holes_total", "Runs computed before tokens that were in cache.", stats.holes),
        counted("tenon_kv_evictions_total", "Blocks evicted, of all groups.", stats.evictions),
        counted("tenon_kv_events_dropped_total", "Events lost before they were sent.", stats.kv_events_dropped),
    ]


def _guess_readings(guesses: Guesses) -> list[Reading | Readings]:
    """Of an engine that guesses ahead, by the names that other servers have for it; positions are depths, from 0 on."""

    def by_depth(name: str, help_text: str, counts: Sequence[int]) -> Readings:
        values = {str(depth): float(count) for depth, count in enumerate(counts)}
        return Readings(name, help_text, "position", values)

    name = "tenon_spec_decode_num_{}_total".format
    return [
        counted(name("drafts"), "Trees of guesses that were verified.", guesses.trees),
        counted(name("draft_tokens"), "Tokens that were guessed and verified.", guesses.nodes),
        counted(name("accepted_tokens"), "Guesses that came true.", guesses.accepted),
        counted(name("expected_tokens"), "Guesses that were predicted to come true.", guesses.expected),
        by_depth(name("accepted_tokens_per_pos"), "Guesses that came true, by depth.", guesses.accepted_at),
        by_depth(name("drafts_per_pos"), "Trees with a guess below what came true, by depth.", guesses.reached),
    ]


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    quoted = ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())
    return f"{{{quoted}}}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
