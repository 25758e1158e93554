"""What this machine takes for real steps, fitted to the cost model's form, and kept in the state folder.

A probe (:mod:`tenon.engine.executors.probe`, in a process of its own) measures limits and steps; :func:`fit` finds the
shares and overheads that reproduce the steps; :class:`Calibration` is what is stored, with its version and its machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tenon.base import files, machine
from tenon.base.clock import SYSTEM, Clock
from tenon.base.errors import ConfigError
from tenon.base.machine import Machine
from tenon.cost import price
from tenon.cost.device import LOCAL, Device, DeviceKind, Figure, Use, catalogue
from tenon.cost.work import KINDS, PhaseKind, Work

VERSION: Final = 1
FILE_NAME: Final = "calibration.json"
HOW: Final = "run `tenon device local --calibrate`"

NOISE: Final = 0.05
"""Relative error of a measured step; deviations beyond twice of it count linearly, not squared (Huber)."""
FOLDS: Final = 5


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step that was timed: the executor's seconds, median of ``samples`` runs."""

    name: str
    model: str
    kind: str
    work: Work
    seconds: float
    samples: int


class HostPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds that the engine spends around its executor in a step of so many spans."""

    spans: int
    seconds: float


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All a probe found; ``dtype`` and ``numerics`` are those of the steps. ``limits`` are named with their unit."""

    title: str
    kind: DeviceKind
    dtype: str
    threads: int
    memory_bytes: int
    cache_bytes: int
    limits: dict[str, float]
    points: tuple[Point, ...]
    host: tuple[HostPoint, ...]
    numerics: str = "fast"


class FitError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """|predicted / measured - 1| over steps: of those fitted, and of those held out in turn."""

    median: float
    p95: float
    held_out_median: float
    held_out_p95: float


class Fitted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``Use`` as found; see there."""

    flops: dict[str, float]
    bytes: dict[str, float]
    sharpness: float
    launch_s: float
    step_s: float
    span_s: float
    row_s: float
    output_s: float
    chunk_s: float
    branch_factor: float
    host_step_s: float
    host_span_s: float
    cache_bytes: float
    cache_gain: float


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is stored."""

    version: int
    created: str
    machine: Machine
    measured: Measured
    fitted: Fitted
    error: FitError

    def device(self) -> Device:
        """This machine as the cost model sees it."""
        return _device(self.measured, self.fitted, self.created)


def calibrate(measured: Measured, *, clock: Clock = SYSTEM) -> Calibration:
    """Fit what a probe found. Raises ``ConfigError`` when it measured too little."""
    fitted, error = fit(measured)
    created = datetime.fromtimestamp(clock.wall_s(), tz=UTC).isoformat(timespec="seconds")
    return Calibration(VERSION, created, machine.describe(), measured, fitted, error)


def path() -> Path:
    """Where this user's calibration lies."""
    return files.state_folder() / FILE_NAME


def save(calibration: Calibration, where: Path | None = None) -> Path:
    """Write whole or not at all; returns where. Raises ``ResourceError``."""
    where = where or path()
    files.write_json(where, msgspec.to_builtins(calibration))
    return where


def load(where: Path | None = None) -> Calibration:
    """This machine's calibration.

    Raises ``ConfigError`` where there is none, where it is damaged, of another version or of another machine; each says
    how to make a new one.
    """
    where = where or path()
    if not where.exists():
        raise ConfigError(f"this machine is not calibrated; {HOW}", subject=str(where))
    value = files.read_json(where)
    version = value.get("version") if isinstance(value, dict) else None
    if version != VERSION:
        raise ConfigError(f"{where} is of version {version!r}, this program knows {VERSION}; {HOW}", subject=str(where))
    try:
        found = msgspec.convert(value, Calibration)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where} is damaged: {error}; {HOW}", subject=str(where)) from error
    here = machine.describe()
    for name in ("cpu", "cores", "memory_bytes"):
        if getattr(found.machine, name) != getattr(here, name):
            raise ConfigError(
                f"{where} was measured on another machine: {name} was {getattr(found.machine, name)!r}, here it is "
                f"{getattr(here, name)!r}; {HOW}",
                subject=name,
            )
    return found


@dataclass(frozen=True)
class _Parameter:
    """One number that is fitted, as exp(theta): where it starts and how far from there it may be, in ln."""

    table: str
    name: str
    start: float
    spread: float


