"""What a model is, without torch: shapes, families, positions, windows, experts.

``ModelSpec`` is the one description that the decoder, the engine's memory plan, the cost model and the
planners read. It comes from a checkpoint's ``config.json`` through :mod:`tenon.models.hf_config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Family = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions (Su et al. 2021) and their stretchings.

    ``linear`` divides positions; ``llama3`` keeps high frequencies and divides low ones (Llama 3.1);
    ``yarn`` ramps between both and scales the result (Peng et al. 2023).
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class MoeSpec:
    """A mixture of experts in place of the MLP.

    ``layers`` names the sparse ones; ``normalise`` divides the chosen routers' weights by their sum.
    """

    n_experts: int
    top_k: int
    intermediate_size: int
    normalise: bool
    layers: tuple[int, ...]


@dataclass(frozen=True)
class KVGroup:
    """Layers of one model that share a block table (ARCHITECTURE: *KVGroup*).

    ``window`` counts the positions a row sees, itself included; ``None`` sees everything.
    ``block_bytes`` is one block over all of the group's layers, keys and values.
    """

    model: str
    layers: tuple[int, ...]
    kind: Literal["full", "window"]
    window: int | None
    block_tokens: int
    block_bytes: int


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides a decoder's shapes and maths. Sizes are in elements, not bytes."""

    family: Family
    vocab_size: int
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    norm_eps: float = 1e-6
    rope: RopeSpec = field(default_factory=RopeSpec)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    moe: MoeSpec | None = None
    dtype: str = "bfloat16"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def window(self, layer: int) -> int | None:
        """Positions that a row of ``layer`` sees, itself included; ``None`` is all of them."""
        return self.windows[layer] if self.windows else None

    def is_sparse(self, layer: int) -> bool:
        """Whether ``layer`` routes to experts."""
        return self.moe is not None and layer in self.moe.layers

    @property
    def q_size(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.n_kv_heads * self.head_dim

    def n_parameters(self) -> int:
        """Count of all weights; a tied output layer counts once."""
        d = self.hidden_size
        attn = d * (self.q_size + 2 * self.kv_size) + self.q_size * d
        attn += (self.q_size + 2 * self.kv_size) if self.qkv_bias else 0
        attn += d if self.o_bias else 0
        attn += 2 * self.head_dim if self.qk_norm else 0
        dense = 3 * d * self.intermediate_size
        dense += (2 * self.intermediate_size + d) if self.mlp_bias else 0
        total = self.vocab_size * d * (1 if self.tie_embeddings else 2) + d
        for layer in range(self.n_layers):
            total += attn + 2 * d
            if self.moe is not None and layer in self.moe.layers:
                total += self.moe.n_experts * (d + 3 * d * self.moe.intermediate_size)
            else:
                total += dense
        return total

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values that one token keeps over all layers."""
        return 2 * self.n_layers * self.kv_size * dtype_bytes

    def kv_groups(self, name: str, block_tokens: int, dtype_bytes: int) -> tuple[KVGroup, ...]:
        """Layers gathered by window, in the order of first appearance."""
        by_window: dict[int | None, list[int]] = {}
        for layer in range(self.n_layers):
            by_window.setdefault(self.window(layer), []).append(layer)
        per_layer = 2 * self.kv_size * dtype_bytes * block_tokens
        return tuple(
            KVGroup(name, tuple(layers), "full" if w is None else "window", w, block_tokens, per_layer * len(layers))
            for w, layers in by_window.items()
        )
