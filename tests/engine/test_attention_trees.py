"""Rows of a tree that the C kernel takes through their context together have the bits of each alone, and of a chain."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from torch import Tensor

from tenon.engine.executors import native
from tenon.engine.executors.attention import FEW_ROWS, NativeAttention, TorchAttention, roots
from tenon.engine.executors.native import AttendStep
from tenon.engine.step import I32, GroupStep, Step
from tenon.models.spec import ModelSpec
from tests.engine.build import Run, smallest_block, step
from tests.engine.segments import same_bits
from tests.engine.test_kernels import BF16, CLOSE, FP32, SHAPES, Shape, error, normal

pytestmark = pytest.mark.torch
LAST = (0, 14, 15, 16, 30, 62, 63, 64, 100, 126, 127, 150)
"""Where runs of chain rows end: on both sides of where parts and tiles of the kernel do."""
N_POSITIONS, N_SPARE = 384, 512
PIECES = ("run tree", "run tree", "run tree run tree", "run hole run tree", "run hole run")


class Alone(NativeAttention):
    """Each row is an item."""

    def _plan(self, step: Step, items: tuple[I32, I32, I32], group: GroupStep, window: int) -> AttendStep:
        span, _, n = items
        rows = np.arange(step.n_rows, dtype=np.int32)
        return super()._plan(step, (np.repeat(span, n), rows, np.ones_like(rows)), group, window)


class Bench:
    """One layer's cache, NaN wherever nobody wrote, under an attention of each kind."""

    def __init__(self, shape: Shape, dtype: torch.dtype, n_seqs: int) -> None:
        H, G, D = shape.n_heads, shape.n_kv_heads, shape.head_dim
        self.shape, self.dtype, self.size = shape, dtype, max(shape.block_tokens, smallest_block(dtype))
        self.spec = ModelSpec("llama", 10, H * D, 1, H, G, D, 8, 2 * N_POSITIONS, windows=(shape.window,))
        self.spare = (n_seqs * -(-N_POSITIONS // self.size) + 1) * self.size
        self.kernel = native.load().attend[dtype]
        n_blocks = (self.spare + N_SPARE) // self.size
        self.together, self.alone = (kind(self.spec, dtype, native.load()) for kind in (NativeAttention, Alone))
        self.plain = TorchAttention(self.spec, torch.float64, torch.device("cpu"))
        for attention in (self.together, self.alone, self.plain):
            attention.allocate(self.spec.kv_groups("m", self.size, 4), n_blocks)
        for attention in (self.together, self.alone):
            attention.layers[0].k.fill_(torch.nan), attention.layers[0].v.fill_(torch.nan)

    def rows(self, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        H, G, D = self.shape.n_heads, self.shape.n_kv_heads, self.shape.head_dim
        q, k, v = (normal(3 * seed + i, n, heads, D, dtype=self.dtype) for i, heads in enumerate((H, G, G)))
        return q, k * 3, v

    def run(self, attention: NativeAttention, made: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention.begin(made)
        out, cache = torch.empty_like(q), attention.layers[0]
        places = (t.data_ptr() for t in (q, k, v, cache.k, cache.v, out))
        assert self.kernel(ctypes.addressof(attention.plans), self.shape.head_dim**-0.5, *places) == 0
        return out

    def right(self, made: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.plain.begin(made)
        q, k, v = q.double(), k.double(), v.double()
        return self.plain.attend(q, k, v, 0, self.shape.head_dim**-0.5, self.shape.window or 0)

    def at(self, run: Run, p: int) -> int:
        """The slot of a position."""
        return run.tables[0][p // self.size] * self.size + p % self.size


def tree(rng: np.random.Generator, n: int) -> list[int]:
    """Parents: bushes, or long paths with a few branches."""
    straight = rng.choice([0.3, 0.95])
    return [i - 1 if rng.random() < straight else int(rng.integers(-1, i)) for i in range(n)]


def spans(bench: Bench, rng: np.random.Generator, kinds: list[str], most_nodes: int) -> list[Run]:
    """Runs of positions, holes between them, trees below their last rows."""
    n_blocks = -(-N_POSITIONS // bench.size)
    blocks = rng.permutation(np.arange(1, len(kinds) * n_blocks + 1)).reshape(len(kinds), n_blocks).tolist()
    spare = (bench.spare + rng.permutation(N_SPARE)).tolist()
    made = []
    for seq, kind in enumerate(kinds):
        run = Run(seq, [], [], [blocks[seq]], parent=[], slots=[[]])
        last, pieces = int(rng.choice(LAST)), kind.split()
        for i, piece in enumerate(pieces):
            first = len(run.pos)
            if piece == "run":
                n = 1 if kind == "run tree" and rng.random() < 0.6 else int(rng.integers(1, 14))
                pos = list(range(max(0, last - n + 1) if i == 0 else last + 1, (last if i == 0 else last + n) + 1))
                parent, last = [-1] * len(pos), pos[-1]
                slots = [bench.at(run, p) for p in pos]
            elif piece == "tree":
                parent = [
                    first - 1 if above < 0 else first + above for above in tree(rng, int(rng.integers(1, most_nodes)))
                ]
                pos = []
                for above in parent:
                    pos.append((last if above < first else pos[above - first]) + 1)
                in_row = i == len(pieces) - 1 and rng.random() < 0.5  # where its tokens would be if each came true
                slots = [bench.at(run, last + 1 + j) if in_row else spare.pop() for j in range(len(pos))]
            else:
                last += int(rng.integers(1, 40))
                continue
            run.pos += pos
            run.parent += parent  # type: ignore[operator]
            run.slots[0] += slots  # type: ignore[index]
        run.tok = [0] * len(run.pos)
        made.append(run)
    return made


def contexts(runs: list[Run], size: int) -> Step:
    """All positions up to each span's last chain row."""
    made = []
    for run in runs:
        n = max(p for p, above in zip(run.pos, run.parent or (), strict=True) if above < 0) + 1
        made.append(Run(run.seq, [0] * n, list(range(n)), run.tables))
    return step(made, size)


def as_a_chain(bench: Bench, made: Step, runs: list[Run], row: int) -> tuple[Step, list[int]]:
    """The rows of a tree's path down to ``row`` as if they continued the context, and which they are."""
    path = [row]
    while made.parent[path[0]] >= 0:
        path.insert(0, int(made.parent[path[0]]))
    span = runs[int(np.searchsorted(made.q_start, row, side="right")) - 1]
    return step([Run(span.seq, [0] * len(path), made.pos[path].tolist(), span.tables)], bench.size), path


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most_nodes", [6, 40, 90])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_s_bits_are_those_of_the_row_alone_and_of_a_chain(
    shape: Shape, dtype: torch.dtype, most_nodes: int, seed: int
) -> None:
    rng = np.random.default_rng([shape.n_heads, shape.head_dim, most_nodes, seed])
    kinds = list(PIECES) if most_nodes > 6 else list(PIECES[1:3])
    bench = Bench(shape, dtype, len(kinds))
    runs = spans(bench, rng, kinds, most_nodes)
    made, before = step(runs, bench.size), contexts(runs, bench.size)
    assert (made.n_rows > FEW_ROWS) == (most_nodes > 6)  # both sizes of items
    written, rows = bench.rows(before.n_rows, 1), bench.rows(made.n_rows, 2)
    assert same_bits(bench.run(bench.together, before, *written), bench.run(bench.alone, before, *written))
    bench.right(before, *written)
    found = bench.run(bench.together, made, *rows)
    assert same_bits(found, bench.run(bench.alone, made, *rows))
    assert error(found, bench.right(made, *rows)) <= 2 * CLOSE[dtype]
    cache = bench.alone.layers[0]
    k, v = cache.k.clone(), cache.v.clone()
    below = np.flatnonzero(made.parent >= 0)
    for row in rng.choice(below, min(20, len(below)), replace=False).tolist():
        chain, path = as_a_chain(bench, made, runs, row)
        assert same_bits(bench.run(bench.together, chain, *(x[path] for x in rows))[-1], found[row])
        bench.together.layers[0].k.copy_(k), bench.together.layers[0].v.copy_(v)


def test_a_spoilt_row_of_a_tree_spoils_those_below_it_alone() -> None:
    shape = Shape(6, 2, 64)
    bench, rng = Bench(shape, BF16, 2), np.random.default_rng(1)
    runs = spans(bench, rng, ["run tree", "run tree"], 60)
    made, before = step(runs, bench.size), contexts(runs, bench.size)
    bench.run(bench.together, before, *bench.rows(before.n_rows, 1))
    q, k, v = bench.rows(made.n_rows, 2)
    clean = bench.run(bench.together, made, q, k, v)
    for row in np.flatnonzero(made.parent >= 0)[::5].tolist():
        spoilt_k, spoilt_v = k.clone(), v.clone()
        spoilt_k[row] = spoilt_v[row] = torch.nan
        found = bench.run(bench.together, made, q, spoilt_k, spoilt_v)
        below = np.arange(made.n_rows) == row
        for other in range(row + 1, made.n_rows):
            below[other] = made.parent[other] >= 0 and below[made.parent[other]]
        assert found[below].isnan().all()
        assert same_bits(found[~below], clean[~below])


def test_rows_of_a_tree_share_items() -> None:
    """What this file is about happens in its cases."""
    bench = Bench(Shape(6, 2, 64), FP32, 3)
    made = step(spans(bench, np.random.default_rng(2), list(PIECES[:3]), 40), bench.size)
    bench.together.begin(made)
    bench.alone.begin(made)
    assert bench.alone.plans[0].n_items == made.n_rows
    assert bench.together.plans[0].n_items < made.n_rows / 2
    assert (roots(made) < made.pos).any()
