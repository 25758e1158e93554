"""``Result``: what a measurement found, with everything needed to judge it again.

Versioned JSON: what ran, where, at which commit, every raw sample, medians with intervals, paired ratios, physical
limits measured in the same run, and ``checks`` against targets. Figures, regression bars and reports read nothing else.

Words: a *cell* is one setting measured (a model, a batch, a context); a *contender* is one thing measured in it; a
*round* samples every contender of a cell once, so sample i of two contenders are neighbours in time and form a pair.
Metric names carry their unit (``seconds``, ``tokens_per_s``).
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal, NoReturn

import msgspec

from tenon.base import files
from tenon.base.errors import ConfigError
from tenon.base.machine import Machine

VERSION = 1
# Medians are stored as computed; a reader recomputes them to this relative accuracy.
MEDIAN_TOLERANCE = 1e-9


class Series(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One metric of one contender in one cell; ``low`` and ``high`` bound the median with 95 % confidence."""

    cell: str
    contender: str
    metric: str
    samples: tuple[float, ...]
    median: float
    low: float
    high: float


class Ratio(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Median over rounds of ``over / under`` and its 95 % interval."""

    cell: str
    metric: str
    over: str
    under: str
    median: float
    low: float
    high: float


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the machine can do at best, measured in the same run, e.g. ``read_2_threads_Bps``."""

    name: str
    value: float


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A claim and whether it held: ``value`` at most, or at least, ``target``."""

    name: str
    value: float
    target: float
    direction: Literal["at_most", "at_least"]
    passed: bool


class ContenderEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a contender's code is, ``module:Class``, and the options that its constructor got."""

    entry: str
    options: dict[str, Any]


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """All of one run of one bench. ``counts`` is false when the same code, run against itself, differed too much."""

    version: int
    name: str
    title: str
    created: str
    commit: str
    machine: Machine
    settings: dict[str, Any]
    cells: dict[str, dict[str, Any]]
    contenders: dict[str, ContenderEntry]
    series: tuple[Series, ...]
    ratios: tuple[Ratio, ...]
    a_a: tuple[Ratio, ...]
    limits: tuple[Limit, ...]
    checks: tuple[Check, ...]
    counts: bool
    notes: tuple[str, ...]

    def find(self, cell: str, contender: str, metric: str) -> Series:
        """The series so named. Raises ``ConfigError`` listing what there is."""
        if found := self._by_name.get((cell, contender, metric)):
            return found
        there = ", ".join(sorted({f"{s.cell}/{s.contender}/{s.metric}" for s in self.series})) or "nothing"
        raise ConfigError(f"result {self.name} has no {cell}/{contender}/{metric}; it has {there}", subject=self.name)

    @cached_property
    def _by_name(self) -> dict[tuple[str, str, str], Series]:
        return {(one.cell, one.contender, one.metric): one for one in self.series}

    def median(self, cell: str, contender: str, metric: str) -> float:
        return self.find(cell, contender, metric).median

    def ratio(self, cell: str, over: str, under: str, metric: str) -> float:
        """Median over rounds of ``over / under``."""
        pairs = zip(self.find(cell, over, metric).samples, self.find(cell, under, metric).samples, strict=True)
        return median(a / b for a, b in pairs)

    def limit(self, name: str) -> float:
        for one in self.limits:
            if one.name == name:
                return one.value
        there = ", ".join(limit.name for limit in self.limits) or "none"
        raise ConfigError(f"result {self.name} has no limit {name!r}; it has {there}", subject=name)


def at_most(name: str, value: float, target: float) -> Check:
    """A check that passes when ``value <= target``; NaN fails."""
    return Check(name, value, target, "at_most", bool(value <= target))


def at_least(name: str, value: float, target: float) -> Check:
    """A check that passes when ``value >= target``; NaN fails."""
    return Check(name, value, target, "at_least", bool(value >= target))


def save(result: Result, path: Path) -> None:
    """Write ``result`` whole or not at all. Raises ``ConfigError`` when it is not valid."""
    validate(result, path)
    files.write_json(path, msgspec.to_builtins(result))


def load(path: Path) -> Result:
    """Read and validate. Raises ``ConfigError`` naming the file and the field that is wrong."""
    value = files.read_json(path)
    version = value.get("version") if isinstance(value, dict) else None
    if version != VERSION:
        raise ConfigError(f"{path}: version is {version!r}, this reader knows {VERSION}", subject=str(path))
    try:
        result = msgspec.convert(value, Result)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}", subject=str(path)) from error
    validate(result, path)
    return result


def validate(result: Result, path: Path) -> None:
    """Raise ``ConfigError`` unless names refer to something, figures are finite and derived ones follow."""
    for one in result.series:
        where = f"series {one.cell}/{one.contender}/{one.metric}"
        if one.cell not in result.cells:
            _refuse(path, where, "names a cell that is not in cells")
        if one.contender not in result.contenders:
            _refuse(path, where, "names a contender that is not in contenders")
        if not one.samples or not all(math.isfinite(x) for x in one.samples):
            _refuse(path, where, "needs finite samples")
        if not math.isclose(one.median, median(one.samples), rel_tol=MEDIAN_TOLERANCE):
            _refuse(path, where, f"has median {one.median}, its samples give {median(one.samples)}")
        if not one.low <= one.median <= one.high:
            _refuse(path, where, f"has its median {one.median} outside its interval {one.low}..{one.high}")
    for ratio in (*result.ratios, *result.a_a):
        where = f"ratio {ratio.cell}/{ratio.over}/{ratio.under}/{ratio.metric}"
        paired = result.ratio(ratio.cell, ratio.over, ratio.under, ratio.metric)
        if not math.isclose(ratio.median, paired, rel_tol=MEDIAN_TOLERANCE):
            _refuse(path, where, f"has median {ratio.median}, the samples give {paired}")
    for check in result.checks:
        held = check.value <= check.target if check.direction == "at_most" else check.value >= check.target
        if check.passed != held:
            _refuse(path, f"check {check.name!r}", f"says passed={check.passed}, its value and target say {held}")


def _refuse(path: Path, where: str, what: str) -> NoReturn:
    raise ConfigError(f"{path}: {where} {what}", subject=str(path))
