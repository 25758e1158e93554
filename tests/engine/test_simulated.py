"""The simulator: real scheduling in virtual time. Fast-forward changes nothing but the time it takes us."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenon.base.errors import ConfigError, IntegrityError
from tenon.base.records import read_records
from tenon.cost.device import find as find_device
from tenon.cost.work import StepShape, step_shape
from tenon.engine import fast_forward
from tenon.engine.config import EngineConfig
from tenon.engine.executors.simulated import SimulatedExecutor, TrueTokens
from tenon.engine.messages import Add
from tenon.engine.policies.evict import Cached
from tenon.engine.policies.table import POLICIES
from tenon.engine.scheduler import Scheduler
from tenon.engine.simulate import Marks, Simulated, Simulation, device_cost, free_bytes
from tenon.engine.simulated_view import timeline
from tenon.engine.step import HIDDEN, Step
from tenon.models.shapes import find as find_model
from tenon.models.spec import KVGroup, ModelSpec
from tenon.sim.clock import VirtualClock
from tenon.workloads.trace import Segment, Trace, TraceRequest, content_tokens

SPEC = ModelSpec("llama", 1000, 64, 2, 2, 2, 32, 128, 4096, windows=(None, 24), dtype="float32")
BLOCK_BYTES = 2 * 2 * 64 * 4 * 16
MARKS = Marks("m", "nowhere", "made up")


def cost(shape: StepShape) -> float:
    return 1e-3 + 1e-5 * shape.rows + 1e-8 * shape.pairs[0] + 3e-8 * shape.reads[1] + 1e-8 * shape.largest[0]


def simulation(**more: Any) -> Simulation:
    names = ("watch", "records", "text_s", "forward", "seed")
    given = {name: more.pop(name) for name in names if name in more}
    n_blocks = more.pop("n_blocks", 2000)
    return Simulation(EngineConfig(kv_bytes=n_blocks * BLOCK_BYTES, **more), SPEC, cost, MARKS, memory_bytes=0, **given)


def trace(n: int, seed: int = 0, gap_s: float = 0.02, output: int = 60, prompt: int = 60) -> Trace:
    """Requests that share beginnings; every fifth follows the one before it."""
    random = np.random.default_rng(seed)
    requests: list[TraceRequest] = []
    at_s = 0.0
    for i in range(n):
        at_s += float(random.exponential(gap_s))
        shared = Segment(int(random.integers(1, 4)), int(random.integers(1, prompt)))
        own = Segment(100 + i, int(random.integers(1, 40)))
        after = {"after": f"r{i - 1}", "gap_s": 0.1} if i % 5 == 4 else {}
        n_output = int(random.integers(1, output))
        requests.append(TraceRequest(f"r{i}", at_s, (shared, own), n_output, slo_class=("a", "b")[i % 2], **after))
    return Trace.make("t", "this test", requests)


def run(of: Trace, *, keep: bool = True, **more: Any) -> tuple[Simulated, list[bytes], Simulation]:
    steps: list[bytes] = []
    made = simulation(**({"watch": lambda step: steps.append(step.pack())} if keep else {}), **more)
    return made.run(of), steps, made


# -- fast-forward ----------------------------------------------------------------------------------------------


def known(entry: Cached) -> tuple[Any, ...]:
    """All that policies see of a block but its neighbours."""
    return tuple(getattr(entry, field.name) for field in fields(entry) if field.name not in ("parent", "child"))


def state_of(scheduler: Scheduler) -> dict[str, Any]:
    """All that later steps depend on, and all that was counted."""
    return {
        "counters": asdict(scheduler.counters),
        "pools": [
            (list(p.ref), list(p._free), [known(e) for e in p.entries], [known(e) for e in p.shadows.values()],
             list(p.log))
            for p in scheduler.pools
        ],
        "running": [
            (
                seq.id, seq.n_tokens, seq.n_computed, seq.n_blocks, seq.n_published, seq.digests,
                seq.tokens[: seq.n_tokens].tobytes(), [t[: seq.n_blocks].tobytes() for t in seq.tables],
            )
            for seq in scheduler.running
        ],
        "waiting": [(seq.id, seq.n_preempted, seq.n_tokens) for seq in scheduler.waiting],
    }  # fmt: skip


CONFIGS = st.fixed_dictionaries(
    {
        "n_blocks": st.sampled_from([12, 14, 20, 60, 2000]),
        "block_tokens": st.sampled_from([16, 32]),
        "max_sequences": st.integers(1, 12),
        "max_step_tokens": st.sampled_from([3, 8, 50, 1000]),
        "max_preemptions": st.integers(0, 2),
        "prefix_cache": st.booleans(),
        "evict": st.sampled_from(sorted(POLICIES)),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), CONFIGS, st.sampled_from([0.0, 0.005, 0.1]), st.sampled_from([6, 80]))
def test_fast_forward_changes_nothing(seed: int, config: dict[str, Any], gap_s: float, output: int) -> None:
    of = trace(14, seed, gap_s, output)
    slow, slow_steps, slow_made = run(of, forward=False, **config)
    fast, fast_steps, fast_made = run(of, forward=True, **config)
    assert fast_steps == slow_steps
    assert fast.outcomes == slow.outcomes
    assert (fast.steps, fast.stats, fast.end_s) == (slow.steps, slow.stats, slow.end_s)
    assert state_of(fast_made.scheduler) == state_of(slow_made.scheduler)
    assert slow.forwarded == 0
    unwatched, _, made = run(of, keep=False, forward=True, **config)
    assert (unwatched.outcomes, unwatched.stats) == (slow.outcomes, slow.stats)
    assert state_of(made.scheduler) == state_of(slow_made.scheduler)


def scheduler(**config: Any) -> Scheduler:
    groups = (KVGroup("m", (0,), "full", None, 16, 1), KVGroup("m", (1,), "window", 24, 16, 1))
    return Scheduler(
        EngineConfig(**config), groups, 60, model="m", vocab_size=50, eos_ids=(7,), max_model_len=400, secret=b"k" * 32
    )


def truth(seq: int) -> np.ndarray:
    return content_tokens(seq + 1, 200, 50)


class Pair:
    """Two schedulers told the same; the second goes by stretches where it can."""

    def __init__(self, **config: Any) -> None:
        self.one, self.other = scheduler(**config), scheduler(**config)
        self.clock, self.oracle = VirtualClock(), TrueTokens()
        self.executor = SimulatedExecutor(lambda _: 1.0, self.oracle, self.clock, device="d", dtype="t")
        self.executor.allocate((KVGroup("m", (0,), "full", None, 16, 1), KVGroup("m", (1,), "window", 24, 16, 1)), 60)
        self.stretched = 0

    def add(self, add: Add) -> None:
        for made in (self.one, self.other):
            made.add(add)
            for seq in made.requests[add.request_id].seqs:
                self.oracle.tell(seq.id, truth(seq.id))

    def plain(self, made: Scheduler) -> tuple[Step, list[Any]] | None:
        step = made.schedule(0.0)
        if step is None:
            return None
        return step, made.commit(step, self.executor.poll(self.executor.submit(step)))

    def go(self, most: int) -> None:
        """Up to ``most`` steps of each, compared one by one."""
        while most > 0:
            stretch = fast_forward.begin(self.other, self.oracle.of, (None, 24))
            if stretch is None:
                ours, theirs = self.plain(self.one), self.plain(self.other)
                if ours is None or theirs is None:
                    assert ours is theirs
                    return
                assert (ours[0].pack(), ours[1]) == (theirs[0].pack(), theirs[1])
                most -= 1
                continue
            n = 0
            while n < most and stretch.reserve(0.0):
                ours = self.plain(self.one)
                assert ours is not None
                shape = step_shape(ours[0].pos, ours[0].q_start, ours[0].n_outputs, (None, 24))
                assert stretch.shape() == shape
                assert (stretch.step().pack(), stretch.deltas()) == (ours[0].pack(), ours[1])
                stretch.commit()
                n += 1
            stretch.end()
            assert state_of(self.other) == state_of(self.one)
            self.other.check_integrity()
            self.stretched += n
            most -= n
            if n == 0:
                ours, theirs = self.plain(self.one), self.plain(self.other)
                assert ours is not None
                assert theirs is not None
                assert (ours[0].pack(), ours[1]) == (theirs[0].pack(), theirs[1])
                most -= 1


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_stretch_is_the_scheduler_step_by_step(data: st.DataObject) -> None:
    """Forks, stop tokens, end-of-sequence, aborts and newcomers at any moment."""
    pair = Pair(max_sequences=8, max_step_tokens=data.draw(st.sampled_from([8, 100])))
    for i in range(data.draw(st.integers(1, 8))):
        length, n = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 3))
        stops = (3,) if data.draw(st.booleans()) else ()
        prompt = tuple(content_tokens(data.draw(st.integers(900, 902)), length, 50).tolist())
        ignore = data.draw(st.booleans())
        pair.add(Add(f"r{i}", prompt, data.draw(st.integers(1, 120)), i, n, stop_ids=stops, ignore_eos=ignore))
        pair.go(data.draw(st.integers(0, 40)))
        if data.draw(st.booleans()):
            name = f"r{data.draw(st.integers(0, i))}"
            assert pair.one.abort(name) == pair.other.abort(name)
    pair.go(100_000)
    assert not pair.one.has_work
    assert not pair.other.has_work
    assert state_of(pair.other) == state_of(pair.one)


def test_most_steps_of_a_long_batch_are_forwarded_and_none_that_must_not() -> None:
    together = Trace.make("t", "s", (TraceRequest(f"r{i}", 0.0, (Segment(i, 5 + i),), 300) for i in range(8)))
    result, _, _ = run(together, keep=False, max_sequences=8)
    assert result.forwarded >= 290
    assert len(result.steps) - result.forwarded >= 2  # the prefill, and the step in which all end


def test_log_probabilities_and_blocks_shared_by_siblings_are_left_to_the_scheduler() -> None:
    made = scheduler()
    made.add(Add("r", (1, 2, 3), 50, 0, n_logprobs=0))
    pair = Pair()
    pair.add(Add("f", (1, 2, 3), 50, 0, n=2, ignore_eos=True))
    pair.plain(pair.one)
    assert fast_forward.begin(pair.one, pair.oracle.of, (None, 24)) is None  # the prompt's block is both siblings'
    pair.plain(pair.one)
    assert fast_forward.begin(pair.one, pair.oracle.of, (None, 24)) is not None
    oracle = TrueTokens()
    oracle.tell(0, truth(0))
    executor = SimulatedExecutor(lambda _: 1.0, oracle, VirtualClock(), device="d", dtype="t")
    executor.allocate((KVGroup("m", (0,), "full", None, 16, 1),) * 2, 60)
    step = made.schedule(0.0)
    assert step is not None
    (delta,) = made.commit(step, executor.poll(executor.submit(step)))
    assert np.isnan(delta.logprobs[0])
    assert fast_forward.begin(made, oracle.of, (None, None)) is None


# -- what comes of a trace -------------------------------------------------------------------------------------


def test_tokens_are_conserved_and_time_goes_forward() -> None:
    of = trace(60, seed=3)
    result, steps, made = run(of, n_blocks=20, max_sequences=6)
    assert made.scheduler.counters.preemptions > 0
    assert made.scheduler.counters.cached_tokens > 0
    for request, outcome in zip(of.requests, result.outcomes, strict=True):
        assert outcome.id == request.id
        assert len(outcome.token_s) == request.n_output
        assert outcome.finish_reason == "length"
        times = (outcome.intended_s, *outcome.token_s, outcome.end_s)
        assert list(times) == sorted(times)
    assert sum(len(o.token_s) for o in result.outcomes) == made.scheduler.counters.output_tokens
    ends = list(result.steps.end_s)
    assert ends == sorted(ends)
    assert sum(result.steps.rows) == sum(Step.unpack(step).n_rows for step in steps)
    assert result.stats[-1].running == result.stats[-1].waiting == 0


def test_steps_carry_the_true_tokens_through_preemption() -> None:
    of = trace(12, seed=5, output=80)
    _, packed, made = run(of, n_blocks=12, max_sequences=6)
    assert made.scheduler.counters.preemptions > 0
    by_prompt = {}
    for step in map(Step.unpack, packed):
        for s, seq in enumerate(step.seq.tolist()):
            rows = slice(step.q_start[s], step.q_start[s + 1])
            for position, token in zip(step.pos[rows].tolist(), step.tok[rows].tolist(), strict=True):
                assert by_prompt.setdefault((seq, position), token) == token


def test_the_same_trace_gives_the_same_bytes() -> None:
    one, other = (run(trace(20, seed=1), n_blocks=40)[:2] for _ in range(2))
    assert msgspec.json.encode(one[0].outcomes) == msgspec.json.encode(other[0].outcomes)
    assert one[1] == other[1]


def test_a_lone_request_takes_what_its_steps_cost() -> None:
    of = Trace.make("t", "s", [TraceRequest("r", 2.0, (Segment(1, 100),), 3)])
    result, _, _ = run(of, keep=False, text_s=0.25, max_step_tokens=64)
    (outcome,) = result.outcomes
    shapes = [
        StepShape(64, 1, 0, (64, 64), (64 * 65 // 2, 24 * 25 // 2 + 40 * 24), (64 * 16, 24 * 16)),
        StepShape(36, 1, 1, (100, 59), (100 * 101 // 2 - 64 * 65 // 2, 36 * 24), (100 * 16, 24 * 16)),
        StepShape(1, 1, 1, (101, 24), (101, 24), (101, 24)),
        StepShape(1, 1, 1, (102, 24), (102, 24), (102, 24)),
    ]
    first_s = 2.25 + cost(shapes[0]) + cost(shapes[1])
    told = [first_s, first_s + cost(shapes[2]), first_s + cost(shapes[2]) + cost(shapes[3])]
    assert outcome.token_s == pytest.approx([at_s + 0.25 for at_s in told], abs=1e-12)
    assert (outcome.intended_s, outcome.sent_s, outcome.end_s) == (2.0, 2.0, outcome.token_s[-1])


def test_who_arrives_during_a_step_waits_for_its_end() -> None:
    early = TraceRequest("a", 0.0, (Segment(1, 500),), 2)
    late = TraceRequest("b", 1e-4, (Segment(2, 5),), 1)
    result, packed, _ = run(Trace.make("t", "s", [early, late]))
    steps = [Step.unpack(step) for step in packed]
    assert [step.n_rows for step in steps] == [500, 6]
    assert result.outcomes[1].token_s[0] == result.outcomes[0].token_s[1]


def test_a_follower_is_sent_its_pause_after_the_end() -> None:
    answer = 77
    first = TraceRequest("a", 0.0, (Segment(1, 40),), 30, output=answer)
    second = TraceRequest("b", 1.0, (Segment(1, 40), Segment(answer, 30), Segment(2, 10)), 4, after="a", gap_s=2.5)
    result, _, _ = run(Trace.make("t", "s", [first, second]), keep=False, text_s=0.5)
    one, other = result.outcomes
    assert other.intended_s == one.end_s + 2.5
    assert other.cached_tokens == 64  # prompt and answer of the first turn are there, in whole blocks


def test_a_refused_request_is_an_outcome_and_takes_its_followers_along() -> None:
    requests = [
        TraceRequest("ok", 0.0, (Segment(1, 5),), 5),
        TraceRequest("long", 0.1, (Segment(2, 9000),), 5),
        TraceRequest("next", 0.2, (Segment(3, 5),), 5, after="long", gap_s=1.0),
        TraceRequest("last", 0.3, (Segment(3, 5),), 5, after="next", gap_s=1.0),
    ]
    result, _, _ = run(Trace.make("t", "s", requests), keep=False)
    ok, long, after, last = result.outcomes
    assert not ok.error
    assert long.error.startswith("http 400: This model's maximum context length")
    assert after.error.startswith("skipped: long, which it follows, failed (http 400")
    assert last.error == after.error
    assert (long.end_s, after.end_s, last.end_s) == pytest.approx((0.1, 1.1, 2.1), abs=0.01)


def test_a_full_queue_refuses_as_the_server_does() -> None:
    crowd = Trace.make("t", "s", (TraceRequest(f"r{i}", 0.0, (Segment(i, 40),), 5) for i in range(6)))
    result, _, _ = run(crowd, keep=False, max_sequences=1, max_waiting=3)
    errors = [o.error.partition(":")[0] for o in result.outcomes]
    assert errors == ["", "", "", "http 429", "http 429", "http 429"]


def test_records_are_a_servers_in_virtual_time(tmp_path: Path) -> None:
    of = trace(10)
    result, _, _ = run(of, keep=False, records=tmp_path / "run")
    records = list(read_records(tmp_path / "run"))
    assert [r["kind"] for r in records[:3]] == ["run", "simulated", "state"]
    assert {k: records[1][k] for k in ("model", "device", "cost")} == asdict(MARKS)
    kinds = {r["kind"] for r in records}
    assert kinds == {"run", "simulated", "state", "started", "first", "finished", "stats"}
    at_s = [r["at_s"] for r in records]
    assert at_s == sorted(at_s)
    first = {r["request_id"]: r["ttft_s"] for r in records if r["kind"] == "first"}
    assert first == {o.id: o.token_s[0] - o.intended_s for o in result.outcomes}
    finished = {r["request_id"]: r["n_output"] for r in records if r["kind"] == "finished"}
    assert finished == {r.id: r.n_output for r in of.requests}
    stats = [r for r in records if r["kind"] == "stats"]
    assert json.dumps(stats[-1]["finished"]) == json.dumps({"length": 10})
    run(of, keep=False, records=tmp_path / "again")
    assert (tmp_path / "again/events.jsonl").read_bytes() == (tmp_path / "run/events.jsonl").read_bytes()


def test_the_picture_shows_every_request_and_what_was_held() -> None:
    result, _, _ = run(trace(30), keep=False)
    made = timeline(result, "title")
    assert {s.name for s in made.slices} == {o.id for o in result.outcomes}
    by_lane: dict[str, list[Any]] = {}
    for one in made.slices:
        by_lane.setdefault(one.track, []).append(one)
    for lane in by_lane.values():
        assert all(a.end_s <= b.start_s for a, b in pairwise(lane))
    series = {s.name: s for s in made.series}
    assert max(series["running"].values) == max(stats.running for stats in result.stats)
    assert len(series["step time, ms"].values) == len(result.steps)


# -- device and executor ---------------------------------------------------------------------------------------


def test_a_real_device_is_priced_and_a_faster_one_is_faster() -> None:
    model = find_model("Llama-3.1-8B")
    ends = []
    for name in ("A100-80", "H100"):
        device = find_device(name)
        made = Simulation(
            EngineConfig(),
            model,
            device_cost(model, device, "bfloat16"),
            Marks("Llama-3.1-8B", name, device.use.source),
            memory_bytes=free_bytes(model, device, "bfloat16"),
        )
        ends.append(made.run(trace(5)).end_s)
    assert ends[1] < ends[0]


def test_a_model_that_does_not_fit_or_has_no_arithmetic_is_one_sentence() -> None:
    model, device = find_model("Llama-3-70B"), find_device("H100")
    with pytest.raises(ConfigError, match=r"the weights take 141.1 GB as bfloat16 and 1 x H100 has"):
        free_bytes(model, device, "bfloat16")
    assert free_bytes(model, device, "bfloat16", 4) > 0
    with pytest.raises(ConfigError, match="V100 has no arithmetic in bfloat16"):
        device_cost(model, find_device("V100"), "bfloat16")


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_cost_that_is_none_is_told_before_the_run_or_stops_it(seconds: float) -> None:
    with pytest.raises(IntegrityError, match="the cost model gives"):
        Simulation(EngineConfig(), SPEC, lambda _: seconds, MARKS, memory_bytes=10**8)

    def only_at_first(shape: StepShape) -> float:
        return 1e-3 if shape.rows == shape.spans else seconds

    made = Simulation(EngineConfig(), SPEC, only_at_first, MARKS, memory_bytes=10**8)
    with pytest.raises(IntegrityError, match="the cost model gives"):
        made.run(trace(2))


def test_the_executor_refuses_what_no_cost_model_can_answer() -> None:
    oracle = TrueTokens()
    executor = SimulatedExecutor(lambda _: 1.0, oracle, VirtualClock(), device="d", dtype="t")
    executor.allocate((KVGroup("m", (0,), "full", None, 16, 1),) * 2, 60)
    assert (executor.caps.name, executor.caps.device) == ("simulated", "d")
    made = scheduler()
    made.add(Add("r", (1, 2, 3), 5, 0))
    step = made.schedule(0.0)
    assert step is not None
    with pytest.raises(IntegrityError, match="was not told what sequence 0 answers"):
        executor.submit(step)
    oracle.tell(0, truth(0)[:0])
    with pytest.raises(IntegrityError, match="sequence 0 is asked for output 0, it has 0"):
        executor.submit(step)
    scored = replace(step, score_token=np.array([2], np.int32))
    with pytest.raises(IntegrityError, match="not how likely their prompts are"):
        executor.submit(scored)
    step.want[0] |= HIDDEN
    with pytest.raises(IntegrityError, match="no hidden states"):
        executor.submit(step)
    oracle.forget(0)
    with pytest.raises(KeyError):
        oracle.forget(0)
