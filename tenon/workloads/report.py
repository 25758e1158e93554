"""What became of requests: latencies from the intended send time, attainment, goodput, per class.

One report for a load over HTTP and for a simulation. Times are seconds on one clock that starts with the load; nothing
here reads a clock.

- TTFT: first token minus *intended* send time, so that a client that falls behind is not flattered.
- TPOT: (last token - first token) / (tokens - 1), for two tokens or more.
- Gap: between two tokens' arrivals that follow one another; 0 inside a chunk that brings several.
- E2E: the answer's end minus the intended send time.

Latencies, tokens and rates are those of answered requests; failed ones are counted by the kind of their error, which is
the part before its first colon. What a percentile is stands in ``percentiles``.

An SLO bounds some of TTFT, TPOT and E2E. A request meets it if it was answered and every bound holds; an answer without
a token misses a bound on TTFT, one of a single token meets any on TPOT.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tenon.base import files
from tenon.base.errors import ConfigError
from tenon.workloads.percentiles import F64, Summary, summarise
from tenon.workloads.trace import Trace

VERSION: Final = 1
BINS: Final = 60

Mask = NDArray[np.bool_]


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request. ``token_s`` holds the arrival of each token, in order; ``error`` says why there is no answer.

    ``n_chunks``: the pieces of a stream that the tokens came in, 0 where that means nothing.
    """

    id: str
    intended_s: float
    sent_s: float
    end_s: float
    n_prompt: int
    token_s: tuple[float, ...] = ()
    cached_tokens: int = 0
    finish_reason: str = ""
    slo_class: str = ""
    tenant: str = ""
    error: str = ""
    n_chunks: int = 0


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Upper bounds in seconds; ``None`` bounds nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


class Attainment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``n`` requests that have an SLO, failed ones included: the part that met each bound, and all of them.

    ``None`` where no request has that bound. Goodput: requests that met their SLO and their output tokens, per second.
    """

    n: int
    met: float
    ttft: float | None
    tpot: float | None
    e2e: float | None
    requests_per_s: float | None
    tokens_per_s: float | None


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All requests, or those of one SLO class. Rates are per second of the report's span; ``None`` if that is 0."""

    slo_class: str
    n: int
    n_answered: int
    errors: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    chunks: int
    requests_per_s: float | None
    prompt_tokens_per_s: float | None
    output_tokens_per_s: float | None
    ttft: Summary
    tpot: Summary
    gap: Summary
    e2e: Summary
    attainment: Attainment | None


class Bin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests due from ``start_s`` on, up to the next bin."""

    start_s: float
    n: int
    n_failed: int
    ttft_p50: float | None
    ttft_max: float | None


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``span_s``: from the first intended send to the last end. ``offered_per_s``: requests due per second while they
    came. ``lag``: really sent minus intended. ``about`` says what was run; ``notes`` what a reader must know.
    """

    version: int
    about: dict[str, Any]
    span_s: float
    offered_per_s: float | None
    lag: Summary
    overall: Group
    classes: tuple[Group, ...]
    timeline: tuple[Bin, ...]
    slos: dict[str, Slo]
    notes: tuple[str, ...]


