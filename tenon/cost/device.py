"""``Device``: what a machine can do and what it costs, and the catalogue of those that are not here.

Peaks are vendors' dense rates; how much of them kernels reach stands in ``Use``: the catalogue's defaults for the kind
of device, or what a calibration found. Each figure of the catalogue names its source, and the source its date.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from tenon.base.errors import ConfigError
from tenon.cost.work import KINDS, PhaseKind

CATALOGUE: Final = Path(__file__).with_name("catalogue.toml")
LOCAL: Final = "local"
"""The name of the machine that this runs on, once it is calibrated."""

DeviceKind = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Figure:
    """A number and where it is from. ``date`` is the source's, or that of the reading where the source has none."""

    value: float
    source: str
    date: str


@dataclass(frozen=True)
class Link:
    """A way out of the device: one-way bytes per second, and seconds until the first byte is there."""

    name: str
    rate_Bps: Figure
    latency_s: Figure


@dataclass(frozen=True)
class Price:
    """Dollars per hour and device. ``spot`` is the range over zones, None where no market data is known."""

    provider: str
    sku: str
    on_demand: float
    spot: tuple[float, float] | None
    source: str
    date: str


@dataclass(frozen=True, eq=False)
class Use:
    """What kernels and the host make of a device.

    ``flops`` and ``bytes`` are shares of the peaks, by kind of phase. ``sharpness`` is the p of the norm that joins a
    phase's arithmetic and its memory traffic: 1 adds them, large values take the longer. ``launch_s`` is per kernel,
    ``step_s``, ``span_s``, ``row_s`` and ``output_s`` by the executor's host side, ``host_*`` by what runs around the
    executor in a step of the engine, ``chunk_s`` by a step with rows that are no outputs. Rows of trees take
    ``branch_factor`` times the arithmetic of others. Up to ``cache_bytes`` of a step's traffic come ``cache_gain``
    times as fast. ``workers`` is the number of cores that one piece of attention cannot be divided among; 1 where it
    can.
    """

    flops: Mapping[PhaseKind, float]
    bytes: Mapping[PhaseKind, float]
    sharpness: float
    launch_s: float
    step_s: float = 0.0
    span_s: float = 0.0
    row_s: float = 0.0
    output_s: float = 0.0
    sync_s: float = 0.0
    chunk_s: float = 0.0
    branch_factor: float = 1.0
    host_step_s: float = 0.0
    host_span_s: float = 0.0
    cache_bytes: float = 0.0
    cache_gain: float = 1.0
    workers: int = 1
    source: str = ""
    date: str = ""


@dataclass(frozen=True, eq=False)
class Device:
    """One processor or accelerator. Equal only to itself, so that prices can be looked up by it."""

    name: str
    title: str
    kind: DeviceKind
    flops: Mapping[str, Figure]
    """Dense floating-point operations per second, by type of the operands."""
    memory_bytes: Figure
    bandwidth_Bps: Figure
    use: Use
    links: tuple[Link, ...] = ()
    prices: tuple[Price, ...] = ()
    notes: tuple[str, ...] = ()

    def peak(self, dtype: str) -> float:
        """FLOP/s for operands of ``dtype``. Raises ``ConfigError`` where the device has no such arithmetic."""
        figure = self.flops.get(dtype)
        if figure is None:
            raise ConfigError(
                f"{self.name} has no arithmetic in {dtype}; price the model as {' or '.join(self.flops)}", subject=dtype
            )
        return figure.value

    def with_use(self, **changes: Any) -> Device:
        """The same device, used otherwise."""
        return replace(self, use=replace(self.use, **changes))


@dataclass(frozen=True)
class Catalogue:
    """The devices by name, and the texts of the sources."""

    devices: Mapping[str, Device]
    sources: Mapping[str, str] = field(default_factory=dict)


@cache
def catalogue() -> Catalogue:
    """The catalogue that comes with the package."""
    return read_catalogue(CATALOGUE)


def find(name: str) -> Device:
    """A catalogue's device, whatever the case of its name, or this machine as :data:`LOCAL`.

    Raises ``ConfigError`` with the nearest names, and as :func:`tenon.cost.calibration.load` does.
    """
    if name.casefold() == LOCAL:
        from tenon.cost import calibration  # which stands on this module

        return calibration.load().device()
    devices = catalogue().devices
    by_name = {known.casefold(): device for known, device in devices.items()}
    if found := by_name.get(name.casefold()):
        return found
    near = _near(name, devices)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(devices)} and {LOCAL}"
    raise ConfigError(f"there is no device {name!r} in the catalogue; {hint}", subject=name)


