"""On real models with ``numerics="invariant"`` speculation changes no bit of what is told: tokens, log-probabilities,
endings, greedy or sampled, in any company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from tenon.engine.config import EngineConfig
from tenon.engine.engine import Engine
from tenon.engine.executors.torch import TorchExecutor
from tenon.engine.messages import Add
from tenon.engine.promises import Slo
from tenon.engine.speculation.build import Draft
from tenon.models.checkpoint import random_decoder
from tests.engine.build import Lab, Labs, engine, ids, told

pytestmark = pytest.mark.torch

CASES = [
    ("llama-tied-llama3", "fp32"), ("qwen2", "bf16"), ("qwen3-window", "bf16"), ("qwen3_moe", "bf16"),
    ("mixtral-window", "fp32"),
]  # fmt: skip
RNG = np.random.default_rng(3)
LOOP = ids(RNG, 9) * 6
BIAS = tuple((token, 9.0) for token in LOOP[:9])
"""A model of random weights repeats nothing of itself; with this much help it does."""


def requests() -> list[Add]:
    """Prompts with common beginnings; most of what is said comes from few tokens."""
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.0, "n": 2},
        {"temperature": 0.6, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
        {"temperature": 0.9, "top_k": 12, "bad_words": ((LOOP[2],), (LOOP[0], LOOP[4]))},
    ]
    return [
        Add(f"r{i}", (*LOOP[: 24 + 7 * i], 5 + i), 24, 40 + i, n_logprobs=2, logit_bias=BIAS, **option)
        for i, option in enumerate(options)
    ]


def served(it: Lab, n_blocks: int = 64, **config: Any) -> Engine:
    """An engine on the lab's executor; its draft model, if there is to be one, has random weights of its own."""
    settings = EngineConfig(model="m", **config)
    draft = None
    if settings.draft_model is not None:
        decoder = random_decoder(it.spec, 1, it.dtype)
        executor = TorchExecutor(decoder, EngineConfig(), on_phase=lambda *_: None)
        executor.allocate(it.groups(settings.block_tokens), n_blocks)
        draft = Draft(executor, it.groups(settings.block_tokens), n_blocks, 512, {1: 1e-4})
    groups = it.groups(settings.block_tokens)
    return engine(it.executor, groups, n_blocks, it.spec.vocab_size, settings, draft=draft)


WAYS: list[dict[str, Any]] = [
    {"speculative": "suffix", "speculative_policy": "pays"},
    {"speculative": "suffix,ngram", "speculative_policy": "fixed-tree"},
    {"speculative": "ngram", "speculative_policy": "chain-4", "max_step_tokens": 11},
    {"speculative": "draft", "speculative_policy": "fixed-tree"},
    {"speculative": "suffix,draft", "speculative_policy": "throughput", "n_blocks": 16},
    {"speculative": "suffix", "speculative_policy": "equal-split", "n_blocks": 16, "prefix_cache": False},
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_no_bit_changes(name: str, dtype: str, lab: Labs) -> None:
    it = lab(name, dtype, numerics="invariant")
    plain = told(served(it), requests())
    accepted = preempted = 0
    for way in WAYS:
        made = served(it, **way)
        assert told(made, requests()) == plain, way
        accepted += made.scheduler.speculation.counts.accepted  # type: ignore[union-attr]
        preempted += made.stats(0.0).preemptions
    assert accepted > 50
    assert preempted > 0


PROMISED: list[dict[str, Any]] = [
    {
        "speculative": "suffix",
        "speculative_policy": "slack",
        "chunk": "patient",
        "order": "fair",
        "min_chunk_tokens": 4,
    },
    {"speculative": "suffix,ngram", "speculative_policy": "paper", "order": "edf", "n_blocks": 16},
    {"speculative": "draft", "speculative_policy": "paper", "speculative_budget": 9, "chunk": "patient"},
    {"prompts": "first", "chunk": "patient", "order": "edf", "max_step_tokens": 11, "min_chunk_tokens": 1},
]


@pytest.mark.parametrize(("name", "dtype"), CASES[1:3])
def test_no_bit_changes_by_what_is_promised(name: str, dtype: str, lab: Labs) -> None:
    it = lab(name, dtype, numerics="invariant")
    plain = told(served(it), requests())
    slos = (Slo(tpot_s=1e-3), Slo(ttft_s=1e-3), None, Slo(tpot_s=5.0, weight=3.0), Slo(2e-2, 2e-2))
    promised = [
        replace(add, slo=slo, tenant=f"{i % 2}") for i, (add, slo) in enumerate(zip(requests(), slos, strict=True))
    ]
    for way in PROMISED:
        assert told(served(it, **way), promised) == plain, way


def test_a_context_that_comes_back_is_read_from_verified_blocks(lab: Labs) -> None:
    """What trees left in the cache is what sequential decoding leaves: whoever takes it over says the same."""
    it = lab("qwen3-window", "bf16", numerics="invariant")
    first = Add("first", LOOP, 40, 1, temperature=0.5, logit_bias=BIAS)
    alone = told(served(it, prefix_cache=False), [first])["first", 0].ids
    again = Add("again", (*LOOP, *alone, 7), 12, 2, temperature=0.8, n_logprobs=1)
    right = told(served(it, prefix_cache=False), [again])
    made = served(it, speculative="suffix,ngram", speculative_policy="fixed-tree")
    assert told(made, [first])["first", 0].ids == alone
    assert told(made, [again]) == right
    assert made.stats(0.0).cached_tokens >= (len(LOOP) + len(alone) - 1) // 16 * 16
