"""Rotary positions: frequencies per family, then cosines and sines of given positions.

Frequencies follow Su et al. 2021 and its stretchings: linear, Llama 3.1's, YaRN (Peng et al. 2023, eq. 23
and the attention factor of section 3.4). Computed in fp32 once, on the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tenon.models.spec import RopeSpec


def _yarn(rope: RopeSpec, dim: int, base_D2: Tensor) -> tuple[Tensor, float]:
    original = rope.original_max_position
    if original is None:
        raise ValueError("YaRN needs original_max_position")

    def turns_to_dim(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = turns_to_dim(rope.beta_fast), turns_to_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001
    ramp_D2 = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    keep_D2 = 1 - ramp_D2
    inv_D2 = (base_D2 / rope.factor) * (1 - keep_D2) + base_D2 * keep_D2

    def mscale(factor: float, m: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return inv_D2, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return inv_D2, mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return inv_D2, mscale(rope.factor)


def _llama3(rope: RopeSpec, base_D2: Tensor) -> Tensor:
    original = rope.original_max_position
    if original is None:
        raise ValueError("llama3 scaling needs original_max_position")
    wave_D2 = 2 * math.pi / base_D2
    low_wave, high_wave = original / rope.low_freq_factor, original / rope.high_freq_factor
    smooth_D2 = (original / wave_D2 - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    mixed_D2 = (1 - smooth_D2) * base_D2 / rope.factor + smooth_D2 * base_D2
    inv_D2 = torch.where(wave_D2 > low_wave, base_D2 / rope.factor, base_D2)
    between = (wave_D2 <= low_wave) & (wave_D2 >= high_wave)
    return torch.where(between, mixed_D2, inv_D2)


def frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies (D/2,) in fp32, and the factor that cosines and sines are multiplied with."""
    base_D2 = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "linear":
        return base_D2 / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, base_D2), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, base_D2)
    return base_D2, 1.0


def cos_sin(pos_T: Tensor, inv_D2: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, D/2) in fp32 of the rows' positions."""
    angle = pos_T.to(torch.float32)[:, None] * inv_D2[None, :]
    return angle.cos() * factor, angle.sin() * factor


def rotate(x_TND: Tensor, cos_TD2: Tensor, sin_TD2: Tensor) -> Tensor:
    """Rotate the two halves of each head, in fp32 or wider, and return x's type (the Hugging Face pairing)."""
    wide = torch.promote_types(x_TND.dtype, torch.float32)
    a, b = x_TND.to(wide).chunk(2, dim=-1)
    c, s = cos_TD2[:, None, :], sin_TD2[:, None, :]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x_TND.dtype)
