"""What a model is, without torch: shapes, families, positions, windows, experts, and the work of a step.

``ModelSpec`` is the one description that the decoder, the engine's memory plan, the cost model and the
planners read. It comes from a checkpoint's ``config.json`` through :mod:`tenon.models.hf_config`. Of it, ``CostShape``
holds what decides costs; models that the decoder cannot run are known by that alone (:mod:`tenon.models.shapes`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Final, Literal

from tenon.base.errors import ConfigError
from tenon.cost.work import Phase, StepShape, Work

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
        return self.cost.kv_groups(name, block_tokens, dtype_bytes)

    def weights_bytes(self, dtype: str | None = None) -> float:
        """Bytes of all weights, stored as ``dtype`` (the checkpoint's own where None)."""
        return self.cost.weights_bytes(dtype)

    @cached_property
    def cost(self) -> CostShape:
        """What of this model decides what a step costs."""
        d, moe = self.hidden_size, self.moe
        sparse = len(moe.layers) if moe else 0
        return CostShape(
            name=self.family,
            vocab_size=self.vocab_size,
            hidden_size=d,
            n_layers=self.n_layers,
            max_position=self.max_position,
            attention_weights=d * (self.q_size + 2 * self.kv_size) + self.q_size * d,
            attention_width=self.q_size + 2 * self.kv_size,
            pair_flops=4 * self.q_size,
            kv_elements=2 * self.kv_size,
            kv_heads=self.n_kv_heads,
            dense_width=self.intermediate_size,
            n_sparse=sparse,
            n_experts=moe.n_experts if moe else 0,
            top_k=moe.top_k if moe else 0,
            expert_width=moe.intermediate_size if moe else 0,
            tie_embeddings=self.tie_embeddings,
            windows=self.windows,
            dtype=self.dtype,
            eos_ids=self.eos_ids,
            small_weights=self.n_parameters() - self._matrix_weights(),
        )

    def _matrix_weights(self) -> int:
        """Weights that a matrix product reads; the rest are norms and biases."""
        d, moe = self.hidden_size, self.moe
        total = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        total += self.n_layers * (d * (self.q_size + 2 * self.kv_size) + self.q_size * d)
        sparse = len(moe.layers) if moe else 0
        total += (self.n_layers - sparse) * 3 * d * self.intermediate_size
        if moe:
            total += sparse * moe.n_experts * (d + 3 * d * moe.intermediate_size)
        return total


@dataclass(frozen=True)
class CostShape:
    """What of a model decides its costs. Weights and widths are elements, of one layer unless said otherwise.

    ``attention_weights``: projections in and out. ``attention_width``: elements of a row that the projections in write.
    ``pair_flops``: of one row and one position that it sees. ``kv_elements``: keys and values that a token keeps.
    ``kv_heads``: parts that attention falls into. ``dense_width`` is the width of the gate of the layers that are not
    sparse; a sparse layer has ``n_experts`` of ``expert_width`` and, always read, one of ``shared_width`` and a router.
    ``expert_bits``: of one stored weight of an expert where the checkpoint packs them tighter than its type.
    """

    name: str
    vocab_size: int
    hidden_size: int
    n_layers: int
    max_position: int
    attention_weights: int
    attention_width: int
    pair_flops: int
    kv_elements: int
    kv_heads: int
    dense_width: int
    n_sparse: int = 0
    n_experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    shared_width: int = 0
    expert_bits: float | None = None
    tie_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    dtype: str = "bfloat16"
    eos_ids: tuple[int, ...] = ()
    small_weights: int = 0
    """Norms and biases of all layers."""

    @property
    def cost(self) -> CostShape:
        """Itself: what is known by its costs alone stands where a ``ModelSpec`` does."""
        return self

    @property
    def resident_weights(self) -> int:
        """Of all layers, those read for any row: attention, dense layers, routers and shared experts."""
        d = self.hidden_size
        shared = d * self.n_experts + 3 * d * self.shared_width
        return (
            self.n_layers * self.attention_weights
            + (self.n_layers - self.n_sparse) * 3 * d * self.dense_width
            + self.n_sparse * shared
        )

    @property
    def expert_weights(self) -> int:
        """Of one expert of one layer."""
        return 3 * self.hidden_size * self.expert_width

    def n_parameters(self) -> int:
        """Count of all weights; a tied output layer counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        experts = self.n_sparse * self.n_experts * self.expert_weights
        return embeddings + self.resident_weights + experts + self.small_weights

    def weights_bytes(self, dtype: str | None = None) -> float:
        """Bytes of all weights, stored as ``dtype`` (the checkpoint's own where None). Raises ``ConfigError``."""
        size = dtype_bytes(dtype or self.dtype)
        experts = self.n_sparse * self.n_experts * self.expert_weights
        return (self.n_parameters() - experts) * size + experts * self._expert_bytes(size)

    def _expert_bytes(self, size: int) -> float:
        return size if self.expert_bits is None else self.expert_bits / 8

    def group_windows(self) -> tuple[int | None, ...]:
        """The window of each KV group, in the groups' order."""
        return tuple(self.layers_by_window())

    def layers_by_window(self) -> dict[int | None, list[int]]:
        """The layers of each KV group, in the order of first appearance."""
        by_window: dict[int | None, list[int]] = {}
        for layer in range(self.n_layers):
            by_window.setdefault(self.windows[layer] if self.windows else None, []).append(layer)
        return by_window

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values that one token keeps over all layers."""
        return self.n_layers * self.kv_elements * dtype_bytes

    def kv_groups(self, name: str, block_tokens: int, dtype_bytes: int) -> tuple[KVGroup, ...]:
        """Layers gathered by window, in the order of first appearance."""
        per_layer = self.kv_elements * dtype_bytes * block_tokens
        return tuple(
            KVGroup(name, tuple(layers), "full" if w is None else "window", w, block_tokens, per_layer * len(layers))
            for w, layers in self.layers_by_window().items()
        )


def dtype_bytes(dtype: str) -> int:
    """Bytes of an element. Raises ``ConfigError`` for a type that no model is served in."""
    size = DTYPE_BYTES.get(dtype)
    if size is None:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}", subject="dtype")
    return size


DENSE_LAUNCHES: Final = {"linear": 4, "attention": 1}
SPARSE_LAUNCHES: Final = {"linear": 3, "attention": 1, "experts": 3}
"""Dependent kernels of a layer when norms, RoPE and gates are fused into their neighbours: 5 of a dense layer, 7 of a
sparse one (the phases that the megakernel survey counts)."""
EXCHANGES: Final = 2
"""All-reduces of a layer whose matrices are divided among devices (Megatron-LM, arXiv 1909.08053)."""


def step_work(
    model: ModelSpec | CostShape, shape: StepShape, dtype: str | None = None, *, tensor_parallel: int = 1
) -> Work:
    """What a step of ``model`` asks of a device, or of each of ``tensor_parallel`` devices.

    Weights are read once per step: of the experts, the distinct ones that the rows choose, E (1 - (1 - k/E)^rows) in
    expectation when all are equally likely. Raises ``ConfigError`` for an unknown type, or a shape that does not have
    the model's KV groups.
    """
    return _coefficients(model.cost, dtype or model.dtype, tensor_parallel).work(shape)


@lru_cache(maxsize=128)
def _coefficients(cost: CostShape, dtype: str, tensor_parallel: int) -> _Coefficients:
    return _Coefficients(cost, dtype, tensor_parallel)


class _Coefficients:
    """A model's work as numbers to multiply a step's shape with."""

    def __init__(self, cost: CostShape, dtype: str, tensor_parallel: int) -> None:
        if tensor_parallel < 1:
            raise ConfigError(f"tensor_parallel must be at least 1, got {tensor_parallel}", subject="tensor_parallel")
        size, n, d = dtype_bytes(dtype), tensor_parallel, cost.hidden_size
        dense = cost.n_layers - cost.n_sparse
        self._cost, self._dtype, self._name = cost, dtype, cost.name
        gates = 3 * (dense * cost.dense_width + cost.n_sparse * cost.shared_width)
        self._linear_flops = 2 * cost.resident_weights / n
        self._linear_bytes = cost.resident_weights * size / n
        self._experts_flops = 2 * cost.n_sparse * cost.top_k * cost.expert_weights / n
        self._experts_bytes = cost.n_sparse * cost.n_experts * cost.expert_weights * cost._expert_bytes(size) / n
        self._missed = 1 - cost.top_k / cost.n_experts if cost.n_experts else 1.0
        self._layers = tuple(len(layers) for layers in cost.layers_by_window().values())
        self._pair_flops = cost.pair_flops / n
        self._kv_bytes = cost.kv_elements * size / min(n, cost.kv_heads)
        self._pieces = max(1.0, cost.kv_heads / n)
        self._query_bytes = cost.n_layers * 2 * cost.attention_width * size / n
        self._logits_flops = 2 * d * cost.vocab_size / n
        self._logits_bytes = d * cost.vocab_size * size / n
        # Activations pass through caches, weights through memory: theirs is a phase of its own. Rows go in and out of
        # every product, norm, rotation and gate; logits are written and read again to choose a token.
        chosen = cost.n_sparse * cost.top_k * (2 * d + 6 * cost.expert_width)
        divided = cost.n_layers * (4 * cost.attention_width + 4 * d) + 2 * gates + chosen
        self._rowwise_bytes = (cost.n_layers * 8 * d + divided / n) * size
        self._choice_bytes = (2 * cost.vocab_size / n + d) * size
        self._launches = {
            kind: dense * DENSE_LAUNCHES.get(kind, 0) + cost.n_sparse * SPARSE_LAUNCHES.get(kind, 0)
            for kind in ("linear", "attention", "experts")
        }
        self._exchanges = cost.n_layers * EXCHANGES if n > 1 else 0
        # A ring all-reduce sends each element 2 (n - 1) / n times.
        self._exchange_bytes = self._exchanges * 2 * (n - 1) / n * d * size

    def work(self, shape: StepShape) -> Work:
        if len(shape.pairs) != len(self._layers) or len(shape.reads) != len(self._layers):
            raise ConfigError(
                f"the step's shape has {len(shape.pairs)} KV groups, {self._name} has {len(self._layers)}",
                subject="pairs",
            )
        rows, outputs = shape.rows, shape.outputs
        pairs = reads = largest = branched = 0
        for i, layers in enumerate(self._layers):
            pairs += layers * shape.pairs[i]
            reads += layers * (shape.reads[i] + rows)
            largest += layers * shape.largest[i] if shape.largest else 0
            branched += layers * shape.branched[i] if shape.branched else 0
        phases = [
            Phase(
                "linear",
                self._linear_flops * rows,
                self._linear_bytes,
                self._launches["linear"],
            ),
            Phase(
                "attention",
                self._pair_flops * pairs,
                self._kv_bytes * reads + self._query_bytes * rows,
                self._launches["attention"],
                largest / (pairs * self._pieces) if pairs else 0.0,
                self._pair_flops * branched,
            ),
            Phase("rowwise", 0.0, self._rowwise_bytes * rows + self._choice_bytes * outputs, 0),
        ]
        if self._experts_flops:
            read = self._experts_bytes * (1 - self._missed**rows)
            phases.append(Phase("experts", self._experts_flops * rows, read, self._launches["experts"]))
        if outputs:
            phases.append(Phase("logits", self._logits_flops * outputs, self._logits_bytes, 2))
        if self._exchanges:
            phases.append(Phase("exchange", 0.0, self._exchange_bytes * rows, self._exchanges))
        return Work(self._dtype, tuple(phases), rows, shape.spans, outputs)
