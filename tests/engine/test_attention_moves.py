"""Moves of keys and values, as one C call for all layers of a group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tenon.engine.executors import native
from tenon.engine.executors.attention import Cache, NativeAttention
from tenon.models.spec import ModelSpec
from tests.engine.build import Run, smallest_block, step
from tests.engine.segments import same_bits
from tests.engine.test_kernels import BF16, FP32, normal

pytestmark = pytest.mark.torch
WINDOWS = (None, 24, None, 24, 24)
N_BLOCKS = 24
MOVES = {
    "none": [],
    "one": [(5, 70)],
    "of one block": [(17, 16), (19, 17), (22, 18)],
    "to where others come from": [(30, 31), (31, 32), (32, 33), (90, 30)],
    "round in a ring": [(3, 40), (40, 77), (77, 3)],
    "to itself": [(9, 9)],
}


def by_slot(layer: Cache) -> tuple[Tensor, Tensor]:
    """K and V [slot, G, D] of a layer, copied."""
    return layer.k.permute(1, 3, 0, 2, 4).flatten(3).flatten(0, 1), layer.v.permute(1, 2, 4, 0, 3).flatten(0, 2)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_all_sources_are_read_before_a_target_is_written(size: int, dtype: torch.dtype) -> None:
    size = max(size, smallest_block(dtype))
    spec = ModelSpec("llama", 10, 192, len(WINDOWS), 6, 3, 32, 8, 512, windows=WINDOWS)
    groups = spec.kv_groups("m", size, dtype.itemsize)
    attention = NativeAttention(spec, dtype, native.load())
    attention.allocate(groups, N_BLOCKS * 16 // min(size, 16))
    tables = [[1]] * len(groups)
    rng = np.random.default_rng(size)
    many = list(zip(rng.permutation(200)[:90].tolist(), rng.permutation(200)[:90].tolist(), strict=True))
    for i, moves in enumerate((*MOVES.values(), many)):
        for j, layer in enumerate(attention.layers):
            (
                layer.k.copy_(normal(20 * i + 2 * j, *layer.k.shape)),
                layer.v.copy_(normal(20 * i + 2 * j + 1, *layer.v.shape)),
            )
        right = [[x.clone() for x in by_slot(layer)] for layer in attention.layers]
        made = step([Run(0, [1], [0], tables)], size)
        for group, shift in zip(made.groups, (0, 150), strict=True):
            group.moves = np.array(moves, np.int32).reshape(-1, 2) + shift
        for layer, kv in zip(attention.layers, right, strict=True):
            for x in kv:
                source, target = torch.from_numpy(made.groups[layer.group].moves.T.astype(np.int64))
                x[target] = x[source]
        attention.begin(made)
        for layer, kv in zip(attention.layers, right, strict=True):
            assert all(same_bits(x, y) for x, y in zip(by_slot(layer), kv, strict=True)), moves
