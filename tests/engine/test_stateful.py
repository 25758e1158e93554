"""Add, fork, abort, preempt, finish, reset in any order on pools that are too small: nothing is lost or mixed up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tenon.base.errors import ContextTooLong, Overloaded
from tenon.engine.engine import Engine
from tenon.engine.messages import Add
from tenon.engine.policies.table import POLICIES, SPECULATES
from tests.engine.build import chunked, hash_engine, run

VOCAB = 50
PREFIXES = [tuple(np.random.default_rng(i).integers(0, VOCAB, 70).tolist()) for i in range(3)]
CONFIGS = st.fixed_dictionaries(
    {
        "n_blocks": st.integers(3, 12),
        "max_step_tokens": st.integers(1, 40),
        "max_sequences": st.integers(3, 8),
        "max_preemptions": st.integers(0, 3),
        "max_waiting": st.integers(2, 12),
        "prefix_cache": st.booleans(),
        "reuse": st.sampled_from(["blocks", "prefix"]),
        "pending": st.sampled_from(["share", "private"]),
        "evict": st.sampled_from(sorted(POLICIES)),
        "block_tokens": st.sampled_from([16, 32]),
        "speculative": st.sampled_from(["", "suffix", "draft", "ngram,suffix,draft"]),
        "speculative_policy": st.sampled_from(sorted(SPECULATES)),
        "speculative_depth": st.integers(1, 12),
        "speculative_nodes": st.integers(1, 24),
        "draft_blocks": st.integers(2, 12),
    }
)


class Serving(RuleBasedStateMachine):
    """One engine on the hash executor, whose tokens reveal any stale, foreign or missing key and value."""

    engine: Engine
    n_steps = 0
    """Engine steps over all examples."""

    @initialize(config=CONFIGS, chunk=st.sampled_from([5, 16, 1024]))
    def start(self, config: dict[str, Any], chunk: int) -> None:
        self.engine = chunked(hash_engine(vocab_size=VOCAB, **config), chunk)
        self.adds: dict[str, Add] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        self.dropped: set[str] = set()
        self.n_output = 0

    @rule(
        prefix=st.integers(0, 2),
        length=st.integers(1, 70),
        tail=st.lists(st.integers(0, VOCAB - 1), max_size=20),
        max_tokens=st.integers(1, 40),
        n=st.integers(1, 3),
        sampled=st.booleans(),
        stops=st.lists(st.integers(0, VOCAB - 1), max_size=2),
        tenant=st.sampled_from(["", "", "other"]),
        guesses=st.sampled_from([-1, -1, -1, 0, 1, 3]),
        penalty=st.sampled_from([1.0, 1.0, 1.3]),
    )
    def add(
        self, prefix: int, length: int, tail: list[int], max_tokens: int, n: int, sampled: bool, stops: list[int],
        tenant: str, guesses: int, penalty: float,
    ) -> None:  # fmt: skip
        name = f"r{len(self.adds)}"
        prompt = (*PREFIXES[prefix][:length], *tail)
        made = Add(
            name, prompt, max_tokens, len(self.adds), n, float(sampled), stop_ids=tuple(stops), tenant=tenant,
            speculate=guesses, repetition_penalty=penalty,
        )  # fmt: skip
        before = self.engine.stats(0.0)
        try:
            self.engine.add(made)
        except (ContextTooLong, Overloaded):
            assert self.engine.stats(0.0) == before
        else:
            self.adds[name] = made

    @rule()
    def flip(self) -> None:
        """Guessing stops, or goes on."""
        if (speculation := self.engine.scheduler.speculation) is not None:
            speculation.rests = not speculation.rests

    @rule(n=st.integers(1, 6))
    def tick(self, n: int) -> None:
        for _ in range(n):
            self.once()

    def once(self) -> None:
        Serving.n_steps += 1
        for delta in self.engine.tick(0.0):
            key = delta.request_id, delta.index
            assert key not in self.reasons
            assert delta.request_id not in self.dropped
            self.outputs.setdefault(key, []).extend(delta.ids)
            self.n_output += len(delta.ids)
            if delta.finish_reason:
                self.reasons[key] = delta.finish_reason
        self.engine.check_integrity()

    @precondition(lambda self: self.adds)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.adds)))
        served = name in self.engine.scheduler.requests
        assert self.engine.abort(name) == served
        assert not self.engine.abort(name)
        if served:
            self.dropped.add(name)

    @rule()
    def reset(self) -> None:
        self.dropped |= set(self.engine.reset())
        stats = self.engine.stats(0.0)
        assert (stats.running, stats.waiting, stats.blocks_held, stats.blocks_cached) == (0, 0, 0, 0)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            stats = self.engine.stats(0.0)
            assert stats.output_tokens == self.n_output
            assert stats.started == len(self.adds)
            assert stats.finished.get("abort", 0) == len(self.dropped)
            limit = max(1, self.engine.config.max_preemptions)
            for request in self.engine.scheduler.requests.values():
                assert all(seq.n_preempted <= limit for seq in request.seqs)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        steps = 0
        while self.engine.has_work:
            self.once()
            steps += 1
            assert steps < 100_000
        stats = self.engine.stats(0.0)
        assert stats.blocks_held == 0
        assert stats.blocks_cached <= stats.blocks_total
        assert sum(stats.finished.values()) == stats.started
        assert not self.engine.scheduler.requests
        self.compare_with_serving_alone()

    def compare_with_serving_alone(self) -> None:
        for name, add in self.adds.items():
            if name in self.dropped:
                continue
            alone = run(hash_engine(20, VOCAB, prefix_cache=False), [add])
            for index in range(add.n):
                assert self.outputs[name, index] == alone[name, index]
                reason = "stop" if alone[name, index][-1] in add.stop_ids else "length"
                assert self.reasons[name, index] == reason


def check(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Serving,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
        ),
    )


def test_serving_in_any_order() -> None:
    check(examples=20, steps=25)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_steps_in_any_order() -> None:
    before = Serving.n_steps
    check(examples=350, steps=40)
    assert Serving.n_steps - before >= 10_000
