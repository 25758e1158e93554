"""A trained Qwen3 decoder as an ordinary Hugging Face folder: bf16 safetensors, config, tokenizer, template."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from tenon.base import files
from tenon.base.errors import ConfigError
from tenon.models.checkpoint import WEIGHTS, save_weights
from tenon.models.decoder import Decoder
from tenon.models.spec import ModelSpec
from tenon.training.tokenizer import END_OF_TEXT, IM_END, IM_START, PAD, SPECIAL, special_id

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def config(spec: ModelSpec, token_ids: dict[str, int]) -> dict[str, object]:
    """``config.json`` of a Qwen3 model."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope.theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": spec.tie_embeddings,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": token_ids[END_OF_TEXT],
        "eos_token_id": token_ids[IM_END],
        "pad_token_id": token_ids[PAD],
        "torch_dtype": "bfloat16",
    }


def tokenizer_config(spec: ModelSpec, token_ids: dict[str, int]) -> dict[str, object]:
    """``tokenizer_config.json`` with the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": PAD,
        "unk_token": None,
        "additional_special_tokens": [END_OF_TEXT, IM_START],
        "added_tokens_decoder": {
            str(token_ids[t]): {"content": t, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
            for t in SPECIAL
        },
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_position,
    }


def export(model: Decoder, tokenizer: Tokenizer, folder: Path) -> int:
    """Write the folder; returns the bytes of its weights.

    Raises ``ConfigError`` for a decoder that is not a plain Qwen3, and for a tokenizer that lacks a special token.
    """
    spec = model.spec
    if spec.family != "qwen3" or not spec.qk_norm or spec.qkv_bias or spec.moe is not None or any(spec.windows):
        raise ConfigError(f"only plain Qwen3 decoders can be exported, this is {spec.family}.", subject="family")
    ids = {token: special_id(tokenizer, token) for token in SPECIAL}
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, spec, folder, torch.bfloat16)
    files.write_json(folder / "config.json", config(spec, ids))
    files.write_json(folder / "tokenizer_config.json", tokenizer_config(spec, ids))
    files.write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids[END_OF_TEXT],
            "eos_token_id": [ids[IM_END], ids[END_OF_TEXT]],
            "pad_token_id": ids[PAD],
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return (folder / WEIGHTS).stat().st_size
