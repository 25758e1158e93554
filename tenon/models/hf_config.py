"""``config.json`` of a Hugging Face checkpoint -> ``ModelSpec``.

Each field is one of four: it is read; it must have the one value whose maths is implemented (``FIXED``); it is known
not to touch the maths of inference (``INERT``); anything else is an error that names it. Both spellings in circulation
are read: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``; ``torch_dtype`` and ``dtype``.

Defaults, windows and sparse layers follow what ``transformers`` does for the family, not what the field names suggest:
Mistral and Mixtral apply ``sliding_window`` in each layer; Qwen2 and Qwen3 in layers of type ``sliding_attention``
(from ``max_window_layers`` on where ``layer_types`` is absent); Qwen3-MoE in each layer; the Qwens only with
``use_sliding_window``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from tenon.base.errors import CheckpointError, UnsupportedModel
from tenon.models.metadata import read_object, token_id, token_ids
from tenon.models.spec import DTYPE_BYTES, Family, ModelSpec, MoeSpec, RopeKind, RopeSpec

FILE_NAME: Final = "config.json"

ARCHITECTURE: Final[Mapping[str, str]] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}

SHAPE: Final = frozenset(
    {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act",
        "tie_word_embeddings", "model_type", "architectures", "dtype", "torch_dtype", "bos_token_id", "eos_token_id",
        "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "layer_types",
    }
)  # fmt: skip

OWN: Final[Mapping[str, frozenset[str]]] = {
    "llama": frozenset({"attention_bias", "mlp_bias"}),
    "mistral": frozenset({"sliding_window"}),
    "mixtral": frozenset({"sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok"}),
    "qwen2": frozenset({"use_sliding_window", "sliding_window", "max_window_layers"}),
    "qwen3": frozenset({"attention_bias", "use_sliding_window", "sliding_window", "max_window_layers"}),
    "qwen3_moe": frozenset(
        {
            "attention_bias", "use_sliding_window", "sliding_window", "moe_intermediate_size", "num_experts",
            "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step",
        }
    ),
}  # fmt: skip

FIXED: Final[Mapping[str, tuple[Any, ...]]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "qk_layernorm": (False, None),
    "use_qk_norm": (False, None),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0,),
}
"""Fields with one implemented value, for the families that do not read them."""

INERT: Final = frozenset(
    {
        # what the files are and who wrote them
        "transformers_version", "tokenizer_class", "use_cache", "unsloth_version", "unsloth_fixed", "model_max_length",
        "max_sequence_length", "is_llama_config", "transformers.js_config",
        "attn_implementation", "use_bfloat16", "torchscript", "is_decoder", "pad_token_id",
        "sep_token_id", "decoder_start_token_id", "prefix", "problem_type", "finetuning_task", "task_specific_params",
        "id2label", "label2id", "num_labels", "return_dict", "output_attentions", "output_hidden_states",
        "output_router_logits", "tf_legacy_loss", "max_window_layers",
        # training alone
        "initializer_range", "attention_dropout", "router_aux_loss_coef", "router_jitter_noise",
        # generation: older configs carried what generation_config.json says now
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
        "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
        "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
        "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    }
)  # fmt: skip

KV_HEADS: Final[Mapping[str, int | None]] = {
    "llama": None, "mistral": 8, "mixtral": 8, "qwen2": 32, "qwen3": 32, "qwen3_moe": 4,
}  # fmt: skip
"""Key/value heads where the field is absent; ``None``: as many as query heads. A null field means that too."""

MOST: Final = 1 << 31
MOST_LAYERS: Final = 1 << 14


class Fields:
    """A JSON object's fields with types and ranges checked; ``where`` and ``prefix`` name them in errors."""

    def __init__(self, raw: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.raw, self.where, self.prefix = raw, where, prefix

    def wrong(self, name: str, right: str) -> CheckpointError:
        shown = repr(self.raw[name])[:80] if name in self.raw else "missing"
        return CheckpointError(
            f"{self.where}: {self.prefix}{name} is {shown}; it must be {right}", subject=self.prefix + name
        )

    def unsupported(self, name: str, implemented: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.where}: {self.prefix}{name} = {self.raw.get(name)!r:.80} is not implemented; {implemented}",
            subject=self.prefix + name,
        )

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = MOST) -> int:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(name, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None, *, least: float, most: float) -> float:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.wrong(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def maybe(self, name: str, *, least: float, most: float) -> float | None:
        return None if self.raw.get(name) is None else self.number(name, least=least, most=most)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value


def read_config(folder: Path) -> ModelSpec:
    """The spec of the checkpoint in ``folder``.

    Raises ``CheckpointError`` for a file or field that is missing, damaged or inconsistent, and ``UnsupportedModel``
    for maths that is not implemented; each names the file, the field and its value.
    """
    path = folder / FILE_NAME
    return parse_config(read_object(path), str(path))


def parse_config(raw: Mapping[str, Any], where: str = FILE_NAME) -> ModelSpec:
    """The spec that a parsed ``config.json`` describes; ``where`` names the file in errors. Raises as above."""
    fields = Fields(raw, where)
    family = _family(fields)
    _check_names(fields, family)
    n_layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    n_heads, n_kv_heads, head_dim = _heads(fields, family)
    max_position = fields.integer("max_position_embeddings")
    vocab_size = fields.integer("vocab_size")
    hidden_size, intermediate_size = fields.integer("hidden_size"), fields.integer("intermediate_size")
    bos = raw.get("bos_token_id")
    attention_bias = family in ("llama", "qwen3", "qwen3_moe") and fields.flag("attention_bias", False)
    return ModelSpec(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        max_position=max_position,
        norm_eps=fields.number("rms_norm_eps", 1e-5 if family == "mixtral" else 1e-6, least=1e-12, most=0.1),
        rope=_rope(fields, family, max_position),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=family == "llama" and fields.flag("mlp_bias", False),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        windows=_windows(fields, family, n_layers),
        moe=_moe(fields, family, n_layers, intermediate_size),
        dtype=_dtype(fields),
        bos_id=None if bos is None else token_id(bos, "bos_token_id", where, vocab_size),
        eos_ids=token_ids(raw.get("eos_token_id"), "eos_token_id", where, vocab_size),
    )


def _family(fields: Fields) -> Family:
    name = fields.raw.get("model_type")
    if not isinstance(name, str):
        raise fields.wrong("model_type", f"one of {', '.join(ARCHITECTURE)}")
    if name not in ARCHITECTURE:
        raise fields.unsupported("model_type", f"implemented are {', '.join(ARCHITECTURE)}")
    architectures = fields.raw.get("architectures")
    right = {ARCHITECTURE[name], ARCHITECTURE[name].replace("ForCausalLM", "Model")}  # the latter: without output layer
    if architectures is not None and (not isinstance(architectures, list) or right.isdisjoint(map(str, architectures))):
        raise fields.unsupported("architectures", f"a {name} checkpoint must be a {ARCHITECTURE[name]}")
    return cast(Family, name)


def _check_names(fields: Fields, family: Family) -> None:
    """Every field is read, fixed, inert or refused; none is passed over."""
    own = SHAPE | OWN[family]
    for name, value in fields.raw.items():
        if name == "auto_map" and value:
            raise fields.unsupported(name, "it points to code in the checkpoint, which is never run and may differ")
        if name in FIXED and (name not in own or name == "hidden_act"):
            if not any(value == right and isinstance(value, bool) is isinstance(right, bool) for right in FIXED[name]):
                raise fields.unsupported(name, f"for {family} it must be {FIXED[name][0]!r}")
        elif not (name in own or name in INERT or name == "auto_map" or name.startswith("_")):
            raise fields.unsupported(name, f"no such field is known for {family}, and it may change the maths")


def _heads(fields: Fields, family: Family) -> tuple[int, int, int]:
    hidden, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    absent = KV_HEADS[family] if "num_key_value_heads" not in fields.raw else None
    if fields.raw.get("num_key_value_heads") is None:
        n_kv_heads = n_heads if absent is None else absent
    else:
        n_kv_heads = fields.integer("num_key_value_heads")
    if n_heads % n_kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads = {n_heads}")
    if fields.raw.get("head_dim") is not None:
        head_dim = fields.integer("head_dim", most=1 << 16)
    elif family == "qwen3" and "head_dim" not in fields.raw:
        head_dim = 128
    elif hidden % n_heads == 0:
        head_dim = hidden // n_heads
    else:
        raise fields.wrong("num_attention_heads", f"a divisor of hidden_size = {hidden} where head_dim is not given")
    if head_dim % 2:
        raise CheckpointError(f"{fields.where}: head_dim is {head_dim}; RoPE needs an even one", subject="head_dim")
    return n_heads, n_kv_heads, head_dim


def _dtype(fields: Fields) -> str:
    """The stored type; absent means fp32, as it did when the field was introduced."""
    name = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    value = fields.raw.get(name)
    if value is None:
        return "float32"
    short = value.removeprefix("torch.") if isinstance(value, str) else value
    if not isinstance(short, str) or short not in DTYPE_BYTES:
        raise fields.unsupported(name, f"implemented are {', '.join(DTYPE_BYTES)}")
    return short


ROPE_KEYS: Final[Mapping[str, frozenset[str]]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim", "truncate",
        }
    ),
}  # fmt: skip


