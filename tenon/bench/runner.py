"""Running a bench: cells in order, rounds of all contenders in drawn order, cells kept as they finish."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from tenon.base import clock as clocks
from tenon.base import machine, records
from tenon.base.errors import ConfigError, ProtocolError
from tenon.base.result import VERSION, ContenderEntry, Limit, Ratio, Result, Series
from tenon.bench import stats
from tenon.bench.child import Child
from tenon.bench.claim import Bench, Cell

# Two copies of one contender may differ by this much before the run no longer counts.
A_A_TOLERANCE = 0.05
TWIN = " (again)"
START_S = 3.0

LIMITS_CELL = Cell("limits", rounds=3, warmup=1, sample_s=4.0, limit_s=300.0)
LIMITS_NAME = "machine"

# Raw samples of one cell: contender -> metric -> one value a round.
Samples = dict[str, dict[str, list[float]]]


class Progress(Protocol):
    """Told what happens; draws it or not."""

    def planned(self, plan: Plan) -> None: ...

    def kept(self, cell: Cell) -> None: ...

    def began(self, cell: Cell, contenders: Sequence[str]) -> None: ...

    def sampled(self, cell: Cell, done: int, of: int) -> None: ...


@dataclass(frozen=True)
class Setting:
    """How to run: from ``root`` (a checkout), keeping cells under ``runs``. ``fresh`` forgets cells kept before."""

    root: Path
    runs: Path
    quick: bool = False
    seed: int = 0
    threads: int = 0
    fresh: bool = False

    def folder(self, name: str) -> Path:
        """Where the run of bench ``name`` keeps its records and its contenders' logs."""
        return self.runs / f"bench-{name}{'-quick' if self.quick else ''}"

    def resolve(self) -> Setting:
        """With ``threads`` 0 replaced by the number of cores this process may use."""
        if self.threads < 0:
            raise ConfigError(f"threads must be 0 (all cores) or more, got {self.threads}", subject="threads")
        threads = self.threads or len(os.sched_getaffinity(0))
        return replace(self, threads=threads)


@dataclass(frozen=True)
class Plan:
    """The cells of a run, those found finished, and a rough time for the rest."""

    bench: Bench
    cells: tuple[Cell, ...]
    kept: frozenset[str]
    estimate_s: float


def run(bench: Bench, setting: Setting, progress: Progress, *, clock: clocks.Clock = clocks.SYSTEM) -> Result:
    """Measure every cell that is not kept from an earlier sitting, and judge the whole.

    Raises ``ContenderError`` when a contender fails; finished cells are kept and the next call goes on from there.
    """
    setting = setting.resolve()
    folder = setting.folder(bench.name)
    if setting.fresh:
        (folder / records.FILE_NAME).unlink(missing_ok=True)
    commit = machine.commit(setting.root)
    cells = _cells(bench, setting.quick)
    keys = {cell.name: _key(bench, cell, setting, commit) for cell in cells}
    found = _kept(folder)
    kept = {cell.name: found[keys[cell.name]] for cell in cells if keys[cell.name] in found}
    plan = Plan(bench, cells, frozenset(kept), sum(_estimate_s(bench, c) for c in cells if c.name not in kept))
    progress.planned(plan)
    samples: dict[str, Samples] = {}
    with records.RecordWriter(folder, clock=clock, sync=True) as writer:
        for cell in cells:
            if cell.name in kept:
                progress.kept(cell)
                samples[cell.name] = kept[cell.name]
                continue
            samples[cell.name] = _measure(bench, cell, setting, folder, progress, clock)
            writer.write("cell", key=keys[cell.name], cell=cell.name, samples=samples[cell.name])
        result = judge(bench, cells, samples, setting, commit=commit, created_s=clock.wall_s())
        writer.write("finished")
    return result


def judge(
    bench: Bench, cells: Sequence[Cell], samples: dict[str, Samples], setting: Setting, *, commit: str, created_s: float
) -> Result:
    """Medians, intervals, ratios over the baseline, the A/A verdict and the bench's own checks."""
    series: list[Series] = []
    ratios: list[Ratio] = []
    a_a: list[Ratio] = []
    limits: tuple[Limit, ...] = ()
    measured = [cell for cell in cells if cell.name in samples and cell is not LIMITS_CELL]
    if LIMITS_CELL.name in samples:
        best = samples[LIMITS_CELL.name][LIMITS_NAME]
        limits = tuple(Limit(name, max(values)) for name, values in best.items())
    for cell in measured:
        by_metric: dict[str, dict[str, Series]] = {}
        for contender, metrics in samples[cell.name].items():
            for metric, values in metrics.items():
                one = stats.series(cell.name, contender, metric, values)
                series.append(one)
                by_metric.setdefault(metric, {})[contender] = one
        for of in by_metric.values():
            base = of.get(bench.baseline)
            ratios += [stats.paired(one, base) for name, one in of.items() if base and _is_rival(name, bench)]
            a_a += [stats.paired(of[name], of[twin]) for name in of if (twin := name + TWIN) in of]
    off = [ratio for ratio in a_a if not 1 - A_A_TOLERANCE <= ratio.median <= 1 + A_A_TOLERANCE]
    notes = [
        f"{one.cell}: {one.over} against itself differs by {abs(one.median - 1):.1%} in {one.metric}, more than "
        f"{A_A_TOLERANCE:.0%}; this run does not count"
        for one in off
    ]
    contenders = dict(bench.contenders)
    contenders |= {name + TWIN: entry for name, entry in contenders.items() if name == _ours(bench)}
    result = Result(
        version=VERSION,
        name=bench.name,
        title=bench.title,
        created=datetime.fromtimestamp(created_s, tz=UTC).isoformat(timespec="seconds"),
        commit=commit,
        machine=machine.describe(),
        settings={"quick": setting.quick, "seed": setting.seed, "threads": setting.threads},
        cells={cell.name: cell.params for cell in measured},
        contenders=contenders,
        series=tuple(series),
        ratios=tuple(ratios),
        a_a=tuple(a_a),
        limits=limits,
        checks=(),
        counts=not off,
        notes=tuple(notes),
    )
    return msgspec.structs.replace(result, checks=tuple(bench.checks(result)))


