"""Bits per byte and acceptance on models small enough to check by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tenon.models.decoder import Decoder
from tenon.models.spec import ModelSpec
from tenon.training import evaluation, loop, tokenizer
from tenon.training.attention import batched
from tenon.training.objectives import head, row_hidden

pytestmark = pytest.mark.torch
SPEC = ModelSpec(
    "qwen3", vocab_size=300, hidden_size=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16,
    intermediate_size=48, max_position=32, qk_norm=True, tie_embeddings=True,
)  # fmt: skip


def decoder(seed: int, spread: float = 0.3) -> Decoder:
    model = Decoder(SPEC)
    loop.initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn(p.shape, generator=generator))
    return model


def test_one_window_is_plain_cross_entropy() -> None:
    model, ids = decoder(1), list(range(10, 30))
    stream = torch.tensor([0, *ids])
    with torch.inference_mode():
        logits = head(model, row_hidden(model, stream[None, :-1], batched(1, 20)))
    expected = float(F.cross_entropy(logits, stream[1:], reduction="sum"))
    assert evaluation.nats(model, ids, 0, window=32, stride=8) == pytest.approx(expected)


@pytest.mark.parametrize("stride", [1, 7, 32])
def test_every_token_is_scored_once_whatever_the_stride(stride: int) -> None:
    model = Decoder(SPEC)
    with torch.no_grad():
        model.embed.weight.zero_()  # all logits 0: each token costs ln V
    assert evaluation.nats(model, [5] * 100, 0, 32, stride) == pytest.approx(100 * math.log(300), rel=1e-5)


def test_score_counts_bytes_and_compares() -> None:
    text = "def f(x):\n    return x\n" * 20
    vocabulary = tokenizer.train([text], 300)
    score = evaluation.score(decoder(1), vocabulary, "a", [text, text], stride=16)
    assert score.n_bytes == 2 * len(text)
    assert score.n_tokens == 2 * len(vocabulary.encode(text).ids) + 1
    assert score.of_xz == pytest.approx(score.model / score.xz)
    assert evaluation.overall("all", [score, score]).model == pytest.approx(score.model)


def test_a_model_accepts_itself_and_rejects_a_stranger() -> None:
    stream = torch.randint(300, (200,), generator=torch.Generator().manual_seed(3))
    model = decoder(1)
    itself = evaluation.acceptance(model, model, stream, n_windows=3, window=24, n_draft=4, seed=1)
    assert (itself.agreement, itself.accepted_greedy) == (1.0, 4.0)
    assert itself.expected == pytest.approx(1.0, abs=1e-4)
    stranger = evaluation.acceptance(model, decoder(2), stream, n_windows=3, window=24, n_draft=4, seed=1)
    assert stranger.expected < 0.9
    assert stranger.accepted_greedy < 4