def _rope(fields: Fields, family: Family, max_position: int) -> RopeSpec:
    """Rotary positions from either spelling; a factor of a kind that does not read it is refused."""
    spelling = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    given = fields.raw.get(spelling) or {}
    if not isinstance(given, dict):
        raise fields.wrong(spelling, "an object or null")
    rope = Fields(given, fields.where, f"{spelling}.")
    named = given.get("rope_type", given.get("type", "default"))
    kind = named if isinstance(named, str) and named in ROPE_KEYS else None
    for name in ("rope_type", "type"):
        if name in given and (kind is None or given[name] != kind):
            raise rope.unsupported(name, f"implemented are {', '.join(ROPE_KEYS)}, named once")
    if kind is None:
        raise rope.wrong("rope_type", f"one of {', '.join(ROPE_KEYS)}")
    for name in given:
        if name == "partial_rotary_factor" and given[name] in (1, None):
            continue
        if name not in ROPE_KEYS[kind] | {"type", "rope_type", "rope_theta"}:
            raise rope.unsupported(name, f"RoPE of type {kind} does not read it")
    default_theta = 1e6 if family == "mixtral" else 1e4
    theta = rope if given.get("rope_theta") is not None else fields
    most = float(1 << 40)
    base = default_theta if theta.raw.get("rope_theta") is None else theta.number("rope_theta", least=1.0001, most=most)
    if kind == "default":
        return RopeSpec(theta=base)
    factor = rope.number("factor", least=1e-3, most=1e6)
    if kind == "linear":
        return RopeSpec(theta=base, kind="linear", factor=factor)
    original = max_position
    for holder in (rope, fields):  # the outer field wins, as in transformers
        if holder.raw.get("original_max_position_embeddings") is not None:
            original = holder.integer("original_max_position_embeddings")
    spec = RopeSpec(theta=base, kind=cast(RopeKind, kind), factor=factor, original_max_position=original)
    return _llama3(rope, spec) if kind == "llama3" else _yarn(rope, spec)


