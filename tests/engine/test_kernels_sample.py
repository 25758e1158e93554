"""Sampling in C against numpy's, and what it makes of guesses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tenon.engine.executors import native
from tenon.engine.sampling import REFUSED, UNKNOWN, WRONG, is_plain, sample_rows
from tenon.engine.step import Step
from tests.engine.build import step_of

FP32, BF16 = torch.float32, torch.bfloat16
WIDE = 40_000
"""A vocabulary that threads divide among themselves."""


def logits_of(n: int, vocab: int, spread: float, dtype: torch.dtype = FP32) -> torch.Tensor:
    made = np.random.default_rng(vocab).standard_normal((n, vocab)) * spread
    return torch.from_numpy(made.astype(np.float32)).to(dtype)


def found(step: Step, logits_RV: torch.Tensor) -> list[int]:
    n = len(logits_RV)
    return native.load().sample(logits_RV, native.draws(step, n), is_plain(step, n)).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 0.3, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("vocab", [1, 5, 64, 200, 1003, 4096, WIDE])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_tokens_are_numpy_s(temperature: float, vocab: int, dtype: torch.dtype) -> None:
    n = 3 if vocab == WIDE else 40
    logits = logits_of(n, vocab, 3.0, dtype)
    step = step_of(n, temperature=temperature, seed=5)
    assert found(step, logits) == sample_rows(step, logits.float().numpy()).ids.tolist()


@pytest.mark.parametrize("vocab", [64, 1003, WIDE])
def test_a_single_output_is_as_among_others(vocab: int) -> None:
    """Alone, threads share its vocabulary."""
    logits = logits_of(4, vocab, 2.0)
    together = found(step_of(4, seed=9), logits)
    for r in range(4):
        alone = step_of(1, seed=9)
        alone.out_position[:] = r
        assert found(alone, logits[r : r + 1]) == together[r : r + 1]


def test_tokens_without_probability_are_never_chosen() -> None:
    logits = torch.full((2000, 300), -torch.inf)
    logits[:, [7, 299]] = 0.0
    assert set(found(step_of(2000), logits)) == {7, 299}


def test_choices_at_20_000_positions_follow_the_softmax() -> None:
    n = 20_000
    logits = logits_of(1, 24, 1.5)
    counts = np.bincount(found(step_of(n, seed=123), logits.expand(n, 24).contiguous()), minlength=24)
    expected = n * torch.softmax(logits[0].double(), 0).numpy()
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 23 + 4 * math.sqrt(2 * 23)


@pytest.mark.parametrize("vocab", [1003, WIDE])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_what_is_not_finite_is_refused(vocab: int, temperature: float, dtype: torch.dtype) -> None:
    logits = logits_of(5, vocab, 1.0, dtype)
    logits[0, 7] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3, vocab - 1] = torch.nan
    tokens = found(step_of(5, temperature=temperature), logits)
    assert tokens[:4] == [REFUSED] * 4
    assert tokens[4] >= 0


def test_the_first_of_equals_is_taken() -> None:
    logits = torch.zeros(2, 1003)
    logits[0, [40, 900]] = 9
    logits[1, 1002] = 9
    assert found(step_of(2, temperature=0.0), logits) == [40, 1002]


def test_outputs_that_are_not_plain_are_left() -> None:
    step = step_of(2, seed=1, top_k=5)
    assert found(step, logits_of(2, 64, 1.0)) == [UNKNOWN] * 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [64, 4096, WIDE])
def test_below_a_wrong_guess_nothing_is_sampled(temperature: float, vocab: int) -> None:
    """Three trees; of the second, outputs guess ones that stand further back than the one before."""
    guess_of = [-1, 0, 1, 0, -1, 4, 4, 5, 6, -1]
    n = len(guess_of)
    logits = logits_of(n, vocab, 1.0)
    step = step_of(n, temperature=temperature, seed=2)
    draws = native.draws(step, n)
    every = found(step, logits)
    draws["guess_of"] = guess_of
    right = {1, 2, 6, 8}  # 3 is wrong, and 5 is, so that 7 is below a wrong one
    draws["guess"] = [every[g] + (r not in right) for r, g in enumerate(guess_of)]
    draws["guess"][7] = every[5]
    tokens = native.load().sample(logits, draws, np.ones(n, np.bool_)).tolist()
    assert tokens == [WRONG if r in {3, 5, 7} else every[r] for r in range(n)]