def _near(name: str, known: Mapping[str, Device]) -> list[str]:
    folded = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
    within = [one for one in folded if one in name.casefold() or name.casefold() in one]
    return [folded[one] for one in dict.fromkeys([*close, *within])][:4]


def read_catalogue(path: Path) -> Catalogue:
    """Read and check. Raises ``ConfigError`` naming the file, the device and the field."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", subject=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", subject=str(path)) from error
    reader = _Reader(path, raw)
    uses = {kind: reader.use(kind) for kind in raw.get("use", {})}
    devices = {name: reader.device(name, uses) for name in raw.get("device", {})}
    return Catalogue(devices, {key: source["text"] for key, source in raw.get("source", {}).items()})


class _Reader:
    """The tables of a catalogue's file; every complaint names the file and the field."""

    def __init__(self, path: Path, raw: Mapping[str, Any]) -> None:
        self._path, self._raw = path, raw

    def _wrong(self, where: str, value: object, right: str) -> ConfigError:
        return ConfigError(f"{self._path}: {where} is {value!r}; it must be {right}", subject=where)

    def _source(self, key: object, where: str) -> tuple[str, str]:
        source = self._raw.get("source", {}).get(key)
        if source is None:
            raise self._wrong(f"{where}.source", key, "a key of the file's table of sources")
        return source["text"], source["date"]

    def _number(self, table: Mapping[str, Any], name: str, where: str) -> float:
        value = table.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise self._wrong(f"{where}.{name}", value, "a number of at least 0")
        return float(value)

    def figure(self, table: Mapping[str, Any], name: str, where: str) -> Figure:
        """``name = [value, "source key"]``."""
        pair = table.get(name)
        if not isinstance(pair, list) or len(pair) != 2 or isinstance(pair[0], bool):
            raise self._wrong(f"{where}.{name}", pair, "a pair of a number and the key of its source")
        value = self._number({name: pair[0]}, name, where)
        return Figure(value, *self._source(pair[1], f"{where}.{name}"))

    def use(self, kind: str) -> Use:
        table, where = self._raw["use"][kind], f"use.{kind}"
        shares = {}
        for part in ("flops", "bytes"):
            given = table.get(part, {})
            for name in KINDS:
                if not 0 < self._number(given, name, f"{where}.{part}") <= 1:
                    raise self._wrong(f"{where}.{part}.{name}", given[name], "a share above 0, at most 1")
            shares[part] = {name: float(given[name]) for name in KINDS}
        text, date = self._source(table.get("source"), where)
        launch_s, step_s, sync_s, sharpness = (
            self._number(table, name, where) for name in ("launch_s", "step_s", "sync_s", "sharpness")
        )
        return Use(
            flops=shares["flops"],
            bytes=shares["bytes"],
            sharpness=sharpness,
            launch_s=launch_s,
            step_s=step_s,
            sync_s=sync_s,
            source=text,
            date=date,
        )

    def device(self, name: str, uses: Mapping[str, Use]) -> Device:
        table, where = self._raw["device"][name], f"device.{name}"
        kind = table.get("kind")
        if kind not in uses:
            raise self._wrong(f"{where}.kind", kind, f"one of {', '.join(uses)}")
        flops = {dtype: self.figure(table["flops"], dtype, f"{where}.flops") for dtype in table.get("flops", {})}
        if not flops:
            raise self._wrong(f"{where}.flops", table.get("flops"), "a table of at least one type")
        return Device(
            name=name,
            title=str(table.get("title", name)),
            kind=kind,
            flops=flops,
            memory_bytes=self.figure(table, "memory_bytes", where),
            bandwidth_Bps=self.figure(table, "bandwidth_Bps", where),
            use=uses[kind],
            links=tuple(self._link(link, f"{where}.links") for link in table.get("links", ())),
            prices=tuple(self._price(price, f"{where}.prices") for price in table.get("prices", ())),
            notes=tuple(table.get("notes", ())),
        )

    def _link(self, table: Mapping[str, Any], where: str) -> Link:
        return Link(str(table["name"]), self.figure(table, "rate_Bps", where), self.figure(table, "latency_s", where))

    def _price(self, table: Mapping[str, Any], where: str) -> Price:
        spot = table.get("spot")
        if spot is not None and (not isinstance(spot, list) or len(spot) != 2 or spot[0] > spot[1]):
            raise self._wrong(f"{where}.spot", spot, "the lowest and the highest price")
        text, date = self._source(table.get("source"), where)
        on_demand = self._number(table, "on_demand", where)
        devices = self._number(table, "devices", where) if "devices" in table else 1.0
        return Price(
            provider=str(table["provider"]),
            sku=str(table["sku"]),
            on_demand=on_demand / devices,
            spot=None if spot is None else (spot[0] / devices, spot[1] / devices),
            source=text,
            date=date,
        )
