"""The Triton kernels against gathering in fp64. ``test_triton_attention.py`` runs this file: in Triton's interpreter on
CPU tensors (``TRITON_INTERPRET=1``), or compiled on a CUDA device.

Shapes: T rows, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tenon.base.errors import IntegrityError
from tenon.engine.executors.attention import TorchAttention
from tenon.engine.executors.torch import Reference
from tenon.engine.executors.triton_attention import FIELDS, TritonAttention, cut, split, split_spans
from tenon.engine.step import Step
from tenon.models.checkpoint import load_decoder
from tenon.models.spec import ModelSpec
from tests.engine.build import Run, sequence, step
from tests.engine.test_kernels import Shape, error, normal, steps
from tests.models import zoo

pytestmark = pytest.mark.torch
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
CLOSE = {FP32: 4e-6, BF16: 2.0**-7, FP16: 2.0**-10}
"""Largest error over the largest value: roundings of fp32; of the weights and of the result in 16 bits."""
SHAPES = [
    (Shape(2, 2, 32, block_tokens=1), FP32, 0),
    (Shape(6, 2, 80, 37, 64), FP16, 0),
    (Shape(5, 1, 96, 13), BF16, 40),
    (Shape(7, 1, 64, 70, 128), BF16, 0),
    (Shape(4, 2, 16, block_tokens=32), FP32, 40),
    (Shape(2, 1, 256), BF16, 12),
    (Shape(17, 1, 24, 1, 2), FP16, 0),
]
"""Shape, type, and for how many programs positions are split."""


def spec_of(shape: Shape) -> ModelSpec:
    H, G, D = shape.n_heads, shape.n_kv_heads, shape.head_dim
    return ModelSpec("llama", 10, H * D, 1, H, G, D, 8, 512, windows=(shape.window,))


@dataclass
class Pair:
    """Our attention, its memory poisoned with NaN wherever nothing was written, beside gathering in fp64."""

    shape: Shape
    dtype: torch.dtype
    programs: int = 0
    fixed: bool = False
    n_slots: int = 1280

    def __post_init__(self) -> None:
        spec = spec_of(self.shape)
        self.ours = TritonAttention(spec, self.dtype, DEVICE, programs=self.programs, fixed=self.fixed)
        self.plain = TorchAttention(spec, torch.float64, torch.device("cpu"))
        size = self.shape.block_tokens
        for attention in (self.ours, self.plain):
            attention.allocate(spec.kv_groups("m", size, 4), self.n_slots // size)
        self.poison(np.arange(self.n_slots))

    def poison(self, slots: np.ndarray) -> None:
        (cache,) = self.ours._layers
        cache.k[torch.from_numpy(slots)] = cache.v[torch.from_numpy(slots)] = float("nan")

    def inputs(self, made: Step, seed: int) -> list[Tensor]:
        """Q, K and V as views of one product. K and V follow from sequence and position: holes get their own back."""
        shape, keys = self.shape, np.repeat(made.seq, np.diff(made.q_start)) * 1000 + made.pos
        H, G, D = shape.n_heads, shape.n_kv_heads, shape.head_dim
        qkv = normal(seed, made.n_rows, H + 2 * G, D)
        for row, key in enumerate(keys.tolist()):
            qkv[row, H:] = normal(key, 2 * G, D)
        qkv[:, H : H + G] *= 3
        return list(qkv.to(self.dtype).split([H, G, G], 1))

    def run(self, made: Step, inputs: list[Tensor]) -> Tensor:
        self.ours.begin(made)
        scale = self.shape.head_dim**-0.5
        return self.ours.attend(*(x.to(DEVICE) for x in inputs), 0, scale, self.shape.window or 0).cpu()

    def right(self, made: Step, inputs: list[Tensor]) -> Tensor:
        self.plain.begin(made)
        return self.plain.attend(*(x.double() for x in inputs), 0, self.shape.head_dim**-0.5, self.shape.window or 0)

    def errors(self, made: list[Step]) -> list[float]:
        found = []
        for i, one in enumerate(made):
            inputs = self.inputs(one, i)
            found.append(error(self.run(one, inputs), self.right(one, inputs)))
        return found


def story(pair: Pair, seed: int, n_steps: int = 3) -> Iterator[list[Run]]:
    """Steps of two sequences that grow while blocks of theirs are lost: spans are the runs of what is missing, the
    lowest positions first within a budget, in any order. Lost slots are poisoned."""
    rng, size = np.random.default_rng(seed), pair.shape.block_tokens
    n = -(-256 // size)
    tables = rng.permutation(np.arange(1, 2 * n + 1)).reshape(2, n)
    written = np.zeros((2, 256), bool)
    length = np.zeros(2, int)
    for i in range(n_steps):
        runs = []
        for seq in range(2):
            starts = rng.integers(0, n, 3) if size < 64 else [0]
            blocks = {b for a in starts for b in range(a, a + -(-18 // size))}
            lost = np.flatnonzero(written[seq] & np.isin(np.arange(256) // size, list(blocks)))
            written[seq, lost] = False
            pair.poison(tables[seq][lost // size] * size + lost % size)
            length[seq] += rng.integers(130, 160) if i == 0 else 1 if i == 1 else rng.integers(1, 30)
            wanted = np.flatnonzero(~written[seq, : length[seq]])[: int(rng.integers(40, 100)) if i == 2 else None]
            for _, group in groupby(enumerate(wanted.tolist()), lambda pair: pair[1] - pair[0]):
                pos = [p for _, p in group]
                runs.append(Run(seq, [0] * len(pos), pos, [tables[seq][: pos[-1] // size + 1].tolist()], [0]))
            written[seq, wanted] = True
        yield [runs[j] for j in rng.permutation(len(runs))]


@pytest.mark.parametrize(("shape", "dtype", "programs"), SHAPES, ids=str)
def test_holes_chunks_and_decodes_equal_gathering(shape: Shape, dtype: torch.dtype, programs: int) -> None:
    pair, several, holes = Pair(shape, dtype, programs), 0, 0
    for i, runs in enumerate(story(pair, seed=shape.n_heads)):
        made = step(runs, shape.block_tokens)
        inputs = pair.inputs(made, i)
        assert error(pair.run(made, inputs), pair.right(made, inputs)) <= CLOSE[dtype], i
        several += len(runs) - len({run.seq for run in runs})
        holes += sum(any(b.seq == a.seq and b.pos[0] > a.pos[-1] + 1 for b in runs) for a in runs)
    assert several >= 2
    assert holes >= 2


def test_trees_are_gathered_beside_chains() -> None:
    pair, made = Pair(Shape(3, 1, 16, 40), FP16), steps(16, seed=4)
    assert split_spans(made[3])[1].tolist() == [0, 2]
    assert max(pair.errors(made)) <= CLOSE[FP16]


def at(pair: Pair, seq: int, start: int, end: int) -> Run:
    size = pair.shape.block_tokens
    table = list(range(1 + seq * (256 // size), 1 + seq * (256 // size) - (-end // size)))
    return Run(seq, [0] * (end - start), list(range(start, end)), [table], [0])


@pytest.mark.parametrize("n", [1, 5])
def test_a_long_context_is_split_and_joined(n: int) -> None:
    pair = Pair(Shape(4, 2, 16, block_tokens=32), FP16, programs=6, n_slots=4096)
    made = step([Run(0, [0] * n, list(range(2000, 2000 + n)), [list(range(1, 65))], [0])], 32)
    (ours,), (plain,) = pair.ours._layers, pair.plain._layers
    for a, b in (ours.k, plain.k), (ours.v, plain.v):
        b[32:2032] = normal(1, 2000, 2, 16, dtype=FP16).double()
        a[32:2032] = b[32:2032].half()
    assert max(pair.errors([made])) <= CLOSE[FP16]
    assert (pair.ours._plans[0].n_parts, pair.ours._plans[0].n_joins) == (3, 1)


def test_what_left_the_window_is_not_read() -> None:
    pair = Pair(Shape(4, 2, 32, 37), FP16)
    assert max(pair.errors([step([at(pair, 0, 0, 110)])])) <= CLOSE[FP16]
    pair.poison(16 + np.arange(110 - 37 + 1))
    assert max(pair.errors([step([at(pair, 0, 110, 150)])])) <= CLOSE[FP16]


def test_moves_come_before_anything_is_written() -> None:
    pair = Pair(Shape(4, 2, 32), FP16)
    first, second = step([at(pair, 0, 0, 40)]), step([at(pair, 1, 40, 44)])
    moved = np.arange(40) + 16
    second.groups[0].moves = np.stack([moved, moved + 256], 1).astype(np.int32)
    assert max(pair.errors([first, second])) <= CLOSE[FP16]


def test_a_causal_mask_aligned_at_the_top_left_is_noticed() -> None:
    pair = Pair(Shape(4, 2, 32), FP16)
    assert max(pair.errors([step([at(pair, 0, 0, 60)])])) <= CLOSE[FP16]
    made = step([at(pair, 0, 40, 60)])
    inputs = pair.inputs(made, 1)
    right = pair.right(made, inputs)
    assert error(pair.run(made, inputs), right) <= CLOSE[FP16]
    made.pos = np.arange(20, dtype=np.int32)  # slots and table stay: query i now sees the first i + 1 keys
    assert error(pair.run(made, inputs), right) > 0.1


def test_an_earlier_hole_left_out_is_noticed() -> None:
    pair, noticed = Pair(Shape(4, 2, 32), FP16), 0
    for i, runs in enumerate(story(pair, seed=5)):
        early = [a for a in runs if any(b.seq == a.seq and b.pos[0] > a.pos[-1] for b in runs)]
        left = [run for run in runs if run is not (early or [None])[0]]
        if early:
            made = step(left)
            noticed += not pair.run(made, pair.inputs(made, i)).isfinite().all()
        whole = step(runs)
        inputs = pair.inputs(whole, i)
        assert error(pair.run(whole, inputs), pair.right(whole, inputs)) <= CLOSE[FP16]
    assert noticed == 2


@pytest.mark.parametrize("shape", [Shape(4, 2, 32), Shape(4, 2, 16, 50)], ids=str)
def test_a_fixed_tiling_gives_a_row_the_same_bits_in_any_company(shape: Shape) -> None:
    pair = Pair(shape, FP16, fixed=True)
    whole = step([at(pair, 0, 0, 150)])
    inputs = pair.inputs(whole, 1)
    right = pair.run(whole, inputs)
    # Numpy, which multiplies in the interpreter, rounds by a row's place in the tile; a tensor core does not.
    free = [] if DEVICE.type == "cpu" else [(149, 150), (83, 100)]
    for start, end in [(64, 150), (128, 150), (64, 70), *free]:
        made = step([at(pair, 1, 0, 20), at(pair, 0, start, end), at(pair, 2, 0, 1)])
        others = pair.inputs(made, 2)
        mixed = [torch.cat([o[:20], x[start:end], o[-1:]]) for o, x in zip(others, inputs, strict=True)]
        assert torch.equal(pair.run(made, mixed)[20:-1], right[start:end])


def test_tiles_cover_every_lane_once_and_parts_every_position() -> None:
    rng = np.random.default_rng(0)
    for window in (0, 30):
        starts, lengths = rng.integers(0, 400, 9), rng.integers(1, 70, 9)
        runs = [Run(0, [0] * n, list(range(s, s + n)), [[1] * 30], [0]) for s, n in zip(starts, lengths, strict=True)]
        made = step([*runs])
        items = cut(made, np.arange(9), made.groups[0], window, 3, 16, 32)
        lanes = [(row, f) for row, n, lane, *_ in items.tolist() for f in range(lane, min(lane + 16, n))]
        assert sorted(lanes) == [(row, f) for row, n in zip(made.q_start, lengths, strict=False) for f in range(3 * n)]
        assert (np.diff(items[:, 6] - items[:, 5]) <= 0).all()
        parts, joins = split(items, 2, 400, 32)
        assert joins.shape[1] == FIELDS
        for *_, first, n, _, _, _ in joins.tolist():
            inside = parts[(parts[:, 7] >= first) & (parts[:, 7] < first + n)]
            assert all(a[6] == b[5] and a[6] % 32 == 0 for a, b in pairwise(inside))
        assert (parts[:, 6] - parts[:, 5]).sum() == (items[:, 6] - items[:, 5]).sum()
        assert (joins[:, 4].sum() > 0) == (window == 0)


def test_a_decoder_s_states_are_those_of_gathering(tmp_path: Path) -> None:
    model = load_decoder(zoo.checkpoint("qwen3-window", tmp_path), FP16).to(DEVICE)
    groups = model.spec.kv_groups("m", 16, 4)
    tables = [[5, 3, 9, 4]] * len(groups)
    text = sequence(1, 60)
    parts = ((0, 17), (17, 60)), ((20, 31), (36, 48)), ((59, 60),)
    states = []
    for kind in (TritonAttention, TorchAttention):
        attention = kind(model.spec, FP16, DEVICE)
        attention.allocate(groups, 12)
        reference, found = Reference(model, attention, 64), []
        for spans in parts:
            made = step([Run(0, text[a:b], list(range(a, b)), tables, [0]) for a, b in spans])
            attention.begin(made)
            rows = (torch.from_numpy(x.astype(np.int64)).to(DEVICE) for x in (made.tok, made.pos))
            with torch.inference_mode():
                found.append(reference.hidden(*rows))
        states.append(torch.cat(found))
    assert error(*states) <= 2.0**-8


def test_what_the_kernels_do_not_cover_is_refused() -> None:
    wide = replace(spec_of(Shape(2, 1, 64)), head_dim=512)
    with pytest.raises(IntegrityError, match="head size 512"):
        TritonAttention(wide, FP16, DEVICE)
    with pytest.raises(IntegrityError, match="float64"):
        TritonAttention(spec_of(Shape(2, 1, 64)), torch.float64, DEVICE)
    TritonAttention(spec_of(Shape(2, 1, 64)), BF16, DEVICE).compile()
