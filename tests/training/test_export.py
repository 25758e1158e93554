"""The exporter: what is read back is what was trained, and transformers agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tenon.base.errors import ConfigError
from tenon.models import ops
from tenon.models.checkpoint import load_decoder
from tenon.models.decoder import Decoder
from tenon.models.spec import ModelSpec
from tenon.training import loop, tokenizer
from tenon.training.chats import Exchange, encode
from tenon.training.export import CHAT_TEMPLATE, export

pytestmark = pytest.mark.torch
SPEC = ModelSpec(
    "qwen3", vocab_size=300, hidden_size=32, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=16,
    intermediate_size=48, max_position=128, qk_norm=True, tie_embeddings=True,
)  # fmt: skip


@pytest.fixture
def vocabulary() -> Tokenizer:
    return tokenizer.train(["def f(self):\n    return self.x + 10\n"] * 4, 300)


@pytest.fixture
def model() -> Decoder:
    made = Decoder(SPEC)
    loop.initialise(made, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return made.bfloat16().float()


def test_round_trip_keeps_every_bit(model: Decoder, vocabulary: Tokenizer, tmp_path: Path) -> None:
    n_bytes = export(model, vocabulary, tmp_path)
    assert n_bytes >= 2 * SPEC.n_parameters()
    again = load_decoder(tmp_path, dtype=torch.float32)
    tok, pos = torch.arange(20), torch.arange(20)
    assert torch.equal(model(tok, pos, ops.attend), again(tok, pos, ops.attend))


def test_transformers_reads_the_same_model(model: Decoder, vocabulary: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export(model, vocabulary, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tok = torch.arange(40)
    with torch.no_grad():
        difference = model(tok, torch.arange(40)) - theirs(tok[None]).logits[0]
    assert difference.abs().max() < 1e-4


def test_training_chats_are_the_template_s_own_form(model: Decoder, vocabulary: Tokenizer, tmp_path: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "def f"}]
    rendered = jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=False)
    encoded = encode(vocabulary, Exchange("Hi", "def f"))
    assert vocabulary.decode(encoded.tokens.tolist(), skip_special_tokens=False) == rendered
    counted = vocabulary.decode(encoded.tokens[encoded.counted].tolist(), skip_special_tokens=False)
    assert counted == "def f<|im_end|>"


def test_configs_name_the_special_tokens(model: Decoder, vocabulary: Tokenizer, tmp_path: Path) -> None:
    export(model, vocabulary, tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [vocabulary.token_to_id("<|im_end|>"), vocabulary.token_to_id("<|endoftext|>")]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE


def test_a_tokenizer_without_special_tokens_is_refused(model: Decoder, tmp_path: Path) -> None:
    from tokenizers import models

    with pytest.raises(ConfigError, match="endoftext"):
        export(model, Tokenizer(models.BPE()), tmp_path)
