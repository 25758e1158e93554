"""``Tree``: what was drafted for one sequence and goes into the next step; the walk decides what of it is true.

    row 0        the root: the sequence's newest token, whose K and V are not there yet
    row i + 1    node i; its parent comes before it

The target samples from the root's row what comes next. Where a child of the root has that token, the walk goes on from
its row, and so on: what is emitted is what the target samples at each row it comes to, which is what it would have
sampled without a tree. That holds for any tree, however it was drafted or pruned, and for any sampling rule whose noise
does not depend on the tree (AdaServe, arXiv 2501.12162, verifies by rejection instead; this rule accepts as often for
the same set of children, and is exact by construction).
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from tenon.base.errors import IntegrityError

ROOT = -1
Feature = tuple[int, float, int, float]


class Tree:
    """Nodes below a sequence's newest token, parents first. ``parents`` are nodes, or ``ROOT``.

    ``features`` are of each node the kind of guess it is, its drafter's probability, its rank among its siblings, and
    how likely the path to it was thought: for whoever learns from what comes of the tree.
    """

    __slots__ = ("depths", "features", "is_chain", "parents", "tokens")

    def __init__(self, tokens: list[int], parents: list[int], features: list[Feature] | None = None) -> None:
        self.tokens, self.parents = tokens, parents
        self.features = [(0, 0.0, 0, 0.0)] * len(tokens) if features is None else features
        chain = list(range(ROOT, len(parents) - 1))
        self.is_chain = parents == chain
        if self.is_chain:
            self.depths = list(range(1, len(parents) + 1))
            return
        depths: list[int] = []
        self.depths = depths
        for i, parent in enumerate(parents):
            if not ROOT <= parent < i:
                raise IntegrityError(f"node {i} of a tree comes before its parent {parent}")
            depths.append(1 if parent == ROOT else depths[parent] + 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def path(self, node: int) -> list[int]:
        """Tokens from below the root to ``node``, its own included."""
        found: list[int] = []
        while node != ROOT:
            found.append(self.tokens[node])
            node = self.parents[node]
        return found[::-1]

    def cut(self, n: int) -> Tree:
        """The first ``n`` nodes."""
        if n >= len(self):
            return self
        return Tree(self.tokens[:n], self.parents[:n], self.features[:n])

    def without(self, tokens: Set[int]) -> Tree:
        """The tree without nodes that have one of ``tokens``, and without what is below them."""
        if tokens.isdisjoint(self.tokens):
            return self
        place = {ROOT: ROOT}
        for i, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if token not in tokens and parent in place:
                place[i] = len(place) - 1
        kept = list(place)[1:]
        parents = [place[self.parents[i]] for i in kept]
        return Tree([self.tokens[i] for i in kept], parents, [self.features[i] for i in kept])


def walk(tree: Tree, sampled: Sequence[int]) -> list[int]:
    """The nodes that came true, from the root down. ``sampled``: what each row's sample was, the root's first; rows
    that the walk does not come to may have none."""
    path: list[int] = []
    at, token = ROOT, sampled[0]
    for i, parent in enumerate(tree.parents):
        if parent == at and tree.tokens[i] == token:
            path.append(i)
            at, token = i, sampled[i + 1]
    return path
