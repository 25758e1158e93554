"""A described draft model in a simulation: as right as it says, the same whoever asks, and paid for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.base.errors import ConfigError
from tenon.cost.work import StepShape
from tenon.engine.config import EngineConfig
from tenon.engine.policies.table import SPECULATES
from tenon.engine.simulate import Marks, Simulated, Simulation
from tenon.engine.speculation.simulated import BEST, Agreement, SimulatedDraft
from tenon.models.spec import ModelSpec
from tenon.workloads.generator import make

SPEC = ModelSpec("llama", 1000, 64, 2, 2, 2, 32, 128, 4096, dtype="float32")
LEVEL_S = 2e-3
TRACE = make("adaserve", seed=3, duration_s=20.0, rate=3.0)


def cost(shape: StepShape) -> float:
    return 2e-2 + 1e-4 * shape.rows


def simulate(policy: str, agreement: Agreement | None = None, **more: Any) -> tuple[Simulated, Simulation]:
    draft = SimulatedDraft(lambda rows: LEVEL_S, {"": agreement or Agreement()})
    config = EngineConfig(speculative="draft", speculative_policy=policy, prefix_cache=False, **more)
    made = Simulation(config, SPEC, cost, Marks("m", "nowhere", "made up"), memory_bytes=10**9, draft=draft)
    return made.run(TRACE), made


@cache
def unguessed_s() -> float:
    """When it would end if hardly a guess came true."""
    return simulate("chain-2", Agreement(easy=(1.0, 50.0), unsure=(1.0, 50.0)))[0].end_s


@pytest.mark.parametrize("policy", SPECULATES)
def test_every_request_has_its_own_tokens_under_every_policy(policy: str) -> None:
    """The simulation itself refuses a token too many; all are told, and guesses come true."""
    result, made = simulate(policy)
    assert [len(one.token_s) for one in result.outcomes] == [one.n_output for one in TRACE.requests]
    assert made.scheduler.speculation is not None
    counts = made.scheduler.speculation.counts
    assert counts.accepted > 100
    assert result.end_s < unguessed_s()


def test_it_is_the_same_for_all_who_ask() -> None:
    """Texts are drawn by request: chains of two and of eight meet the same first guesses."""
    first = []
    for policy in ("chain-2", "chain-8"):
        _, made = simulate(policy)
        speculation = made.scheduler.speculation
        assert speculation is not None
        first.append(speculation.counts.accepted_at[0] / speculation.counts.reached[0])
    assert first[0] == pytest.approx(first[1], abs=0.05)
    again = simulate("chain-8")[0]
    assert again.outcomes == simulate("chain-8")[0].outcomes


def test_chains_grow_nearly_in_line_with_their_length() -> None:
    """As published of AdaServe's rivals: 3.4, 5.0 and 6.6 of 4, 6 and 8 come true; the eighth is nearly as often right,
    where the seventh was, as the first."""
    lengths = []
    for k in (4, 6, 8):
        _, made = simulate(f"chain-{k}")
        assert made.scheduler.speculation is not None
        counts = made.scheduler.speculation.counts
        lengths.append(counts.accepted / counts.trees)
    assert lengths == pytest.approx([3.4, 5.0, 6.6], rel=0.12)


def test_predictions_come_true_also_of_a_draft_that_is_too_sure() -> None:
    for sharp in (1.0, 2.0):
        _, made = simulate("fixed-tree", Agreement(easy=(3.0, 2.0), sharp=sharp))
        assert made.scheduler.speculation is not None
        counts = made.scheduler.speculation.counts
        assert counts.expected / counts.accepted == pytest.approx(1.0, abs=0.1)


def test_levels_take_their_time() -> None:
    """A chain of eight is eight levels before each step."""
    result, _ = simulate("chain-8", max_sequences=1)
    alone = [seconds for seconds, rows in zip(result.steps.seconds, result.steps.rows, strict=True) if rows == 9]
    assert len(alone) > 30
    assert np.median(alone) == pytest.approx(8 * LEVEL_S + 2e-2 + 9e-4)


@given(
    easy=st.tuples(st.floats(0.5, 20), st.floats(0.5, 20)),
    hard_run=st.floats(1, 8),
    second=st.floats(0, 1),
    sharp=st.floats(0.3, 3),
    seed=st.integers(0, 999),
)
@settings(max_examples=20)
def test_spreads_are_of_probabilities(
    easy: tuple[float, float], hard_run: float, second: float, sharp: float, seed: int
) -> None:
    agreement = Agreement(easy=easy, hard_run=hard_run, second=second, sharp=sharp)
    stream = np.random.default_rng(seed)
    p = agreement.spreads(stream, agreement.hardness(stream, 200))
    for q in (p, agreement.said(p)):
        assert q.shape == (200, BEST)
        assert (q >= 0).all()
        assert (q.sum(axis=1) <= 1 + 1e-5).all()
        assert (np.diff(q, axis=1) <= 1e-6).all()
    assert np.array_equal(replace(agreement, sharp=1.0).said(p), p)


def test_what_cannot_be_simulated_is_said() -> None:
    with pytest.raises(ConfigError, match="guesses are simulated of a draft model that is described"):
        Simulation(EngineConfig(speculative="draft"), SPEC, cost, Marks("m", "d", "x"), memory_bytes=10**9)
    draft = SimulatedDraft(lambda rows: LEVEL_S, {"": Agreement()})
    for names in ("suffix", "draft, suffix", ""):
        with pytest.raises(ConfigError, match="speculative must name the draft model alone"):
            Simulation(
                EngineConfig(speculative=names), SPEC, cost, Marks("m", "d", "x"), memory_bytes=10**9, draft=draft
            )


@pytest.mark.parametrize("level_s", [2e-3, 5e-3])
def test_a_draft_that_pays_is_asked_however_long_it_takes(level_s: float) -> None:
    """Its plan sees that levels pay; what asking costs is what is left: nothing here."""
    draft = SimulatedDraft(lambda rows: level_s, {"": Agreement((4.0, 2.0), hard_run=2.0, sure=(12.0, 1.0))})
    config = EngineConfig(speculative="draft", speculative_policy="slack", prefix_cache=False)
    made = Simulation(config, SPEC, cost, Marks("m", "nowhere", "made up"), memory_bytes=10**9, draft=draft)
    result = made.run(TRACE)
    assert made.scheduler.speculation is not None
    counts = made.scheduler.speculation.counts
    n_tokens = sum(len(one.token_s) for one in result.outcomes)
    assert counts.trees + counts.accepted > 0.9 * n_tokens  # a tree brings one more than what comes true of it
