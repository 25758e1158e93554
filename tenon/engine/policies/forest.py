"""``Forest``: what was drafted for several sequences, as arrays of equal width, and what is done to it as a whole.

Row i is a tree over sequence i's newest token; its nodes stand parents first. Column order is the drafter's: of nodes
that are worth the same the earlier is the better one.

Shapes: n sequences, C columns. Unused columns have depth 0 and probability 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]
I16 = NDArray[np.int16]
I8 = NDArray[np.int8]
F32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

MAX_DEPTH: Final = 64


@dataclass
class Forest:
    """See the module's docstring. ``q`` is the drafter's own guess of a node's probability where its parent is true,
    ``f`` that of the whole path down to it, once somebody has judged it."""

    token: I32
    parent: I16
    """Column; -1: the root."""
    depth: I8
    rank: I8
    """Among its siblings, by ``q``: 0 is the likeliest."""
    source: I8
    """Which kind of guess it is, of those that its drafter makes."""
    q: F32
    f: F32
    chosen: Bool
    """Room for whoever chooses."""
    view: object = None
    """What a backend keeps of it: the arrays stay where they are."""

    @staticmethod
    def empty(n: int, C: int) -> Forest:
        def zeros(kind: type[np.generic]) -> NDArray[np.generic]:
            return np.zeros((n, C), kind)

        return Forest(
            token=np.zeros((n, C), np.int32),
            parent=np.full((n, C), -1, np.int16),
            depth=np.zeros((n, C), np.int8),
            rank=np.zeros((n, C), np.int8),
            source=np.zeros((n, C), np.int8),
            q=np.zeros((n, C), np.float32),
            f=np.zeros((n, C), np.float32),
            chosen=np.zeros((n, C), np.bool_),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.depth.shape

    @property
    def is_chains(self) -> bool:
        """Whether no tree branches and no column between two nodes is unused."""
        n, C = self.shape
        used = self.depth > 0
        return bool((self.depth[used] == np.broadcast_to(np.arange(1, C + 1, dtype=np.int8), (n, C))[used]).all())

    def spine(self) -> Bool:
        """(n, C) the chain from each root along the likeliest child of each node, of equals the earlier. Ranks do not
        say which that is: of children from several drafters each has its own first."""
        f = np.where(self.depth > 0, self.f, -1)
        on: Bool = np.zeros(self.shape, np.bool_)
        rows = np.arange(len(f))
        at = np.full(len(f), -1, np.int64)  # the last node of each row's chain; -1 is the root
        for _ in range(int(self.depth.max(initial=0))):
            children = np.where(self.parent[rows] == at[:, None], f[rows], -1)
            best = children.argmax(axis=1)
            goes_on = children[np.arange(len(rows)), best] >= 0
            rows, at = rows[goes_on], best[goes_on]
            on[rows, at] = True
        return on

    def multiply(self, p: F32) -> None:
        """``f`` from each node's probability ``p`` where its parent is true."""
        f = self.f
        if self.is_chains:
            np.multiply(np.cumprod(p, axis=1), self.depth > 0, out=f)
            return
        np.multiply(p, self.depth == 1, out=f)
        rows = np.arange(len(f))[:, None]
        up = np.maximum(self.parent, 0)
        for depth in range(2, int(self.depth.max(initial=0)) + 1):
            here = self.depth == depth
            f[here] = (f[rows, up] * p)[here]


_MIX: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(29)


def merged(forests: Sequence[Forest], C: int) -> Forest:
    """One trie per row of all forests' nodes, judged already: equal paths become one node, which is the likeliest of
    them; of each row the ``C`` likeliest nodes are kept. ``source`` is that of the node that was taken over.

    A path goes by a hash of 64 bits. A node is at least as likely as any that is below it in its own forest, and so as
    any below it in the trie: the likeliest are a trie too.
    """
    if len(forests) == 1:
        return forests[0]
    n, widths = forests[0].shape[0], [forest.shape[1] for forest in forests]
    W = sum(widths)
    shift = np.repeat(np.cumsum(widths) - widths, widths)

    def side_by_side(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(forest, name) for forest in forests], axis=1)

    parent = side_by_side("parent").astype(np.int64)
    above = np.where(parent < 0, -1, parent + shift + W * np.arange(n)[:, None]).ravel()
    depth, token = side_by_side("depth").ravel(), side_by_side("token").ravel().astype(np.uint64)
    f: F32 = np.concatenate([forest.f for forest in forests], axis=1).ravel()
    path = _paths(depth, token, above)
    places = np.flatnonzero(depth)
    row = places // W
    order = np.lexsort((-f[places], path[places], row))
    first = np.ones(len(order), np.bool_)
    first[1:] = (np.diff(row[order]) != 0) | (np.diff(path[places][order]) != 0)
    node_of = np.zeros(n * W, np.int64)  # of each place, its node in the trie
    node_of[places[order]] = np.cumsum(first) - 1
    best = places[order[first]]  # of each node, the place that is taken over
    ranked = np.lexsort((best, depth[best], -f[best], best // W))
    row = best[ranked] // W
    column = np.arange(len(best)) - np.searchsorted(row, row)
    column_of = np.zeros(len(best), np.int64)
    column_of[ranked] = column
    kept = column < C
    row, column, place = row[kept], column[kept], best[ranked[kept]]
    out = Forest.empty(n, C)
    out.parent[row, column] = np.where(above[place] < 0, -1, column_of[node_of[above[place]]])
    for name in ("token", "depth", "rank", "source", "q", "f"):
        getattr(out, name)[row, column] = side_by_side(name).ravel()[place]
    return out


def _paths(depth: NDArray[np.generic], token: NDArray[np.uint64], above: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number for each place's path of tokens; ``above`` is its parent's place, -1: the root."""
    path = np.zeros(len(token), np.uint64)
    for at in range(1, int(depth.max(initial=0)) + 1):
        here = np.flatnonzero(depth == at)
        up = path[above[here]] if at > 1 else np.full(len(here), _MIX)
        mixed = (up ^ (up >> _SHIFT)) * _MIX + token[here] + np.uint64(1)
        path[here] = (mixed ^ (mixed >> _SHIFT)) * _MIX
    return path
