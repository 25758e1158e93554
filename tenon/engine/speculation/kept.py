"""The newest trees that were verified, for whoever looks at what was guessed.

Keeping one costs an entry in a ring; it is put into words when somebody asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final, NamedTuple

from tenon.engine.messages import Trees, Verified
from tenon.engine.sequence import Seq
from tenon.engine.speculation.tree import Tree

MAX_TREES: Final = 512
MAX_TOLD: Final = 64
"""In a batch."""


class _Entry(NamedTuple):  # a third of what a frozen dataclass takes to make, once a tree
    """See ``Verified``. It has no part of the sequence, which would keep its whole text alive."""

    request_id: str
    sibling: int
    tenant: str
    n_tokens: int
    root: int
    tree: Tree
    path: Sequence[int]
    next: int

    def told(self) -> Verified:
        tree = self.tree
        return Verified(
            self.request_id, self.sibling, self.tenant, self.n_tokens, self.root, tuple(tree.tokens),
            tuple(tree.parents), tuple(f for _, _, _, f in tree.features), tuple(self.path), self.next,
        )  # fmt: skip


class Kept:
    """Of all sequences together, in order."""

    def __init__(self) -> None:
        self._ring: deque[_Entry] = deque(maxlen=MAX_TREES)
        self._n = self._n_told = 0
        """How many there ever were, and how many of these have been taken, or passed over."""

    def add(self, seq: Seq, tree: Tree, path: Sequence[int]) -> None:
        """The tree's ``path`` and one token more are the sequence's newest."""
        add, n_tokens = seq.request.add, seq.n_tokens - len(path) - 1
        root, after = seq.tokens.item(n_tokens - 1), seq.tokens.item(seq.n_tokens - 1)
        self._ring.append(_Entry(add.request_id, seq.index, add.tenant, n_tokens, root, tree, path, after))
        self._n += 1

    def of(self, request_id: str, index: int = 0) -> list[Verified]:
        """Of one sequence, as far as they are among the newest."""
        return [it.told() for it in self._ring if it.request_id == request_id and it.sibling == index]

    def take(self) -> Trees:
        """What has come since this was last called, at most ``MAX_TOLD``, the newest."""
        n_new = self._n - self._n_told
        n = min(n_new, MAX_TOLD)
        self._n_told = self._n
        return Trees(tuple(it.told() for it in islice(self._ring, len(self._ring) - n, None)), n_new - n)

    def restart(self) -> None:
        """The next batch begins with the newest there are."""
        self._n_told = self._n - min(len(self._ring), MAX_TOLD)
