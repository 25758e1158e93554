"""How a request went: whether what it was promised was kept, by the clock of the process that answers, and where its
time went, by the engine's account."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from tenon.engine.promises import Ledger
from tenon.server.flights import Flight
from tenon.server.metrics import ServerMetrics

Json = dict[str, Any]

PARTS: Final = (
    "to_engine_s", "queue_s", "again_s", "prefill_s", "recompute_s", "missed_s", "behind_s", "grammar_s", "decode_s",
    "prompts_s", "guesses_s", "residual_s", "from_engine_s",
)  # fmt: skip
"""Of the time from a request's arrival to its last token, as ``ledger_json`` tells them, in the order in which they
pass; they add up to it."""
_LEDGER: Final = (*PARTS[1:-1], "gained_s", "index", "ahead")
MOST_UNSETTLED: Final = 256
SERVED: Final = frozenset({"stop", "length", "error"})
"""Ends by which a promise was kept or broken: not those of clients who left or were refused."""


def ttft_s(flight: Flight) -> float | None:
    """From its arrival to its first token."""
    return None if flight.first_s is None else flight.first_s - flight.add.arrival_s


def tpot_s(flight: Flight) -> float | None:
    """Of each token of its first sequence after the first; None where there is none."""
    n_tokens = len(flight.outputs.get(0, ()))
    if flight.first_s is None or flight.last_s is None or n_tokens < 2:
        return None
    return (flight.last_s - flight.first_s) / (n_tokens - 1)


def severity(flight: Flight) -> float | None:
    """By how much the worse of its bounds was missed, as a share of it; not above 0: what was promised was kept. None
    where nothing was promised, or no token came."""
    slo, first_s, each_s = flight.add.slo, ttft_s(flight), tpot_s(flight)
    if slo is None or not slo.promises or first_s is None:
        return None
    over = [-1.0]
    if slo.ttft_s is not None:
        over.append(first_s / slo.ttft_s - 1)
    if slo.tpot_s is not None and each_s is not None:
        over.append(each_s / slo.tpot_s - 1)
    return max(over)


def slo_json(flight: Flight) -> Json | None:
    """What a request was promised, what was expected of it and what came; None where nothing was promised."""
    add, forecast, missed = flight.add, flight.forecast, severity(flight)
    slo = add.slo
    if slo is None or not slo.promises:
        return None
    expected = forecast and {
        "ttft_ms": _ms(forecast.ttft_s), "tpot_ms": _ms(forecast.tpot_s),
        "hit_tokens": forecast.hit_tokens, "confidence": forecast.confidence,
    }  # fmt: skip
    return {
        "class": add.slo_class,
        "ttft_ms": _ms(slo.ttft_s),
        "tpot_ms": _ms(slo.tpot_s),
        "strict": slo.strict,
        "met": missed is not None and missed <= 0,
        "downgraded": is_downgraded(flight),
        "forecast": expected,
        "actual": {"ttft_ms": _ms(ttft_s(flight)), "tpot_ms": _ms(tpot_s(flight))},
    }


def is_downgraded(flight: Flight) -> bool:
    """Whether it is served as well as can be, for what it was promised could not be kept when it came."""
    return flight.forecast is not None and not flight.forecast.meets


def count(metrics: ServerMetrics, flight: Flight, reason: str) -> None:
    """A request has ended."""
    metrics.finished.add(1, reason)
    metrics.e2e.observe(flight.end_s - flight.add.arrival_s)
    if flight.first_s is not None and flight.n_output > flight.add.n:
        per_sequence = flight.n_output / flight.add.n
        metrics.tpot.observe((flight.end_s - flight.first_s) / (per_sequence - 1))
    _count_promise(metrics, flight, reason)


def _count_promise(metrics: ServerMetrics, flight: Flight, reason: str) -> None:
    slo, missed = flight.add.slo, severity(flight)
    if slo is None or not slo.promises or not flight.accepted or reason not in SERVED:
        return
    name = flight.add.slo_class
    metrics.slo_requests.add(1, name)
    met = missed is not None and missed <= 0 and reason != "error"
    metrics.slo_attained.add(met, name)
    if met:
        metrics.goodput.add(flight.n_output)
    elif missed is not None and missed > 0:
        metrics.severity.observe(missed)


def ended(flight: Flight, reason: str) -> Json:
    """What the event of a request's end says."""
    return {
        "request_id": flight.add.request_id, "reason": reason, "n_output": flight.n_output,
        "e2e_s": flight.end_s - flight.add.arrival_s, "cache": flight.cache, "slo": slo_json(flight),
        "ledger": ledger_json(flight),
    }  # fmt: skip


def ledger_json(flight: Flight) -> Json | None:
    """Where its time went until its end, by that of its sequences that ended last; None where the engine has not said.

    A ``from_engine_s`` below 0: the engine went on until it heard of the end."""
    if not flight.ledgers:
        return None
    ledger = max(flight.ledgers, key=lambda one: one.end_s)
    told = {name: getattr(ledger, name) for name in _LEDGER}
    around = {"to_engine_s": ledger.received_s - flight.add.arrival_s, "from_engine_s": flight.end_s - ledger.end_s}
    return around | told | {"behind": [msgspec.structs.asdict(one) for one in ledger.behind]}


class Unsettled:
    """Requests that ended here before the engine said where their time went: the newest, until it does."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}
        """By what the engine calls them."""

    def expect(self, flight: Flight) -> None:
        """It has ended; nothing happens where the engine has said already, or will not."""
        if flight.accepted and not flight.ledgers:
            self._flights |= dict.fromkeys(flight.names.values(), flight)
            while len(self._flights) > MOST_UNSETTLED:
                del self._flights[next(iter(self._flights))]

    def settle(self, ledger: Ledger) -> Json | None:
        """What an event is to say of it, if it is waited for."""
        flight = self._flights.pop(ledger.request_id, None)
        if flight is None:
            return None
        flight.ledgers.append(ledger)
        return {"request_id": flight.add.request_id, "ledger": ledger_json(flight)}

    def forget(self) -> None:
        """The engine has ended."""
        self._flights.clear()


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
