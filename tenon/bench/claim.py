"""The script's side of a bench: ``Cell``, and finding, loading and checking ``bench/NAME.py``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from tenon.base.errors import ConfigError
from tenon.base.result import Check, ContenderEntry, Result


@dataclass(frozen=True)
class Cell:
    """One setting to measure: ``rounds`` samples of each contender after ``warmup`` that are thrown away.

    ``params`` are JSON and reach each contender's ``setup``. ``contenders`` names those that take part (all when
    empty). ``sample_s`` is a rough time of one sample, for the estimate; a sample or a setup is given ``limit_s``.
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    rounds: int = 10
    warmup: int = 1
    contenders: tuple[str, ...] = ()
    sample_s: float = 1.0
    limit_s: float = 600.0


@dataclass(frozen=True)
class Bench:
    """A loaded ``bench/NAME.py``; see :mod:`tenon.bench` for what each name means."""

    name: str
    title: str
    contenders: dict[str, ContenderEntry]
    baseline: str
    limits: bool
    cells: Callable[[bool], Sequence[Cell]]
    checks: Callable[[Result], Sequence[Check]]


def names(folder: Path) -> list[str]:
    """The benches in ``folder``; scripts named gpu_* run by themselves. Raises ``ConfigError`` without the folder."""
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; run this from the root of a checkout", subject=str(folder))
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith(("_", "gpu_")))


def load(folder: Path, name: str) -> Bench:
    """Import ``folder/name.py`` as ``<folder>.<name>``. Raises ``ConfigError`` naming what is missing or wrong."""
    if name not in names(folder):
        raise ConfigError(f"there is no bench {name!r} in {folder}; there are {', '.join(names(folder))}", subject=name)
    root = str(folder.resolve().parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    module = importlib.import_module(f"{folder.name}.{name}")
    contenders = cast("dict[str, ContenderEntry]", _need(module, "CONTENDERS", dict))
    baseline = cast(str, _need(module, "BASELINE", str))
    if baseline not in contenders:
        raise ConfigError(f"bench {name}: BASELINE {baseline!r} is none of {', '.join(contenders)}", subject="BASELINE")
    return Bench(
        name=name,
        title=cast(str, _need(module, "TITLE", str)),
        contenders=contenders,
        baseline=baseline,
        limits=cast(bool, _need(module, "LIMITS", bool)),
        cells=cast("Callable[[bool], Sequence[Cell]]", _need(module, "cells", Callable)),
        checks=cast("Callable[[Result], Sequence[Check]]", _need(module, "checks", Callable)),
    )


def _need(module: ModuleType, name: str, kind: Any) -> object:
    value = getattr(module, name, None)
    if not isinstance(value, kind):
        wanted = getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{module.__name__}: {name} must be a {wanted}, found {value!r}", subject=name)
    return cast(object, value)
