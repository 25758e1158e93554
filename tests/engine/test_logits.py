"""Every row the engine computes, against transformers in fp64 on the same weights and tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tenon.engine.config import BLOCK_TOKENS
from tenon.engine.messages import Add
from tests.engine.build import Lab, Labs, Served, ids
from tests.models import zoo

pytestmark = pytest.mark.torch
Record = Callable[[str, object], None]

FLOOR, TIMES_FP32, TIMES_BF16 = 1e-5, 3.0, 1.25
"""fp32 rows may err by the larger of FLOOR and TIMES_FP32 transformers fp32; bf16 quantiles by TIMES_BF16."""
MARGIN = 1e-4
HEADS = [pytest.param(32, id="kernel"), pytest.param(None, id="torch")]
BF16 = [(name, 32) for name in zoo.CASES] + [(name, None) for name in zoo.ONE_EACH]


def mixed_requests(seed: int = 0) -> list[Add]:
    """Lengths around block borders, shared prefixes, several samples of one prompt, greedy and sampled ones."""
    rng = np.random.default_rng(seed)
    shared = ids(rng, 40)
    lengths = (1, 15, 16, 17, 31, 50, 33, 100)
    prompts = [ids(rng, n) for n in lengths] + [shared + ids(rng, 3), shared + ids(rng, 9), shared[:32]]
    return [
        Add(f"r{i}", prompt, 14, i, n=1 + i % 3, temperature=float(i % 2), top_p=0.95)
        for i, prompt in enumerate(prompts)
    ]


def tolerance(lab: Lab, served: Served) -> float:
    """What an fp32 row may err by, from transformers fp32 on the same rows."""
    _, right = served.pairs(lab, torch.float64)
    _, theirs = served.pairs(lab, torch.float32)
    worst = ((theirs - right).abs().amax(-1) / right.abs().amax(-1)).max()
    return max(FLOOR, TIMES_FP32 * float(worst))


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("name", zoo.CASES)
def test_fp32_rows_under_prefix_hits_chunks_preemption_and_forks(
    name: str, head_dim: int | None, lab: Labs, record_property: Record
) -> None:
    it = lab(name, "fp32", head_dim)
    served = it.serve(mixed_requests(), n_blocks=14, max_step_tokens=29, max_sequences=7)
    counters = served.engine.scheduler.counters
    assert counters.preemptions > 0
    assert counters.cached_tokens > 0
    worst, allowed = float(served.errors(it).max()), tolerance(it, served)
    record_property("fp32", f"{name} rows {len(served.rows)} worst {worst:.2e} allowed {allowed:.2e}")
    assert worst <= allowed


@pytest.mark.parametrize(("name", "head_dim"), BF16)
def test_bf16_rows_err_no_more_than_transformers_bf16(
    name: str, head_dim: int | None, lab: Labs, record_property: Record
) -> None:
    it = lab(name, "bf16", head_dim)
    served = it.serve(mixed_requests() + renamed(mixed_requests(1)), n_blocks=30, max_step_tokens=90, max_sequences=9)
    ours = served.errors(it)
    _, right = served.pairs(it, torch.float64)
    _, theirs_RV = served.pairs(it, torch.bfloat16)
    theirs = (theirs_RV - right).abs().amax(-1) / right.abs().amax(-1)
    ratios = [float(ours.quantile(q) / theirs.quantile(q)) for q in (0.5, 0.99)]
    record_property(
        "bf16", f"{name} rows {len(ours)} median {ours.median():.2e} ratios {ratios[0]:.3f} {ratios[1]:.3f}"
    )
    assert max(ratios) <= TIMES_BF16


def renamed(adds: list[Add]) -> list[Add]:
    return [Add("s" + a.request_id, a.prompt, a.max_tokens, a.seed, a.n, a.temperature, top_p=a.top_p) for a in adds]


@pytest.mark.parametrize("name", zoo.CASES)
def test_greedy_tokens_are_those_of_the_reference(name: str, lab: Labs, record_property: Record) -> None:
    it, rng = lab(name), np.random.default_rng(5)
    adds = [Add(f"g{i}", ids(rng, int(rng.integers(4, 60))), 64, 0, temperature=0.0) for i in range(20)]
    served = it.serve(adds, n_blocks=200, max_step_tokens=256)
    whole = 0
    for add, right in zip(
        adds, it.references((*a.prompt, *served.outputs[a.request_id, 0]) for a in adds), strict=True
    ):
        tokens = torch.tensor(served.outputs[add.request_id, 0])
        logits = right[len(add.prompt) - 1 : -1]
        best = logits.topk(2, dim=-1).values
        undecided = torch.nonzero((best[:, 0] - best[:, 1]) / best[:, 0].abs() <= MARGIN)
        same = logits.argmax(-1) == tokens
        assert same[: int(undecided[0]) if len(undecided) else 64].all()
        whole += bool(same.all())
    record_property("greedy", f"{name} {whole} of {len(adds)} prompts identical over 64 tokens")
    assert whole >= 0.95 * len(adds)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3-window", "qwen3_moe-window", "mixtral"])
def test_every_chunk_size(name: str, lab: Labs) -> None:
    it, rng = lab(name), np.random.default_rng(2)
    adds = [Add("a", ids(rng, 70), 4, 0, temperature=0.0), Add("b", ids(rng, 37), 5, 0, temperature=0.0)]
    for size in range(1, 34):
        served = it.serve(adds, max_step_tokens=size, prefix_cache=False)
        assert served.engine.scheduler.counters.steps >= 107 / size
        assert served.errors(it).max() <= tolerance(it, served), size


@pytest.mark.parametrize("block_tokens", BLOCK_TOKENS)
def test_every_block_size_and_long_chunks(block_tokens: int, lab: Labs) -> None:
    it, rng = lab("qwen2-window"), np.random.default_rng(3)
    adds = [Add(f"r{n}", ids(rng, n), 3, 0, temperature=0.0) for n in (100, 130, 64, 200)]
    served = it.serve(adds, n_blocks=max(40, 640 // block_tokens), block_tokens=block_tokens, max_step_tokens=150)
    assert served.errors(it).max() <= tolerance(it, served)
