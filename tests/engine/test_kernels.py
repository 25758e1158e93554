"""The C kernels against plain torch and numpy: attention over paged caches, row-wise maths, noise and choice."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from tenon.base import philox
from tenon.base.errors import ConfigError, IntegrityError
from tenon.engine.executors import native
from tenon.engine.executors.attention import MAX_DEPTH, NativeAttention, TorchAttention, roots
from tenon.engine.executors.linear import PackedLinear
from tenon.engine.step import Step
from tenon.models.decoder import Maths
from tenon.models.spec import ModelSpec
from tests.engine.build import Run, smallest_block, step

pytestmark = pytest.mark.torch
FP32, BF16 = torch.float32, torch.bfloat16
CLOSE = {FP32: 2e-6, BF16: 2.0**-8}
"""Largest error over the largest value: a few roundings of fp32, one of bf16."""


@pytest.mark.parametrize(("depth", "taken"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False)])
def test_a_tree_deeper_than_the_kernel_takes_is_refused(depth: int, taken: bool) -> None:
    n = depth + 1
    deep = step([Run(0, [1] * n, list(range(n)), [[1]], parent=[-1, *range(depth)], slots=[[0] * n])])
    if taken:
        assert roots(deep).tolist() == [0] * n
    else:
        with pytest.raises(IntegrityError, match="rows deep"):
            roots(deep)


def normal(seed: int, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).abs().max() / right.double().abs().max())


@dataclass(frozen=True)
class Shape:
    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int | None = None
    block_tokens: int = 16


SHAPES = [
    Shape(4, 4, 32),
    Shape(8, 2, 64, block_tokens=32),
    Shape(5, 1, 96, 13),
    Shape(6, 2, 128, 40, 64),
    Shape(14, 2, 64, 1),
    Shape(9, 3, 64, 16, 128),
    Shape(2, 1, 256),
    Shape(6, 3, 64, None, 1),
    Shape(4, 1, 32, 13, 2),
    Shape(4, 4, 64, 40, 4),
    Shape(5, 1, 96, None, 8),
]


def steps(size: int, seed: int) -> list[Step]:
    """Prefill, a mix of decodes and chunks, a rebuilt hole beside later spans, two trees; positions to about 200."""
    rng = np.random.default_rng(seed)
    n = -(-256 // size)
    tables = rng.permutation(np.arange(1, 4 * n + 1)).reshape(4, n).tolist()
    spare = (4 * n + 1) * size

    def run(seq: int, start: int, end: int) -> Run:
        return Run(seq, [0] * (end - start), list(range(start, end)), [tables[seq][: -(-end // size)]], [0])

    def tree(seq: int, start: int, parent: list[int], spare: int) -> Run:
        depth: list[int] = []
        for p in parent:
            depth.append(0 if p < 0 else depth[p] + 1)
        table = tables[seq][: start // size + 1]
        slots = [table[start // size] * size + start % size, *range(spare, spare + len(parent) - 1)]
        return Run(seq, [0] * len(parent), [start + d for d in depth], [table], [0], parent, [slots])

    a, b = int(rng.integers(49, 130)), int(rng.integers(1, 40))
    random_tree = [-1, *(int(rng.integers(0, i)) for i in range(1, 20))]
    return [
        step([run(0, 0, a), run(1, 0, b), run(2, 0, 17), run(3, 0, 1)], size),
        step([run(0, a, a + 1), run(1, b, b + 60), run(2, 17, 20), run(3, 1, 2), run(0, a + 1, a + 3)], size),
        step([run(0, 16, 35), run(1, b + 60, b + 61), run(0, a + 3, a + 70)], size),
        step(
            [tree(0, a + 70, random_tree, spare), run(1, b + 61, b + 63), tree(2, 20, list(range(-1, 30)), spare + 32)],
            size,
        ),
    ]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_gathered_attention(shape: Shape, dtype: torch.dtype) -> None:
    H, G, D, size = shape.n_heads, shape.n_kv_heads, shape.head_dim, max(shape.block_tokens, smallest_block(dtype))
    spec = ModelSpec("llama", 10, H * D, 1, H, G, D, 8, 512, windows=(shape.window,))
    ours = NativeAttention(spec, dtype, native.load())
    plain = TorchAttention(spec, torch.float64, torch.device("cpu"))
    groups = spec.kv_groups("m", size, 4)
    for attention in (ours, plain):
        attention.allocate(groups, 4 * -(-256 // size) + 1 + -(-64 // size))
    for i, made in enumerate(steps(size, seed=H)):
        T = made.n_rows
        q, k, v = (normal(10 * i + j, T, n, D, dtype=dtype) for j, n in enumerate((H, G, G)))
        k = k * 3
        ours.begin(made)
        plain.begin(made)
        found, cache = torch.empty_like(q), ours.layers[0]
        places = (t.data_ptr() for t in (q, k, v, cache.k, cache.v, found))
        assert native.load().attend[dtype](ctypes.addressof(ours.plans), D**-0.5, *places) == 0
        right = plain.attend(q.double(), k.double(), v.double(), 0, D**-0.5, shape.window or 0)
        assert error(found, right) <= 2 * CLOSE[dtype], i


class Paired(native.Native):
    """What it is on processors that multiply bf16 in pairs."""

    def __init__(self) -> None:
        self.group = {BF16: 2}


@pytest.mark.parametrize(("size", "taken"), [(1, False), (2, True), (16, True)])
def test_blocks_that_split_a_pair_are_refused(size: int, taken: bool) -> None:
    spec = ModelSpec("llama", 10, 64, 1, 2, 1, 32, 8, 512)
    attention = NativeAttention(spec, BF16, Paired())
    if taken:
        attention.allocate(spec.kv_groups("m", size, 2), 3)
        assert attention.layers[0].v.shape == (1, 3, size // 2, 32, 2)
    else:
        with pytest.raises(ConfigError, match=r"block_tokens of 1 .* multiple of 2"):
            attention.allocate(spec.kv_groups("m", size, 2), 3)


class NativeMaths:
    """The row-wise kernels with the arguments of ``Maths``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.of, self.dtype = native.load(), dtype

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        self.of.norm[self.dtype](x.data_ptr(), weight.data_ptr(), eps, *x.shape, out.data_ptr())
        return out

    def add_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(x)
        places = (t.data_ptr() for t in (x, delta, weight))
        self.of.add_norm[self.dtype](*places, eps, *x.shape, out.data_ptr())
        return x, out

    def heads(
        self, qkv: Tensor, spec: ModelSpec, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        T, H, G, D = len(qkv), spec.n_heads, spec.n_kv_heads, spec.head_dim
        q, k, v = (torch.empty((T, n, D), dtype=qkv.dtype) for n in (H, G, G))
        norms = (None if w is None else w.data_ptr() for w in (q_norm, k_norm))
        out = (t.data_ptr() for t in (q, k, v))
        self.of.heads[self.dtype](
            qkv.data_ptr(), *norms, spec.norm_eps, cos.data_ptr(), sin.data_ptr(), T, H, G, D, *out
        )
        return q, k, v

    def swiglu(self, gate_up: Tensor) -> Tensor:
        T, F = len(gate_up), gate_up.shape[1] // 2
        out = torch.empty((T, F), dtype=gate_up.dtype)
        self.of.swiglu[self.dtype](gate_up.data_ptr(), T, F, out.data_ptr())
        return out


def linear(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    kernels = native.load()
    memory = torch.empty(kernels.packed_size(*weight.shape), dtype=weight.dtype)
    return PackedLinear(kernels, weight, bias, memory)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 2), (15, 8), (16, 32), (33, 62), (130, 576), (700, 2050)])
