"""Fitting finds what made the times; what is stored is read back, or refused in one sentence."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tenon.base.clock import ManualClock
from tenon.base.errors import ConfigError
from tenon.cost import calibration, plot, price
from tenon.cost.calibration import Fitted, HostPoint, Measured, Point
from tenon.cost.device import catalogue, find
from tenon.cost.work import KINDS, Phase, PhaseKind, Work

TRUE = Fitted(
    flops=dict.fromkeys(KINDS, 0.8) | {"attention": 0.25, "linear": 0.75, "logits": 0.75},
    bytes=dict.fromkeys(KINDS, 0.9) | {"rowwise": 0.2},
    sharpness=1.6, launch_s=4e-6, step_s=2e-4, span_s=3e-6, row_s=5e-7, output_s=4e-6, chunk_s=6e-5,
    branch_factor=1.3, host_step_s=1e-4, host_span_s=2e-6, cache_bytes=2e7, cache_gain=3.0,
)  # fmt: skip
LIMITS = {
    "read_1_threads_Bps": 3e10, "read_2_threads_Bps": 5e10, "gemv_Bps": 5e10, "gemv_cached_Bps": 1e11,
    "gemm_float32_flops_per_s": 2e11, "gemm_bfloat16_flops_per_s": 4e11, "launch_s": 3e-6,
}  # fmt: skip


def steps(n: int, seed: int) -> list[Work]:
    """Works of the sizes that a small machine meets."""
    rng = np.random.default_rng(seed)

    def one() -> Work:
        rows = int(rng.integers(1, 400))
        size = 10 ** rng.uniform(6, 8.5)
        pairs = rows * rng.integers(1, 3000)
        wanted: list[tuple[PhaseKind, float, float]] = [
            ("linear", size * rows, size), ("attention", pairs * 2e4, pairs * 1e3 / rows), ("rowwise", 0, rows * 2e5),
            ("logits", size * rows / 10, size / 5),
        ]  # fmt: skip
        phases = tuple(Phase(kind, float(flops), float(bytes_), 30) for kind, flops, bytes_ in wanted)
        return Work("bfloat16", phases, rows, int(rng.integers(1, 32)), int(rng.integers(1, 32)))

    return [one() for _ in range(n)]


def measured(n: int = 60, noise: float = 0.01, **changes: object) -> Measured:
    """As if ``TRUE`` were this machine."""
    rng = np.random.default_rng(1)
    bare = Measured("a processor", "cpu", "bfloat16", 2, 24 * 2**30, 2**25, LIMITS, (), ())
    device = calibration._device(bare, TRUE)
    points = tuple(
        Point(f"p{i}", "m", ("decode", "prefill")[i % 2], work, float(seconds * np.exp(noise * rng.normal())), 5)
        for i, work in enumerate(steps(n, 0))
        for seconds in [price.seconds(work, device, host=False)]
    )
    host = tuple(HostPoint(spans, 1e-4 + 2e-6 * spans) for spans in (1, 4, 16, 64))
    return msgspec.structs.replace(bare, points=points, host=host, **changes)


@pytest.fixture(scope="module")
def found() -> calibration.Calibration:
    return calibration.calibrate(measured(), clock=ManualClock(epoch_s=1e9))


def test_steps_that_were_not_fitted_are_predicted(found: calibration.Calibration) -> None:
    truth = calibration._device(found.measured, TRUE)
    new = [Point("", "", "", work, price.seconds(work, truth, host=False), 1) for work in steps(40, seed=9)]
    errors = calibration.errors(found.device(), new)
    assert np.median(errors) < 0.02
    assert np.quantile(errors, 0.95) < 0.06
    assert found.error.held_out_median < 0.03
    assert found.error.median <= found.error.p95


def test_the_engines_own_time_is_a_line(found: calibration.Calibration) -> None:
    assert found.fitted.host_step_s == pytest.approx(1e-4, rel=1e-6)
    assert found.fitted.host_span_s == pytest.approx(2e-6, rel=1e-6)


def test_what_no_step_contains_stays_at_its_start(found: calibration.Calibration) -> None:
    default = next(device.use for device in catalogue().devices.values() if device.kind == "cpu")
    assert found.fitted.flops["experts"] == pytest.approx(default.flops["experts"], rel=1e-3)


def test_one_wild_time_does_not_move_the_rest() -> None:
    wild = measured(noise=0.0)
    first = msgspec.structs.replace(wild.points[0], seconds=wild.points[0].seconds * 20)
    fitted, error = calibration.fit(msgspec.structs.replace(wild, points=(first, *wild.points[1:])))
    assert error.median < 0.02
    assert fitted.step_s < 5e-4


def test_the_same_times_give_the_same_fit(found: calibration.Calibration) -> None:
    again = calibration.calibrate(measured(), clock=ManualClock(epoch_s=1e9))
    same = ("version", "created", "measured", "fitted", "error")  # the machine's load is another every few seconds
    assert [getattr(again, name) for name in same] == [getattr(found, name) for name in same]


def test_a_calibration_is_read_back(tmp_path: Path, found: calibration.Calibration) -> None:
    where = calibration.save(found, tmp_path / "calibration.json")
    assert calibration.load(where) == found


def test_the_calibrated_machine_is_the_device_local(
    tmp_path: Path, found: calibration.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENON_STATE", str(tmp_path))
    calibration.save(found)
    local = find("Local")
    assert local.name == "local"
    assert local.peak("bfloat16") == 4e11
    assert local.bandwidth_Bps.value == 5e10
    assert local.use.workers == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 0}, "is of version 0, this program knows 1"),
        ({"machine": {"cpu": "an abacus"}}, "was measured on another machine: cpu was 'an abacus'"),
        ({"machine": {"cores": 4096}}, "cores was 4096"),
        ({"fitted": {"launch_s": "soon"}}, r"is damaged: Expected `float`, got `str` - at `\$.fitted.launch_s`"),
        ({"fitted": {"invented": 1}}, "unknown field `invented`"),
    ],
)
def test_what_is_not_this_machines_is_refused_in_one_sentence(
    tmp_path: Path, found: calibration.Calibration, change: dict[str, object], said: str
) -> None:
    value = msgspec.to_builtins(found)
    for name, part in change.items():
        value[name] = value[name] | part if isinstance(part, dict) else part
    where = tmp_path / "calibration.json"
    where.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=said) as raised:
        calibration.load(where)
    assert "tenon device local --calibrate" in str(raised.value)
    assert str(where) in str(raised.value)


def test_an_uncalibrated_machine_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this machine is not calibrated; run `tenon device local --calibrate`"):
        calibration.load(tmp_path / "none.json")


@pytest.mark.parametrize("seconds", [0.0, float("nan"), -1.0])
def test_times_that_are_none_are_refused(seconds: float) -> None:
    bad = measured(20)
    first = msgspec.structs.replace(bad.points[0], seconds=seconds)
    with pytest.raises(ConfigError, match="positive times"):
        calibration.fit(msgspec.structs.replace(bad, points=(first, *bad.points[1:])))


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 8 steps with positive times, got 3"):
        calibration.fit(measured(3))


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ([], (0.0, 0.0)),
        ([(1, 3.0), (1, 5.0)], (3.0, 0.0)),
        ([(1, 1.0), (10, 10.0)], (0.0, 1.0)),
        ([(1, 4.0), (10, 2.0)], (3.0, 0.0)),
    ],
)
def test_a_line_through_few_points_stays_sensible(points: list[tuple[int, float]], line: tuple[float, float]) -> None:
    base, slope = calibration._host([HostPoint(n, seconds) for n, seconds in points])
    assert (base, slope) == (pytest.approx(line[0], abs=1e-6), pytest.approx(line[1], abs=1e-6))


def test_the_figure_is_the_same_for_the_same_calibration(found: calibration.Calibration) -> None:
    pytest.importorskip("matplotlib")
    drawn = plot.svg(found)
    assert drawn == plot.svg(found)
    assert b"predicted / measured" in drawn or drawn.startswith(b"<?xml")
