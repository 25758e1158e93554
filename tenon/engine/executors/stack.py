"""A decoder on CPU with its layers as one C call: packed weights, paged attention, row-wise maths, experts.

``csrc/stack_body.h`` computes what ``models/decoder.py`` says; this module lays out its weights. A row's bits depend
on the row and its context alone.

Shapes: T rows, M model width, D head size, F gate width, E experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor, nn

from tenon.base.errors import ResourceError
from tenon.engine.executors.attention import NativeAttention
from tenon.engine.executors.linear import PackedLinear
from tenon.engine.executors.memory import zeros
from tenon.engine.executors.native import SUFFIX, Native
from tenon.models import rope
from tenon.models.decoder import Decoder, Layer, SparseMlp
from tenon.models.spec import ModelSpec

HEAD_MULTIPLE = 32
"""The attention kernel needs head sizes that are multiples of this."""


class StackLayer(ctypes.Structure):
    """Mirror of ``stack_layer`` in stack.h; keep the fields in its order."""

    _fields_ = [
        *((name, c_void_p) for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm")),
        *((f"{name}{part}", c_void_p) for name in ("qkv", "out", "gate_up", "down") for part in ("", "_bias")),
        *((name, c_void_p) for name in ("router", "k_cache", "v_cache")),
        *((name, c_int64) for name in ("group", "width")),
    ]


class StackSizes(ctypes.Structure):
    """Mirror of ``stack`` in stack.h; keep the fields in its order."""

    _fields_ = [
        *((name, c_int64) for name in ("n_layers", "hidden", "n_heads", "n_kv_heads", "head_dim")),
        *((name, c_int64) for name in ("n_experts", "top_k", "normalise", "width")),
        *((name, c_double) for name in ("eps", "scale")),
        *((name, c_void_p) for name in ("layers", "norm")),
    ]


def uncovered(spec: ModelSpec, dtype: torch.dtype) -> str | None:
    """Why the kernels do not cover this model, or None."""
    if dtype not in SUFFIX:
        return f"type {dtype}"
    if spec.head_dim % HEAD_MULTIPLE:
        return f"head size {spec.head_dim}, which is no multiple of {HEAD_MULTIPLE}"
    widths = [spec.hidden_size, spec.intermediate_size] + ([spec.moe.intermediate_size] if spec.moe else [])
    if any(width % 2 for width in widths):
        return f"an odd width among {widths}"
    return None


class Stack:
    """The decoder's forward pass. Takes the decoder over: its weights move into packed memory layer by layer.

    ``products`` are the dense linear layers in the order of a step, the output layer last.
    """

    def __init__(
        self,
        model: Decoder,
        native: Native,
        attention: NativeAttention,
        max_position: int,
        on_layer: Callable[[int, int], None],
    ) -> None:
        spec = self.spec = model.spec
        self._attention = attention
        self._embed = model.embed.weight.detach()
        dtype = self._embed.dtype
        self._run, self._scratch_bytes = native.stack[dtype], native.stack_scratch[dtype]
        self._native = native
        self._keep: list[Tensor] = []
        self.products: list[PackedLinear] = []
        self._memory = zeros((sum(self._packed_sizes(model)),), self._embed, "the packed weights")
        self._used = 0
        positions = torch.arange(max_position)
        self._cos_PD2, self._sin_PD2 = rope.cos_sin(positions, model.inv_freq, model.rope_factor)
        layers = [self._lay_out(layer, spec) for layer in self._each(model, on_layer)]
        self._layers = (StackLayer * len(layers))(*layers)
        self._head = self._pack(model.lm_head)
        moe = spec.moe
        self._sizes = StackSizes(
            spec.n_layers, spec.hidden_size, spec.n_heads, spec.n_kv_heads, spec.head_dim,
            moe.n_experts if moe else 0, moe.top_k if moe else 0, bool(moe and moe.normalise),
            max(layer.width for layer in layers), spec.norm_eps, spec.head_dim**-0.5,
            ctypes.addressof(self._layers), self._address(model.norm.weight),
        )  # fmt: skip
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._caches: object = None

    def hidden(self, tok_T: Tensor, pos_T: Tensor) -> Tensor:
        """The rows' last hidden states (T, M) of the attention's current step. Raises ``ResourceError``."""
        if self._caches is not self._attention.layers:
            self._caches = self._attention.layers
            for layer, cache in zip(self._layers, self._attention.layers, strict=True):
                layer.k_cache, layer.v_cache, layer.group = cache.k.data_ptr(), cache.v.data_ptr(), cache.group
        h_TM = self._embed.index_select(0, tok_T)
        out_TM = torch.empty_like(h_TM)
        cos_TD2, sin_TD2 = self._cos_PD2.index_select(0, pos_T), self._sin_PD2.index_select(0, pos_T)
        T, sizes = len(tok_T), ctypes.addressof(self._sizes)
        needed = self._scratch_bytes(sizes, T) + 64
        if len(self._scratch) < needed:
            try:
                self._scratch = torch.empty(needed, dtype=torch.uint8)
            except RuntimeError as error:
                raise ResourceError(f"no memory for a step of {T} rows: {str(error).splitlines()[0]}") from error
        scratch = (self._scratch.data_ptr() + 63) // 64 * 64
        plans = self._attention.plans
        failed = self._run(
            sizes, ctypes.addressof(plans), T, cos_TD2.data_ptr(), sin_TD2.data_ptr(), h_TM.data_ptr(),
            out_TM.data_ptr(), scratch,
        )  # fmt: skip
        if failed:
            raise ResourceError(f"no memory for the scratch of a step of {T} rows")
        return out_TM

    def logits(self, hidden_RM: Tensor) -> Tensor:
        """Scores over the vocabulary (R, V) in the model's type."""
        return self._head(hidden_RM)

    @staticmethod
    def _each(model: Decoder, on_layer: Callable[[int, int], None]) -> Iterator[Layer]:
        """The layers, each let go after its turn."""
        n = len(model.layers)
        for i in range(n):
            layer = model.layers[i]
            if not isinstance(layer, Layer):
                raise TypeError(f"layer {i} is a {type(layer).__name__}")
            yield layer
            model.layers[i] = nn.Identity()
            on_layer(i + 1, n)

    def _lay_out(self, layer: Layer, spec: ModelSpec) -> StackLayer:
        made = StackLayer()
        made.attn_norm, made.mlp_norm = self._address(layer.attn_norm.weight), self._address(layer.mlp_norm.weight)
        if layer.q_norm is not None and layer.k_norm is not None:
            made.q_norm, made.k_norm = self._address(layer.q_norm.weight), self._address(layer.k_norm.weight)
        linear = {"qkv": layer.qkv, "out": layer.out}
        if isinstance(layer.mlp, SparseMlp):
            made.router = self._pack(layer.mlp.router).memory.data_ptr()
            made.gate_up = self._pack_experts(layer.mlp.gate_up)
            made.down = self._pack_experts(layer.mlp.down)
            made.width = layer.mlp.down.shape[-1]
        else:
            linear |= {"gate_up": layer.mlp.gate_up, "down": layer.mlp.down}
            made.width = spec.intermediate_size
        for name, module in linear.items():
            packed = self._pack(module)
            setattr(made, name, packed.memory.data_ptr())
            if packed.bias is not None:
                setattr(made, f"{name}_bias", self._address(packed.bias))
        return made

    def _address(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _take(self, n: int, k: int) -> Tensor:
        size = self._native.packed_size(n, k)
        self._used += size
        return self._memory[self._used - size : self._used]

    def _pack(self, linear: nn.Linear) -> PackedLinear:
        made = PackedLinear(self._native, linear.weight, linear.bias, self._take(*linear.weight.shape))
        self.products.append(made)
        return made

    def _pack_experts(self, weight_ENK: Tensor) -> int:
        """Experts one after another; the address of the first."""
        packed = [PackedLinear(self._native, w_NK, None, self._take(*w_NK.shape)) for w_NK in weight_ENK]
        return packed[0].memory.data_ptr()

    def _packed_sizes(self, model: Decoder) -> Iterator[int]:
        size = self._native.packed_size
        for module in model.modules():
            if isinstance(module, nn.Linear):
                yield size(*module.weight.shape)
            elif isinstance(module, SparseMlp):
                for weight_ENK in (module.gate_up, module.down):
                    yield len(weight_ENK) * size(*weight_ENK.shape[1:])