def test_linear_layers_equal_wide_products_and_rows_stand_alone(n: int, k: int, dtype: torch.dtype) -> None:
    weight, bias = normal(1, n, k, dtype=dtype), normal(2, n, dtype=dtype)
    for made, added in ((linear(weight, bias), bias), (linear(weight, None), torch.zeros(n))):
        alone = torch.cat([made(row[None]) for row in normal(3, 67, k, dtype=dtype)])
        for T in (*range(1, 34), 67):
            x = normal(3, 67, k, dtype=dtype)[:T]
            found = made(x)
            assert error(found, x.double() @ weight.double().T + added.double()) <= max(CLOSE[dtype], 2e-7 * k**0.5)
            assert torch.equal(found, alone[:T]), T


def test_weights_of_another_order_in_memory_are_packed_as_they_read() -> None:
    weight, x = normal(1, 40, 24), normal(2, 5, 24)
    assert torch.equal(linear(weight, None)(x), linear(weight.T.contiguous().T, None)(x))
    assert torch.equal(linear(weight, None)(x), linear(weight, None)(x.T.contiguous().T))


SPECS = [ModelSpec("llama", 10, 64, 1, h, g, d, 8, 512) for h, g, d in ((4, 2, 16), (3, 1, 32), (5, 5, 80), (2, 2, 6))]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("n", [1, 15, 16, 33, 576])
def test_norms_and_gates_equal_the_plain_maths(n: int, dtype: torch.dtype) -> None:
    ours, plain = NativeMaths(dtype), Maths()
    x, delta = normal(1, 37, n, dtype=dtype), normal(2, 37, n, dtype=dtype)
    weight, gate_up = normal(3, n, dtype=dtype), normal(4, 37, 2 * n, dtype=dtype) * 4
    wide = x.double(), delta.double(), weight.double()
    assert error(ours.norm(x, weight, 1e-6), plain.norm(wide[0], wide[2], 1e-6)) <= CLOSE[dtype]
    assert error(ours.swiglu(gate_up), plain.swiglu(gate_up.double())) <= CLOSE[dtype]
    right_sum, right_norm = plain.add_norm(wide[0], wide[1], wide[2], 1e-6)
    found_sum, found_norm = ours.add_norm(x.clone(), delta, weight, 1e-6)
    assert error(found_sum, right_sum) <= CLOSE[dtype]
    assert error(found_norm, right_norm) <= 2 * CLOSE[dtype]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.n_heads}-{s.n_kv_heads}-{s.head_dim}")
