"""``numerics="invariant"``: a row's bits depend on its own sequence alone, whatever else is in the step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from tenon.base.errors import ConfigError
from tenon.engine.config import EngineConfig
from tenon.engine.executors.torch import TorchExecutor
from tenon.engine.messages import Add
from tenon.models.checkpoint import random_decoder
from tenon.models.spec import ModelSpec
from tests.engine.build import LONG, Lab, Labs, Run, chain, fresh, ids, sequence, smallest_block, step

pytestmark = pytest.mark.torch

CASES = [
    ("llama-tied-llama3", "fp32"), ("qwen2", "bf16"), ("qwen3-window", "bf16"), ("qwen3_moe", "fp32"),
    ("qwen3_moe", "bf16"), ("mixtral-window", "fp32"), ("mixtral-window", "bf16"),
]  # fmt: skip
RNG = np.random.default_rng(11)
ASKED = Add("asked", ids(RNG, 45), 16, seed=77, temperature=0.8, top_p=0.95)
OTHERS = [
    Add(f"o{i}", ids(RNG, int(n)), 10, seed=i, n=1 + i % 2, temperature=0.8, top_k=20 * (i % 2))
    for i, n in enumerate(RNG.integers(1, 90, 15))
]
WARM = Add("warm", ASKED.prompt[:40], 1, seed=0)


def serve_asked(it: Lab, adds: list[Add], **config: Any) -> tuple[list[int], Tensor, Any]:
    served = it.serve(adds, **config)
    tokens = served.outputs["asked", 0]
    rows = torch.stack([served.rows["asked", 0, i] for i in range(len(tokens))])
    return tokens, rows, served.engine.scheduler.counters


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_request_is_the_same_alone_and_in_company(name: str, dtype: str, lab: Labs) -> None:
    it = lab(name, dtype, numerics="invariant")
    alone, rows, _ = serve_asked(it, [ASKED], prefix_cache=False)
    company = [*OTHERS[:7], ASKED, *OTHERS[7:]]
    late = [*OTHERS, ASKED]
    ways: list[tuple[list[Add], dict[str, Any]]] = [
        (company, {"n_blocks": 200, "max_step_tokens": 512}),
        (company, {"n_blocks": 200, "max_step_tokens": 37}),
        (late, {"n_blocks": 14, "max_step_tokens": 53, "prefix_cache": False}),
        (late, {"n_blocks": 14, "max_step_tokens": 53}),
        ([ASKED], {"max_step_tokens": 7}),
        *(([ASKED], {"block_tokens": size, "n_blocks": 512 // size}) for size in (smallest_block(it.dtype), 4, 8, 64)),
    ]
    preempted = 0
    for adds, config in ways:
        tokens, seen, counters = serve_asked(it, adds, **config)
        assert tokens == alone, config
        assert torch.equal(seen, rows), config
        preempted += counters.preemptions
    assert preempted > 0


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_prefix_hits_change_no_bit(name: str, dtype: str, lab: Labs) -> None:
    it = lab(name, dtype, numerics="invariant")
    alone, rows, _ = serve_asked(it, [ASKED], prefix_cache=False)
    made = it.engine()
    tokens: list[int] = []
    for add in (WARM, msgspec.structs.replace(ASKED, request_id="first"), ASKED):
        made.add(add)
        while made.has_work:
            tokens += [t for d in made.tick(0.0) if d.request_id == "asked" for t in d.ids]
    assert made.scheduler.counters.cached_tokens >= 32 + 32
    assert tokens == alone
    last = max(seq for seq, _ in it.executor.rows)
    assert torch.equal(torch.stack([it.executor.rows[last, i] for i in range(len(tokens))]), rows)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_rows_are_bit_equal_across_chunkings_mixes_and_trees(name: str, dtype: str, lab: Labs) -> None:
    it, a, b = lab(name, dtype, numerics="invariant"), sequence(1), sequence(2)
    whole = logits(it, [[(0, LONG)]], a)
    for cuts in ([0, 1, LONG], [0, 15, 31, LONG], list(range(0, LONG + 1, 7)), [0, 64, 65, 66, LONG]):
        spans = list(itertools.pairwise(cuts))
        assert torch.equal(logits(it, [[s] for s in spans], a), whole), cuts
        assert torch.equal(logits(it, [spans], a), whole), cuts
    for company in (1, 5, 16, 50):
        fresh(it)
        made = step([chain(it, 1, b, 0, company), chain(it, 0, a, 0, LONG)])
        assert torch.equal(it.executor.logits(made)[company:], whole), company


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_tree_of_one_branch_is_a_chain(name: str, dtype: str, lab: Labs) -> None:
    it, a = lab(name, dtype, numerics="invariant"), sequence(1)
    whole = logits(it, [[(0, LONG)]], a)
    fresh(it)
    it.executor.logits(step([chain(it, 0, a, 0, 40, [])]))
    branch = chain(it, 0, a, 40, LONG)
    slots = [[t[2] * 16 + 8, *range(50 * 16, 50 * 16 + LONG - 41)] for t in branch.tables]
    tree = replace(branch, parent=list(range(-1, LONG - 41)), slots=slots)
    assert torch.equal(it.executor.logits(step([tree])), whole[40:])


def logits(it: Lab, steps: list[list[tuple[int, int]]], tokens: list[int]) -> Tensor:
    """All rows of one sequence, computed in these steps of these spans."""
    fresh(it)
    rows = [it.executor.logits(step([chain(it, 0, tokens, s, e) for s, e in spans])) for spans in steps]
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_wider_than_a_tile_of_the_matrix_product(dtype: str) -> None:
    spec = ModelSpec("llama", 1003, 320, 2, 5, 5, 64, 1100, 256, dtype=dtype)
    decoder = random_decoder(spec, 3)
    executor = TorchExecutor(decoder, EngineConfig(numerics="invariant"), on_phase=lambda *_: None)
    executor.allocate(spec.kv_groups("m", 16, 4), 32)
    tokens, table = sequence(1, 50), [[4, 3, 2, 1]]
    whole = executor.logits(step([Run(0, tokens, list(range(50)), table, list(range(50)))]))
    for cut in (1, 13, 34):
        parts = [Run(0, tokens[s:e], list(range(s, e)), table, list(range(e - s))) for s, e in ((0, cut), (cut, 50))]
        assert torch.equal(torch.cat([executor.logits(step([part])) for part in parts]), whole)
        assert torch.equal(executor.logits(step(parts)), whole)


def test_head_sizes_without_a_kernel_are_refused(lab: Callable[..., Lab]) -> None:
    with pytest.raises(ConfigError, match="multiples of 32"):
        lab("qwen3", "fp32", None, "invariant")
