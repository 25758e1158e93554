"""A prefill with holes leaves the K, V and logits of a full one: bit for bit in invariant mode, closely in fast mode.

The acceptance list of AsymCache (arXiv 2606.02964): random holes, chunkings, company and block sizes, for every kind of
attention; and what must fail does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from tenon.engine.config import EngineConfig
from tenon.engine.executors.attention import NativeAttention
from tenon.engine.executors.torch import TorchExecutor
from tenon.engine.step import Step
from tenon.models.checkpoint import load_decoder
from tenon.models.decoder import Decoder
from tests.engine.build import DTYPES, Lab, Labs, Run, sequence, smallest_block
from tests.engine.segments import FORMS, Bench, Computed, Work, differences, draw, prefill, row_errors, serve
from tests.engine.segments import transformers_computes as theirs_of
from tests.engine.test_holes import serve as serve_adds
from tests.engine.test_holes import turns
from tests.engine.test_logits import FLOOR, TIMES_BF16, TIMES_FP32

pytestmark = pytest.mark.torch

MODELS = ("llama-mha", "llama-tied-llama3", "llama-mqa", "qwen3-window", "mixtral-window", "qwen3_moe")
LABS = [(name, dtype) for name in MODELS for dtype in ("fp32", "bf16")]
SIZES = (1, 2, 4, 8, 16, 64)


def cases() -> list[Any]:
    """Every model, type, block size and form of holes; of each model and type one form at each size but one always."""
    made = []
    for m, (name, dtype) in enumerate(LABS):
        for s, size in enumerate(SIZES):
            for f, form in enumerate(FORMS):
                always = (m + s) % len(FORMS) == f and (m + 2 * s) % len(SIZES) > 0
                marks = () if always else pytest.mark.slow
                made.append(
                    pytest.param(name, dtype, size, form, (m, s, f), id=f"{name}-{dtype}-{size}-{form}", marks=marks)
                )
    return made


@pytest.mark.parametrize(("name", "dtype", "size", "form", "seed"), cases())
def test_holes_leave_the_bits_of_a_full_prefill(
    name: str, dtype: str, size: int, form: str, seed: tuple[int, ...], lab: Labs
) -> None:
    it = lab(name, dtype, numerics="invariant")
    size = max(size, smallest_block(it.dtype))
    works = draw(form, size, seed)
    for found, each in zip(serve(it, works, size), works, strict=True):
        assert len(found.logits) == (~each.resident).sum()
        assert not differences(found, prefill(it.executor, it.groups, each.tokens))


# -- what must fail ----------------------------------------------------------------------------------------------


def alternating(seed: int, begins: bool) -> Work:
    """Six blocks of 16 and a bit, every second one a hole; the first hole takes two steps."""
    n = 100
    resident = ((np.arange(n) // 16 % 2 == 1) != begins) & (np.arange(n) < 96)
    return Work(sequence(seed, n), resident, [n - 4], [8, 8, 16, 16, 4])


Spoil = Callable[[Bench, list[list[Run]]], list[list[Run]]]


def found_wrong(executor: TorchExecutor, it: Lab, works: list[Work], spoil: Spoil) -> tuple[list[str], Computed]:
    """Differences of a case's first sequence after its steps were spoilt, and what came of it."""
    bench = Bench(executor, it.groups, works, 16)
    found = bench.run(spoil(bench, bench.plan()))[0]
    return differences(found, prefill(executor, it.groups, works[0].tokens)), found


def nothing(_: Bench, steps: list[list[Run]]) -> list[list[Run]]:
    return steps


def backwards(_: Bench, steps: list[list[Run]]) -> list[list[Run]]:
    """Later holes first, and so the later half of one."""
    return steps[::-1]


def first_left_out(_: Bench, steps: list[list[Run]]) -> list[list[Run]]:
    return steps[2:]


def of_another(bench: Bench, steps: list[list[Run]]) -> list[list[Run]]:
    """A resident block is the other sequence's of the same place."""
    for ours, theirs in zip(*bench.tables, strict=True):
        ours[2] = theirs[2]
    return steps


@pytest.mark.parametrize("spoil", [backwards, first_left_out, of_another])
@pytest.mark.parametrize(("name", "dtype"), LABS)
def test_what_is_spoilt_is_found(name: str, dtype: str, spoil: Spoil, lab: Labs) -> None:
    it = lab(name, dtype, numerics="invariant")
    works = [alternating(1, spoil is of_another), alternating(2, True)]
    assert not found_wrong(it.executor, it, works, nothing)[0]
    assert found_wrong(it.executor, it, works, spoil)[0]


@pytest.mark.parametrize(("name", "dtype"), [case for case in LABS if "mixtral" not in case[0]])
@pytest.mark.parametrize("spoil", [backwards, first_left_out])
def test_what_was_never_written_surfaces_in_the_logits(name: str, dtype: str, spoil: Spoil, lab: Labs) -> None:
    it = lab(name, dtype, numerics="invariant")  # the one left out has nothing but windows, which see no further back
    _, found = found_wrong(it.executor, it, [alternating(1, False)], spoil)
    assert {p for p, row in found.logits.items() if row.isnan().any()} == {p for p in found.logits if p >= 8}