def test_heads_are_split_normed_and_rotated_as_in_plain_maths(
    spec: ModelSpec, normed: bool, dtype: torch.dtype
) -> None:
    T, D = 11, spec.head_dim
    qkv = normal(1, T, spec.q_size + 2 * spec.kv_size, dtype=dtype)
    norms = (normal(2, D, dtype=dtype), normal(3, D, dtype=dtype)) if normed else (None, None)
    angle = normal(4, T, D // 2) * 100
    found = NativeMaths(dtype).heads(qkv, spec, *norms, angle.cos(), angle.sin())
    wide = [None if w is None else w.double() for w in norms]
    right = Maths().heads(qkv.double(), spec, wide[0], wide[1], angle.cos().double(), angle.sin().double())
    for ours, theirs in zip(found, right, strict=True):
        assert error(ours, theirs) <= 2 * CLOSE[dtype]


def test_extremes_of_the_gate_stay_finite() -> None:
    x = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 1e4, -1e30, 3.0] + [1.0] * 24], dtype=FP32)
    found = NativeMaths(FP32).swiglu(x)
    torch.testing.assert_close(found, Maths().swiglu(x))


def test_the_noise_is_numpy_s() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        key = int(rng.integers(0, 2**63)) * 2 + 1, int(rng.integers(0, 64)), int(rng.integers(0, 2**31))
        tokens = np.sort(rng.integers(0, 200_000, 500))
        assert np.abs(native.load().noise(*key, tokens) - philox.noise(*key, tokens)).max() < 1e-12
