"""The probe: steps made by hand are steps, times are of what they say, everything arrives."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from tenon.base.clock import ManualClock
from tenon.base.errors import ConfigError
from tenon.cost import calibration
from tenon.cost.calibration import Measured
from tenon.cost.work import step_shape
from tenon.engine.executors import probe
from tenon.engine.executors.probe_limits import least
from tenon.engine.step import Step, guesses

pytestmark = pytest.mark.torch

PLANS = (
    probe.decode(3, 40), probe.prefill(20, 5), probe.mixed(2, 30, 17, 3), probe.tree(2, 20, 7), probe.hole(2, 90, 2, 8)
)  # fmt: skip


@pytest.fixture(scope="module")
def rig() -> probe.Rig:
    return probe.Rig(probe.small_moe(), probe.needed(PLANS), threads=1, device="cpu")


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.kind)
def test_a_step_made_by_hand_is_a_step_and_its_rows_have_slots_of_their_own(
    rig: probe.Rig, plan: probe.StepPlan
) -> None:
    step = rig.step(plan)
    assert Step.unpack(step.pack()).pack() == step.pack()
    slot, group = step.groups[0].slot, step.groups[0]
    assert len(set(slot.tolist())) == step.n_rows == sum(span.n for span in plan.spans)
    assert slot.min() >= probe.BLOCK_TOKENS  # block 0 is padding's
    for i, span in enumerate(plan.spans):
        table = group.table[group.table_start[i] : group.table_start[i + 1]]
        rows = slice(step.q_start[i], step.q_start[i + 1])
        assert set((slot[rows] // probe.BLOCK_TOKENS).tolist()) <= set(table.tolist())
        assert step.pos[rows].tolist() == [span.start + depth for depth in span.depths]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.kind)
def test_the_executor_runs_it(rig: probe.Rig, plan: probe.StepPlan) -> None:
    step = rig.step(plan)
    result = rig.executor.poll(rig.executor.submit(step))
    assert not result.errors
    assert len(result.ids) == step.n_outputs
    guess_of = guesses(step)  # below a wrong guess nothing is sampled
    sure = guess_of < 0 if len(guess_of) else np.ones(step.n_outputs, np.bool_)
    assert sure.any()
    assert (result.ids[sure] >= 0).all()


def test_shapes_count_what_plans_say() -> None:
    decode, prefill, _, tree, hole = (plan.shape((None,)) for plan in PLANS)
    assert (decode.rows, decode.pairs, decode.reads) == (3, (120,), (120,))
    assert (prefill.rows, prefill.pairs, prefill.reads) == (20, (sum(range(6, 26)),), (25,))
    assert (tree.rows, tree.outputs, tree.reads) == (14, 14, (54,))
    assert tree.pairs == (2 * (21 + 3 * 22 + 3 * 23),)
    assert (hole.rows, hole.spans, hole.outputs) == (34, 6, 2)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.kind)
def test_a_plans_shape_is_that_of_its_step(rig: probe.Rig, plan: probe.StepPlan) -> None:
    step = rig.step(plan)
    shape = step_shape(step.pos, step.q_start, step.n_outputs, rig.windows, step.parent)
    assert plan.shape(rig.windows) == shape
    assert bool(shape.branched) == (plan.kind == "tree")


def test_every_block_of_the_cache_holds_something(rig: probe.Rig) -> None:
    """Memory that was never written would be read from one page of zeros, faster than any cache is."""
    caches = rig.executor._attention.layers  # type: ignore[union-attr]
    assert all(bool((cache.k[:, 1:].float().abs().amax(dim=(0, 2, 3, 4)) > 0).all()) for cache in caches)


def test_a_plan_beyond_the_cache_is_refused(rig: probe.Rig) -> None:
    with pytest.raises(ConfigError, match="needs 1000 blocks, the cache has"):
        rig.step(probe.decode(1000, 10))


def test_trees_branch_breadth_first() -> None:
    span = probe.tree(1, 10, 8, width=2).spans[0]
    assert span.parents == (-1, 0, 0, 1, 1, 2, 2, 3)
    assert span.depths == [0, 1, 1, 2, 2, 2, 2, 3]


def test_holes_lie_apart_below_the_last_row() -> None:
    for plan in (probe.hole(1, 1000, 2, 64), probe.hole(2, 700, 2, 32), probe.hole(1, 2000, 6, 16)):
        spans = [span for span in plan.spans if span.seq == 0]
        assert all(a.start + a.n < b.start for a, b in itertools.pairwise(spans))
        assert [span.samples for span in spans] == [False] * (len(spans) - 1) + [True]


def test_every_kind_of_step_is_calibrated_and_fits_its_model() -> None:
    kinds = {plan.kind for plans in probe.CALIBRATION.values() for plan in plans}
    assert kinds == {"decode", "prefill", "mixed", "tree", "hole"}
    for model, plans in probe.CALIBRATION.items():
        longest = max(max(plan.positions()) for plan in plans)
        assert longest <= probe.MODELS[model]().max_position
        assert len({plan.name for plan in plans}) == len(plans)


def test_the_least_leaves_out_the_first_call() -> None:
    clock, spent = ManualClock(), iter([0.01, 0.04, 0.02, 0.03])
    seconds, n = least(lambda: clock.advance(next(spent)), clock, at_least=3, budget_s=0.0)
    assert (seconds, n) == (pytest.approx(0.02), 3)


def test_what_takes_long_runs_once() -> None:
    clock = ManualClock()
    assert least(lambda: clock.advance(1.0), clock, at_least=3, budget_s=0.0) == (1.0, 1)


def test_the_better_of_two_looks_is_the_faster() -> None:
    assert probe.better({"read_Bps": 1.0, "launch_s": 1.0}, {"read_Bps": 2.0, "launch_s": 2.0}) == {
        "read_Bps": 2.0,
        "launch_s": 1.0,
    }


@pytest.fixture(scope="module")
def measured() -> Measured:
    """From a process of its own, as the command line runs it; small."""
    command = [sys.executable, "-m", "tenon.engine.executors.probe"]
    options = json.dumps({"threads": 1, "device": "cpu", "scale": 0.02})
    done = subprocess.run([*command, options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0] == {"phase": "limits"}
    return msgspec.convert(lines[-1]["measured"], Measured)


def test_a_probe_finds_limits_steps_and_the_engines_own_time(measured: Measured) -> None:
    assert {"read_1_threads_Bps", "copy_1_threads_Bps", "gemv_1_threads_Bps"} <= measured.limits.keys()
    assert {"gemm_float32_flops_per_s", "gemm_bfloat16_flops_per_s", "dispatch_s"} <= measured.limits.keys()
    assert all(value > 0 for value in measured.limits.values())
    assert {point.model for point in measured.points} == {"embedded", "small mixture"}
    assert all(np.isfinite(point.seconds) and point.seconds > 0 for point in measured.points)
    assert [point.spans for point in measured.host] == [1, 4]


def test_what_a_probe_finds_can_be_fitted(measured: Measured) -> None:
    found = calibration.calibrate(measured)
    assert found.device().peak("bfloat16") > 0
    assert 0 <= found.error.median <= found.error.p95