class TopLeft(NativeAttention):
    """Masks each span as if its first key were the context's: row i of a span sees i + 1 positions."""

    def begin(self, step: Step) -> None:
        local = np.arange(step.n_rows) - np.repeat(step.q_start[:-1], np.diff(step.q_start))
        super().begin(replace(step, pos=local.astype(np.int32)))


class Misaligned(TorchExecutor):
    def _install(self, model: Decoder, on_phase: Callable[..., None]) -> None:
        assert self._native is not None
        self._attention = TopLeft(self.spec, self._dtype, self._native)
        super()._install(model, on_phase)


def test_a_mask_aligned_top_left_is_found(lab: Labs) -> None:
    it = lab("llama-mha", numerics="invariant")
    config = EngineConfig(numerics="invariant")
    executor = Misaligned(load_decoder(it.folder, it.dtype), config, on_phase=lambda *_: None)
    whole = Work(sequence(1, 100), np.zeros(100, bool), [], [100])
    assert not differences(prefill(executor, it.groups, whole.tokens), prefill(it.executor, it.groups, whole.tokens))
    assert not found_wrong(executor, it, [whole], nothing)[0]
    assert found_wrong(executor, it, [replace(whole, rows=[50, 50])], nothing)[0]
    assert found_wrong(executor, it, [alternating(1, False)], nothing)[0]


# -- fast mode ---------------------------------------------------------------------------------------------------

FAST = [
    pytest.param(name, dtype, head_dim, id=f"{name}-{dtype}-{'kernel' if head_dim else 'torch'}", marks=marks)
    for name, dtype in LABS
    for head_dim in (32, None)
    for always in [(name, dtype, head_dim) in (("llama-tied-llama3", "bf16", None), ("qwen3-window", "fp32", None))]
    for marks in [() if always else pytest.mark.slow]
]
GUARD = {"fp32": 1e-4, "bf16": 0.02}
"""Of the largest logit: what the best may lead by and yet be another, computed otherwise."""


def all_errors(it: Lab, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each sequence of some cases: errors of logits and KV, and those of transformers in ``dtype``."""
    made = []
    for f, form in enumerate(FORMS[::2]):
        size = (smallest_block(dtype), 4, 16)[f % 3]
        works = draw(form, size, (f,))
        for found, each in zip(serve(it, works, size), works, strict=True):
            right, theirs = (theirs_of(it, each.tokens, d) for d in (torch.float64, dtype))
            theirs.logits = {p: theirs.logits[p] for p in found.logits}
            made.append((*row_errors(found, right), *row_errors(theirs, right)))
    return made


@pytest.mark.parametrize(("name", "dtype", "head_dim"), FAST)
def test_fast_holes_err_no_more_than_transformers(name: str, dtype: str, head_dim: int | None, lab: Labs) -> None:
    it = lab(name, dtype, head_dim)
    logits, kv, their_logits, their_kv = map(torch.cat, zip(*all_errors(it, DTYPES[dtype]), strict=True))
    for ours, theirs in ((logits, their_logits), (kv, their_kv)):
        if dtype == "fp32":
            assert ours.max() <= max(FLOOR, TIMES_FP32 * float(theirs.max()))
        else:
            assert all(ours.quantile(q) <= TIMES_BF16 * theirs.quantile(q) for q in (0.5, 0.99))


@pytest.mark.parametrize("head_dim", [32, None])
def test_what_others_left_in_a_block_does_not_spread(head_dim: int | None, lab: Labs) -> None:
    """Spans of different lengths are gathered together, and beyond its end the shorter one's table says nothing."""
    it = lab("qwen3-window", "fp32", head_dim)
    works = [Work(sequence(n, n), np.arange(n) < n - 1, [n - 1], [1]) for n in (20, 90)]
    for found in serve(it, works, 16):
        assert all(torch.isfinite(row).all() for row in found.logits.values())


@pytest.mark.parametrize(("name", "dtype", "head_dim"), FAST)
def test_fast_greedy_tokens_are_those_without_a_cache(name: str, dtype: str, head_dim: int | None, lab: Labs) -> None:
    it, size = lab(name, dtype, head_dim), 4
    adds = [msgspec.structs.replace(add, temperature=0.0) for add in turns(1)]
    made = it.engine(n_blocks=60, evict="random", block_tokens=size, max_step_tokens=37)
    found = serve_adds(made, adds)
    plain = it.engine(n_blocks=200, prefix_cache=False, block_tokens=size)
    right, decided, guarded = serve_adds(plain, adds), 0, 0
    for seq, (ours, theirs) in enumerate(zip(found.values(), right.values(), strict=True)):
        for i, (token, wanted) in enumerate(zip(ours, theirs, strict=True)):
            row = it.executor.rows[seq, i].double()
            best, second = row.topk(2).values
            close = bool(best - second <= GUARD[dtype] * row.abs().max())
            guarded, decided = guarded + close, decided + (not close)
            assert close or token == wanted
            if token != wanted:  # from here on the contexts differ
                break
    assert made.scheduler.counters.holes > 0
    assert guarded <= 0.3 * decided
