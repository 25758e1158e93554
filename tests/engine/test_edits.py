"""Penalties, biases and bans: the formulas as they are written down, whatever the scheduler does to a sequence."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.base.errors import RequestError
from tenon.engine.edits import Edits, wanted
from tenon.engine.executors.hash import HashExecutor
from tenon.engine.messages import Add
from tenon.engine.params import SamplingParams
from tenon.engine.sampling import edited
from tests.engine.build import SAMPLED_VOCAB, hash_engine, run, step_of

VOCAB = 40
TOKENS = st.integers(0, VOCAB - 1)
WISHES = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 1.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.7, -1.0]),
        "logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100, width=32), max_size=3).map(
            lambda bias: tuple(bias.items())
        ),
        "bad_words": st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
        "min_tokens": st.integers(0, 8),
        "stop_ids": st.lists(TOKENS, max_size=3).map(tuple),
    }
)


def right(logits_V: np.ndarray, context: list[int], n_prompt: int, wishes: dict[str, Any]) -> np.ndarray:
    """The edited logits in fp64, token by token."""
    output = Counter(context[n_prompt:])
    out = logits_V.astype(np.float64)
    for token in set(context):
        out[token] = out[token] / wishes["repetition_penalty"] if out[token] > 0 else (
            out[token] * wishes["repetition_penalty"]
        )  # fmt: skip
    for token, count in output.items():
        out[token] -= wishes["frequency_penalty"] * count + wishes["presence_penalty"]
    for token, value in wishes["logit_bias"]:
        out[token] += value
    for *before, last in wishes["bad_words"]:
        if context[len(context) - len(before) :] == before:
            out[last] = -np.inf
    if len(context) - n_prompt < wishes["min_tokens"]:
        out[list(wishes["stop_ids"])] = -np.inf
    return out


@settings(max_examples=200, deadline=None)
@given(wishes=WISHES, context=st.lists(TOKENS, min_size=1, max_size=90), n_prompt=st.integers(1, 60), data=st.data())
def test_edits_are_the_formulas_however_the_context_grows(
    wishes: dict[str, Any], context: list[int], n_prompt: int, data: st.DataObject
) -> None:
    n_prompt = min(n_prompt, len(context))
    add = Add("r", tuple(context[:n_prompt]), 100, 0, **wishes)
    edits = Edits(add, wishes["stop_ids"])
    logits = np.random.default_rng(len(context)).standard_normal((1, SAMPLED_VOCAB)).astype(np.float32) * 4
    tokens = np.array(context, np.int32)
    n_seen = data.draw(st.integers(n_prompt, len(context)))
    edits.of(tokens[:n_seen], n_prompt)
    made = step_of(1)
    made.edit_token, made.edit_kind, made.edit_value = edits.of(tokens, n_prompt)
    made.edit_start = np.array([0, len(made.edit_token)], np.int32)
    found = edited(logits[0], made, 0)
    assert wanted(add) or not len(made.edit_token)
    np.testing.assert_allclose(found, right(logits[0], context, n_prompt, wishes), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n_blocks", [60, 7])
@pytest.mark.parametrize("config", [{}, {"max_step_tokens": 5}, {"prefix_cache": False}])
def test_an_engine_s_greedy_tokens_are_those_of_the_formulas(n_blocks: int, config: dict[str, Any]) -> None:
    """Also where sequences are preempted and computed once more."""
    wishes = [
        {"repetition_penalty": 1.4},
        {"presence_penalty": 2.0, "frequency_penalty": -1.5},
        {"logit_bias": ((3, 100.0), (4, 99.0)), "bad_words": ((3,), (4, 4))},
        {},
        {"min_tokens": 20, "stop_ids": tuple(range(0, VOCAB, 2))},
    ]
    names = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": (),
             "bad_words": (), "min_tokens": 0, "stop_ids": ()}  # fmt: skip
    adds = [
        Add(f"r{i}", tuple((i * 7 + j) % VOCAB for j in range(18)), 40, 0, temperature=0.0, **one)
        for i, one in enumerate(wishes)
    ]
    made = hash_engine(n_blocks=n_blocks, vocab_size=VOCAB, **config)
    outputs = run(made, adds)
    oracle = HashExecutor(VOCAB)
    for add, one in zip(adds, wishes, strict=True):
        context = list(add.prompt)
        while len(context) < len(add.prompt) + add.max_tokens:
            scores = right(oracle.logits(np.array(context, np.int32)), context, len(add.prompt), names | one)
            context.append(int(np.argmax(scores)))
            if context[-1] in add.stop_ids:
                break
        assert outputs[add.request_id, 0] == context[len(add.prompt) :], one
    assert (made.scheduler.counters.preemptions > 0) is (n_blocks == 7)


def test_siblings_are_penalised_for_their_own_tokens() -> None:
    """With a penalty that forbids to repeat, no sibling repeats itself, and each still finds all live tokens."""
    add = Add("r", (1, 2, 3), 20, 5, 4, temperature=1.0, presence_penalty=2.0, frequency_penalty=2.0)
    alone = run(hash_engine(vocab_size=VOCAB), [add])
    crowded = run(hash_engine(n_blocks=8, vocab_size=VOCAB), [add])
    assert alone == crowded
    repeats = [len(tokens) - len(set(tokens)) for tokens in alone.values()]
    without = run(hash_engine(vocab_size=VOCAB), [Add("r", (1, 2, 3), 20, 5, 4, temperature=1.0)])
    assert sum(repeats) < sum(len(tokens) - len(set(tokens)) for tokens in without.values())


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"logit_bias": ((VOCAB, 1.0),)}, "logit_bias: token id 40 is outside the vocabulary of 40"),
        ({"bad_words": ((1, 99),)}, "bad_words: token id 99"),
        ({"bad_words": ((),)}, "a bad word has no tokens"),
        ({"min_tokens": 9}, "min_tokens must be at most max_tokens, got 9 and 8"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_by_name(wish: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        hash_engine(vocab_size=VOCAB).add(Add("r", (1,), 8, 0, **wish))
    assert caught.value.param == next(iter(wish))


@pytest.mark.parametrize(
    ("wish", "value"),
    [
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", True),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", [(5, 1.0), (5, 2.0)]),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
        ("bad_words", [""]),
        ("bad_words", ["x" * 300]),
        ("min_tokens", -1),
    ],
)
def test_params_out_of_range_are_named(wish: str, value: object) -> None:
    with pytest.raises(RequestError, match=wish) as caught:
        SamplingParams(**{wish: value})
    assert caught.value.param == wish
