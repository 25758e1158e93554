from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tenon.base.errors import CheckpointError, UnsupportedModel
from tenon.models.hf_config import parse_config, read_config
from tenon.models.spec import MoeSpec, RopeSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "eos_token_id": [2, 3],
}  # fmt: skip
NAMES = {"mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}


def of(family: str, **changes: Any) -> dict[str, Any]:
    return {**LLAMA, "model_type": family, "architectures": [f"{NAMES[family]}ForCausalLM"], **changes}


def test_a_llama_config() -> None:
    spec = parse_config(LLAMA)
    assert (spec.family, spec.n_layers, spec.n_heads, spec.n_kv_heads, spec.head_dim) == ("llama", 4, 4, 2, 8)
    assert (spec.dtype, spec.eos_ids, spec.bos_id, spec.windows, spec.moe) == ("bfloat16", (2, 3), None, (), None)
    assert spec.rope == RopeSpec(theta=10000.0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        ),
        ({"rope_scaling": None}, {"rope_parameters": None}),
        ({"torch_dtype": "float16"}, {"torch_dtype": None, "dtype": "float16"}),
        ({"rope_scaling": {}, "partial_rotary_factor": 1.0}, {"_name_or_path": "somewhere", "use_cache": True}),
    ],
)
def test_both_spellings_mean_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert parse_config(LLAMA | old) == parse_config(LLAMA | new)


PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": True, "vocab_size": 49152,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 128256,
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Mistral-7B-v0.3": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 32768,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("SmolLM2-135M", 134.5),
        ("Llama-3.2-1B", 1235.8),
        ("Qwen2.5-0.5B", 494.0),
        ("Qwen3-0.6B", 596.0),
        ("Mistral-7B-v0.3", 7248.0),
        ("Qwen3-30B-A3B", 30532.1),
    ],
)
def test_configs_as_published_give_the_published_sizes(name: str, millions: float) -> None:
    spec = parse_config(PUBLISHED[name])
    assert spec.n_parameters() / 1e6 == pytest.approx(millions, abs=0.1)
    assert spec.windows == ()


def test_llama3_and_yarn_take_every_field() -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    spec = parse_config(LLAMA | {"rope_scaling": llama3})
    assert spec.rope == RopeSpec(kind="llama3", factor=8.0, original_max_position=256)
    yarn = {"rope_type": "yarn", "factor": 4, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.1}
    spec = parse_config(LLAMA | {"rope_scaling": yarn | {"truncate": False}, "original_max_position_embeddings": 64})
    assert spec.rope == RopeSpec(
        kind="yarn", factor=4.0, original_max_position=64, beta_fast=16.0, beta_slow=2.0, attention_factor=1.1,
        truncate=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        (of("mistral"), (4096,) * 4),
        (of("mistral", sliding_window=None), ()),
        (of("mistral", sliding_window=7), (7,) * 4),
        (of("mixtral"), ()),
        (of("mixtral", sliding_window=7), (7,) * 4),
        (of("qwen2", sliding_window=7, max_window_layers=2), ()),
        (of("qwen2", sliding_window=7, max_window_layers=2, use_sliding_window=True), (None, None, 7, 7)),
        (of("qwen2", sliding_window=7, use_sliding_window=True), ()),
        (of("qwen2", sliding_window=None, use_sliding_window=True, max_window_layers=0), ()),
        (
            of(
                "qwen3",
                sliding_window=7,
                use_sliding_window=True,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            (7, None, 7, None),
        ),
        (of("qwen3_moe", sliding_window=7, use_sliding_window=True), (7,) * 4),
        (of("qwen3_moe", sliding_window=7, use_sliding_window=False), ()),
    ],
)
def test_windows_are_where_transformers_applies_them(raw: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert parse_config(raw).windows == windows


def test_experts() -> None:
    assert parse_config(of("mixtral", num_local_experts=6)).moe == MoeSpec(6, 2, 64, True, (0, 1, 2, 3))
    raw = of("qwen3_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0])
    assert parse_config(raw).moe == MoeSpec(6, 2, 16, False, (1, 2, 3))
    assert parse_config(raw | {"decoder_sparse_step": 2}).moe == MoeSpec(6, 2, 16, False, (1, 3))
    assert parse_config(raw | {"decoder_sparse_step": 9}).moe is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "gemma"}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logit_scale": 0.1}, "logit_scale"),
        ({"auto_map": {"AutoModelForCausalLM": "model.Evil"}}, "auto_map"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"dtype": "float8_e4m3fn"}, "dtype"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_scaling.type"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types"),
    ],
)
def test_maths_that_is_not_there_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedModel, match=field.rpartition(".")[2]) as caught:
        parse_config(LLAMA | changes)
    assert caught.value.subject == field


@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen2"])
def test_biases_that_transformers_would_ignore_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModel, match="attention_bias"):
        parse_config(of(family, attention_bias=True))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 33}, "num_attention_heads"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": 4}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor",
        ),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": [2, 128]}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_values_out_of_range_are_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(LLAMA | changes)
    assert caught.value.subject == field
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
def test_a_shape_that_is_missing_is_named(field: str) -> None:
    with pytest.raises(CheckpointError, match=f"{field} is missing"):
        parse_config({name: value for name, value in LLAMA.items() if name != field})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cut short"),
        (json.dumps(LLAMA).encode()[:50], "cut short"),
        (b"[1]", "not an object"),
        (b'{"hidden_size": NaN}', "NaN"),
        (b'{"rope_theta": 1e999}', "too large"),
        (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "not usable"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"a": ' + b"[" * 100_000, "nests too deeply"),
        (b'{"a": "\xff"}', "UTF-8"),
    ],
)
def test_a_damaged_file_gives_one_sentence(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_config(tmp_path)
    assert "config.json" in str(caught.value)


def test_a_missing_file_gives_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_config(tmp_path)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_decoder_without_its_output_layer_is_of_its_family(family: str) -> None:
    assert parse_config(of(family, architectures=[f"{NAMES[family]}Model"])) == parse_config(of(family))
    with pytest.raises(UnsupportedModel, match=f"must be a {NAMES[family]}ForCausalLM"):
        parse_config(of(family, architectures=["LlamaModel"]))
