"""One sequence that cannot be computed fails alone; the others never notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tenon.base.errors import RequestError
from tenon.engine.config import EngineConfig
from tenon.engine.engine import Engine
from tenon.engine.executors.torch import TorchExecutor
from tenon.engine.messages import Add, Delta
from tenon.models.checkpoint import random_decoder
from tenon.models.spec import ModelSpec
from tests.engine.build import engine, hash_engine, run

pytestmark = pytest.mark.torch
POISON = 7
RNG = np.random.default_rng(0)
SHARED = tuple(RNG.integers(10, 90, 24).tolist())
GOOD = [
    Add(
        f"good{i}", (*SHARED[: 8 * (i % 4)], *RNG.integers(10, 90, 5 + 9 * i).tolist()), 12, i, temperature=float(i % 2)
    )
    for i in range(6)
]
BAD = [
    Add("at end", (*SHARED, POISON), 5, 0, temperature=0.0),
    Add("sampled", (3, POISON, 4), 5, 0),
    Add("forked", (POISON, *SHARED), 5, 0, n=3),
    Add("in a chunk", (*SHARED[:18], POISON, *SHARED, *SHARED), 5, 0),
]


@pytest.fixture(
    scope="module", params=[("kernel", "float32", 32), ("kernel", "bfloat16", 32), ("torch", "float32", 16)]
)
def poisoned(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """Engines over a model in which one token's embedding is NaN."""
    _, dtype, head_dim = request.param
    spec = ModelSpec("qwen3", 97, 64, 3, 4, 2, head_dim, 96, 256, qk_norm=True, windows=(None, 20, None), dtype=dtype)
    decoder = random_decoder(spec, 1)
    with torch.no_grad():
        decoder.embed.weight[POISON] = float("nan")
        decoder.lm_head.weight[POISON] = 0  # never chosen by the good ones' greedy rows
    executor = TorchExecutor(decoder, EngineConfig(), on_phase=lambda *_: None)

    def make(max_step_tokens: int = 26) -> Engine:
        settings = EngineConfig(model="m", max_step_tokens=max_step_tokens)
        return engine(executor, spec.kv_groups("m", 16, 4), 60, spec.vocab_size, settings)

    return make


def ban_poison(adds: list[Add]) -> list[Add]:
    """Stop where the poisoned token is sampled, so that no good sequence goes on with it."""
    return [Add(a.request_id, a.prompt, a.max_tokens, a.seed, a.n, a.temperature, stop_ids=(POISON,)) for a in adds]


def serve(made: Engine, adds: list[Add]) -> dict[str, list[Delta]]:
    told: dict[str, list[Delta]] = {}
    for add in ban_poison(adds):
        made.add(add)
    while made.has_work:
        for delta in made.tick(0.0):
            told.setdefault(delta.request_id, []).append(delta)
        made.check_integrity()
    return told


def tokens(told: dict[str, list[Delta]], request_id: str) -> list[int]:
    return [t for delta in told[request_id] for t in delta.ids]


@pytest.mark.parametrize("bad", BAD, ids=lambda add: add.request_id)
def test_a_sequence_that_is_not_a_number_fails_alone(bad: Add, poisoned: Callable[..., Engine]) -> None:
    calm = serve(poisoned(), GOOD)
    made = poisoned()
    told = serve(made, [*GOOD[:3], bad, *GOOD[3:]])
    assert [d.finish_reason for d in told[bad.request_id]] == ["error"] * bad.n
    assert all(d.error and not d.ids for d in told[bad.request_id])
    for good in GOOD:
        assert tokens(told, good.request_id) == tokens(calm, good.request_id)
        assert told[good.request_id][-1].finish_reason in ("length", "stop")
    assert made.stats(0.0).finished["error"] == 1
    assert made.stats(0.0).blocks_held == 0


@pytest.mark.parametrize("chunk", [10, 26])
@pytest.mark.parametrize("bad", BAD, ids=lambda add: add.request_id)
def test_what_it_spoilt_is_not_offered_to_others(bad: Add, chunk: int, poisoned: Callable[..., Engine]) -> None:
    heir = [Add("heir", (*SHARED, 50, 51), 6, 0, temperature=0.0)]
    made = poisoned(chunk)
    serve(made, [Add("first", SHARED[:9], 3, 0, temperature=0.0), bad])
    assert tokens(serve(made, heir), "heir") == tokens(serve(poisoned(chunk), heir), "heir")


def test_a_draining_engine_takes_nothing_new_and_finishes() -> None:
    made = hash_engine()
    made.add(Add("a", (1, 2), 5, 0))
    made.drain()
    with pytest.raises(RequestError, match="shutting down"):
        made.add(Add("b", (1,), 5, 0))
    assert len(run(made)["a", 0]) == 5


def test_weights_are_not_replaced_under_a_request(tmp_path: Path) -> None:
    made = hash_engine()
    made.add(Add("a", (1, 2), 5, 0))
    with pytest.raises(RequestError, match="no request is being served"):
        made.load_weights(str(tmp_path), 1)
    assert made.reset() == ["a"]
    made.load_weights(str(tmp_path), 1)
    assert made.scheduler.weights_version == 1


def test_events_name_each_block_once() -> None:
    made = hash_engine(6)
    run(made, [Add("a", tuple(range(40)), 2, 0)])
    first = made.take_kv_events().events
    assert len(first) == 4  # two full blocks in each of two groups
    assert {event.kind for event in first} == {"stored"}
    assert made.take_kv_events().events == ()
    run(made, [Add("b", tuple(range(100, 170)), 2, 0)])
    gone = {event.digest for event in made.take_kv_events().events if event.reason == "evicted"}
    assert gone & {event.digest for event in first}
