"""Log-probabilities of prompts: each token's once, whatever chunks, forks and preemptions do to the sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tenon.engine.engine import Engine
from tenon.engine.executors.hash import HashExecutor
from tenon.engine.messages import Add, PromptScores
from tenon.engine.sampling import log_softmax
from tests.engine.build import Labs, Outputs, hash_engine, ids

VOCAB = 60
Top = dict[int, float]


def score(made: Engine, adds: list[Add]) -> tuple[dict[str, list[float]], dict[str, list[Top]], Outputs]:
    """Serve to the end. Scores and best tokens of each prompt from its second token on, which must come in order."""
    for add in adds:
        made.add(add)
    scores: dict[str, list[float]] = {add.request_id: [] for add in adds}
    tops: dict[str, list[Top]] = {add.request_id: [] for add in adds}
    outputs: Outputs = {}

    def take(batch: list[PromptScores]) -> None:
        for one in batch:
            assert one.start == 1 + len(scores[one.request_id])
            assert len(one.top) == len(one.logprobs)
            scores[one.request_id] += one.logprobs
            tops[one.request_id] += [dict(best) for best in one.top]

    while made.has_work:
        deltas = made.tick(0.0)
        take(made.take_prompt_scores())
        for delta in deltas:
            add = next(add for add in adds if add.request_id == delta.request_id)
            assert add.prompt_logprobs < 0 or len(scores[add.request_id]) == len(add.prompt) - 1
            outputs.setdefault((delta.request_id, delta.index), []).extend(delta.ids)
        made.check_integrity()
    return scores, tops, outputs


def adds_of(n: int, prompt_logprobs: int = 2) -> list[Add]:
    """Prompts of many lengths with a beginning in common; every third is not scored."""
    rng = np.random.default_rng(n)
    shared = tuple(rng.integers(0, VOCAB, 40).tolist())
    prompts = [shared[: rng.integers(1, 40)] + tuple(rng.integers(0, VOCAB, i % 9).tolist()) for i in range(n)]
    wanted = [-1 if i % 3 == 2 else prompt_logprobs for i in range(n)]
    return [
        Add(f"r{i}", prompt, 12, i, 1 + i % 3, temperature=float(i % 2), prompt_logprobs=want)
        for i, (prompt, want) in enumerate(zip(prompts, wanted, strict=True))
    ]


@pytest.mark.parametrize(
    "config", [{}, {"max_step_tokens": 5}, {"n_blocks": 9, "max_sequences": 6}, {"n_blocks": 9, "max_step_tokens": 3}]
)
def test_every_token_is_scored_once_and_nothing_else_changes(config: dict[str, Any]) -> None:
    adds = adds_of(12)
    made = hash_engine(vocab_size=VOCAB, block_tokens=16, **config)
    scores, tops, outputs = score(made, adds)
    oracle = HashExecutor(VOCAB)
    for add in adds:
        tokens = np.array(add.prompt, np.int32)
        if add.prompt_logprobs < 0:
            assert scores[add.request_id] == []
            continue
        for i, (found, top) in enumerate(zip(scores[add.request_id], tops[add.request_id], strict=True)):
            right = log_softmax(oracle.logits(tokens[: i + 1]))
            assert found == pytest.approx(right[tokens[i + 1]], rel=1e-6) or found == right[tokens[i + 1]] == -np.inf
            assert list(top) == np.argsort(-right, kind="stable")[:2].tolist()
        assert len(scores[add.request_id]) == len(add.prompt) - 1
    plain = [Add(a.request_id, a.prompt, a.max_tokens, a.seed, a.n, temperature=a.temperature) for a in adds]
    assert outputs == score(hash_engine(400, VOCAB), plain)[2]
    if "n_blocks" in config:
        assert made.scheduler.counters.preemptions > 0


def test_a_scored_prompt_reads_no_cache_and_fills_it() -> None:
    made = hash_engine(vocab_size=VOCAB)
    prompt = tuple(i * 7 % VOCAB for i in range(64))
    first = score(made, [Add("a", prompt, 1, 0, prompt_logprobs=0)])[0]["a"]
    assert score(made, [Add("b", prompt, 1, 0, prompt_logprobs=0)])[0]["b"] == first
    assert made.scheduler.counters.cached_tokens == 0
    score(made, [Add("c", prompt, 1, 0)])
    assert made.scheduler.counters.cached_tokens == 48


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    made = hash_engine(vocab_size=VOCAB)
    assert score(made, [Add("a", (5,), 3, 0, prompt_logprobs=1)])[0] == {"a": []}


@pytest.mark.torch
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_scores_are_transformers_log_probabilities(name: str, lab: Labs) -> None:
    it = lab(name, "fp32", 32)
    rng = np.random.default_rng(4)
    prompts = {f"r{i}": ids(rng, n) for i, n in enumerate((2, 17, 70))}
    adds = [Add(r, prompt, 4, 0, temperature=0.0, prompt_logprobs=3) for r, prompt in prompts.items()]
    made = it.engine(max_step_tokens=23)
    scores, tops, _ = score(made, adds)
    for add, logits in zip(adds, it.references(prompts.values()), strict=True):
        logp = torch.log_softmax(logits, -1)
        right = logp[torch.arange(len(add.prompt) - 1), torch.tensor(add.prompt[1:])]
        torch.testing.assert_close(torch.tensor(scores[add.request_id]).double(), right, rtol=0, atol=1e-3)
        best = logp[:-1].topk(3).indices.tolist()
        same = [list(top) == each for top, each in zip(tops[add.request_id], best, strict=True)]
        assert np.mean(same) > 0.9  # where two are all but equal, their order is not certain
