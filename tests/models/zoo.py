"""Tiny random checkpoints of every family, saved by transformers, for whoever needs a model that is not trivial.

Weights are scaled so that mistakes show: attention is far from uniform (scores of standard deviation about 3), norms
and biases are not neutral, and a router's choice is no tie: each token's embedding carries the codes of its experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB, WIDTH, LAYERS = 199, 32, 3
SHARPNESS = 1.75
"""Standard deviation of queries and keys: scores have its square."""
CODE = 7.0
"""How far the codes of a token's experts stand out of its embedding, in standard deviations."""

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Case:
    """One checkpoint: a ``model_type`` and what its config says besides ``BASE``."""

    family: str
    changes: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "llama": Case("llama"),
    "llama-tied-llama3": Case("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "llama-yarn": Case("llama", {"rope_parameters": YARN}),
    "llama-linear-biases": Case("llama", {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True}),
    "llama-mha": Case("llama", {"num_key_value_heads": 4}),
    "llama-mqa": Case("llama", {"num_key_value_heads": 1}),
    "mistral": Case("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-window": Case("mistral", {"sliding_window": 9}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": Case("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": Case("qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen3-window": Case(
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3_moe": Case("qwen3_moe", {**MOE, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe-window": Case(
        "qwen3_moe", {**MOE, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 8}
    ),
    "mixtral": Case("mixtral", {"num_local_experts": 4}),
    "mixtral-window": Case("mixtral", {"num_local_experts": 6, "sliding_window": 10}),
}
"""Every family, every branch of the decoder."""

ONE_EACH = ("llama-tied-llama3", "mistral-window", "qwen2", "qwen3", "qwen3_moe", "mixtral")
"""One of each family, for tests that need no more."""


def config(name: str) -> transformers.PretrainedConfig:
    case = CASES[name]
    return transformers.AutoConfig.for_model(case.family, **BASE | case.changes)


def reference(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """The model of ``name`` in transformers, fp32, with scaled weights."""
    settings = config(name)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="sdpa")
    scale(model, seed)
    return model.eval()


def load_reference(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A saved checkpoint in transformers, in ``dtype``."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.set_experts_implementation("eager")  # the grouped one knows no fp64
    return model.eval()


def checkpoint(name: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save the checkpoint of ``name`` to ``folder``; ``options`` go to ``save_pretrained``. Returns ``folder``."""
    reference(name, seed).to(dtype).save_pretrained(folder, **options)
    return folder


def prompts(n: int, length: int, seed: int = 1) -> Tensor:
    """Token ids (n, length) without the special ones."""
    return torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def scale(model: transformers.PreTrainedModel, seed: int) -> None:
    """Draw every weight anew, each kind with a spread of its own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator)

    has_qk_norm = any("q_norm" in name for name, _ in model.named_parameters())
    codes, _ = torch.linalg.qr(normal(torch.Size((WIDTH, WIDTH))))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = normal(weight.shape)
            kind = name.split(".")[-2]
            if "norm" in kind:
                weight.copy_((SHARPNESS if kind in ("q_norm", "k_norm") else 1.0) * (1 + 0.2 * drawn))
            elif name.endswith(".bias"):
                weight.copy_(0.3 * drawn)
            elif kind == "embed_tokens":
                weight.copy_(drawn + _codes(model, codes, generator))
            elif kind == "gate":
                weight.copy_(codes[: weight.shape[0]] * 2.0)
            else:
                fan_in = weight.shape[-1]
                sharp = kind in ("q_proj", "k_proj") and not has_qk_norm
                gain = SHARPNESS if sharp else 0.5 if kind in ("o_proj", "down_proj") else 1.0
                weight.copy_(gain * drawn / fan_in**0.5)


def _codes(model: transformers.PreTrainedModel, codes: Tensor, generator: torch.Generator) -> Tensor:
    """For a mixture: the codes of two experts for each token (V, M), one louder than the other; else zero."""
    settings = model.config
    n_experts = getattr(settings, "num_experts", None) or getattr(settings, "num_local_experts", None)
    if n_experts is None:
        return torch.zeros(VOCAB, WIDTH)
    pairs = torch.stack([torch.randperm(n_experts, generator=generator)[:2] for _ in range(VOCAB)])
    loudness = torch.tensor([1.0, 0.8])
    return CODE * (codes[pairs] * loudness[None, :, None]).sum(1)
