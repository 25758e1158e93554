"""``seconds(work, device)``: the one cost that every decision asks for.

A phase takes ``norm(flops / rate, bytes / rate)``, the p-norm of its arithmetic and its traffic: kernels overlap the
two well away from the knee and badly at it, which a roofline's ``max`` does not see. Added to that: each kernel's
launch, and the host's time per step, span, row and output. All of it grows with tokens, context and batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from tenon.base.errors import ConfigError
from tenon.cost.device import Device, Use
from tenon.cost.work import KINDS, PhaseKind, Work

Rates = Mapping[PhaseKind, tuple[float, float]]


@dataclass(frozen=True)
class Breakdown:
    """Where a step's seconds go. ``phases`` holds kernels without their launches, in the order of the work."""

    phases: Mapping[PhaseKind, float]
    launches: float
    executor: float
    """The executor's host side: per step, span, row and output."""
    host: float
    """Around the executor: scheduling and taking over of results."""

    @property
    def total(self) -> float:
        return sum(self.phases.values()) + self.launches + self.executor + self.host


def seconds(work: Work, device: Device, *, host: bool = True) -> float:
    """Predicted seconds of one step; without ``host``, of what an executor's submit and poll take.

    Raises ``ConfigError`` where the device has no arithmetic in the work's type, or no link for what is exchanged.
    """
    use = device.use
    rates = _rates(device, work.dtype)
    factor = _traffic_factor(work, use)
    sharpness, workers, branching, launches = use.sharpness, use.workers, use.branch_factor - 1, 0
    total = _executor_s(work, use)
    if host:
        total += use.host_step_s + use.host_span_s * work.spans
    for phase in work.phases:
        per_flop, per_byte = rates[phase.kind]
        alone = phase.serial * workers
        compute = (phase.flops + phase.branched * branching) * per_flop * (alone if alone > 1 else 1.0)
        memory = phase.bytes * per_byte
        if phase.kind == "exchange":
            total += memory + phase.launches * _latency_s(device)
            continue
        if phase.kind != "rowwise":
            memory *= factor
        total += _norm(compute, memory, sharpness)
        launches += phase.launches
    return total + launches * use.launch_s


def breakdown(work: Work, device: Device) -> Breakdown:
    """The parts of :func:`seconds`, which is their sum. Raises as it does."""
    use = device.use
    rates = _rates(device, work.dtype)
    factor = _traffic_factor(work, use)
    phases: dict[PhaseKind, float] = {}
    launches = 0.0
    for phase in work.phases:
        per_flop, per_byte = rates[phase.kind]
        if phase.kind == "exchange":
            spent = phase.bytes * per_byte
            launches += phase.launches * _latency_s(device)
        else:
            flops = phase.flops + phase.branched * (use.branch_factor - 1)
            compute = flops * per_flop * max(1.0, phase.serial * use.workers)
            memory = phase.bytes * per_byte * (1.0 if phase.kind == "rowwise" else factor)
            spent = _norm(compute, memory, use.sharpness)
            launches += phase.launches * use.launch_s
        phases[phase.kind] = phases.get(phase.kind, 0.0) + spent
    return Breakdown(phases, launches, _executor_s(work, use), use.host_step_s + use.host_span_s * work.spans)


def _executor_s(work: Work, use: Use) -> float:
    """The host side of submit and poll."""
    fixed = use.step_s + use.sync_s + (use.chunk_s if work.rows > work.outputs else 0.0)
    return fixed + use.span_s * work.spans + use.row_s * work.rows + use.output_s * work.outputs


def _norm(compute: float, memory: float, sharpness: float) -> float:
    large, small = (compute, memory) if compute > memory else (memory, compute)
    if small <= 0.0:
        return large
    return float(large * (1.0 + (small / large) ** sharpness) ** (1.0 / sharpness))


def _traffic_factor(work: Work, use: Use) -> float:
    """Seconds per byte over those of memory, for what a step reads once: weights, keys and values.

    What fits into the cache is still there from the step before and comes ``cache_gain`` times as fast. Activations are
    read when they were just written, however many there are: their share of the bandwidth says how fast.
    """
    if not use.cache_bytes:
        return 1.0
    traffic = 0.0
    for phase in work.phases:
        if phase.kind != "rowwise":
            traffic += phase.bytes
    if traffic <= use.cache_bytes:
        return 1.0 / use.cache_gain
    return (traffic - use.cache_bytes + use.cache_bytes / use.cache_gain) / traffic


@lru_cache(maxsize=256)
def _rates(device: Device, dtype: str) -> Rates:
    """Seconds per FLOP and per byte, by kind of phase."""
    peak, bandwidth, use = device.peak(dtype), device.bandwidth_Bps.value, device.use
    link = device.links[0].rate_Bps.value if device.links else 0.0
    rates: dict[PhaseKind, tuple[float, float]] = {}
    for kind in KINDS:
        rate = link if kind == "exchange" else bandwidth
        rates[kind] = (
            1.0 / (peak * use.flops[kind]),
            1.0 / (rate * use.bytes[kind]) if rate else float("inf"),
        )
    return rates


def _latency_s(device: Device) -> float:
    if not device.links:
        raise ConfigError(f"{device.name} has no link in the catalogue to exchange over", subject=device.name)
    return device.links[0].latency_s.value