def _llama3(rope: Fields, spec: RopeSpec) -> RopeSpec:
    low = rope.number("low_freq_factor", least=1e-6, most=1e6)
    high = rope.number("high_freq_factor", least=1e-6, most=1e6)
    if high <= low:
        raise rope.wrong("high_freq_factor", f"above low_freq_factor = {low:g}")
    return RopeSpec(
        theta=spec.theta,
        kind="llama3",
        factor=spec.factor,
        original_max_position=spec.original_max_position,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: Fields, spec: RopeSpec) -> RopeSpec:
    return RopeSpec(
        theta=spec.theta,
        kind="yarn",
        factor=spec.factor,
        original_max_position=spec.original_max_position,
        beta_fast=rope.maybe("beta_fast", least=1e-6, most=1e6) or 32.0,
        beta_slow=rope.maybe("beta_slow", least=1e-6, most=1e6) or 1.0,
        attention_factor=rope.maybe("attention_factor", least=1e-6, most=1e6),
        mscale=rope.maybe("mscale", least=0.0, most=1e6),
        mscale_all_dim=rope.maybe("mscale_all_dim", least=0.0, most=1e6),
        truncate=rope.flag("truncate", True),
    )


def _windows(fields: Fields, family: Family, n_layers: int) -> tuple[int | None, ...]:
    """One entry a layer, empty where no layer has a window."""
    types = fields.raw.get("layer_types")
    if types is not None and (
        not isinstance(types, list)
        or len(types) != n_layers
        or any(kind not in ("full_attention", "sliding_attention") for kind in types)
    ):
        raise fields.unsupported(
            "layer_types", f"it must name full_attention or sliding_attention for each of {n_layers} layers"
        )
    window = _window(fields, family)
    if family in ("qwen2", "qwen3"):
        start = fields.integer("max_window_layers", 28, least=0) if window is not None else n_layers
        slides = [i >= start for i in range(n_layers)] if types is None else [t == "sliding_attention" for t in types]
        if window is None and any(slides):
            raise fields.wrong("layer_types", "full_attention throughout while no sliding window is switched on")
    else:
        # transformers does not read layer_types here: it may only say what happens anyway
        slides = [window is not None] * n_layers
        if types is not None and [kind == "sliding_attention" for kind in types] != slides:
            raise fields.unsupported("layer_types", f"{family} applies one window to all layers or none")
    return tuple(window if slide else None for slide in slides) if any(slides) else ()