MIN_POINTS: Final = 8
SHARE_SPREAD: Final = 0.7
TIME_SPREAD: Final = 1.5
SHAPE_SPREAD: Final = 0.5
HOST_SPREAD: Final = 0.7
FITTED_FLOPS: Final[tuple[PhaseKind, ...]] = ("linear", "experts", "attention")
FITTED_BYTES: Final[tuple[PhaseKind, ...]] = ("linear", "experts", "attention", "rowwise")
"""The output layer is a linear layer: it gets the shares of those."""


def _parameters(measured: Measured) -> list[_Parameter]:
    """Starts: the catalogue's defaults for the kind, and what the probe measured in isolation."""
    default, limits = catalogue().devices, measured.limits
    use = next(device.use for device in default.values() if device.kind == measured.kind)
    bandwidth = _bandwidth_Bps(measured)
    starts: dict[str, float] = {}
    if "attention_Bps" in limits:
        starts["attention"] = limits["attention_Bps"] / bandwidth
    if "gemv_Bps" in limits:
        starts |= dict.fromkeys(("linear", "experts"), limits["gemv_Bps"] / bandwidth)
    found = [_Parameter("flops", name, use.flops[name], SHARE_SPREAD) for name in FITTED_FLOPS]
    found += [_Parameter("bytes", name, starts.get(name, use.bytes[name]), SHARE_SPREAD) for name in FITTED_BYTES]
    found += [
        _Parameter("use", "launch_s", limits.get("launch_s", use.launch_s), TIME_SPREAD),
        _Parameter("use", "step_s", use.step_s, TIME_SPREAD),
        _Parameter("use", "span_s", 2e-6, HOST_SPREAD),
        _Parameter("use", "row_s", 3e-7, HOST_SPREAD),
        _Parameter("use", "output_s", 2e-6, HOST_SPREAD),
        _Parameter("use", "chunk_s", 5e-5, TIME_SPREAD),
        _Parameter("above one", "branch_factor", 0.2, SHAPE_SPREAD),
        _Parameter("above one", "sharpness", max(use.sharpness - 1, 0.1), SHAPE_SPREAD),
    ]
    if measured.cache_bytes:
        gain = limits.get("gemv_cached_Bps", 2 * bandwidth) / limits.get("gemv_Bps", bandwidth)
        found += [
            _Parameter("use", "cache_bytes", measured.cache_bytes, SHAPE_SPREAD),
            _Parameter("above one", "cache_gain", max(gain - 1, 0.1), SHAPE_SPREAD),
        ]
    return found


def fit(measured: Measured) -> tuple[Fitted, FitError]:
    """Shares and overheads by penalised least squares of ln(predicted / measured), and how well they predict.

    A parameter that no step determines stays where it started. Raises ``ConfigError`` for fewer than ``MIN_POINTS``
    steps or a time that is none.
    """
    points = measured.points
    if len(points) < MIN_POINTS or not all(math.isfinite(p.seconds) and p.seconds > 0 for p in points):
        raise ConfigError(
            f"a calibration needs at least {MIN_POINTS} steps with positive times, got {len(points)}; {HOW}"
        )
    parameters, host = _parameters(measured), _host(measured.host)
    theta = _solve(parameters, points, measured, host)
    fitted = _fitted(parameters, theta, measured, host)
    held_out = np.empty(len(points))
    for fold in range(FOLDS):
        out = [i for i in range(len(points)) if i % FOLDS == fold]
        rest = [point for i, point in enumerate(points) if i % FOLDS != fold]
        other = _fitted(parameters, _solve(parameters, rest, measured, host), measured, host)
        held_out[out] = errors(_device(measured, other), [points[i] for i in out])
    inside = errors(_device(measured, fitted), points)
    return fitted, FitError(*(float(np.quantile(e, q)) for e in (inside, held_out) for q in (0.5, 0.95)))


def errors(device: Device, points: Sequence[Point]) -> NDArray[np.float64]:
    """(n,) |predicted / measured - 1| of the executor's seconds."""
    predicted = np.array([price.seconds(point.work, device, host=False) for point in points])
    return np.asarray(np.abs(predicted / [point.seconds for point in points] - 1))