def order(names: Sequence[str], rounds: int, seed: int) -> Iterator[list[str]]:
    """For each round, all names in an order drawn from ``seed``."""
    generator = np.random.default_rng(seed)
    for _ in range(rounds):
        yield [names[i] for i in generator.permutation(len(names))]


def _measure(
    bench: Bench, cell: Cell, setting: Setting, folder: Path, progress: Progress, clock: clocks.Clock
) -> Samples:
    entries = _entries(bench, cell)
    samples: Samples = {name: {} for name in entries}
    progress.began(cell, list(entries))
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        for name, entry in entries.items():
            log = folder / f"{_file_name(cell.name)}.{_file_name(name)}.log"
            child = Child(name, entry, root=setting.root, threads=setting.threads, log=log, clock=clock)
            children[name] = stack.enter_context(child)
            child.setup(cell.params, limit_s=cell.limit_s)
        total = len(entries) * (cell.warmup + cell.rounds)
        done = 0
        for number, names in enumerate(order(list(entries), cell.warmup + cell.rounds, setting.seed)):
            for name in names:
                metrics = children[name].sample(limit_s=cell.limit_s)
                done += 1
                progress.sampled(cell, done, total)
                if number >= cell.warmup:
                    _append(samples[name], metrics, name)
    return samples


def _append(into: dict[str, list[float]], metrics: dict[str, float], contender: str) -> None:
    if into and into.keys() != metrics.keys():
        raise ProtocolError(f"contender {contender} gave metrics {sorted(metrics)} after {sorted(into)}")
    for name, value in metrics.items():
        into.setdefault(name, []).append(value)


def _cells(bench: Bench, quick: bool) -> tuple[Cell, ...]:
    cells = tuple(bench.cells(quick))
    known = bench.contenders.keys()
    for cell in cells:
        if unknown := set(cell.contenders) - known:
            raise ConfigError(f"cell {cell.name} names contenders {sorted(unknown)}; there are {list(known)}")
        if cell.rounds < 1 or cell.warmup < 0:
            raise ConfigError(f"cell {cell.name} needs rounds >= 1 and warmup >= 0", subject=cell.name)
    listed = [LIMITS_CELL.name] * bench.limits + [cell.name for cell in cells]
    if len(set(listed)) != len(listed):
        raise ConfigError(f"bench {bench.name} has two cells of one name: {listed}", subject=bench.name)
    return (LIMITS_CELL, *cells) if bench.limits else cells


def _entries(bench: Bench, cell: Cell) -> dict[str, ContenderEntry]:
    """Who runs in a cell: those it names, and our own twice."""
    if cell is LIMITS_CELL:
        return {LIMITS_NAME: ContenderEntry("tenon.bench.limits:MachineLimits", {})}
    chosen = {name: entry for name, entry in bench.contenders.items() if not cell.contenders or name in cell.contenders}
    ours = _ours(bench)
    return chosen | ({ours + TWIN: chosen[ours]} if ours in chosen else {})


def _ours(bench: Bench) -> str:
    return next(iter(bench.contenders))


def _is_rival(name: str, bench: Bench) -> bool:
    return name != bench.baseline and not name.endswith(TWIN)


def _estimate_s(bench: Bench, cell: Cell) -> float:
    return len(_entries(bench, cell)) * (START_S + (cell.rounds + cell.warmup) * cell.sample_s)


def _kept(folder: Path) -> dict[str, Samples]:
    """Finished cells of an unfinished run, by key; a finished run leaves nothing to go on with."""
    kept: dict[str, Samples] = {}
    if (folder / records.FILE_NAME).exists():
        for record in records.read_records(folder):
            if record["kind"] == "cell":
                kept[record["key"]] = record["samples"]
            elif record["kind"] == "finished":
                kept.clear()
    return kept


def _key(bench: Bench, cell: Cell, setting: Setting, commit: str) -> str:
    """Equal exactly when a kept cell measured the same thing: code, parameters, rounds, threads, seed."""
    entries: dict[str, Any] = {name: msgspec.to_builtins(entry) for name, entry in _entries(bench, cell).items()}
    what = [commit, cell.name, cell.params, cell.rounds, cell.warmup, entries, setting.threads, setting.seed]
    return hashlib.sha256(msgspec.json.encode(what, order="sorted")).hexdigest()[:32]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
