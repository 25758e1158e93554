"""The quick round gives the trees of the general one, and C those of Python: step by step the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tenon.engine.engine import Engine
from tenon.engine.messages import Add
from tenon.engine.policies.calibrate import Calibrator
from tenon.engine.policies.speculate import Pays
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.speculation import native
from tenon.engine.speculation.native import QuickPays
from tenon.engine.speculation.speculation import Speculation
from tenon.engine.speculation.suffix import Suffix
from tests.engine.build import hash_engine

VOCAB = 8
LOOP = (3, 4, 5, 6, 7, 3, 5) * 9
MEASURED = {1: 1.0e-3, 4: 1.01e-3, 12: 1.1e-3, 64: 3e-3}
"""Rows cost something, so that not every guess pays."""


def quick() -> Speculation:
    lib, times = native.load(), StepTimes(MEASURED)
    assert lib is not None
    made = Speculation([Suffix()], QuickPays(lib, times), times)
    assert made._quick is not None
    return made


def general() -> Speculation:
    """Drafter, calibrator and policy one after the other."""
    made = Speculation([Suffix()], Pays(), StepTimes(MEASURED))
    assert made._quick is None
    return made


def in_python() -> Speculation:
    made = Speculation([Suffix(in_c=False)], Pays(), StepTimes(MEASURED))
    made.calibrator = Calibrator(len(made.kinds), Suffix.beliefs)
    assert made._quick is None
    return made


def requests(n: int) -> Iterator[Add]:
    """Of two tenants, at all temperatures, some with siblings, some that want few guesses or none."""
    for i in range(n):
        options: dict[str, Any] = {"temperature": (0.0, 0.3, 0.8, 1.2)[i % 4], "n": 1 + (i % 5 == 0)}
        options |= {"tenant": "ab"[i % 2], "speculate": (-1, -1, 3, 0)[i // 2 % 4]}
        yield Add(f"r{i}", LOOP[i % 7 : 12 + 3 * (i % 11)], 10 + 7 * (i % 6), i, **options)


def serve(made: Engine, n: int, abort_every: int) -> list[bytes]:
    """Every step's bytes, whatever time it is; requests come one by one, some are aborted."""
    scheduler, left, steps = made.scheduler, list(requests(n)), []
    while left or scheduler.has_work:
        if left and len(steps) % 3 == 0:
            scheduler.add(left.pop(0))
        if (step := scheduler.schedule(0.0)) is None:
            continue
        steps.append(step.pack())
        scheduler.commit(step, made.executor.poll(made.executor.submit(step)))
        scheduler.check_integrity()
        if len(steps) % abort_every == 0 and scheduler.requests:
            scheduler.abort(next(iter(scheduler.requests)))
    return steps


@pytest.mark.parametrize("config", [{}, {"n_blocks": 14}, {"max_step_tokens": 12}, {"block_tokens": 4}], ids=str)
def test_all_ways_give_the_same_steps(config: dict[str, Any]) -> None:
    ways: dict[str, Callable[[], Speculation]] = {"quick": quick, "general": general, "python": in_python}
    found = {}
    for name, speculation in ways.items():
        made = hash_engine(**{"n_blocks": 60, "vocab_size": VOCAB, "max_sequences": 8} | config)
        made.scheduler.speculation = speculation()
        found[name] = serve(made, 30, 37), made.scheduler.speculation.counts
    assert found["quick"] == found["general"]
    assert found["quick"][0] == found["python"][0]
    counts = found["quick"][1]
    assert counts.trees > 40
    assert 10 < counts.accepted < counts.nodes
    assert np.isclose(counts.expected, found["python"][1].expected)
