"""What the bench ``kv_overhead`` times is what it would be untimed."""

from __future__ import annotations

import pytest

from bench.kv_overhead import POLICIES, Chat, Service, Steps, TimedPolicy
from tenon.engine.policies.evict import Evict

N_BLOCKS, N_STEPS = 20_000, 80


def served(policy: str, **how: bool) -> tuple[Service, Steps]:
    service = Service(policy, N_BLOCKS, **how)
    service.warm(0)
    return service, service.run(N_STEPS)


@pytest.mark.parametrize("policy", ["gdsf", "tuned"])
def test_a_timed_policy_evicts_as_the_same_policy_untimed(policy: str) -> None:
    (plain, steps), (timed, told) = served(policy), served(policy, timed=True)
    assert plain.pool.n_evicted > 1000
    assert list(plain.pool.log) == list(timed.pool.log)
    assert steps.decodes == told.decodes
    assert isinstance(timed.policy, TimedPolicy)
    assert len(timed.policy.evict_s) == timed.pool.n_evicted
    assert len(told.policy_s) == N_STEPS
    assert not steps.policy_s


def test_a_timed_policy_has_every_method_of_one() -> None:
    names = [name for name in vars(Evict) if not name.startswith("_") or name == "__len__"]
    assert len(names) == 8
    assert all(name in vars(TimedPolicy) for name in names)


def test_turns_depend_on_the_seed_alone_and_some_go_on() -> None:
    one, other = ([chat.next() for _ in range(400)] for chat in (Chat(3, 1000), Chat(3, 1000)))
    assert [turn.prompt.tobytes() for turn in one] == [turn.prompt.tobytes() for turn in other]
    beginnings = {turn.prompt[:100].tobytes() for turn in one}
    assert 200 < len(beginnings) < 400


def test_the_bench_counts_steps_of_decodes_apart() -> None:
    _, steps = served(POLICIES[1])
    assert len(steps.decodes) == len(steps.spent_s) == N_STEPS
    assert steps.added > 0
    assert not all(steps.decodes)
