"""What can change while a server runs: the file that ``--config`` names, read at the start and at each reload.

A TOML file of these names and no others::

    max_in_flight = 256
    max_wait_s = 5.0
    drain_s = 60

What it names wins over the command line; what it no longer names goes back to that.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from tenon.base.errors import ConfigError
from tenon.engine.config import EngineConfig
from tenon.server.limits import Limits

_MOST_COUNT: Final = 2**40
_LEAST_S: Final = 0.001
_LEAST_SHARE: Final = 0.01
_MOST_S: Final = 1e6


@dataclass(frozen=True)
class Settings:
    """Of one server, in effect at one time."""

    limits: Limits
    drain_s: float


@dataclass(frozen=True)
class _Range:
    whole: bool
    least: float
    most: float

    def __str__(self) -> str:
        what = "a whole number" if self.whole else "a number"
        return f"{what} of at least {self.least:g}" + ("" if self.most == math.inf else f" and at most {self.most:g}")

    def has(self, value: Any) -> bool:
        is_number = isinstance(value, int) or (isinstance(value, float) and not self.whole)
        return is_number and not isinstance(value, bool) and self.least <= value <= self.most


ADJUSTABLE: Final = {
    "drain_s": _Range(whole=False, least=0, most=_MOST_S),
    "max_in_flight": _Range(whole=True, least=1, most=_MOST_COUNT),
    "max_wait_s": _Range(whole=False, least=_LEAST_S, most=math.inf),
    "queued_deltas": _Range(whole=True, least=1, most=_MOST_COUNT),
    "queued_events": _Range(whole=True, least=1, most=_MOST_COUNT),
    "replays": _Range(whole=True, least=0, most=_MOST_COUNT),
    "body_bytes": _Range(whole=True, least=1, most=_MOST_COUNT),
    "all_bodies_bytes": _Range(whole=True, least=1, most=_MOST_COUNT),
    "memory_shed": _Range(whole=False, least=_LEAST_SHARE, most=1),
    "memory_reject": _Range(whole=False, least=_LEAST_SHARE, most=1),
    "machine_bytes": _Range(whole=True, least=2**20, most=2**60),
    "receipt_s": _Range(whole=False, least=_LEAST_S, most=_MOST_S),
}
"""What the file may name: ``drain_s``, and fields of ``Limits``."""


def read_settings(path: Path, base: Settings, fixed: Collection[str] = ()) -> Settings:
    """``base`` with what the file names. ``fixed``: other options of the server, which are refused as such.

    Raises ``ConfigError`` naming the file, the field and what would be right.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}", subject=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"config file {path} is not TOML: {error}", subject=str(path)) from error
    known = {field.name for kind in (Limits, EngineConfig) for field in fields(kind)}.union(fixed)
    for name, value in raw.items():
        if name not in ADJUSTABLE:
            why = "needs a restart and is not set here" if name in known else "is not known"
            may = ", ".join(ADJUSTABLE)
            raise ConfigError(f"config file {path}: {name!r} {why}; what can be set is {may}", subject=name)
        if not ADJUSTABLE[name].has(value):
            raise ConfigError(f"config file {path}: {name} must be {ADJUSTABLE[name]}, got {value!r}", subject=name)
    drain_s = raw.pop("drain_s", base.drain_s)
    try:
        return Settings(replace(base.limits, **raw), drain_s)
    except ConfigError as error:
        raise ConfigError(f"config file {path}: {error}", subject=error.subject) from None


def changes(old: Settings, new: Settings) -> dict[str, dict[str, float]]:
    """What differs, from what to what."""
    pairs = {name: (_value(old, name), _value(new, name)) for name in ADJUSTABLE}
    return {name: {"from": before, "to": after} for name, (before, after) in pairs.items() if before != after}


def _value(settings: Settings, name: str) -> float:
    value: float = settings.drain_s if name == "drain_s" else getattr(settings.limits, name)
    return value
