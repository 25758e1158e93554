"""The sampling rule against a plain fp64 reference, and its distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tenon.base import philox
from tenon.engine.sampling import edited, log_softmax, sample_rows, survivors
from tenon.engine.step import EDIT_ADD, EDIT_BAN, EDIT_REPEAT, SAMPLE, SCORE
from tests.engine.build import SAMPLED_VOCAB as V
from tests.engine.build import logit_rows, sampling, step_of


def plain_survivors(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Which tokens the filters leave, told as simply as possible."""
    x = {i: float(v) / temperature for i, v in enumerate(logits)}
    if top_k:
        bar = sorted(x.values(), reverse=True)[min(top_k, len(x)) - 1]
        x = {i: v for i, v in x.items() if v >= bar}
    if top_p < 1:
        total = math.fsum(math.exp(v) for v in x.values())
        kept, mass = {}, 0.0
        for i in sorted(x, key=lambda i: (-x[i], i)):
            if mass >= top_p:
                break
            kept[i] = x[i]
            mass += math.exp(x[i]) / total
        x = kept
    if min_p:
        best = max(x.values())
        x = {i: v for i, v in x.items() if math.exp(v - best) >= min_p * (1 - 1e-12)}
    return set(x)


FILTERS = [
    {"temperature": t, "top_k": k, "top_p": p, "min_p": m}
    for t in (0.3, 1.0, 2.5)
    for k, p, m in (
        (0, 1.0, 0.0),
        (5, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 1.0, 0.1),
        (40, 0.8, 0.05),
        (1, 0.5, 0.5),
        (500, 0.99, 0.0),
    )
]


@pytest.mark.parametrize("params", FILTERS)
def test_filters_and_choice_follow_the_plain_rule(params: dict[str, Any]) -> None:
    logits = logit_rows(30)
    result = sample_rows(step_of(30, seed=9, **params), logits)
    for r in range(30):
        t = float(np.float32(params["temperature"]))
        p, m = float(np.float32(params["top_p"])), float(np.float32(params["min_p"]))
        left = sorted(plain_survivors(logits[r], t, params["top_k"], p, m))
        noise = philox.noise(9, 0, r, np.array(left))
        scores = logits[r][left].astype(np.float64) / t + noise
        assert result.ids[r] == left[int(np.argmax(scores))]
        if params["top_k"] or p < 1 or m:
            assert survivors(logits[r], sampling(**params), 0)[0].tolist() == left


def test_ties_at_the_top_k_border_all_stay() -> None:
    logits = np.array([3, 1, 2, 2, 2, 0], np.float32)
    assert survivors(logits, sampling(top_k=2), 0)[0].tolist() == [0, 2, 3, 4]


def test_greedy_takes_the_smaller_of_two_equal_ids() -> None:
    logits = np.zeros((1, V), np.float32)
    logits[0, [17, 150]] = 4
    assert sample_rows(step_of(1, temperature=0.0), logits).ids.tolist() == [17]


@pytest.mark.parametrize("filters", [{}, {"top_k": 6}, {"top_p": 0.9}, {"min_p": 0.1, "temperature": 0.7}])
def test_samples_follow_the_softmax_of_what_is_left(filters: dict[str, Any]) -> None:
    n, logits = 3000, logit_rows(1, 1.5, seed=4)[0, :24]
    result = sample_rows(step_of(n, seed=123, **filters), np.broadcast_to(logits, (n, 24)))
    params = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    left = sorted(plain_survivors(logits, **params))
    x = logits[left].astype(np.float64) / params["temperature"]
    expected = n * np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    counts = np.bincount(result.ids, minlength=24)
    assert counts.sum() == counts[left].sum()
    chi2 = float(((counts[left] - expected) ** 2 / expected).sum())
    degrees = len(left) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees) + 8  # beyond four standard deviations


