"""Sequences with holes by hand: what is drawn, how it runs at an executor, how K, V and logits are compared.

Shapes: T positions of a sequence, V vocabulary, G key/value heads, D head size, B tokens per block, P elements that are
multiplied as one, N blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from torch import Tensor

from tenon.engine.executors.torch import TorchExecutor
from tenon.models.spec import KVGroup
from tests.engine.build import Lab, Run, errors, step
from tests.models import zoo

Groups = Callable[[int], tuple[KVGroup, ...]]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}
FORMS = ("first", "last", "alternating", "long", "single rows", "all but the last token", "random")
"""Of the holes of a case's first sequence."""
CHUNKS = (1, 3, 7, 16, 37, 200)


@dataclass(frozen=True)
class Work:
    """One sequence of a case: what of it is resident, and how many rows each step computes."""

    tokens: list[int]
    resident: np.ndarray
    """(T,) bool: what an earlier prefill left behind."""
    earlier: list[int]
    """Rows of that prefill's steps."""
    rows: list[int]
    """Rows of each step now; 0 passes a step over."""


@dataclass
class Computed:
    """Logits (V,) by position, and each layer's K and V (T, G, D) in position order."""

    logits: dict[int, Tensor] = field(default_factory=dict)
    kv: list[tuple[Tensor, Tensor]] = field(default_factory=list)


# -- drawing -----------------------------------------------------------------------------------------------------


def split(rng: np.random.Generator, n: int, most: int, pauses: float = 0.0) -> list[int]:
    """``n`` in parts of at most ``most``, some zeros between them."""
    parts: list[int] = []
    while n:
        parts.append(0 if rng.random() < pauses else int(rng.integers(1, min(n, most) + 1)))
        n -= parts[-1]
    return parts


def work(rng: np.random.Generator, resident: np.ndarray, most: int) -> Work:
    """A sequence of this residency whose steps have at most ``most`` rows."""
    n, last = len(resident), int(np.flatnonzero(resident).max(initial=-1))
    earlier = split(rng, last + 1, int(rng.choice([9, 40, 300])))
    rows = split(rng, n - int(resident.sum()), most, 0.0 if most == 1 else 0.2)
    return Work(rng.integers(3, zoo.VOCAB, n).tolist(), resident, earlier, rows)


