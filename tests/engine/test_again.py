"""A sequence that an engine was at when it died, given to another: it goes on as if nothing had happened."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from tenon.base.errors import RequestError
from tenon.engine.engine import Engine
from tenon.engine.messages import Add, Delta
from tests.engine.build import hash_engine

VOCAB = 60


def adds_of(seed: int) -> list[Add]:
    """Sampled and greedy, with siblings, penalties, log-probabilities and ends."""
    rng = np.random.default_rng(seed)
    wishes: list[dict[str, Any]] = [
        {}, {"n": 3}, {"temperature": 0.0, "repetition_penalty": 1.3}, {"n_logprobs": 2, "frequency_penalty": 0.5},
        {"stop_ids": (1, 2, 3), "min_tokens": 9}, {"n": 2, "prompt_logprobs": 1, "bad_words": ((5,), (6, 7))},
    ]  # fmt: skip
    return [
        Add(f"r{i}", tuple(rng.integers(0, VOCAB, rng.integers(1, 50)).tolist()), 30, i, top_p=0.9, **wish)
        if "temperature" not in wish
        else Add(f"r{i}", tuple(rng.integers(0, VOCAB, 20).tolist()), 30, i, **wish)
        for i, wish in enumerate(wishes)
    ]


class Client:
    """What came of each sequence, whichever engine it came from."""

    def __init__(self, adds: list[Add]) -> None:
        self.adds = {add.request_id: add for add in adds}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.logprobs: dict[tuple[str, int], list[float]] = {}
        self.ends: dict[tuple[str, int], str] = {}

    def hear(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            key = delta.request_id.partition("#")[0], delta.index
            assert key not in self.ends
            self.tokens.setdefault(key, []).extend(delta.ids)
            self.logprobs.setdefault(key, []).extend(delta.logprobs)
            if delta.finish_reason is not None:
                self.ends[key] = delta.finish_reason

    def again(self) -> list[Add]:
        """What another engine has to be asked for."""
        found = []
        for name, add in self.adds.items():
            if not any(key[0] == name for key in self.tokens):
                found.append(msgspec.structs.replace(add, again=True))
                continue
            for index in range(add.n):
                if (name, index) not in self.ends:
                    outputs = tuple(self.tokens.get((name, index), ()))
                    found.append(
                        msgspec.structs.replace(
                            add, request_id=f"{name}#{index}", n=1, index=index, outputs=outputs, again=True,
                            prompt_logprobs=-1,
                        )
                    )  # fmt: skip
        return found


def made(**config: Any) -> Engine:
    return hash_engine(vocab_size=VOCAB, **config)


@pytest.mark.parametrize("config", [{}, {"n_blocks": 12, "max_step_tokens": 9}])
def test_whenever_an_engine_dies_the_next_goes_on(config: dict[str, Any]) -> None:
    whole = Client(adds_of(0))
    engine = made()
    for add in whole.adds.values():
        engine.add(add)
    while engine.has_work:
        whole.hear(engine.tick(0.0))
    assert set(whole.ends.values()) == {"length", "stop"}
    for deaths in ([1], [4], [12], [30], [3, 3, 3, 3], [1] * 25):
        client = Client(adds_of(0))
        engine, asked = made(**config), list(client.adds.values())
        for n_ticks in (*deaths, 10**6):
            for add in asked:
                engine.add(add)
            while engine.has_work and n_ticks:
                client.hear(engine.tick(0.0))
                engine.check_integrity()
                n_ticks -= 1
            engine, asked = made(**config), client.again()
        assert (client.tokens, client.logprobs, client.ends) == (whole.tokens, whole.logprobs, whole.ends), deaths


def test_one_that_was_accepted_before_finds_no_queue_too_long() -> None:
    engine = made(max_waiting=1)
    engine.add(Add("a", (1,), 5, 0))
    engine.add(Add("b", (1,), 5, 0, again=True))
    with pytest.raises(RequestError, match="which is the limit"):
        engine.add(Add("c", (1,), 5, 0))


def test_a_sibling_that_goes_on_alone_is_aborted_by_its_own_number() -> None:
    engine = made()
    engine.add(Add("a", (1, 2), 50, 0, index=3, outputs=(7, 8)))
    (delta,) = engine.tick(0.0)
    assert (delta.index, engine.scheduler.requests["a"].seqs[0].n_output) == (3, 3)
    assert not engine.abort("a", 0)
    assert engine.abort("a", 3)
    assert not engine.has_work


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"n": 2, "index": 1}, "n must be 1"),
        ({"n": 2, "outputs": (1,)}, "n must be 1"),
        ({"outputs": (1,) * 5}, "max_tokens must exceed"),
        ({"outputs": (VOCAB,)}, "outputs: token id 60"),
    ],
)
def test_what_cannot_go_on_is_refused(wish: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        made().add(Add("a", (1,), 5, 0, **wish))
