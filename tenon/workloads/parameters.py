"""Parameters of the generators: ``parameters.toml``, where each stands with its value, its source and how it is known.

``how`` is *measured* (from the released file that the source names), *cited* (the publication's own figure) or
*assumed* (ours; the source says why). A generator reads its parameters through :class:`Given`, so that ``--set
name=value`` reaches every one of them. *Figures* are what a made trace is held to; no generator reads them.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, Literal

import msgspec

from tenon.base.errors import ConfigError

How = Literal["measured", "cited", "assumed"]


class Parameter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One value with where it comes from."""

    value: Any
    how: How
    source: str


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A published or measured property of the original. ``points`` marks shares that are compared by difference."""

    value: float
    how: Literal["measured", "cited"]
    source: str


class Family(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One generator: what it reproduces, after what, its parameters and the figures that it is held to."""

    title: str
    source: str
    parameters: dict[str, Parameter]
    figures: dict[str, Figure] = {}
    curves: dict[str, Parameter] = {}


@cache
def families() -> dict[str, Family]:
    """All of ``parameters.toml``, by name."""
    text = resources.files("tenon.workloads").joinpath("parameters.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), dict[str, Family])


class Quantiles:
    """A distribution by its quantiles: rows of (percent, value), from 0 to 100.

    Between two rows the logarithm of the value is linear in the percentage where both values are positive, else the
    value itself: lengths and pauses have long tails, and straight lines between far quantiles would put too much into
    them.
    """

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        self._share = [row[0] / 100 for row in rows]
        self._value = [float(row[1]) for row in rows]
        pairs = itertools.pairwise(self._value)
        self._ratio = [math.log(b / a) if a > 0 else math.nan for a, b in pairs]

    def at(self, u: float) -> float:
        """The value below which a share ``u`` in [0, 1) lies."""
        i = min(bisect_right(self._share, u) - 1, len(self._ratio) - 1)
        low, high = self._share[i], self._share[i + 1]
        part = (u - low) / (high - low)
        if math.isnan(self._ratio[i]):
            return self._value[i] + part * (self._value[i + 1] - self._value[i])
        return self._value[i] * math.exp(part * self._ratio[i])

    def mean(self) -> float:
        """Of the interpolated distribution, exactly."""
        total = 0.0
        for i, ratio in enumerate(self._ratio):
            a, b = self._value[i], self._value[i + 1]
            middle = (a + b) / 2 if math.isnan(ratio) or abs(ratio) < 1e-9 else (b - a) / ratio
            total += (self._share[i + 1] - self._share[i]) * middle
        return total


class Steps:
    """A value by size: rows of (from, value); a size takes the last row that starts at or below it."""

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        self._start = [row[0] for row in rows]
        self._value = [float(row[1]) for row in rows]

    def at(self, size: float) -> float:
        return self._value[max(0, bisect_right(self._start, size) - 1)]


class Given:
    """A family's parameters with a caller's own values in place of some.

    Raises ``ConfigError`` for a name that the family does not have and for a value that is of another kind than the
    file's.
    """

    def __init__(self, name: str, overrides: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.overrides = dict(overrides or {})
        self._known = families()[name].parameters
        for key, value in self.overrides.items():
            if key not in self._known:
                known = ", ".join(sorted(self._known))
                raise ConfigError(f"workload {name} has no parameter {key!r}; it has {known}", subject=key)
            self._check_kind(key, value, self._known[key].value)

    def _value(self, key: str) -> Any:
        return self.overrides[key] if key in self.overrides else self._known[key].value

    def _wrong(self, key: str, right: str) -> ConfigError:
        return ConfigError(f"workload {self.name}: {key} must be {right}, got {self._value(key)!r}", subject=key)

    def has(self, key: str) -> bool:
        """Whether the family knows such a parameter."""
        return key in self._known

    def _check_kind(self, key: str, value: Any, like: Any) -> None:
        if isinstance(like, bool) or isinstance(value, bool):
            right, fits = "true or false" if isinstance(like, bool) else "a number", isinstance(like, type(value))
        elif isinstance(like, int | float):
            right, fits = "a number", isinstance(value, int | float) and math.isfinite(value)
        elif isinstance(like, str):
            right, fits = "text", isinstance(value, str)
        else:
            right, fits = "rows of numbers, as [[0, 1.5], [100, 9]]", _is_rows(value)
        if not fits:
            raise self._wrong(key, right)

    def number(self, key: str, *, low: float = 0.0, above: bool = False, high: float = math.inf) -> float:
        """A number of at least ``low`` (more than ``low`` with ``above``) and at most ``high``."""
        value = float(self._value(key))
        if not low <= value <= high or (above and value == low):
            most = "" if math.isinf(high) else f" and at most {high:g}"
            raise self._wrong(key, f"{'more than' if above else 'at least'} {low:g}{most}")
        return value

    def share(self, key: str) -> float:
        """A number in [0, 1]."""
        return self.number(key, high=1.0)

    def count(self, key: str, *, low: int = 1) -> int:
        """A whole number of at least ``low``."""
        value = self._value(key)
        if value != int(value) or value < low:
            raise self._wrong(key, f"a whole number of at least {low}")
        return int(value)

    def word(self, key: str, known: Sequence[str]) -> str:
        """One of ``known``."""
        value = str(self._value(key))
        if value not in known:
            raise self._wrong(key, "one of " + ", ".join(known))
        return value

    def quantiles(self, key: str) -> Quantiles:
        """Rows of (percent, value): percentages rise from 0 to 100, values never fall and are none below 0."""
        rows = self._value(key)
        percents, values = [row[0] for row in rows], [row[1] for row in rows]
        rising = all(a < b for a, b in itertools.pairwise(percents))
        falling = any(a > b for a, b in itertools.pairwise(values))
        if len(rows) < 2 or percents[0] != 0 or percents[-1] != 100 or not rising or falling or values[0] < 0:
            raise self._wrong(key, "[percent, value] rows from 0 to 100 whose values never fall and are none below 0")
        return Quantiles(rows)

    def steps(self, key: str) -> Steps:
        """Rows of (from, value) with rising starts and values of at least 0."""
        rows = self._value(key)
        if not rows or any(a[0] >= b[0] for a, b in itertools.pairwise(rows)) or any(r[1] < 0 for r in rows):
            raise self._wrong(key, "[from, value] rows with rising starts and values of at least 0")
        return Steps(rows)

    def slos(self) -> dict[str, dict[str, float]]:
        """Objectives by class, from parameters named ``slo_CLASS_tpot_s`` (or ttft, e2e): seconds, more than 0."""
        found: dict[str, dict[str, float]] = {}
        for key in self._known:
            if match := re.fullmatch(r"slo_(\w+)_((?:ttft|tpot|e2e)_s)", key):
                found.setdefault(match[1], {})[match[2]] = self.number(key, above=True)
        return found

    def rows(self, key: str) -> list[list[float]]:
        """Rows as they are."""
        return [[float(x) for x in row] for row in self._value(key)]


def _is_rows(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, list) and len(row) == 2 for row in value)
        and all(
            isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for row in value for x in row
        )
    )
