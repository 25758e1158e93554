"""An exception in a step: its own sequence ends with an error, and all others get what they would have got."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tenon.engine.config import EngineConfig
from tenon.engine.engine import Engine
from tenon.engine.executors.hash import HashExecutor
from tenon.engine.executors.isolated import Isolated, joined, only
from tenon.engine.messages import Add, Delta
from tenon.engine.step import I32, Step
from tenon.models.spec import KVGroup
from tests.engine.build import engine, hash_engine, run

VOCAB, POISON = 60, 7


class Poisoned(HashExecutor):
    """Raises where a context has the poison in it, or always."""

    broken = False

    def logits(self, context: I32) -> np.ndarray:
        if self.broken or (context == POISON).any():
            raise ZeroDivisionError("poison")
        return super().logits(context)


def poisoned(n_blocks: int = 40, **config: Any) -> Engine:
    settings = EngineConfig(executor="hash", **config)
    size = settings.block_tokens
    groups = (KVGroup("m", (0, 1), "full", None, size, 1), KVGroup("m", (2,), "window", 8, size, 1))
    return engine(Isolated(Poisoned(VOCAB)), groups, n_blocks, VOCAB, settings)


def adds_of(n: int, *, bad: set[int]) -> list[Add]:
    """Requests that never say the poison themselves; some are asked with it."""
    rng = np.random.default_rng(3)
    tokens = [token for token in range(VOCAB) if token != POISON]
    shared = tuple(rng.choice(tokens, 20).tolist())
    return [
        Add(
            f"r{i}", shared[: i % 3 * 10] + tuple(rng.choice(tokens, 3 + i).tolist()) + (POISON,) * (i in bad), 20, i,
            1 + i % 2, bad_words=((POISON,),), n_logprobs=i % 3 - 1, prompt_logprobs=1 if i % 4 == 1 else -1,
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("config", [{}, {"n_blocks": 12, "max_step_tokens": 9}])
def test_only_who_raises_fails(config: dict[str, Any]) -> None:
    bad = {2, 5, 9}
    adds = adds_of(12, bad=bad)
    made = poisoned(**config)
    for add in adds:
        made.add(add)
    errors: dict[str, str | None] = {}
    tokens: dict[tuple[str, int], list[int]] = {}
    while made.has_work:
        for delta in made.tick(0.0):
            if delta.finish_reason == "error":
                errors[delta.request_id] = delta.error
            tokens.setdefault((delta.request_id, delta.index), []).extend(delta.ids)
        made.check_integrity()
    assert errors == dict.fromkeys((f"r{i}" for i in bad), "the engine failed on this request (ZeroDivisionError)")
    good = [add for i, add in enumerate(adds) if i not in bad]
    right = run(hash_engine(200, VOCAB), good)
    assert {key: value for key, value in tokens.items() if int(key[0][1:]) not in bad} == right


def test_scores_and_log_probabilities_survive_too() -> None:
    """The parts of a step, put together, are the step."""

    def served(made: Engine, adds: list[Add]) -> tuple[list[Delta], list[Any]]:
        for add in adds:
            made.add(add)
        deltas = [delta for delta in made.tick(0.0) if delta.error is None]
        return deltas, made.take_prompt_scores()

    good = adds_of(8, bad=set())
    spoiler = Add("zz", (POISON,), 5, 0)
    deltas, scores = served(poisoned(max_step_tokens=512), [*good, spoiler])
    right, right_scores = served(hash_engine(vocab_size=VOCAB, max_step_tokens=512), good)
    assert deltas == right
    assert scores == right_scores != []


def test_parts_cover_the_step_whatever_is_in_it() -> None:
    made = hash_engine(vocab_size=VOCAB, max_step_tokens=30)
    for add in adds_of(9, bad=set()):
        made.add(add)
    n_split = 0
    while made.has_work:
        step = made.scheduler.schedule(0.0)
        assert step is not None
        seqs = list(dict.fromkeys(step.seq.tolist()))
        parts = [only(step, step.seq == seq) for seq in seqs]
        results = [made.executor.poll(made.executor.submit(Step.unpack(part.step.pack()))) for part in parts]
        again = joined(step, list(zip(parts, results, strict=True)), {})
        whole = made.executor.poll(made.executor.submit(step))  # computing twice changes nothing
        for name in ("ids", "logprobs", "top_ids", "top_logprobs", "scores"):
            np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
        n_split += len(parts) > 1
        made.scheduler.commit(step, again)
        made.check_integrity()
    assert n_split > 10


def test_an_executor_that_computes_nothing_any_more_is_broken() -> None:
    made = poisoned()
    made.executor.inner.broken = True  # type: ignore[attr-defined]
    for name in ("a", "b"):
        made.add(Add(name, (1, 2), 5, 0))
    with pytest.raises(ZeroDivisionError):
        made.tick(0.0)


def test_alone_it_takes_three_requests_to_tell() -> None:
    made = poisoned()
    made.executor.inner.broken = True  # type: ignore[attr-defined]
    for name in ("a", "b"):
        made.add(Add(name, (1, 2), 5, 0))
        (delta,) = made.tick(0.0)
        assert delta.finish_reason == "error"
    made.add(Add("c", (1, 2), 5, 0))
    with pytest.raises(ZeroDivisionError):
        made.tick(0.0)
