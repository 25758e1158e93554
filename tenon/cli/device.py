"""``tenon device [NAME]``: the catalogue of devices, one of them, or this machine, calibrated."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from tenon.base.errors import ConfigError, ResourceError
from tenon.cost import calibration, plot
from tenon.cost.device import LOCAL, Device, Figure, catalogue, find

BUSY_ERROR = 0.3
"""Held-out errors beyond this come from other work on the machine, not from the model."""
PROBE = "tenon.engine.executors.probe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help=f"a device of the catalogue, or '{LOCAL}' (default: list them)")
    parser.add_argument(
        "--calibrate", action="store_true", help=f"measure this machine (about a minute) and keep it as '{LOCAL}'"
    )
    parser.add_argument("--threads", type=int, help="CPU threads to calibrate for (default: the machine's cores)")
    parser.add_argument(
        "--numerics", choices=("fast", "invariant"), help="numerics of the steps to calibrate with (default: fast)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help=f"draw {LOCAL}'s roofline and steps")


def run(args: argparse.Namespace) -> int:
    """0. Raises ``ConfigError`` for an unknown device, or options that do not go with it."""
    console = Console()
    local = (args.name or "").casefold() == LOCAL
    for option in ("calibrate", "plot", "threads", "numerics"):
        if getattr(args, option) is not None and getattr(args, option) is not False and not local:
            raise ConfigError(f"--{option} is for 'tenon device {LOCAL}'", subject=option)
    for option in ("threads", "numerics"):
        if getattr(args, option) is not None and not args.calibrate:
            raise ConfigError(f"--{option} goes with --calibrate", subject=option)
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"--threads must be at least 1, got {args.threads}", subject="threads")
    if args.name is None:
        devices = catalogue().devices.values()
        if args.json:
            print(json.dumps([plain(device) for device in devices], indent=1))
        else:
            _list(list(devices), console)
        return 0
    if local:
        return _local(args, console)
    device = find(args.name)
    if args.json:
        print(json.dumps(plain(device), indent=1))
    else:
        show(device, console)
    return 0


def _local(args: argparse.Namespace, console: Console) -> int:
    if args.calibrate:
        options = {"threads": args.threads, "numerics": args.numerics or "fast"}
        found = calibration.calibrate(probe(options, Console(stderr=True)))
        where = calibration.save(found)
        print(f"calibrated; kept in {where}", file=sys.stderr)
    else:
        found = calibration.load()
    if args.plot is not None:
        plot.save(found, args.plot)
    if args.json:
        print(json.dumps(msgspec.to_builtins(found), indent=1))
        return 0
    show(found.device(), console)
    _show_calibration(found, console)
    return 0


def probe(options: dict[str, Any], console: Console) -> calibration.Measured:
    """Run the probe in a process of its own. Raises ``ResourceError`` with what it said when it fails."""
    command = [sys.executable, "-m", PROBE, json.dumps(options)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    answer: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
    ):
        if process.stdout is None:
            raise ResourceError("the probe was started without a pipe", subject=PROBE)
        for line in process.stdout:
            answer = json.loads(line)
            if "phase" in answer:
                console.print(f"measuring {answer['phase']}", highlight=False, markup=False)
        process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    if process.returncode != 0 or "measured" not in answer:
        last = said.splitlines()[-1] if said else f"status {process.returncode}"
        raise ResourceError(f"the probe failed: {last}", subject=PROBE)
    return msgspec.convert(answer["measured"], calibration.Measured)


def plain(device: Device) -> dict[str, Any]:
    """The device as JSON's types."""
    value = {f.name: getattr(device, f.name) for f in dataclasses.fields(device)}
    builtins: dict[str, Any] = msgspec.to_builtins(value)
    return builtins


