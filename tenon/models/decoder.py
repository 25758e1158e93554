"""One decoder for Llama 3, Mistral, Qwen2/2.5, Qwen3, Qwen3-MoE and Mixtral, driven by ``ModelSpec``.

``forward(tok, pos, attend)`` works on a flat run of rows: there are no requests, no batch and no cache in
it. Rows meet only inside ``attend``, so the same maths is trained, exported and served. What a backend can
do faster it passes in: ``attend`` (reads a paged cache) and ``maths``; or it takes the weights over and computes the
same in another form, as the engine does on CPU (``engine/executors/stack.py``).

Shapes: T rows, M model width, H query heads, G key/value heads, D head size, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenon.models import ops, rope
from tenon.models.spec import ModelSpec

Attend = Callable[[Tensor, Tensor, Tensor, int, float, int], Tensor]


class Maths:
    """Row-wise maths of a layer in plain torch: the reference, and what is exported and trained.

    A backend may subclass it; each method must return what this one returns, up to rounding.
    """

    def cos_sin(self, pos_T: Tensor, inv_D2: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, D/2) of the rows' positions, in fp32."""
        return rope.cos_sin(pos_T, inv_D2, factor)

    def norm(self, x_TM: Tensor, weight_M: Tensor, eps: float) -> Tensor:
        """RMS norm over the last axis, in fp32 or wider, scaled in x's type (Zhang & Sennrich 2019)."""
        wide = x_TM.to(torch.promote_types(x_TM.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight_M * wide.to(x_TM.dtype)

    def add_norm(self, x_TM: Tensor, delta_TM: Tensor, weight_M: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The residual sum and its norm. The first argument may be reused for the sum."""
        x_TM = x_TM + delta_TM
        return x_TM, self.norm(x_TM, weight_M, eps)

    def heads(
        self,
        qkv_TN: Tensor,
        spec: ModelSpec,
        q_norm_D: Tensor | None,
        k_norm_D: Tensor | None,
        cos_TD2: Tensor,
        sin_TD2: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split the fused projection into heads, norm queries and keys where the model does, rotate both."""
        q, k, v = qkv_TN.split((spec.q_size, spec.kv_size, spec.kv_size), dim=-1)
        q_THD = q.unflatten(-1, (spec.n_heads, spec.head_dim))
        k_TGD = k.unflatten(-1, (spec.n_kv_heads, spec.head_dim))
        v_TGD = v.unflatten(-1, (spec.n_kv_heads, spec.head_dim))
        if q_norm_D is not None and k_norm_D is not None:
            q_THD = self.norm(q_THD, q_norm_D, spec.norm_eps)
            k_TGD = self.norm(k_TGD, k_norm_D, spec.norm_eps)
        return rope.rotate(q_THD, cos_TD2, sin_TD2), rope.rotate(k_TGD, cos_TD2, sin_TD2), v_TGD

    def swiglu(self, gate_up_T2F: Tensor) -> Tensor:
        """silu(gate) x up, the halves of the fused projection (Shazeer 2020)."""
        gate, up = gate_up_T2F.chunk(2, dim=-1)
        return F.silu(gate) * up

    def experts(self, x_TM: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """The mixture's sum; see :func:`tenon.models.ops.experts`."""
        return cast(Tensor, ops.experts(x_TM, weight_TK, expert_TK, gate_up, down))


REFERENCE = Maths()


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps


class Mlp(nn.Module):
    """down(silu(gate(x)) x up(x)), gate and up in one projection."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_up = nn.Linear(spec.hidden_size, 2 * spec.intermediate_size, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)

    def forward(self, x_TM: Tensor, maths: Maths) -> Tensor:
        return cast(Tensor, self.down(maths.swiglu(self.gate_up(x_TM))))


class SparseMlp(nn.Module):
    """Softmax router over all experts, the best K of each row, weights renormalised where the model does."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        moe = spec.moe
        if moe is None:
            raise ValueError("a sparse layer needs spec.moe")
        self.top_k, self.normalise = moe.top_k, moe.normalise
        self.router = nn.Linear(spec.hidden_size, moe.n_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(moe.n_experts, 2 * moe.intermediate_size, spec.hidden_size))
        self.down = nn.Parameter(torch.empty(moe.n_experts, spec.hidden_size, moe.intermediate_size))
        nn.init.normal_(self.gate_up, std=0.02)
        nn.init.normal_(self.down, std=0.02)

    def forward(self, x_TM: Tensor, maths: Maths) -> Tensor:
        logits_TE = self.router(x_TM)
        wide = torch.promote_types(logits_TE.dtype, torch.float32)
        weight_TK, expert_TK = torch.topk(F.softmax(logits_TE, dim=-1, dtype=wide), self.top_k, dim=-1)
        if self.normalise:
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return maths.experts(x_TM, weight_TK.to(x_TM.dtype), expert_TK, self.gate_up, self.down)


class Layer(nn.Module):
    """Norm, attention, norm, MLP; the residual stream is carried as (sum so far, not yet added delta)."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        self.scale = spec.head_dim**-0.5
        self.window = spec.window(index) or 0
        self.attn_norm = Norm(spec.hidden_size, spec.norm_eps)
        self.qkv = nn.Linear(spec.hidden_size, spec.q_size + 2 * spec.kv_size, bias=spec.qkv_bias)
        self.q_norm = Norm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = Norm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.out = nn.Linear(spec.q_size, spec.hidden_size, bias=spec.o_bias)
        self.mlp_norm = Norm(spec.hidden_size, spec.norm_eps)
        self.mlp: Mlp | SparseMlp = SparseMlp(spec) if spec.is_sparse(index) else Mlp(spec)

    def forward(
        self, h_TM: Tensor, delta_TM: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend, maths: Maths
    ) -> tuple[Tensor, Tensor]:
        if delta_TM is None:
            x_TM = maths.norm(h_TM, self.attn_norm.weight, self.attn_norm.eps)
        else:
            h_TM, x_TM = maths.add_norm(h_TM, delta_TM, self.attn_norm.weight, self.attn_norm.eps)
        q_norm = self.q_norm.weight if self.q_norm is not None else None
        k_norm = self.k_norm.weight if self.k_norm is not None else None
        q, k, v = maths.heads(self.qkv(x_TM), self.spec, q_norm, k_norm, cos, sin)
        o_THD = attend(q, k, v, self.index, self.scale, self.window)
        delta_TM = self.out(o_THD.flatten(1))
        h_TM, x_TM = maths.add_norm(h_TM, delta_TM, self.mlp_norm.weight, self.mlp_norm.eps)
        return h_TM, self.mlp(x_TM, maths)


class Decoder(nn.Module):
    """Embedding, layers, final norm. ``logits`` is apart: only some rows' logits are wanted."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec, i) for i in range(spec.n_layers))
        self.norm = Norm(spec.hidden_size, spec.norm_eps)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        self.has_head = True
        """False: its checkpoint has no output layer. The embedding stands in for it, and logits mean nothing."""
        inv, self.rope_factor = rope.frequencies(spec.rope, spec.head_dim)
        self.register_buffer("inv_freq", inv, persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # A cast of the weights must not round the frequencies: positions of 10^5 need all of fp32.
        super()._apply(fn, recurse)
        self.inv_freq = rope.frequencies(self.spec.rope, self.spec.head_dim)[0].to(self.embed.weight.device)
        return self

    def hidden(self, tok_T: Tensor, pos_T: Tensor, attend: Attend = ops.attend, maths: Maths = REFERENCE) -> Tensor:
        """The rows' last hidden states (T, M), after the final norm."""
        h_TM = self.embed(tok_T)
        cos, sin = maths.cos_sin(pos_T, self.inv_freq, self.rope_factor)
        delta_TM: Tensor | None = None
        for layer in self.layers:
            h_TM, delta_TM = layer(h_TM, delta_TM, cos, sin, attend, maths)
        if delta_TM is None:
            return maths.norm(h_TM, self.norm.weight, self.norm.eps)
        return maths.add_norm(h_TM, delta_TM, self.norm.weight, self.norm.eps)[1]

    def logits(self, hidden_RM: Tensor) -> Tensor:
        """Scores over the vocabulary (R, V) in the model's type."""
        return cast(Tensor, self.lm_head(hidden_RM))

    def forward(self, tok_T: Tensor, pos_T: Tensor, attend: Attend = ops.attend, maths: Maths = REFERENCE) -> Tensor:
        """Logits (T, V) of every row: rows are one sequence unless ``attend`` knows better."""
        return self.logits(self.hidden(tok_T, pos_T, attend, maths))
