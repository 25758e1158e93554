"""The two operators of the decoder that reach beyond one row: attention and experts.

As plain functions they are complete: causal attention among the given rows, experts by grouped
matrix products, both differentiable. ``torch.export`` keeps them whole, so that a compiler finds them by
name. An engine's executor passes its own ``attend`` that reads a cache; the decoder cannot tell.

Shapes: T rows, H query heads, G key/value heads (H a multiple of G), D head size, M model width,
E experts, K experts per row, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _mask_TT(n: int, window: int, device: torch.device) -> Tensor:
    """True where row i may see row j: j <= i, and i - j < window where there is one."""
    i = torch.arange(n, device=device)
    ahead = i[None, :] - i[:, None]
    mask = ahead <= 0
    if window > 0:
        mask &= ahead > -window
    return mask


def _attend_reference(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scale: float, window: int) -> Tensor:
    rep = q_THD.shape[1] // k_TGD.shape[1]
    q = q_THD.transpose(0, 1)
    k = k_TGD.repeat_interleave(rep, dim=1).transpose(0, 1)
    v = v_TGD.repeat_interleave(rep, dim=1).transpose(0, 1)
    mask = _mask_TT(q_THD.shape[0], window, q_THD.device)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0].transpose(0, 1)


@torch.library.custom_op("tenon::attend", mutates_args=())
def attend(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layer: int, scale: float, window: int) -> Tensor:
    """Causal attention of one sequence's rows among themselves; ``window`` 0 sees every earlier row.

    Returns (T, H, D). ``layer`` means nothing here; it tells an executor which cache to read.
    """
    return _attend_reference(q_THD, k_TGD, v_TGD, scale, window).contiguous()


@attend.register_fake
def _(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layer: int, scale: float, window: int) -> Tensor:
    return torch.empty_like(q_THD, memory_format=torch.contiguous_format)


def _attend_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, _, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v)


def _attend_backward(ctx, grad_THD: Tensor):  # type: ignore[no-untyped-def]
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_(True) for t in ctx.saved_tensors)
        out = _attend_reference(q, k, v, ctx.scale, ctx.window)
        grads = torch.autograd.grad(out, (q, k, v), grad_THD)
    return (*grads, None, None, None)


attend.register_autograd(_attend_backward, setup_context=_attend_setup)


def _experts_reference(
    x_TM: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up_E2FM: Tensor, down_EMF: Tensor
) -> Tensor:
    """Rows are gathered by expert, each expert runs once over its rows, results are summed in fp32 of x's kind."""
    out_TM = torch.zeros_like(x_TM)
    for expert in torch.unique(expert_TK).tolist():
        row, slot = torch.where(expert_TK == expert)
        gate, up = F.linear(x_TM[row], gate_up_E2FM[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down_EMF[expert]) * weight_TK[row, slot, None]
        out_TM = out_TM.index_add(0, row, y.to(x_TM.dtype))
    return out_TM


@torch.library.custom_op("tenon::experts", mutates_args=())
def experts(x_TM: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up_E2FM: Tensor, down_EMF: Tensor) -> Tensor:
    """Sum over each row's K experts of weight x down(silu(gate(x)) * up(x)). Returns (T, M)."""
    return _experts_reference(x_TM, weight_TK, expert_TK, gate_up_E2FM, down_EMF)


@experts.register_fake
def _(x_TM: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up_E2FM: Tensor, down_EMF: Tensor) -> Tensor:
    return torch.empty_like(x_TM)


def _experts_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _experts_backward(ctx, grad_TM: Tensor):  # type: ignore[no-untyped-def]
    x, weight, expert, gate_up, down = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(True) for t in (x, weight, gate_up, down)]
        out = _experts_reference(leaves[0], leaves[1], expert, leaves[2], leaves[3])
        gx, gw, gg, gd = torch.autograd.grad(out, leaves, grad_TM)
    return gx, gw, None, gg, gd


experts.register_autograd(_experts_backward, setup_context=_experts_setup)