def _list(devices: list[Device], console: Console) -> None:
    table = Table(title="devices", box=None, header_style="bold")
    for column in ("name", "bf16 or fp16 TFLOP/s", "GB", "GB/s", "link GB/s", "$/h on demand", "$/h spot"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for device in devices:
        best = device.flops.get("bfloat16") or device.flops.get("float16")
        prices = [price.on_demand for price in device.prices]
        spots = [price.spot for price in device.prices if price.spot]
        table.add_row(
            device.name,
            f"{best.value / 1e12:,.1f}" if best else "",
            f"{device.memory_bytes.value / 1e9:,.0f}",
            f"{device.bandwidth_Bps.value / 1e9:,.0f}",
            f"{device.links[0].rate_Bps.value / 1e9:,.0f}" if device.links else "",
            _range(prices, prices),
            _range([low for low, _ in spots], [high for _, high in spots]),
        )
    console.print(table)
    console.print("dense rates; `tenon device NAME` has every figure's source and date", style="dim", highlight=False)


def _range(low: list[float], high: list[float]) -> str:
    if not low:
        return ""
    return f"{min(low):.2f}" if min(low) == max(high) else f"{min(low):.2f}-{max(high):.2f}"


def show(device: Device, console: Console) -> None:
    """Every figure with its source and date."""
    console.print(f"[bold]{device.name}[/]: {device.title}", highlight=False)
    table = Table(box=None, header_style="bold")
    for column in ("figure", "value", "source", "date"):
        table.add_column(column, justify="right" if column == "value" else "left")

    def add(name: str, figure: Figure, unit: float, suffix: str) -> None:
        table.add_row(name, f"{figure.value / unit:,.4g} {suffix}", figure.source, figure.date)

    for dtype, figure in device.flops.items():
        add(f"peak {dtype}", figure, 1e12, "TFLOP/s")
    add("memory", device.memory_bytes, 1e9, "GB")
    add("bandwidth", device.bandwidth_Bps, 1e9, "GB/s")
    for link in device.links:
        add(f"link {link.name}", link.rate_Bps, 1e9, "GB/s")
        add(f"link {link.name}, latency", link.latency_s, 1e-6, "µs")
    for price in device.prices:
        spot = "" if price.spot is None else f", spot {price.spot[0]:.2f}-{price.spot[1]:.2f}"
        table.add_row(f"{price.provider} {price.sku}", f"{price.on_demand:.2f} $/h{spot}", price.source, price.date)
    use = device.use
    shares = ", ".join(f"{kind} {use.flops[kind]:.2f}/{use.bytes[kind]:.2f}" for kind in use.flops)
    table.add_row("shares of peak/bandwidth", shares, use.source, use.date)
    times = {"kernel": use.launch_s, "step": use.step_s + use.sync_s, "span": use.span_s, "engine": use.host_step_s}
    overheads = ", ".join(f"{name} {seconds * 1e6:.3g} µs" for name, seconds in times.items() if seconds)
    table.add_row("overheads", overheads, use.source, use.date)
    console.print(table)
    for note in device.notes:
        console.print(f"  {note}", highlight=False, markup=False)


def _show_calibration(found: calibration.Calibration, console: Console) -> None:
    table = Table(title="limits", box=None, header_style="bold")
    table.add_column("name")
    table.add_column("value", justify="right")
    for name, value in found.measured.limits.items():
        if name.endswith("_s") and not name.endswith("per_s"):
            table.add_row(name, f"{value * 1e6:.3g} µs")
        else:
            table.add_row(name, f"{value / 1e9:,.1f} G")
    console.print(table)
    error = found.error
    if error.held_out_p95 > BUSY_ERROR:
        console.print("steps scatter more than the model explains: if the machine was busy, calibrate again")
    console.print(
        f"{len(found.measured.points)} steps timed, {found.created}; error of the fit: median {error.median:.1%}, p95 "
        f"{error.p95:.1%}; of steps held out: median {error.held_out_median:.1%}, p95 {error.held_out_p95:.1%}",
        highlight=False,
    )
