"""Where requests' seconds went: parts add up in any simulation, and are by hand what they should be."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.cost.work import StepShape
from tenon.engine.config import EngineConfig
from tenon.engine.promises import Ledger
from tenon.engine.simulate import Marks, Simulated, Simulation
from tenon.engine.speculation.simulated import Agreement, SimulatedDraft
from tenon.models.spec import ModelSpec
from tenon.workloads.trace import Segment, Trace, TraceRequest

SPEC = ModelSpec("llama", 1000, 64, 2, 2, 2, 32, 128, 4096, dtype="float32")
BLOCK_BYTES = 2 * 2 * 64 * 4 * 16
PARTS = (
    "queue_s", "again_s", "prefill_s", "recompute_s", "missed_s", "behind_s", "grammar_s", "decode_s", "prompts_s",
    "guesses_s",
)  # fmt: skip
STEP_S, ROW_S = 1e-2, 1e-4


def cost(shape: StepShape) -> float:
    return STEP_S + ROW_S * shape.rows


def simulate(requests: list[TraceRequest], n_blocks: int = 2000, **more: Any) -> Simulated:
    config = EngineConfig(kv_bytes=n_blocks * BLOCK_BYTES, **more)
    draft = SimulatedDraft(lambda rows: 2e-3, {"": Agreement()}) if config.drafters else None
    made = Simulation(config, SPEC, cost, Marks("m", "nowhere", "made up"), memory_bytes=0, draft=draft)
    return made.run(Trace.make("t", "this test", requests))


def asks(name: str, at_s: float, n_prompt: int, n_output: int, content: int | None = None) -> TraceRequest:
    return TraceRequest(name, at_s, (Segment(content or zlib.crc32(name.encode()), n_prompt),), n_output)


def parts(ledger: Ledger) -> dict[str, float]:
    """Those that are not nothing."""
    return {name: value for name in PARTS if (value := getattr(ledger, name)) > 1e-9}


def by_name(result: Simulated) -> dict[str, Ledger]:
    return {ledger.request_id: ledger for ledger in result.ledgers}


def test_who_is_alone_has_a_prompt_and_decodes() -> None:
    ledger = by_name(simulate([asks("a", 1.0, 100, 11)]))["a"]
    assert parts(ledger) == pytest.approx({"prefill_s": STEP_S + 100 * ROW_S, "decode_s": 10 * (STEP_S + ROW_S)})
    assert ledger.received_s == 1.0
    assert ledger.first_s == pytest.approx(1.0 + STEP_S + 100 * ROW_S)
    assert ledger.ahead == 0


def test_another_s_prompt_makes_steps_longer_and_that_is_said_of_both() -> None:
    found = by_name(simulate([asks("a", 0.0, 10, 101), asks("b", 0.5, 400, 3)]))
    a, b = found["a"], found["b"]
    # The step with b's prompt: what is beyond a's row alone is for the prompt. Two steps have both.
    assert a.prompts_s == pytest.approx(400 * ROW_S, rel=0.05)
    assert a.guesses_s == 0
    assert b.ahead == 1
    assert b.behind_s == pytest.approx((STEP_S + 401 * ROW_S) / 401, rel=1e-6)
    assert b.queue_s < STEP_S + 2 * ROW_S  # until the step that was going on had ended


def test_who_waits_for_a_slot_is_told_behind_whose_prompts() -> None:
    found = by_name(simulate([asks("a", 0.0, 500, 30), asks("b", 0.001, 50, 2)], max_sequences=1))
    b = found["b"]
    assert b.received_s == pytest.approx(STEP_S + 500 * ROW_S)  # the engine listens between steps
    assert b.queue_s == pytest.approx(found["a"].end_s - b.received_s)
    assert [one.request_id for one in b.behind] == ["a"]
    assert b.behind[0].seconds == pytest.approx(STEP_S + 500 * ROW_S)


def test_who_is_preempted_computes_again_and_waits_again() -> None:
    requests = [asks(f"r{i}", 0.0, 40, 60) for i in range(4)]
    found = by_name(simulate(requests, n_blocks=18, prefix_cache=False))
    again = [ledger for ledger in found.values() if ledger.recompute_s > 0]
    assert again
    assert all(ledger.again_s > 0 for ledger in again)


def test_what_was_evicted_is_told_apart() -> None:
    first = [asks("a", 0.0, 160, 2, content=7), asks("b", 1.0, 160, 2, content=8), asks("c", 2.0, 160, 2, content=7)]
    roomy, tight = by_name(simulate(first)), by_name(simulate(first, n_blocks=12))
    assert roomy["c"].missed_s == 0
    assert tight["c"].missed_s > 0
    assert tight["b"].missed_s == 0


def test_guesses_cost_and_gain() -> None:
    requests = [asks(f"r{i}", 0.01 * i, 40, 80) for i in range(6)]
    ledger = by_name(simulate(requests, speculative="draft", speculative_policy="fixed-tree"))["r3"]
    assert ledger.guesses_s > 0
    assert ledger.gained_s > ledger.guesses_s  # they are mostly right, and rows are cheap


REQUESTS = st.lists(
    st.tuples(st.floats(0, 0.3), st.integers(1, 90), st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=12
)


@given(
    drawn=REQUESTS,
    n_blocks=st.sampled_from([14, 30, 400]),
    max_sequences=st.integers(1, 6),
    max_step_tokens=st.sampled_from([7, 64, 1024]),
    policy=st.sampled_from(["", "fixed-tree", "slack"]),
    prompts=st.sampled_from(["beside", "first"]),
)
@settings(max_examples=40, deadline=None)
def test_parts_add_up_whatever_happens(
    drawn: list[tuple[float, int, int, int]],
    n_blocks: int,
    max_sequences: int,
    max_step_tokens: int,
    policy: str,
    prompts: str,
) -> None:
    at_s, requests = 0.0, []
    for i, (gap_s, n_prompt, n_output, content) in enumerate(drawn):
        at_s += gap_s
        requests.append(TraceRequest(f"r{i}", at_s, (Segment(content, n_prompt),), n_output))
    speculative = {"speculative": "draft", "speculative_policy": policy} if policy else {}
    result = simulate(
        requests, n_blocks, max_sequences=max_sequences, max_step_tokens=max_step_tokens, prompts=prompts, **speculative
    )
    assert len(result.ledgers) == len(requests)
    ends = {outcome.id: outcome for outcome in result.outcomes}
    for ledger in result.ledgers:
        total_s = ledger.end_s - ledger.received_s
        told = [getattr(ledger, name) for name in PARTS]
        assert min(told) >= 0
        assert sum(told) + ledger.residual_s == pytest.approx(total_s, abs=1e-12)
        assert abs(ledger.residual_s) <= 1e-9 + 1e-9 * total_s
        assert ledger.end_s == pytest.approx(ends[ledger.request_id].end_s)
        assert ledger.first_s == pytest.approx(ends[ledger.request_id].token_s[0])
