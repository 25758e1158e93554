"""Chunk policies: how many rows of prompts a step has beside its decodes. Cutting otherwise changes no answer."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.base.errors import ConfigError
from tenon.cost import calibration
from tenon.cost.price import seconds
from tenon.cost.work import StepShape, decode_shape, spans_shape, with_run
from tenon.engine.build import build_engine
from tenon.engine.chunks import Chunks, predictor
from tenon.engine.config import EngineConfig
from tenon.engine.engine import Engine
from tenon.engine.messages import Add
from tenon.engine.policies.chunk import (
    BOUND,
    CANDIDATES,
    CHUNKS,
    MARGIN,
    Adaptive,
    Corrected,
    Fixed,
    Learned,
    Limits,
    Load,
    Model,
    Threshold,
)  # fmt: skip
from tenon.engine.record import Opening, RecordedEngine, Tick, read, replay
from tenon.engine.scheduler import Scheduler
from tenon.engine.simulate import Marks, Simulated, Simulation
from tenon.engine.step import Step
from tenon.models.spec import ModelSpec, step_work
from tenon.workloads.trace import Segment, Trace, TraceRequest
from tests.cost.test_calibration import measured
from tests.engine.build import hash_engine, run

WINDOWS = (None, 24)
SPEC = ModelSpec("llama", 1000, 64, 2, 2, 2, 32, 128, 4096, windows=WINDOWS, dtype="float32")
TARGET_S = 0.02


def cost(shape: StepShape) -> float:
    """Milliseconds for a step, ten microseconds for a row, and what attention takes."""
    return 2e-3 + 1e-5 * shape.rows + 2e-8 * shape.pairs[0] + 3e-8 * shape.reads[1] + 1e-8 * shape.largest[0]


def load(contexts: list[int], runs: list[tuple[int, int, int]]) -> Load:
    return Load(decode_shape(contexts, WINDOWS), runs, WINDOWS)


def rows_only(rows: int) -> StepShape:
    return StepShape(rows, 2, 1, (1, 1), (1, 1), (1, 1))


# -- shapes ----------------------------------------------------------------------------------------------------

RUNS = st.lists(st.tuples(st.integers(0, 400), st.integers(16, 90), st.integers(0, 2)), max_size=5)
CONTEXTS = st.lists(st.integers(1, 500), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(CONTEXTS, RUNS, st.integers(0, 300))
def test_a_loads_shape_is_that_of_its_spans(contexts: list[int], runs: list[tuple[int, int, int]], rows: int) -> None:
    spans, outputs, left = [(seen - 1, 1) for seen in contexts], len(contexts), rows
    for start, n, out in runs:
        if left > 0:
            spans.append((start, min(n, left)))
            outputs += out if n <= left else 0
        left -= n
    found, right = load(contexts, runs).shape(rows), spans_shape(spans, outputs, WINDOWS)
    exact = ("rows", "spans", "outputs", "reads", "pairs")
    assert [getattr(found, name) for name in exact] == [getattr(right, name) for name in exact]
    if all(n >= 32 for _, n in spans[len(contexts) :]):  # a shorter run's piece counts at most as that run's pairs
        assert found.largest == right.largest


@pytest.mark.parametrize("window", [None, 24])
def test_a_short_runs_piece_is_its_pairs(window: int | None) -> None:
    nothing = StepShape(0, 0, 0, (0,), (0,), (0,))
    found = with_run(nothing, 3, 2, (window,))
    assert (found.pairs, found.largest) == ((9,), (9,))


# -- the choice ------------------------------------------------------------------------------------------------


def by_linear_search(limits: Limits, model: Callable[[StepShape], float], given: Load) -> int:
    within_s, best = limits.target_s * (1 - MARGIN), limits.least
    for rows in range(limits.tile, limits.most + limits.tile, limits.tile):
        if model(given.shape(min(rows, limits.most))) <= within_s:
            best = max(best, min(rows, limits.most))
    return best


COEFFICIENTS = st.tuples(*(st.floats(0, top) for top in (0.03, 3e-4, 3e-6, 3e-6, 1e-6)))


@settings(max_examples=200, deadline=None)
@given(COEFFICIENTS, CONTEXTS, RUNS, st.integers(1, 200), st.integers(1, 3000), st.floats(0.5, 2.0))
def test_adaptive_is_the_largest_count_that_fits(
    c: tuple[float, ...], contexts: list[int], runs: list[tuple[int, int, int]], least: int, most: int, ratio: float
) -> None:
    calls = 0

    def step_s(shape: StepShape) -> float:
        nonlocal calls
        calls += 1
        return c[0] + c[1] * shape.rows + c[2] * shape.pairs[0] + c[3] * shape.reads[1] + c[4] * shape.largest[0]

    limits, model = Limits(min(least, most), most, TARGET_S), Corrected(step_s)
    model.ratio = ratio
    found = Adaptive(limits, model).choose(load(contexts, runs))
    assert calls <= math.log2(CANDIDATES) + 1
    assert found == by_linear_search(limits, model, load(contexts, runs))
    assert min(least, most) <= found <= most


def test_a_hopeless_target_gives_the_floor_and_a_lax_one_the_ceiling() -> None:
    given = load([100] * 4, [(0, 5000, 1)])
    chosen = [Adaptive(Limits(64, 1000, target_s), Corrected(cost)).choose(given) for target_s in (1e-9, 1e9)]
    assert chosen == [64, 1000]


def test_without_decodes_a_chunk_is_whole_and_nothing_is_predicted() -> None:
    def never(shape: StepShape) -> float:
        raise AssertionError

    assert Adaptive(Limits(64, 1000, 1e-9), Corrected(never)).choose(load([], [(0, 5000, 1)])) == 1000


def test_a_deeper_prompt_gets_a_smaller_chunk() -> None:
    policy = Adaptive(Limits(16, 1024, TARGET_S), Corrected(cost))
    chosen = [policy.choose(load([100] * 4, [(start, 5000, 1)])) for start in (0, 10_000, 50_000)]
    assert 1024 > chosen[0] > chosen[1] > chosen[2] >= 16


def test_threshold_reduces_beyond_it_down_to_its_floor() -> None:
    policy = Threshold(Limits(64, 1024), threshold=10)
    chosen = [policy.choose(load([9] * n, [])) for n in (0, 10, 11, 20, 40, 1000)]
    assert chosen == [1024, 1024, 928, 512, 256, 64]
    assert Fixed(Limits(64, 1024)).choose(load([9] * 1000, [])) == 1024


# -- what is measured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [0.5, 2.0])
def test_a_prediction_that_is_off_by_two_is_corrected(off: float) -> None:
    model = Corrected(cost)
    for rows in range(100, 140):
        model.tell(rows_only(rows), off * cost(rows_only(rows)))
    assert model.ratio == pytest.approx(off, rel=0.01)
    assert model(rows_only(300)) == pytest.approx(off * cost(rows_only(300)), rel=0.01)


@pytest.mark.parametrize("outlier", [0.001, 1000.0])
@pytest.mark.parametrize("make", [lambda: Corrected(cost), Learned])
def test_one_outlier_changes_nothing_and_many_do(make: Callable[[], Model], outlier: float) -> None:
    model = make()
    for _ in range(60):
        model.tell(rows_only(100), 0.003)
    before = model(rows_only(100))
    model.tell(rows_only(100), 0.003 * outlier)
    assert model(rows_only(100)) == pytest.approx(before, rel=1e-3)
    for _ in range(20):
        model.tell(rows_only(100), 0.003 * outlier)
    assert abs(math.log(model(rows_only(100)) / before)) > 0.5


def test_a_correction_is_bounded_and_deaf_to_what_is_no_time() -> None:
    model = Corrected(cost)
    for taken_s in (0.0, -1.0, math.nan, math.inf):
        for _ in range(9):
            model.tell(rows_only(10), taken_s)
    assert model.ratio == 1.0
    for _ in range(99):
        model.tell(rows_only(10), 1000.0)
    assert BOUND * 0.99 < model.ratio <= BOUND


def test_a_line_is_learned_from_steps_alone_and_grows_by_doubling() -> None:
    model, policy_rows = Learned(), []
    policy = Adaptive(Limits(16, 1024, TARGET_S), model)
    given = load([100] * 8, [(0, 5000, 1)])
    for _ in range(40):
        model.tell(StepShape(8, 8, 8, (), ()), 2e-3 + 2e-5 * 8)
        policy_rows.append(policy.choose(given))
        shape = given.shape(policy_rows[-1])
        model.tell(shape, 2e-3 + 2e-5 * shape.rows)
    assert policy_rows[:3] == [16, 16, 16]
    assert all(later <= 2 * (earlier + 8) for earlier, later in pairwise(policy_rows))
    most = (0.95 * TARGET_S - 2e-3) / 2e-5 - 8
    assert policy_rows[-1] == most // 16 * 16


# -- engines ---------------------------------------------------------------------------------------------------


class Counting:
    """A clock that is read: each reading comes some time after the one before."""

    def __init__(self, seed: int) -> None:
        self._random, self._now_s = np.random.default_rng(seed), 0.0

    def now_s(self) -> float:
        self._now_s += float(self._random.exponential(0.004))
        return self._now_s

    wall_s = now_s


ADAPTIVE: dict[str, Any] = {"chunk": "adaptive", "tpot_ms": 4.0, "min_chunk_tokens": 2}


def adds(n: int, seed: int = 0) -> list[Add]:
    random = np.random.default_rng(seed)
    beginning = tuple(random.integers(0, 200, 60).tolist())
    prompts = [beginning[: random.integers(1, 61)] + tuple(random.integers(0, 200, 20).tolist()) for _ in range(n)]
    return [Add(f"r{i}", prompt, 3 + 5 * (i % 6), seed=i, n=1 + (i % 7 == 3)) for i, prompt in enumerate(prompts)]


def clocked(seed: int, **config: Any) -> Engine:
    """An engine without a model, whose steps are measured by a clock that is all noise."""
    made = hash_engine(24, 200, max_sequences=8, max_step_tokens=64, **config)
    return Engine(made.config, made.identity, made.scheduler, made.executor, Counting(seed))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 30]), st.sampled_from(["blocks", "prefix"]))
def test_chunks_change_no_answer(seed: int, least: int, reuse: str) -> None:
    asked = adds(12, seed)
    fixed = clocked(seed, reuse=reuse)
    right = run(fixed, asked)
    for more in (ADAPTIVE | {"min_chunk_tokens": least}, {"chunk": "threshold", "min_chunk_tokens": least}):
        assert run(clocked(seed, reuse=reuse, **more), asked) == right


def test_adaptive_chunks_make_other_steps() -> None:
    steps = []
    for more in ({}, ADAPTIVE):
        made = clocked(0, **more)
        run(made, adds(20))
        steps.append(made.scheduler.counters.steps)
    assert steps[1] > steps[0]


def predicted(step_s: Callable[[StepShape], float], **config: Any) -> Scheduler:
    made = hash_engine(60, 200, max_sequences=8, max_step_tokens=64, **config).scheduler
    groups = SPEC.kv_groups("m", 16, 1)
    made.chunks = Chunks(made.config, groups, step_s)
    return made


def test_a_lane_shares_its_steps_by_the_same_rule() -> None:
    packed: list[list[bytes]] = []
    for lanes in (True, False):
        made = predicted(cost, **ADAPTIVE | {"tpot_ms": 2.5})
        left, steps = adds(12), []
        executor = hash_engine(60, 200).executor
        while left or made.has_work:
            if left and (made.counters.steps % 7 == 0 or not made.has_work):
                made.add(left.pop(0))
            if not lanes:
                made.leave_lane()
            step = made.schedule(0.0)
            assert step is not None
            steps.append(step.pack())
            made.commit(step, executor.poll(executor.submit(step)))
        packed.append(steps)
    assert packed[0] == packed[1]


def test_only_steps_that_are_shared_are_predicted() -> None:
    asked: list[StepShape] = []

    def step_s(shape: StepShape) -> float:
        asked.append(shape)
        return cost(shape)

    made = predicted(step_s, **ADAPTIVE)
    executor = hash_engine(60, 200).executor
    for add in adds(2):
        made.add(add)
        for _ in range(2):
            step = made.schedule(0.0)
            assert step is not None
            made.commit(step, executor.poll(executor.submit(step)))
    n_asked = len(asked)
    assert n_asked > 0
    while (step := made.schedule(0.0)) is not None:
        made.commit(step, executor.poll(executor.submit(step)))
    assert len(asked) == n_asked


# -- records ---------------------------------------------------------------------------------------------------


def recorded(path: Path, **more: Any) -> Path:
    made = RecordedEngine(clocked(5, **more), path, clock=Counting(6))
    left = adds(30)
    while left or made.has_work:
        if left:
            made.add(left.pop(0))
        made.tick(0.0)
    made.close()
    return path


def test_a_replay_needs_no_times(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.steps", **ADAPTIVE)
    opening, *ticks = read(path)
    assert isinstance(opening, Opening)
    assert opening.policies["chunk"] == "adaptive"
    assert len({tick.chunk for tick in ticks if isinstance(tick, Tick)}) > 3
    found = replay(path)
    assert (found.difference, found.closed) == ("", True)


@pytest.mark.parametrize(("change", "said"), [(lambda n: n and n + 1, "differs"), (lambda n: 0, "has to be chosen")])
def test_another_chunk_is_another_step(tmp_path: Path, change: Callable[[int], int], said: str) -> None:
    path = recorded(tmp_path / "run.steps", **ADAPTIVE)
    out = b""
    for frame in read(path):
        frame = msgspec.structs.replace(frame, chunk=change(frame.chunk)) if isinstance(frame, Tick) else frame
        body = msgspec.msgpack.encode(frame)
        length = len(body).to_bytes(4, "little")
        out += struct.pack("<III", len(body), zlib.crc32(length), zlib.crc32(body)) + body
    path.write_bytes(out)
    assert said in replay(path).difference


# -- simulations -----------------------------------------------------------------------------------------------


def simulated(forward: bool = True, step_s: Callable[[StepShape], float] = cost, **config: Any) -> Shared:
    """Four that decode, and long prompts that come while they do."""
    found = Shared()
    settings = EngineConfig(kv_bytes=2000 * 2 * 2 * 64 * 4 * 16, **config)
    made = Simulation(
        settings, SPEC, cost, Marks("m", "nowhere", "made up"), memory_bytes=0, forward=forward, watch=found.watch
    )
    made.scheduler.chunks = Chunks(settings, SPEC.kv_groups("m", 16, 4), step_s)
    talkers = [TraceRequest(f"t{i}", 0.0, (Segment(i, 30),), 400) for i in range(4)]
    prompts = [TraceRequest(f"p{i}", 0.1 + 0.05 * i, (Segment(9, 700), Segment(20 + i, 2200)), 5) for i in range(8)]
    found.result = made.run(Trace.make("t", "this test", [*talkers, *prompts]))
    return found


class Shared:
    """A simulation's steps in which somebody decodes and somebody is at their prompt, and the gaps between tokens."""

    result: Simulated

    def __init__(self) -> None:
        self._rows: list[tuple[int, int]] = []
        self.packed: list[bytes] = []

    def watch(self, step: Step) -> None:
        self._rows.append((step.n_rows, int((np.diff(step.q_start) == 1).sum())))
        self.packed.append(step.pack())

    @property
    def seconds(self) -> list[float]:
        every = zip(self._rows, self.result.steps.seconds, strict=True)
        return [taken for (rows, decodes), taken in every if rows > decodes > 0]

    @property
    def gaps_s(self) -> list[float]:
        talkers = self.result.outcomes[:4]
        return [later - earlier for one in talkers for earlier, later in pairwise(one.token_s)]