def holed(form: str, size: int, rng: np.random.Generator) -> Work:
    """A sequence with holes of one of ``FORMS`` in blocks of ``size``; the last position is never resident."""
    n = int(rng.integers(2 * size + 2, 2 * size + 70)) if size > 16 else int(rng.integers(65, 135))
    most = int(rng.choice(CHUNKS[1:]))
    if form == "all but the last token":
        n = n // size * size + 1
    full = (n - 1) // size
    kept = rng.random(full) < rng.choice([0.3, 0.6, 0.9])
    kept[rng.integers(0, full)] = True
    if form == "first":
        kept[0], kept[1] = False, True
    elif form == "last":
        kept[:], kept[-1] = True, False
    elif form == "alternating":
        kept = np.arange(full) % 2 == rng.integers(0, 2)
    elif form == "long":
        kept[:] = True
        kept[full // 4 : max(full // 4 + 1, full - max(1, full // 8))] = False
        most = 5
    elif form == "single rows":
        most = 1
    elif form == "all but the last token":
        kept[:] = True
    return work(rng, np.append(np.repeat(kept, size), np.zeros(n - full * size, bool)), most)


def company(kind: str, size: int, rng: np.random.Generator) -> Work:
    """Another sequence: one that decodes, one with nothing resident, or one with holes."""
    if kind == "holes":
        return holed("random", size, rng)
    n = int(rng.integers(5, 100))
    if kind == "chunks":
        return work(rng, np.zeros(n, bool), int(rng.choice(CHUNKS[1:])))
    return work(rng, np.arange(n) < n - int(rng.integers(1, 5)), 1)


def draw(form: str, size: int, seed: Sequence[int]) -> list[Work]:
    """A case: a sequence with holes and up to three others beside it."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(["decodes", "chunks", "holes"], int(rng.integers(0, 4))).tolist()
    return [holed(form, size, rng), *(company(kind, size, rng) for kind in kinds)]


# -- running -----------------------------------------------------------------------------------------------------


class Bench:
    """An executor whose cache holds a case's sequences in blocks of ``size``; whatever nobody wrote is NaN."""

    def __init__(self, executor: TorchExecutor, groups: Groups, works: Sequence[Work], size: int, seed: int = 0):
        self.executor, self.works, self.size = executor, works, size
        self.rng = np.random.default_rng(seed)
        self.need = [-(-len(w.tokens) // size) for w in works]
        self.n_blocks = 2 * sum(self.need) + 1
        made = groups(size)
        executor.allocate(made, self.n_blocks)
        self.poison(np.arange(self.n_blocks * size), range(len(made)))
        spare = [(1 + self.rng.permutation(self.n_blocks - 1)).tolist() for _ in made]
        self.tables = [[[free.pop() for _ in range(n)] for free in spare] for n in self.need]
        for seq, (each, tables) in enumerate(zip(works, self.tables, strict=True)):
            for start, end in itertools.pairwise(np.cumsum([0, *each.earlier]).tolist()):
                executor.logits(step([self.span(seq, start, end, [])], size))
            for group, table in enumerate(tables):
                self._lose(each.resident, table, group, spare[group])

    def _lose(self, resident: np.ndarray, table: list[int], group: int, spare: list[int]) -> None:
        """Blocks without a resident position are others now; whatever is not resident is poisoned."""
        B = self.size
        kept = np.append(resident, np.zeros(-len(resident) % B, bool)).reshape(-1, B)
        slots = np.array(table)[:, None] * B + np.arange(B)
        for i in np.flatnonzero(~kept.any(1)):
            table[i] = spare.pop()
        self.poison(slots[~kept], [group])

    def views(self) -> list[tuple[int, Tensor, Tensor]]:
        """Of each layer its group, and K and V as views (N, B / P, P, G, ...)."""
        attention, made = self.executor._attention, []
        for layer in getattr(attention, "layers", None) or attention._layers:
            if layer.k.dim() == 3:
                k, v = (x.unflatten(0, (self.n_blocks, self.size, 1)) for x in (layer.k, layer.v))
            else:
                P = layer.k.shape[-1]
                k = layer.k.permute(1, 3, 0, 2, 4).unflatten(1, (self.size // P, P))
                v = layer.v.permute(1, 2, 4, 0, 3)
            made.append((layer.group, k, v))
        return made

    def places(self, slots: np.ndarray, like: Tensor) -> tuple[Tensor, ...]:
        """Where slots lie in a view."""
        block, at, P = slots // self.size, slots % self.size, like.shape[2]
        return tuple(torch.from_numpy(x) for x in (block, at // P, at % P))

    def poison(self, slots: np.ndarray, groups: Sequence[int]) -> None:
        for group, k, v in self.views():
            if group in groups:
                k[self.places(slots, k)] = v[self.places(slots, v)] = float("nan")

    def span(self, seq: int, start: int, end: int, out: list[int] | None = None) -> Run:
        """Positions [start, end) of a sequence; all rows' logits unless ``out``."""
        rows = list(range(end - start)) if out is None else out
        return Run(seq, self.works[seq].tokens[start:end], list(range(start, end)), self.tables[seq], rows)

    def plan(self) -> list[list[Run]]:
        """The case's steps: what is not resident in position order, the spans of a step in any order."""
        left = [np.flatnonzero(~w.resident) for w in self.works]
        steps: list[list[Run]] = []
        for sizes in itertools.zip_longest(*(w.rows for w in self.works), fillvalue=0):
            spans: list[Run] = []
            for seq, n in enumerate(sizes):
                take, left[seq] = left[seq][:n], left[seq][n:]
                runs = np.split(take, np.flatnonzero(np.diff(take) > 1) + 1)
                spans += [self.span(seq, int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
            self.rng.shuffle(spans)  # type: ignore[arg-type]
            steps.append(spans)
        return [spans for spans in steps if spans]

    def run(self, steps: list[list[Run]]) -> list[Computed]:
        """Carry out these steps; what came of each sequence."""
        made = [Computed() for _ in self.works]
        for spans in steps:
            where = [(run.seq, run.pos[row]) for run in spans for row in run.out]
            for (seq, position), row in zip(where, self.executor.logits(step(spans, self.size)), strict=True):
                made[seq].logits[position] = row.clone()
        for seq, it in enumerate(made):
            it.kv = self.kv(seq)
        return made

    def kv(self, seq: int) -> list[tuple[Tensor, Tensor]]:
        """Each layer's K and V (T, G, D) of a sequence."""
        p = np.arange(len(self.works[seq].tokens))
        slots = [np.array(table)[p // self.size] * self.size + p % self.size for table in self.tables[seq]]
        found = []
        for group, k, v in self.views():
            found.append(tuple(x[self.places(slots[group], x)].flatten(2) for x in (k, v)))
        return found  # type: ignore[return-value]


def serve(lab: Lab, works: Sequence[Work], size: int, seed: int = 0) -> list[Computed]:
    """A case as it is planned."""
    bench = Bench(lab.executor, lab.groups, works, size, seed)
    return bench.run(bench.plan())


def prefill(executor: TorchExecutor, groups: Groups, tokens: list[int], size: int = 16) -> Computed:
    """One full prefill in a fresh cache."""
    alone = Work(tokens, np.zeros(len(tokens), bool), [], [len(tokens)])
    bench = Bench(executor, groups, [alone], size)
    return bench.run(bench.plan())[0]


def transformers_computes(lab: Lab, tokens: list[int], dtype: torch.dtype) -> Computed:
    """The same of transformers in ``dtype``, as fp64."""
    (logits,) = lab.references([tuple(tokens)], dtype)
    cache = transformers.DynamicCache()
    with torch.inference_mode():
        lab.models[dtype](torch.tensor([tokens]), None, None, cache)  # by place: its name depends on the version
    kv = [(layer.keys[0].transpose(0, 1).double(), layer.values[0].transpose(0, 1).double()) for layer in cache.layers]
    return Computed(dict(enumerate(logits)), kv)


# -- comparing ---------------------------------------------------------------------------------------------------


def same_bits(found: Tensor, right: Tensor) -> bool:
    return torch.equal(found.contiguous().view(BITS[found.dtype]), right.contiguous().view(BITS[right.dtype]))


def row_errors(found: Computed, right: Computed) -> tuple[Tensor, Tensor]:
    """Errors of the computed logits' rows, and of every K and V's."""
    rows = [torch.stack([it.logits[p].double() for p in found.logits]) for it in (found, right)]
    pairs = zip(itertools.chain(*found.kv), itertools.chain(*right.kv), strict=True)
    return errors(*rows), torch.cat([errors(ours.flatten(1), theirs.flatten(1)) for ours, theirs in pairs])


Same = Callable[[Tensor, Tensor], bool]


def differences(found: Computed, right: Computed, same: Same = same_bits) -> list[str]:
    """What of K, V and the logits that were computed is not the same."""
    names = [f"{what} of layer {i}" for i in range(len(right.kv)) for what in "KV"]
    pairs = zip(itertools.chain(*found.kv), itertools.chain(*right.kv), strict=True)
    wrong = [name for name, (ours, theirs) in zip(names, pairs, strict=True) if not same(ours, theirs)]
    return wrong + [f"logits at {p}" for p, row in found.logits.items() if not same(row, right.logits[p])]