def _solve(
    parameters: list[_Parameter], points: Sequence[Point], measured: Measured, host: tuple[float, float]
) -> NDArray[np.float64]:
    """Levenberg-Marquardt with numerical derivatives (Nocedal & Wright, Numerical Optimization, section 10.3)."""
    start = np.log([p.start for p in parameters])
    spread = np.array([p.spread for p in parameters])
    target = np.log([point.seconds for point in points])

    def residuals(theta: NDArray[np.float64]) -> NDArray[np.float64]:
        device = _device(measured, _fitted(parameters, theta, measured, host))
        off = (np.log([price.seconds(p.work, device, host=False) for p in points]) - target) / NOISE
        beyond = np.maximum(np.abs(off), 1e-12)
        huber = np.where(beyond <= 2, off, np.sign(off) * np.sqrt(4 * np.maximum(beyond, 2) - 4))
        return np.concatenate([huber, (theta - start) / spread])

    theta, damping = start.copy(), 1e-2
    value = residuals(theta)
    for _ in range(60):
        step = 1e-4
        jacobian = np.stack([(residuals(theta + step * unit) - value) / step for unit in np.eye(len(theta))], axis=1)
        gradient, hessian = jacobian.T @ value, jacobian.T @ jacobian
        moved = False
        while damping < 1e8:
            change = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), -gradient)
            tried = theta + np.clip(change, -1, 1)
            new = residuals(tried)
            if new @ new < value @ value:
                gained = float(value @ value - new @ new)
                theta, value, damping, moved = tried, new, max(damping / 5, 1e-9), gained > 1e-6 * float(value @ value)
                break
            damping *= 4
        if not moved:
            break
    return theta


def _host(points: Sequence[HostPoint]) -> tuple[float, float]:
    """Seconds per step and per span around the executor: a line through the points, neither below 0."""
    if not points:
        return 0.0, 0.0
    spans, seconds = np.array([p.spans for p in points], float), np.array([p.seconds for p in points])
    if len(set(spans)) < 2:
        return float(seconds.min()), 0.0
    # Relative residuals: a step of one span matters as much as one of sixty-four.
    slope, base = np.polyfit(spans, seconds, 1, w=1 / seconds)
    if base < 0:
        return 0.0, float((seconds / spans).mean())
    return (float(base), float(slope)) if slope > 0 else (float(seconds.mean()), 0.0)


def _fitted(
    parameters: list[_Parameter], theta: NDArray[np.float64], measured: Measured, host: tuple[float, float]
) -> Fitted:
    use = next(device.use for device in catalogue().devices.values() if device.kind == measured.kind)
    flops: dict[str, float] = dict(use.flops)  # type: ignore[arg-type]
    bytes_: dict[str, float] = dict(use.bytes)  # type: ignore[arg-type]
    others: dict[str, Any] = {"cache_bytes": 0.0, "cache_gain": 1.0}
    for parameter, value in zip(parameters, np.exp(theta).tolist(), strict=True):
        if parameter.table == "flops":
            flops[parameter.name] = value
        elif parameter.table == "bytes":
            bytes_[parameter.name] = value
        else:
            others[parameter.name] = value + (1.0 if parameter.table == "above one" else 0.0)
    for shares in (flops, bytes_):
        shares["logits"] = shares["linear"]
    return Fitted(flops=flops, bytes=bytes_, host_step_s=host[0], host_span_s=host[1], **others)


def _bandwidth_Bps(measured: Measured) -> float:
    return max(value for name, value in measured.limits.items() if name.startswith("read_") and name.endswith("_Bps"))


def _device(measured: Measured, fitted: Fitted, created: str = "") -> Device:
    how = "measured on this machine"
    peaks = {
        name.removeprefix("gemm_").removesuffix("_flops_per_s"): Figure(value, how, created)
        for name, value in measured.limits.items()
        if name.startswith("gemm_")
    }
    use = Use(
        flops={kind: fitted.flops[kind] for kind in KINDS},
        bytes={kind: fitted.bytes[kind] for kind in KINDS},
        workers=measured.threads if measured.kind == "cpu" else 1,
        source="fitted to steps of this machine",
        date=created,
        **{name: getattr(fitted, name) for name in Fitted.__struct_fields__ if name not in ("flops", "bytes")},
    )
    return Device(
        name=LOCAL,
        title=measured.title,
        kind=measured.kind,
        flops=peaks,
        memory_bytes=Figure(float(measured.memory_bytes), how, created),
        bandwidth_Bps=Figure(_bandwidth_Bps(measured), how, created),
        use=use,
    )