class Tally:
    """Takes outcomes one by one, in any order, and forgets them but for a few numbers and eight bytes a token.

    ``slos`` maps a class to its SLO; the class ``""`` is for all that are not named.
    """

    def __init__(self, slos: Mapping[str, Slo] | None = None) -> None:
        self._slos = dict(slos or {})
        self._classes: dict[str, int] = {}
        self._columns: dict[str, array[float]] = {name: array("d") for name in _COLUMNS}
        self._gaps: dict[int, array[float]] = {}
        self._errors: Counter[tuple[int, str]] = Counter()

    def __len__(self) -> int:
        return len(self._columns["end"])

    def add(self, outcome: Outcome) -> None:
        """Count one. Raises ``ConfigError`` naming the outcome and the field that cannot be."""
        _check(outcome)
        group = self._classes.setdefault(outcome.slo_class, len(self._classes))
        tokens = outcome.token_s
        row = {
            "group": group,
            "intended": outcome.intended_s,
            "sent": outcome.sent_s,
            "end": outcome.end_s,
            "ttft": tokens[0] - outcome.intended_s if tokens else math.nan,
            "tpot": (tokens[-1] - tokens[0]) / (len(tokens) - 1) if len(tokens) > 1 else math.nan,
            "prompt": outcome.n_prompt,
            "cached": outcome.cached_tokens,
            "output": len(tokens),
            "chunks": outcome.n_chunks,
            "answered": not outcome.error,
        }
        for name, column in self._columns.items():
            column.append(row[name])
        if outcome.error:
            self._errors[group, outcome.error.partition(":")[0]] += 1
        elif len(tokens) > 1:
            self._gaps.setdefault(group, array("d")).frombytes(np.diff(np.asarray(tokens, np.float64)).tobytes())

    def report(self, notes: Iterable[str] = (), **about: Any) -> Report:
        """What has been added so far. The order in which it came does not matter."""
        at = {name: np.array(column, np.float64) for name, column in self._columns.items()}
        n = len(self)
        span_s = float(at["end"].max() - at["intended"].min()) if n else 0.0
        arrivals_s = float(np.ptp(at["intended"])) if n else 0.0
        met = self._met(at)
        overall = self._group("", at, np.ones(n, np.bool_), met, list(self._gaps), span_s)
        classes = tuple(
            self._group(name, at, at["group"] == self._classes[name], met, [self._classes[name]], span_s)
            for name in sorted(self._classes)
            if set(self._classes) != {""}
        )
        return Report(
            version=VERSION,
            about=about,
            span_s=span_s,
            offered_per_s=_rate(n - 1, arrivals_s),
            lag=summarise(at["sent"] - at["intended"], "no request was sent"),
            overall=overall,
            classes=classes,
            timeline=_timeline(at),
            slos=self._slos,
            notes=tuple(notes),
        )

    def _met(self, at: dict[str, F64]) -> dict[str, tuple[Mask, Mask]]:
        """Per bound, and for ``all``: which requests have it, and which of them met it."""
        answered = at["answered"] == 1
        e2e = at["end"] - at["intended"]
        slos = {number: self._slos.get(name, self._slos.get("")) for name, number in self._classes.items()}
        with np.errstate(invalid="ignore"):
            values = {"ttft": at["ttft"], "tpot": np.where(at["output"] == 1, 0.0, at["tpot"]), "e2e": e2e}
            found: dict[str, tuple[Mask, Mask]] = {}
            for name, value in values.items():
                bounds = {number: getattr(slo, name + "_s") for number, slo in slos.items() if slo is not None}
                table = {number: bound for number, bound in bounds.items() if bound is not None}
                limit = np.array([table.get(int(group), math.nan) for group in at["group"]], np.float64)
                has = ~np.isnan(limit)
                found[name] = has, has & answered & (value <= limit)
        has_any = found["ttft"][0] | found["tpot"][0] | found["e2e"][0]
        every = answered & has_any
        for has, met in found.values():
            every &= met | ~has
        return found | {"all": (has_any, every)}

    def _group(
        self,
        name: str,
        at: dict[str, F64],
        chosen: Mask,
        met: dict[str, tuple[Mask, Mask]],
        gap_groups: Sequence[int],
        span_s: float,
    ) -> Group:
        answered = chosen & (at["answered"] == 1)
        total = {key: int(at[key][answered].sum()) for key in ("prompt", "cached", "output", "chunks")}
        errors: Counter[str] = Counter()
        numbers = set(np.unique(at["group"][chosen]).astype(int).tolist())
        for (group, kind), count in self._errors.items():
            if group in numbers:
                errors[kind] += count
        gaps = [np.array(self._gaps[group], np.float64) for group in gap_groups if group in self._gaps]
        nothing = "no request was answered"
        ttft, tpot = (column[answered & ~np.isnan(column)] for column in (at["ttft"], at["tpot"]))
        return Group(
            slo_class=name,
            n=int(chosen.sum()),
            n_answered=int(answered.sum()),
            errors=dict(sorted(errors.items())),
            prompt_tokens=total["prompt"],
            cached_tokens=total["cached"],
            output_tokens=total["output"],
            chunks=total["chunks"],
            requests_per_s=_rate(int(answered.sum()), span_s),
            prompt_tokens_per_s=_rate(total["prompt"], span_s),
            output_tokens_per_s=_rate(total["output"], span_s),
            ttft=summarise(ttft, "no answer has a token" if answered.any() else nothing),
            tpot=summarise(tpot, "no answer has two tokens" if answered.any() else nothing),
            gap=summarise(
                np.concatenate(gaps) if gaps else np.zeros(0),
                "no answer has two tokens" if answered.any() else nothing,
                no_interval="the gaps of one answer depend on each other",
            ),
            e2e=summarise((at["end"] - at["intended"])[answered], nothing),
            attainment=_attainment(at, chosen, met, span_s),
        )