TPOT: dict[str, Any] = {"chunk": "adaptive", "tpot_ms": 1e3 * TARGET_S, "min_chunk_tokens": 16}


def test_decodes_keep_their_pace_while_prompts_come() -> None:
    fixed, adaptive = simulated(), simulated(**TPOT)
    assert max(fixed.gaps_s) > 2 * TARGET_S
    assert max(adaptive.gaps_s) <= TARGET_S
    assert len(adaptive.seconds) > 20
    assert np.median(adaptive.seconds) > 0.8 * TARGET_S  # the target is made use of


def test_the_floor_is_computed_though_the_target_breaks() -> None:
    found = simulated(**TPOT | {"min_chunk_tokens": 1024})
    assert max(found.gaps_s) > 2 * TARGET_S
    assert found.packed == simulated().packed


@pytest.mark.parametrize("off", [0.5, 2.0])
def test_a_wrong_predictor_is_corrected_while_it_serves(off: float) -> None:
    found = simulated(step_s=lambda shape: off * cost(shape), **TPOT)
    late = found.seconds[20:-2]
    assert max(late) <= TARGET_S
    assert np.median(late) > 0.7 * TARGET_S
    assert (max(found.seconds[:5]) > 1.2 * TARGET_S) is (off < 1)


def test_fast_forward_shares_steps_alike() -> None:
    slow, fast = simulated(forward=False, **TPOT), simulated(**TPOT)
    assert fast.packed == slow.packed
    assert fast.result.outcomes == slow.result.outcomes
    assert fast.result.forwarded > 0


