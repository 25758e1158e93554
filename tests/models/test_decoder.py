"""The decoder against transformers: logits, gradients, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tenon.models import ops
from tenon.models.checkpoint import layout, load_decoder
from tenon.models.decoder import Decoder
from tests.models import zoo

pytestmark = pytest.mark.torch
Saved = Callable[[str], Path]


def logits(decoder: Decoder, tokens_NT: Tensor) -> Tensor:
    """(N x T, V) in fp64, each prompt alone."""
    pos = torch.arange(tokens_NT.shape[1])
    with torch.no_grad():
        return torch.cat([decoder(tokens, pos) for tokens in tokens_NT]).double()


def reference_logits(folder: Path, dtype: torch.dtype, tokens_NT: Tensor) -> Tensor:
    with torch.no_grad():
        return zoo.load_reference(folder, dtype)(tokens_NT).logits.flatten(0, 1).double()


def errors(found: Tensor, right: Tensor) -> Tensor:
    """Largest difference of each row over its largest logit."""
    return (found - right).abs().amax(-1) / right.abs().amax(-1)


@pytest.mark.parametrize("name", zoo.CASES)
def test_fp32_logits_are_those_of_transformers(name: str, saved: Saved) -> None:
    folder, tokens = saved(name), zoo.prompts(3, 48)
    right = reference_logits(folder, torch.float64, tokens)
    theirs = errors(reference_logits(folder, torch.float32, tokens), right).max()
    ours = errors(logits(load_decoder(folder, torch.float32), tokens), right).max()
    assert ours <= max(1e-5, 3 * theirs)


@pytest.mark.parametrize("name", zoo.CASES)
def test_bf16_logits_are_as_close_as_those_of_transformers(name: str, saved: Saved) -> None:
    folder, tokens = saved(name), zoo.prompts(8, 64)
    right = reference_logits(folder, torch.float64, tokens)
    theirs = errors(reference_logits(folder, torch.bfloat16, tokens), right)
    ours = errors(logits(load_decoder(folder, torch.bfloat16), tokens), right)
    assert ours.median() <= 1.25 * theirs.median()
    assert ours.quantile(0.99) <= 1.25 * theirs.quantile(0.99)


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window", "qwen3-window", "qwen3_moe-window"])
def test_an_ignored_window_shows(name: str, saved: Saved) -> None:
    folder, tokens = saved(name), zoo.prompts(1, 48)
    decoder = load_decoder(folder, torch.float32)
    right = logits(decoder, tokens)
    for layer in decoder.layers:
        layer.window = 0
    assert errors(logits(decoder, tokens), right).max() > 1e-2


@pytest.mark.parametrize("name", zoo.CASES)
def test_attention_is_far_from_uniform(name: str, saved: Saved) -> None:
    largest: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int) -> Tensor:
        scores = torch.einsum("thd,shd->ths", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
        later = torch.ones(len(q), len(q)).triu(1).bool()[:, None]
        largest.append(scores.masked_fill(later, -torch.inf).softmax(-1)[16:].amax(-1))
        return ops.attend(q, k, v, layer, scale, window)

    with torch.no_grad():
        load_decoder(saved(name), torch.float32)(zoo.prompts(1, 48)[0], torch.arange(48), attend)
    assert torch.cat(largest).median() > 4 / 32


def test_positions_off_by_one_from_some_row_on_show(saved: Saved) -> None:
    decoder, tokens = load_decoder(saved("qwen3"), torch.float32), zoo.prompts(1, 48)[0]
    pos = torch.arange(48)
    with torch.no_grad():
        right, wrong = decoder(tokens, pos), decoder(tokens, pos + (pos >= 20))
    assert errors(wrong, right).max() > 1e-3


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe-window", "mixtral", "mixtral-window"])
def test_router_margins_are_no_ties(name: str, saved: Saved) -> None:
    model, tokens = zoo.load_reference(saved(name), torch.float64), zoo.prompts(3, 48)
    gates = [module for path, module in model.named_modules() if path.endswith("mlp.gate")]
    seen: list[Tensor] = []
    hooks = [gate.register_forward_hook(lambda _, __, out: seen.append(out[0])) for gate in gates]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    best = torch.cat(seen).topk(3, dim=-1).values
    assert ((best[:, 1] - best[:, 2]) / best[:, 0].abs()).quantile(0.01) > 0.02


@pytest.mark.parametrize("name", zoo.CASES)
def test_gradients_are_those_of_transformers(name: str, saved: Saved) -> None:
    folder, tokens = saved(name), zoo.prompts(1, 24)[0]
    model, decoder = zoo.load_reference(folder, torch.float64), load_decoder(folder, torch.float64)
    weight = torch.randn(24, zoo.VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (model(tokens[None]).logits[0] * weight).sum().backward()
    (decoder(tokens, torch.arange(24)) * weight).sum().backward()
    theirs, ours = dict(model.named_parameters()), dict(decoder.named_parameters())
    compared = set()
    for name_, part in layout(decoder.spec).items():
        if name_ in theirs:
            found, right = part.of(ours[part.parameter].grad), theirs[name_].grad
            assert (found - right).abs().max() <= 2e-5 * right.abs().max(), name_
            compared.add(part.parameter)
    assert compared == set(ours)


@pytest.mark.parametrize("name", zoo.ONE_EACH)
def test_export_has_a_dynamic_length_and_keeps_the_operators(name: str, saved: Saved) -> None:
    decoder = load_decoder(saved(name), torch.float32).requires_grad_(False)
    tokens = zoo.prompts(1, 37)[0]
    rows = torch.export.Dim("rows", min=2, max=256)
    example = (tokens[:16], torch.arange(16))
    program = torch.export.export(decoder, example, dynamic_shapes=({0: rows}, {0: rows}))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "tenon.attend.default" in called
    assert ("tenon.experts.default" in called) == (decoder.spec.moe is not None)
    for n in (5, 37):
        pos = torch.arange(n)
        torch.testing.assert_close(program.module()(tokens[:n], pos), decoder(tokens[:n], pos))


def test_no_row_reads_a_later_one(saved: Saved) -> None:
    decoder, tokens = load_decoder(saved("mixtral-window"), torch.float32), zoo.prompts(1, 20)[0]
    with torch.no_grad():
        long, short = decoder(tokens, torch.arange(20)), decoder(tokens[:11], torch.arange(11))
    torch.testing.assert_close(long[:11], short)


def test_frequencies_stay_fp32_in_any_type(saved: Saved) -> None:
    decoder = load_decoder(saved("llama-yarn"), torch.bfloat16)
    assert decoder.inv_freq.dtype == torch.float32
    assert decoder.to(torch.float16).inv_freq.dtype == torch.float32
