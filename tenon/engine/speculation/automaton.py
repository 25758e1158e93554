"""A suffix automaton over token strings (Blumer et al. 1985): after any context, what has followed its longest suffix.

A state stands for all substrings that end at the same places. This is ``compiler/csrc/suffix.c`` in Python: what is
used where there is no C compiler, and what the C is compared with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

ROOT: Final = 0
COUNTED_LINKS: Final = 64
"""Suffixes of a new end whose counts are kept; beyond them, the shortest, a count may lag."""
CHILDREN: Final = 4
"""Of a node, the likeliest ones that are looked at."""
MOST_EDGES: Final = 32
BOUNDS: Final = (1, 2, 4, 8, 16)
"""Lengths of a match up to which a kind of guess goes; the last one has no end."""

Node = tuple[int, int, int, int, float]
"""Token, parent (-1: the root), depth, rank among its siblings, probability where its parent is true."""


class Automaton:
    """Grows with every token; nothing is ever taken out."""

    def __init__(self) -> None:
        self.length, self.link, self.count = [0], [-1], [0]
        self.edges: list[dict[int, int]] = [{}]
        self.last = ROOT

    def begin(self) -> None:
        """The next string begins: what is added from now on follows nothing."""
        self.last = ROOT

    def add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._extend(token)

    def _state(self, length: int, link: int, count: int) -> int:
        self.length.append(length)
        self.link.append(link)
        self.count.append(count)
        self.edges.append({})
        return len(self.length) - 1

    def _extend(self, token: int) -> None:
        p = self.last
        if token in self.edges[p]:  # in an earlier string this has been here before
            now = self._follow(p, token)
        else:
            now = self._state(self.length[p] + 1, ROOT, 0)
            while p >= 0 and token not in self.edges[p]:
                self.edges[p][token] = now
                p = self.link[p]
            if p >= 0:
                self.link[now] = self._follow(p, token)
        self.last = now
        state = now
        for _ in range(COUNTED_LINKS):
            if state == ROOT:
                break
            self.count[state] += 1
            state = self.link[state]

    def _follow(self, p: int, token: int) -> int:
        """The state of ``p``'s longest string and ``token``, taken out of a longer one's where it has none yet."""
        q = self.edges[p][token]
        if self.length[q] == self.length[p] + 1:
            return q
        clone = self._state(self.length[p] + 1, self.link[q], self.count[q])
        self.edges[clone] = dict(self.edges[q])
        while p >= 0 and self.edges[p].get(token) == q:
            self.edges[p][token] = clone
            p = self.link[p]
        self.link[q] = clone
        return clone

    def advance(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Where a context that ended in ``state``, matched over ``length`` tokens, ends with one token more."""
        while state != ROOT and token not in self.edges[state]:
            state = self.link[state]
            length = self.length[state]
        to = self.edges[state].get(token)
        return (ROOT, 0) if to is None else (to, length + 1)

    def settled(self, state: int, length: int) -> int:
        """The state that ``state`` has been split into for strings of this length."""
        while self.link[state] >= 0 and self.length[self.link[state]] >= length:
            state = self.link[state]
        return state

    def guess(self, state: int, depth: int, room: int, doubt: float, floor: float) -> list[Node]:
        """At most ``room`` nodes below a context that ends in ``state``, the likeliest first: probabilities are shares
        of counts, with ``doubt`` of a count more for whatever was never seen there; a path has at least ``floor``."""
        found: list[tuple[float, int, Node]] = []
        nodes: list[Node] = []

        def look(state: int, path: float, parent: int, depth: int) -> None:
            edges = self.edges[state]
            if len(edges) > MOST_EDGES:  # what may be followed by so much says nothing
                return
            counts = [(self.count[to], token, to) for token, to in reversed(edges.items())]
            total = sum(count for count, _, _ in counts)
            counts.sort(key=lambda each: -each[0])
            for rank, (count, token, to) in enumerate(counts[:CHILDREN]):
                q = count / (total + doubt)
                found.append((path * q, to, (token, parent, depth, rank, q)))

        look(state, 1.0, -1, 1)
        while found and len(nodes) < room:
            first = max(range(len(found)), key=lambda i: (found[i][0], -i))
            path, to, node = found.pop(first)
            if path < floor:
                break
            nodes.append(node)
            if node[2] < depth:
                look(to, path, len(nodes) - 1, node[2] + 1)
        return nodes


def bucket(length: int) -> int:
    """The kind of guess that a match of this length makes."""
    return next((i for i, bound in enumerate(BOUNDS) if length <= bound), len(BOUNDS))