_COLUMNS: Final = (
    "group",
    "intended",
    "sent",
    "end",
    "ttft",
    "tpot",
    "prompt",
    "cached",
    "output",
    "chunks",
    "answered",
)


def report_of(
    outcomes: Iterable[Outcome], slos: Mapping[str, Slo] | None = None, notes: Iterable[str] = (), **about: Any
) -> Report:
    """The report of outcomes that are all there."""
    tally = Tally(slos)
    for outcome in outcomes:
        tally.add(outcome)
    return tally.report(notes, **about)


def _attainment(
    at: dict[str, F64], chosen: Mask, met: dict[str, tuple[Mask, Mask]], span_s: float
) -> Attainment | None:
    def part(name: str) -> float | None:
        has, good = met[name]
        n = int((has & chosen).sum())
        return int((good & chosen).sum()) / n if n else None

    every = part("all")
    if every is None:
        return None
    has, good = (mask & chosen for mask in met["all"])
    return Attainment(
        n=int(has.sum()),
        met=every,
        ttft=part("ttft"),
        tpot=part("tpot"),
        e2e=part("e2e"),
        requests_per_s=_rate(int(good.sum()), span_s),
        tokens_per_s=_rate(int(at["output"][good].sum()), span_s),
    )


def _timeline(at: dict[str, F64]) -> tuple[Bin, ...]:
    """TTFT and failures by the time at which requests were due."""
    due = at["intended"]
    if not len(due):
        return ()
    first, width = float(due.min()), float(np.ptp(due)) / BINS
    if width <= 0:  # all at once, or so close that a float cannot divide the time between them
        width, where = 0.0, np.zeros(len(due), np.int64)
    else:
        where = np.minimum(((due - first) / width).astype(np.int64), BINS - 1)
    bins = []
    for number in range(int(where.max()) + 1):
        inside = where == number
        ttft = at["ttft"][inside & (at["answered"] == 1) & ~np.isnan(at["ttft"])]
        bins.append(
            Bin(
                start_s=first + number * width,
                n=int(inside.sum()),
                n_failed=int((inside & (at["answered"] == 0)).sum()),
                ttft_p50=float(np.median(ttft)) if len(ttft) else None,
                ttft_max=float(ttft.max()) if len(ttft) else None,
            )
        )
    return tuple(bins)


def _rate(count: int, seconds: float) -> float | None:
    """``None`` where no time passed: there is no rate then."""
    return count / seconds if count >= 0 and seconds > 0 and math.isfinite(count / seconds) else None