# -- settings --------------------------------------------------------------------------------------------------


def test_what_is_aimed_at_has_to_be_said() -> None:
    with pytest.raises(ConfigError, match="tpot_ms must be given where chunk is 'adaptive'") as refused:
        EngineConfig(chunk="adaptive")
    assert refused.value.subject == "tpot_ms"
    assert set(CHUNKS) == {"fixed", "adaptive", "threshold"}


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of its own."""
    monkeypatch.setenv("TENON_STATE", str(tmp_path))
    return tmp_path


def test_a_machine_without_a_calibration_learns_and_says_so(state: Path) -> None:
    found = predictor(SPEC, "float32", "cpu")
    assert found.step_s is None
    assert found.note.startswith("chunks go by measured steps alone: this machine is not calibrated")


def test_a_calibration_is_used_for_the_device_and_type_that_it_is_of(state: Path) -> None:
    made = calibration.calibrate(measured(20))
    calibration.save(made)
    found, shape = predictor(SPEC, "float32", "cpu"), spans_shape([(0, 100)], 1, WINDOWS)
    assert found.step_s is not None
    assert found.step_s(shape) == seconds(step_work(SPEC, shape, "float32"), made.device())
    assert found.note.startswith("chunks go by this machine's calibration")
    others = [predictor(SPEC, dtype, device) for dtype, device in (("float32", "cuda:0"), ("float16", "cpu"))]
    assert [other.step_s for other in others] == [None, None]
    assert [word in other.note for word, other in zip(("not the gpu", "float16"), others, strict=True)] == [True, True]


@pytest.mark.parametrize("chunk", ["fixed", "threshold", "adaptive"])
def test_the_engine_says_what_its_chunks_go_by(state: Path, chunk: str) -> None:
    config = EngineConfig(executor="hash", chunk=chunk, tpot_ms=20.0)  # type: ignore[arg-type]
    made = build_engine(config, lambda *_: None)
    assert ("chunks go by" in made.identity.description["notes"]) is (chunk == "adaptive")
    assert isinstance(
        made.scheduler.chunks.policy, {"fixed": Fixed, "threshold": Threshold, "adaptive": Adaptive}[chunk]
    )
