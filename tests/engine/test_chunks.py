"""Engines whose steps have as many rows of prompts as a policy says: answers, records and simulations."""

from __future__ import annotations

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
from tenon.cost.work import StepShape, spans_shape
from tenon.engine.build import build_engine
from tenon.engine.chunks import Chunks, predictor
from tenon.engine.config import EngineConfig
from tenon.engine.engine import Engine
from tenon.engine.messages import Add
from tenon.engine.policies.chunk import CHUNKS, Adaptive, Fixed, Limits, Load, Threshold
from tenon.engine.record import Opening, RecordedEngine, Tick, read, replay
from tenon.engine.scheduler import Scheduler
from tenon.engine.simulate import Marks, Simulated, Simulation
from tenon.engine.step import Step
from tenon.models.spec import ModelSpec, step_work
from tenon.workloads.trace import Segment, Trace, TraceRequest
from tests.cost.test_calibration import measured
from tests.engine.build import Outputs, hash_engine
from tests.engine.test_chunk import TARGET_S, WINDOWS, cost
from tests.engine.test_holes import turns

SPEC = ModelSpec("llama", 1000, 64, 2, 2, 2, 32, 128, 4096, windows=WINDOWS, dtype="float32")


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
    made = hash_engine(14, 200, max_sequences=8, max_step_tokens=64, **config)
    return Engine(made.config, made.identity, made.scheduler, made.executor, Counting(seed))


def come_and_go(made: Engine, asked: list[Add]) -> Outputs:
    """Two requests at a time, to the end."""
    outputs: Outputs = {}
    left = list(asked)
    while left or made.has_work:
        if left and len(made.scheduler.requests) < 2:
            made.add(left.pop(0))
        for delta in made.tick(0.0):
            outputs.setdefault((delta.request_id, delta.index), []).extend(delta.ids)
        made.check_integrity()
    return outputs


def reduced(made: Engine, least: int) -> Engine:
    """As soon as anybody decodes chunks are at their floor."""
    made.scheduler.chunks = Chunks(made.config, SPEC.kv_groups("m", 16, 1), policy=Threshold(Limits(least, 64), 0))
    return made


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 30]), st.sampled_from(["lru", "random"]))
def test_chunks_change_no_answer(seed: int, least: int, evict: str) -> None:
    asked, more = turns(seed), {"evict": evict, "min_chunk_tokens": least}
    right = come_and_go(clocked(seed, evict=evict), asked)
    assert come_and_go(clocked(seed, **ADAPTIVE | more), asked) == right
    assert come_and_go(reduced(clocked(seed, chunk="threshold", **more), least), asked) == right


def test_the_rules_make_other_steps_around_holes() -> None:
    fixed, adaptive = clocked(0, evict="random"), clocked(0, evict="random", **ADAPTIVE)
    threshold = reduced(clocked(0, evict="random", chunk="threshold"), 2)
    for made in (fixed, adaptive, threshold):
        for seed in range(3):
            come_and_go(made, turns(seed))
        assert made.scheduler.counters.holes > 0
    steps = [made.scheduler.counters.steps for made in (fixed, adaptive, threshold)]
    assert min(steps[1:]) > steps[0]


def predicted(step_s: Callable[[StepShape], float], **config: Any) -> Scheduler:
    made = hash_engine(60, 200, max_sequences=8, max_step_tokens=64, **config).scheduler
    groups = SPEC.kv_groups("m", 16, 1)
    made.chunks = Chunks(made.config, groups, step_s)
    return made


class Keeps:
    """A policy that keeps what it was shown."""

    model = None
    load: Load

    def choose(self, load: Load) -> int:
        self.load = load
        return 1


def test_a_policy_is_shown_holes_and_newcomers_where_they_stand() -> None:
    made, keeps = predicted(cost, **ADAPTIVE), Keeps()
    for name, n_prompt in (("talker", 20), ("holed", 150), ("new", 90)):
        made.add(Add(name, (7,) * n_prompt, 5, 0))
    talker, holed, new = made.waiting
    talker.n_computed, talker.n_tokens = 20, 21
    holed.ahead = [(16, 32), (48, 112)]
    chunks = Chunks(EngineConfig(chunk="threshold", max_step_tokens=100), SPEC.kv_groups("m", 16, 1), policy=keeps)
    assert chunks.budget([talker], [holed], [new]) == 2
    spans = [(20, 1), (0, 16), (32, 16), (112, 38)]
    assert keeps.load.shape(40).pairs == spans_shape([*spans[:3], (112, 8)], 1, WINDOWS).pairs
    assert keeps.load.shape(70) == spans_shape(spans, 2, WINDOWS)
    assert keeps.load.shape(100) == keeps.load.shape(999) == spans_shape([*spans, (60, 30)], 3, WINDOWS)


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
    assert set(CHUNKS) == {"fixed", "adaptive", "threshold", "patient"}


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