def _window(fields: Fields, family: Family) -> int | None:
    if family == "llama" or (family.startswith("qwen") and not fields.flag("use_sliding_window", False)):
        return None
    default = None if family == "mixtral" else 4096
    if fields.raw.get("sliding_window", default) is None:
        return None
    return fields.integer("sliding_window", default)


def _moe(fields: Fields, family: Family, n_layers: int, intermediate_size: int) -> MoeSpec | None:
    if family not in ("mixtral", "qwen3_moe"):
        return None
    counts = [name for name in ("num_local_experts", "num_experts") if name in fields.raw]
    if len(counts) == 2 and fields.raw[counts[0]] != fields.raw[counts[1]]:
        raise fields.wrong("num_experts", f"equal to num_local_experts = {fields.raw['num_local_experts']!r:.40}")
    mixtral = family == "mixtral"
    n_experts = fields.integer(counts[0] if counts else "num_experts", 8 if mixtral else 128, most=1 << 16)
    top_k = fields.integer("num_experts_per_tok", 2 if mixtral else 8)
    if top_k > n_experts:
        raise fields.wrong("num_experts_per_tok", f"at most the number of experts, {n_experts}")
    if mixtral:
        return MoeSpec(n_experts, top_k, intermediate_size, True, tuple(range(n_layers)))
    every = fields.integer("decoder_sparse_step", 1)
    dense = fields.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
        raise fields.wrong("mlp_only_layers", "a list of layer numbers")
    sparse = tuple(i for i in range(n_layers) if i not in dense and (i + 1) % every == 0)
    width = fields.integer("moe_intermediate_size", 768)
    return MoeSpec(n_experts, top_k, width, fields.flag("norm_topk_prob", False), sparse) if sparse else None
