"""Trees and forests for tests: all small ones, random ones, a drafter that says what it is told to.

Shapes: n sequences, C columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tenon.engine.engine import Engine
from tenon.engine.messages import Add
from tenon.engine.policies.forest import I32, Forest
from tenon.engine.policies.speculate import FixedTree, Speculate
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.sequence import Request, Seq
from tenon.engine.speculation.drafter import Drafter
from tenon.engine.speculation.speculation import Speculation
from tenon.engine.speculation.tree import ROOT, Tree

MAX_NODES = 16


def shapes(n: int) -> Iterator[list[int]]:
    """The parents of all trees of ``n`` nodes."""
    return (list(parents) for parents in itertools.product(*(range(ROOT, i) for i in range(n))))


def named(rng: np.random.Generator, parents: list[int], vocab_size: int) -> Tree:
    """A tree of this shape; siblings have different tokens where there are enough."""
    tokens: list[int] = []
    for i, parent in enumerate(parents):
        taken = {tokens[k] for k in range(i) if parents[k] == parent}
        free = [token for token in range(vocab_size) if token not in taken] or list(range(vocab_size))
        tokens.append(int(rng.choice(free)))
    return Tree(tokens, parents)


def random_tree(rng: np.random.Generator, n: int, vocab_size: int, deepest: int = MAX_NODES) -> Tree:
    """``n`` nodes, long paths as likely as broad trees, none deeper than ``deepest``."""
    parents, depths = [], []
    for i in range(n):
        parent = i - 1 if rng.random() < 0.4 else int(rng.integers(ROOT, i))
        if parent != ROOT and depths[parent] == deepest:
            parent = ROOT
        parents.append(parent)
        depths.append(1 if parent == ROOT else depths[parent] + 1)
    return named(rng, parents, vocab_size)


def ranks(tree: Tree, q: Sequence[float] | None = None) -> list[int]:
    """Of each node among its siblings, by ``q``, or in their order."""
    q = [0.0] * len(tree) if q is None else q
    found = []
    for i, parent in enumerate(tree.parents):
        siblings = [k for k in range(len(tree)) if tree.parents[k] == parent]
        found.append(sorted(siblings, key=lambda k: (-q[k], k)).index(i))
    return found


def planted(trees: Sequence[Tree | None], C: int) -> Forest:
    """A forest of these trees, not judged; ``q`` is a half everywhere."""
    forest = Forest.empty(len(trees), C)
    for i, tree in enumerate(trees):
        if tree is not None:
            k = len(tree)
            forest.token[i, :k], forest.parent[i, :k], forest.depth[i, :k] = tree.tokens, tree.parents, tree.depths
            forest.rank[i, :k], forest.q[i, :k] = ranks(tree), 0.5
    return forest


def grown(n: int, C: int, seed: int, *, ties: bool = False, chains: bool = False, n_kinds: int = 1) -> Forest:
    """A random forest that is judged: with ``ties`` many nodes are worth the same, some as much as their parents."""
    rng = np.random.default_rng(seed)
    forest = Forest.empty(n, C)
    p = np.zeros((n, C), np.float32)
    for i in range(n):
        k = int(rng.integers(0, C + 1))
        tree = Tree(rng.integers(0, 9, k).tolist(), list(range(ROOT, k - 1))) if chains else random_tree(rng, k, 9)
        q = rng.choice([0.25, 0.5, 1.0], k) if ties else rng.uniform(0.02, 1.0, k)
        forest.token[i, :k], forest.parent[i, :k], forest.depth[i, :k] = tree.tokens, tree.parents, tree.depths
        forest.rank[i, :k], forest.q[i, :k] = ranks(tree, q.tolist()), q
        forest.source[i, :k] = rng.integers(0, n_kinds, k)
        p[i, :k] = q
    forest.multiply(p)
    return forest


class Scripted:
    """A drafter that guesses what ``script`` says of a sequence."""

    name, kinds, beliefs = "scripted", ("scripted",), (0.0,)

    def __init__(self, script: Callable[[Seq], Tree | None]) -> None:
        self._script = script

    def propose(self, seqs: Sequence[Seq], depth_n: I32, room: int) -> Forest | None:
        """As much of it as is not too deep and has room."""
        trees: list[Tree | None] = []
        for seq, deepest in zip(seqs, depth_n.tolist(), strict=True):
            tree = self._script(seq)
            trees.append(None if tree is None else shallow(tree, deepest).cut(room))
        return planted(trees, room) if any(trees) else None

    def forget(self, seq: Seq) -> None:
        """It remembers nobody."""

    def reset(self) -> None:
        """Nor anything."""

    def close(self) -> None:
        """It holds nothing."""


def shallow(tree: Tree, deepest: int) -> Tree:
    """The nodes that are no deeper."""
    kept = [i for i in range(len(tree)) if tree.depths[i] <= deepest]
    place = {ROOT: ROOT} | {node: k for k, node in enumerate(kept)}
    return Tree([tree.tokens[i] for i in kept], [place[tree.parents[i]] for i in kept])


def speculating(made: Engine, drafters: Sequence[Drafter], policy: Speculate | None = None) -> Engine:
    """The same engine, guessing with these; all that they say is verified unless ``policy`` says otherwise."""
    times = StepTimes({1: 1e-3})
    made.scheduler.speculation = Speculation(drafters, policy or FixedTree(MAX_NODES), times, max_nodes=MAX_NODES)
    return made


def decoding(made: Engine, add: Add) -> Seq:
    """The request's first sequence once its prompt is computed."""
    made.add(add)
    seq = made.scheduler.requests[add.request_id].seqs[0]
    while not seq.is_decoding:
        made.tick(0.0)
        assert not seq.finished
    return seq


def sequence(seq_id: int, n_prompt: int, n_output: int = 0, *, size: int = 4, **wishes: Any) -> Seq:
    """By hand, its tokens counted through; its blocks are numbered from a hundred times its id on."""
    wishes = {"temperature": 0.0, "outputs": tuple(range(n_prompt, n_prompt + n_output))} | wishes
    add = Add(f"r{seq_id}", tuple(range(n_prompt)), n_output + 40, 100 + seq_id, **wishes)
    request = Request(add, seq_id, bytes(32), bytes(32), frozenset(add.stop_ids))
    seq = Seq(seq_id, request, 0, 1, size, MAX_NODES)
    request.seqs.append(seq)
    seq.tables[0][:] = 100 * seq_id + np.arange(len(seq.tables[0]))
    seq.n_computed = max(0, seq.n_tokens - 1)
    return seq