def _check(outcome: Outcome) -> None:
    def wrong(field: str, value: object, right: str) -> ConfigError:
        return ConfigError(f"outcome {outcome.id!r}: {field} must be {right}, got {value!r}", subject=outcome.id)

    times = (0.0, outcome.intended_s, outcome.sent_s, outcome.end_s)
    for field, earlier, value in zip(("intended_s", "sent_s", "end_s"), times, times[1:], strict=False):
        if not (math.isfinite(value) and value >= earlier):
            raise wrong(field, value, f"at least {earlier:g}")
    arrivals = np.array([outcome.sent_s, *outcome.token_s, outcome.end_s], np.float64)
    apart = ~(np.diff(arrivals) >= 0)
    if apart.any():
        at = int(apart.argmax()) + 1
        value = arrivals[at] if at <= len(outcome.token_s) else arrivals[at - 1]
        raise wrong("token_s", float(value), "in order, between sent_s and end_s")
    if outcome.n_prompt < 0 or not 0 <= outcome.cached_tokens <= outcome.n_prompt:
        raise wrong("cached_tokens", outcome.cached_tokens, f"between 0 and n_prompt ({outcome.n_prompt})")


def slo_from(text: str) -> tuple[str, Slo]:
    """``[CLASS:]ttft=0.5,tpot=50ms,e2e=10s`` as a class and its SLO. Raises ``ConfigError`` naming the part."""
    name, colon, bounds = text.rpartition(":")
    found: dict[str, float] = {}
    for part in bounds.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        unit, number = (1e-3, value[:-2]) if value.endswith("ms") else (1.0, value.removesuffix("s"))
        try:
            bound_s = float(number) * unit
        except ValueError:
            bound_s = math.nan
        if key not in ("ttft", "tpot", "e2e") or not (math.isfinite(bound_s) and bound_s > 0):
            raise ConfigError(
                f"an SLO is written [CLASS:]ttft=0.5,tpot=50ms,e2e=10 with seconds above 0, got {part!r} in {text!r}",
                subject="slo",
            )
        found[key + "_s"] = bound_s
    if colon and not name:
        raise ConfigError(f"the SLO {text!r} names an empty class; leave the colon out for all classes", subject="slo")
    return name, Slo(**found)


def slos_from(texts: Sequence[str], trace: Trace) -> dict[str, Slo]:
    """SLOs as :func:`slo_from` reads them; without any, those that the trace's header has under ``slo``.

    Raises ``ConfigError`` for a class that is named twice, or that no request of the trace has.
    """
    if not texts:
        try:
            return msgspec.convert(trace.header.parameters.get("slo", {}), dict[str, Slo])
        except msgspec.ValidationError as error:
            name = trace.header.name
            raise ConfigError(f"the trace {name!r} has no SLOs under slo: {error}", subject=name) from error
    classes = {request.slo_class for request in trace.requests} | {""}
    slos: dict[str, Slo] = {}
    for name, slo in map(slo_from, texts):
        if name in slos:
            raise ConfigError(
                f"two SLOs are given for {name or 'all classes'}; put their bounds into one", subject="slo"
            )
        if name not in classes:
            has = ", ".join(sorted(classes - {""})) or "none"
            raise ConfigError(f"an SLO names the class {name!r}; this trace's classes: {has}", subject="slo")
        slos[name] = slo
    return slos


def dump(report: Report) -> bytes:
    """Indented JSON; equal reports give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def save(report: Report, path: Path) -> None:
    """Write atomically. Raises ``ResourceError``."""
    files.write_bytes(path, dump(report))


class _Version(msgspec.Struct):
    version: int


def load(path: Path) -> Report:
    """Read what :func:`save` wrote. Raises ``ConfigError`` naming the field, or the version that it does not know."""
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Version).version
        if version != VERSION:
            said = f"{path} is a report of version {version}; this reader knows {VERSION}"
            raise ConfigError(said, subject=str(path))
        return msgspec.json.decode(data, type=Report)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", subject=str(path)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a report: {error}", subject=str(path)) from error
