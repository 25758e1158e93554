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
        """(n, C) the chain from each root along the likeliest child of each node. Ranks do not say which that is:
        of children from several drafters each has its own first."""
        n, C = self.shape
        rows = np.arange(n)[:, None]
        place = np.flatnonzero(self.depth)
        family = (self.parent + np.int64(1) + rows * (C + 1)).ravel()[place]
        place = place[np.lexsort((-self.f.ravel()[place], family))]  # of equals the earlier
        on: Bool = np.zeros((n, C), np.bool_)
        on.ravel()[place[np.diff(np.sort(family), prepend=-1) > 0]] = True
        up = np.maximum(self.parent, 0)
        for depth in range(2, int(self.depth.max(initial=0)) + 1):
            here = self.depth == depth
            on &= ~here | on[rows, up]
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


def merged(forests: Sequence[Forest], C: int) -> Forest:
    """One trie per row of all forests' nodes, judged already: equal paths become one node, which is the likeliest of
    them; of each row the ``C`` likeliest nodes are kept. ``source`` is that of the node that was taken over.
    """
    if len(forests) == 1:
        return forests[0]
    n = forests[0].shape[0]
    out = Forest.empty(n, C)
    for i in range(n):
        place: dict[tuple[int, int], int] = {}
        nodes: list[tuple[float, int, int, int, int, int, float]] = []
        for forest in forests:
            at: dict[int, int] = {-1: -1}
            for c in range(int(np.count_nonzero(forest.depth[i]))):
                parent, token = at[int(forest.parent[i, c])], int(forest.token[i, c])
                node = (
                    float(forest.f[i, c]), parent, token, int(forest.depth[i, c]), int(forest.rank[i, c]),
                    int(forest.source[i, c]), float(forest.q[i, c]),
                )  # fmt: skip
                known = place.setdefault((parent, token), len(nodes))
                if known == len(nodes):
                    nodes.append(node)
                elif node[0] > nodes[known][0]:
                    nodes[known] = node
                at[c] = known
        # A node is at least as likely as any that is below it, so the likeliest are a tree; parents stand first.
        for known, node in enumerate(nodes):
            if node[1] >= 0 and nodes[node[1]][0] < node[0]:
                nodes[known] = (nodes[node[1]][0], *node[1:])
        kept = sorted(range(len(nodes)), key=lambda k: (-nodes[k][0], k))[:C]
        column = {k: c for c, k in enumerate(kept)}
        column[-1] = -1
        for k, c in column.items():
            if k >= 0:
                f, parent, token, depth, rank, source, q = nodes[k]
                out.f[i, c], out.q[i, c], out.token[i, c], out.depth[i, c] = f, q, token, depth
                out.rank[i, c], out.source[i, c], out.parent[i, c] = rank, source, column[parent]
    return out