def test_a_row_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits = logit_rows(8)
    together = sample_rows(step_of(8, seed=3, top_p=0.95), logits)
    for r in range(8):
        alone = step_of(1, seed=3, top_p=0.95)
        alone.out_position[0] = r
        assert sample_rows(alone, logits[r : r + 1]).ids[0] == together.ids[r]


def test_seed_sample_and_position_each_change_the_draw() -> None:
    logits = np.zeros((64, V), np.float32)

    def draw(offset: int = 0, **params: int) -> list[int]:
        made = step_of(64, **params)
        made.out_position += offset
        return sample_rows(made, logits).ids.tolist()

    draws = [draw(), draw(seed=1), draw(sample=1), draw(offset=1000)]
    assert len({tuple(d) for d in draws}) == 4
    assert draw() == draws[0]


def test_tokens_out_of_the_noise_s_reach_are_never_chosen_nor_needed() -> None:
    logits = np.full((2000, V), -30.0, np.float32)
    logits[:, 5] = 0.0
    assert (sample_rows(step_of(2000), logits).ids == 5).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_finite_best_fails_alone(bad: float, temperature: float) -> None:
    logits = logit_rows(3)
    logits[1, 7] = bad
    result = sample_rows(step_of(3, temperature=temperature), logits)
    assert list(result.errors) == [1]
    assert result.ids[1] == -1
    assert (result.ids[[0, 2]] >= 0).all()


def test_masks_and_edits_apply_along_the_row() -> None:
    made = step_of(2, temperature=0.0)
    logits = np.tile(np.arange(V, dtype=np.float32) - 100, (2, 1))
    mask = np.zeros((1, -(-V // 32)), np.uint32)
    mask[0, 3] = 1 << 9 | 1 << 2
    made.bitmask, made.bitmask_index = mask, np.array([0, -1], np.int32)
    made.edit_start = np.array([0, 1, 4], np.int32)
    made.edit_token = np.array([96 + 9, 5, V - 1, V - 2], np.int32)
    made.edit_kind = np.array([EDIT_BAN, EDIT_ADD, EDIT_BAN, EDIT_REPEAT], np.uint8)
    made.edit_value = np.array([0, 500, 0, 2], np.float32)
    assert np.flatnonzero(np.isfinite(edited(logits[0], made, 0))).tolist() == [96 + 2]
    second = edited(logits[1], made, 1)
    assert second[5] == 405
    assert second[V - 2] == (V - 102) / 2
    assert logits[1, V - 1] == V - 101
    assert sample_rows(made, logits).ids.tolist() == [98, 5]


def test_logprobs_are_of_the_unprocessed_logits_and_the_best_come_in_order() -> None:
    logits = logit_rows(4)
    result = sample_rows(step_of(4, temperature=0.2, top_k=3, n_logprobs=5), logits)
    for r in range(4):
        x = logits[r].astype(np.float64)
        logp = x - math.log(math.fsum(np.exp(x)))
        assert result.logprobs[r] == pytest.approx(logp[result.ids[r]], rel=1e-6)
        assert result.top_ids[r].tolist() == np.argsort(-x, kind="stable")[:5].tolist()
        assert result.top_logprobs[r] == pytest.approx(logp[result.top_ids[r]], rel=1e-6)
    assert np.exp(log_softmax(logits[0])).sum() == pytest.approx(1)


def test_scores_are_the_log_probabilities_of_the_given_tokens() -> None:
    made, logits = step_of(2, temperature=0.0), logit_rows(2)
    made.want = np.array([SCORE, SAMPLE], np.uint8)
    made.score_start, made.score_token = np.array([0, 3, 3], np.int32), np.array([4, 4, 9], np.int32)
    result = sample_rows(made, logits)
    assert result.scores == pytest.approx(log_softmax(logits[0])[[4, 4, 9]], rel=1e-6)
    order = np.argsort(-logits[0], kind="stable").tolist()
    assert result.ranks.tolist() == [order.index(token) + 1 for token in (4, 4, 9)]
    assert result.ids.tolist() == [-1, int(np.argmax(logits[1]))]
