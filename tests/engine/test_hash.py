"""The hash executor's own duty: steps of a set length."""

from __future__ import annotations

from tenon.engine.config import EngineConfig
from tenon.engine.executors.hash import HashExecutor
from tenon.engine.messages import Add
from tenon.models.spec import KVGroup
from tests.engine.build import alike, engine, run


def test_a_step_takes_as_long_as_it_is_told_to() -> None:
    groups = (KVGroup("m", (0,), "full", None, 16, 1),)
    config = EngineConfig(executor="hash", step_ms=20.0)
    slow, fast = (engine(HashExecutor(100, step_s=s), groups, 10, 100, config, alike) for s in (0.02, 0.0))
    assert run(slow, [Add("a", (5, 6), 3, 0)]) == run(fast, [Add("a", (5, 6), 3, 0)])
    assert slow.stats(0.0).step_s >= 0.02
